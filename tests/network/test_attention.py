"""torch's attention with heads of any width, against torch's own; and its heads as sites."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepenc.encryption.defense import Defense
from deepenc.encryption.encrypt import decrypt, encrypt
from deepenc.encryption.keys.key import Key
from deepenc.network.attention import WideAttention, adapt
from deepenc.network.find import find_sites
from deepenc.network.tracing.admit import tensors_in

EMBED, HEADS, BATCH, QUERIES, KEYS = 12, 3, 2, 5, 4
WIDTH = EMBED // HEADS

DEFENSE = Defense.model_validate(
    {"name": "test", "placement": {"name": "proportional", "proportion": 0.4}, "weights": "samp"}
)
BUILDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sequence first": {"batch_first": False},
    "no bias": {"bias": False},
    "other widths": {"kdim": 7, "vdim": 6},
    "bias_kv": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
    "all at once": {"kdim": 7, "vdim": 6, "add_bias_kv": True, "add_zero_attn": True, "batch_first": False},
}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no weights": {"need_weights": False},
    "weights by head": {"average_attn_weights": False},
}


def attention(**options: Any) -> nn.MultiheadAttention:
    """An attention with no zero among its parameters, and so no term that hides."""
    torch.manual_seed(0)
    made = nn.MultiheadAttention(EMBED, HEADS, **({"batch_first": True} | options)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.4)
    return made


def wide(module: nn.MultiheadAttention) -> nn.MultiheadAttention:
    made = copy.deepcopy(module)
    adapt(made, wide=True)
    assert type(made) is WideAttention
    return made


def inputs(module: nn.MultiheadAttention, single: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values for cross attention."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((QUERIES, EMBED), (KEYS, module.kdim), (KEYS, module.vdim))
    rows = (torch.randn(BATCH, *size, generator=generator) for size in sizes)
    q, k, v = (x[0] if single else x if module.batch_first else x.transpose(0, 1) for x in rows)
    return q, k, v


def agree(module: nn.MultiheadAttention, given: tuple[Tensor, ...], **call: Any) -> None:
    """Hold the wide attention to torch's, with values and without gradients and with them."""
    other = wide(module)
    for grad in (False, True):  # torch takes a fused kernel where no gradient is wanted
        with torch.set_grad_enabled(grad):
            ours, theirs = other(*given, **call), module(*given, **call)
        assert (ours[1] is None) == (theirs[1] is None)
        for a, b in zip(tensors_in(ours), tensors_in(theirs), strict=True):
            torch.testing.assert_close(a, b)


def masks(rows: int) -> dict[str, dict[str, Any]]:
    """Keyword arguments by name; no query is left without a key."""
    generator = torch.Generator().manual_seed(2)
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[0, 1] = padding[1, 2:] = True
    flat = torch.rand(QUERIES, KEYS, generator=generator) < 0.4
    deep = torch.rand(rows * HEADS, QUERIES, KEYS, generator=generator) < 0.4
    flat[:, 0] = deep[:, :, 0] = False
    padding = padding if rows == BATCH else padding[0]
    added = torch.randn(rows * HEADS, QUERIES, KEYS, generator=generator)
    square = nn.Transformer.generate_square_subsequent_mask(QUERIES)
    return {
        "padding": {"key_padding_mask": padding},
        "padding that is added": {"key_padding_mask": torch.randn(padding.shape, generator=generator)},
        "mask": {"attn_mask": flat},
        "mask that is added": {"attn_mask": added[0]},
        "mask of each head": {"attn_mask": deep},
        "mask of each head that is added": {"attn_mask": added},
        "mask and padding": {"attn_mask": deep, "key_padding_mask": padding},
        "causal": {"attn_mask": square[:, :KEYS], "is_causal": True},
    }


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("build", BUILDS)
def test_it_agrees_with_torch(build: str, call: str) -> None:
    module = attention(**BUILDS[build])
    agree(module, inputs(module), **CALLS[call])
    agree(module, inputs(module, single=True), **CALLS[call])
    if module.kdim == module.vdim == EMBED:
        query = inputs(module)[0]
        agree(module, (query, query, query), **CALLS[call])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("mask", masks(BATCH))
def test_masks_agree_with_torch(mask: str, build: str, call: str) -> None:
    module = attention(**BUILDS[build])
    if mask == "causal" and call == "no weights" and (module.bias_k is not None or module.add_zero_attn):
        pytest.skip("torch then ignores the mask and hides the keys that it has added itself")
    agree(module, inputs(module), **masks(BATCH)[mask], **CALLS[call])
    agree(module, inputs(module, single=True), **masks(1)[mask], **CALLS[call])


def test_a_mask_matters() -> None:
    module = wide(attention())
    given = inputs(module)
    plain = module(*given)[0]
    for name, mask in masks(BATCH).items():
        assert not torch.allclose(module(*given, **mask)[0], plain), name


@pytest.mark.parametrize("build", BUILDS)
def test_gradients_and_dropout_agree_with_torch(build: str) -> None:
    module = attention(dropout=0.4, **BUILDS[build]).train()
    other = wide(module)
    results = []
    for attending in (module, other):
        torch.manual_seed(3)
        out, weights = attending(*inputs(module), average_attn_weights=False)
        (out.square().sum() + weights.square().sum()).backward()
        results.append([out, weights, *(p.grad for p in attending.parameters())])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("build", BUILDS)
def test_adapting_back_gives_torchs_own(build: str) -> None:
    module = attention(**BUILDS[build])
    other = wide(module)
    assert other.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(other.state_dict()[name], x) for name, x in module.state_dict().items())
    adapt(other)  # its tensors have torch's widths
    assert type(other) is nn.MultiheadAttention
    assert {n: v for n, v in vars(other).items() if not n.startswith("_")} == {
        n: v for n, v in vars(module).items() if not n.startswith("_")
    }
    assert other._qkv_same_embed_dim == module._qkv_same_embed_dim
    with torch.no_grad():
        pairs = zip(other(*inputs(module)), module(*inputs(module)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


class Own(nn.MultiheadAttention):
    """Somebody's own attention."""


def test_a_subclass_is_left_alone() -> None:
    for wanted in (True, False, None):
        module = Own(EMBED, HEADS)
        before = dict(vars(module))
        adapt(module, wide=wanted)
        assert type(module) is Own and vars(module) == before


def encoder(layers: int, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 16, batch_first=True, **options)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False) if layers else layer


def decoder() -> nn.Module:
    return nn.TransformerDecoderLayer(EMBED, HEADS, 16, batch_first=True)


def given(model: nn.Module) -> tuple[Tensor, ...]:
    if isinstance(model, nn.MultiheadAttention):
        return inputs(model)
    generator = torch.Generator().manual_seed(1)
    row, memory = (torch.randn(BATCH, n, EMBED, generator=generator) for n in (QUERIES, KEYS))
    return (row, memory) if isinstance(model, nn.TransformerDecoderLayer) else (row,)


# Each network with the paths of its attentions; each has heads of one width, 12 / 3.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "attention": (attention, [""]),
    "sequence first": (lambda: attention(batch_first=False), [""]),
    "no bias": (lambda: attention(bias=False), [""]),
    "other widths": (lambda: attention(kdim=7, vdim=6), [""]),
    "bias_kv": (lambda: attention(add_bias_kv=True), [""]),
    "encoder layer": (lambda: encoder(0), ["self_attn"]),
    "encoder layer, normalised first": (lambda: encoder(0, norm_first=True), ["self_attn"]),
    "encoder": (lambda: encoder(2), ["layers.0.self_attn", "layers.1.self_attn"]),
    "decoder layer": (decoder, ["self_attn", "multihead_attn"]),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def run(model: nn.Module, example: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return tensors_in(model(*example))


def under(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_are_sites(name: str) -> None:
    model = made(name)
    sites = find_sites(model, given(model))
    heads = [site for site in sites if site.contracted]
    assert len(heads) == len(NETWORKS[name][1])
    for path, site in zip(NETWORKS[name][1], heads, strict=True):
        attending = model.get_submodule(path)
        assert isinstance(attending, nn.MultiheadAttention)
        assert site.width == WIDTH and not site.settings and not site.stream
        # A row of each of queries, keys and values, and a column of the output, for each head.
        spans = {(s.tensor, s.dim): 0 for s in site.slots}
        for slot in site.slots:
            assert slot.start % WIDTH == 0 and slot.block == 1
            spans[slot.tensor, slot.dim] += WIDTH
        expected = {(under(path, "out_proj.weight"), 1): EMBED}
        for part, size in [("in_proj_weight", 3), ("in_proj_bias", 3)]:
            if getattr(attending, part) is not None:
                expected[under(path, part), 0] = size * EMBED
        for part in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if getattr(attending, part) is not None:
                expected[under(path, part), 0] = EMBED
        for part in ("bias_k", "bias_v"):
            if getattr(attending, part) is not None:
                expected[under(path, part), 2] = EMBED
        assert spans == expected
    others = [site for site in sites if not site.contracted]
    assert {site.width for site in others} <= {16}  # the layers' hidden width


@pytest.mark.parametrize("name", NETWORKS)
def test_encrypt_and_decrypt_are_exact(name: str) -> None:
    model = made(name)
    example, before = given(model), copy.deepcopy(model.state_dict())
    expected = run(model, example)
    encrypted, key = encrypt(model, example, DEFENSE, seed=0)
    decrypted = decrypt(encrypted, key)
    for path in NETWORKS[name][1]:
        assert type(encrypted.get_submodule(path)) is WideAttention
        for network in (model, decrypted):
            assert type(network.get_submodule(path)) is nn.MultiheadAttention
    for network in (model, decrypted):
        state = network.state_dict()
        assert state.keys() == before.keys()
        assert all(torch.equal(state[n], x) for n, x in before.items())
        assert all(torch.equal(a, b) for a, b in zip(run(network, example), expected, strict=True))
    assert not torch.allclose(run(encrypted, example)[0], expected[0], atol=1e-3)


def quieten(encrypted: nn.Module, key: Key, path: str, real: bool) -> None:
    """Zero one head site's confusion entries, or its real ones, as a reader of the paper would."""
    site = next(s for s in key.sites if s.contracted and s.slots[0].tensor.startswith(under(path, "")))
    positions = set(key.positions[site.name])
    width = WIDTH + len(positions)
    attending = encrypted.get_submodule(path)
    chosen = [c for c in range(width) if (c in positions) is not real]
    with torch.no_grad():
        for part, tensor in attending.named_parameters():
            if part == "out_proj.bias":
                continue
            dim = {"out_proj.weight": 1, "bias_k": 2, "bias_v": 2}.get(part, 0)
            heads = tensor.movedim(dim, 0).unflatten(0, (-1, width))
            heads[:, chosen] = 0


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_of_zeros_are_neutral(name: str) -> None:
    model = made(name)
    example = given(model)
    sites = [site for site in find_sites(model, example) if site.contracted]
    encrypted, key = encrypt(model, example, DEFENSE, seed=0, sites=sites)
    assert all(key.positions[site.name] for site in sites)
    wrong = copy.deepcopy(encrypted)
    for path in NETWORKS[name][1]:
        quieten(encrypted, key, path, real=False)
        quieten(wrong, key, path, real=True)
    for ours, theirs in zip(run(encrypted, example), run(model, example), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(run(wrong, example)[0], run(model, example)[0], atol=1e-3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_with_padding_runs_when_it_is_widened() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(EMBED, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    row = torch.randn(BATCH, QUERIES, EMBED)
    padding = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    padding[0, 3:] = True
    encrypted, key = encrypt(model, row, DEFENSE, seed=0)
    assert sum(site.contracted for site in key.sites) == 2
    with torch.no_grad():
        got = encrypted(row, src_key_padding_mask=padding)
        assert got.shape == row.shape and bool(torch.isfinite(got).all())
        again = decrypt(encrypted, key)(row, src_key_padding_mask=padding)
        assert torch.equal(again, model(row, src_key_padding_mask=padding))
