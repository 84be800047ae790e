from __future__ import annotations

from itertools import combinations
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepenc.encryption.keys.ranks import rank, unrank
from deepenc.errors import ConfigError


@pytest.mark.parametrize("total", range(1, 8))
@pytest.mark.parametrize("count", range(0, 8))
def test_ranks_number_all_combinations_in_colexicographic_order(total: int, count: int) -> None:
    expected = sorted(combinations(range(total), count), key=lambda c: c[::-1])
    assert [rank(c, total) for c in expected] == list(range(comb(total, count)))
    assert [unrank(n, total, count) for n in range(len(expected))] == expected


@given(st.data())
def test_rank_of_large_combinations_is_the_sum_of_binomials(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 400))
    positions = tuple(sorted(data.draw(st.sets(st.integers(0, total - 1), max_size=60))))
    number = rank(positions, total)
    assert number == sum(comb(p, i + 1) for i, p in enumerate(positions))
    assert unrank(number, total, len(positions)) == positions


@pytest.mark.parametrize(("number", "total", "count"), [(-1, 5, 2), (10, 5, 2), (0, 3, 4), (0, 3, -1)])
def test_what_is_no_rank_is_refused(number: int, total: int, count: int) -> None:
    with pytest.raises(ConfigError, match="rank"):
        unrank(number, total, count)
