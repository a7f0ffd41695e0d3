"""Order and chance without state: hashes of counters, and permutations that need no table.

Everything here is vectorised over uint64 arrays and equal on every machine. `key` is always an array, so that the
rows of one batch may belong to different epochs.
"""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_ROUNDS = 6


def mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): uint64 in, as many well-mixed uint64 out."""
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))


def keyed(key: int | np.ndarray, *counters: np.ndarray | int) -> np.ndarray:
    """One uint64 for each entry of the (broadcast) counters, independent for every key and every counter."""
    state = mix(np.atleast_1d(np.asarray(key, dtype=np.uint64)))
    for counter in counters:
        state = mix(state + (np.atleast_1d(counter).astype(np.uint64) + np.uint64(1)) * GOLDEN)
    return state


def fraction_below(hashes: np.ndarray, bound: int) -> np.ndarray:
    """Integers in [0, bound) from hashes, uniform to within bound / 2**32; int64."""
    return (((hashes >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Where a seeded permutation of [0, size) sends `index`: int64; `key` is a uint64 array of the same shape.

    Rounds of xor, odd multiplication and shift are each a bijection of the next power of two; a value that falls
    outside [0, size) is sent on until it falls inside (cycle walking), which is a bijection of [0, size). No table:
    the memory is that of `index`.
    """
    # Below 8 bits the rounds reach too few permutations (seen as uneven places of 5 and of 10 rows).
    bits = max(8, int(size - 1).bit_length())
    value = _scramble(index.astype(np.uint64), bits, key)
    outside = np.flatnonzero(value >= size)
    while outside.size:
        value[outside] = _scramble(value[outside], bits, key[outside])
        outside = outside[value[outside] >= size]
    return value.astype(np.int64)


def _scramble(value: np.ndarray, bits: int, key: np.ndarray) -> np.ndarray:
    mask, shift = np.uint64(2**bits - 1), np.uint64((bits + 1) // 2)
    for turn in range(_ROUNDS):
        noise = keyed(key, turn)
        value = ((value ^ (noise >> np.uint64(7))) * (noise | np.uint64(1))) & mask
        value ^= value >> shift
    return value
