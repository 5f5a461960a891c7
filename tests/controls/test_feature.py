"""A feature of the model, of the data, or undecided: each step's numbers, its uniform p, and what follows."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats

from assay.base.errors import NumericalError, SpecError
from assay.base.stats import benjamini_hochberg, spearman
from assay.controls.feature import (
    CAUSAL,
    dose_step,
    effect_step,
    feature_verdict,
    null_step,
    recurrence_step,
    specificity_step,
)

DOSES = [0.5, 0.75, 0.9, 0.95, 0.99]


def steps(rng, effect=2.0, decodes=True, reinitialised=0.0, rows=30):
    """All steps of a feature whose causal effect is `effect` standard deviations, and of its twin in random weights."""
    noise = rng.normal
    return [
        null_step("decodes", 5.0 * decodes + noise(), noise(size=199)),
        effect_step("necessity", effect + noise(size=rows)),
        effect_step("sufficiency", effect + noise(size=rows)),
        specificity_step(np.abs(noise(size=rows)) + effect, np.abs(noise(size=rows))),
        dose_step(DOSES, effect * np.arange(5) + noise(size=(rows, 5))),
        null_step("random directions", 3 * effect + noise(), noise(size=200)),
        null_step("matched latents", 3 * effect + noise(), noise(size=50)),
        null_step("re-initialised", 6.0 - reinitialised, noise(size=39)),
        recurrence_step(0.8),
    ]


def test_a_causal_feature_is_the_models_and_one_that_only_decodes_is_the_datas():
    rng = np.random.default_rng(0)
    report = feature_verdict(steps(rng))
    assert report.verdict == "model feature"
    assert all(report[name].passed for name in (*CAUSAL, "decodes", "re-initialised", "other data"))
    found = [feature_verdict(steps(rng, effect=0.0)).verdict for _ in range(40)]
    assert "model feature" not in found
    assert found.count("data-set feature") >= 35


def test_what_random_weights_have_too_or_nothing_decodes_is_undecided():
    rng = np.random.default_rng(1)
    report = feature_verdict(steps(rng, reinitialised=6.0))
    assert report.verdict == "undecided"
    assert report.reason == "re-initialised failed"
    assert feature_verdict(steps(rng, effect=0.0, decodes=False)).verdict == "undecided"


@pytest.mark.parametrize("left_out", [*CAUSAL, "re-initialised"])
def test_a_step_not_taken_leaves_it_undecided_and_is_named(left_out):
    rng = np.random.default_rng(2)
    report = feature_verdict([step for step in steps(rng) if step.name != left_out])
    assert report.verdict == "undecided"
    assert f"{left_out} not tested" in report.reason
    assert report[left_out].note == "not taken"
    assert math.isnan(report[left_out].value)


def test_an_effect_of_the_wrong_sign_fails():
    rng = np.random.default_rng(3)
    report = feature_verdict(
        [s if s.name != "sufficiency" else effect_step("sufficiency", -2 - rng.random(30)) for s in steps(rng)]
    )
    assert report["sufficiency"].passed is False
    assert report.verdict == "undecided"


def test_too_few_draws_test_nothing():
    rng = np.random.default_rng(4)
    few = {
        "random directions": null_step("random directions", 9.0, rng.normal(size=199)),
        "matched latents": null_step("matched latents", 9.0, rng.normal(size=49)),
        "re-initialised": null_step("re-initialised", 9.0, rng.normal(size=18)),
        "necessity": effect_step("necessity", [1.0, 2.0, 3.0, 4.0]),
    }
    for name, step in few.items():
        report = feature_verdict([step if s.name == name else s for s in steps(rng)])
        assert report[name].passed is None
        assert "too few" in report[name].note
        assert report.verdict == "undecided"
    # Neither is it the data's when the tests could not have found anything.
    short = [effect_step("necessity", [0.1, -0.2]), effect_step("sufficiency", [0.1, -0.2])]
    report = feature_verdict([null_step("decodes", 9.0, rng.normal(size=99)), *short])
    assert report.verdict == "undecided"


def test_p_values_are_adjusted_together_and_other_data_stays_outside():
    rng = np.random.default_rng(5)
    given = steps(rng, effect=0.3)
    report = feature_verdict(given)
    inside = [step for step in given if step.name != "other data"]
    expected = benjamini_hochberg([step.p for step in inside])
    assert [report[step.name].adjusted for step in inside] == pytest.approx(expected.tolist())
    assert report["other data"].adjusted is None
    for cosine in (0.71, 0.69):
        again = feature_verdict([*given[:-1], recurrence_step(cosine, null=[0.1] * 99)])
        assert again["other data"].passed is (cosine > 0.7)
        assert again["other data"].p == pytest.approx(0.01)
        assert again.verdict == report.verdict
    assert again.to_dict()["steps"][0]["name"] == "decodes"
    assert json.loads(json.dumps(feature_verdict(given).to_dict()))["verdict"] == report.verdict
    assert str(report).startswith(report.verdict)
    assert len(str(report).splitlines()) == 10


def uniform(draw, n=200, least=0.01):
    p = [draw(np.random.default_rng(seed), seed) for seed in range(n)]
    return scipy.stats.kstest(p, np.linspace(least, 1, round(1 / least)).tolist()).pvalue


def test_the_p_of_every_step_is_uniform_under_its_null():
    normal = np.random.Generator.normal
    draws = {
        "effect": lambda rng, seed: effect_step("necessity", normal(rng, size=20), n=99, seed=seed).p,
        "grouped effect": lambda rng, seed: (
            effect_step(
                "sufficiency", normal(rng, size=15).repeat(3), np.arange(15).repeat(3).tolist(), n=99, seed=seed
            ).p
        ),
        "specificity": lambda rng, seed: (
            specificity_step(rng.gamma(1, size=20), rng.gamma(1, size=20), n=99, seed=seed).p
        ),
        "null": lambda rng, seed: null_step("decodes", normal(rng), normal(rng, size=99)).p,
    }
    for name, draw in draws.items():
        assert uniform(draw) > 0.01, name


@pytest.mark.parametrize("grouped", [False, True])
def test_the_p_of_a_dose_response_is_uniform_where_the_dose_does_nothing(grouped):
    """Prompts differ in level, and prompts of a group share their curve."""
    p = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        effects = rng.normal(size=(20, 1)) * 5 + rng.normal(size=(20, 7))
        groups = None
        if grouped:
            effects, groups = effects[:8].repeat(3, axis=0), np.arange(8).repeat(3).tolist()
        p.append(dose_step(np.arange(7.0), effects, groups, n=99, seed=seed).p)
    # The value is discrete (ranks), so p may be larger than uniform by a tie.
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.045)
    assert scipy.stats.kstest(p, np.linspace(0.01, 1, 100).tolist()).pvalue > 0.01


def test_a_single_curve_is_held_against_every_order_of_the_doses():
    effects = [0.1, 0.3, 0.2, 0.9, 1.4]
    step = dose_step(DOSES, effects)
    exact = np.mean([spearman(DOSES, order) >= step.value - 1e-9 for order in itertools.permutations(effects)])
    assert step.value == pytest.approx(spearman(DOSES, effects))
    assert step.p == pytest.approx(exact)
    assert dose_step(DOSES, sorted(effects)).p == pytest.approx(1 / 120)
    assert dose_step(DOSES[::-1], sorted(effects)).p == 1.0
    assert dose_step(DOSES, np.ones(5)).p == 1.0
    two = dose_step(DOSES, [sorted(effects), effects], n=120**2)
    assert two.value == pytest.approx((1 + spearman(DOSES, effects)) / 2)
    assert two.least_p == pytest.approx(1 / 120**2)


def test_the_percentile_is_the_place_in_the_null():
    assert null_step("matched latents", 2.5, np.arange(100.0)).percentile == 3.0
    assert null_step("matched latents", 2.0, np.arange(100.0)).percentile == 2.5
    assert null_step("re-initialised", -1.0, np.arange(99.0), side="less").p == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: effect_step("necessity", []), SpecError, "effects is empty"),
        (lambda: effect_step("necessity", [math.nan]), NumericalError, "1 of 1"),
        (lambda: specificity_step([1.0], [1.0, 2.0]), SpecError, "1 contexts on and 2 off"),
        (lambda: dose_step([1, 2, 3, 4], [1, 2, 3, 4]), SpecError, "5 different doses"),
        (lambda: dose_step([1, 1, 3, 4, 5], [1, 2, 3, 4, 5]), SpecError, "5 different doses"),
        (lambda: dose_step(DOSES, [1, 2, 3]), SpecError, r"shape \(1, 3\) for 5 doses"),
        (lambda: dose_step(DOSES, np.ones((2, 5)), ["a"]), SpecError, "1 labels for 2 prompts"),
        (lambda: null_step("decodes", 1.0, []), SpecError, "null is empty"),
        (lambda: recurrence_step(1.2), SpecError, r"cosine is 1\.2"),
        (lambda: feature_verdict([recurrence_step(0.1)] * 2), SpecError, "given 2 times"),
        (lambda: feature_verdict([], alpha=0.0), SpecError, r"alpha is 0\.0"),
        (lambda: feature_verdict([])["size"], SpecError, "'size' is no step"),
    ],
)
def test_bad_input_is_quoted(call, error, message):
    with pytest.raises(error, match=message):
        call()
