"""What a recipe may do beyond plain training: against loops written out, and on what must stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepenc.arena.kit import groups
from deepenc.errors import ConfigError
from deepenc.tasks.classification import Classification
from deepenc.tasks.examples import Examples
from deepenc.victims.augment import cropped, flipped
from deepenc.victims.models import CifarResNet
from deepenc.victims.recipe import Recipe
from deepenc.victims.training import fit


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=40, shape=(5,)):
    inputs = torch.randn(count, *shape, generator=generator(7))
    return Examples(inputs, (inputs.flatten(1)[:, 0] > 0).long())


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def dense():
    return seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)))


class Convolutional(nn.Module):
    """With a `view` of a map, which needs a copy where channels come last."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(4 * 16, 2)

    def forward(self, x):
        x = self.second(F.relu(self.norm(self.first(x))))
        return self.head(x.view(x.size(0), -1))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def plain(model, data, recipe, source, loss, rates=None):
    """Training written out."""
    torch.randint(2**62, (), generator=source)  # what fit draws for dropout
    named = {n: p for n, p in model.named_parameters() if rates is None or n in rates}
    velocity = {name: torch.zeros_like(p) for name, p in named.items()}
    model.train()
    size = recipe.batch_size
    batches = (
        order[start : start + size]
        for order in iter(lambda: torch.randperm(len(data), generator=source), None)
        for start in range(0, len(data) - size + 1, size)
    )
    for step, chosen in zip(range(recipe.steps), batches, strict=False):
        inputs, labels = data.inputs[chosen], data.targets[chosen]
        gradients = torch.autograd.grad(loss(model(inputs), labels), tuple(named.values()))
        with torch.no_grad():
            for (name, p), gradient in zip(named.items(), gradients, strict=True):
                velocity[name].mul_(recipe.momentum).add_(gradient + recipe.weight_decay * p)
                p -= (rates[name] if rates else 1) * recipe.rate(step, recipe.steps) * velocity[name]
    return model.eval()


def close(one, two, atol=1e-6):
    two = state(two)
    return all(torch.allclose(t, two[name], atol=atol) for name, t in state(one).items())


RECIPE = Recipe(steps=6, lr=0.1, final_lr=0.02, batch_size=16)


def test_channels_last_changes_neither_the_result_nor_the_layout():
    data, fitted = images(shape=(1, 4, 4)), seeded(Convolutional)
    strides = {name: t.stride() for name, t in fitted.state_dict().items()}
    assert fit(fitted, Classification(), data, RECIPE, generator(1))
    assert close(fitted, plain(seeded(Convolutional), data, RECIPE, generator(1), F.cross_entropy), 1e-5)
    assert {name: t.stride() for name, t in fitted.state_dict().items()} == strides


def test_convolutions_run_channels_last():
    model, seen = seeded(Convolutional), []
    model.second.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    fit(model, Classification(), images(shape=(1, 4, 4)), Recipe(steps=1), generator())
    assert seen == [True]
    model(images(shape=(1, 4, 4)).inputs)
    assert seen == [True, False]


def test_a_layout_of_its_own_is_kept():
    model = seeded(Convolutional).to(memory_format=torch.channels_last)
    strides = model.second.weight.stride()
    fit(model, Classification(), images(shape=(1, 4, 4)), Recipe(steps=1), generator())
    assert model.second.weight.stride() == strides


def test_groups_are_learning_rates():
    rates = {"0.weight": 0.5, "2.bias": 2.0}
    fitted, untouched = dense(), state(dense())
    fit(fitted, Classification(), images(), RECIPE, generator(1), groups=rates | {"2.weight": 0.0})
    assert close(fitted, plain(dense(), images(), RECIPE, generator(1), F.cross_entropy, rates))
    for name in ("0.bias", "2.weight"):
        assert torch.equal(fitted.state_dict()[name], untouched[name])
    assert all(p.requires_grad and p.grad is None for p in fitted.parameters())


def test_nothing_to_train_costs_nothing():
    model = dense()
    before = state(model)
    model.register_forward_pre_hook(lambda *_: pytest.fail("ran"))
    assert fit(model, Classification(), images(), RECIPE, generator(), groups={"0.weight": 0.0})
    assert all(torch.equal(t, before[n]) for n, t in state(model).items())


@pytest.mark.parametrize("which", ["groups", "l1"])
@pytest.mark.parametrize(
    ("named", "match"), [({"0.wieght": 1}, "0.weight"), ({"0.bias": -1}, ">= 0, got -1")]
)
def test_factors_that_cannot_be_meant(which, named, match):
    with pytest.raises(ConfigError, match=match):
        fit(dense(), Classification(), images(), RECIPE, generator(), **{which: named})


def test_a_tied_parameter_goes_by_either_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(5, 5)
            self.two = nn.Linear(5, 5)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(x))

    model = seeded(Tied)
    before = state(model)
    fit(model, Classification(), images(), RECIPE, generator(), groups={"two.weight": 1.0})
    assert not torch.equal(model.one.weight, before["one.weight"])
    assert torch.equal(model.one.bias, before["one.bias"]) and model.two.weight is model.one.weight


def test_l1_is_in_the_loss_and_makes_small():
    fitted, model = dense(), dense()
    fit(fitted, Classification(), images(), RECIPE, generator(1), l1={"0.weight": 0.3})

    def loss(outputs, labels):
        return F.cross_entropy(outputs, labels) + 0.3 * model[0].weight.abs().sum()

    assert close(fitted, plain(model, images(), RECIPE, generator(1), loss))
    assert fitted[0].weight.abs().sum() < 0.8 * dense()[0].weight.abs().sum()


def test_label_smoothing():
    fitted, recipe = dense(), Recipe(steps=6, batch_size=16, label_smoothing=0.3)
    fit(fitted, Classification(), images(), recipe, generator(1))

    def loss(outputs, labels):
        targets = 0.7 * F.one_hot(labels, 2) + 0.15
        return -(targets * outputs.log_softmax(1)).sum(1).mean()

    assert close(fitted, plain(dense(), images(), recipe, generator(1), loss))


def test_adamw_is_torch_s_in_a_plain_loop():
    network, other, examples = dense(), dense(), images(8)
    recipe = Recipe(optimizer="adamw", steps=5, lr=0.01, final_lr=0.0, weight_decay=0.1, batch_size=8)
    fit(network, Classification(), examples, recipe, generator())
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.01, betas=(0.9, 0.999), weight_decay=0.1)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = recipe.rate(step, 5)
        optimizer.zero_grad()
        F.cross_entropy(other(examples.inputs), examples.targets).backward()
        optimizer.step()
    for own, wanted in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.allclose(own, wanted, atol=1e-6)
    assert not torch.allclose(network[0].weight, dense()[0].weight, atol=1e-3)


def test_probabilities_as_labels():
    data = images()
    soft = Examples(data.inputs, torch.rand(40, 2, generator=generator(3)).softmax(1))
    hard = Examples(data.inputs, F.one_hot(data.targets, 2).float())
    fitted, one_hot, whole = dense(), dense(), dense()
    fit(fitted, Classification(), soft, RECIPE, generator(1))
    expected = plain(dense(), soft, RECIPE, generator(1), lambda o, t: -(t * o.log_softmax(1)).sum(1).mean())
    assert close(fitted, expected)
    fit(one_hot, Classification(), hard, RECIPE, generator(1))
    fit(whole, Classification(), data, RECIPE, generator(1))
    assert close(one_hot, whole)


def test_norms_in_eval_mode_keep_their_statistics_and_still_learn():
    model, data = seeded(Convolutional), images(shape=(1, 4, 4))
    before = state(model)
    fit(model, Classification(), data, Recipe(steps=4, eval_norms=True), generator())
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(model.state_dict()[f"norm.{name}"], before[f"norm.{name}"])
    assert not torch.equal(model.norm.weight, before["norm.weight"])


def test_mixed_runs_in_bfloat16_and_keeps_the_weights_in_float32():
    data, exact, mixed, again = images(shape=(1, 4, 4)), *(seeded(Convolutional) for _ in range(3))
    kinds = set()
    mixed.second.register_forward_hook(lambda _, __, outputs: kinds.add(outputs.dtype))
    recipe = Recipe(steps=20, lr=0.05, batch_size=16, mixed=True)
    fit(exact, Classification(), data, Recipe(steps=20, lr=0.05, batch_size=16), generator(1))
    assert fit(mixed, Classification(), data, recipe, generator(1)) and fit(
        again, Classification(), data, recipe, generator(1)
    )
    assert kinds == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in mixed.parameters())
    assert not close(exact, mixed) and close(exact, mixed, 0.05)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in mixed.state_dict().items())


def test_flips_mirror_half_of_the_images():
    inputs = torch.randn(200, 2, 3, 4, generator=generator())
    turned = flipped(inputs, generator(1))
    mirrored = [torch.equal(after, before.flip(-1)) for before, after in zip(inputs, turned, strict=True)]
    kept = [torch.equal(after, before) for before, after in zip(inputs, turned, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 70 < sum(mirrored) < 130  # four deviations
    flat = torch.zeros(3, 5)
    assert flipped(flat, generator()) is flat


def test_crops_are_parts_of_their_own_image():
    """Of an image that rises evenly, a crop rises evenly too, between values of the image."""
    ramp = torch.arange(16.0).expand(1, 16, 16)
    inputs = torch.stack([ramp, 100 + ramp] * 20)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cut = cropped(inputs, 0.2)
    assert cut.shape == inputs.shape
    rise = cut[:, 0, 8, 12] - cut[:, 0, 8, 4]
    assert rise.max() <= 8 + 1e-4 and rise.min() >= 8 * 0.2 * 0.7 and rise.std() > 0.5
    for number, image in enumerate(cut):
        assert 100 * (number % 2) <= image.min() and image.max() <= 100 * (number % 2) + 15
    assert torch.allclose(cropped(inputs, 1.0), inputs, atol=1e-4)
    assert cropped(inputs, 0.0) is inputs


def test_augmentation_follows_the_generator_and_leaves_the_images():
    data, models = images(shape=(1, 4, 4)), [seeded(Convolutional) for _ in range(3)]
    kept = data.inputs.clone()
    recipe = Recipe(steps=3, flip=True, crop=0.3, shift=0.2)
    for number, (model, seed) in enumerate(zip(models, (1, 1, 2), strict=True)):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        fit(model, Classification(), data, recipe, generator(seed))
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(data.inputs, kept)
    one, same, other = map(state, models)
    assert all(torch.equal(t, same[n]) for n, t in one.items())
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_groups_of_a_residual_network():
    model = CifarResNet(8)
    assert len(groups.of_all(model)) == len(list(model.parameters()))
    assert groups.of_head(model, Classification(classes=10)) == {"linear.weight": 1.0, "linear.bias": 1.0}
    assert groups.of_head(model, Classification(classes=11)) == {}
    norms = groups.of_norms(model)
    assert len(norms) == 2 * 7 and "layer1.0.bn1.bias" in norms
    assert groups.norm_scales(model) == [name for name in norms if name.endswith("weight")]
    # Eight layers: the stem is seven before the classifier, and its norm is slowed with it.
    slow = groups.slowed(groups.of_all(model), model, 0.5)
    assert slow["linear.bias"] == 1 and slow["layer3.0.conv2.weight"] == 0.5
    assert slow["conv1.weight"] == slow["bn1.weight"] == 0.5**7


def test_a_convolution_as_head():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert Classification(classes=10).head(model) == ("1",)
