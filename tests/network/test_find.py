"""Sites are found where a person finds them by hand, in every network that the issue of the day needs."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from deepenc.encryption.defense import Defense
from deepenc.encryption.encrypt import decrypt, encrypt
from deepenc.errors import SiteError, TraceError
from deepenc.network.find import analyse, find_sites
from deepenc.network.proving.proof import prove
from deepenc.network.sites import Role, Site, Slot
from deepenc.victims.models import CifarResNet

DEFENSE = Defense.model_validate(
    {"name": "test", "placement": {"name": "proportional", "proportion": 0.05}, "weights": "init"}
)


def batch_norm(name: str, start: int = 0) -> tuple[Slot, ...]:
    return (
        Slot(f"{name}.weight", 0, Role.SCALE, start),
        Slot(f"{name}.bias", 0, Role.SHIFT, start),
        Slot(f"{name}.running_mean", 0, Role.MEAN, start),
        Slot(f"{name}.running_var", 0, Role.VARIANCE, start),
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = nn.Conv2d(4, 5, 3, padding=1)
        self.outer = nn.Conv2d(5, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.outer(self.inner(x).relu())
        return self.head(x.mean((2, 3)))


class Gated(nn.Module):
    """Squeeze and excite: a channel is scaled by a gate computed from all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self.squeeze = nn.Conv2d(6, 2, 1)
        self.excite = nn.Conv2d(2, 6, 1)
        self.last = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        gate = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.last(x * gate)


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.second = nn.Conv2d(4, 2, 1)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        return self.last(self.norm(torch.cat([a, self.second(a)], 1)))


def slots(site: Site) -> set[Slot]:
    return set(site.slots)


def test_convolution_with_batch_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))
    (site,) = find_sites(model, torch.zeros(2, 3, 8, 8))
    assert (site.name, site.width, site.stream) == ("0", 8, False)
    assert slots(site) == {
        Slot("0.weight", 0, Role.INCOMING),
        *batch_norm("1"),
        Slot("3.weight", 1, Role.OUTGOING),
    }


def test_flattened_map_takes_a_block_of_each_channel() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5), nn.ReLU(), nn.Linear(5, 2))
    conv, linear = find_sites(model, torch.zeros(2, 1, 8, 8))
    assert slots(conv) == {
        Slot("0.weight", 0, Role.INCOMING),
        Slot("0.bias", 0, Role.BIAS),
        Slot("2.weight", 1, Role.OUTGOING, 0, 36),
    }
    assert slots(linear) == {
        Slot("2.weight", 0, Role.INCOMING),
        Slot("2.bias", 0, Role.BIAS),
        Slot("4.weight", 1, Role.OUTGOING),
    }


def test_channels_last_flatten_takes_a_slot_for_each_place() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(1, 4, 3), nn.Linear(4 * 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.conv(x).permute(0, 2, 3, 1).flatten(1))

    (site,) = find_sites(Last(), torch.zeros(2, 1, 4, 4))
    outgoing = {slot for slot in site.slots if slot.role is Role.OUTGOING}
    assert outgoing == {Slot("linear.weight", 1, Role.OUTGOING, 4 * place) for place in range(4)}


def test_depthwise_channels_pass_through() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1))
    (site,) = find_sites(model, torch.zeros(1, 3, 8, 8))
    assert slots(site) == {
        Slot("0.weight", 0, Role.INCOMING),
        Slot("0.bias", 0, Role.BIAS),
        Slot("1.weight", 0, Role.INCOMING),
        Slot("1.bias", 0, Role.BIAS),
        Slot("2.weight", 1, Role.OUTGOING),
    }


def test_groups_are_widened_alike() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.Conv2d(6, 8, 3, groups=2), nn.Conv2d(8, 2, 1))
    first, second = find_sites(model, torch.zeros(1, 3, 8, 8))
    assert first.width == 3
    assert slots(first) == {
        Slot("0.weight", 0, Role.INCOMING, 0),
        Slot("0.weight", 0, Role.INCOMING, 3),
        Slot("1.weight", 1, Role.OUTGOING),
    }
    assert second.width == 4
    assert {slot for slot in second.slots if slot.tensor == "1.weight"} == {
        Slot("1.weight", 0, Role.INCOMING, 0),
        Slot("1.weight", 0, Role.INCOMING, 4),
    }


def test_concatenation_moves_later_channels() -> None:
    first, second = find_sites(Concatenated(), torch.zeros(1, 3, 4, 4))
    assert slots(first) == {
        Slot("first.weight", 0, Role.INCOMING),
        Slot("first.bias", 0, Role.BIAS),
        Slot("second.weight", 1, Role.OUTGOING),
        *batch_norm("norm"),
        Slot("last.weight", 1, Role.OUTGOING),
    }
    assert slots(second) == {
        Slot("second.weight", 0, Role.INCOMING),
        Slot("second.bias", 0, Role.BIAS),
        *batch_norm("norm", 4),
        Slot("last.weight", 1, Role.OUTGOING, 4),
    }


def test_gates_are_widened_with_what_they_gate() -> None:
    main, squeezed = find_sites(Gated(), torch.zeros(1, 3, 4, 4))
    assert slots(main) == {
        Slot("conv.weight", 0, Role.INCOMING),
        Slot("conv.bias", 0, Role.BIAS),
        Slot("squeeze.weight", 1, Role.OUTGOING),
        Slot("excite.weight", 0, Role.INCOMING),
        Slot("excite.bias", 0, Role.BIAS),
        Slot("last.weight", 1, Role.OUTGOING),
    }
    assert squeezed.width == 2


def test_residual_streams_are_an_option() -> None:
    example = torch.zeros(1, 3, 4, 4)
    assert [site.name for site in find_sites(Residual(), example)] == ["inner"]
    stream, inner = find_sites(Residual(), example, streams=True)
    assert (stream.name, stream.stream, inner.stream) == ("stem", True, False)
    assert {slot.tensor for slot in stream.slots} == {
        "stem.weight",
        "stem.bias",
        "inner.weight",
        "outer.weight",
        "outer.bias",
        "head.weight",
    }
    reasons = {left.layer: left.reason for left in analyse(Residual(), example).left_out}
    assert "residual stream" in reasons["outer.weight"]
    assert "output of the network" in reasons["head.weight"]


# Counted by hand from the architectures: first conv of 8 basic blocks; two widths of 16 bottlenecks and
# the stem; 13 convolutions and 2 hidden linear layers; stem, 58 bottlenecks, 58 growths, 3 transitions;
# 17 expansions (one of them the stem's) and the projections without a residual; 12 MLPs and 12 attentions.
COUNTS = {
    "resnet18": 8,
    "resnet50": 33,
    "vgg16": 15,
    "vgg16_bn": 15,
    "densenet121": 120,
    "mobilenet_v2": 20,
    "vit_b_16": 24,
}


@pytest.mark.parametrize("name", COUNTS)
def test_torchvision_networks_encrypt_and_decrypt_exactly(name: str) -> None:
    torch.manual_seed(0)
    size = {"image_size": 32} if name == "vit_b_16" else {}
    model = getattr(torchvision.models, name)(weights=None, **size).eval()
    example = torch.randn(1, 3, 32, 32) if size else torch.randn(1, 3, 64, 64)
    if size:
        nn.init.normal_(model.heads.head.weight, std=0.1)  # torchvision begins with zero
    _encrypt_and_decrypt(model, example, COUNTS[name])


@pytest.mark.parametrize("depth", [20, 56])
def test_cifar_networks_encrypt_and_decrypt_exactly(depth: int) -> None:
    torch.manual_seed(0)
    model = CifarResNet(depth).eval()
    _encrypt_and_decrypt(model, torch.randn(1, 3, 32, 32), (depth - 2) // 2)


def _encrypt_and_decrypt(model: nn.Module, example: Tensor, count: int) -> None:
    sites = find_sites(model, example)
    assert len(sites) == count
    encrypted, key = encrypt(model, example, DEFENSE, sites=sites, seed=0)
    decrypted = decrypt(encrypted, key)
    original = model.state_dict()
    assert decrypted.state_dict().keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in decrypted.state_dict().items())
    with torch.no_grad():
        before = model(example)
        assert not torch.allclose(encrypted(example), before)
        assert torch.equal(decrypted(example), before)
    assert find_sites(decrypted, example) == sites


def test_the_network_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_sites(model, torch.randn(2, 3, 4, 4))
    assert model.training and not model[0]._forward_pre_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_network_without_weights_in_memory() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18(weights=None)
    assert len(find_sites(model, torch.zeros(1, 3, 64, 64, device="meta"))) == 8


def test_a_network_that_looks_at_values() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu() if x.sum() > 0 else self.first(x))

    assert [site.name for site in find_sites(Looks(), torch.ones(1, 3))] == ["first"]


def test_hard_coded_widths_are_left_out_with_a_reason() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.second(self.first(x).view(-1, 6)))

    found = analyse(Fixed(), torch.randn(2, 3))
    assert [site.name for site in found.sites] == ["second"]
    reason = next(left.reason for left in found.left_out if left.layer == "first.weight")
    assert "does not run" in reason or "other shapes" in reason


def test_an_operator_without_a_rule_costs_sites_only() -> None:
    class Fourier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(
                self.second(torch.fft.rfft(self.first(x), n=6, norm="ortho").real.repeat(1, 2)[:, :6])
            )

    found = analyse(Fourier(), torch.randn(2, 3))
    assert [site.name for site in found.sites] == ["second"]
    assert any("fft" in left.reason for left in found.left_out if left.layer == "first.weight")


def test_a_wrong_site_is_refuted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False), nn.Linear(3, 2)
    )
    example = torch.randn(4, 3)
    right = find_sites(model, example)
    # Claims that the second layer's outputs are the first one's channels.
    wrong = Site("w", 3, (Slot("2.weight", 0, Role.INCOMING), Slot("2.weight", 1, Role.OUTGOING)))
    proved, refuted = prove(model, example, [right[1]])
    assert (proved, refuted) == ([right[1]], [])
    proved, refuted = prove(model, example, [wrong])
    assert proved == [] and refuted[0][0] == wrong


def test_a_site_that_misses_a_consumer_is_refuted() -> None:
    torch.manual_seed(0)
    model = Concatenated().eval()
    example = torch.randn(1, 3, 4, 4)
    first, second = find_sites(model, example)
    crippled = Site(first.name, first.width, tuple(s for s in first.slots if s.tensor != "norm.bias"))
    proved, refuted = prove(model, example, [crippled, second])
    assert proved == [second]
    assert [site for site, _ in refuted] == [crippled]


def test_a_head_of_zeros_hides_nothing() -> None:
    torch.manual_seed(0)
    model = Concatenated().eval()
    nn.init.zeros_(model.last.weight)
    nn.init.zeros_(model.last.bias)
    first, _ = find_sites(model, torch.randn(1, 3, 4, 4))
    crippled = Site(first.name, first.width, tuple(s for s in first.slots if s.tensor != "norm.bias"))
    assert prove(model, torch.randn(1, 3, 4, 4), [crippled])[0] == []
    misplaced = tuple(
        Slot(s.tensor, s.dim, s.role, 1 if s.tensor == "last.weight" else 0) for s in first.slots
    )
    assert prove(model, torch.randn(1, 3, 4, 4), [Site("m", 4, misplaced)])[0] == []


def test_an_example_of_the_wrong_shape_names_the_module() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    with pytest.raises(TraceError, match=r"0 \(Conv2d\) raised .*example"):
        find_sites(model, torch.zeros(1, 5, 4, 4))


def test_outputs_that_are_not_finite_prove_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.raises(TraceError, match="not finite"):
        find_sites(model, torch.ones(1, 3))


def test_no_site_is_an_error() -> None:
    with pytest.raises(SiteError, match="no site"):
        find_sites(nn.Linear(3, 2), torch.zeros(1, 3))
