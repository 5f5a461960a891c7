"""An effect over prompts comes with an interval and a null."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from assay.base.errors import NumericalError, SpecError
from assay.base.stats import bootstrap_interval, sign_flip_test
from assay.controls import prompt_effect, verdict


def test_the_parts_are_those_of_the_statistics():
    values = np.random.default_rng(0).normal(1, 1, size=16)
    effect = prompt_effect(values, seed=3)
    test = sign_flip_test(values, n=999, seed=3)
    assert effect.estimate == pytest.approx(values.mean())
    assert effect.control.null == pytest.approx(test.null)
    assert effect.control.p == test.p
    assert effect.interval == bootstrap_interval(values, seed=3)
    assert (effect.n, len(effect.control.null)) == (16, 999)


def test_a_real_effect_is_supported_and_an_opposite_one_contradicted():
    values = np.random.default_rng(1).normal(2, 1, size=16)
    for sign, expected in ((1, "supported"), (-1, "contradicted")):
        effect = prompt_effect(sign * values)
        assert verdict(effect.estimate, [effect.control], effect.interval) == expected


def test_no_effect_has_a_uniform_p():
    rng = np.random.default_rng(2)
    p = [prompt_effect(rng.normal(size=16), n_flips=99, n_boot=100, seed=i).control.p for i in range(400)]
    assert scipy.stats.kstest(p, np.linspace(0.01, 1, 100).tolist()).pvalue > 0.01


def test_groups_count_as_one_variation_each():
    values = np.repeat([1.0, 2.0, 3.0], 6)
    effect = prompt_effect(values, groups=np.repeat(["a", "b", "c"], 6).tolist())
    assert (effect.n, len(effect.control.null), effect.control.p) == (3, 7, 0.125)
    assert effect.interval is not None
    assert effect.interval.method == "BCa bootstrap over 3 groups"
    assert "by group" in effect.control.description


def test_one_variation_has_no_interval_and_cannot_be_tested():
    effect = prompt_effect([3.0])
    assert effect.interval is None
    assert verdict(effect.estimate, [effect.control]) == "not testable"


def test_bad_values_are_refused():
    with pytest.raises(SpecError, match="at least one value"):
        prompt_effect([])
    with pytest.raises(NumericalError, match="1 of 2"):
        prompt_effect([1.0, math.nan])
