"""Spectrum-matched activations, semantic directions and step-0 checkpoints: the same pipeline on other material."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import assay
from assay.base.errors import NumericalError, SpecError
from assay.base.moments import Moments
from assay.controls.activations import spectrum_matched_activations
from assay.controls.directions import semantic_directions
from assay.controls.weights import checkpoint_control, reinitialised_module

RNG = np.random.default_rng(0)
ROWS = 3 + RNG.exponential(size=(600, 6)) * np.geomspace(10, 0.1, 6)


@pytest.mark.parametrize("source", [ROWS, Moments.of(ROWS)], ids=["rows", "moments"])
def test_mean_and_covariance_are_kept_and_everything_else_is_gaussian(source):
    drawn = spectrum_matched_activations(source, n=20_000, seed=1)
    sd = ROWS.std(axis=0)
    assert (np.abs(drawn.mean(axis=0) - ROWS.mean(axis=0)) < 5 * sd / np.sqrt(20_000)).all()
    assert np.cov((drawn / sd).T) == pytest.approx(np.cov((ROWS / sd).T), abs=0.05)
    assert np.abs(scipy.stats.skew(ROWS)).min() > 1
    assert np.abs(scipy.stats.skew(drawn)).max() < 0.1
    assert scipy.stats.kstest((drawn[:, 0] - ROWS[:, 0].mean()) / ROWS[:, 0].std(ddof=1), "norm").pvalue > 0.01


def test_few_rows_give_draws_of_their_rank():
    few = RNG.normal(size=(5, 40)) + 7
    drawn = spectrum_matched_activations(few, n=3000)
    centred = few - few.mean(axis=0)
    assert np.linalg.matrix_rank(np.vstack([centred, drawn - few.mean(axis=0)]), tol=1e-8) == 4
    error = np.linalg.norm(np.cov(drawn.T) - np.cov(few.T)) / np.linalg.norm(np.cov(few.T))
    assert error < 0.1
    assert spectrum_matched_activations(few).shape == few.shape


def test_a_constant_dimension_stays_constant_in_many_rows():
    rows = np.column_stack([ROWS, np.full(600, 2.0), ROWS[:, 0] + ROWS[:, 1]])
    drawn = spectrum_matched_activations(rows)
    assert np.abs(drawn[:, 6] - 2).max() < 1e-6
    assert np.abs(drawn[:, 0] + drawn[:, 1] - drawn[:, 7]).max() < 1e-5


def test_kind_type_and_seed():
    for rows in (ROWS.astype(np.float32), ROWS[:4].astype(np.float32)):
        assert spectrum_matched_activations(rows).dtype == np.float32
    tensor = torch.tensor(ROWS, dtype=torch.bfloat16)
    drawn = spectrum_matched_activations(tensor, n=9)
    assert (drawn.dtype, drawn.shape) == (torch.bfloat16, (9, 6))
    same = spectrum_matched_activations(ROWS, seed=2)
    assert np.array_equal(same, spectrum_matched_activations(ROWS, seed=2))
    assert not np.allclose(same, spectrum_matched_activations(ROWS, seed=3))


def test_bad_activations_are_refused():
    with pytest.raises(NumericalError, match="do not vary"):
        spectrum_matched_activations(np.ones((3, 5)))
    with pytest.raises(NumericalError, match="do not vary"):
        spectrum_matched_activations(np.ones((9, 5)))
    with pytest.raises(NumericalError, match="not all finite"):
        spectrum_matched_activations(np.full((9, 5), np.nan))
    with pytest.raises(SpecError, match="two rows or more"):
        spectrum_matched_activations(np.ones((1, 5)))
    with pytest.raises(SpecError, match="n is 0"):
        spectrum_matched_activations(ROWS, n=0)


def gap(rows, labels):
    return rows[labels].mean(axis=0) - rows[~labels].mean(axis=0)


def test_semantic_directions_are_the_same_extraction_at_the_same_norm():
    direction = RNG.normal(size=6)
    contrasts = [(ROWS, RNG.random(600) < 0.5) for _ in range(4)]
    drawn = semantic_directions(direction, contrasts, gap)
    assert np.linalg.norm(drawn, axis=1) == pytest.approx(np.linalg.norm(direction))
    for found, (rows, labels) in zip(drawn, contrasts, strict=True):
        expected = gap(rows, labels)
        assert found @ expected == pytest.approx(np.linalg.norm(found) * np.linalg.norm(expected))
    tensor = semantic_directions(torch.tensor(direction).float(), contrasts, lambda r, y: torch.tensor(gap(r, y)))
    assert tensor.dtype == torch.float32
    assert tensor.numpy() == pytest.approx(drawn, rel=1e-5)


def test_bad_contrasts_are_named():
    direction = np.ones(6)
    with pytest.raises(SpecError, match="at least one other contrast"):
        semantic_directions(direction, [], gap)
    with pytest.raises(SpecError, match=r"contrast 1 gives the shape \(5,\)"):
        semantic_directions(direction, [(0, 6), (0, 5)], lambda rows, d: np.ones(d))
    with pytest.raises(NumericalError, match="contrast 0 gives a vector that is zero"):
        semantic_directions(direction, [(0, 0)], lambda rows, labels: np.zeros(6))


def size(given):
    module = given if isinstance(given, nn.Module) else given.module
    return float(sum(p.detach().double().pow(2).sum() for p in module.parameters()))


def test_step_0_checkpoints_are_a_null_of_the_same_pipeline(tiny_module):
    trained = tiny_module("llama")
    before = [tiny_module("llama", seed=seed) for seed in (1, 2, 3)]
    control = checkpoint_control(size, trained, before)
    assert control.null == tuple(map(size, before))
    assert control.p == (1 + sum(draw >= size(trained) for draw in control.null)) / 4
    lazy = checkpoint_control(size, trained, (lambda seed=seed: tiny_module("llama", seed=seed) for seed in (1, 2, 3)))
    assert lazy.null == control.null
    subjects = checkpoint_control(size, assay.load(trained), [assay.load(before[0])], side="less")
    assert subjects.null == control.null[:1]
    assert subjects.side == "less"


def test_a_checkpoint_must_be_the_same_architecture_and_another_model(tiny_module):
    trained = tiny_module("llama")
    with pytest.raises(SpecError, match="another architecture"):
        checkpoint_control(size, trained, [tiny_module("llama", num_hidden_layers=2)])
    with pytest.raises(SpecError, match="has the trained weights"):
        checkpoint_control(size, trained, [tiny_module("llama")])
    with pytest.raises(SpecError, match="no checkpoint"):
        checkpoint_control(size, trained, [])
    with pytest.raises(SpecError, match="not str"):
        checkpoint_control(size, trained, ["step0"])
    assert len(checkpoint_control(size, trained, [reinitialised_module(trained, "gaussian", seed=0)]).null) == 1
