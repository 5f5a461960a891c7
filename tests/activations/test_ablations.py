"""Ablations: zero, mean, noise and resample, against the same by hand; draws that depend on the prompt alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import run_with, sites
from torch import Tensor

import assay
from assay.activations.values import Donor
from assay.base.errors import InvalidEdit

SITE = "blocks.1.attn.z"
IDS = torch.tensor([[5, 17, 33, 64, 9], [101, 42, 77, 3, 8], [11, 12, 13, 14, 15], [61, 62, 60, 64, 65]])


@pytest.fixture(scope="module")
def subject(tiny_module: Any) -> Any:
    return assay.load(tiny_module("llama"))


def at(subject: Any, ids: Any, edit: Any, site: str = SITE, **options: Any) -> Tensor:
    """What is at the site after the edit."""
    found: Tensor = subject.run(ids, edits=[edit], capture=site, **options)[site]
    return found


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_zero_and_mean_equal_a_raw_hook(family: str, kind: Any, tiny_module: Any) -> None:
    module = tiny_module(family)
    subject = assay.load(module)
    for name, spec in sites(family, 1).items():
        if name.endswith("resid_mid"):
            continue  # a raw hook on the norm's input would miss the stream that passes by

        def change(x: Tensor) -> None:
            new = torch.zeros_like(x[0, 0]) if kind == "zero" else x.mean((0, 1))
            x[:, 2:4] = new

        found = subject.run(IDS, edits=[assay.Ablate(name, kind, positions=[2, 3])]).logits
        assert torch.allclose(found, run_with(module, IDS, spec, change), atol=1e-5), name


def test_noise_has_the_sites_own_mean_and_spread(subject: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (40, 30), generator=generator)
    plain = subject.run(ids, capture=SITE)[SITE]
    noisy = at(subject, ids, assay.Ablate(SITE, "noise"))
    assert torch.allclose(noisy.mean((0, 1)), plain.mean((0, 1)), atol=0.12 * float(plain.std()))
    assert torch.allclose(noisy.std((0, 1)), plain.std((0, 1)), rtol=0.1)
    centred = [(x - x.mean((0, 1))) / x.std((0, 1)) for x in (plain, noisy)]
    assert abs(float((centred[0] * centred[1]).mean())) < 0.02, "nothing of the value is left"
    fixed = at(subject, ids, assay.Ablate(SITE, "noise", sigma=3.0))
    assert float((fixed - plain.mean((0, 1))).std()) == pytest.approx(3.0, rel=0.02)


def test_a_prompts_noise_is_its_own_wherever_its_row_is(subject: Any) -> None:
    edit = assay.Ablate(SITE, "noise", sigma=1.0)
    mean = subject.run(IDS, capture=SITE)[SITE].mean((0, 1))
    noise = at(subject, IDS, edit) - mean
    order = [2, 0, 3, 1]
    assert torch.allclose(at(subject, IDS[order], edit) - mean, noise[order], atol=1e-5)
    for row in range(4):
        alone = subject.run(IDS[row : row + 1], capture=SITE)[SITE].mean((0, 1))
        assert torch.allclose(at(subject, IDS[row : row + 1], edit)[0] - alone, noise[row], atol=1e-5)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.allclose(at(subject, IDS, edit) - mean, noise, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


def test_noise_is_the_same_for_parts_of_a_site_and_other_spellings(subject: Any) -> None:
    whole = at(subject, IDS, assay.Ablate(SITE, "noise", sigma=1.0))
    plain = subject.run(IDS, capture=SITE)[SITE]
    one = at(subject, IDS, assay.Ablate("blocks.1.attn.hook_z.2", "noise", sigma=1.0, positions=[3, 1], rows=[1]))
    assert torch.allclose(one[1, [1, 3], 2], whole[1, [1, 3], 2])
    one[1, [1, 3], 2] = plain[1, [1, 3], 2]
    assert torch.equal(one, plain), "and nothing else changed"
    heads = at(subject, IDS, assay.Ablate(SITE, "noise", sigma=1.0, heads=[3, 0]))
    assert torch.allclose(heads[:, :, [0, 3]], whole[:, :, [0, 3]])
    assert torch.equal(heads[:, :, [1, 2]], plain[:, :, [1, 2]])


def test_copies_seeds_and_sites_draw_differently(subject: Any) -> None:
    twice = torch.cat([IDS[:1], IDS[:1]])
    drawn = at(subject, twice, assay.Ablate(SITE, "noise", sigma=1.0))
    assert not torch.allclose(drawn[0], drawn[1], atol=0.1), "a prompt repeated for more draws gets other draws"
    other = at(subject, twice, assay.Ablate(SITE, "noise", sigma=1.0, seed=1))
    assert not torch.allclose(drawn, other, atol=0.1)
    there = at(subject, twice, assay.Ablate("blocks.2.attn.z", "noise", sigma=1.0), site="blocks.2.attn.z")
    assert abs(float(torch.corrcoef(torch.stack([drawn.flatten(), there.flatten()]))[0, 1])) < 0.3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["noise", "resample"])
def test_padding_changes_no_draw(subject: Any, side: str, kind: Any) -> None:
    rows = [IDS[0], IDS[1, :3], IDS[2, :3]]
    ids, mask = padded(rows, side)
    options = {"sigma": 1.0} if kind == "noise" else {}
    edit = assay.Ablate(SITE, kind, positions=[0, 2], **options)
    found = at(subject, ids, edit, mask=mask)
    plain = subject.run(ids, mask=mask, capture=SITE)[SITE]
    columns = [5 - len(row) if side == "left" else 0 for row in rows]
    if kind == "noise":
        mean = torch.cat([plain[i, c : c + len(row)] for i, (c, row) in enumerate(zip(columns, rows, strict=True))])
        for i, (column, row) in enumerate(zip(columns, rows, strict=True)):
            alone = at(subject, row[None], edit)[0] - subject.run(row[None], capture=SITE)[SITE].mean((0, 1))
            for position in (0, 2):
                moved = found[i, column + position] - mean.mean(0)
                assert torch.allclose(moved, alone[position], atol=1e-5)
    else:
        for i, column in enumerate(columns):
            donors = [j for j in range(3) if j != i]
            same = [j for j in donors if torch.allclose(found[i, column + 2], plain[j, columns[j] + 2], atol=1e-6)]
            assert len(same) == 1
            assert torch.allclose(found[i, column], plain[same[0], columns[same[0]]], atol=1e-6)


def test_resampling_takes_another_prompts_value_at_the_same_position(subject: Any) -> None:
    plain = subject.run(IDS, capture=SITE)[SITE]
    found = at(subject, IDS, assay.Ablate(SITE, "resample"))
    chosen = [[j for j in range(4) if torch.equal(found[i], plain[j])] for i in range(4)]
    assert all(len(j) == 1 and j != [i] for i, j in enumerate(chosen))
    seeds = {
        tuple(
            next(j for j in range(4) if torch.equal(row, plain[j]))
            for row in at(subject, IDS, assay.Ablate(SITE, "resample", seed=seed))
        )
        for seed in range(12)
    }
    assert len(seeds) > 4, "the seed chooses"
    order = [3, 1, 0, 2]
    assert torch.allclose(at(subject, IDS[order], assay.Ablate(SITE, "resample")), found[order], atol=1e-6)
    part = at(subject, IDS, assay.Ablate(f"{SITE}.1", "resample", positions="last", rows=[2]))
    assert torch.equal(part[2, -1, 1], found[2, -1, 1])
    part[2, -1, 1] = plain[2, -1, 1]
    assert torch.equal(part, plain)


def test_resampling_from_another_run_does_not_depend_on_the_split(subject: Any) -> None:
    pool = torch.randint(3, 128, (6, 5), generator=torch.Generator().manual_seed(1))
    donor = subject.run(pool, capture=SITE)
    light = donor.donor(SITE)
    assert isinstance(light, Donor)
    together = at(subject, IDS, assay.Ablate(SITE, donor))
    for row in range(4):
        (match,) = [j for j in range(6) if torch.equal(together[row], donor[SITE][j])]
        assert torch.equal(at(subject, IDS[row : row + 1], assay.Ablate(SITE, light))[0], donor[SITE][match])
    own = subject.run(IDS[:2], capture=SITE)
    for seed in range(6):
        swapped = at(subject, IDS[:2], assay.Ablate(SITE, own, seed=seed))
        assert torch.equal(swapped, own[SITE].flip(0)), "a prompt is never its own donor"


@pytest.mark.parametrize("kind", ["mean", "noise", "resample", "donor"])
def test_sweeps_agree_with_single_runs(subject: Any, kind: str) -> None:
    donor: Any = subject.run(IDS + 20, capture="blocks.*.attn.z") if kind == "donor" else kind
    cells = [assay.Ablate(f"blocks.{b}.attn.z", donor, positions=p) for b in range(3) for p in (0, 3, "last", None)]
    cells += [assay.Ablate("blocks.1.attn.z", donor, rows=[0, 2], heads=[1])]

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 5] - logits[:, -1, 7]

    expected = torch.stack([metric(subject.run(IDS, edits=[cell]).logits) for cell in cells])
    for exact in ("auto", "forward"):
        found = subject.sweep(IDS, cells, metric, reduce=None, exact=exact)
        assert torch.allclose(found, expected, atol=1e-4), exact


def test_what_cannot_be_ablated_is_refused(subject: Any) -> None:
    cases: list[tuple[Any, str]] = [
        (assay.Ablate("blocks.1.attn.pattern", "noise"), "scores and patterns"),
        (assay.Ablate(SITE, "resample"), "another prompt of at least 5 tokens"),
        (assay.Ablate(SITE, subject.run(IDS[:, :3], capture=SITE)), "another prompt of at least 5 tokens"),
        (assay.Ablate(SITE, subject.run(IDS[:1], capture=SITE)), "another prompt"),
    ]
    for edit, message in cases:
        with pytest.raises(InvalidEdit, match=message):
            subject.run(IDS[:1], edits=[edit])
    with pytest.raises(InvalidEdit, match="no spread; give sigma"):
        subject.run(IDS[:1, :1], edits=[assay.Ablate(SITE, "noise")])
    for options in ({"value": "mean", "sigma": 1.0}, {"value": "noise", "sigma": -1.0}):
        with pytest.raises(InvalidEdit, match="sigma"):
            assay.Ablate(SITE, **options)


def test_a_mean_over_a_run_of_half_precision_is_taken_in_float32(tiny_module: Any) -> None:
    """A sum of many bfloat16 values loses its last digits; 1,200 tokens have to count as 1,200."""
    subject = assay.load(tiny_module("llama").bfloat16())
    rows = [torch.randint(3, 128, (n,), generator=torch.Generator().manual_seed(n)) for n in (60, 59) * 10]
    ids, mask = padded(rows, "left")
    site = "blocks.1.resid_post"
    plain = subject.run(ids, mask=mask, capture=site)[site].double()
    expected = plain[mask.bool()].mean(0)
    found = at(subject, ids, assay.Ablate(site, "mean", positions="last"), site, mask=mask)[0, -1]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.to(torch.bfloat16)) or torch.allclose(found.double(), expected, rtol=2**-8)
