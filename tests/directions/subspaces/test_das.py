"""DAS finds a subspace that was planted, stays orthogonal, and leaves what lies outside it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import assay
from assay.base.errors import DamagedFile, NumericalError, SpecError
from assay.directions.subspaces import Interchanges, Subspace, align, boundless_das, das, interchange_accuracy, ravel
from assay.directions.subspaces.das import boundary_mask, retracted
from assay.directions.subspaces.interchange import answers, read_at

SITE = "blocks.1.resid_post"
D = 32


@pytest.fixture(scope="module")
def subject(tiny_module: Any) -> Any:
    return assay.load(tiny_module("gpt2", n_layer=3))


def ids(n: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 128, (n, 5), generator=torch.Generator().manual_seed(seed))


def planted(subject: Any, n: int, seed: int) -> tuple[Subspace, Interchanges]:
    """The two dimensions of largest variance as the variable, and what the model answers once they are exchanged."""
    base, source = ids(n, seed), ids(n, seed + 500)
    held = read_at(subject, ids(300, 99), SITE, "last")
    true = Subspace.spanned_by(torch.linalg.svd(held - held.mean(0))[2][:2], SITE)
    asked = Interchanges(base=base, source=source, answer=(0,) * n)
    _, values = asked.read(subject, SITE)
    answer, _ = answers(subject, asked, lambda keep: true.edits(values[keep]))
    return true, Interchanges(base=base, source=source, answer=tuple(answer.tolist()))


def changed(subject: Any, data: Interchanges) -> Interchanges:
    """The rows whose answer is another once the variable is exchanged: doing nothing has accuracy 0 there."""
    own, _ = answers(subject, data)
    return data.rows([i for i, (a, b) in enumerate(zip(data.answer, own.tolist(), strict=True)) if a != b])


def test_a_planted_subspace_is_found(subject: Any) -> None:
    true, data = planted(subject, 384, 0)
    _, held_out = planted(subject, 256, 1)
    held_out = changed(subject, held_out)
    found = das(subject, SITE, data, 2, epochs=16, batch=64, lr=5e-2)
    scored = align(subject, found.subspace, held_out, controls=4)
    assert interchange_accuracy(subject, true, held_out) == 1.0
    assert scored.n == len(held_out) > 40
    assert scored.accuracy > max(scored.null) + 0.3
    # The cosines of the angles between the two planes.
    overlap = torch.linalg.svdvals(found.subspace.basis @ true.basis.T)
    chance = [torch.linalg.svdvals(Subspace.random(SITE, 2, D, seed=i).basis @ true.basis.T)[0] for i in range(20)]
    assert float(overlap[0]) > float(max(chance))
    assert sum(found.losses[-8:]) < 0.6 * sum(found.losses[:8])
    assert found.subspace.origin.subject == subject.fingerprint


@given(d=st.integers(2, 40), k=st.integers(1, 40), seed=st.integers(0, 100))
def test_the_rotation_stays_orthogonal(d: int, k: int, seed: int) -> None:
    weight = torch.randn(d, min(k, d), generator=torch.Generator().manual_seed(seed)) * 10
    rows = retracted(weight)
    assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)
    assert torch.linalg.matrix_rank(torch.cat([rows.double(), weight.T.double()]), rtol=1e-4) == len(rows)


def test_after_training_the_basis_is_orthonormal_and_the_module_is_untouched(subject: Any) -> None:
    before = {name: p.clone() for name, p in subject.module.named_parameters()}
    _, data = planted(subject, 32, 2)
    for fit in (das(subject, SITE, data, 3, epochs=2), boundless_das(subject, SITE, data, epochs=2)):
        basis = fit.subspace.basis
        assert torch.allclose(basis @ basis.T, torch.eye(len(basis)), atol=1e-5)
    for name, parameter in subject.module.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None


def test_boundless_das_keeps_what_it_needs_and_pays_for_the_rest(subject: Any) -> None:
    _, data = planted(subject, 128, 3)
    cheap = boundless_das(subject, SITE, data, penalty=0.0, epochs=5, lr=1e-2, boundary_lr=1e-1, batch=32)
    dear = boundless_das(subject, SITE, data, penalty=30.0, epochs=5, lr=1e-2, boundary_lr=1e-1, batch=32)
    assert dear.boundary < cheap.boundary
    assert dear.subspace.k < cheap.subspace.k <= D
    assert dear.mask.shape == (D,)


def test_the_mask_is_the_products_of_sigmoids() -> None:
    mask = boundary_mask(torch.tensor(0.25), 40, 2.0)
    for i in (0, 9, 10, 39):
        by_hand = 1 / (1 + 2.718281828 ** (-i / 2)) / (1 + 2.718281828 ** (-(10 - i) / 2))
        assert float(mask[i]) == pytest.approx(by_hand, rel=1e-4)
    sharp = boundary_mask(torch.tensor(0.5), 40, 0.1)
    assert sharp[1:19].min() > 0.99 and sharp[22:].max() < 0.01


def test_an_interchange_moves_the_subspace_and_nothing_else(subject: Any) -> None:
    plane = Subspace.random(SITE, 4, D, seed=3)
    base, source = read_at(subject, ids(6, 0), SITE, "last"), read_at(subject, ids(6, 1), SITE, "last")
    run = subject.run(ids(6, 0), capture=SITE, edits=plane.edits(source))
    assert torch.allclose(run[SITE][:, -1], plane.swapped(base, source), atol=1e-5)
    moved = run[SITE][:, -1]
    q = plane.basis
    assert torch.allclose(moved @ q.T, source @ q.T, atol=1e-5)
    outside = torch.eye(D) - q.T @ q
    assert torch.allclose(moved @ outside, base @ outside, atol=1e-5)
    assert torch.equal(run[SITE][:, :-1], subject.run(ids(6, 0), capture=SITE)[SITE][:, :-1])
    nothing = subject.run(ids(6, 0), edits=plane.edits(base)).logits
    assert torch.allclose(nothing, subject.run(ids(6, 0)).logits, atol=1e-4)


def test_ravel_tells_cause_from_isolate(subject: Any) -> None:
    true, cause = planted(subject, 96, 4)
    cause = changed(subject, cause)
    kept = Interchanges(base=ids(40, 7), source=ids(40, 7), answer=tuple(answers(subject, Interchanges(
        base=ids(40, 7), source=ids(40, 7), answer=(0,) * 40))[0].tolist()))  # fmt: skip
    found = ravel(subject, true, cause, {"other": kept}, controls=3)
    assert (found.cause, found.isolate["other"], found.disentangle) == (1.0, 1.0, 1.0)
    assert max(found.null) < 0.9 and found.n == (len(cause), 40)
    with pytest.raises(SpecError, match="at least one other attribute"):
        ravel(subject, true, cause, {})


def test_choices_texts_and_joining(tiny_subject: Any) -> None:
    data = Interchanges(base=["When Mary", "When John went"], source=["France is", "Paris is"], answer=(60, 61),
                        choices=(61, 60, 5))  # fmt: skip
    chosen, logits = answers(tiny_subject, data)
    assert set(chosen.tolist()) <= {60, 61, 5} and logits.shape == (2, 3)
    both = data.joined(data.rows([1]))
    assert len(both) == 3 and both.answer == (60, 61, 61)
    assert len(das(tiny_subject, SITE, both, 1, epochs=1).losses) == 1
    with pytest.raises(SpecError, match="not among the choices"):
        Interchanges(base=["a"], source=["b"], answer=(1,), choices=(2,))
    with pytest.raises(SpecError, match="same choices"):
        data.joined(Interchanges(base=["a"], source=["b"], answer=(1,)))


def test_what_does_not_fit_is_refused(subject: Any, tmp_path: Path) -> None:
    _, data = planted(subject, 8, 5)
    with pytest.raises(SpecError, match="k is 33"):
        das(subject, SITE, data, 33)
    with pytest.raises(SpecError, match="one token of each prompt"):
        das(subject, SITE, Interchanges(base=ids(2, 0), source=ids(2, 1), answer=(1, 2), positions=None), 2)
    with pytest.raises(SpecError, match="one of each a row"):
        Interchanges(base=ids(2, 0), source=ids(3, 0), answer=(1, 2))
    with pytest.raises(NumericalError, match="off orthonormal"):
        Subspace(site=SITE, basis=torch.ones(1, D))
    with pytest.raises(NumericalError, match="linearly dependent"):
        Subspace.spanned_by(torch.ones(2, D), SITE)
    plane = Subspace.random(SITE, 2, D)
    plane.save(tmp_path / "plane.safetensors")
    back = Subspace.load(tmp_path / "plane.safetensors")
    assert torch.equal(back.basis, plane.basis) and (back.site, back.origin) == (SITE, plane.origin)
    (tmp_path / "other").write_bytes(b"x")
    with pytest.raises(DamagedFile):
        Subspace.load(tmp_path / "other")
