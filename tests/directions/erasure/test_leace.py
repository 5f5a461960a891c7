"""LEACE erases what it was fitted on to rounding, moves it least, and agrees with the package concept-erasure."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.base.errors import NumericalError, SpecError
from assay.directions.erasure import Eraser, LabelledMoments, leace, leace_from_moments, mean_projection

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "golden_concept_erasure.json").read_text())


def made(n: int, d: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that the golden numbers were computed on."""
    spec = importlib.util.spec_from_file_location("golden", HERE / "golden_concept_erasure.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.rows(n, d, classes)  # type: ignore[no-any-return]


def planted(seed: int, n: int, d: int, classes: int = 2, base: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Anisotropic rows with a mean of their own for each class."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % classes)
    mixing = rng.standard_normal((d, d)) * np.geomspace(10, 0.1, d)
    return base * (rng.standard_normal((n, d)) @ mixing + rng.standard_normal((classes, d))[y] + 2.0), y


def cross(x: np.ndarray, y: np.ndarray) -> float:
    """The norm of the cross-covariance of rows and one-hot labels."""
    z = (y[:, None] == np.unique(y)).astype(float)
    return float(np.linalg.norm((x - x.mean(0)).T @ (z - z.mean(0)) / len(x)))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: "-".join(map(str, list(c.values())[:5])))
def test_it_is_what_concept_erasure_computes(case: dict[str, Any]) -> None:
    x, y = made(case["n"], case["d"], case["classes"])
    if case["method"] == "orth":
        eraser = mean_projection(x, y)
    elif case["shrinkage"] or case["n"] >= 10 * case["d"]:
        eraser = leace(x, y, shrinkage=case["shrinkage"])
    else:
        with pytest.raises(SpecError, match="too few to invert"):
            leace(x, y)
        return
    assert eraser.matrix == pytest.approx(np.asarray(case["P"]), abs=1e-10)
    assert eraser(x[0]) == pytest.approx(np.asarray(case["row0"]), abs=1e-10)


@given(
    seed=st.integers(0, 1000), d=st.integers(2, 12), classes=st.integers(2, 4), base=st.sampled_from([1e-6, 1.0, 1e6])
)
def test_nothing_linear_is_left_and_erasing_twice_is_once(seed: int, d: int, classes: int, base: float) -> None:
    x, y = planted(seed, 15 * d, d, classes, base)
    for eraser in (leace(x, y), leace(x, y, shrinkage=True), leace(x, y, affine=False), mean_projection(x, y)):
        assert cross(eraser(x), y) / cross(x, y) < 1e-10
        p = eraser.matrix
        assert np.abs(p @ p - p).max() < 1e-8 * max(1.0, np.abs(p).max())
        assert eraser(eraser(x)) == pytest.approx(eraser(x), abs=1e-8 * base * 100)
        assert eraser.rank <= classes - 1


def test_the_mean_stays_where_it_is_only_if_affine() -> None:
    x, y = planted(0, 400, 6)
    assert leace(x, y)(x).mean(0) == pytest.approx(x.mean(0), abs=1e-10)
    assert np.abs(leace(x, y, affine=False)(x).mean(0) - x.mean(0)).max() > 0.1


@given(seed=st.integers(0, 200))
def test_no_other_map_that_erases_moves_the_rows_less(seed: int) -> None:
    x, y = planted(seed, 300, 6)
    least = ((leace(x, y)(x) - x) ** 2).sum()
    assert least <= ((mean_projection(x, y)(x) - x) ** 2).sum() * (1 + 1e-9)
    rng = np.random.default_rng(seed)
    delta = x[y == 1].mean(0) - x[y == 0].mean(0)
    for _ in range(5):  # other projections along the difference of means, or along more than it
        write = np.stack([delta, rng.standard_normal(6)])[: 1 + int(rng.integers(2))]
        read = np.linalg.pinv(write).T + rng.standard_normal(write.shape) @ (np.eye(6) - np.linalg.pinv(write) @ write)
        other = Eraser(site="", read=read, write=write, mean=x.mean(0))
        assert least <= ((other(x) - x) ** 2).sum() * (1 + 1e-9)


@given(seed=st.integers(0, 100), cuts=st.lists(st.integers(1, 299), min_size=1, max_size=4, unique=True))
def test_streamed_moments_are_those_of_all_rows(seed: int, cuts: list[int]) -> None:
    x, y = planted(seed, 300, 5, 3)
    x = x + 1e4  # far from zero, where sums of squares would lose their digits
    z = (y[:, None] == np.arange(3)).astype(float)
    pieces = [
        LabelledMoments.of(a, b) for a, b in zip(np.split(x, sorted(cuts)), np.split(z, sorted(cuts)), strict=True)
    ]
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = whole.merged(piece)
    assert leace_from_moments(whole).matrix == pytest.approx(leace(x, y).matrix, abs=1e-7)
    assert whole.mean_x == pytest.approx(x.mean(0))


def test_a_rare_class_is_erased_too() -> None:
    """The package's cut is absolute (0.01), so two rows in 20000 survive it; ours is relative."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20000, 4)), np.arange(20000) < 2
    x[y] += 1.0
    assert cross(leace(x, y)(x), y) / cross(x, y) < 1e-10


def test_directions_that_do_not_vary_are_left_alone() -> None:
    x, y = planted(1, 200, 4)
    flat = np.concatenate([x, np.full((200, 1), 7.0)], axis=1)
    erased = leace(flat, y)(flat)
    assert erased[:, 4] == pytest.approx(7.0)
    assert cross(erased, y) / cross(flat, y) < 1e-10


def test_shrinkage_goes_with_rows_and_never_past_the_sphere() -> None:
    rng = np.random.default_rng(0)
    sizes = np.geomspace(3, 1, 20)
    few, many = (LabelledMoments.of(rng.standard_normal((n, 20)) * sizes, np.zeros((n, 1))) for n in (25, 5000))
    for moments, near in ((few, False), (many, True)):
        plain, shrunk = np.linalg.eigvalsh(moments.covariance()), np.linalg.eigvalsh(moments.covariance(shrinkage=True))
        assert shrunk[0] >= plain[0] * 0.9 and shrunk[-1] <= plain[-1] * 1.01
        assert (shrunk[0] / plain[0] < 1.2) == near


def test_bad_rows_are_refused() -> None:
    x, y = planted(0, 100, 4)
    with pytest.raises(SpecError, match="two classes or more"):
        leace(x, np.zeros(100))
    with pytest.raises(SpecError, match="one label for each of 100 rows"):
        leace(x, y[:50])
    holed = x.copy()
    holed[3, 1] = np.nan
    with pytest.raises(NumericalError, match="row 3 first"):
        leace(holed, y)
    with pytest.raises(SpecError, match="give 40 rows or more, or shrinkage=True"):
        leace(x[:39], y[:39])
    with pytest.raises(NumericalError, match="do not vary"):
        leace(np.ones((100, 4)), y)
    with pytest.raises(SpecError, match="cannot be of one data set"):
        LabelledMoments.of(x, y[:, None].astype(float)).merged(LabelledMoments.of(x[:, :2], y[:, None].astype(float)))
