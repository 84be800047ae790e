"""Table 1 of the paper, and the short form of a victim, on the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from deepenc.cli import app, paper
from deepenc.encryption.disk import checkpoint

Run = Callable[..., Result]

# Sites and channels at each as they were worked out from the printed counts.
SITES = {
    **{"ResNet-18": (8, 6), "ResNet-34": (16, 5), "ResNet-50": (32, 5), "ResNet-101": (66, 6)},
    **{"ResNet-152": (100, 5), "VGG-16": (12, 18), "VGG-19": (15, 18)},
    **{
        "DenseNet-121": (58, 16),
        "DenseNet-169": (82, 24),
        "DenseNet-201": (98, 31),
        "DenseNet-161": (78, 35),
    },
    **{"ViT-tiny": (12, 38), "ViT-small": (12, 76), "ViT-base": (12, 153), "ViT-large": (24, 204)},
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPENC_PASSPHRASE", "open sesame")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces the table by some of its rows, with changes."""

    def replace(names: tuple[str, ...], **changes: object) -> None:
        chosen = [row | changes for row in paper.read() if row["network"] in names]
        (tmp_path / "rows.yaml").write_text(yaml.safe_dump(chosen))
        monkeypatch.setattr(paper, "ROWS", tmp_path / "rows.yaml")

    return replace


@pytest.mark.parametrize("item", paper.read(), ids=lambda item: str(item["network"]))
def test_the_paper_s_parameters_come_out_to_two_decimals(item: dict[str, object]) -> None:
    row = paper.count(item)
    assert (row.sites, row.count) == SITES[row.network]
    assert row.equal, (row, paper.millions(row.before), paper.millions(row.after))


def test_the_table_has_the_paper_s_fifteen_rows() -> None:
    assert [item["network"] for item in paper.read()] == list(SITES)


def test_the_command_prints_ours_beside_the_paper_s(run: Run, rows: Callable[..., None]) -> None:
    rows(("ResNet-18", "VGG-16"))
    result = run("paper", "table1", "--parameters-only")
    assert result.exit_code == 0, result.output
    (line,) = (line for line in result.stdout.splitlines() if "ResNet-18" in line)
    assert line.split() == ["ResNet-18", "8", "6", "11.69", "11.69", "11.87", "11.87", "1.57", "%", "yes"]
    assert "2 of 2 rows are the paper's" in result.stdout


@pytest.mark.parametrize("changes", [{"after": "139.59"}, {"before": "138.35"}])
def test_a_row_that_differs_is_told_and_fails(run: Run, rows: Callable[..., None], changes: object) -> None:
    rows(("VGG-16",), **changes)  # type: ignore[arg-type]
    result = run("paper", "table1", "--parameters-only")
    assert result.exit_code == 1
    assert "NO" in result.stdout and "0 of 1 rows are the paper's" in result.stdout


def test_rows_whose_library_is_missing_are_told(
    run: Run, rows: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows(("VGG-16", "ViT-tiny"))
    monkeypatch.setitem(sys.modules, "timm", None)
    result = run("paper", "table1", "--parameters-only")
    assert result.exit_code == 1
    assert "1 of 2 rows are the paper's" in result.stdout
    assert (
        'not counted: ViT-tiny: the networks of timm need timm: pip install "deepenc[timm]"' in result.stdout
    )


def test_accuracies_are_not_promised(run: Run) -> None:
    result = run("paper", "table1")
    assert result.exit_code == 1
    assert "--parameters-only" in result.output and "Traceback" not in result.output


def test_a_network_of_the_user_s_own_by_its_function(run: Run, tmp_path: Path) -> None:
    (tmp_path / "own_networks_cli.py").write_text(
        "from torch import nn\n"
        "def build():\n    return nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 2))\n"
    )
    spec = "own_networks_cli:build,example=2x3"
    shown = run("inspect", spec, "--why")
    assert shown.exit_code == 0, shown.output
    assert "own_networks_cli:build, as the function makes it: 1 sites" in " ".join(shown.stdout.split())
    assert run("encrypt", spec, "out", "--key", "key").exit_code == 0
    assert run("decrypt", "out", "key", "victim.safetensors").exit_code == 0
    stored = checkpoint.load(tmp_path / "out")
    assert str(stored.factory) == "own_networks_cli:build"
    assert stored.rebuild(allow=("own_networks_cli:build",)).get_submodule("0").out_features == 21


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("timm:resnet10", "did you mean 'resnet10t'"),
        ("torchvision:resnet19", "did you mean 'resnet18'"),
        ("nobody_s_module:build", "cannot import nobody_s_module:build"),
        ("nothing", "There is no folder 'nothing' either"),
    ],
)
def test_networks_that_are_not_there(run: Run, text: str, message: str) -> None:
    result = run("inspect", text)
    assert result.exit_code == 1
    assert message in result.output and "Traceback" not in result.output
