"""The effect over variations of a prompt: its mean, how sure we are of it, and whether chance could have given it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from assay.base.errors import SpecError
from assay.base.findings import Control
from assay.base.stats import Interval, Numbers, Side, bootstrap_interval, sign_flip_test
from assay.controls.verdicts import compare


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEffect:
    """An effect averaged over variations of a prompt.

    Args:
        estimate: Its mean.
        interval: The bootstrap interval of the mean, over variations or over groups of them; None for a single one.
        control: The sign-flip null.
        n: The number of independent variations: groups where there are groups.
    """

    estimate: float
    interval: Interval | None
    control: Control
    n: int


def prompt_effect(
    values: Numbers,
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    n_boot: int = 2000,
    n_flips: int = 999,
    seed: int = 0,
    side: Side = "greater",
) -> PromptEffect:
    """Return the mean effect over prompt variations with a bootstrap interval and a sign-flip control.

    The null swaps answer and foil in a random choice of the variations. The effect is a difference between the two, so
    a swap turns its sign; without an effect, every pattern of signs is as likely as the observed one.

    Args:
        values: The effect in each variation, signed: positive when it favours the answer.
        groups: The template or entity of each variation, if several share one; groups are resampled and flipped whole.
        level: Nominal coverage of the interval.
        n_boot: Resamples of the bootstrap.
        n_flips: Sign patterns drawn; all of them are listed when there are no more than these.
        seed: Seed of the streams.
        side: The direction of the claim.

    Raises:
        SpecError: No values, or the lengths of `groups` and `values` differ.
        NumericalError: A value is not finite.

    Example:
        >>> effect = prompt_effect([2.0, 1.5, 2.5, 1.8, 2.2, 1.9])
        >>> round(effect.estimate, 2), effect.control.p, effect.interval.excludes(0)
        (1.98, 0.015625, True)
    """
    data = np.asarray(values, dtype=np.float64).ravel()
    if not data.size:
        raise SpecError("an effect over prompts needs at least one value, got none", "values")
    test = sign_flip_test(data, n=n_flips, seed=seed, side=side, groups=groups)
    n = data.size if groups is None else len(set(groups))
    interval = None
    if n > 1:
        interval = bootstrap_interval(data, level=level, n_boot=n_boot, seed=seed, groups=groups)
    swapped = "answer and foil swapped in a random choice of the variations" + ("" if groups is None else ", by group")
    return PromptEffect(
        estimate=test.value,
        interval=interval,
        control=compare("swapped answers", swapped, test.value, test.null, side),
        n=n,
    )
