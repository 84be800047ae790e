"""One recipe: what it does to a network, and what it leaves alone."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from deepenc.errors import ConfigError, OutOfBudget
from deepenc.tasks.classification import Classification
from deepenc.tasks.examples import Examples
from deepenc.victims.augment import shifted
from deepenc.victims.recipe import Recipe
from deepenc.victims.training import fit


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=64, seed=0):
    inputs = torch.randn(count, 5, generator=generator(seed))
    return Examples(inputs, (inputs[:, 0] > 0).long())


def network(*extra):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), *extra, nn.ReLU(), nn.Linear(8, 2))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one, two):
    return all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def batches(data, size, source):
    """Batches without end: each epoch in a new order, an incomplete last batch left out."""
    while True:
        order = torch.randperm(len(data), generator=source)
        for start in range(0, max(1, len(data) // size) * size, size):
            chosen = order[start : start + size]
            yield data.inputs[chosen], data.targets[chosen]


def shown(data, recipe):
    """The first values of the inputs that a network is trained on, batch by batch."""
    model, seen = nn.Linear(data.inputs.shape[1], 2), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, 0].tolist()))
    fit(model, Classification(), data, recipe, generator())
    return seen


def test_fit_is_plain_sgd_with_a_cosine():
    """Against a loop written out: same batches, momentum, weight decay, and a learning rate by formula."""
    recipe = Recipe(steps=7, lr=0.2, final_lr=0.02, momentum=0.8, weight_decay=0.01, batch_size=16)
    data, trained, plain = images(40), network(), network()
    fit(trained, Classification(), data, recipe, generator(1))

    source = generator(1)
    torch.randint(2**62, (), generator=source)  # what fit draws for dropout
    velocity = [torch.zeros_like(p) for p in plain.parameters()]
    for step, (inputs, labels) in zip(range(7), batches(data, 16, source), strict=False):
        rate = 0.02 + (0.2 - 0.02) * (1 + math.cos(math.pi * step / 7)) / 2
        gradients = torch.autograd.grad(
            nn.functional.cross_entropy(plain(inputs), labels), tuple(plain.parameters())
        )
        with torch.no_grad():
            for parameter, gradient, v in zip(plain.parameters(), gradients, velocity, strict=True):
                v.mul_(0.8).add_(gradient + 0.01 * parameter)
                parameter -= rate * v
    for one, two in zip(trained.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def test_an_epoch_shows_each_image_once_and_leaves_out_an_incomplete_batch():
    data = Examples(torch.arange(10.0)[:, None], torch.arange(10) % 2)
    seen = shown(data, Recipe(epochs=3, batch_size=4))
    assert [len(batch) for batch in seen] == [4] * 6
    epochs = [seen[0] + seen[1], seen[2] + seen[3], seen[4] + seen[5]]
    assert all(len(set(epoch)) == 8 for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]


def test_fewer_images_than_a_batch_are_one_batch():
    seen = shown(
        Examples(torch.arange(3.0)[:, None], torch.tensor([0, 1, 1])), Recipe(epochs=5, batch_size=64)
    )
    assert [sorted(batch) for batch in seen] == [[0, 1, 2]] * 5


@pytest.mark.parametrize(
    ("steps", "samples", "expected"), [(None, None, 30), (7, None, 7), (None, 65, 2), (40, 0, 0), (-1, 9, 0)]
)
def test_within_a_budget(steps, samples, expected):
    recipe = Recipe(epochs=10, batch_size=32).within(96, steps=steps, samples=samples)
    assert recipe.total_steps(96) == expected


def test_batch_norm_and_dropout_are_in_training_mode_and_eval_mode_afterwards():
    model = network(nn.BatchNorm1d(8), nn.Dropout(0.9)).eval()
    before = state(model)
    assert fit(model, Classification(), images(), Recipe(steps=3), generator())
    assert int(model[1].num_batches_tracked) == 3
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert not any(module.training for module in model.modules())


def test_nothing_outside_is_touched():
    torch.manual_seed(3)
    rng = torch.get_rng_state()
    levels = {n: logging.getLogger(n).level for n in ("lightning.pytorch", "lightning.fabric", "lightning")}
    handler = signal.getsignal(signal.SIGINT)
    model = network(nn.Dropout(0.5))
    model[0].bias.requires_grad_(False)
    data = images()
    kept = data.inputs.clone(), data.targets.clone()
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, Classification(), data, Recipe(steps=2), generator())
        assert not torch.is_grad_enabled()
    assert not caught
    assert torch.equal(rng, torch.get_rng_state())
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(kept[0], data.inputs) and torch.equal(kept[1], data.targets)
    assert signal.getsignal(signal.SIGINT) is handler
    for name in ("lightning.pytorch", "lightning.fabric"):
        assert logging.getLogger(name).level in (levels[name], logging.INFO)


def test_the_generator_decides_everything():
    first, same, other = (network(nn.Dropout(0.5)) for _ in range(3))
    fit(first, Classification(), images(), Recipe(steps=5), generator(1))
    torch.manual_seed(99)
    fit(same, Classification(), images(), Recipe(steps=5), generator(1))
    fit(other, Classification(), images(), Recipe(steps=5), generator(2))
    assert equal(state(first), state(same)) and not equal(state(first), state(other))


def test_divergence_keeps_the_last_finite_weights():
    model = network(nn.BatchNorm1d(8))
    assert not fit(model, Classification(), images(), Recipe(steps=50, lr=1e30, batch_size=16), generator())
    assert all(torch.isfinite(t).all() for t in state(model).values())
    assert torch.isfinite(model(images().inputs)).all()


def test_divergence_goes_back_to_the_weights_of_the_last_finite_loss():
    def at_call(number, action):
        model, calls = network(), []

        def hook(_, __, outputs):
            calls.append(1)
            return action(outputs) if len(calls) == number else outputs

        model.register_forward_hook(hook)
        return model

    def stop(_):
        raise OutOfBudget("stop")

    # The third loss is the last finite one; its weights are those after two steps.
    diverging = at_call(4, lambda outputs: outputs * torch.nan)
    assert not fit(diverging, Classification(), images(), Recipe(steps=10, batch_size=16), generator())
    stopped = at_call(3, stop)
    with pytest.raises(OutOfBudget):
        fit(stopped, Classification(), images(), Recipe(steps=10, batch_size=16), generator())
    assert equal(state(stopped), state(diverging))


def test_images_that_are_not_finite_change_nothing():
    model = network(nn.BatchNorm1d(8))
    before = state(model)
    data = images()
    data.inputs[:] = torch.nan
    assert not fit(model, Classification(), data, Recipe(steps=5), generator())
    floating = {name: t for name, t in before.items() if t.is_floating_point()}
    assert equal(floating, state(model))


def test_a_gradient_that_is_not_finite_changes_nothing():
    class Root(nn.Module):
        """Finite at 0, with an infinite slope."""

        def forward(self, x):
            return (x * 0).abs().sqrt() + x

    model = nn.Sequential(nn.Linear(5, 2), Root())
    before = state(model)
    assert not fit(model, Classification(), images(), Recipe(steps=5), generator())
    assert equal(before, state(model))


def test_the_network_itself_is_called_and_may_stop_the_training():
    model, seen = network(), []

    def count(_, inputs):
        seen.append(len(inputs[0]))
        if len(seen) == 3:
            raise OutOfBudget("enough")

    model.register_forward_pre_hook(count)
    with pytest.raises(OutOfBudget, match="enough"):
        fit(model, Classification(), images(40), Recipe(steps=10, batch_size=16), generator())
    assert seen == [16, 16, 16]
    assert not model.training


def test_ctrl_c_stays_ctrl_c():
    model = network()
    handler = signal.getsignal(signal.SIGINT)
    model.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        fit(model, Classification(), images(), Recipe(steps=10), generator())
    assert signal.getsignal(signal.SIGINT) is handler


def test_no_images_is_an_error():
    with pytest.raises(ConfigError, match="at least one example"):
        fit(
            network(),
            Classification(),
            Examples(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)),
            Recipe(),
            generator(),
        )


def test_shifts_move_whole_images_with_their_edge():
    inputs = torch.arange(2 * 1 * 8 * 8.0).view(2, 1, 8, 8)
    moved = shifted(inputs, 0.25, generator(4))
    # By hand: pad by the edge, cut out at every possible offset; each image is one of these.
    padded = nn.functional.pad(inputs, (2, 2, 2, 2), mode="replicate")
    found = []
    for before, after in zip(padded, moved, strict=True):
        fits = [
            (r, c) for r in range(5) for c in range(5) if torch.equal(before[:, r : r + 8, c : c + 8], after)
        ]
        assert len(fits) == 1
        found += fits
    assert found != [(2, 2), (2, 2)]
    assert shifted(inputs, 0.0, generator()) is inputs


def test_importing_the_recipe_does_not_import_lightning():
    check = "import sys, deepenc.victims.training; assert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
