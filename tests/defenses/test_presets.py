from __future__ import annotations

import pytest

from deepenc.encryption.defense import Defense
from deepenc.errors import ConfigError, PluginError
from deepenc.plugins import get, names


@pytest.mark.parametrize("name", names("defense"))
def test_registered_defenses_say_what_they_are_and_can_be_made_again(name: str) -> None:
    defense = get("defense", name)
    assert defense.name == name and defense.summary.endswith(".")
    assert Defense.of({**defense.spec(), "summary": defense.summary}) == defense
    assert Defense.of(name) == defense


def test_the_paper_places_the_same_number_everywhere() -> None:
    for name, weights in (("paper-samp", "samp"), ("paper-init", "init"), ("paper-mixed", "mixed")):
        assert get("defense", name).spec() | {"weights": None} == {
            "name": name,
            "placement": {"name": "absolute", "count": None, "proportion": 0.05, "sites": ["*"]},
            "weights": None,
            "hardening": [],
        }
        assert get("defense", name).weights.name == weights


def test_null_protects_nothing_and_a_base_is_taken_over() -> None:
    assert not Defense.of(None).protects and Defense.of("paper-init").protects
    wider = Defense.of({"base": "paper-init", "name": "wider", "placement": "absolute:count=9"})
    assert wider.weights == get("defense", "paper-init").weights and wider.placement.count == 9


def test_defenses_that_cannot_be_meant() -> None:
    with pytest.raises(PluginError, match="did you mean"):
        Defense.of("paper-smap")
    with pytest.raises(ConfigError, match="needs placement and weights"):
        Defense.of({"name": "half", "placement": "absolute"})
    with pytest.raises(ConfigError, match="unknown parameter 'wieghts'"):
        Defense.of({"base": "paper-samp", "wieghts": "init"})
    with pytest.raises(ConfigError, match="count"):
        Defense.of({"base": "paper-samp", "name": "x", "placement": "absolute:count=0"})
