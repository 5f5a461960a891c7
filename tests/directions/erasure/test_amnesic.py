"""Amnesic probing: the cost of an erasure beside that of random erasures of its rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from assay.base.errors import SpecError
from assay.directions.erasure import Eraser, amnesic, leace, random_erasers
from assay.directions.erasure.amnesic import divergences, next_token_losses

SITE = "blocks.2.resid_post"
TEXTS = ["When Mary and John went to the store", "The capital of France is Paris", "John gave a drink to Mary"]
D = 32


def orthogonal(rows: np.ndarray, mean: np.ndarray | None = None) -> Eraser:
    basis = np.linalg.qr(rows.T)[0].T
    return Eraser(site=SITE, read=basis, write=basis, mean=np.zeros(rows.shape[1]) if mean is None else mean)


def test_random_erasers_have_the_rank_the_mean_and_the_kind() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((500, D)) * np.geomspace(5, 0.05, D) + 2, np.arange(500) % 3
    x = x + np.eye(D)[y]
    oblique, flat = leace(x, y, site=SITE), orthogonal(rng.standard_normal((2, D)), x.mean(0))
    for true in (oblique, flat):
        for kind in ("isotropic", "covariance-matched"):
            drawn = random_erasers(true, 5, kind, x, seed=1)
            assert [(one.rank, one.site) for one in drawn] == [(2, SITE)] * 5
            assert all(np.array_equal(one.mean, true.mean) for one in drawn)
            assert all(one.orthogonal for one in drawn) == (kind == "isotropic" or true.orthogonal)
            again = random_erasers(true, 5, kind, x, seed=1)
            assert all(np.array_equal(a.read, b.read) for a, b in zip(drawn, again, strict=True))
    spread = {
        kind: np.mean([((one(x) - x) ** 2).sum() for one in random_erasers(flat, 40, kind, x)])
        for kind in ("isotropic", "covariance-matched")
    }
    assert spread["covariance-matched"] > 3 * spread["isotropic"]  # where activations vary, there is more to take


def test_nothing_erased_costs_nothing_and_everything_costs_most(tiny_subject: Any) -> None:
    """The dimensions that the text uses, against random ones: the whole spread of the activations is taken out."""
    held = tiny_subject.run(TEXTS, capture=SITE)
    x = torch.cat(
        [held[SITE][r, s : s + n] for r, (s, n) in enumerate(zip(held.batch.starts, held.batch.lengths, strict=True))]
    )
    rows = x.double().numpy()
    used = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:12]
    true = orthogonal(used, rows.mean(0))
    arms = {kind: random_erasers(true, 19, kind, rows) for kind in ("isotropic", "covariance-matched")}
    found = amnesic(tiny_subject, TEXTS, true, arms)
    assert found.rank == 12 and set(found.arms) == set(arms)
    assert found.kl > np.median(found.arms["isotropic"].kl)
    assert found.arms["isotropic"].p_kl == (1 + (found.arms["isotropic"].kl >= found.kl).sum()) / 20
    assert found.by_prompt.mean() == pytest.approx(found.loss)
    empty = Eraser(site=SITE, read=np.zeros((0, D)), write=np.zeros((0, D)), mean=np.zeros(D))
    nothing = amnesic(tiny_subject, TEXTS, empty, {"none": [empty]})
    assert (nothing.loss, nothing.kl) == (0.0, 0.0)


def test_losses_and_divergences_are_those_of_each_prompt_alone(tiny_subject: Any) -> None:
    together, other = tiny_subject.run(TEXTS), tiny_subject.run(TEXTS, edits=orthogonal(np.eye(D)[:9]).edits())
    for row, text in enumerate(TEXTS):
        alone, edited = tiny_subject.run(text), tiny_subject.run(text, edits=orthogonal(np.eye(D)[:9]).edits())
        p = alone.logits[0].softmax(-1)
        by_hand = -p[torch.arange(len(p) - 1), alone.tokens[0, 1:]].log().mean()
        assert next_token_losses(together)[row] == pytest.approx(float(by_hand), rel=1e-4)
        kl = (p * (p.log() - edited.logits[0].softmax(-1).log())).sum(-1).mean()
        assert divergences(together, other)[row] == pytest.approx(float(kl), rel=1e-3)


def test_what_cannot_be_compared_is_refused(tiny_subject: Any) -> None:
    true = orthogonal(np.eye(D)[:2])
    with pytest.raises(SpecError, match="arms take out"):
        amnesic(tiny_subject, TEXTS, true, {"one": [orthogonal(np.eye(D)[:1])]})
    with pytest.raises(SpecError, match="at least one arm"):
        amnesic(tiny_subject, TEXTS, true, {})
    with pytest.raises(SpecError, match="needs two or more"):
        amnesic(tiny_subject, torch.tensor([[5]]), true, {"one": [true]})
    with pytest.raises(SpecError, match="need activations="):
        random_erasers(true, 3, "covariance-matched")
