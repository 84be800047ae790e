"""The registry refuses a plugin that does not fit its interface, and names plugin, file and remedy."""

import pytest

from deepenc.arena.case import Attack
from deepenc.errors import ConfigError, PluginError
from deepenc.plugins import build, get, load_file, loaded_files, names

HEAD = """
from typing import ClassVar

from deepenc.arena.case import Attack, Claim
from deepenc.arena.threat import Needs
from deepenc.encryption.defense import Hardening, Placement, Weights
from deepenc.victims.victim import VictimSource


class Mine({base}):
    \"\"\"Mine.\"\"\"

    name: ClassVar[str] = "{name}"

"""


@pytest.fixture
def load(tmp_path):
    """Writes a plugin of one class and loads it."""

    def of(base, body, name="mine"):
        file = tmp_path / "mine.py"
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        file.write_text(HEAD.format(base=base, name=name) + lines + "\n")
        return load_file(file)

    return of


GOOD = "def attack(self, case):\n    return Claim(network=case.encrypted)"


@pytest.mark.parametrize(
    ("base", "body", "told"),
    [
        (
            "Attack",
            "def attack(self):\n    return 1",
            r"method attack\(self\).*attack\(self, case\).*Mine.attack",
        ),
        ("Attack", "def attack(self, case, more):\n    return 1", r"attack\(self, case, more\)"),
        ("Attack", "attack: ClassVar[int] = 3", "attack, a int"),
        ("Attack", "@staticmethod\ndef attack(case):\n    return 1", "attack, a staticmethod"),
        ("Attack", "size: int = 1", r"'mine' has no method attack\(self, case\); add it to Mine"),
        ("Attack", GOOD + "\ndef needs(self):\n    return Needs()", "needs as a method; put @property"),
        ("Placement", "def place(self, original):\n    return {}", r"place\(self, original, rng\)"),
        ("Placement", "", r"no method place\(self, original, rng\)"),
        ("Weights", "def fill(self, neurons):\n    return []", r"fill\(self, neurons"),
        ("Hardening", "def harden(self, network):\n    pass", r"harden\(self, network, layout"),
        ("VictimSource", "def load(self, cache):\n    pass", r"no method network\(self, cache\)"),
    ],
)
def test_what_does_not_fit_its_interface_is_refused(load, base, body, told):
    loaded = loaded_files()
    with pytest.raises(PluginError, match=rf"mine.py: .*{told}"):
        load(base, body)
    assert loaded_files() == loaded
    assert not {"mine"} & {name for kind in ("attack", "placement", "weights") for name in names(kind)}


@pytest.mark.parametrize("name", ["My Attack", "a:b", "a,b", "a=b", " ", "-a", "\\n", "a/b"])
def test_names_that_configurations_cannot_write_are_refused(load, name):
    with pytest.raises(PluginError, match=r"mine.py: Mine is called .*expected letters"):
        load("Attack", GOOD, name=name)


@pytest.mark.parametrize(
    "body",
    [
        GOOD,
        "def attack(self, a_case, *, more=1):\n    return Claim(network=a_case.encrypted)",
        "def attack(self, *arguments):\n    return Claim(network=arguments[0].encrypted)",
        GOOD + "\n@property\ndef needs(self):\n    return Needs(labelled=1)",
    ],
)
def test_what_can_be_called_so_is_taken(load, body, tmp_path):
    (cls,) = load("Attack", body, name=f"fits-{tmp_path.name}")
    assert Attack.build(cls.name) == build("attack", cls.name) == cls()


def test_a_base_without_a_name_is_no_plugin(tmp_path):
    file = tmp_path / "bases.py"
    file.write_text(
        HEAD.format(base="Attack", name="").replace('    name: ClassVar[str] = ""\n', "")
        + "class Derived(Mine):\n"
        + f'    name: ClassVar[str] = "derived-{tmp_path.name}"\n\n'
        + "\n".join(f"    {line}" for line in GOOD.splitlines())
    )
    assert [cls.__name__ for cls in load_file(file)] == ["Derived"]


def test_a_file_that_exits_is_refused(tmp_path):
    (tmp_path / "exits.py").write_text("raise SystemExit(0)\n")
    with pytest.raises(PluginError, match=r"exits.py does not import: SystemExit"):
        load_file(tmp_path / "exits.py")


def test_an_interface_builds_its_own_plugins_only():
    assert Attack.build("norms").name == "norms" and get("attack", "norms") is type(Attack.build("norms"))
    with pytest.raises(ConfigError):
        Attack.build({"name": "finetune", "lr": -1})
    with pytest.raises(PluginError, match="expected attack plugins of Attack, got Samp"):
        Attack.build(build("weights", "samp"))
