"""Every example in the documentation is run, word for word."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DEEPENC = Path(sys.executable).with_name("deepenc")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def plugins_of(page: str, folder: Path) -> list[Path]:
    """Each plugin of a page in a file of its own."""
    files = []
    for index, code in enumerate(block for block in blocks(page, "python") if "class " in block):
        files.append(folder / f"my_plugin{index or ''}.py")
        files[-1].write_text(code, encoding="utf-8")
    assert files
    return files


def deepenc(*arguments: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [DEEPENC, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_readme_s_attack_is_short() -> None:
    (code,) = (block for block in blocks("README.md", "python") if "class " in block)
    assert len(code.splitlines()) < 30


@pytest.mark.parametrize("page", ["README.md", "docs/writing_an_attack.md", "docs/writing_a_defense.md"])
def test_plugins_of_the_pages_keep_the_contract(page: str, tmp_path: Path) -> None:
    for plugin in plugins_of(page, tmp_path):
        said = deepenc("check", plugin, cwd=tmp_path)
        assert "passed" in said and "failed" not in said.lower().replace("0 failed", "")


def test_the_readme_s_attack_runs_in_a_matrix(tmp_path: Path) -> None:
    (plugin,) = plugins_of("README.md", tmp_path)
    (experiment,) = (block for block in blocks("README.md", "yaml") if "attacks:" in block)
    (tmp_path / "mine.yaml").write_text(experiment, encoding="utf-8")
    said = deepenc("run", "mine.yaml", "--plugin", plugin, "--out", "runs/mine", cwd=tmp_path)
    assert yaml.safe_load(experiment)["attacks"][0] in said
    assert deepenc("report", "runs/mine", "--csv", "mine.csv", cwd=tmp_path)
    lines = (tmp_path / "mine.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 1


def test_the_readme_s_library_calls() -> None:
    (code,) = (block for block in blocks("README.md", "python") if "find_sites" in block)
    exec(compile(code, "README.md", "exec"), {})


def test_the_readme_s_commands_on_one_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block of shell commands that encrypts, inspects and decrypts."""
    monkeypatch.setenv("DEEPENC_PASSPHRASE", "correct horse battery staple")
    (commands,) = (block for block in blocks("README.md", "sh") if "deepenc encrypt" in block)
    for line in commands.splitlines():
        program, *arguments = line.split("#")[0].split()
        assert program == "deepenc"
        assert shutil.which(DEEPENC)
        deepenc(*arguments, cwd=tmp_path)


def test_the_readme_s_commands_on_any_network(tmp_path: Path) -> None:
    (commands,) = (block for block in blocks("README.md", "sh") if "table1" in block)
    for line in commands.splitlines():
        program, *arguments = line.split("#")[0].split()
        assert program == "deepenc"
        if arguments[0] != "paper":  # tests/cli/test_paper.py runs it
            deepenc(*arguments, cwd=tmp_path)


@pytest.mark.parametrize("page", ["docs/networks.md", "docs/defenses.md", "docs/tuning.md"])
def test_the_library_calls_of_a_page(page: str) -> None:
    found = blocks(page, "python")
    assert found
    for code in found:
        exec(compile(code, page, "exec"), {})


def test_the_page_on_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands in their order in one folder, openssl's among them, and its library calls."""
    monkeypatch.setenv("DEEPENC_PASSPHRASE", "correct horse battery staple")
    for line in "".join(blocks("docs/keys.md", "sh")).splitlines():
        program, *arguments = line.split("#")[0].split()
        if program == "deepenc":
            deepenc(*arguments, cwd=tmp_path)
        else:
            assert program == "openssl"
            subprocess.run([program, *arguments], cwd=tmp_path, check=True, timeout=60)
    (code,) = blocks("docs/keys.md", "python")
    exec(compile(code, "docs/keys.md", "exec"), {})


@pytest.mark.parametrize(
    ("page", "what"),
    [
        ("docs/attacks.md", "attacks"),
        ("docs/defenses.md", "placements"),
        ("docs/defenses.md", "weights"),
        ("docs/defenses.md", "hardenings"),
        ("docs/defenses.md", "defenses"),
        ("docs/own_network.md", "batteries"),
        ("docs/tasks.md", "tasks"),
    ],
)
def test_the_tables_of_plugins_are_those_of_the_registry(page: str, what: str, tmp_path: Path) -> None:
    table = deepenc("list", what, "--markdown", cwd=tmp_path)
    assert table.strip() in (ROOT / page).read_text(encoding="utf-8")


def test_the_readme_s_question_of_an_own_network(capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from torch.utils.data import TensorDataset

    import deepenc as library

    (code,) = (block for block in blocks("README.md", "python") if "evaluate" in block)
    inputs = torch.randn(700, 8, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)).eval()
    dataset = TensorDataset(inputs, model(inputs).argmax(1).detach())
    held = {"deepenc": library, "model": model, "dataset": dataset}
    exec(compile(code, "README.md", "exec"), held)
    said = capsys.readouterr().out
    assert "paper-samp (+" in said and "paper-init (+" in said
    assert set(held["report"].records["state"]) <= {"done", "unsupported"}  # type: ignore[attr-defined]


def own_network(folder: Path) -> None:
    """The files of the page, each under the name that stands before it."""
    text = (ROOT / "docs/own_network.md").read_text(encoding="utf-8")
    for name, code in re.findall(
        r"`(\w+\.(?:py|yaml))`[^`]*?:\n\n```(?:python|yaml)\n(.*?)```", text, flags=re.DOTALL
    ):
        (folder / name).write_text(code, encoding="utf-8")


def test_the_files_of_the_page_on_own_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepenc.config import load

    own_network(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"my_net.py", "my_data.py", "train.py", "is_it_safe.py", "mine.yaml"}
    (victim,) = load(tmp_path / "mine.yaml").victims
    assert victim.label == "my-net"


@pytest.mark.long
def test_a_stranger_s_session(tmp_path: Path) -> None:
    """A network of one's own, trained on CIFAR-10: is it safe? Asked in Python and from the command line."""
    if "DEEPENC_DATA" not in os.environ:
        pytest.skip("needs CIFAR-10 in DEEPENC_DATA")
    own_network(tmp_path)
    for script in ("train.py", "is_it_safe.py"):
        done = subprocess.run(
            [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    for defense in ("paper-samp", "paper-init", "strong"):
        assert f"{defense} (+" in done.stdout
    assert "my-net" in deepenc("run", "mine.yaml", "--workers", "2", cwd=tmp_path)


def test_the_combinations_of_the_attacks_page_can_be_meant() -> None:
    from deepenc.arena.entry import Entry

    (block,) = blocks("docs/attacks.md", "yaml")
    entries = [Entry.model_validate(spec) for spec in yaml.safe_load(block)["attacks"]]
    assert {entry.attack.name for entry in entries} == {"chain", "ensemble", "partial-key"}


def test_the_disguise_of_the_defenses_page_is_that_of_strong() -> None:
    from deepenc.encryption.defense import Defense

    (block,) = blocks("docs/defenses.md", "yaml")
    shown, strong = Defense.of(yaml.safe_load(block)), Defense.of("strong")
    assert shown == strong.model_copy(update={"name": shown.name})


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_can_be_planned(config: Path) -> None:
    from deepenc.arena.plan import plan
    from deepenc.config import load, load_search

    if config.name.startswith("tune_"):
        assert load_search(config).trials
        return
    cells = plan(load(config))
    assert cells and any(cell.defense.protects for cell in cells)


def test_the_task_of_the_tasks_page_is_judged(tmp_path: Path) -> None:
    from deepenc.plugins import load_file

    task, script = blocks("docs/tasks.md", "python")
    (tmp_path / "counting.py").write_text(task, encoding="utf-8")
    assert [plugin.name for plugin in load_file(tmp_path / "counting.py")] == ["counting"]
    (tmp_path / "ask.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "ask.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    clean = [row for row in rows if row[1:3] == ["null", "null"]]
    hurt = [row for row in rows if row[1:3] == ["paper-samp", "null"]]
    assert len(clean) == 2 and all(row[3:] == ["exact", "counts", "1.000000"] for row in clean)
    assert len(hurt) == 2 and all(float(row[-1]) < 0.9 for row in hurt)
