"""Reading and writing: the dual moves one readout, conversions are explicit, and a vector knows where it belongs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.activations.subject import Subject
from assay.base.errors import DamagedFile, NumericalError, SpecError, UnknownSite
from assay.directions import Direction, Origin, Probe, condition, cross_talk, dual, on_distribution_dual

SITE = "blocks.1.resid_post"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(k=st.integers(1, 8), extra=st.integers(0, 40), seed=st.integers(0, 99), scale=st.sampled_from((1e-4, 1.0, 1e4)))
def test_a_dual_moves_its_own_readout_by_one_and_no_other(k: int, extra: int, seed: int, scale: float) -> None:
    W = normal(k, k + extra, seed=seed) * scale
    V = dual(W, limit=1e6)
    assert float(cross_talk(W, V).abs().max()) < 1e-9
    moved = W @ (normal(k + extra, seed=seed + 1) + 3.0 * V[0]) - W @ normal(k + extra, seed=seed + 1)
    assert torch.allclose(moved, 3.0 * torch.eye(k, dtype=torch.float64)[0], atol=1e-8)


def test_the_dual_is_the_shortest_vector_that_does() -> None:
    W = normal(4, 20)
    V = dual(W)
    kernel = torch.linalg.svd(W)[2][4:]  # adding any of these leaves the readouts as they are
    for i in range(4):
        assert all(float((V[i] + 0.1 * row).norm()) > float(V[i].norm()) for row in kernel)


def test_the_on_distribution_dual_is_shorter_for_the_activations() -> None:
    W, spread = normal(5, 30), torch.logspace(0, -2, 30, dtype=torch.float64)
    x = normal(4000, 30, seed=1) * spread
    V, U = on_distribution_dual(W, x), dual(W)
    assert float(cross_talk(W, V).abs().max()) < 1e-9
    inverse = torch.linalg.inv(torch.cov(x.T))
    assert bool(((V @ inverse * V).sum(1) < (U @ inverse * U).sum(1)).all())


def test_probes_that_say_the_same_are_refused_with_their_condition_number() -> None:
    base = normal(2, 50)
    W = torch.stack([base[0], base[0] + 1e-3 * base[1]])
    number = condition(W)
    assert number > 1000
    with pytest.raises(NumericalError, match=r"condition number 1.86e\+03, limit 30.*ridge="):
        dual(W)
    V = dual(W, ridge=0.1)
    assert float(V.norm()) < 10 and float(cross_talk(W, V).abs().max()) > 0.1
    assert condition(W * torch.tensor([[1.0], [1e6]], dtype=torch.float64)) == pytest.approx(number, rel=1e-6)


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(0, 3), torch.eye(3)[[0, 1, 2, 2]]])
def test_what_is_no_basis_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(Exception, match=r"shape|dimensions|type"):
        dual(bad)
    with pytest.raises(NumericalError):
        dual(torch.tensor([[1.0, math.nan]]))


def test_a_probe_becomes_a_direction_only_in_a_way_that_is_named() -> None:
    W = normal(3, 16).float()
    probes = [Probe(site=SITE, weight=row, reads=f"r{i}") for i, row in enumerate(W)]
    plain = Direction.from_probe(probes[0], "as is", others=probes[1:])
    apart = Direction.from_probe(probes[0], "dual", others=probes[1:])
    natural = Direction.from_probe(
        probes[0], "on-distribution dual", others=probes[1:], activations=normal(99, 16).float()
    )
    assert torch.equal(plain.vector, W[0])
    for direction in (apart, natural):
        assert torch.allclose(W @ direction.vector, torch.tensor([1.0, 0.0, 0.0]), atol=1e-4)
    assert float((W[1:] @ plain.vector).abs().max()) > 0.1
    assert natural.size == pytest.approx(float(normal(99, 16).norm(dim=1).mean()))
    assert apart.origin.detail["others"] == ["r1", "r2"]
    with pytest.raises(Exception, match=r"valid: 'as is', 'dual', 'on-distribution dual'|how"):
        Direction.from_probe(probes[0], "dualish")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="needs activations"):
        Direction.from_probe(probes[0], "on-distribution dual")
    with pytest.raises(SpecError, match="give one site"):
        Direction.from_probe(probes[0], "dual", others=[Probe(site="blocks.0.resid_post", weight=W[1])])


def test_edits_write_what_they_say(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject("llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    vector = normal(32).float()
    direction = Direction(site=SITE, vector=vector, size=2.0, level=-0.5)
    before = subject.run(ids, capture=SITE)
    held = before[SITE].clone()

    def after(*edits: object) -> torch.Tensor:
        return subject.run(ids, capture=SITE, edits=list(edits))[SITE]  # type: ignore[arg-type]

    unit = vector / vector.norm()
    assert torch.allclose(after(direction.add(1.5)), held + 3.0 * unit, atol=1e-5)
    assert torch.allclose(after(direction.add_raw(0.5)), held + 0.5 * vector, atol=1e-5)
    assert torch.allclose(after(*direction.ablate()) @ unit, torch.zeros(1, 4), atol=1e-5)
    assert torch.allclose(after(*direction.clamp()) @ unit, torch.full((1, 4), -0.5), atol=1e-5)
    twice = after(*direction.ablate(), *direction.ablate())
    assert torch.allclose(twice, after(*direction.ablate()), atol=1e-6)
    assert torch.equal(before[SITE], held)
    with pytest.raises(SpecError, match="typical norm"):
        Direction(site=SITE, vector=vector).add(1.0)


def test_a_vector_knows_where_it_belongs(make_subject: Callable[..., Subject]) -> None:
    subject, other = make_subject("llama"), make_subject("gpt2")
    origin = Origin(method="given", subject=subject.fingerprint)
    probe = Probe(site=SITE, weight=normal(32).float(), origin=origin)
    probe.check(subject)
    with pytest.raises(SpecError, match="fitted on the weights"):
        probe.check(other)
    with pytest.raises(SpecError, match="has 16 numbers"):
        Probe(site=SITE, weight=normal(16).float()).check(subject)
    with pytest.raises(UnknownSite):
        Probe(site="blocks.9.resid_post", weight=normal(32).float()).check(subject)
    with pytest.raises(SpecError, match="reads 32 numbers"):
        probe(torch.zeros(2, 31))
    with pytest.raises(NumericalError):
        Probe(site=SITE, weight=torch.zeros(4))


def test_vectors_survive_a_file(tmp_path: Path) -> None:
    origin = Origin(method="ridge", subject="f0", data="d0", train=(0, 2), test=(1,), seed=3, detail={"penalty": 0.1})
    probe = Probe(site=SITE, weight=normal(8).float(), bias=0.25, reads="plural", positions=[-1], origin=origin)
    probe.save(tmp_path / "probe.safetensors")
    back = Probe.load(tmp_path / "probe.safetensors")
    assert torch.equal(back.weight, probe.weight) and back.origin == origin
    assert (back.bias, back.reads, back.positions, back.site) == (0.25, "plural", [-1], SITE)
    direction = Direction(site=SITE, vector=normal(8).float(), size=2.5, writes="plural", level=0.5, origin=origin)
    direction.save(tmp_path / "direction.safetensors")
    found = Direction.load(tmp_path / "direction.safetensors")
    assert torch.equal(found.vector, direction.vector) and found.size == 2.5 and found.level == 0.5
    with pytest.raises(DamagedFile, match="holds no direction"):
        Direction.load(tmp_path / "probe.safetensors")
    (tmp_path / "bad").write_bytes(b"no")
    for path in (tmp_path / "bad", tmp_path / "absent"):
        with pytest.raises(DamagedFile):
            Probe.load(path)
