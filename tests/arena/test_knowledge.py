"""What a case holds beside the encrypted network: further releases, a public network, an oracle."""

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn

from deepenc.arena import oracle as oracle_module
from deepenc.arena.build import Encryption, build_case
from deepenc.arena.checks.pry import pry
from deepenc.arena.checks.tiny import host_defense, tiny_subject
from deepenc.arena.oracle import Oracle
from deepenc.arena.threat import Meter, Threat
from deepenc.errors import OutOfBudget
from deepenc.network.surgery import narrow_sites
from deepenc.tasks.classification import Classification

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encryption():
    return Encryption.of(tiny_subject(), host_defense(), bytes(range(32)))


def case_of(encryption, **threat):
    return build_case(encryption, Threat(name="t", **threat), 1, 2, CPU)


def kept(network, sites, positions):
    """The weights of the first convolution without the confusion channels."""
    left = [c for c in range(sites[0].width) if c not in positions[sites[0].name]]
    return network.state_dict()["conv1.weight"][left]


def test_nothing_more_is_given_than_is_allowed(encryption):
    case = case_of(encryption)
    assert case.public is None and case.oracle is None and case.releases == ()


def test_copies_are_the_same_model_under_other_keys(encryption):
    case = case_of(encryption, releases=2)
    assert len(case.releases) == 2
    firsts = [case.encrypted.conv1.weight, *(r.encrypted.conv1.weight for r in case.releases)]
    assert len({tuple(w.flatten().tolist()) for w in firsts}) == 3
    real = {tuple(row.flatten().tolist()) for row in encryption.subject.victim.model.conv1.weight}
    for release in case.releases:
        rows = [tuple(row.flatten().tolist()) for row in release.encrypted.conv1.weight]
        assert len(real & set(rows)) == 24 and len(rows) == 26
        assert release.allocation == case.allocation


def test_copies_are_the_same_for_every_attack_on_an_encryption(encryption):
    one, two = case_of(encryption, releases=1), case_of(encryption, releases=1)
    for name, tensor in one.releases[0].encrypted.state_dict().items():
        other = two.releases[0].encrypted.state_dict()[name]
        assert torch.equal(tensor, other) and tensor.data_ptr() != other.data_ptr()


def test_drift_moves_the_real_weights_a_little(encryption):
    case = case_of(encryption, releases=1, drift=5)
    real = encryption.subject.victim.model.conv1.weight.detach().flatten(1)
    moved = case.releases[0].encrypted.conv1.weight.detach().flatten(1)
    cosine = torch.nn.functional.normalize(real, dim=1) @ torch.nn.functional.normalize(moved, dim=1).T
    assert float(cosine.amax(dim=1).min()) > 0.95
    assert not any(torch.equal(a, b) for a in real for b in moved)


def test_copies_and_public_networks_are_metered(encryption):
    case = case_of(encryption, releases=1, public_checkpoint=True, samples=10)
    case.releases[0].encrypted(torch.zeros(4, 3, 8, 8))
    case.public(torch.zeros(6, 3, 8, 8))
    assert case.meter.samples == 10
    with pytest.raises(OutOfBudget):
        copy.deepcopy(case.public)(torch.zeros(1, 3, 8, 8))


def test_the_public_network_is_a_copy(encryption):
    case = case_of(encryption, public_checkpoint=True)
    own = encryption.subject.victim.public
    for name, tensor in case.public.state_dict().items():
        assert torch.equal(tensor, own.state_dict()[name])
        assert tensor.data_ptr() != own.state_dict()[name].data_ptr()


def test_the_oracle_answers_as_the_victim_does_and_counts(encryption):
    case = case_of(encryption, oracle=8, unlabelled=8)
    answers = case.oracle(case.unlabelled[:5].inputs)
    assert torch.equal(answers, encryption.subject.victim.model(case.unlabelled[:5].inputs).detach())
    assert (case.meter.queries, case.meter.samples) == (5, 0)
    with pytest.raises(OutOfBudget, match="allows 8 queries; the attack asked for 9"):
        case.oracle(case.unlabelled[:4].inputs)


def test_the_oracle_does_not_show_its_model(encryption):
    case = case_of(encryption, oracle=8, releases=1, public_checkpoint=True)
    assert not pry(case).anything
    reachable = [value for value in vars(case.oracle).values() if not isinstance(value, Meter)]
    assert reachable and not any(isinstance(value, nn.Module) for value in reachable)
    assert copy.deepcopy(case.oracle) is case.oracle


def test_an_oracle_that_nobody_holds_lets_go_of_its_model():
    oracle = Oracle(nn.Linear(1, 1), Classification(), CPU, Meter(Threat(name="t", oracle=1)))
    number = oracle._number
    assert number in oracle_module._authorised
    del oracle
    gc.collect()
    assert number not in oracle_module._authorised


def test_further_releases_are_made_once_and_go_with_the_release(encryption, monkeypatch):
    made = []
    again = Encryption.again
    monkeypatch.setattr(Encryption, "again", lambda *arguments: made.append(1) or again(*arguments))
    own = dataclasses.replace(encryption)
    case_of(own)
    assert own.releases(0, 0) == () and not made
    assert own.releases(2, 0) is own.releases(2, 0) and len(made) == 2
    watched = weakref.ref(own.releases(2, 0)[0])
    del own
    gc.collect()
    assert watched() is None


def test_the_case_without_some_channels(encryption):
    case = case_of(encryption, key_fraction=0.5)
    site = case.sites[0]
    smaller = case.without({site.name: (0, 3, 5)})
    assert smaller.sites == narrow_sites(case.sites, {site.name: (0, 3, 5)})
    assert smaller.allocation == {**case.allocation, site.name: 0}
    assert smaller.known == {} and smaller.meter is case.meter
    assert smaller.encrypted.conv1.weight.shape[0] == 23
    network = case.copy()
    assert case.with_network(network).encrypted is network
