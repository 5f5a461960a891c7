"""BatchTopK's running threshold: one for each layer that is read, following the smallest kept activation."""

from __future__ import annotations

import pytest
import torch

from assay.dictionaries.settings import Training
from assay.dictionaries.training.source import Rows
from assay.dictionaries.training.trainer import Trainer

READS, WRITES = ("blocks.0.mlp.in", "blocks.1.mlp.in"), ("blocks.0.mlp.out", "blocks.1.mlp.out")


def two_layers() -> Rows:
    """A layer whose rows are all alike in length, and one where a few are far longer."""
    stream = torch.Generator().manual_seed(3)
    even = torch.randn(2048, 8, generator=stream)
    uneven = torch.randn(2048, 8, generator=stream) * torch.rand(2048, 1, generator=stream).pow(4) * 20
    return Rows({READS[0]: even, WRITES[0]: even * 2, READS[1]: uneven, WRITES[1]: uneven * 0.5}, batch=256)


@pytest.mark.parametrize("family", ["batchtopk", "matryoshka"])
def test_a_trained_threshold_keeps_as_many_as_training_did(family):
    data = two_layers()
    asked = Training(family=family, k=3, latents=32, steps=300, batch=256, lr=3e-3)
    trainer = Trainer(asked, data.batch(0), READS[1:])
    for step in range(asked.steps):
        report = trainer.step(data.batch(step))
    kept = trainer.finished().encode_sparse(torch.cat([data.batch(s)[READS[1]] for s in range(8)]))
    assert report.l0 == pytest.approx(3, rel=0.05)
    assert float(kept.counts.float().mean()) == pytest.approx(3, rel=0.1)


def test_each_layer_of_a_cross_layer_transcoder_has_its_own_threshold():
    data = two_layers()
    asked = Training(family="batchtopk", k=3, latents=32, steps=300, batch=256, lr=3e-3)
    trainer = Trainer(asked, data.batch(0), READS, WRITES, cross_layer=True)
    for step in range(asked.steps):
        trainer.step(data.batch(step))
    for index, layer in enumerate(trainer.finished().layers):
        rows = torch.cat([data.batch(s)[READS[index]] for s in range(8)])
        assert float(layer.encode_sparse(rows).counts.float().mean()) == pytest.approx(3, rel=0.15), index
