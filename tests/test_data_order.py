"""Hashes and permutations: bijective for every size, spread evenly, equal for ever."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codistill.data.order import fraction_below, keyed, mix, permute


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**63 - 1))
def test_every_place_is_visited_once(size, key):
    index = np.arange(size)
    places = permute(index, size, np.full(size, key, dtype=np.uint64))
    assert sorted(places.tolist()) == index.tolist()


def test_hundred_million_rows_need_no_table():
    index = np.array([0, 1, 2, 99_999_999])
    places = permute(index, 100_000_000, np.full(4, 7, dtype=np.uint64))
    assert len(set(places.tolist())) == 4
    assert ((places >= 0) & (places < 100_000_000)).all()


@pytest.mark.parametrize("size", [2, 5, 10, 64, 100])
def test_every_place_is_as_likely_for_every_index(size):
    keys = keyed(np.arange(20_000), 3)
    for index in (0, 1, size - 1):
        places = permute(np.full(keys.size, index), size, keys)
        counts = np.bincount(places, minlength=size)
        expected = keys.size / size
        # The sum of squared deviations is chi-square: mean size - 1, variance 2 (size - 1).
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < size - 1 + 6 * np.sqrt(2 * size)


def test_neighbours_are_parted():
    places = permute(np.arange(10_000), 10_000, np.full(10_000, 5, dtype=np.uint64))
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.04
    assert np.mean(np.diff(np.sort(places[:100]))) > 50


def test_each_row_of_keys_is_its_own_permutation():
    index = np.tile(np.arange(50), 2)
    key = np.repeat(np.array([1, 2], dtype=np.uint64), 50)
    places = permute(index, 50, key)
    assert sorted(places[:50]) == sorted(places[50:]) == list(range(50))
    assert (places[:50] != places[50:]).any()


def test_golden_values_never_change():
    # The first two numbers of SplitMix64 with seed 0, known from its other implementations.
    first = mix(np.array([0x9E3779B97F4A7C15, 2 * 0x9E3779B97F4A7C15 % 2**64], dtype=np.uint64))
    assert first.tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert permute(np.arange(5), 1000, np.full(5, 42, dtype=np.uint64)).tolist() == [260, 198, 900, 746, 142]


def test_bounded_fractions_are_even():
    values = fraction_below(keyed(9, np.arange(100_000)), 7)
    counts = np.bincount(values, minlength=7)
    assert counts.size == 7
    assert abs(counts / 100_000 - 1 / 7).max() < 0.006
