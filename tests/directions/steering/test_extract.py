"""Extraction: each method is its formula, points the right way, and says where it comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay import Subject
from assay.base.errors import InvalidEdit, NumericalError, SpecError
from assay.directions import read_sites
from assay.directions.steering.extract import Contrast, activation_addition, agreement, direction_of, extract

SITE = "blocks.1.resid_post"
POSITIVE = ("When Mary went", "the store gave Mary", "Mary and John went", "When the drink gave Mary")
NEGATIVE = ("When John went", "the store gave John", "John and Mary went", "When the milk gave John")
PAIRS = Contrast(positive=POSITIVE, negative=NEGATIVE, groups=("a", "b", "a", "c"), writes="Mary")


def rows(seed: int, n: int = 40, d: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that differ by a shift along the first axis, and vary along the second."""
    rng = np.random.default_rng(seed)
    base, noise = rng.normal(size=(n, d)), 0.1 * rng.normal(size=(n, d))
    noise[:, 0] += 2.0
    noise[:, 1] += rng.choice([-5.0, 5.0], size=n)
    return base + noise / 2, base - noise / 2


@pytest.mark.parametrize("method", ["difference of means", "caa"])
def test_a_mean_difference_is_what_numpy_says(gpt2: Subject, method: Any) -> None:
    made = extract(gpt2, PAIRS, ["blocks.0.resid_post", SITE], method)
    assert list(made) == ["blocks.0.resid_post", SITE]
    a, b = (read_sites(gpt2, texts, SITE)[SITE].astype(np.float64) for texts in (POSITIVE, NEGATIVE))
    found = made[SITE]
    np.testing.assert_allclose(found.vector.numpy(), a.mean(0) - b.mean(0), rtol=1e-5, atol=1e-6)
    assert found.size == pytest.approx(np.linalg.norm(np.concatenate([a, b]), axis=1).mean())
    assert found.level == pytest.approx(float(b.mean(0) @ found.unit.double().numpy()), rel=1e-5)
    assert found.writes == "towards Mary"


def test_setting_to_the_level_puts_the_first_class_where_the_second_lies(gpt2: Subject) -> None:
    found = extract(gpt2, PAIRS, SITE)[SITE]
    run = gpt2.run(list(POSITIVE), capture=SITE, edits=found.clamp())
    along = run.batch.last(run[SITE]) @ found.unit
    assert torch.allclose(along, torch.full_like(along, found.level), atol=1e-4)


def test_the_origin_has_hashes_and_the_split(gpt2: Subject) -> None:
    train, test = PAIRS.split(held_out=0.4, seed=1)
    made = extract(gpt2, PAIRS, SITE, "caa", train=train, test=test)[SITE]
    origin = made.origin
    assert (origin.method, origin.subject, origin.data) == ("caa", gpt2.fingerprint, PAIRS.digest)
    assert (origin.train, origin.test) == (train, test)
    a, b = (read_sites(gpt2, texts, SITE)[SITE] for texts in (POSITIVE, NEGATIVE))
    expected = np.mean([(a[i] - b[i]) @ made.vector.numpy() > 0 for i in test])
    assert origin.detail["ordered"] == expected
    assert origin.detail["agreement"] == pytest.approx(agreement(a[list(train)], b[list(train)]))
    fitted = extract(gpt2, PAIRS, SITE, "caa", test=test)[SITE]
    assert torch.equal(fitted.vector, made.vector)
    assert not torch.equal(extract(gpt2, PAIRS, SITE, "caa")[SITE].vector, made.vector)


def test_pca_is_sklearns(gpt2: Subject) -> None:
    from sklearn.decomposition import PCA

    a, b = rows(0)
    middle = (a + b) / 2
    for method, data in (("pca_diff", a - b), ("pca_center", np.concatenate([a - middle, b - middle]))):
        axis = PCA(n_components=1).fit(data).components_[0]
        found = direction_of(a, b, method)  # type: ignore[arg-type]
        assert abs(found @ axis) / np.linalg.norm(found) == pytest.approx(1, abs=1e-9)


def test_the_centring_of_pca_diff_removes_the_shift_that_a_mean_difference_finds() -> None:
    """With a shift of 2 on one axis and a spread of 1 on another, pca_diff takes the spread."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(200, 5))
    difference = 0.1 * rng.normal(size=(200, 5))
    difference[:, 0] += 2.0
    difference[:, 1] += rng.normal(size=200)
    units = {m: direction_of(base + difference, base, m) for m in ("caa", "pca_center", "pca_diff")}  # type: ignore[arg-type]
    units = {m: vector / np.linalg.norm(vector) for m, vector in units.items()}
    assert units["caa"][0] > 0.99
    assert units["pca_center"][0] > 0.95
    assert abs(units["pca_diff"][0]) < 0.1
    assert abs(units["pca_diff"][1]) > 0.95


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
@pytest.mark.parametrize("method", ["difference of means", "caa", "pca_center", "pca_diff"])
def test_turning_the_classes_turns_the_direction(method: Any, seed: int) -> None:
    a, b = rows(seed)
    np.testing.assert_allclose(direction_of(a, b, method), -direction_of(b, a, method), atol=1e-9)
    votes = np.sign((a - b) @ direction_of(a, b, method)).sum()
    assert votes >= 0


def test_agreement_is_the_mean_cosine_of_two_pairs() -> None:
    a, b = rows(3, n=7)
    units = (a - b) / np.linalg.norm(a - b, axis=1, keepdims=True)
    cosines = units @ units.T
    assert agreement(a, b) == pytest.approx(cosines[~np.eye(7, dtype=bool)].mean())


@given(seed=st.integers(0, 1000), held_out=st.floats(0.05, 0.95))
def test_a_split_shares_no_group(seed: int, held_out: float) -> None:
    groups = tuple(f"g{i % 7}" for i in range(30))
    data = Contrast(positive=("a",) * 30, negative=("b",) * 30, groups=groups)
    train, test = data.split(held_out=held_out, seed=seed)
    assert sorted([*train, *test]) == list(range(30))
    assert train and test
    assert not {groups[i] for i in train} & {groups[i] for i in test}


def test_actadd_adds_the_difference_of_two_prompts_at_the_first_tokens(gpt2: Subject) -> None:
    found = activation_addition(gpt2, "When Mary went", "When John gave", SITE)
    held = [gpt2.run(text, capture=SITE)[SITE][0] for text in ("When Mary went", "When John gave")]
    assert torch.allclose(found.vectors, held[0] - held[1], atol=1e-5)
    assert not found.vectors[0].any()  # both begin alike
    prompt = "the store gave a drink"
    before, after = gpt2.run(prompt, capture=SITE), gpt2.run(prompt, capture=SITE, edits=[found.add(2.0)])
    change = (after[SITE] - before[SITE])[0]
    assert torch.allclose(change[:3], 2 * found.vectors, atol=1e-4)
    assert not change[3:].any()
    with pytest.raises(InvalidEdit, match="position 2 is outside"):
        gpt2.run("When Mary", edits=[found.add(1.0)])
    assert torch.equal(found.direction(1).vector, found.vectors[1])


def test_actadd_lengthens_the_shorter_prompt_with_one_token(gpt2: Subject) -> None:
    found = activation_addition(gpt2, "When Mary went to", "When John", SITE, pad=" the")
    assert found.vectors.shape == (4, 32)
    assert len(set(found.tokens[1][2:])) == 1
    with pytest.raises(SpecError, match="give prompts of one length"):
        activation_addition(gpt2, "When Mary went to", "When John", SITE, pad=None)
    with pytest.raises(SpecError, match="is 3 tokens"):
        activation_addition(gpt2, "When Mary went to", "When John", SITE, pad=" the the the")
    with pytest.raises(NumericalError, match="hold the same"):
        activation_addition(gpt2, "When Mary", "When Mary", SITE)


def test_a_grouped_head_site_is_laid_side_by_side(make_subject: Callable[..., Subject]) -> None:
    found = extract(make_subject("llama"), PAIRS, "blocks.1.attn.z")
    assert found["blocks.1.attn.z"].vector.shape == (32,)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda s: extract(s, PAIRS, SITE, train=(0,), test=(2,)),
            SpecError,
            "the group 'a' is fitted on and tested on",
        ),
        (lambda s: extract(s, PAIRS, SITE, train=(9,)), SpecError, "there are pairs 0 to 3"),
        (lambda s: Contrast(positive=(), negative=("a",)), SpecError, "prompts of both classes"),
        (lambda s: Contrast(positive=("a", "b"), negative=("a",)), SpecError, "paired=False"),
        (lambda s: Contrast(positive=("a",), negative=("b",)).split(), SpecError, "1 groups cannot be split"),
        (
            lambda s: extract(s, Contrast(positive=POSITIVE, negative=NEGATIVE[:2], paired=False), SITE, "caa"),
            SpecError,
            "without pairs",
        ),
        (
            lambda s: extract(s, Contrast(positive=POSITIVE, negative=POSITIVE), SITE),
            NumericalError,
            "have the same mean",
        ),
        (lambda s: direction_of(np.full((3, 2), np.nan), np.ones((3, 2))), NumericalError, "not all finite"),
        (lambda s: direction_of(np.ones((3, 2)), np.zeros((3, 2)), "pca_diff"), NumericalError, "do not vary"),
        (lambda s: direction_of(np.ones((3, 2)), np.zeros((2, 2)), "caa"), SpecError, "works on pairs"),
    ],
)
def test_bad_input_is_told_what_to_do(gpt2: Subject, call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call(gpt2)


def test_two_sets_of_different_size_have_a_difference_of_means(gpt2: Subject) -> None:
    data = Contrast(positive=POSITIVE, negative=NEGATIVE[:2], paired=False)
    found = extract(gpt2, data, SITE)[SITE]
    a, b = (read_sites(gpt2, texts, SITE)[SITE] for texts in (POSITIVE, NEGATIVE[:2]))
    np.testing.assert_allclose(found.vector.numpy(), a.mean(0) - b.mean(0), rtol=1e-4, atol=1e-5)
