"""PCA of differences is what the package repeng computes; where the two differ is stated and held here.

Equal: the axis and its sign, of both methods, at the last real token. Different: repeng leaves out layer 0, reads its
last layer behind the final norm, hands back vectors of norm 1, and, where the tokenizer pads on the left, reads models
with learned positions at the wrong ones.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import assay
from assay import Subject
from assay.directions import read_sites
from assay.directions.steering import Contrast, extract

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "golden_repeng.json").read_text())


@pytest.fixture(scope="module")
def made() -> ModuleType:
    """The script that made the golden numbers: its model, tokenizer and pairs."""
    spec = importlib.util.spec_from_file_location("golden", HERE / GOLDEN["origin"]["script"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def subject(made: ModuleType) -> Subject:
    return assay.load(made.model(), tokenizer=made.tokenizer())


@pytest.fixture(scope="module")
def contrast(made: ModuleType) -> Contrast:
    positive, negative = zip(*made.pairs(), strict=True)
    return Contrast(positive=positive, negative=negative)


def golden(method: str, layer: int) -> torch.Tensor:
    return torch.tensor(GOLDEN["directions"][method][str(layer)])


@pytest.mark.parametrize("method", ["pca_diff", "pca_center"])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_axis_and_its_sign_are_repengs(subject: Subject, contrast: Contrast, method: Any, layer: int) -> None:
    site = f"blocks.{layer}.resid_post"
    found = extract(subject, contrast, site, method)[site]
    torch.testing.assert_close(found.unit, golden(method, layer), atol=1e-4, rtol=0)
    assert found.vector.norm() != pytest.approx(1.0, abs=1e-2)  # ours has the length of the mean shift along it


@pytest.mark.parametrize("method", ["pca_diff", "pca_center"])
def test_its_last_layer_is_behind_the_final_norm(subject: Subject, contrast: Contrast, method: Any) -> None:
    sites = ["blocks.2.resid_post", "final_norm"]
    stream, normed = (found.unit for found in extract(subject, contrast, sites, method).values())
    torch.testing.assert_close(normed, golden(method, 2), atol=1e-4, rtol=0)
    assert float(stream @ golden(method, 2)) < 0.999


def test_it_leaves_out_the_first_layer() -> None:
    assert GOLDEN["origin"]["layers by default"] == [1, 2]


def test_centring_the_differences_takes_off_the_mean_shift(subject: Subject, contrast: Contrast) -> None:
    site = "blocks.1.resid_post"
    mean = extract(subject, contrast, site, "difference of means")[site].unit
    assert abs(float(mean @ golden("pca_diff", 1))) < abs(float(mean @ golden("pca_center", 1)))
    a, b = (read_sites(subject, list(texts), site)[site] for texts in (contrast.positive, contrast.negative))
    centred = (a - b) - (a - b).mean(0)
    axis = np.linalg.svd(centred, full_matrices=False)[2][0]
    assert abs(float(axis @ golden("pca_diff", 1).numpy())) == pytest.approx(1.0, abs=1e-5)


def test_padding_on_the_left_changes_its_vectors_and_not_ours(made: ModuleType, contrast: Contrast) -> None:
    left = assay.load(made.model(), tokenizer=made.tokenizer("left"))
    site = "blocks.1.resid_post"
    ours = extract(left, contrast, site, "pca_center")[site].unit
    torch.testing.assert_close(ours, golden("pca_center", 1), atol=1e-4, rtol=0)
    assert abs(float(ours @ golden("pca_center, padded on the left", 1))) < 0.999
