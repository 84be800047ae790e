"""Outcomes come back from their text as they were, and take the room that is said."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepenc.arena.outcomes import pack, unpack
from deepenc.errors import StoreError

halves = st.floats(-100, 100, width=16)


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]) | halves, max_size=5), max_size=20))
def test_what_half_precision_holds_comes_back(outcomes) -> None:
    back = unpack(pack([np.array(outcome) for outcome in outcomes]))
    assert [list(outcome) for outcome in back] == outcomes


def test_other_numbers_come_back_in_single_precision() -> None:
    values = np.random.default_rng(0).normal(size=(50, 3))
    np.testing.assert_array_equal(np.stack(unpack(pack(list(values)))), values.astype(np.float32))


def test_ten_thousand_hits_take_bits() -> None:
    hits = np.random.default_rng(0).integers(0, 2, (10_000, 1)).astype(float)
    assert len(pack(list(hits))) < 10_000 / 8 * 1.25 + 200


@pytest.mark.parametrize("text", ["", "x", "é", pack([np.ones(3)])[:-3]])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        unpack(text)
