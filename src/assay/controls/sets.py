"""Random sets with the make-up of a chosen one: is this circuit better than any circuit of its size?"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from assay.base.errors import SpecError
from assay.base.rng import numpy_stream

T = TypeVar("T", bound=Hashable)

_LIST_BELOW = 4  # list every set when there are fewer than this many times the number wanted


def count_matched_sets(chosen: Iterable[T], universe: Iterable[T], strata: Callable[[T], Hashable]) -> int:
    """Return how many sets have the make-up of the chosen one: the product over strata s of `C(N_s, k_s)`.

    The chosen set is one of them.

    Raises:
        SpecError: The chosen set holds something twice, or something that is not in the universe.

    Example:
        >>> count_matched_sets(["h0", "m0"], ["h0", "h1", "h2", "m0", "m1"], strata=lambda name: name[0])
        6
    """
    picked, pools = _pools(chosen, universe, strata)
    wanted = Counter(strata(item) for item in picked)
    return math.prod(math.comb(len(pools[stratum]), k) for stratum, k in wanted.items())


def matched_sets(
    chosen: Iterable[T],
    universe: Iterable[T],
    strata: Callable[[T], Hashable] = lambda item: 0,
    n: int = 100,
    seed: int = 0,
) -> tuple[frozenset[T], ...]:
    """Return n distinct random sets, uniform among those with as many members of each stratum as the chosen set has.

    The chosen set is never among them: it is the "1 +" of the p-value `(1 + #{null >= value}) / (n + 1)`.

    Args:
        chosen: The set under test, such as the top k components.
        universe: Everything the sets are drawn from. Its order decides which sets a seed gives; the order of `chosen`
            does not matter.
        strata: Maps a component to its stratum: its kind to match the number of heads and of MLPs, or (kind, layer) to
            match the layer profile too.
        n: Number of sets.
        seed: Seed of the stream.

    Raises:
        SpecError: Fewer than n other sets exist; or the chosen set holds something twice or not in the universe.

    Example:
        >>> sets = matched_sets({"h0", "m0"}, ["h0", "h1", "h2", "m0", "m1"], strata=lambda name: name[0], n=5)
        >>> sorted(map(sorted, sets))
        [['h0', 'm1'], ['h1', 'm0'], ['h1', 'm1'], ['h2', 'm0'], ['h2', 'm1']]
    """
    everything = tuple(universe)
    picked, pools = _pools(chosen, everything, strata)
    others = count_matched_sets(picked, everything, strata) - 1
    if n < 1 or others < n:
        wanted = Counter(strata(item) for item in picked)
        makeup = ", ".join(f"{k} of {len(pools[stratum])} in {stratum!r}" for stratum, k in wanted.items())
        advice = "ask for at least 1" if n < 1 else "ask for fewer, choose a smaller set, or use coarser strata"
        raise SpecError(
            f"{n} random sets were asked for and {others} others have this make-up ({makeup}); {advice}", "n"
        )
    # One stratum after the other, in the order of the universe, so that the order of the chosen set does not matter.
    counts = Counter(strata(item) for item in picked)
    parts = [(pool, counts[stratum]) for stratum, pool in pools.items() if counts[stratum]]
    rng = numpy_stream(seed, "matched sets")
    if others < _LIST_BELOW * n:
        combinations = itertools.product(*(itertools.combinations(pool, k) for pool, k in parts))
        listed = [found for found in map(_join, combinations) if found != picked]
        return tuple(listed[i] for i in rng.permutation(len(listed))[:n])
    return tuple(itertools.islice(_distinct(parts, picked, rng), n))


def _distinct(
    parts: list[tuple[list[T], int]], chosen: frozenset[T], rng: np.random.Generator
) -> Iterator[frozenset[T]]:
    seen = {chosen}
    while True:
        drawn = _join([pool[i] for i in rng.choice(len(pool), size=k, replace=False)] for pool, k in parts)
        if drawn not in seen:
            seen.add(drawn)
            yield drawn


def _join(parts: Iterable[Iterable[T]]) -> frozenset[T]:
    return frozenset(itertools.chain.from_iterable(parts))


def _pools(
    chosen: Iterable[T], universe: Iterable[T], strata: Callable[[T], Hashable]
) -> tuple[frozenset[T], dict[Hashable, list[T]]]:
    members, everything = tuple(chosen), dict.fromkeys(universe)
    picked = frozenset(members)
    if len(picked) != len(members):
        twice = [item for item, count in Counter(members).items() if count > 1]
        raise SpecError(f"the chosen set holds {twice[0]!r} {members.count(twice[0])} times", "chosen")
    if missing := [item for item in members if item not in everything]:
        raise SpecError(f"{missing[0]!r} is in the chosen set and not in the universe of {len(everything)}", "chosen")
    if not members:
        raise SpecError("the chosen set is empty; there is nothing to match", "chosen")
    pools: dict[Hashable, list[T]] = {}
    for item in everything:
        pools.setdefault(strata(item), []).append(item)
    return picked, pools
