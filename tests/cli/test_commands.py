"""The commands, called as a user would; wrong inputs get one message, exit code 1, and no traceback."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import deepenc
from deepenc import plugins
from deepenc.cli import app
from deepenc.encryption.defense import Defense
from deepenc.encryption.disk.header import HEADER, read_header
from deepenc.encryption.keys.key import save_key
from deepenc.tasks.classification import Classification
from deepenc.tasks.examples import Examples
from deepenc.victims.victim import Victim, VictimSource

COMMANDS = ("encrypt", "decrypt", "inspect", "run", "report", "list", "check")
Run = Callable[..., Result]


class Toy(VictimSource):
    """A tiny network on noise."""

    name: ClassVar[str] = "toy"

    def network(self, cache: Path) -> tuple[nn.Module, Tensor]:
        """See `VictimSource.network`."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Conv2d(1, 20, 3), nn.ReLU(), nn.Conv2d(20, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
            )
        return model.eval(), torch.zeros(1, 1, 6, 6)

    def load(self, cache: Path) -> Victim:
        """See `VictimSource.load`."""
        model, _ = self.network(cache)
        generator = torch.Generator().manual_seed(1)
        parts = [
            Examples(torch.randn(30, 1, 6, 6, generator=generator), torch.arange(30) % 3) for _ in range(3)
        ]
        return Victim(self.label, model, Classification(classes=3), *parts, "toy")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the command line in an empty folder, with a passphrase in the environment and a toy victim."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPENC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DEEPENC_PASSPHRASE", "correct horse")
    monkeypatch.setitem(plugins._loaded, ("victim", "toy"), Toy)
    monkeypatch.setattr(save_key, "__defaults__", (2**10,))  # sealing as for a real key takes a second
    runner = CliRunner()

    def call(*args: str, **more: Any) -> Result:
        return runner.invoke(app, [*args], **more)

    return call


def refused(result: Result, *parts: str) -> None:
    """The command ended with one message on standard error, and no traceback."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(run: Run, command: str) -> None:
    result = run(command, "--help", env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert f"Example: deepenc {command} " in result.stdout


def test_encrypt_and_decrypt_give_the_victim_back(run: Run, tmp_path: Path) -> None:
    result = run("encrypt", "toy", "stolen", "--key", "owner.key")
    assert result.exit_code == 0, result.output
    assert "bit for bit" in result.stdout
    assert (tmp_path / "owner.key").stat().st_mode & 0o077 == 0
    assert run("decrypt", "stolen", "owner.key", "out.safetensors").exit_code == 0
    model, _ = Toy().network(tmp_path)
    restored = load_file(tmp_path / "out.safetensors")
    assert set(restored) == set(model.state_dict())
    assert all(torch.equal(restored[name], tensor) for name, tensor in model.state_dict().items())
    inspected = run("inspect", "stolen").stdout
    assert "toy encrypted with paper-samp" in inspected
    assert "key bits" in inspected


def test_a_defense_that_wants_data_gets_the_victim_s(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    wanting = Defense.of({"base": "paper-samp", "name": "wanting", "placement": "greedy:budget=5%,images=8"})
    monkeypatch.setitem(plugins._loaded, ("defense", "wanting"), wanting)
    assert wanting.wants_data and not Defense.of("paper-samp").wants_data
    done = run("encrypt", "toy", "stolen", "--key", "owner.key", "--defense", "wanting")
    assert done.exit_code == 0, done.output
    done = run(
        "rotate", "stolen", "owner.key", "second", "second.key", "--victim", "toy", "--defense", "wanting"
    )
    assert done.exit_code == 0, done.output


def test_nothing_is_overwritten_without_force(run: Run, tmp_path: Path) -> None:
    assert run("encrypt", "toy", "stolen", "--key", "owner.key").exit_code == 0
    before = (tmp_path / "owner.key").read_bytes()
    refused(run("encrypt", "toy", "stolen", "--key", "other.key"), "stolen exists already", "--force")
    refused(run("encrypt", "toy", "new", "--key", "owner.key"), "owner.key exists already", "--force")
    assert (tmp_path / "owner.key").read_bytes() == before
    assert not (tmp_path / "new").exists()
    assert run("encrypt", "toy", "stolen", "--key", "owner.key", "--force").exit_code == 0
    assert (tmp_path / "owner.key").read_bytes() != before
    assert run("decrypt", "stolen", "owner.key", "out").exit_code == 0
    refused(run("decrypt", "stolen", "owner.key", "out"), "out exists already")
    assert not list(tmp_path.glob(".*")), "nothing is left aside"


def test_force_does_not_delete_a_folder_of_something_else(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    refused(run("encrypt", "toy", "mine", "--key", "k", "--force"), "something other")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_release_replaces_its_own_files_only(run: Run, tmp_path: Path) -> None:
    assert run("encrypt", "toy", "stolen", "--key", "owner.key").exit_code == 0
    (tmp_path / "stolen" / "README.md").write_text("mine")
    (tmp_path / "notes.txt").write_text("x")
    assert run("encrypt", "toy", "stolen", "--key", "owner.key", "--force").exit_code == 0
    assert (tmp_path / "stolen" / "README.md").read_text() == "mine"
    refused(run("encrypt", "toy", "notes.txt", "--key", "k", "--force"), "notes.txt is a file")
    refused(run("encrypt", "toy", "new", "--key", "notes.txt", "--force"), "something other than a key")
    refused(run("encrypt", "toy", "new", "--key", "stolen", "--force"), "folder")
    refused(run("decrypt", "stolen", "owner.key", "notes.txt", "--force"), "something other than tensors")
    (tmp_path / "mine").mkdir()
    refused(run("decrypt", "stolen", "owner.key", "mine", "--force"), "mine is a folder")
    assert (tmp_path / "notes.txt").read_text() == "x"
    assert not list(tmp_path.glob(".*"))


def test_neither_key_nor_victim_goes_into_a_release(run: Run, tmp_path: Path) -> None:
    refused(run("encrypt", "toy", "stolen", "--key", "stolen/k"), "given away")
    assert not (tmp_path / "stolen").exists()
    assert run("encrypt", "toy", "stolen", "--key", "owner.key").exit_code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "stolen").iterdir()}
    refused(run("encrypt", "toy", "new", "--key", "stolen/k"), "given away")
    refused(run("rotate", "stolen", "owner.key", "new", "new/k"), "given away")
    refused(run("rotate", "stolen", "owner.key", "new", "stolen/sub/../k"), "given away")
    for inside in ("stolen/model.safetensors", "stolen/plain"):
        refused(run("decrypt", "stolen", "owner.key", inside, "--force"), "given away")
    (tmp_path / "link").symlink_to("stolen")
    refused(run("decrypt", "stolen", "owner.key", "link/plain"), "given away")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "stolen").iterdir()}


def test_decrypting_does_not_write_over_what_opens_the_network(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pass").write_text("correct horse")
    assert run("encrypt", "toy", "stolen", "--key", "owner.key").exit_code == 0
    key = (tmp_path / "owner.key").read_bytes()
    for args in (("owner.key",), ("./owner.key",), ("pass", "--passphrase-file", "pass")):
        refused(run("decrypt", "stolen", "owner.key", *args, "--force"), "what opens the network")
    assert (tmp_path / "owner.key").read_bytes() == key


@pytest.mark.parametrize("defense", ["null", "paper-init"])
def test_what_inserts_nothing_is_no_release(run: Run, tmp_path: Path, defense: str) -> None:
    assert run("encrypt", "toy", "stolen", "--key", "owner.key").exit_code == 0
    encrypted = run("encrypt", "toy", "new", "--key", "k", "--defense", defense)
    rotated = run("rotate", "stolen", "owner.key", "newer", "l", "--defense", defense)
    if defense == "null":
        refused(encrypted, "inserts nothing")
        refused(rotated, "inserts nothing")
        assert not any((tmp_path / name).exists() for name in ("new", "newer", "k", "l"))
    else:
        assert encrypted.exit_code == rotated.exit_code == 0


def test_a_forged_header_is_not_rotated(run: Run, tmp_path: Path) -> None:
    assert run("encrypt", "toy", "stolen", "--key", "owner.key").exit_code == 0
    path = tmp_path / "stolen" / HEADER
    for forged in ({"defense": Defense.of("paper-init").spec()}, {"victim": {"name": "network"}}):
        true = path.read_bytes()
        path.write_text(read_header(path).model_copy(update=forged).digested().model_dump_json())
        refused(run("rotate", "stolen", "owner.key", "new", "new.key"), "header")
        refused(run("decrypt", "stolen", "owner.key", "plain"), "header")
        path.write_bytes(true)
    assert not (tmp_path / "new").exists() and not (tmp_path / "plain").exists()


def test_a_failed_encryption_leaves_the_old_one(run: Run, tmp_path: Path) -> None:
    assert run("encrypt", "toy", "stolen", "--key", "owner.key").exit_code == 0
    refused(run("encrypt", "toy", "stolen", "--key", "missing/owner.key", "--force"), "missing")
    assert run("decrypt", "stolen", "owner.key", "out").exit_code == 0


def test_wrong_keys_and_damaged_files_are_told(run: Run, tmp_path: Path) -> None:
    assert run("encrypt", "toy", "stolen", "--key", "owner.key").exit_code == 0
    assert run("encrypt", "toy", "second", "--key", "second.key").exit_code == 0
    refused(run("decrypt", "stolen", "owner.key", "o", env={"DEEPENC_PASSPHRASE": "guess"}), "passphrase")
    refused(run("decrypt", "stolen", "second.key", "o"), "key")
    refused(run("decrypt", "stolen", "nowhere.key", "o"), "nowhere.key")
    refused(run("decrypt", "nowhere", "owner.key", "o"), "nowhere")
    tensors = tmp_path / "stolen" / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-7])
    refused(run("decrypt", "stolen", "owner.key", "o"), "model.safetensors")
    refused(run("inspect", "stolen"), "model.safetensors")
    assert not (tmp_path / "o").exists()


def test_the_passphrase_comes_from_a_file_or_the_environment(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DEEPENC_PASSPHRASE")
    refused(run("encrypt", "toy", "stolen", "--key", "k"), "--passphrase-file", "DEEPENC_PASSPHRASE")
    refused(run("encrypt", "toy", "stolen", "--key", "k", "--passphrase-file", "none"), "none")
    (tmp_path / "pass").write_text("correct horse\nnot this\n")
    assert run("encrypt", "toy", "stolen", "--key", "k", "--passphrase-file", "pass").exit_code == 0
    assert run("decrypt", "stolen", "k", "out", env={"DEEPENC_PASSPHRASE": "correct horse"}).exit_code == 0


def test_inspect_shows_sites_and_what_a_defense_would_cost(run: Run) -> None:
    result = run("inspect", "toy", "--defense", "paper-samp", "--why")
    assert result.exit_code == 0, result.output
    # 5 % of 20 channels is 1, at 21 places: log2(21) = 4.4 bits.
    assert [line.split()[-2:] for line in result.stdout.splitlines() if line.split()[:2] == ["0", "20"]] == [
        ["1", "4.4"]
    ]
    assert "5.weight, 3 channels: it is an output of the network" in result.stdout


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("inspect", "digit-resnet"), ["did you mean 'digits-resnet'", "folder"]),
        (("inspect", "toy:size=3"), ["unknown parameter 'size'"]),
        (("inspect", "toy", "--defense", "paper-sampl"), ["did you mean 'paper-samp'"]),
        (("encrypt", "toy", "o", "--key", "k", "--defense", "null-"), ["did you mean 'null'"]),
        (("run", "nowhere.yaml"), ["nowhere.yaml", "No such file"]),
        (("report", "nowhere"), ["nowhere"]),
        (("check", "nowhere.py"), ["nowhere.py"]),
        (("check", "colisions"), ["did you mean 'collisions'"]),
        (("list", "attacks", "--plugin", "nowhere.py"), ["nowhere.py"]),
    ],
)
def test_wrong_arguments_are_told(run: Run, args: tuple[str, ...], parts: list[str]) -> None:
    refused(run(*args), *parts)


@pytest.mark.parametrize(
    "args", [("list", "attack"), ("run",), ("nonsense",), ("run", "x", "--workers", "0")]
)
def test_usage_errors_have_their_own_exit_code(run: Run, args: tuple[str, ...]) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert args[-1] != "attack" or "did you mean 'attacks'" in result.output


def test_list_has_one_line_for_each_plugin(run: Run) -> None:
    for what, kind in (("attacks", "attack"), ("defenses", "defense"), ("victims", "victim")):
        lines = run("list", what).stdout.splitlines()
        assert [line.split()[0] for line in lines] == plugins.names(kind)
        assert all(len(line.split()) > 1 for line in lines)
        assert not [line for line in lines if "BROKEN" in line]


def test_a_broken_plugin_does_not_hide_the_others(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    declared = plugins._declared("attack")
    broken = EntryPoint("alas", "no_such_module:Alas", plugins.GROUPS["attack"])
    monkeypatch.setitem(declared, "alas", broken)
    lines = {line.split()[0]: line for line in run("list", "attacks").stdout.splitlines()}
    assert "BROKEN" in lines["alas"] and "no_such_module" in lines["alas"]
    assert "BROKEN" not in lines["null"]


EXPERIMENT = """\
name: tiny
victims: [toy]
defenses: [null, paper-samp]
attacks: [null, collisions]
threats: [{name: thief}]
keys: 2
device: cpu
"""


def test_run_shows_and_leaves_a_report_and_goes_on(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT)
    first = run("run", "tiny.yaml")
    assert first.exit_code == 0, first.output
    for part in ("toy against thief", "paper-samp", "collisions", "runs/tiny/report.txt"):
        assert part in first.stdout
    assert (tmp_path / "runs/tiny/report.txt").read_text().startswith("toy against thief")
    again = run("run", "tiny.yaml")
    assert again.exit_code == 0
    assert "\n0 of " in again.stdout, "finished cells stay"
    shown = run("report", "runs/tiny", "--csv", "all.csv")
    assert shown.exit_code == 0
    cells = len((tmp_path / "all.csv").read_text().splitlines()) - 1
    assert f"\n{cells} records written to all.csv" in shown.stdout
    assert f" of {cells} cells" in again.stdout
    refused(run("report", "runs/tiny", "--csv", "missing/all.csv"), "missing/all.csv")


FAILING = '''\
from typing import ClassVar
from deepenc.arena.case import Attack

class Failing(Attack):
    """Fails."""

    name: ClassVar[str] = "failing"

    def attack(self, case):
        print("printed by a plugin")
        raise RuntimeError("planted")
'''


def test_a_run_with_failed_cells_says_so_and_is_no_success(run: Run, tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT.replace("collisions", "failing"))
    done = run("run", "tiny.yaml", "--plugin", "failing.py")
    assert done.exit_code == 1
    assert "4 cells are failed; try again with --retry-failed" in done.stderr
    assert "failing: RuntimeError: planted" in done.stdout and "printed by a plugin" not in done.stdout
    assert "printed by a plugin" in (tmp_path / "runs/tiny/output.txt").read_text()


def test_report_says_what_is_not_finished_and_writes_over_no_run(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT)
    assert run("run", "tiny.yaml").exit_code == 0
    other = run("run", "tiny.yaml", "--out", "runs/tiny", "--timeout", "600")
    assert other.exit_code == 0 and "not of this configuration" not in other.stdout
    database = tmp_path / "runs/tiny/run.sqlite"
    before = database.read_bytes()
    for option, target in (
        ("--csv", "runs/tiny/run.sqlite"),
        ("--markdown", "runs/tiny/run.sqlite"),
        ("--csv", "runs/../runs/tiny/run.sqlite-journal"),
        ("--markdown", "runs/tiny/records.csv"),
        ("--csv", "elsewhere.db"),
    ):
        (tmp_path / "elsewhere.db").write_bytes(before)
        refused(run("report", "runs/tiny", option, target), "a run keeps", "another name")
    assert database.read_bytes() == before
    assert run("report", "runs/tiny", "--csv", "runs/tiny/records.csv").exit_code == 0
    with sqlite3.connect(database) as connection:
        connection.execute("update cells set state = 'planned', record = null where position = 0")
    connection.close()
    assert "1 cell is not finished" in run("report", "runs/tiny").stdout


def test_another_configuration_in_the_same_folder_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT)
    assert run("run", "tiny.yaml").exit_code == 0
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT.replace("keys: 2", "keys: 1"))
    assert "cells are kept in runs/tiny that are not of this configuration" in run("run", "tiny.yaml").stdout


def test_run_stopped_by_ctrl_c_says_how_to_go_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "tiny.yaml").write_text(EXPERIMENT)
    monkeypatch.setattr("deepenc.arena.run.matrix.run", stop)
    result = run("run", "tiny.yaml")
    assert result.exit_code == 130
    assert "the same command" in result.output
    assert "Traceback" not in result.output


def test_a_config_with_an_unknown_attack_starts_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT.replace("collisions", "colisions"))
    refused(run("run", "tiny.yaml"), "tiny.yaml", "line 4", "did you mean 'collisions'")
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_that_cannot_be_made_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT)
    (tmp_path / "file").write_text("in the way")
    refused(run("run", "tiny.yaml", "--out", "file/run"), "file")


OWN = '''\
"""A plugin of the user's."""
from typing import ClassVar
import torch
from deepenc.arena.case import Attack, Case, Claim

class Last(Attack):
    """Suspect the channels that come last."""

    name: ClassVar[str] = "last-first"

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        return Claim(scores={{site.name: {scores} for site in case.sites}})
'''


@pytest.mark.parametrize(("scores", "code"), [("torch.arange(site.width).float()", 0), ("None", 1)])
def test_check_holds_a_file_to_the_contract(run: Run, tmp_path: Path, scores: str, code: int) -> None:
    (tmp_path / f"own{code}.py").write_text(OWN.format(scores=scores).replace("last-first", f"last-{code}"))
    result = run("check", f"own{code}.py")
    assert result.exit_code == code, result.output
    assert ("FAILED" in result.stdout) == bool(code)
    del plugins._loaded["attack", f"last-{code}"]


def test_the_module_is_the_command_and_knows_its_version(run: Run) -> None:
    done = subprocess.run([sys.executable, "-m", "deepenc", "--version"], capture_output=True, text=True)
    assert done.stdout == run("--version").stdout == f"deepenc {metadata.version('deepenc')}\n"
    assert deepenc.__version__ == metadata.version("deepenc")


def test_the_installed_command_fails_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deepenc", "list", "attacks", "--plugin", "x"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"}
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_check_takes_parameters(run: Run) -> None:
    assert "All checks passed" in run("check", "typical").stdout
    assert "All checks passed" in run("check", "alignment:look_for=clone").stdout


BEST = """\
name: found
victims: [toy]
defenses:
  - name: thin
    placement: {name: absolute, count: 2}
    weights: samp
  - name: wide
    placement: {name: absolute, count: 3}
    weights: init
  - null
"""


def test_a_defense_comes_from_a_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "best.yaml").write_text(BEST)
    (tmp_path / "one.yaml").write_text("name: alone\nplacement: {name: absolute, count: 4}\nweights: samp\n")
    (tmp_path / "none.yaml").write_text("[1, 2]\n")
    assert "; wide" in run("inspect", "toy", "--defense", f"{tmp_path}/best.yaml:wide").stdout
    assert "; alone" in run("inspect", "toy", "--defense", f"{tmp_path}/one.yaml").stdout
    for text, part in (
        ("best.yaml", "it has thin, wide, null"),
        ("best.yaml:x", "best.yaml:NAME"),
        ("none.yaml", "expected a defense"),
        ("missing.yaml", "cannot read"),
    ):
        result = run("inspect", "toy", "--defense", f"{tmp_path}/{text}")
        assert result.exit_code == 1 and part in result.stderr, result.stderr


def test_encrypt_says_what_is_left_without_the_key(run: Run, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("name: alone\nplacement: {name: absolute, count: 4}\nweights: init\n")
    paths = {name: str(tmp_path / name) for name in ("a", "k", "one.yaml")}
    said = run("encrypt", "toy", paths["a"], "--key", paths["k"], "--defense", paths["one.yaml"])
    assert "encrypted with alone" in said.stdout
    found = re.search(r"without the key: accuracy (.*) % instead of (.*) % \(30 examples\)", said.stdout)
    assert found is not None, said.stdout
    victim = Toy().load(tmp_path)
    network = deepenc.load(tmp_path / "a").network(victim.model)
    for net, part in ((network, found[1]), (victim.model, found[2])):
        right = net(victim.defender.inputs).argmax(1) == victim.defender.targets
        assert float(part) == pytest.approx(100 * float(right.float().mean()), abs=0.05)
