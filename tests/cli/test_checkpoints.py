"""``encrypt --checkpoint`` and ``decrypt --checkpoint``, with a tiny Llama in several files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from deepenc.cli import app, checkpoints
from deepenc.encryption.disk.sharded import checkpoint as sharded
from deepenc.encryption.keys import sealing
from deepenc.encryption.keys.key import load_key, save_key
from deepenc.encryption.keys.secret import derive_positions

transformers = pytest.importorskip("transformers")

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the command line in a folder with a checkpoint ``victim``, and a passphrase in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPENC_PASSPHRASE", "correct horse")
    monkeypatch.setattr(save_key, "__defaults__", (None, 2**10))  # sealing as for a real key takes a second
    monkeypatch.setattr(sealing.lock, "__defaults__", (None, 2**10))
    transformers.utils.logging.disable_progress_bar()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained("victim", max_shard_size="20KB")
    runner = CliRunner()
    return lambda *args, **more: runner.invoke(app, [*args], **more)


ENCRYPT = ("encrypt", "--checkpoint", "victim", "locked", "--key", "owner.key")
DECRYPT = ("decrypt", "--checkpoint", "locked", "owner.key", "opened")


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(result: Result, *parts: str) -> None:
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ")
    for part in parts:
        assert part in result.stderr


def same(first: str, second: str) -> bool:
    names = [path.name for path in Path(first).glob("*.safetensors")]
    return bool(names) and all(
        torch.equal(tensor, load_file(Path(second, name))[key])
        for name in names
        for key, tensor in load_file(Path(first, name)).items()
    )


def interrupt(run: Run, monkeypatch: pytest.MonkeyPatch, *command: str) -> None:
    """A run that ends in the middle, as by Ctrl-C."""
    make = sharded.encrypt_checkpoint

    def stop(read: int, total: int) -> None:
        if 2 * read > total:
            raise KeyboardInterrupt

    def stopped(*args: Any, **more: Any) -> Any:
        return make(*args, **{**more, "progress": stop})

    with monkeypatch.context() as patch:
        patch.setattr(sharded, "encrypt_checkpoint", stopped)
        result = run(*command)
    assert result.exit_code == 130, result.output


def test_round_trip(run: Run, tmp_path: Path) -> None:
    text = done(run(*ENCRYPT))
    assert "2 sites" in text or "sites, key of" in text
    assert (tmp_path / "owner.key").stat().st_mode & 0o077 == 0
    done(run(*DECRYPT))
    assert same("victim", "opened")
    assert not list(tmp_path.glob(".*")), "nothing is left aside"


def test_interrupted_and_started_again(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(run, monkeypatch, *ENCRYPT)
    assert not (tmp_path / "locked").exists()
    assert not (tmp_path / "owner.key").exists()
    record = tmp_path / ".owner.key.partial"
    assert record.stat().st_mode & 0o077 == 0
    finished = {path.name: path.stat().st_mtime_ns for path in Path(".locked.partial").glob("model-*ors")}
    assert finished
    done(run(*ENCRYPT))
    assert all((tmp_path / "locked" / name).stat().st_mtime_ns == at for name, at in finished.items())
    done(run(*DECRYPT))
    assert same("victim", "opened")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("where", ["sharded.partial.Partial.release", "staging._complete"])
def test_interrupted_when_all_is_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Before the one moment that decides, the same command goes on; after it, network and key are there."""
    done(run(*ENCRYPT))
    old = (tmp_path / "owner.key").read_bytes()
    (tmp_path / "locked" / "README.md").write_text("mine")

    def stop(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"deepenc.encryption.disk.{where}", stop)
        assert run(*ENCRYPT, "--force").exit_code == 130
    assert (tmp_path / "owner.key").read_bytes() == old
    done(run(*DECRYPT))
    assert ((tmp_path / "owner.key").read_bytes() == old) == (where != "staging._complete")
    done(run(*ENCRYPT, "--force"))
    shutil.rmtree("opened")
    done(run(*DECRYPT))
    assert same("victim", "opened")
    assert (tmp_path / "locked" / "README.md").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))


def test_the_secret_of_an_interrupted_run_is_sealed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(run, monkeypatch, *ENCRYPT)
    refused(run(*ENCRYPT, env={"DEEPENC_PASSPHRASE": "wrong"}), "interrupted", "remove the file")
    refused(run(*ENCRYPT, "--defense", "paper-init"), "interrupted", "same command")
    done(run(*ENCRYPT))


def test_a_secret_is_not_used_for_two_releases(run: Run, tmp_path: Path) -> None:
    """A record that outlived its run, as after a crash at the very end, is not taken up."""
    about = {"source": str(tmp_path / "victim"), "folder": str(tmp_path / "locked"), "defense": ""}
    first = checkpoints._secret(tmp_path / ".owner.key.partial", "correct horse", about)
    assert checkpoints._secret(tmp_path / ".owner.key.partial", "correct horse", about) == first
    done(run(*ENCRYPT))
    key = load_key(tmp_path / "owner.key", "correct horse", sharded.sites_of("locked"))
    assert key.positions != derive_positions(first, key.sites, key.allocation)
    assert not (tmp_path / ".owner.key.partial").exists()


def test_nothing_is_overwritten_without_force(run: Run, tmp_path: Path) -> None:
    done(run(*ENCRYPT))
    key = (tmp_path / "owner.key").read_bytes()
    refused(run(*ENCRYPT), "locked exists already")
    refused(run(*ENCRYPT[:3], "other", *ENCRYPT[4:]), "owner.key exists already")
    assert (tmp_path / "owner.key").read_bytes() == key
    done(run(*ENCRYPT, "--force"))
    assert (tmp_path / "owner.key").read_bytes() != key
    done(run(*DECRYPT))
    refused(run(*DECRYPT), "opened exists already")
    assert same("victim", "opened")


def test_an_altered_checkpoint(run: Run, tmp_path: Path) -> None:
    done(run(*ENCRYPT))
    path = min((tmp_path / "locked").glob("model-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(run(*DECRYPT), "not those that were encrypted")
    assert not (tmp_path / "opened").exists()
    assert not list(tmp_path.glob(".*"))


def test_arguments(run: Run) -> None:
    refused(run("encrypt", "--checkpoint", "victim", "toy", "locked", "--key", "k"), "leave out")
    refused(run("decrypt", "--checkpoint", "locked", "a", "b", "c"), "leave out")
    refused(run("encrypt", "toy", "--key", "k"), "give OUT")
    refused(run("decrypt", "locked", "k"), "give OUT")
    refused(run("encrypt", "--checkpoint", "nowhere", "locked", "--key", "k"), "nowhere")
    refused(run("encrypt", "--checkpoint", "victim", "locked", "--key", "locked/k"), "given away")
    done(run(*ENCRYPT))
    refused(run("decrypt", "--checkpoint", "locked", "owner.key", "locked/plain"), "given away")
    assert not list(Path().glob(".*"))


def test_a_key_for_recipients_starts_anew(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    private = X25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    (tmp_path / "private.pem").write_bytes(private.private_bytes(pem, form, plain))
    public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "public.pem").write_bytes(public)
    command = (*ENCRYPT, "--recipient", "public.pem")
    interrupt(run, monkeypatch, *command)
    assert not (tmp_path / ".owner.key.partial").exists()
    done(run(*command))
    done(run(*DECRYPT, "--identity", "private.pem"))
    assert same("victim", "opened")
