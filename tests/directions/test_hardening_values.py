"""Probes, directions, erasers and subspaces of the wrong kind: refused with what to do, never computed as if right."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from assay.base.errors import DamagedFile, NothingFound, NumericalError, SpecError
from assay.directions.basis import dual, on_distribution_dual
from assay.directions.erasure import inlp, leace, mean_projection, random_erasers
from assay.directions.labelled import Labelled
from assay.directions.methods.rows import in_groups, repeated_texts, text_rows
from assay.directions.probes import bag_of_words, beats, evaluate, fit_probe, linear_arm, pca_logistic
from assay.directions.probes.mdl import description_length
from assay.directions.probes.sparse import rank_latents
from assay.directions.probes.splits import grouped_split
from assay.directions.subspaces import Subspace
from assay.directions.vectors import Direction, Origin, Probe

NAN = float("nan")
SITE = "blocks.1.resid_post"
X = np.random.default_rng(0).normal(size=(80, 6))
Y = np.arange(80) % 2
GROUPS = np.arange(80) // 2


def missing(values):
    y = [float(label) for label in values]
    y[5] = NAN
    return y


@pytest.mark.parametrize("kind", ["difference of means", "lda", "ridge", "logistic"])
@pytest.mark.parametrize("y", [missing(Y), [NAN] * 3 + [1.0] * 77, [None] * 3 + [1] * 77])
def test_a_missing_label_is_no_class_of_a_probe(kind, y):
    with pytest.raises(SpecError, match="labels are missing"):
        fit_probe(kind, X, y, site=SITE, groups=GROUPS)


def test_a_missing_label_is_no_class_of_anything_else():
    y = missing(Y)
    for wrong in (
        lambda: leace(X, y),
        lambda: mean_projection(X, y),
        lambda: inlp(X, y),
        lambda: grouped_split(GROUPS, y),
        lambda: evaluate(X[:, 0], y, GROUPS),
        lambda: description_length(X, y, GROUPS),
    ):
        with pytest.raises(SpecError, match="1 of 80 labels are missing"):
            wrong()


def test_a_group_without_a_name_is_not_a_group_for_each_row():
    groups = [NAN if i < 4 else float(i) for i in range(80)]
    with pytest.raises(SpecError, match="row 0 is NaN"):
        grouped_split(groups, Y)
    with pytest.raises(SpecError, match="one label a row"):
        grouped_split(np.stack([GROUPS, GROUPS], axis=1), Y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_probe_is_fitted_on_tensors_of_any_precision_with_or_without_a_gradient(dtype):
    rows = torch.tensor(X, dtype=dtype, requires_grad=True)
    probe = fit_probe("ridge", rows.detach().double().numpy(), Y, site=SITE)
    arm = linear_arm(rows, "ridge")
    readout = arm(np.arange(80), Y, GROUPS)
    assert np.allclose(readout, probe(rows.detach().double()).numpy(), atol=1e-6)


def test_rows_that_are_no_table_of_numbers_are_refused():
    for rows in ([["a", "b"], ["c", "d"]], [[1.0], [1.0, 2.0]]):
        with pytest.raises(SpecError, match="table of numbers"):
            linear_arm(rows)


def test_baselines_that_have_nothing_to_read_read_nothing():
    arms = {"words": bag_of_words([" "] * 80), "components": pca_logistic(np.ones((80, 3)))}
    found = beats(linear_arm(X, "lda"), arms, Y, GROUPS, n_boot=100)
    assert found.test["words"] == found.test["components"] == 0.5
    with pytest.raises(SpecError, match="3 texts for 80 rows"):
        beats(linear_arm(X, "lda"), {"words": bag_of_words(["a", "b", "c"])}, Y, GROUPS)
    with pytest.raises(NothingFound, match="no word"):
        arms["words"](np.arange(40), Y, GROUPS)


def test_latents_that_never_vary_have_no_order():
    for by in ("mean difference", "l1"):
        with pytest.raises(NumericalError, match="no latent differs"):
            rank_latents(np.ones((8, 3)), Y[:8], by)


def test_inlp_takes_a_round_and_a_penalty():
    for options in ({"rounds": 0}, {"c": 0.0}):
        with pytest.raises(SpecError, match="at least one probe"):
            inlp(X, Y, **options)


def test_random_erasers_need_rows_that_vary_and_a_number():
    eraser = mean_projection(X, Y)
    with pytest.raises(NumericalError, match="do not vary"):
        random_erasers(eraser, 2, "covariance-matched", np.full((40, 6), 0.1))
    with pytest.raises(SpecError, match="n is 0"):
        random_erasers(eraser, 0, "isotropic")


def probe(d=6, subject="", seed=0):
    weight = torch.randn(d, generator=torch.Generator().manual_seed(seed))
    return Probe(site=SITE, weight=weight, origin=Origin(method="given", subject=subject))


@pytest.mark.parametrize(
    ("other", "said"), [(probe(7), "reads 6 numbers, another 7"), (probe(6, "bb", 1), "one model")]
)
def test_a_dual_is_of_probes_of_one_width_and_one_model(other, said):
    with pytest.raises(SpecError, match=said):
        Direction.from_probe(probe(6, "aa"), "dual", others=[other])


def test_a_readout_in_half_precision_is_rounded_once():
    # As float32 does it, then rounded; with the weight rounded first the error was several times as large.
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(512, generator=generator), torch.randn(50, 512, generator=generator).bfloat16()
    reader = Probe(site=SITE, weight=weight, bias=0.1)
    assert torch.equal(reader(rows), (rows.float() @ weight + 0.1).bfloat16())


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_a_unit_has_norm_1_whatever_the_vector(size):
    direction = Direction(site=SITE, vector=torch.tensor([3.0, -4.0]) * size)
    assert torch.allclose(direction.unit, torch.tensor([0.6, -0.8]))


def test_a_dose_is_finite():
    with pytest.raises(SpecError, match="dose is inf"):
        Direction(site=SITE, vector=torch.ones(3), size=2.0).add(float("inf"))


def test_duals_ask_for_a_ridge_and_for_rows_that_vary():
    W = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    with pytest.raises(SpecError, match="ridge is nan"):
        dual(W, ridge=NAN)
    with pytest.raises(NumericalError, match="do not vary"):
        on_distribution_dual(W, torch.full((9, 5), 0.1))


@pytest.mark.parametrize("about", [[1], {"format": "assay.vector/1", "kind": "probe"}, {"format": "assay.vector/1"}])
def test_a_file_that_lacks_something_is_damaged(tmp_path, about):
    file = tmp_path / "probe.safetensors"
    save_file({"vector": torch.ones(3)}, file, metadata={"assay": json.dumps(about)})
    with pytest.raises(DamagedFile, match="probe"):
        Probe.load(file)


def test_no_subspace_has_more_dimensions_than_the_site():
    with pytest.raises(SpecError, match="1 <= k <= d"):
        Subspace.random(SITE, 9, 4)
    with pytest.raises(SpecError, match="1 <= k <= d"):
        Subspace.spanned_by(torch.randn(6, 4), SITE)


def lines(path, rows, encoding="utf-8", end="\n"):
    path.write_bytes(end.join(json.dumps(row, ensure_ascii=False) for row in rows).encode(encoding))
    return path


ODD = "one\u2028two\x85three\x0bfour caf\u00e9 \U0001f600"
"""A text with characters that end a line elsewhere, but not in JSON lines."""


@pytest.mark.parametrize(("encoding", "end"), [("utf-8", "\n"), ("utf-8-sig", "\n"), ("utf-8", "\r\n")])
def test_labelled_texts_are_read_as_they_are_written(tmp_path, encoding, end):
    rows = [{"text": ODD, "label": i % 2, "group": f"g{i}"} for i in range(4)]
    data = Labelled.read(lines(tmp_path / "data.jsonl", rows, encoding, end))
    assert data.texts == (ODD,) * 4
    assert [
        row["text"] for row in text_rows(lines(tmp_path / "t", [{"text": ODD}], encoding), ["text"], field="x")
    ] == [ODD]


def test_a_group_of_null_is_no_group_and_not_one_group_of_all(tmp_path):
    rows = [{"text": f"t{i}", "label": i % 2, "group": None, "template": None} for i in range(4)]
    data = Labelled.read(lines(tmp_path / "data.jsonl", rows))
    assert len(set(data.groups)) == 4 and data.templates == ()
    with pytest.raises(SpecError, match="group of its own"):
        in_groups(data, tmp_path / "data.jsonl")


def test_a_text_in_two_groups_is_told():
    data = Labelled(texts=("a", "b", "a", "c"), labels=(0, 1, 0, 1), groups=("g", "h", "i", "h"))
    assert data.repeated == 1
    (said,) = repeated_texts(data)
    assert said.startswith("1 text stands in more than one group")
    assert repeated_texts(data.rows([0, 1, 3])) == ()
