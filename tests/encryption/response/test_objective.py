from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from deepenc.encryption.cost.costs import Memory, memory
from deepenc.encryption.encrypt import encrypt
from deepenc.encryption.response.objective import Response, gain, response_change
from deepenc.errors import ConfigError, SiteError
from deepenc.network.sites import Site

Net = tuple[nn.Module, Tensor, tuple[Site, ...]]


def bits(model: nn.Module) -> int:
    distinct = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(8 * t.numel() * t.element_size() for t in distinct.values())


def test_memory_is_what_the_two_networks_really_take(net: Net) -> None:
    model, inputs, sites = net
    defense = {"base": "paper-init", "name": "t", "placement": "absolute:count=3"}
    encrypted, key = encrypt(model, inputs, defense, seed=0, sites=sites)
    cost = memory(model.state_dict(), sites, key.allocation)
    assert cost == Memory(bits(model), bits(encrypted) - bits(model))
    state = model.state_dict()
    meta = {tensor.data_ptr(): torch.empty_like(tensor, device="meta") for tensor in state.values()}
    shapes = {name: meta[tensor.data_ptr()] for name, tensor in state.items()}
    assert memory(shapes, sites, key.allocation) == cost


def test_memory_where_two_sites_meet_by_hand(two_sites: Net) -> None:
    # Weights 4x1x3x3, 5x4x3x3, 2x5x2x2 and 4 + 5 + 2 biases; one channel more at the first site, two more
    # at the second: 5x1x3x3, 7x5x3x3, 2x7x2x2 and 5 + 7 + 2.
    model, _, sites = two_sites
    cost = memory(model.state_dict(), sites, {"0": 1, "2": 2})
    assert cost.bits == 32 * (36 + 180 + 40 + 11)
    assert cost.extra_bits == 32 * (45 + 315 + 56 + 14) - cost.bits
    assert cost.ratio == pytest.approx(163 / 267)
    assert memory(model.state_dict(), sites, {}).extra_bits == 0


def test_memory_of_mixed_dtypes_by_hand() -> None:
    tensors = {"a": torch.empty(3, dtype=torch.float16), "b": torch.empty((), dtype=torch.int64)}
    assert memory(tensors, (), {}).bits == 3 * 16 + 64


def test_memory_of_sites_of_another_network(small: Net, two_sites: Net) -> None:
    with pytest.raises(SiteError, match="another network"):
        memory(small[0].state_dict(), two_sites[2], {})


class Shift(nn.Module):
    def __init__(self, *by: float) -> None:
        super().__init__()
        self.by = torch.tensor(by)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by * x[:, :1]


@pytest.mark.parametrize("batch_size", [1, 2, 256])
def test_response_change_by_hand(batch_size: int) -> None:
    # The outputs of the two images differ by (3, 4) and (6, 8): distances 5 and 10; their norms are
    # 1 + 0 and 4 + 5.
    inputs = torch.tensor([[1.0, 0.0], [2.0, 5.0**0.5]])
    change = response_change(Shift(0, 0), Shift(3, 4), inputs, batch_size)
    assert change.l2 == pytest.approx(7.5)
    assert change.squared == pytest.approx(62.5)
    assert change.relative == pytest.approx(62.5 / 5, rel=1e-6)
    none = response_change(Shift(0, 0), Shift(0, 0), inputs)
    assert (none.l2, none.squared, none.relative) == (0, 0, 0)


def test_response_change_leaves_grad_mode_and_networks_alone(small: Net) -> None:
    model, inputs, sites = small
    defense = {"base": "paper-init", "name": "t", "placement": "absolute:count=2"}
    encrypted, _ = encrypt(model, inputs, defense, seed=0, sites=sites)
    before = copy.deepcopy(model.state_dict())
    change = response_change(model, encrypted, inputs)
    with torch.no_grad():
        distances = (model(inputs) - encrypted(inputs)).double().norm(dim=1)
    assert change.l2 == pytest.approx(distances.mean().item(), rel=1e-5)
    assert torch.is_grad_enabled()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_what_has_no_response_is_refused() -> None:
    with pytest.raises(ConfigError, match="images"):
        response_change(Shift(0), Shift(1), torch.zeros(0, 1))
    with pytest.raises(ConfigError, match="eval"):
        response_change(Shift(0), Shift(1).train(), torch.zeros(1, 1))

    class Words(Shift):
        def forward(self, x: Tensor) -> dict[str, str]:  # type: ignore[override]
            return {"logits": "x"}

    with pytest.raises(ConfigError, match="not a fixed number of values"):
        response_change(Words(0), Words(0), torch.zeros(1, 1))


def test_gain_by_hand() -> None:
    assert gain(7.5, Memory(1000, 50), lam=20.0) == pytest.approx(6.5)
    assert gain(7.5, 0.05, lam=20.0) == pytest.approx(6.5)
    change = Response(l2=7.5, squared=62.5, relative=12.5)
    assert gain(change, Memory(1000, 50), lam=20.0) == pytest.approx(6.5)
    assert gain(change, Memory(1000, 50), lam=20.0, form="relative") == pytest.approx(11.5)
