"""Recipients, rotation and what is said of a key, on the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from math import comb, log2
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import typer
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from deepenc import plugins
from deepenc.cli import _Commands, inspection, networks, rotation
from deepenc.encryption.keys.key import save_key
from deepenc.errors import ConfigError, VictimError
from deepenc.victims.victim import Victim, VictimSource

Run = Callable[..., Result]


class ToyForKeys(VictimSource):
    """A tiny network."""

    name: ClassVar[str] = "toy-for-keys"

    def network(self, cache: Path) -> tuple[nn.Module, Tensor]:
        """See `VictimSource.network`."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Conv2d(1, 40, 3), nn.ReLU(), nn.Conv2d(40, 24, 3), nn.ReLU(), nn.Flatten()
            )
            model.append(nn.Linear(96, 3))
        return model.eval(), torch.zeros(1, 1, 6, 6)

    def load(self, cache: Path) -> Victim:
        """See `VictimSource.load`."""
        raise VictimError("toy-for-keys has no images")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call a command in a folder with a key pair of an owner, and no passphrase anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPENC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DEEPENC_PASSPHRASE", raising=False)
    monkeypatch.setitem(plugins._loaded, ("victim", "toy-for-keys"), ToyForKeys)
    monkeypatch.setattr(save_key, "__defaults__", (None, 2**10))
    owner = X25519PrivateKey.generate()
    pem, form = Encoding.PEM, PrivateFormat.PKCS8
    Path("owner.pem").write_bytes(owner.private_bytes(pem, form, NoEncryption()))
    Path("locked.pem").write_bytes(owner.private_bytes(pem, form, BestAvailableEncryption(b"secret")))
    public = owner.public_key().public_bytes(pem, PublicFormat.SubjectPublicKeyInfo)
    Path("owner.pub.pem").write_bytes(public)
    app = typer.Typer(cls=_Commands)
    for command in (networks.encrypt, networks.decrypt, inspection.inspect, rotation.rotate):
        app.command()(command)

    def call(*args: str, **more: Any) -> Result:
        return CliRunner().invoke(app, [*args], **more)

    return call


def worked(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(result: Result, *parts: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    for part in parts:
        assert part in result.stderr


def is_victim(path: str) -> bool:
    found, (model, _) = load_file(path), ToyForKeys().network(Path())
    return all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_encrypt_for_a_recipient_and_decrypt_as_one(run: Run) -> None:
    said = worked(run("encrypt", "toy-for-keys", "net", "--key", "k", "--recipient", "owner.pub.pem"))
    assert re.search(r"without the key: outputs on the example move by \d+ % of their size", said)
    worked(run("decrypt", "net", "k", "plain", "--identity", "owner.pem"))
    assert is_victim("plain")
    phrase = {"DEEPENC_PASSPHRASE": "secret"}
    refused(run("decrypt", "net", "k", "again", env=phrase), "recipients only", "--identity")
    refused(run("decrypt", "net", "k", "again"), "recipients only", "--identity")
    refused(run("decrypt", "net", "k", "again", "--identity", "locked.pem"), "no passphrase")
    refused(run("decrypt", "net", "k", "owner.pem", "--identity", "owner.pem", "--force"), "what opens")
    worked(run("decrypt", "net", "k", "again", "--identity", "locked.pem", env=phrase))
    Path("phrase").write_text("secret\n")
    worked(run("decrypt", "net", "k", "more", "--identity", "locked.pem", "--passphrase-file", "phrase"))
    refused(run("decrypt", "net", "k", "o", "--identity", "owner.pub.pem"), "public key")
    refused(run("encrypt", "toy-for-keys", "n", "--key", "l", "--recipient", "owner.pem"), "private key")
    assert not Path("n").exists() and not Path("l").exists()


def test_a_passphrase_is_added_to_recipients_only_on_purpose(run: Run) -> None:
    phrase = {"DEEPENC_PASSPHRASE": "secret"}
    encrypt = ("encrypt", "toy-for-keys", "net", "--key", "k", "--recipient", "owner.pub.pem", "--force")
    worked(run(*encrypt, env=phrase))
    assert json.loads(Path("k").read_bytes())["passphrase"] is None
    Path("phrase").write_text("secret\n")
    worked(run(*encrypt, "--passphrase-file", "phrase"))
    worked(run("decrypt", "net", "k", "plain", env=phrase))


@pytest.mark.parametrize("defense", [None, "paper-init"])
def test_rotation_gives_another_key_to_the_same_victim(run: Run, defense: str | None) -> None:
    worked(run("encrypt", "toy-for-keys", "net", "--key", "k", "--recipient", "owner.pub.pem"))
    more = () if defense is None else ("--defense", defense)
    options = ("--identity", "owner.pem", "--recipient", "owner.pub.pem", *more)
    said = worked(run("rotate", "net", "k", "net2", "k2", *options))
    assert "bit for bit" in said and "Withdraw" in said
    worked(run("decrypt", "net2", "k2", "plain", "--identity", "owner.pem"))
    assert is_victim("plain")
    refused(run("decrypt", "net2", "k", "o", "--identity", "owner.pem"), "another network or key")
    refused(run("decrypt", "net", "k2", "o", "--identity", "owner.pem"), "another network or key")
    documents = [json.loads(Path(folder, "deepenc.json").read_text()) for folder in ("net", "net2")]
    assert documents[0]["sites"] == documents[1]["sites"]
    assert documents[0]["allocation"] == documents[1]["allocation"]
    assert documents[1]["defense"]["name"] == (defense or "paper-samp")


def test_rotation_keeps_the_passphrase_unless_told_otherwise(run: Run) -> None:
    phrase = {"DEEPENC_PASSPHRASE": "old"}
    worked(run("encrypt", "toy-for-keys", "net", "--key", "k", env=phrase))
    worked(run("rotate", "net", "k", "net2", "k2", env=phrase))
    worked(run("decrypt", "net2", "k2", "plain", env=phrase))
    Path("new").write_text("new\n")
    worked(run("rotate", "net", "k", "net3", "k3", "--new-passphrase-file", "new", env=phrase))
    worked(run("decrypt", "net3", "k3", "plain3", "--passphrase-file", "new"))
    refused(run("decrypt", "net3", "k3", "o", env=phrase), "passphrase")


def test_rotation_writes_nothing_over_what_it_reads(run: Run) -> None:
    phrase = {"DEEPENC_PASSPHRASE": "p"}
    worked(run("encrypt", "toy-for-keys", "net", "--key", "k", env=phrase))
    before = Path("k").read_bytes()
    refused(run("rotate", "net", "k", "net", "k2", "--force", env=phrase), "other paths")
    refused(run("rotate", "net", "k", "net2", "k", "--force", env=phrase), "other paths")
    refused(run("rotate", "net", "k", "net2", "k2", env={"DEEPENC_PASSPHRASE": "q"}), "passphrase")
    assert Path("k").read_bytes() == before and not Path("net2").exists() and not Path("k2").exists()


def test_rotation_imports_no_function_that_a_header_names(run: Run) -> None:
    named = {"name": "network", "factory": "os:system"}
    for header in (named, {"name": "downstream", "base": named}, {"name": "folded", "base": named}):
        with pytest.raises(ConfigError, match=r"'os:system'.*--victim"):
            rotation._victim(None, header)
    with pytest.raises(Exception, match="--victim"):
        rotation._victim(None, None)


def test_inspect_states_the_key_bits_of_every_site_and_in_total(run: Run) -> None:
    worked(run("encrypt", "toy-for-keys", "net", "--key", "k", "--recipient", "owner.pub.pem"))
    counts = json.loads(Path("net/deepenc.json").read_text())["allocation"]
    bits = {name: log2(comb(width + counts[name], counts[name])) for name, width in (("0", 40), ("2", 24))}
    for said in (
        worked(run("inspect", "net")),
        worked(run("inspect", "toy-for-keys", "--defense", "paper-samp")),
    ):
        rows = {line.split()[0]: line.split() for line in said.splitlines() if line.split()}
        assert {name: rows[name][-1] for name in bits} == {name: f"{b:.1f}" for name, b in bits.items()}
        assert rows["all"][-1] == f"{sum(bits.values()):.1f}"
