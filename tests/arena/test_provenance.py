"""A cell's identity follows the code that makes its result; a record says where and when it was made."""

import shutil
import sys
from datetime import UTC, datetime

import pytest
import torch

from deepenc.arena import plan as planning
from deepenc.arena import provenance
from deepenc.arena.plan import Experiment, plan
from deepenc.arena.provenance import Clock, code_version, hash_of
from deepenc.plugins import load_file
from deepenc.seeds import Roots

PLUGIN = '''
from typing import ClassVar
from deepenc.arena.case import Attack, Claim
import helper
from sub.inner import VALUE


class Helped(Attack):
    """Helped."""

    name: ClassVar[str] = "{name}"

    def attack(self, case):
        return Claim(network=helper.first(case.encrypted))
'''


@pytest.fixture
def package(tmp_path):
    """A copy of deepenc's own sources."""
    return shutil.copytree(
        provenance.PACKAGE, tmp_path / "deepenc", ignore=shutil.ignore_patterns("__pycache__")
    )


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("arena/metrics.py", True),
        ("analysis/batchnorm.py", True),
        ("encryption/filling/stealth.py", True),
        ("arena/checks/selftest.py", True),
        ("cli/__init__.py", False),
        ("report/tables.py", False),
        ("study/tuning.py", False),
        ("arena/run/store.py", False),
        ("arena/estimates/summaries.py", False),
    ],
)
def test_changed_sources_are_another_version(package, file, changes):
    before = hash_of(package)
    assert before == hash_of(provenance.PACKAGE)
    with (package / file).open("a") as source:
        source.write("\n# changed\n")
    assert (hash_of(package) != before) is changes


def test_a_new_and_a_renamed_file_are_another_version(package):
    before = hash_of(package)
    (package / "arena" / "kit" / "new.py").write_text("")
    new = hash_of(package)
    (package / "arena" / "kit" / "new.py").rename(package / "arena" / "kit" / "other.py")
    assert len({before, new, hash_of(package)}) == 3


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A plugin's file with helpers beside it, one of them in a folder, one that helps a helper."""
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("helper", "deeper", "sub", "sub.inner", "sub.beside"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    (tmp_path / "helper.py").write_text("def first(network):\n    import deeper\n    return network\n")
    (tmp_path / "deeper.py").write_text("")
    (tmp_path / "unused.py").write_text("")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "__init__.py").write_text("")
    (tmp_path / "sub" / "inner.py").write_text("from . import beside\nVALUE = 1\n")
    (tmp_path / "sub" / "beside.py").write_text("")
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN.format(name=f"helped-{tmp_path.name}"))
    (cls,) = load_file(file)
    yield cls()
    del sys.modules[cls.__module__]  # other processes are told of loaded files, and find no helpers there


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("mine.py", True),
        ("helper.py", True),
        ("deeper.py", True),
        ("sub/__init__.py", True),
        ("sub/inner.py", True),
        ("sub/beside.py", True),
        ("unused.py", False),
    ],
)
def test_helpers_beside_a_plugin_belong_to_its_code(plugin, tmp_path, file, changes):
    before = code_version(plugin)
    with (tmp_path / file).open("a") as source:
        source.write("\nCHANGED = True\n")
    assert (code_version(plugin) != before) is changes


def experiment(**changes):
    fields = {
        "name": "identity",
        "victims": ["digits-resnet"],
        "defenses": ["paper-samp"],
        "attacks": ["norms"],
        "threats": [{"name": "thief"}],
        "keys": 2,
    }
    return Experiment.model_validate(fields | changes)


ROOTS = Roots.of(bytes(32))


def identities(roots=ROOTS, judge=None, device="cpu", **changes):
    return {cell.identity("v", roots, judge, device) for cell in plan(experiment(**changes))}


def test_identity_is_what_the_result_depends_on(monkeypatch):
    own = identities()
    assert len(own) == len(plan(experiment()))
    assert identities() == own
    for other in (
        identities(Roots.of(bytes([1] * 32))),
        identities(judge=5),
        identities(device="cuda"),
        identities(threats=[{"name": "thief", "labelled": 1}]),
    ):
        assert not own & other
    monkeypatch.setattr(planning, "core_version", lambda: "of other sources")
    assert not own & identities()


def test_a_record_says_where_and_when_it_was_made():
    told = Clock("cpu").provenance()
    assert (told.torch, told.device, told.threads) == (torch.__version__, "cpu", torch.get_num_threads())
    age = datetime.now(UTC) - datetime.fromisoformat(told.started)
    assert 0 <= age.total_seconds() < 60 and 0 <= told.seconds < 60
    assert told.deepenc and told.python and told.platform and told.processor
    if (provenance.PACKAGE.parent / ".git").exists():
        assert len(told.commit.removesuffix("-dirty")) == 40
