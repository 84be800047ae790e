"""Gates: 1 changes nothing, 0 is as good as removal, gradients are those of finite differences."""

import torch
from torch import nn
from torchvision.models import VisionTransformer

from deepenc.arena.checks.tiny import TinyNet, tiny_subject
from deepenc.network.find import find_sites
from deepenc.network.gates import Gated, gated_slots
from deepenc.network.surgery import Layout, narrow_sites, remove

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def tiny():
    subject = tiny_subject()
    return subject.victim.model, subject.sites


def test_open_gates_change_nothing():
    model, sites = tiny()
    assert torch.equal(Gated(model, sites)(X), model(X))
    assert torch.equal(Gated(model, sites).baked()(X), model(X))


def test_a_closed_gate_is_a_removed_channel():
    model, sites = tiny()
    gated = Gated(model, sites)
    gone = {"conv1": (0, 7), "conv3": (39,)}
    with torch.no_grad():
        for name, channels in gone.items():
            gated.gates[name][list(channels)] = 0.0
    expected = remove(model, Layout(narrow_sites(sites, gone), gone))(X)
    assert torch.allclose(gated(X), expected, atol=1e-5)
    assert torch.allclose(gated.baked()(X), expected, atol=1e-5)


def test_heads_are_silenced_on_both_sides():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(
            image_size=32, patch_size=16, num_layers=1, num_heads=2, hidden_dim=24, mlp_dim=16
        ).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    sites = find_sites(model, x[:1])
    heads = [site for site in sites if site.contracted]
    assert heads
    gated = Gated(model, sites)
    for site in heads:
        with torch.no_grad():
            gated.gates[site.name].zero_()
        assert {slot.role for slot in gated_slots(site)} > {"outgoing"}
    changed = gated.baked().state_dict()
    for site in heads:
        for slot in gated_slots(site):
            part = changed[slot.tensor].narrow(slot.dim, slot.start, site.width * slot.block)
            assert not part.any()


def test_gradients_agree_with_differences():
    model, sites = tiny()
    gated = Gated(model.double(), sites)
    x = X.double()
    for gate in gated.gates.values():
        gate.data = gate.data.double()
    gradient = torch.autograd.grad(gated(x).square().sum(), gated.gates["conv2"])[0][3]
    values = []
    for step in (1e-4, -1e-4):
        with torch.no_grad():
            gated.gates["conv2"][3] = 1 + step
            values.append(gated(x).square().sum())
    assert torch.allclose(gradient, (values[0] - values[1]) / 2e-4, rtol=1e-5)
    model.float()


def test_baking_leaves_the_network_alone():
    model, sites = TinyNet().eval(), tiny_subject().sites
    before = {name: t.clone() for name, t in model.state_dict().items()}
    gated = Gated(model, sites, value=0.5)
    made = gated.baked()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not set(map(id, made.parameters())) & set(map(id, model.parameters()))
    assert torch.equal(made.conv2.weight, model.conv2.weight * 0.5)


def test_closed_by_hand() -> None:
    gated = Gated(nn.Identity(), ())
    gated.gates = {
        "a": torch.tensor([1.0, 0.4, 1.2, -1.0, 1.1]),
        "b": torch.zeros(3),
        "c": torch.tensor([-1.0, -2.0]),
    }
    assert gated.closed(0.5) == {"a": (1, 3), "b": (), "c": (1,)}
