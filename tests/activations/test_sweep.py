"""Sweeps: replay equals one run an edit, whatever the model, the site and the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import assay
from assay.base.errors import InvalidEdit, SpecError

IDS = torch.tensor([[5, 17, 33, 64, 9, 101, 42, 77, 3]])
POINTS = (
    "resid_pre resid_mid resid_post attn.q attn.k attn.v attn.z attn.rot_q attn.rot_k attn.out attn.result "
    "attn.scores attn.pattern norm1 norm2 mlp.in mlp.pre mlp.post mlp.out"
).split()


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 7]


def one_by_one(subject: Any, ids: Any, cells: list[Any]) -> Tensor:
    """The plain way: a full forward for each cell."""
    values = [
        metric(subject.run(ids, edits=[cell] if isinstance(cell, assay.activations.edits.Edit) else cell).logits)
        for cell in cells
    ]
    return torch.stack(values)


def every_cell(subject: Any, donor: Any) -> list[Any]:
    """Patches at every kind of site: whole, at positions, by head; and what replay must leave to full forwards."""
    cells: list[Any] = []
    for point in POINTS:
        if not subject.parts.has(point):
            continue
        for block, position in enumerate((0, 4, "last")):
            name = f"blocks.{block}.{point}"
            cells += [assay.Patch(name, donor, positions=position), *([assay.Patch(name, donor)] * (block == 1))]
            if subject.parts.heads(point) and block != 1:
                cells += [assay.Patch(f"{name}.1", donor), assay.Patch(name, donor, heads=[0, 1], positions=[2, -1])]
    cells += [assay.Patch("embed", donor, positions=2), assay.Ablate("final_norm", "mean"), assay.Scale("logits", 2.0)]
    cells += [assay.Apply("blocks.1.mlp.out", lambda x: x.flip(-1)), assay.Ablate("blocks.1.resid_pre", "mean")]
    joint = [assay.Patch("blocks.0.attn.z.1", donor), assay.Patch("blocks.2.mlp.out", donor, positions=4)]
    return [*cells, joint, [assay.Add("module:" + subject.point(subject.site("blocks.1.mlp.out")).path + ".out", 1.0)]]


def test_replay_equals_one_run_an_edit(family: str, tiny_module: Any) -> None:
    check_replay(assay.load(tiny_module(family)))


def test_replay_is_exact_under_eager_attention(tiny_module: Any) -> None:
    check_replay(assay.load(tiny_module("llama", attn_implementation="eager")))


def check_replay(subject: Any) -> None:
    """Hold a sweep over every kind of site against one full forward a cell."""
    donor = subject.run((IDS + 40) % 128, capture=subject.sites())
    cells = every_cell(subject, donor)
    expected = one_by_one(subject, IDS, cells)[:, 0]
    assert torch.allclose(subject.sweep(IDS, cells, metric), expected, atol=1e-4)
    assert torch.allclose(subject.sweep(IDS, cells, metric, exact="forward"), expected, atol=1e-4)
    assert torch.allclose(subject.sweep(IDS, cells, metric, max_rows=3), expected, atol=1e-4)
    changed = (expected - metric(subject.run(IDS).logits)).abs() > 1e-6
    assert int(changed.sum()) > len(cells) // 2, "most cells should change the metric"


def test_padded_prompts_of_different_length(family: str, tiny_module: Any) -> None:
    subject = assay.load(tiny_module(family))
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    ids[0], mask[0], ids[1, 3:], mask[1, 3:] = IDS[0], 1, IDS[0, :6], 1
    batch = subject.tokens(ids, mask=mask)
    cells = [assay.Ablate(f"blocks.{b}.attn.z", positions=p) for b in range(3) for p in (0, 2, "last")]
    cells += [assay.Ablate(f"blocks.{b}.mlp.out", heads=None, rows=1) for b in range(3)]
    found = subject.sweep(batch, cells, metric, reduce=None)
    expected = torch.stack([metric(subject.run(ids, mask=mask, edits=[cell]).logits) for cell in cells])
    assert found.shape == (12, 2)
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.allclose(subject.sweep(batch, cells, metric), expected.mean(1), atol=1e-4)


def test_base_edits_are_in_every_cell(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    noise = assay.Add("embed", torch.randn(32, generator=torch.Generator().manual_seed(0)), positions=2)
    deep = assay.Scale("blocks.0.mlp.out", 0.5)
    cells = [assay.Ablate(f"blocks.{b}.attn.z.{h}") for b in range(3) for h in range(4)]
    for base in ([noise], [noise, deep]):
        expected = torch.stack([metric(subject.run(IDS, edits=[*base, cell]).logits)[0] for cell in cells])
        assert torch.allclose(subject.sweep(IDS, cells, metric, base_edits=base), expected, atol=1e-4)


def test_a_metric_may_read_logits_in_any_way(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("gpt2"))
    cells = [assay.Ablate(f"blocks.{b}.attn.z", positions=p) for b in range(3) for p in (3, 7)]
    metrics: list[Any] = [
        lambda logits: logits[:, -1, 5] - logits[:, -1, 7],
        lambda logits: logits[..., -1, :].softmax(-1)[:, 5],
        lambda logits: logits[:, 2, 5],
        lambda logits: logits.log_softmax(-1)[:, :, 5].mean(1),
        lambda logits: torch.logsumexp(logits, -1).sum(-1),
        lambda logits: logits[torch.arange(len(logits)), -1, torch.full((len(logits),), 5)],
        lambda logits: (logits - logits.mean(-1, keepdim=True))[:, 4:, 9].sum(1),
        lambda logits: logits[:, -1, [5, 7]].sum(-1),
    ]
    for each in metrics:
        expected = torch.stack([each(subject.run(IDS, edits=[cell]).logits)[0] for cell in cells])
        assert torch.allclose(subject.sweep(IDS, cells, each), expected, atol=1e-4)


def test_what_cannot_be_swept_is_refused(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    cells = [assay.Ablate("blocks.0.mlp.out"), assay.Ablate("blocks.1.mlp.out")]
    with pytest.raises(SpecError, match="one value a row"):
        subject.sweep(IDS, cells, lambda logits: logits[:, -1])
    with pytest.raises(SpecError, match="'auto' or 'forward'"):
        subject.sweep(IDS, cells, metric, exact="replay")
    with pytest.raises(SpecError, match="'mean' or None"):
        subject.sweep(IDS, cells, metric, reduce="sum")
    with pytest.raises(InvalidEdit, match="position 9"):
        subject.sweep(IDS, [*cells, assay.Ablate("blocks.0.mlp.out", positions=9)], metric)
    with pytest.raises(InvalidEdit, match="a cell is"):
        subject.sweep(IDS, [[]], metric)
    assert subject.sweep(IDS, [], metric).shape == (0,)


def test_progress_counts_cells(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    seen: list[tuple[int, int]] = []
    cells = [assay.Ablate(f"blocks.{b}.mlp.out", positions=p) for b in range(3) for p in range(9)]
    subject.sweep(IDS, cells, metric, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (27, 27)
    assert all(total == 27 for _, total in seen)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.real_model
@pytest.mark.slow
def test_on_the_real_model_replay_is_exact(real_subject: Any) -> None:
    clean = real_subject.run(
        "When Mary and John went to the store, John gave a drink to", capture=["blocks.*.resid_pre", "blocks.*.attn.z"]
    )
    corrupt = "When Mary and John went to the store, Mary gave a drink to"
    mary, john = (real_subject.tokenizer(name)["input_ids"][0] for name in (" Mary", " John"))
    cells = [assay.Patch(f"blocks.{b}.resid_pre", clean, positions=p) for b in range(0, 30, 7) for p in (0, 9, 13)]
    cells += [assay.Patch(f"blocks.{b}.attn.z.{h}", clean) for b in (0, 20, 29) for h in range(9)]

    def difference(logits: Tensor) -> Tensor:
        return logits[:, -1, mary] - logits[:, -1, john]

    expected = torch.stack([difference(real_subject.run(corrupt, edits=[cell]).logits)[0] for cell in cells])
    assert torch.allclose(real_subject.sweep(corrupt, cells, difference), expected, atol=1e-3)
