"""Who may import whom: read from the source by ast, so that an import inside a function counts too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST = 12
"""Modules in a folder of the core, beside its ``__init__.py``."""

# What every room may import; none of these imports a room.
GROUND = {f"deepenc.{name}" for name in ("errors", "files", "plainyaml", "plugins", "seeds", "trees")}

# Each room, and the rooms it may import besides itself.
CORE = dict.fromkeys(GROUND, GROUND) | {
    "deepenc.errors": set(),
    "deepenc.__main__": {"deepenc.cli"},
    "deepenc.processes": GROUND,
    "deepenc.network": GROUND,
    "deepenc.analysis": {*GROUND, "deepenc.network"},
    "deepenc.tasks": {*GROUND, "deepenc.network", "deepenc.analysis"},
    "deepenc.encryption": {*GROUND, "deepenc.network", "deepenc.analysis", "deepenc.tasks"},
    "deepenc.victims": {*GROUND, "deepenc.network", "deepenc.analysis", "deepenc.tasks"},
}
PLUGINS = {"defenses": {*CORE["deepenc.encryption"], "deepenc.encryption", "deepenc.victims"}}
CORE["deepenc.arena"] = {*PLUGINS["defenses"], "deepenc.processes"}
CORE["deepenc.study"] = {*CORE["deepenc.arena"], "deepenc.arena"}
CORE["deepenc.report"] = {*CORE["deepenc.study"], "deepenc.study"}
CORE["deepenc.config"] = CORE["deepenc.report"]
CORE["deepenc.cli"] = {*CORE["deepenc.report"], "deepenc.report", "deepenc.config"}
CORE["deepenc"] = {*CORE["deepenc.report"], "deepenc.report"}
PLUGINS["attacks"] = {*PLUGINS["defenses"], "deepenc.arena"}
OURS = {"deepenc", "attacks", "defenses", "benchmarks", "tests"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full module name of everything that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level
            # `from deepenc import errors` imports a module, `from deepenc.errors import near` does not.
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def room_of(module: str, rooms: set[str]) -> str:
    """The innermost room that a module, or a name in it, belongs to."""
    inside = [room for room in rooms if module == room or module.startswith(room + ".")]
    return max(inside, key=len, default=module.partition(".")[0])


def breaches(root: Path) -> list[str]:
    """Every import under a root that the rules forbid."""
    rules = CORE | PLUGINS
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if relative.parts[0] not in ("deepenc", "attacks", "defenses"):
            continue
        own = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        room = room_of(own, set(rules))
        for line, module in imports(path):
            target = room_of(module, set(rules))
            if target == "deepenc" and (room in PLUGINS or room == "deepenc.cli"):
                continue  # the public names of the package
            if module.startswith("."):
                found.append(f"{relative}:{line}: relative import; name the module in full")
            elif target.partition(".")[0] in OURS and target not in {room, *rules[room]}:
                found.append(f"{relative}:{line}: {room} must not import {target}")
    return found


def circles(root: Path) -> list[list[str]]:
    """Modules that import each other in a circle, imports inside functions and for types included."""
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for room in ("deepenc", "attacks", "defenses")
        for path in sorted((root / room).rglob("*.py"))
    }
    uses: dict[str, set[str]] = {}
    for own, path in files.items():
        found = {module if module in files else module.rpartition(".")[0] for _, module in imports(path)} - {
            own,
            "deepenc",
        }  # the package's face imports lazily what it hands on
        uses[own] = found & files.keys()
    try:
        tuple(TopologicalSorter(uses).static_order())
    except CycleError as error:
        return [list(error.args[1])]
    return []


def crowded(root: Path) -> list[str]:
    """Folders of the core with more than a dozen modules."""
    folders = Counter(path.parent for path in (root / "deepenc").rglob("*.py") if path.stem != "__init__")
    return [
        f"{folder.relative_to(root)}: {count} modules" for folder, count in folders.items() if count > MOST
    ]


def test_imports_follow_the_rules() -> None:
    assert not breaches(ROOT)


def test_nothing_imports_in_a_circle() -> None:
    assert not circles(ROOT)


def test_no_folder_is_crowded() -> None:
    assert not crowded(ROOT)


def test_a_planted_circle_and_a_crowd_are_found(tmp_path: Path) -> None:
    room = tmp_path / "deepenc" / "network"
    room.mkdir(parents=True)
    (room / "a.py").write_text("from deepenc.network.b import B\n")
    (room / "b.py").write_text("def late():\n    from deepenc.network import c\n")
    (room / "c.py").write_text("from deepenc.errors import near\n")
    assert not circles(tmp_path)
    (room / "c.py").write_text("if False:\n    import deepenc.network.a\n")
    assert sorted(set(circles(tmp_path)[0])) == [f"deepenc.network.{name}" for name in "abc"]
    for number in range(MOST - 3):
        (room / f"m{number}.py").touch()
    assert not crowded(tmp_path)
    (room / "one_more.py").touch()
    assert crowded(tmp_path) == ["deepenc/network: 13 modules"]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("deepenc/network/bad.py", "from deepenc.encryption.keys.key import Key"),
        ("deepenc/errors.py", "from deepenc import plugins"),
        ("deepenc/arena/bad.py", "import attacks.null"),
        ("deepenc/victims/bad.py", "from deepenc.arena.case import Case"),
        ("deepenc/encryption/bad.py", "def late():\n    from deepenc.victims.victim import Victim"),
        ("deepenc/report/bad.py", "import deepenc.cli"),
        ("deepenc/cli.py", "import benchmarks.structure"),
        ("attacks/bad.py", "from defenses.weights.samp import Samp"),
        ("defenses/weights/bad.py", "from deepenc.arena.case import Case"),
        ("deepenc/network/bad.py", "from ..encryption import key"),
    ],
)
def test_a_planted_breach_is_found(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text("from __future__ import annotations\n\nimport torch\n\n" + line + "\n")
    assert len(breaches(tmp_path)) == 1
    assert file in breaches(tmp_path)[0]


def test_allowed_imports_are_no_breach(tmp_path: Path) -> None:
    path = tmp_path / "attacks" / "good.py"
    path.parent.mkdir()
    path.write_text("import deepenc\nfrom deepenc.arena.case import Attack\nfrom attacks.null import Null\n")
    assert not breaches(tmp_path)


def _loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_importing_the_package_loads_nothing_heavy_and_no_plugin() -> None:
    loaded = _loaded_by("import deepenc")
    assert "deepenc" in loaded
    assert not loaded & {"lightning", "optuna", "matplotlib", "transformers", "attacks", "defenses"}


def test_the_command_line_answers_for_help_without_torch() -> None:
    loaded = _loaded_by("import deepenc.cli")
    assert not loaded & {"torch", "lightning", "sklearn", "sqlalchemy", "attacks", "defenses"}
