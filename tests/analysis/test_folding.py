"""Folded networks compute what they did; what cannot be folded stays, and is named."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.nn.utils.parametrizations import weight_norm
from torchvision import models

import deepenc
from deepenc.analysis.folding import absorb, fold, folding
from deepenc.errors import TraceError
from deepenc.victims.models import CifarResNet


def randomised(model: nn.Module) -> nn.Module:
    """In float64 and eval mode, all of BatchNorm's entries far from a layer's defaults."""
    generator = torch.Generator().manual_seed(1)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            for tensor, low in ((norm.weight, 0.5), (norm.bias, -0.5), (norm.running_mean, -0.5)):
                if tensor is not None:
                    nn.init.uniform_(tensor, low, low + 1, generator=generator)
            if norm.running_var is not None:
                nn.init.uniform_(norm.running_var, 0.5, 2, generator=generator)
    return model.double().eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def outputs(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(inputs)


def norms_of(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, _BatchNorm)}


def of_torchvision(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(models, name)(weights=None)
    if name.startswith("vgg"):
        model.classifier = nn.Linear(512 * 49, 10)  # their own is most of a gigabyte
    return model


CIFAR = {"bn1": "conv1"} | {
    f"layer{stage}.{block}.bn{n}": f"layer{stage}.{block}.conv{n}"
    for stage in (1, 2, 3)
    for block in (0, 1, 2)
    for n in (1, 2)
}


def test_the_cifar_resnet_is_folded_whole() -> None:
    torch.manual_seed(0)
    model, inputs = randomised(CifarResNet(20)), noise(4, 3, 32, 32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = folding(model, inputs[:1])
    assert made.folded == CIFAR and not made.left
    expected = outputs(model, inputs)
    assert torch.allclose(outputs(made.network, inputs), expected, rtol=0, atol=1e-13 * expected.abs().max())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    own = made.network.state_dict()
    layers = {*CIFAR.values(), "linear"}
    assert set(own) == {f"{layer}.{name}" for layer in layers for name in ("weight", "bias")}
    shared = {t.data_ptr() for t in own.values()} & {t.data_ptr() for t in model.state_dict().values()}
    assert not shared


@pytest.mark.parametrize(("name", "folded"), [("resnet18", 20), ("mobilenet_v2", 52), ("vgg11_bn", 8)])
def test_networks_of_torchvision_are_folded_whole(name: str, folded: int) -> None:
    model, inputs = randomised(of_torchvision(name)), noise(2, 3, 64, 64)
    made = folding(model, inputs)
    assert (len(made.folded), made.left, norms_of(made.network)) == (folded, {}, set())
    expected = outputs(model, inputs)
    assert torch.allclose(outputs(made.network, inputs), expected, rtol=0, atol=1e-13 * expected.abs().max())


def test_of_a_densenet_the_norms_before_convolutions_stay() -> None:
    model, inputs = randomised(of_torchvision("densenet121")), noise(1, 3, 64, 64)
    made = folding(model, inputs)
    before = {p for p in norms_of(model) if p.endswith((".norm1", ".norm", ".norm5"))}
    assert norms_of(made.network) == set(made.left) == before
    assert len(before) == 58 + 3 + 1 and len(made.folded) == 58 + 1  # two a layer, one a transition, two ends
    assert set(made.left.values()) == {"no convolution or linear layer comes directly before it"}
    expected = outputs(model, inputs)
    assert torch.allclose(outputs(made.network, inputs), expected, rtol=0, atol=1e-13 * expected.abs().max())


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (3, 4, 9)),
        (nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), (3, 4, 9, 9)),
        (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False), (3, 4, 9, 9)),
        (
            nn.Conv2d(4, 8, 3, groups=4, padding="same", padding_mode="reflect"),
            nn.BatchNorm2d(8),
            (3, 4, 9, 9),
        ),
        (nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6), (3, 4, 5, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), (3, 4, 5, 5)),
        (nn.Linear(4, 6), nn.BatchNorm1d(6), (3, 4)),
        (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), (3, 4)),
    ],
    ids=str,
)
def test_a_layer_is_folded_as_torch_does_it(
    layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]
) -> None:
    model, inputs = randomised(nn.Sequential(layer, norm)), noise(*shape)
    fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
    more = {"transpose": True} if isinstance(layer, nn.ConvTranspose2d) else {}
    expected = fuse(model[0], model[1], **more).state_dict()
    made = folding(model, inputs)
    assert made.folded == {"1": "0"} and isinstance(made.network[1], nn.Identity)
    own = made.network[0].state_dict()
    assert all(torch.allclose(own[name], expected[name], rtol=1e-14) for name in expected)
    assert torch.allclose(outputs(made.network, inputs), outputs(model, inputs), rtol=1e-12)


def test_a_transposed_convolution_of_groups() -> None:  # which torch's own function gets wrong
    model = randomised(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)))
    inputs = noise(3, 4, 5, 5)
    assert torch.allclose(outputs(fold(model, inputs), inputs), outputs(model, inputs), rtol=1e-12)


def test_numbers_are_rounded_once() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))).float()
    own = fold(model, noise(1, 4, 5, 5).float())[0].state_dict()
    expected = fuse_conv_bn_eval(*copy.deepcopy(model).double()).state_dict()
    assert all(torch.equal(own[name], expected[name].float()) for name in expected)


class Pair(nn.Module):
    """A convolution and a BatchNorm, and how they are used."""

    def __init__(self, use: Any, conv: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1) if conv is None else conv
        self.norm = nn.BatchNorm2d(4) if norm is None else norm
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def in_order(pair: Any, x: Tensor) -> Tensor:
    return pair.norm(pair.conv(x))


def residual(pair: Any, x: Tensor) -> Tensor:
    made = pair.conv(x)
    return pair.norm(made) + made


def changed_in_place(pair: Any, x: Tensor) -> Tensor:
    return pair.norm(pair.conv(x).mul_(2))


def returned(pair: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    made = pair.conv(x)
    return pair.norm(made), made


class Standardised(nn.Conv2d):
    """Its weight is normalised at every call: what is multiplied into it is lost."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.flatten(1).norm(dim=1)[:, None, None, None]
        return F.conv2d(x, weight, self.bias, padding=1)


class Doubled(nn.Conv2d):
    """Adds its bias twice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias[:, None, None]


class Active(nn.BatchNorm2d):
    """With a non-linearity of its own."""

    def __init__(self, inplace: bool) -> None:
        super().__init__(4)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x), inplace=self.inplace)


def hooked() -> nn.Module:
    conv = nn.Conv2d(4, 4, 3)
    conv.register_forward_hook(lambda *_: None)
    return conv


def tied() -> nn.Module:
    model = Pair(lambda m, x: m.norm(m.conv(x)))
    model.other = nn.Conv2d(4, 4, 3, padding=1)
    model.other.weight = model.conv.weight
    model.use = lambda m, x: m.norm(m.conv(x)) + m.other(x)
    return model


def listed_twice() -> nn.Module:
    model = Pair(in_order)
    model.again = model.norm
    return model


BEFORE = "no convolution or linear layer comes directly before it"
LEFT = {
    "used twice": (Pair(lambda m, x: m.norm(m.conv(x)) + m.conv(2 * x)), "conv runs 2 times"),
    "norm used twice": (Pair(lambda m, x: m.norm(m.norm(m.conv(x)))), "it runs 2 times"),
    "used elsewhere": (Pair(residual), "the output of conv is used elsewhere, too"),
    "returned": (Pair(returned), "the output of conv is used elsewhere, too"),
    "changed in place": (Pair(changed_in_place), "the output of conv is used elsewhere, too"),
    "changed between": (Pair(lambda m, x: m.norm(m.conv(x).relu())), BEFORE),
    "norm first": (Pair(lambda m, x: m.conv(m.norm(x))), BEFORE),
    "sum of two": (Pair(lambda m, x: m.norm(m.conv(x) + x)), BEFORE),
    "batch statistics": (
        Pair(in_order, norm=nn.BatchNorm2d(4, track_running_stats=False)),
        "it normalises by the batch, without running statistics",
    ),
    "not run": (Pair(lambda m, x: m.conv(x)), "it does not run on the example"),
    "standardised": (
        Pair(in_order, Standardised(4, 4, 3)),
        "conv does more than to multiply by its weight and to add its bias",
    ),
    "doubled": (
        Pair(in_order, Doubled(4, 4, 3)),
        "conv does more than to multiply by its weight and to add its bias",
    ),
    "weight norm": (
        Pair(in_order, weight_norm(nn.Conv2d(4, 4, 3))),
        "conv does more than to multiply by its weight and to add its bias",
    ),
    "active": (Pair(in_order, norm=Active(False)), "it does more than to normalise"),
    "active in place": (Pair(in_order, norm=Active(True)), "it does more than to normalise"),
    "hooked": (Pair(in_order, hooked()), "conv has hooks"),
    "tied": (tied(), "conv is shared, or its tensors are used elsewhere, too"),
    "listed twice": (listed_twice(), "it is shared, or its tensors are used elsewhere, too"),
    "weight read": (
        Pair(lambda m, x: m.norm(m.conv(x)) + m.conv.weight.sum()),
        "conv is shared, or its tensors are used elsewhere, too",
    ),
    "scale read": (
        Pair(lambda m, x: m.norm(m.conv(x)) + m.norm.weight.sum()),
        "it is shared, or its tensors are used elsewhere, too",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_be_folded_stays_and_the_reason_is_told(case: str) -> None:
    model, reason = LEFT[case]
    model, inputs = randomised(model), noise(2, 4, 6, 6)
    made = folding(model, inputs)
    assert made.left == {"norm": reason} and not made.folded
    before = model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.network.state_dict().items())


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Pair(in_order, nn.Linear(4, 4), nn.BatchNorm1d(4)), (2, 4, 4)),  # features last, channels second
        (Pair(in_order, nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm1d(4)), (4, 4, 4)),  # without a batch
        (Pair(lambda m, x: m.norm(m.conv.weight @ x), nn.Linear(4, 4), nn.BatchNorm1d(4)), (4, 4)),
    ],
)
def test_channels_that_only_happen_to_be_as_many_are_not_taken_for_the_norms(
    model: nn.Module, shape: tuple[int, ...]
) -> None:
    model, inputs = randomised(model), noise(*shape)
    made = folding(model, inputs)
    assert set(made.left) == {"norm"}
    assert torch.equal(outputs(made.network, inputs), outputs(model, inputs))


def test_who_follows_whom_is_seen_in_what_runs() -> None:
    class Misnamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.conv1, self.conv2 = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
            self.dropout = nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn1(self.dropout(self.conv2(x))).relu_()
            return self.bn2(self.conv1(x)).relu_()

    model, inputs = randomised(Misnamed()), noise(2, 4, 9, 9)
    made = folding(model, inputs)
    assert made.folded == {"bn1": "conv2", "bn2": "conv1"}
    assert torch.allclose(outputs(made.network, inputs), outputs(model, inputs), rtol=1e-11)


def test_dicts_of_arguments_and_of_results() -> None:
    class Named(Pair):
        def forward(self, *, image: Tensor) -> Any:
            return {"found": (self.use(self, image), 3)}

    model, inputs = randomised(Named(in_order)), noise(2, 4, 6, 6)
    made = folding(model, {"image": inputs})
    assert made.folded == {"norm": "conv"}
    assert torch.allclose(made.network(image=inputs)["found"][0], model(image=inputs)["found"][0], rtol=1e-11)


def test_a_network_in_training_mode_stays_in_it_and_its_copy_is_not() -> None:
    model = Pair(in_order).train()
    made = deepenc.fold(model, torch.zeros(2, 4, 6, 6))
    assert model.training and not any(module.training for module in made.modules())
    assert int(model.norm.num_batches_tracked) == 0 and not model.norm._forward_hooks


def test_what_is_left_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fold(LEFT["norm first"][0].float(), torch.zeros(1, 4, 6, 6))
    assert "0 BatchNorm layers folded, 1 left: norm: no convolution" in caplog.text


def test_code_that_reads_a_folded_norm_is_a_clear_error() -> None:
    model = Pair(lambda m, x: m.norm(m.conv(x))[:, : m.norm.num_features])
    with pytest.raises(TraceError, match=r"no attribute 'num_features'; its own code reads a BatchNorm"):
        fold(model, torch.zeros(1, 4, 6, 6))


def test_a_network_that_does_not_run_is_a_clear_error() -> None:
    with pytest.raises(TraceError, match="give an example that the network accepts"):
        fold(Pair(in_order), torch.zeros(1, 3, 6, 6))


def test_a_wrong_fold_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(layer: Any, norm: Any) -> None:
        norm.running_mean.zero_()
        absorb(layer, norm)

    monkeypatch.setattr("deepenc.analysis.folding.absorb", forgetful)
    with pytest.raises(TraceError, match="computes something else: expected outputs within"):
        fold(randomised(Pair(in_order)), noise(1, 4, 6, 6))


def test_with_the_key_the_folded_network_comes_back_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = randomised(CifarResNet(8)).float()
    inputs = torch.randn(2, 3, 32, 32)
    folded = deepenc.fold(model, inputs)
    encrypted, key = deepenc.encrypt(folded, inputs, "paper-samp", seed=0)
    assert not norms_of(encrypted) and key.entropy > 0
    state = deepenc.decrypt(encrypted, key).state_dict()
    assert state.keys() == folded.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in folded.state_dict().items())
