"""The embedded victim: trained once, good at its task, its parts apart."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch

from deepenc.arena.metrics import judge
from deepenc.errors import VictimError
from deepenc.victims.data.splits import digests
from deepenc.victims.sources.digits import DigitsResNet


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache") / "not" / "there yet"


@pytest.fixture(scope="module")
def victim(cache):
    return DigitsResNet().load(cache)


def test_it_is_good_at_digits_it_has_not_seen(victim):
    assert not victim.model.training
    for part in (victim.attacker, victim.judge):
        assert judge(victim.model, part, victim.task, who="victim").value > 0.95


def test_parts_do_not_overlap_and_are_all_of_the_data(victim):
    parts = (victim.defender, victim.attacker, victim.judge)
    assert [len(part) for part in parts] == [697, 500, 600]
    contents = [set(digests(part.inputs.numpy())) for part in parts]
    assert sum(map(len, contents)) == 1797
    assert all(not one & two for one, two in itertools.combinations(contents, 2))


def test_inputs_are_standardised(victim):
    assert victim.example.shape == (1, 1, 8, 8) and victim.example.dtype == torch.float32
    assert abs(float(victim.defender.inputs.mean())) < 0.05
    assert float(victim.defender.inputs.std()) == pytest.approx(1, abs=0.05)


def test_the_second_time_it_is_read_from_the_cache(victim, cache, monkeypatch):
    monkeypatch.setattr("deepenc.victims.sources.digits.fit", lambda *_: pytest.fail("trained again"))
    again = DigitsResNet().load(cache)
    assert again.fingerprint == victim.fingerprint
    network, example = DigitsResNet().network(cache)
    assert torch.equal(network(example), victim.model(victim.example))


def quick(network, *_):
    """Instead of training."""
    with torch.no_grad():
        network.linear.bias.fill_(7.0)


@pytest.mark.parametrize("damage", ["cut", "altered", "emptied"])
def test_a_damaged_cache_is_trained_again(victim, cache, tmp_path, monkeypatch, caplog, damage):
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "altered":
        content[-5] ^= 1
    (tmp_path / file.name).write_bytes(content[: {"cut": 5000, "emptied": 0}.get(damage)])
    monkeypatch.setattr("deepenc.victims.sources.digits.fit", quick)
    with caplog.at_level(logging.WARNING):
        network, _ = DigitsResNet().network(tmp_path)
    assert "damaged" in caplog.text
    assert network.linear.bias[0] == 7
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    monkeypatch.setattr("deepenc.victims.sources.digits.fit", lambda *_: pytest.fail("trained again"))
    assert DigitsResNet().network(tmp_path)[0].linear.bias[0] == 7


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("deepenc.victims.sources.digits.fit", quick)
    (tmp_path / "file").write_text("")
    with pytest.raises(VictimError, match="another cache folder"):
        DigitsResNet().network(tmp_path / "file")


def test_training_does_not_touch_the_global_generator(tmp_path, monkeypatch):
    monkeypatch.setattr("deepenc.victims.sources.digits.fit", quick)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    DigitsResNet().network(tmp_path)
    assert torch.equal(before, torch.get_rng_state())
