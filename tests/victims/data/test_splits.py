"""Parts never overlap; hashes tell everything apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deepenc.arena.metrics import judge
from deepenc.errors import VictimError
from deepenc.tasks.classification import Classification
from deepenc.tasks.examples import Examples
from deepenc.victims.data.splits import checksum, digests, fingerprint, split


@given(
    st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=30),
    st.lists(st.integers(0, 10), min_size=1, max_size=4),
)
def test_parts_share_no_image_even_where_images_are_equal(ids, sizes):
    if sum(sizes) > len(ids):
        with pytest.raises(VictimError, match="add images"):
            split(ids, sizes)
        return
    parts = split(ids, sizes)
    assert all(len(part) <= size for part, size in zip(parts, sizes, strict=True))
    for one, two in itertools.combinations(parts, 2):
        assert not {ids[i] for i in one} & {ids[i] for i in two}
    assert len(set(np.concatenate(parts).tolist())) == sum(map(len, parts))


@given(st.lists(st.binary(min_size=4, max_size=4), unique=True, min_size=6, max_size=20), st.randoms())
def test_distinct_images_fill_the_sizes_whatever_their_order(ids, random):
    first = split(ids, [2, 4])
    assert [len(part) for part in first] == [2, 4]
    shuffled = random.sample(ids, len(ids))
    again = split(shuffled, [2, 4])
    assert [{ids[i] for i in p} for p in first] == [{shuffled[i] for i in p} for p in again]


def test_digests_follow_the_pixels():
    images = np.arange(12).reshape(3, 2, 2)
    images[2] = images[0]
    one, two, three = digests(images)
    assert one == three != two


def test_fingerprint_sees_weights_inputs_and_labels():
    model = nn.Linear(2, 2)
    images = Examples(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    seen = {fingerprint(model, images)}
    seen.add(fingerprint(model, Examples(images.inputs + 1, images.targets)))
    seen.add(fingerprint(model, Examples(images.inputs, images.targets + 1)))
    seen.add(fingerprint(model, images, images))
    with torch.no_grad():
        model.weight[0, 0] += 1
    seen.add(fingerprint(model, images))
    assert len(seen) == 5


def test_checksum_sees_types_shapes_and_names():
    values = torch.zeros(4)
    different = [{"a": values}, {"b": values}, {"a": values.view(2, 2)}, {"a": values.int()}, {}]
    assert len({checksum(d) for d in different}) == 5
    assert checksum({"a": values, "b": values + 1}) == checksum({"b": values + 1, "a": values})
    assert checksum({"a": torch.tensor(1.0)}) == checksum({"a": torch.tensor(1.0)})


def test_chosen_examples_are_copies():
    images = Examples(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    part = images[[3, 0]]
    part.inputs.fill_(9)
    assert torch.equal(images.inputs, torch.eye(4)) and part.targets.tolist() == [0, 0]
    judged = judge(nn.Identity(), images, Classification(), who="test", batch=3)
    assert (judged.value, judged.examples) == (3 / 4, 4)
