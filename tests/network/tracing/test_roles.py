"""What is no site, what weights are to channels, and what cannot be followed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d

from deepenc.network.find import analyse, find_sites
from deepenc.network.sites import Role, Slot
from deepenc.network.tracing.rules.registry import RULES

Use = Callable[[Tensor], Tensor]
GENERATOR = torch.Generator().manual_seed(0)
ROW, POINTS, IMAGE = (torch.randn(2, *shape, generator=GENERATOR) for shape in ((5,), (3, 4), (3, 4, 4)))
MADE = (("weight", Role.INCOMING), ("bias", Role.BIAS))


def tall(h: Tensor) -> Tensor:
    return F.conv2d(h[:, None, :, None], torch.ones(1, 1, 3, 1, device=h.device), padding=(1, 0))[:, 0, :, 0]


def halved(h: Tensor) -> Tensor:
    return h + torch.zeros_like(h).index_fill(1, torch.arange(3, device=h.device), 1)


# In each, the second of three layers is a site, and the first is none: its channels are not apart.
NOT_FOUND: dict[str, Use] = {
    "mirrored": lambda h: h.flip(1),
    "rolled": lambda h: h.roll(1, -1),
    "turned": lambda h: h[:, None].rot90(2, (1, 2))[:, 0],
    "sum of all": lambda h: h * torch.sum(h, ()),
    "norm of all": lambda h: h / (1 + h.norm(1)),
    "maximum of all": lambda h: h / h.max(),
    "pooled over channels": lambda h: F.avg_pool1d(h[:, None], 3, 1, 1)[:, 0],
    "convolved along channels": tall,
    "normalised by groups along channels": lambda h: F.group_norm(h[:, None], 1)[:, 0],
    "normalised over neighbours": lambda h: F.local_response_norm(h[..., None], 3)[..., 0],
    "resized along channels": lambda h: F.interpolate(h[:, None], 6, mode="linear")[:, 0],
    "padded along channels": lambda h: F.pad(h[:, None], (1, 0), mode="reflect")[:, 0, 1:],
    "sorted": lambda h: h.sort()[0],
    "stably sorted": lambda h: torch.sort(h, stable=True)[0],
    "the best": lambda h: h.topk(6).values,
    "by quantile": lambda h: h - h.quantile(0.5, 1, keepdim=True),
    "as bytes": lambda h: h.view(torch.uint8).view(torch.float32),
    "beside nothing": lambda h: torch.cat([h[:, :0].reshape(0, 6), h]),
    "a number more": lambda h: torch.addmm(torch.tensor(0.0, device=h.device), h, torch.eye(6).to(h.device)),
    "filled at given places": halved,
}


class Three(nn.Module):
    def __init__(self, use: Use) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 2)
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.last(self.second(self.use(self.first(x).relu())).relu())


@pytest.mark.parametrize("name", NOT_FOUND)
def test_what_mixes_channels_costs_their_site_only(name: str) -> None:
    torch.manual_seed(0)
    model = Three(NOT_FOUND[name]).eval()
    for device in ("cpu", "meta"):  # without values nothing but the rules tells
        found = analyse(model.to(device), ROW.to(device))
        assert [site.name for site in found.sites] == ["second"]
        reasons = {left.layer: left.reason for left in found.left_out}
        assert not any(text in reasons["first.weight"] for text in ("probe", "no later layer"))


class Tied(nn.Module):
    """A narrow embedding that is tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 4)
        self.wider, self.inner, self.narrower = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        return self.narrower(self.inner(self.wider(self.words(x)).relu()).relu()) @ self.words.weight.t()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tied_embedding_is_no_site(device: str) -> None:
    found = analyse(Tied().eval().to(device), torch.randint(20, (2, 3)).to(device))
    assert [site.name for site in found.sites] == ["wider", "inner"]
    reasons = {left.layer: left.reason for left in found.left_out}
    assert "words.weight serves as incoming and as outgoing weights" in reasons["narrower.weight"]


class Asked(nn.Module):
    """Pools by an attention that a learned query asks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.query, self.kind = nn.Parameter(torch.randn(1, 1, 6)), kind
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.q, self.k, self.v, self.last = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Any:
        query = self.query.expand(len(x), -1, -1)
        if self.kind == "torch":
            return self.attention(query, x, x)[0]
        q, k, v = self.q(query), self.k(x), self.v(x)
        if self.kind == "fused":
            return self.last(F.scaled_dot_product_attention(q, k, v, scale=0.5))
        return self.last((q @ k.transpose(1, 2)).softmax(-1) @ v)


@pytest.mark.parametrize("kind", ["torch", "fused", "written out"])
def test_a_learned_query_is_contracted_with_keys(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Asked(kind).eval(), torch.randn(2, 5, 6)
    (site,) = find_sites(model, x)
    assert site.contracted and site.width == (3 if kind == "torch" else 6)
    made = {slot.tensor for slot in site.slots if slot.role is Role.INCOMING}
    assert made == ({"attention.in_proj_weight"} if kind == "torch" else {f"{n}.weight" for n in "qkv"})
    assert find_sites(model.to("meta"), x.to("meta")) == [site]


def test_a_frozen_deformable_convolution_reads_channels() -> None:
    torch.manual_seed(0)

    class Deformed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.offset = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 18, 3, padding=1)
            self.last = DeformConv2d(6, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Any:
            return self.last(self.first(x), self.offset(x))

    found = analyse(Deformed().eval(), IMAGE)
    (site,) = found.sites
    made = {Slot(f"first.{name}", 0, role) for name, role in MADE}
    assert set(site.slots) == {*made, Slot("last.weight", 1, Role.OUTGOING)}


def broken(*_: Any, **__: Any) -> Any:
    raise IndexError("no such argument")


def short(_: Any, outputs: list[Tensor], *__: Any, **___: Any) -> Any:
    return [(None, None, None)] * len(outputs)


@pytest.mark.parametrize("rule", [broken, short])
def test_a_rule_that_fails_costs_sites_only(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "tanh", rule)
    found = analyse(Three(torch.tanh).eval(), ROW)
    assert [site.name for site in found.sites] == ["second"]
    reasons = {left.layer: left.reason for left in found.left_out}
    assert reasons["first.weight"] == "operator tanh in the network is not followed"


def test_finding_sites_inside_inference_mode() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).eval()
    expected = find_sites(model, ROW)
    with torch.inference_mode():
        assert find_sites(model, ROW) == expected
    assert [site.name for site in expected] == ["0"]


def test_normalised_weights() -> None:
    torch.manual_seed(0)
    weight_norm = nn.utils.parametrizations.weight_norm
    layers = weight_norm(nn.Conv1d(3, 6, 1)), nn.PReLU(), weight_norm(nn.Conv1d(6, 2, 1))
    (site,) = find_sites(nn.Sequential(*layers).eval(), POINTS)
    assert set(site.slots) == {
        Slot("0.parametrizations.weight.original0", 0, Role.SCALE),
        Slot("0.parametrizations.weight.original1", 0, Role.INCOMING),
        Slot("0.bias", 0, Role.BIAS),
        Slot("2.parametrizations.weight.original1", 1, Role.OUTGOING),
    }
    # Here a slice has entries of all channels that are made, and its norm moves with each.
    turned = weight_norm(nn.ConvTranspose1d(3, 6, 1)), nn.ReLU(), nn.Conv1d(6, 4, 1), nn.Conv1d(4, 2, 1)
    for device in ("cpu", "meta"):
        found = find_sites(nn.Sequential(*turned).eval().to(device), POINTS.to(device))
        assert [site.name for site in found] == ["2"]


class Cell(nn.Module):
    """A recurrent cell; its state is zeros at first, of the width of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.again, self.last = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        state = x.new_zeros(len(x), self.again.weight.shape[1])
        for step in x.unbind(2):
            state = (self.enter(step) + self.again(state)).tanh()
        return self.last(state)


def test_a_state_that_is_zero_at_first() -> None:
    torch.manual_seed(0)
    (site,) = find_sites(Cell().eval(), POINTS, streams=True)
    assert set(site.slots) == {
        *(Slot(f"{name}.{part}", 0, role) for name in ("enter", "again") for part, role in MADE),
        *(Slot(f"{name}.weight", 1, Role.OUTGOING) for name in ("again", "last")),
    }


def test_weights_behind_an_unfollowed_operator_are_named() -> None:
    class Transformed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, torch.fft.fft(self.weight).real, self.bias)

    model = nn.Sequential(Transformed(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    found = analyse(model.eval(), ROW)
    assert [site.name for site in found.sites] == ["2"]
    left = {item.layer: (item.channels, item.reason) for item in found.left_out}
    assert left["0.weight"] == (6, "operator _fft_r2c in 0 is not followed")


def test_a_block_that_runs_several_times_has_heads() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            for _ in range(2):
                x = x + self.block(x, x, x)[0]
            return x

    torch.manual_seed(0)
    (site,) = find_sites(Twice().eval(), torch.randn(2, 5, 6))
    assert site.contracted and site.width == 3


def front(h: Tensor) -> Tensor:
    h[:, :3].mul_(2)
    return h


@pytest.mark.parametrize(
    "use",
    [
        front,
        lambda h: torch.cat([h[:, :3] * 2, h[:, 3:]], 1),
        lambda h: (lambda parts: parts / (1 + parts.norm(dim=2, keepdim=True)))(h.view(2, 3, -1)).flatten(1),
    ],
    ids=["in place", "in two", "in three parts"],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_cut_at_a_written_number_is_no_site(use: Use, device: str) -> None:
    """In a wider network the cut is elsewhere; without values the shapes fit all the same."""
    torch.manual_seed(0)
    found = analyse(Three(use).eval().to(device), ROW.to(device))
    assert [site.name for site in found.sites] == ["second"]
    reasons = {left.layer: left.reason for left in found.left_out}
    assert "probe" in reasons["first.weight"]
