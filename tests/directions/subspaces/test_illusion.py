"""The illusion test flags a direction planted across the null space, and not one that is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import assay
from assay.base.errors import SpecError
from assay.directions import Direction
from assay.directions.subspaces import Interchanges, Subspace, illusion_test, next_read, split_direction
from assay.directions.subspaces.interchange import answers, read_at

SITE = "blocks.1.mlp.post"


def ids(n: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 128, (n, 5), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def subject(tiny_module: Any) -> Any:
    return assay.load(tiny_module("gpt2", n_layer=2))


@pytest.fixture(scope="module")
def case(subject: Any) -> dict[str, Any]:
    """Pairs whose answer changes with the whole site, and the parts of its activations' variation."""
    n = 240
    base, source = ids(n, 0), ids(n, 1)
    asked = Interchanges(base=base, source=source, answer=(0,) * n)
    h, s = asked.read(subject, SITE)
    d = h.shape[1]
    whole = Subspace(site=SITE, basis=torch.eye(d))
    own, _ = answers(subject, asked)
    other, _ = answers(subject, asked, lambda keep: whole.edits(s[keep]))
    keep = [i for i in range(n) if own[i] != other[i]][:24]
    data = Interchanges(base=base, source=source, answer=tuple(other.tolist())).rows(keep)
    return {"data": data, "own": tuple(own[keep].tolist()), "change": (s - h)[keep], "reads": next_read(subject, SITE)}


def test_the_read_is_the_mlps_output_matrix(subject: Any, tiny_module: Any) -> None:
    assert torch.equal(next_read(subject, SITE), subject.module.transformer.h[1].mlp.c_proj.weight.T)
    llama = assay.load(tiny_module("llama"))
    assert torch.equal(next_read(llama, SITE), llama.module.model.layers[1].mlp.down_proj.weight)
    with pytest.raises(SpecError, match="Give reads="):
        next_read(subject, "blocks.0.resid_post")


def test_a_vector_is_split_by_what_is_read(case: dict[str, Any]) -> None:
    reads = case["reads"]
    v = torch.randn(reads.shape[1], generator=torch.Generator().manual_seed(0))
    row, null = split_direction(v, reads)
    assert torch.allclose(row + null, v, atol=1e-5)
    assert float((reads @ null).abs().max()) < 1e-4
    assert torch.allclose(split_direction(row, reads)[0], row, atol=1e-5)
    assert abs(float(row @ null)) < 1e-4


def test_a_true_direction_is_not_flagged(subject: Any, case: dict[str, Any]) -> None:
    """What the change of activations writes, mapped back into what is read."""
    written = case["change"] @ case["reads"].T
    v = torch.linalg.pinv(case["reads"]) @ torch.linalg.svd(written)[2][0]
    true, _ = split_direction(v, case["reads"])
    found = illusion_test(subject, Direction(site=SITE, vector=true), case["data"], case["own"])
    assert found.full > 0 and found.v > 0.02 * found.full
    assert found.null_share < 1e-3 and found.row_share == pytest.approx(1.0)
    assert found.v == pytest.approx(found.v_row, rel=1e-3, abs=1e-4) and found.v_null == 0.0
    assert not found.flagged, found.reasons


def test_a_planted_illusion_is_flagged(subject: Any, case: dict[str, Any]) -> None:
    """The unread direction in which the data vary most, joined to a read one in which they do not vary at all."""
    reads, change = case["reads"], case["change"]
    right = torch.linalg.svd(reads, full_matrices=False)[2]
    unread = change - (change @ right.T) @ right
    v_null = torch.linalg.svd(unread)[2][0]
    assert len(change) < len(right)  # so that some read direction is dormant
    dormant = torch.linalg.svd(change @ right.T)[2][-1] @ right
    v = (v_null + dormant) / 2**0.5
    found = illusion_test(subject, Direction(site=SITE, vector=v), case["data"], case["own"])
    assert abs(found.v_null) < 1e-3  # nothing reads it
    assert abs(found.v_row) < 1e-3  # nothing in the data varies along it
    assert abs(found.v) > 0.05  # and the patch carries the variation of the one over into the other
    assert found.null_share == pytest.approx(0.5**0.5, rel=1e-3)
    assert found.flagged and "not read by what comes next" in found.reasons[0]


def test_an_effect_larger_than_the_whole_is_flagged(subject: Any, case: dict[str, Any]) -> None:
    """Pair by pair: a read direction is flagged where it does more than twice what the whole site does, only there."""
    written = case["change"] @ case["reads"].T
    v = torch.linalg.pinv(case["reads"]) @ torch.linalg.svd(written)[2][0]
    subspace = Subspace.spanned_by(split_direction(v, case["reads"])[0][None], SITE)
    turned = tuple(reversed(case["data"].answer))  # an answer that the whole site has no part in
    for i in range(6):
        data = case["data"].rows([i])
        odd = Interchanges(base=data.base, source=data.source, answer=(turned[i],))
        found = illusion_test(subject, subspace, odd, (case["own"][i],))
        assert found.flagged == (abs(found.v) > 2 * abs(found.full))
    strict = illusion_test(subject, subspace, case["data"], case["own"], ratio=0.0)
    assert strict.flagged and len(strict.reasons) == 1 and "whole site" in strict.reasons[0]


def test_several_dimensions_or_a_missing_answer_are_refused(subject: Any, case: dict[str, Any]) -> None:
    d = read_at(subject, ids(2, 0), SITE, "last").shape[1]
    with pytest.raises(SpecError, match="for one direction"):
        illusion_test(subject, Subspace.random(SITE, 2, d), case["data"], case["own"])
    with pytest.raises(SpecError, match="original answers"):
        illusion_test(subject, Subspace.random(SITE, 1, d), case["data"], case["own"][:1])
