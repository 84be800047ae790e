"""Mutated and forged files: a DeepencError or the very result every time, in little time and memory."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from torch import Tensor, nn

from deepenc.encryption.defense import Defense
from deepenc.encryption.disk import checkpoint
from deepenc.encryption.disk.checkpoint import decrypt_tensors, load, save, write_tensors
from deepenc.encryption.disk.sharded.checkpoint import load_sharded
from deepenc.encryption.disk.sharded.shards import INDEX
from deepenc.encryption.encrypt import encrypt
from deepenc.encryption.keys.key import load_key, save_key
from deepenc.encryption.keys.recipients import read_identity, read_recipient
from deepenc.errors import DeepencError
from deepenc.network.factory import Factory
from deepenc.network.sites import Site
from tests.encryption.disk.forgeries import IDENTITY, KINDS, WEIGHTS

Net = tuple[nn.Module, Tensor, tuple[Site, ...]]
DEFENSE = Defense.of({"base": "paper-init", "name": "test", "placement": "absolute:count=2"})
SECONDS, MEBIBYTES = 10.0, 400
"""What one case may take, and what all of them may add to the process."""


class Target:
    """A true folder and key, copied anew for each case, and what became of it.

    Args:
        root: An empty folder.
        net: A network with its sites.
    """

    def __init__(self, root: Path, net: Net) -> None:
        self.model, inputs, sites = net
        self.original, self.folder, self.out = root / "original", root / "a" / "b" / "net", root / "a" / "b"
        encrypted, self.key = encrypt(self.model, inputs, DEFENSE, seed=0, sites=sites)
        save(self.original, encrypted, self.key, victim={"name": "mlp"}, defense=DEFENSE.spec())
        save_key(self.key, self.original / "key", "p", 2**10, recipients=[IDENTITY.public_key()])
        private = IDENTITY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        public = IDENTITY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (self.original / "owner.pem").write_bytes(private)
        (self.original / "public.pem").write_bytes(public)
        self.tensors = dict(load(self.original).tensors)
        self.files = {path.name: path.read_bytes() for path in self.original.iterdir()}
        self.folder.mkdir(parents=True)
        self.root = root

    def fresh(self) -> None:
        if set(os.listdir(self.folder)) != set(self.files) or not all(map(is_file, self.folder.iterdir())):
            shutil.rmtree(self.folder)
            self.folder.mkdir()
        for name, data in self.files.items():
            (self.folder / name).write_bytes(data)

    def changed_pem(self) -> bool:
        """Whether a key pair's file was changed: a flipped bit of a key is another key."""
        return any(
            (self.folder / name).read_bytes() != self.files[name] for name in ("owner.pem", "public.pem")
        )

    def tree(self) -> list[tuple[str, int]]:
        return sorted(
            (os.path.join(where, name), os.stat(os.path.join(where, name)).st_size)
            for where, _, names in os.walk(self.root)
            for name in names
            if Path(where) != self.folder
        )

    def open(self) -> str:
        """Use the files as they are.

        Returns:
            Which step refused them, or that the result is the victim. Or that a forger's key opened: whoever
            can seal for the owner can seal him other positions, and deepenc cannot know.
        """
        steps = iter(("load", "key", "decrypt", "write", "network"))
        for reader, true in (
            (lambda path: read_identity(path).public_key(), "owner.pem"),
            (read_recipient, "public.pem"),
        ):
            with contextlib.suppress(DeepencError):
                raw = reader(self.folder / true).public_bytes_raw()
                assert raw == IDENTITY.public_key().public_bytes_raw() or self.changed_pem()
        try:
            step = next(steps)
            several = (self.folder / INDEX).exists()
            read = load_sharded(self.folder) if several else load(self.folder)
            if not several:
                assert same(load_sharded(self.folder).tensors, read.tensors)
            if read.fingerprint == self.key.fingerprint:
                assert same(read.tensors, self.tensors)
            network_of(read, self.model)
            if read.factory is not None:
                with contextlib.suppress(DeepencError):
                    assert same(read.rebuild().state_dict(), dict(read.tensors))
            step = next(steps)
            by_phrase = load_key(self.folder / "key", "p", read.sites)
            step = next(steps)
            plain = decrypt_tensors(read.tensors, by_phrase)
            if by_phrase != self.key:
                return "a forger's key"
            assert same(plain, self.model.state_dict())
            step = next(steps)
            write_tensors(self.out / "plain", plain)
            (self.out / "plain").unlink()
        except DeepencError as error:
            assert len(str(error)) < 30_000, "the message is the file"
            return f"refused: {step}"
        return "the victim"


def is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def network_of(read: checkpoint.Checkpoint, structure: nn.Module) -> None:
    with contextlib.suppress(DeepencError):
        assert same(read.network(structure).state_dict(), dict(read.tensors))


def same(a: Any, b: Any) -> bool:
    """Whether state dicts are equal bit for bit (NaN, too)."""
    return set(a) == set(b) and all(
        tensor.dtype == b[name].dtype
        and tensor.shape == b[name].shape
        and torch.equal(tensor.reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8))
        for name, tensor in a.items()
    )


class Slow(BaseException):
    """A case took too long."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Stop what hangs, and refuse memory beyond the bound."""

    def stop(*_: object) -> None:
        raise Slow

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEBIBYTES * 2**20, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fuzz(targets: list[Target], cases: int, seed: int) -> Counter[tuple[str, str]]:
    """Many cases; the seed and the number of the one that fails are in the message."""
    for library in ("torchvision:squeezenet1_1", "timm:resnet18", "transformers:BertModel"):
        Factory.of(library).build("meta")  # a first time takes seconds for the imports
    outcomes: Counter[tuple[str, str]] = Counter()
    trees = [target.tree() for target in targets]
    for target in targets:
        target.fresh()
        assert target.open() == "the victim"
    with bounded():
        for number in range(cases):
            rng = random.Random(f"{seed} {number}")
            (kind,) = rng.choices(list(KINDS), WEIGHTS)
            target, tree = rng.choice(list(zip(targets, trees, strict=True)))
            target.fresh()
            KINDS[kind](target.folder, rng)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                outcomes[kind, (outcome := target.open())] += 1
                assert outcome != "a forger's key" or kind == "key contents"
            except BaseException as error:
                raise AssertionError(f"seed {seed}, case {number} ({kind}): {error!r}") from error
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert target.tree() == tree, f"seed {seed}, case {number} ({kind}) wrote outside of the folder"
    return outcomes


@pytest.fixture
def targets(
    small: Net, two_sites: Net, tied_net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Target]:
    nets = {"small": small, "two": two_sites, "tied": tied_net}
    made = [Target(tmp_path / name, net) for name, net in nets.items()]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return made


def test_a_thousand_mutated_files(targets: list[Target], tmp_path: Path) -> None:
    started = time.process_time()
    outcomes = fuzz(targets, 1000, seed=0)
    refused = sum(n for (_, outcome), n in outcomes.items() if outcome != "the victim")
    assert {kind for kind, _ in outcomes} == set(KINDS)
    assert 800 < refused < 1000, "most are refused; some changes, such as of white space, change nothing"
    assert {"refused: load", "refused: key"} <= {outcome for _, outcome in outcomes}
    assert os.listdir(tmp_path / "here") == []
    assert time.process_time() - started < 120


@pytest.mark.long
def test_ten_thousand_mutated_files(targets: list[Target], tmp_path: Path) -> None:
    outcomes = fuzz(targets, 10_000, seed=1)
    assert sum(outcomes.values()) == 10_000
    assert os.listdir(tmp_path / "here") == []
