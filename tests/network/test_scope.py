"""Sites inside a submodule of networks that cannot be followed as a whole, and residual streams."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import (
    fasterrcnn_resnet50_fpn,
    fcos_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    retinanet_resnet50_fpn,
    ssd300_vgg16,
    ssdlite320_mobilenet_v3_large,
)
from torchvision.models.segmentation import deeplabv3_resnet50, fcn_resnet50
from torchvision.ops import FrozenBatchNorm2d

from deepenc.encryption.defense import Defense
from deepenc.encryption.encrypt import decrypt, encrypt
from deepenc.errors import TraceError
from deepenc.network.calling import call
from deepenc.network.find import analyse, find_sites
from deepenc.network.sites import Role, Site
from deepenc.network.tracing.admit import tensors_in

DEFENSE = Defense.model_validate(
    {"name": "test", "placement": {"name": "proportional", "proportion": 0.3}, "weights": "samp"}
)
GENERATOR = torch.Generator().manual_seed(0)
PICTURE = torch.rand(3, 64, 64, generator=GENERATOR)
NONE: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 3}
# Every box counts, few are looked at.
SMALL = NONE | {"min_size": 64, "max_size": 64}
BOXES = {"box_score_thresh": 0.0, "rpn_pre_nms_top_n_test": 20, "rpn_post_nms_top_n_test": 10}
POINTS = {"score_thresh": 0.0, "topk_candidates": 10}

# The stem, and two convolutions in each of 3, 4, 6 and 3 bottlenecks; the third makes the stream.
RESNET50 = Counter({64: 1 + 2 * 3, 128: 2 * 4, 256: 2 * 6, 512: 2 * 3})
# vgg16 without the convolution whose map is used for detection (conv4_3): 2, 2, 3, 2 and 3; fc6, while fc7 is
# used for detection; and the first of two convolutions of 4 extra blocks.
VGG16 = Counter({64: 2, 128: 2 + 3, 256: 3 + 1, 512: 2 + 3, 1024: 1})
# Expansions of 15 blocks but the first, which has none, and the 13th, used for detection; the squeezes of 8;
# the expansions of 4 extra blocks. ssdlite halves the last three blocks; a squeeze is about a quarter.
MOBILENET = Counter([64, 72, 72, 120, 120, 240, 200, 184, 184, 480, 672, 480, 480])
MOBILENET += Counter([24, 32, 32, 120, 168, 168, 120, 120]) + Counter([256, 128, 128, 64])


NORMS = {
    "weight": Role.SCALE,
    "bias": Role.SHIFT,
    "running_mean": Role.MEAN,
    "running_var": Role.VARIANCE,
}


@dataclass(frozen=True)
class Case:
    """A detector or a segmenter, where to look, and the widths that a reader finds there."""

    build: Callable[[], nn.Module]
    scope: str
    widths: Counter[int]
    example: Any = ([PICTURE],)


CASES = {
    "faster r-cnn": Case(partial(fasterrcnn_resnet50_fpn, **SMALL, **BOXES), "backbone.body", RESNET50),
    "ssdlite": Case(partial(ssdlite320_mobilenet_v3_large, **NONE, **POINTS), "backbone", MOBILENET),
    "fcos": Case(partial(fcos_resnet50_fpn, **SMALL, **POINTS), "backbone.body", RESNET50),
    "deeplab": Case(partial(deeplabv3_resnet50, **NONE), "backbone", RESNET50, PICTURE[None]),
}
LONG = {
    "mask r-cnn": Case(partial(maskrcnn_resnet50_fpn, **SMALL, **BOXES), "backbone.body", RESNET50),
    "retinanet": Case(partial(retinanet_resnet50_fpn, **SMALL, **POINTS), "backbone.body", RESNET50),
    "ssd300": Case(partial(ssd300_vgg16, **NONE, **POINTS), "backbone", VGG16),
    "fcn": Case(partial(fcn_resnet50, **NONE), "backbone", RESNET50, PICTURE[None]),
}


def run(model: nn.Module, example: Any) -> list[Tensor]:
    with torch.no_grad():
        return tensors_in(call(model, example))


def shaken(model: nn.Module) -> nn.Module:
    """In eval mode, and its normalisations do something."""
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.add_(torch.randn(module.running_mean.shape, generator=GENERATOR) * 0.1)
            module.running_var.add_(torch.rand(module.running_var.shape, generator=GENERATOR) * 0.2)
    return model.eval()


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def exact(model: nn.Module, example: Any, sites: list[Site], **where: Any) -> None:
    """Encrypt and decrypt the whole network, and see what is the victim's and what is not."""
    before, expected = copy.deepcopy(model.state_dict()), run(model, example)
    assert all(x.numel() > 0 and bool(torch.isfinite(x).all()) for x in expected)
    encrypted, key = encrypt(model, example, DEFENSE, seed=0, **where)
    assert key.sites == tuple(sites) and all(key.positions[site.name] for site in sites)
    decrypted = decrypt(encrypted, key)
    for network in (model, decrypted):
        state = network.state_dict()
        assert list(state) == list(before)
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
        assert same(run(network, example), expected)
    assert not same(run(encrypted, example), expected)
    changed = {n for n, x in encrypted.state_dict().items() if x.shape != before[n].shape}
    assert changed == {slot.tensor for site in sites for slot in site.slots}


def scoped(case: Case) -> None:
    torch.manual_seed(0)
    model = shaken(case.build())
    found = analyse(model, case.example, scope=case.scope)
    sites = list(found.sites)
    assert Counter(site.width for site in sites) == case.widths
    inside = f"{case.scope}."
    assert all(site.name.startswith(inside) for site in sites)
    roles = {slot.tensor: slot.role for site in sites for slot in site.slots}
    assert all(tensor.startswith(inside) for tensor in roles)
    assert all(left.layer.startswith(inside) for left in found.left_out)
    norms = {n for n, m in model.named_modules() if isinstance(m, FrozenBatchNorm2d | nn.BatchNorm2d)}
    widened = {tensor.rpartition(".")[0] for tensor in roles} & norms
    assert bool(widened) is bool(norms)
    for path in widened:
        for name, role in NORMS.items():
            assert roles[f"{path}.{name}"] is role
    exact(model, case.example, sites, scope=case.scope)


@pytest.mark.parametrize("name", CASES)
def test_the_backbone_of_a_whole(name: str) -> None:
    scoped(CASES[name])


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_the_backbone_of_another_whole(name: str) -> None:
    scoped(LONG[name])


class Whole(nn.Module):
    """Looks at values, and so cannot be followed; its body can."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
        self.spare = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(input=x)
        chosen = torch.stack([row for row in x if float(row.sum()) > -100])
        made: Tensor = self.head(chosen)
        return made


ROWS = torch.randn(8, 3, generator=GENERATOR)


def test_a_scope_is_followed_on_its_own() -> None:
    torch.manual_seed(0)
    model = Whole().eval()
    alone = find_sites(model.body, ROWS)
    sites = find_sites(model, ROWS, scope="body")
    assert [(site.name, site.width) for site in sites] == [("body.0", 6)]
    assert [f"body.{slot.tensor}" for slot in alone[0].slots] == [slot.tensor for slot in sites[0].slots]
    left = {item.layer: item.reason for item in analyse(model, ROWS, scope="body").left_out}
    assert left == {"body.3.weight": "it is an output of the network"}
    exact(model, ROWS, sites, scope="body")


def test_finding_sites_in_a_scope_changes_nothing() -> None:
    model = Whole().train()
    before, hooks = copy.deepcopy(model.state_dict()), len(model.body._forward_pre_hooks)
    find_sites(model, ROWS, scope="body")
    assert all(torch.equal(model.state_dict()[n], x) for n, x in before.items())
    assert all(module.training for module in model.modules())
    assert len(model.body._forward_pre_hooks) == hooks


def test_settings_are_named_from_the_whole() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 20}
            config = transformers.BertConfig(**options, num_attention_heads=2, max_position_embeddings=8)
            self.text = nn.ModuleDict({"encoder": transformers.BertModel(config)})
            self.head = nn.Linear(16, 2)

        def forward(self, words: Tensor) -> Tensor:
            made: Tensor = self.head(self.text["encoder"](words).last_hidden_state[:, 0])
            return made

    torch.manual_seed(0)
    model, words = Reader().eval(), torch.randint(0, 20, (2, 5), generator=GENERATOR)
    sites = find_sites(model, words, scope="text.encoder")
    modules = [setting.module for site in sites for setting in site.settings]
    assert modules == ["text.encoder.encoder.layer.0.attention.self"]
    exact(model, words, sites, scope="text.encoder")


def test_a_scope_that_is_misspelt_is_refused_with_near_names() -> None:
    with pytest.raises(TraceError, match=r"Whole has no submodule 'boddy'.*body"):
        find_sites(Whole(), ROWS, scope="boddy")
    with pytest.raises(TraceError, match=r"has no submodule 'nothing\.like\.it'"):
        encrypt(Whole(), ROWS, DEFENSE, seed=0, scope="nothing.like.it")


def test_a_scope_that_is_not_called_is_refused() -> None:
    with pytest.raises(TraceError, match="Whole does not call 'spare' on the example; give another scope"):
        find_sites(Whole(), ROWS, scope="spare")


def test_an_example_that_does_not_fit_is_refused_in_a_scope_too() -> None:
    with pytest.raises(TraceError, match="does not run on the example"):
        find_sites(Whole(), torch.randn(8, 5), scope="body")


def test_a_frozen_normalisation_has_the_roles_of_one_that_is_not() -> None:
    """It computes with its tensors instead of calling an operator; detectors with weights have it."""
    torch.manual_seed(0)
    model = shaken(resnet18(num_classes=5, norm_layer=FrozenBatchNorm2d))
    image = torch.randn(2, 3, 32, 32, generator=GENERATOR)
    sites = find_sites(model, image)
    for site in sites:
        path = site.name.replace("conv", "bn")
        roles = {slot.tensor: slot.role for slot in site.slots if slot.tensor.startswith(path)}
        assert roles == {f"{path}.{name}": role for name, role in NORMS.items()}
    assert len(sites) == 8
    exact(model, image, sites)


def test_streams_of_a_residual_network() -> None:
    torch.manual_seed(0)
    model, image = shaken(resnet18(num_classes=5)), torch.randn(2, 3, 32, 32, generator=GENERATOR)
    sites = find_sites(model, image, streams=True)
    # A slot for each convolution that makes the stream or reads it, four more for each normalisation.
    assert {site.name: (site.width, len(site.slots)) for site in sites if site.stream} == {
        "conv1": (64, 3 * (1 + 4) + 2 + 2),  # the stem and two blocks; the next stage reads it twice
        "layer2.0.conv2": (128, 3 * (1 + 4) + 1 + 2),  # two blocks and a downsampling
        "layer3.0.conv2": (256, 3 * (1 + 4) + 1 + 2),
        "layer4.0.conv2": (512, 3 * (1 + 4) + 1 + 1),  # read by the classifier
    }
    inner = [site for site in sites if not site.stream]
    assert inner == find_sites(model, image) and len(inner) == 8
    reasons = Counter(left.reason for left in analyse(model, image).left_out)
    # The stem, the last convolution of 8 blocks and 3 downsamplings; and the classifier.
    assert reasons == {
        "it belongs to a residual stream (pass streams=True)": 12,
        "it is an output of the network": 1,
    }
    exact(model, image, sites, streams=True)


def test_a_stream_that_is_normalised_over_is_left_out() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model, x = nn.Sequential(nn.Linear(5, 12), encoder, nn.Linear(12, 2)).eval(), torch.randn(2, 4, 5)
    found = analyse(model, x, streams=True)
    assert [site.width for site in found.sites] == [4, 16, 4, 16] and not any(s.stream for s in found.sites)
    reasons = {left.layer: left.reason for left in found.left_out}
    makers = [f"1.layers.{n}.{part}" for n in range(2) for part in ("self_attn.out_proj", "linear2")]
    assert {reasons[f"{maker}.weight"] for maker in ["0", *makers]} == {"1.layers.0.norm1 normalises over it"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GPT2LMHeadModel", {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}),
        (
            "LlamaForCausalLM",
            {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2},
        ),
    ],
)
def test_additions_inside_heads_are_no_streams(name: str, options: dict[str, int]) -> None:
    """A rotary embedding adds turned channels; a language model's streams are normalised over."""
    kind: Any = getattr(transformers, name)
    model = kind(kind.config_class(vocab_size=30, **options)).eval()
    words = torch.randint(0, 30, (2, 5), generator=GENERATOR)
    sites = find_sites(model, words, streams=True)
    assert not any(site.stream for site in sites) and any(site.contracted for site in sites)
    assert sites == find_sites(model, words)
