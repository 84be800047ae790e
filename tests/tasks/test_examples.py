"""Examples are read when they are asked for, in their order, and lead to no others."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from deepenc import trees
from deepenc.errors import VictimError
from deepenc.tasks.examples import Batch, Examples, examples_of, joined


class Squares(Dataset[Any]):
    """Numbers with their squares; remembers what was read."""

    def __init__(self, count: int = 10) -> None:
        self.count = count
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.append(index)
        return torch.tensor([float(index)]), index**2


def test_a_data_set_is_read_only_where_it_is_asked_for() -> None:
    data = Squares()
    some = Examples.read(data)[[7, 2, 5]][1:]
    assert len(some) == 2 and not some.stored and data.read == []
    inputs, targets = some.batch()
    assert (inputs.tolist(), targets.tolist(), data.read) == ([[2.0], [5.0]], [4, 25], [2, 5])
    assert [batch.targets.tolist() for batch in some.batches(1)] == [[4], [25]]


def test_examples_in_memory_are_views_by_slices_and_copies_by_indices() -> None:
    inputs = torch.arange(6.0).reshape(3, 2)
    held = Examples({"x": inputs}, torch.tensor([0, 1, 2]))
    assert held[1:].inputs["x"].data_ptr() == inputs[1:].data_ptr()
    held[[0, 2]].inputs["x"].zero_()
    held.batch([0]).inputs["x"].zero_()
    assert torch.equal(inputs, torch.arange(6.0).reshape(3, 2))
    kept = held.kept()
    kept.inputs["x"].zero_()
    assert inputs.any() and kept.targets.tolist() == [0, 1, 2]


def test_without_targets_none_are_told_however_they_are_read() -> None:
    for examples in (Examples.read(Squares()), Examples(torch.zeros(10, 1), torch.arange(10))):
        blind = examples.without_targets()[2:5]
        assert blind.targets is None and blind.batch([0]).targets is None
        assert all(batch.targets is None for batch in blind.batches(2))


def test_who_holds_some_examples_has_no_way_to_the_others() -> None:
    data = Squares()
    some = Examples.read(data)[:2].without_targets()
    seen, todo = set(), [some]
    while todo:
        thing = todo.pop()
        if id(thing) not in seen and not isinstance(thing, type):
            seen.add(id(thing))
            todo += gc.get_referents(thing)
    assert id(data) not in seen


def test_several_sources_one_after_the_other() -> None:
    lazy, stored = Examples.read(Squares(3)), Examples(torch.tensor([[8.0], [9.0]]), torch.zeros(2))
    both = joined([stored, lazy])
    assert both.targets is None and both.inputs.flatten().tolist() == [8, 9, 0, 1, 2]
    assert both[[4, 0]].inputs.flatten().tolist() == [2, 8]
    assert joined([stored, stored]).inputs.flatten().tolist() == [8, 9, 8, 9]
    assert len(joined([stored[:0], lazy[:0]])) == 0


def test_copies_and_other_processes_read_the_same() -> None:
    for examples in (Examples.read(Squares(4))[1:], Examples(torch.arange(3.0)[:, None], torch.arange(3))):
        assert copy.deepcopy(examples) is examples
        again = pickle.loads(pickle.dumps(examples))
        assert torch.equal(again.inputs, examples.inputs) and torch.equal(again.targets, examples.targets)


def test_a_loader_gives_batches_in_the_order_that_it_is_told() -> None:
    for workers in (0, 1):
        examples = Examples.read(Squares(), workers=workers)[3:]
        found = list(examples.loader([[0, 2], [1]]))
        assert all(isinstance(batch, tuple) for batch in found)
        assert [batch[1].tolist() for batch in found] == [[9, 25], [16]]
    (batch,) = Examples(torch.arange(4.0)[:, None], torch.arange(4)).loader([[3, 0]])
    assert isinstance(batch, Batch) and batch.targets.tolist() == [3, 0]


def test_digests_tell_inputs_apart_or_are_the_data_set_s_own() -> None:
    class Named(Squares):
        def digest(self, index: int) -> bytes:
            return b"%d" % index

    assert Examples.read(Named())[[4, 1]].digests() == [b"4", b"1"]
    one, two, three = Examples(torch.tensor([[1.0], [2.0], [1.0]])).digests()
    assert one == three != two
    assert Examples.read(Squares(2)).digests() == Examples(torch.tensor([[0.0], [1.0]])).digests()


def test_an_example_is_read_once_for_all_the_digests_that_its_parts_are_asked_for() -> None:
    data = Squares()
    every = Examples.read(data)
    whole, part, again = every.digests(), every[[7, 2]].digests(), every.without_targets()[3:].digests()
    assert (part, again) == ([whole[7], whole[2]], whole[3:]) and sorted(data.read) == list(range(10))
    other = Examples(torch.tensor([[8.0]]), torch.zeros(1))
    assert joined([other, every[:1]]).digests() == [whole[8], whole[0]], "others' places are others' examples"


class Broken(Squares):
    def __getitem__(self, index: int) -> Any:
        match index:
            case 1:
                raise OSError("disk on fire")
            case 2:
                return torch.zeros(1)
            case 3:
                return torch.zeros(1, 2), 0
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (1, r"example 1 of Broken cannot be read \(OSError: disk on fire\)"),
        (2, r"example 2 of Broken: expected a pair \(input, target\), got float32 \(1,\)"),
        (3, r"differ in form: float32 \(1, 2\) in place 1, float32 \(1,\) in place 0; .*resizing or padding"),
    ],
)
def test_what_cannot_be_read_is_named(index: int, message: str) -> None:
    with pytest.raises(VictimError, match=message):
        Examples.read(Broken())[[0, index]].batch()


def test_a_worker_s_error_names_the_example() -> None:
    with pytest.raises(VictimError, match="example 1 of Broken cannot be read"):
        list(Examples.read(Broken(), workers=1).loader([[0], [1]]))


def test_targets_must_be_as_many_as_inputs() -> None:
    with pytest.raises(VictimError, match=r"a target for each input, got float32 \(3, 1\) and int64 \(2,\)"):
        Examples(torch.zeros(3, 1), torch.zeros(2, dtype=torch.int64))


def test_whatever_a_user_has_becomes_examples() -> None:
    assert examples_of(None) is None
    held = Examples(torch.zeros(2, 1))
    assert examples_of(held) is held
    assert examples_of(torch.zeros(5, 3)).stored and not examples_of(Squares()).stored  # type: ignore[union-attr]


def test_batches_of_every_form() -> None:
    tree = {"a": torch.arange(3), "b": (torch.zeros(3, 2), torch.ones(3))}
    assert trees.size(tree) == 3
    part = trees.take(tree, torch.tensor([2, 0]))
    assert part["a"].tolist() == [2, 0] and part["b"][0].shape == (2, 2)
    assert trees.join([tree, part])["a"].tolist() == [0, 1, 2, 2, 0]
    assert [e["a"].item() for e in trees.examples_of(tree)] == [0, 1, 2]
    images = [torch.zeros(3, 4, 4), torch.zeros(3, 5, 5)]
    assert trees.size(images) == 2 and trees.take(images, torch.tensor([1]))[0].shape == (3, 5, 5)
    assert trees.stack([{"x": 1.0}, {"x": 2.0}])["x"].tolist() == [1, 2]
    assert [trees.size(chunk) for chunk in trees.chunks(tree, 2)] == [2, 1]
    assert [trees.size(chunk) for chunk in trees.split(torch.zeros(5), 2)] == [2, 2, 1]
