"""Fine-tuning the encrypted network, the attack of the paper's Table 5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from deepenc.analysis.batchnorm import reestimate
from deepenc.arena.case import Case, Claim
from deepenc.arena.kit import groups
from deepenc.arena.kit.training import TrainedAttack, affordable, train
from deepenc.errors import ClaimError
from deepenc.network.initial import resetting, seeded
from deepenc.tasks.examples import joined
from deepenc.tasks.task import Task


class Finetune(TrainedAttack):
    """Train the encrypted network on the attacker's labelled images.

    The defaults are the paper's (Table 5): all weights, 15 epochs, SGD with momentum, a cosine from 0.1 to
    0.0001, BatchNorm in training mode. It takes fewer steps where the threat model's budget asks for it.
    Differs from the paper: the task stays the victim's, and so does the classifier's head unless it is to
    be fresh.
    """

    name: ClassVar[str] = "finetune"

    layers: Literal["all", "head", "norms"] = "all"
    """What is trained: all parameters, the classifier's last layer, or the normalisations' factors and
    offsets; a network without any of these is claimed as it is."""
    fresh_head: bool = False
    """Whether the classifier's last layer is initialised again."""
    decay: float = Field(1.0, gt=0, le=1)
    """Learning rate of a layer, as a fraction of the next layer's: below 1, early layers learn slowly."""
    recalibrate: int = Field(0, ge=0)
    """Images, unlabelled ones first, on which BatchNorm statistics are re-estimated before; 0 is none."""
    freeze_norms: bool = False
    """Whether BatchNorm uses its stored statistics during training, and keeps them."""
    l1: float = Field(0.0, ge=0)
    """Weight of the absolute values of BatchNorm's factors in the loss (network slimming: what is not
    needed falls to 0, and can be pruned after)."""

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        network = case.copy()
        recipe = self.recipe(eval_norms=self.freeze_norms)
        if affordable(case, recipe, case.labelled).steps == 0:
            return Claim(network=network)
        if self.fresh_head:
            renew(network, head_of(network, case.task), case.seed)
        if self.recalibrate:
            inputs = joined([case.unlabelled, case.labelled])[: self.recalibrate].inputs
            reestimate(network, inputs)
        penalties = dict.fromkeys(groups.norm_scales(network), self.l1) if self.l1 else None
        trained = groups.slowed(self.chosen(network, case.task), network, self.decay)
        return train(case, network, recipe, groups=trained, l1=penalties)

    def chosen(self, network: nn.Module, task: Task) -> groups.Groups:
        """Names of the parameters to train, with the factor 1."""
        match self.layers:
            case "all":
                return groups.of_all(network)
            case "norms":
                return groups.of_norms(network)
            case "head":
                head_of(network, task)
                return groups.of_head(network, task)


def head_of(network: nn.Module, task: Task) -> tuple[str, ...]:
    """Paths of the layers that make the outputs.

    Raises:
        ClaimError: The task knows none.
    """
    paths = task.head(network)
    if not paths:
        raise ClaimError(
            f"finetune: no last layer of {type(network).__name__} is known for the task {task.name!r}; train "
            "it with `layers: all` and without `fresh_head`"
        )
    return paths


def renew(network: nn.Module, paths: Sequence[str], seed: int) -> None:
    """Initialise layers again, as torch does; the global generators stay as they are."""
    layers = [module for path in paths for module in network.get_submodule(path).modules()]
    with seeded(seed, [parameter for layer in layers for parameter in layer.parameters(recurse=False)]):
        for layer in layers:
            if (reset := resetting(layer)) is not None:
                reset()
