"""Training: one plain recipe, for victims and for attackers alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deepenc.analysis.batchnorm import batchnorms
from deepenc.errors import ConfigError, near
from deepenc.tasks.examples import Examples
from deepenc.tasks.task import Task
from deepenc.victims.recipe import Recipe, TrainingPlan


def fit(
    network: nn.Module,
    task: Task,
    examples: Examples,
    recipe: Recipe,
    generator: torch.Generator,
    groups: Mapping[str, float] | None = None,
    l1: Mapping[str, float] | None = None,
) -> bool:
    """Train a network in place and leave it in eval mode.

    All randomness (order, augmentation, dropout) comes from the generator; the global generators, the grad
    mode and the parameters' ``requires_grad`` are as before.

    Args:
        network: On the device of the examples.
        task: What it is trained for: its loss is minimised.
        examples: At least one; an incomplete last batch is left out where there is another. Targets may also
            be what the task made of a model's answers.
        recipe: How.
        generator: On the CPU.
        groups: Parameter name to the factor of its learning rate; parameters not named, or with 0, stay as
            they are. Default: all are trained alike.
        l1: Parameter name to the weight, in the loss, of the sum of its absolute values.

    Returns:
        Whether all went well. Where the loss or the weights did not stay finite, training stopped and the
        network has the last weights with a finite loss.

    Raises:
        ConfigError: There are no examples, or a name is no parameter's.
        OutOfBudget: A metered network, or the metered optimiser, may not spend that much.
    """
    if not len(examples):
        raise ConfigError("expected at least one example to train on, got none")
    factors, penalties = _by_parameter(network, groups), _by_parameter(network, l1 or {})
    steps = recipe.total_steps(len(examples))
    if steps == 0 or not factors:
        network.eval()
        return True
    wanted = {p: p.requires_grad for p in network.parameters()}
    try:
        with (
            _own_randomness(generator, examples.device),
            torch.enable_grad(),
            _channels_last(network, examples) as channels_last,
        ):
            network.train()
            for norm in batchnorms(network).values() if recipe.eval_norms else ():
                norm.eval()
            for parameter in wanted:
                parameter.requires_grad_(parameter in factors)
            plan = TrainingPlan(task, recipe, steps, factors, penalties, channels_last)
            # Imported here: whoever only encrypts does not wait for Lightning.
            from deepenc.victims._lightning import train

            return train(network, examples, generator, plan)
    finally:
        for parameter, grad in wanted.items():
            parameter.requires_grad_(grad)
            parameter.grad = None
        network.to(examples.device).eval()


def _by_parameter(network: nn.Module, named: Mapping[str, float] | None) -> dict[nn.Parameter, float]:
    """Values by parameter instead of by name, without zeros; by default 1 for each."""
    own = dict(network.named_parameters(remove_duplicate=False))
    if named is None:
        return dict.fromkeys(own.values(), 1.0)
    if strangers := sorted(set(named) - set(own)):
        raise ConfigError(f"the network has no parameters {strangers[:5]}: {near(strangers[0], own)}")
    if negative := sorted(name for name, value in named.items() if not value >= 0):
        raise ConfigError(f"expected factors >= 0, got {named[negative[0]]} for {negative[0]!r}")
    return {own[name]: value for name, value in named.items() if value > 0}


@contextmanager
def _channels_last(network: nn.Module, examples: Examples) -> Iterator[bool]:
    """Lay the weights of convolutions out as they are fastest, and back again; says whether it did."""
    inputs = examples.batch([0]).inputs
    images = isinstance(inputs, Tensor) and inputs.ndim == 4
    if not images or not any(isinstance(m, nn.Conv2d) for m in network.modules()):
        yield False
        return
    plain = [p for p in network.parameters() if p.ndim == 4 and p.is_contiguous()]
    network.to(memory_format=torch.channels_last)
    try:
        yield True
    finally:
        for parameter in plain:
            # Not `contiguous`: with a dimension of size 1 it may keep strides that choose other kernels.
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


@contextmanager
def _own_randomness(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Global generators seeded from ours, for dropout, and put back afterwards."""
    seed = int(torch.randint(2**62, (), generator=generator))
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield
