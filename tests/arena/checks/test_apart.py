"""Checks in another process: a plugin may end it or hang, and the check says so."""

import re

import pytest

from deepenc.arena.checks.apart import run_apart
from deepenc.plugins import load_file

PLUGIN = """
import os, time
from typing import ClassVar, Literal

from deepenc.arena.case import Attack, Claim


class Ends(Attack):
    \"\"\"Ends its process, or none.\"\"\"

    name: ClassVar[str] = "{name}"
    how: Literal["exit", "hang"] = "exit"
    \"\"\"How.\"\"\"

    def attack(self, case):
        if self.how == "exit":
            os._exit(3)
        time.sleep(1e6)
"""


@pytest.fixture
def plugin(tmp_path):
    file = tmp_path / "ends.py"
    file.write_text(PLUGIN.format(name=f"ends-{tmp_path.name}"))
    return load_file(file)[0], (file,)


@pytest.mark.parametrize(
    ("how", "limit", "told"),
    [("exit", 300, "ends the process that it runs in.*exit code 3"), ("hang", 10, "takes more than 10 s")],
)
def test_what_ends_its_process_or_hangs_is_told(plugin, how, limit, told):
    cls, files = plugin
    seen = []
    results = run_apart(cls(how=how), files, seen.append, limit=limit)
    assert seen == results and [result.passed for result in results[:-1]] == [True] * 4
    assert not results[-1].passed and results[-1].name == "makes a claim that can be judged"
    assert re.search(told, results[-1].detail)
