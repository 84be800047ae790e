"""The prying attack: looks everywhere in a case but at what the case is meant to say.

A case must tell an attacker its weights, its images and its threat model, and nothing else. This attack
ignores the weights' values and turns every other difference between channels into a score: attributes left
behind, closures, hooks, gradients, storages larger than their tensors, and secrets that follow from seeds.
"""

from __future__ import annotations

import hashlib
import math
import types
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from deepenc import trees
from deepenc.arena.case import Attack, Case, Claim
from deepenc.arena.entry import Entry
from deepenc.arena.plan import Cell
from deepenc.arena.threat import Needs
from deepenc.encryption.defense import Defense
from deepenc.encryption.keys.secret import derive_positions, secret_of
from deepenc.network.sites import Site
from deepenc.network.surgery import narrow_sites
from deepenc.seeds import Roots
from deepenc.victims.victim import VictimSource

# Fields that are meant to speak of sites; everything else in a case is searched.
_SPOKEN = {"sites", "allocation", "defense", "threat", "seed", "task", "device"}
_SMALL_SEEDS = range(4)
FEW = 2**20
"""Keys below which some guesses come near the true one by chance."""
_ATOMS = (
    str,
    bytes,
    int,
    float,
    complex,
    bool,
    type(None),
    type,
    types.ModuleType,
    torch.dtype,
    torch.device,
)


@dataclass
class Findings:
    """What prying found.

    Attributes:
        scores: Site name to suspicion per channel; all zero where nothing was found.
        notes: What a case should not show, each in words, whether or not it led to a score.
    """

    scores: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)

    @property
    def anything(self) -> bool:
        """Whether any channel is suspected."""
        return any(bool(scores.any()) for scores in self.scores.values())


class Pry(Attack):
    """Search a case for anything about the key but the weights' values."""

    name: ClassVar[str] = "pry"

    @property
    def needs(self) -> Needs:
        """The allocation, to know a list of positions when it sees one, and the architecture."""
        return Needs(allocation=True, architecture=True)

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        return Claim(scores=pry(case).scores)


def pry(case: Case, victim: VictimSource | None = None) -> Findings:
    """Search a case.

    Args:
        case: With allocation and architecture known.
        victim: The victim that the attacker guesses; with one, he tries the small seeds of an experiment too.
    """
    found = Findings({site.name: torch.zeros(site.width, dtype=torch.float64) for site in case.sites})
    _search_objects(case, found)
    _search_tensors(case, found)
    _try_seeds(case, found)
    if victim is not None:
        _try_experiments(case, found, victim)
    return found


def _search_objects(case: Case, found: Findings) -> None:
    """Score what reachable collections say, except what a blank network has as well."""
    assert case.blank is not None
    expected = {path for path, _ in _walk(case.blank(0), "encrypted")}
    rightful = _rightful(case)
    parts = {name: value for name, value in vars(case).items() if name not in _SPOKEN}
    for name, part in parts.items():
        for path, value in _walk(part, name):
            if id(value) in rightful or (name == "encrypted" and path in expected):
                continue
            if _score_collection(case, found, path, value):
                found.notes.append(f"{path} tells of channels: {type(value).__name__}")


def _rightful(case: Case) -> set[int]:
    """Identities of the tensors that belong to a case."""
    networks = [case.encrypted, *(release.encrypted for release in case.releases)]
    networks += [] if case.public is None else [case.public]
    tensors = [tensor for n in networks for tensor in (*n.parameters(), *n.buffers())]
    tensors += trees.tensors((*case.labelled.batch(), case.unlabelled.inputs, case.example))
    return {id(tensor) for tensor in tensors} | {id(case.known)}


def _walk(root: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Everything reachable from an object, with the way to it; library code and modules are not entered."""
    seen: set[int] = set()
    keep: list[Any] = []  # an identity is one only while its object lives
    stack = [(path, root)]
    while stack:
        here, value = stack.pop()
        if isinstance(value, _ATOMS) or id(value) in seen:
            continue
        seen.add(id(value))
        keep.append(value)
        yield here, value
        stack += [(f"{here}{step}", inner) for step, inner in _inside(value)]


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield f"[{key!r}]", inner
            yield ".key", key
    elif isinstance(value, list | tuple | Set):
        for index, inner in enumerate(value):
            yield f"[{index}]", inner
    if isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
        yield ".__func__", value.__func__
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield f".<{name}>", cell.cell_contents
            except ValueError:  # a variable that is not bound yet
                continue
        yield ".__defaults__", value.__defaults__
        yield ".__kwdefaults__", value.__kwdefaults__
    yield from ((f".{name}", inner) for name, inner in getattr(value, "__dict__", {}).items())
    for cls in type(value).__mro__:
        for name in getattr(cls, "__slots__", ()) or ():
            if isinstance(name, str) and hasattr(value, name):
                yield f".{name}", getattr(value, name)


def _score_collection(case: Case, found: Findings, path: str, value: Any) -> bool:
    """Score a collection of numbers as positions, or as one value per channel."""
    numbers = _numbers(value)
    if numbers is None or case.allocation is None:
        return False
    hit = False
    for site in _sites_meant(case, path):
        count = case.allocation.get(site.name, 0)
        scores = found.scores[site.name]
        distinct = np.unique(numbers)
        whole = np.issubdtype(numbers.dtype, np.integer)
        if len(numbers) == site.width and len(distinct) > 1:
            scores += torch.from_numpy(numbers.astype(np.float64) / max(1e-12, np.abs(numbers).max()))
            hit = True
        elif whole and count and len(numbers) == count == len(distinct) and _within(distinct, site.width):
            scores[torch.from_numpy(distinct.astype(np.int64))] += 1
            hit = True
    return hit


def _within(ascending: np.ndarray, width: int) -> bool:
    return bool(ascending[0] >= 0 and ascending[-1] < width)


def _numbers(value: Any) -> np.ndarray | None:
    """A flat array of a collection of numbers; None where it is none."""
    if isinstance(value, Tensor):
        if value.is_meta or value.dim() != 1:
            return None
        return np.asarray(value.detach().cpu().numpy())
    if isinstance(value, list | tuple | Set | np.ndarray) and len(value):
        if any(isinstance(item, Tensor) and item.dim() for item in value):
            return None
        array = np.asarray(sorted(value) if isinstance(value, Set) else value)
        if array.ndim == 1 and array.dtype.kind in "iufb":
            return array.astype(np.int64) if array.dtype.kind == "b" else array
    return None


def _sites_meant(case: Case, path: str) -> list[Site]:
    named = [site for site in case.sites if f"[{site.name!r}]" in path or f".{site.name}." in path]
    return named or list(case.sites)


def _search_tensors(case: Case, found: Findings) -> None:
    """Look at how tensors lie in memory, what hangs on them, and whether they share anything."""
    assert case.blank is not None
    blank = case.blank(0)
    model = dict(blank.named_parameters()) | dict(blank.named_buffers())
    own: dict[str, Tensor] = dict(case.encrypted.named_parameters()) | dict(case.encrypted.named_buffers())
    given = (*case.labelled.batch(), case.unlabelled.inputs, case.example)
    examples = {f"example {i}": tensor for i, tensor in enumerate(trees.tensors(given))}
    stores: dict[int, str] = {}
    for name, tensor in (own | examples).items():
        storage = tensor.untyped_storage()
        if len(storage) and stores.setdefault(storage.data_ptr(), name) != name:
            found.notes.append(f"{name} shares memory with {stores[storage.data_ptr()]}")
        if storage.nbytes() != tensor.numel() * tensor.element_size():
            found.notes.append(f"{name} lies in a storage of {storage.nbytes()} bytes, larger than itself")
            _score_hidden(case, found, name, tensor)
        if not tensor.is_contiguous() or tensor.storage_offset():
            found.notes.append(f"{name} is not laid out from the first entry to the last")
        if tensor._base is not None or tensor.grad_fn is not None:
            found.notes.append(f"{name} remembers what it was made from")
        if tensor.grad is not None:
            found.notes.append(f"{name} has a gradient")
            _score_rows(case, found, name, tensor.grad)
        if vars(tensor) and set(vars(tensor)) - {"_is_param"}:
            found.notes.append(f"{name} has attributes {sorted(vars(tensor))}")
        twin = model.get(name)
        if twin is not None and (twin.dtype, twin.requires_grad) != (tensor.dtype, tensor.requires_grad):
            found.notes.append(f"{name} has another dtype or requires_grad than a blank network's")
    if len({tensor._version for tensor in own.values()}) > 1:
        found.notes.append("some tensors were changed in place more often than others")
    if hooks := _hooks(case.encrypted) - _hooks(blank):
        found.notes.append(f"{hooks} hooks more than on a blank network")


def _hooks(network: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in network.modules() for kind in kinds)


def _score_hidden(case: Case, found: Findings, name: str, tensor: Tensor) -> None:
    """Channels whose values lie about a second time are real: somebody's original is there."""
    length = tensor.untyped_storage().nbytes() // tensor.element_size()
    everything = tensor.detach().as_strided((length,), (1,), 0).cpu()
    visible = torch.zeros(len(everything), dtype=torch.bool)
    visible.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    hidden = everything[~visible]
    again = torch.isin(tensor.detach().cpu(), hidden)
    _score_rows(case, found, name, -again.double())
    for site in case.sites:
        if len(hidden) == site.width and any(slot.tensor == name for slot in site.slots):
            found.scores[site.name] += hidden.double()


def _score_rows(case: Case, found: Findings, name: str, values: Tensor) -> None:
    """Add the mean of a tensor's values per channel to the scores."""
    for site in case.sites:
        for slot in site.slots:
            if slot.tensor == name:
                found.scores[site.name] += slot.rows(values.detach().cpu().double(), site.width).mean(dim=1)


def _try_seeds(case: Case, found: Findings) -> None:
    """Try secrets that follow from seeds: with the right one, the victim of the checks is always right."""
    if not len(case.labelled) or not case.allocation or not any(case.allocation.values()):
        return
    originals = _originals(case)
    keys = math.prod(math.comb(s.width, case.allocation.get(s.name, 0)) for s in case.sites)
    if keys < FEW:
        return  # a guess at random would hit, or nearly
    guesses = [derive_positions(s, originals, case.allocation) for s in _secrets(case.seed)]
    rates = [_rate(case, guess) for guess in guesses]
    best = rates.index(max(rates))
    if rates[best] > 0.99 and rates.count(rates[best]) == 1:
        found.notes.append(f"the secret follows from a seed (guess {best} of {len(guesses)})")
        for name, chosen in guesses[best].items():
            found.scores[name][list(chosen)] += 1


def _try_experiments(case: Case, found: Findings, victim: VictimSource) -> None:
    """See whether the attacker's own seed tells the experiment's, from which the secrets follow."""
    defense, entry = Defense.model_validate(case.defense), Entry(attack=Pry())
    cells = [
        Cell(victim, defense, entry, case.threat, key, repeat) for key, repeat in product(range(3), repeat=2)
    ]
    tries = [(Roots.of_seed(seed), cell) for seed in _SMALL_SEEDS for cell in cells]
    guesses = [(roots, cell) for roots, cell in tries if cell.attack_seed(roots) == case.seed]
    if len(guesses) != 1:
        return  # every seed of an experiment would have given this one, or none
    roots, cell = guesses[0]
    found.notes.append("case.seed tells the seed of the experiment, from which the secret follows")
    _score_secret(case, found, cell.secret(roots))


def _score_secret(case: Case, found: Findings, secret: bytes) -> None:
    assert case.allocation is not None
    for name, chosen in derive_positions(secret, _originals(case), case.allocation).items():
        found.scores[name][list(chosen)] += 1


def _originals(case: Case) -> tuple[Site, ...]:
    """The victim's sites, as widths alone tell them."""
    assert case.allocation is not None
    return narrow_sites(case.sites, {name: tuple(range(count)) for name, count in case.allocation.items()})


def _secrets(seed: int) -> Iterator[bytes]:
    orders: tuple[Literal["big", "little"], ...] = ("big", "little")
    for number in dict.fromkeys((seed, *_SMALL_SEEDS)):
        yield secret_of(seed=number)
        for order in orders:
            plain = number.to_bytes(32, order)
            yield plain
            yield hashlib.sha256(plain).digest()
            yield hashlib.sha256(number.to_bytes(8, order)).digest()
        yield hashlib.sha256(str(number).encode()).digest()


def _rate(case: Case, guess: Mapping[str, tuple[int, ...]]) -> float:
    network = case.remove(guess).eval()
    with torch.no_grad():
        outputs = case.task.logits(case.task.run(network, case.labelled.inputs))
    return float((outputs.argmax(dim=1) == case.task.labels(case.labelled.targets)).double().mean())
