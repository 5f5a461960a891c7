"""Movements are what a run with the edit reads, for every kind of edit, place and padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from assay import Add, ProjectOut, Subject
from assay.base.errors import SpecError
from assay.directions import Probe
from assay.directions.basis import dual
from assay.directions.movements import movements

TEXTS = ["When Mary went to the store", "Mary gave a drink", "John and Mary went to the store and gave milk"]
SITE, LATER = "blocks.1.resid_post", "blocks.2.resid_post"


def vectors(seed: int, n: int = 3) -> torch.Tensor:
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_movements_are_those_of_plain_runs(make_subject: Callable[..., Any], family: str) -> None:
    subject = make_subject(family)
    probes = [Probe(site=site, weight=row, bias=0.5) for site in (SITE, LATER) for row in vectors(0, 2)]
    edits = [
        Add(SITE, vectors(1)[0], positions="last"),
        Add(SITE, vectors(1)[1]),
        ProjectOut("blocks.0.attn.out", vectors(1)[2], positions=0),
    ]
    found = movements(subject, TEXTS, edits, probes)
    assert found.shape == (3, len(TEXTS), 4)
    for e, edit in enumerate(edits):
        for t, text in enumerate(TEXTS):
            runs = [subject.run(text, edits=given, capture=[SITE, LATER]) for given in ([edit], [])]
            for p, probe in enumerate(probes):
                after, before = (float(probe(run[probe.site][0, -1].double())) for run in runs)
                assert found[e, t, p] == pytest.approx(after - before, abs=2e-4)
    assert np.abs(found).max() > 0.1


def test_the_dual_is_an_identity_in_the_model(make_subject: Callable[..., Any]) -> None:
    subject: Subject = make_subject("llama")
    W = vectors(3, 4)
    probes = [Probe(site=SITE, weight=row) for row in W]
    edits = [Add(SITE, row, positions="last") for row in dual(W)]
    found = movements(subject, TEXTS, edits, probes)
    np.testing.assert_allclose(found, np.broadcast_to(np.eye(4)[:, None], found.shape), atol=1e-4)
    plain = movements(subject, TEXTS, [Add(SITE, row, positions="last") for row in W], probes)
    assert np.abs(plain - plain * np.eye(4)[:, None]).max() > 0.5


def test_nothing_to_measure_is_refused(make_subject: Callable[..., Any]) -> None:
    subject = make_subject("llama")
    probe, edit = Probe(site=SITE, weight=torch.ones(32)), Add(SITE, torch.ones(32))
    with pytest.raises(SpecError, match="there are no texts"):
        movements(subject, [], [edit], [probe])
    with pytest.raises(SpecError, match="there are no edits"):
        movements(subject, TEXTS, [], [probe])
    with pytest.raises(SpecError, match="has 8 numbers"):
        movements(subject, TEXTS, [edit], [Probe(site=SITE, weight=torch.ones(8))])
