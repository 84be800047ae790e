"""Attention heads of the libraries' transformers are sites, with the attributes that follow their width."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from deepenc.encryption.defense import Defense
from deepenc.encryption.encrypt import decrypt, encrypt
from deepenc.errors import TraceError
from deepenc.network.calling import call, to_device
from deepenc.network.find import analyse, find_sites
from deepenc.network.sites import Role
from deepenc.network.structure import named_tensors
from deepenc.network.tracing.admit import tensors_in

DEFENSE = Defense.model_validate(
    {"name": "test", "placement": {"name": "proportional", "proportion": 0.3}, "weights": "samp"}
)
GENERATOR = torch.Generator().manual_seed(0)
WORDS, LONGER = (torch.randint(0, 50, size, generator=GENERATOR) for size in ((2, 6), (1, 9)))
IMAGE = torch.randn(2, 3, 32, 32, generator=GENERATOR)
HEAD, HIDDEN = True, False

BERT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
}
# Four heads of 32 / 4 = 8 channels ask, two answer; a rotary embedding turns channel c with channel c + 4.
ROTARY = BERT | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Case:
    """A network and what a reader of its configuration expects.

    Attributes:
        build: Makes it.
        example: Its example input.
        sites: Width of each site in the order of the layers, and whether it is a head's.
        settings: What each head site's modules keep of its width, in the order of the sites.
    """

    build: Callable[[], nn.Module]
    example: Any
    sites: list[tuple[int, bool]]
    settings: list[list[tuple[str, str, int | bool, int]]]


def of(name: str, **options: Any) -> nn.Module:
    """A transformers network of random weights, by its class."""
    kind: Any = getattr(transformers, name)
    made: nn.Module = kind(kind.config_class(**options))
    return made


def each(
    paths: list[str], *kept: tuple[str, int | bool, int]
) -> list[list[tuple[str, str, int | bool, int]]]:
    return [[(path, *setting) for setting in kept] for path in paths]


def layers(path: str) -> list[str]:
    return [path.format(number) for number in range(2)]


def rotary(name: str) -> Case:
    # One table of frequencies for all layers: the pairs of channels of all heads are one site.
    kept = [(path, "head_dim", 8, 2) for path in layers("model.layers.{}.self_attn")]
    return Case(partial(of, name, **ROTARY), WORDS, [(4, HEAD), (20, HIDDEN), (20, HIDDEN)], [kept])


# In each of two layers the heads of an attention and the hidden width of an MLP. A head has 16 / 2 = 8
# channels unless something else is said.
LAYER = [(8, HEAD), (20, HIDDEN)]
CASES = {
    "bert": Case(
        partial(of, "BertModel", **BERT),
        WORDS,
        2 * LAYER,
        each(layers("encoder.layer.{}.attention.self"), ("attention_head_size", 8, 1)),
    ),
    "roberta": Case(
        partial(of, "RobertaModel", **BERT),
        WORDS,
        2 * LAYER,
        each(layers("encoder.layer.{}.attention.self"), ("attention_head_size", 8, 1)),
    ),
    "distilbert": Case(
        partial(of, "DistilBertModel", vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=20),
        WORDS,
        2 * LAYER,
        each(layers("transformer.layer.{}.attention"), ("attention_head_size", 8, 1)),
    ),
    # One layer makes queries, keys and values, which are then split: split_size is two heads' width.
    "gpt2": Case(
        partial(
            of, "GPT2LMHeadModel", vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, n_inner=24
        ),
        WORDS,
        2 * [(8, HEAD), (24, HIDDEN)],
        each(layers("transformer.h.{}.attn"), ("head_dim", 8, 1), ("split_size", 16, 2)),
    ),
    "llama": rotary("LlamaForCausalLM"),
    "mistral": rotary("MistralForCausalLM"),
    "qwen2": rotary("Qwen2ForCausalLM"),
    "vit of transformers": Case(
        partial(of, "ViTForImageClassification", **BERT, image_size=32, patch_size=16),
        IMAGE,
        2 * LAYER,
        each(layers("vit.layers.{}.attention"), ("head_dim", 8, 1)),
    ),
    # Three heads of 24 / 3 = 8 channels; torch's fused attention scales by the width that it is given.
    "vit of timm": Case(
        partial(timm.create_model, "vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=3),
        IMAGE,
        2 * [(8, HEAD), (96, HIDDEN)],
        each(layers("blocks.{}.attn"), ("head_dim", 8, 1), ("attn_dim", 24, 3), ("fused_attn", True, 0)),
    ),
    # The decoder's layers have an attention to the encoder's output besides; d_kv is the heads' width.
    "t5": Case(
        partial(of, "T5Model", vocab_size=50, d_model=16, d_kv=6, d_ff=20, num_layers=2, num_heads=2),
        {"input_ids": WORDS, "decoder_input_ids": WORDS[:, :4]},
        2 * [(6, HEAD), (20, HIDDEN)] + 2 * [(6, HEAD), (6, HEAD), (20, HIDDEN)],
        each(
            [
                *layers("encoder.block.{}.layer.0.SelfAttention"),
                *(
                    f"decoder.block.{number}.layer.{part}"
                    for number in range(2)
                    for part in ("0.SelfAttention", "1.EncDecAttention")
                ),
            ],
            ("key_value_proj_dim", 6, 1),
        ),
    ),
    "bart": Case(
        partial(
            of,
            "BartModel",
            **{"vocab_size": 50, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2},
            **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
            **{"encoder_ffn_dim": 20, "decoder_ffn_dim": 24, "max_position_embeddings": 16},
        ),
        {"input_ids": WORDS, "decoder_input_ids": WORDS[:, :4]},
        2 * LAYER + 2 * [(8, HEAD), (8, HEAD), (24, HIDDEN)],
        each(
            [
                *layers("encoder.layers.{}.self_attn"),
                *(f"decoder.layers.{n}.{kind}_attn" for n in range(2) for kind in ("self", "encoder")),
            ],
            ("head_dim", 8, 1),
        ),
    ),
}
# It looks at values: whether the longest position is inside its table.
NOT_ON_META = {"bart": "Tensor.item"}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = CASES[name].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no two channels alike, and no bias of zero
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def run(model: nn.Module, example: Any) -> list[Tensor]:
    with torch.no_grad():
        return tensors_in(call(model, example))


def attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    """All plain attributes of all modules."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float | str | tuple | type | None)
    } | {(path, ""): type(module) for path, module in model.named_modules()}


@pytest.mark.parametrize("name", CASES)
def test_sites_are_those_that_a_reader_counts(name: str) -> None:
    case = CASES[name]
    sites = find_sites(made(name), case.example)
    assert [(site.width, site.contracted) for site in sites] == case.sites
    assert not any(site.stream for site in sites)
    heads = [site for site in sites if site.contracted]
    assert [sorted((s.module, s.name, s.victim, s.step) for s in site.settings) for site in heads] == [
        sorted(settings) for settings in case.settings
    ]
    assert not any(site.settings for site in sites if not site.contracted)


@pytest.mark.parametrize("name", CASES)
def test_the_meta_device_has_the_same_sites(name: str) -> None:
    case, model = CASES[name], made(name)
    example = to_device(case.example, "meta")
    bare = copy.deepcopy(model).to("meta")
    if name in NOT_ON_META:
        with pytest.raises(TraceError, match=NOT_ON_META[name]):
            find_sites(bare, example)
    else:
        assert find_sites(bare, example) == find_sites(model, case.example)


@pytest.mark.parametrize("name", CASES)
def test_encrypt_and_decrypt_are_exact(name: str) -> None:
    case, model = CASES[name], made(name)
    before, kept = {n: x.clone() for n, x in named_tensors(model).items()}, attributes(model)
    expected = run(model, case.example)
    encrypted, key = encrypt(model, case.example, DEFENSE, seed=0)
    decrypted = decrypt(encrypted, key)
    for site in key.sites:
        count = len(key.positions[site.name])
        assert count > 0
        for setting in site.settings:
            value = getattr(encrypted.get_submodule(setting.module), setting.name)
            flag = isinstance(setting.victim, bool)
            assert value == (not setting.victim if flag else setting.victim + setting.step * count)
    for network in (model, decrypted):
        tensors = named_tensors(network)
        assert tensors.keys() == before.keys()
        assert all(torch.equal(tensors[n], x) and tensors[n].dtype == x.dtype for n, x in before.items())
        assert attributes(network) == kept
        assert all(torch.equal(a, b) for a, b in zip(run(network, case.example), expected, strict=True))
    got = run(encrypted, case.example)[0]
    assert got.shape == expected[0].shape and not torch.allclose(got, expected[0], atol=1e-2)
    if case.example is WORDS:  # and not on the example alone
        assert all(torch.equal(a, b) for a, b in zip(run(decrypted, LONGER), run(model, LONGER), strict=True))
        assert run(encrypted, LONGER)[0].shape == run(model, LONGER)[0].shape


@pytest.mark.parametrize("name", CASES)
def test_channels_of_zeros_are_neutral(name: str) -> None:
    """Independent of the proof: no slot's role counts, all confusion entries of heads are zero."""
    case, model = CASES[name], made(name)
    sites = [site for site in find_sites(model, case.example) if site.contracted]
    encrypted, key = encrypt(model, case.example, DEFENSE, seed=0, sites=sites)
    tensors, layout = named_tensors(encrypted), key.layout()
    for site in key.sites:
        for slot in site.slots:
            tensors[slot.tensor].detach().index_fill_(slot.dim, layout.confusion_entries(site, slot), 0)
    for ours, theirs in zip(run(encrypted, case.example), run(model, case.example), strict=True):
        if ours.shape == theirs.shape:  # a cache of keys is wider
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_frequencies_of_a_rotary_embedding_are_a_slot_that_no_state_dict_has() -> None:
    model = made("llama")
    site = find_sites(model, WORDS)[0]
    missing = [slot for slot in site.slots if not slot.persistent]
    assert [(slot.tensor, slot.dim, slot.start) for slot in missing] == [("model.rotary_emb.inv_freq", 0, 0)]
    state = model.state_dict()
    assert "model.rotary_emb.inv_freq" in named_tensors(model).keys() - state.keys()
    assert all(slot.tensor in state for slot in site.slots if slot.persistent)
    # Halves of 4 query heads and of 2 key and value heads, and the output's columns, in 2 layers.
    assert len(site.slots) == 1 + 2 * 2 * (4 + 2 + 2 + 4)
    encrypted, key = encrypt(model, WORDS, DEFENSE, seed=0)
    count = len(key.positions[site.name])
    assert named_tensors(encrypted)["model.rotary_emb.inv_freq"].shape == (4 + count,)
    assert encrypted.get_submodule("model.layers.0.self_attn").head_dim == 8 + 2 * count


def test_tied_embeddings_stay_tied() -> None:
    model: Any = made("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    encrypted, key = encrypt(model, WORDS, DEFENSE, seed=0)
    for network in (encrypted, decrypt(encrypted, key)):
        assert network.lm_head.weight is network.transformer.wte.weight


class Attention(nn.Module):
    """An attention written by hand; what makes it different is given."""

    def __init__(self, attend: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.heads, self.scale, self.attend = 2, 4**-0.5, attend
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        made: Tensor = self.last(self.out(self.attend(self, *parts).transpose(1, 2).flatten(2)).relu())
        return made


def weighed(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v


ROWS = torch.randn(2, 5, 8, generator=GENERATOR)
BY_ITS_WIDTH: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "scores by a factor": lambda m, q, k, v: weighed(q @ k.mT * q.shape[-1] ** -0.5, v),
    "scores by a divisor": lambda m, q, k, v: weighed(q @ k.mT / k.shape[-1] ** 0.5, v),
    "queries": lambda m, q, k, v: weighed(q * q.shape[-1] ** -0.5 @ k.mT, v),
    "in place": lambda m, q, k, v: weighed((q @ k.mT).mul_(q.shape[-1] ** -0.5), v),
    "torch's": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v),
}
BY_A_CONSTANT: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "scores": lambda m, q, k, v: weighed(q @ k.mT * m.scale, v),
    "queries": lambda m, q, k, v: weighed(q * m.scale @ k.mT, v),
    "torch's": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=m.scale),
    "not at all": lambda m, q, k, v: weighed(q @ k.mT, v),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", BY_ITS_WIDTH)
def test_an_attention_that_scales_by_its_own_width_is_refused(name: str, device: str) -> None:
    torch.manual_seed(0)
    found = analyse(Attention(BY_ITS_WIDTH[name]).to(device), ROWS.to(device))
    assert [(site.name, site.width) for site in found.sites] == [("out", 8)]
    reasons = {left.layer: left.reason for left in found.left_out}
    for layer in ("q.weight", "k.weight", "v.weight"):
        assert "scales it by its own width" in reasons[layer]
        assert "no number that the network keeps mends it" in reasons[layer]


def scaled_sums(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flat = [x.reshape(-1, *x.shape[-2:]) for x in (q, k)]
    scores = torch.baddbmm(q.new_zeros(1, 1, 1), flat[0], flat[1].mT, alpha=q.shape[-1] ** -0.5)
    return weighed(scores.reshape(*q.shape[:-1], -1), v)


# The factor is no number in the place where one is expected.
BY_A_TENSOR: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "a tensor": lambda m, q, k, v: weighed(q @ k.mT / torch.tensor(float(q.shape[-1])).sqrt(), v),
    "a filled tensor": lambda m, q, k, v: weighed(q @ k.mT / torch.full([], q.shape[-1] ** 0.5).to(q), v),
    "one on the device": lambda m, q, k, v: weighed(q @ k.mT / q.new_full([], q.shape[-1] ** 0.5), v),
    "the factor of a sum": scaled_sums,
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", BY_A_TENSOR)
def test_a_scale_that_is_hidden_in_a_tensor_is_refused_too(name: str, device: str) -> None:
    torch.manual_seed(0)
    found = analyse(Attention(BY_A_TENSOR[name]).to(device), ROWS.to(device))
    assert [(site.name, site.width) for site in found.sites] == [("out", 8)]
    assert "a probe insertion failed" in {left.layer: left.reason for left in found.left_out}["q.weight"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", BY_A_CONSTANT)
def test_an_attention_that_keeps_its_scale_is_widened(name: str, device: str) -> None:
    torch.manual_seed(0)
    model = Attention(BY_A_CONSTANT[name])
    sites = find_sites(copy.deepcopy(model).to(device), ROWS.to(device))
    assert [(site.name, site.width, site.contracted) for site in sites] == [("q", 4, True), ("out", 8, False)]
    roles = {(slot.tensor, slot.start): slot.role for slot in sites[0].slots}
    assert roles == {
        **{(f"{layer}.weight", start): Role.INCOMING for layer in "qkv" for start in (0, 4)},
        **{(f"{layer}.bias", start): Role.BIAS for layer in "qkv" for start in (0, 4)},
        **{("out.weight", start): Role.OUTGOING for start in (0, 4)},
    }
    encrypted, key = encrypt(model, ROWS, DEFENSE, seed=0, sites=sites)
    assert torch.equal(run(decrypt(encrypted, key), ROWS)[0], run(model, ROWS)[0])
    assert not torch.allclose(run(encrypted, ROWS)[0], run(model, ROWS)[0], atol=1e-3)
