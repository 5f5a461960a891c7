"""Writing: edits equal raw-hook edits, keep their laws, and refuse what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import outside, run_with, sites
from torch import Tensor

import assay
from assay.base.errors import InvalidEdit

IDS = torch.tensor([[5, 17, 33, 64, 9, 101, 42, 77, 3]])
SUBJECTS: dict[str, Any] = {}
"""Filled by a fixture; hypothesis calls a test many times and takes no fixture of its own."""


def test_an_edit_at_every_site_equals_a_raw_hook_edit(family: str, tiny_module: Any) -> None:
    module = tiny_module(family)
    subject = assay.load(module)
    by_hand = {**sites(family, 1), **outside(family)}
    generator = torch.Generator().manual_seed(0)
    for name, spec in by_hand.items():
        if name.endswith("resid_mid"):
            continue  # a raw hook on the norm's input would miss the stream that passes by; its own test is below
        shape = subject.run(IDS, capture=name)[name].shape[1:]
        value = torch.randn(shape[-1], generator=generator)

        def change(x: Tensor, value: Tensor = value) -> None:
            x[:, 3:5] += 2.0 * value

        found = subject.run(IDS, edits=[assay.Add(name, value, scale=2.0, positions=[3, 4])]).logits
        expected = run_with(module, IDS, spec, change)
        assert torch.allclose(found, expected, atol=1e-5), name
        assert not torch.equal(found, subject.run(IDS).logits), f"{name}: the edit did nothing"


def test_editing_resid_mid_moves_the_stream_and_what_the_mlp_reads(family: str, tiny_module: Any) -> None:
    subject = assay.load(tiny_module(family))
    if not subject.parts.has("resid_mid"):
        pytest.skip("attention and MLP read the same stream")
    value = torch.randn(32, generator=torch.Generator().manual_seed(0))
    mid = subject.run(
        IDS, edits=[assay.Add("blocks.1.resid_mid", value)], capture=["blocks.1.resid_post", "blocks.1.mlp.out"]
    )
    plain = subject.run(IDS, capture="blocks.1.resid_mid")
    expected = plain["blocks.1.resid_mid"] + value + mid["blocks.1.mlp.out"]
    assert torch.allclose(mid["blocks.1.resid_post"], expected, atol=1e-5)
    same = subject.run(IDS, edits=[assay.Add("blocks.1.attn.out", value)])
    assert torch.allclose(mid.logits, same.logits, atol=1e-4)


def test_adding_after_one_block_is_adding_before_the_next(family: str, tiny_module: Any) -> None:
    subject, value = assay.load(tiny_module(family)), torch.ones(32)
    after = subject.run(IDS, edits=[assay.Add("blocks.0.resid_post", value)]).logits
    before = subject.run(IDS, edits=[assay.Add("blocks.1.resid_pre", value)]).logits
    assert torch.equal(after, before)


def test_patterns_and_scores_can_be_edited(family: str, tiny_module: Any) -> None:
    """A pattern put in place by hand gives z = pattern times values."""
    subject = assay.load(tiny_module(family))
    pattern = torch.eye(9).expand(1, 4, 9, 9)
    run = subject.run(
        IDS,
        edits=[assay.Set("blocks.1.attn.pattern", pattern.transpose(1, 2))],
        capture=["blocks.1.attn.z", "blocks.1.attn.v", "blocks.1.attn.pattern"],
    )
    values = run["blocks.1.attn.v"]
    assert torch.allclose(run["blocks.1.attn.z"], values.repeat_interleave(4 // values.shape[2], 2), atol=1e-5)
    assert torch.equal(run["blocks.1.attn.pattern"], pattern)
    blind = subject.run(IDS, edits=[assay.Set("blocks.1.attn.scores", 0.0)], capture="blocks.1.attn.pattern")
    seen = subject.run(IDS, capture="blocks.1.attn.pattern")["blocks.1.attn.pattern"] > 0
    uniform = seen / seen.sum(-1, keepdim=True)
    assert torch.allclose(blind["blocks.1.attn.pattern"], uniform), "equal scores, and still no look ahead"
    untouched = subject.run(IDS, edits=[assay.Scale("blocks.1.attn.pattern", 1.0)]).logits
    assert torch.allclose(untouched, subject.run(IDS).logits, atol=1e-5)


def test_result_edits_add_up_in_the_output(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    run = subject.run(IDS, capture=["blocks.1.attn.result", "blocks.1.attn.out"])
    assert torch.allclose(run["blocks.1.attn.result"].sum(2), run["blocks.1.attn.out"], atol=1e-5)
    by_result = subject.run(IDS, edits=[assay.Ablate("blocks.1.attn.result.2")]).logits
    by_z = subject.run(IDS, edits=[assay.Ablate("blocks.1.attn.z.2")]).logits
    assert torch.allclose(by_result, by_z, atol=1e-5)


@given(
    kind=st.sampled_from(["zero", "mean", "tensor"]),
    site=st.sampled_from(["blocks.1.resid_post", "blocks.0.attn.z", "blocks.2.mlp.post"]),
    positions=st.sampled_from([None, "last", 0, [1, 3], slice(2, None)]),
)
def test_ablating_twice_is_ablating_once(kind: str, site: str, positions: Any) -> None:
    subject = SUBJECTS["llama"]
    value: Any = torch.full((1,), 0.5) if kind == "tensor" else kind
    edit = assay.Ablate(site, value, positions=positions)
    once, twice = subject.run(IDS, edits=[edit]).logits, subject.run(IDS, edits=[edit, edit]).logits
    assert torch.allclose(once, twice, atol=1e-5)


@given(k=st.integers(1, 4), seed=st.integers(0, 5))
def test_projecting_out_is_idempotent_and_leaves_no_component(k: int, seed: int) -> None:
    subject = SUBJECTS["llama"]
    directions = torch.randn(k, 32, generator=torch.Generator().manual_seed(seed))
    edit = assay.ProjectOut("blocks.1.resid_post", directions)
    run = subject.run(IDS, edits=[edit], capture="blocks.1.resid_post")
    assert (run["blocks.1.resid_post"] @ directions.T).abs().max() < 1e-4
    assert torch.allclose(subject.run(IDS, edits=[edit, edit]).logits, run.logits, atol=1e-4)


def test_clamp_bounds_values_or_a_component() -> None:
    subject, v = SUBJECTS["llama"], torch.randn(32, generator=torch.Generator().manual_seed(0))
    run = subject.run(
        IDS, edits=[assay.Clamp("blocks.1.resid_post", low=-0.1, high=0.2)], capture="blocks.1.resid_post"
    )
    assert float(run["blocks.1.resid_post"].min()) >= -0.1 - 1e-6
    assert float(run["blocks.1.resid_post"].max()) <= 0.2 + 1e-6
    edit = assay.Clamp("blocks.1.resid_post", v, low=0.3, high=0.3)
    clamped = subject.run(IDS, edits=[edit], capture="blocks.1.resid_post")["blocks.1.resid_post"]
    assert torch.allclose(clamped @ (v / v.norm()), torch.full((1, 9), 0.3), atol=1e-4)
    plain = subject.run(IDS, capture="blocks.1.resid_post")["blocks.1.resid_post"]
    rest = (clamped - plain) - ((clamped - plain) @ (v / v.norm()))[..., None] * (v / v.norm())
    assert rest.abs().max() < 1e-4


def test_rows_positions_and_heads_select() -> None:
    subject, ids = SUBJECTS["llama"], torch.cat([IDS, IDS + 1, IDS + 2])
    value = torch.ones(8)
    edit = assay.Add("blocks.1.attn.z", value, rows=[0, 2], positions=[-1, 2], heads=[1, 3])
    run = subject.run(ids, edits=[edit], capture="blocks.1.attn.z")
    plain = subject.run(ids, capture="blocks.1.attn.z")
    moved = run["blocks.1.attn.z"] - plain["blocks.1.attn.z"]
    expected = torch.zeros(3, 9, 4, 8)
    for row in (0, 2):
        for position in (8, 2):
            for head in (1, 3):
                expected[row, position, head] = 1
    assert torch.allclose(moved, expected, atol=1e-6)
    named = subject.run(ids, edits=[assay.Add("blocks.1.attn.z.3", value, rows=1)], capture="blocks.1.attn.z")
    kept = subject.run(
        ids, edits=[assay.Add("blocks.1.attn.z", value, rows=slice(1, 2), heads=3)], capture="blocks.1.attn.z"
    )
    assert torch.equal(named.logits, kept.logits)


def test_a_patch_from_another_run(family: str, tiny_module: Any) -> None:
    """Patching the whole stream entering the first block makes this run the other one."""
    subject, other = assay.load(tiny_module(family)), (IDS + 20) % 128
    donor = subject.run(other, capture=["blocks.0.resid_pre", "blocks.1.attn.z"])
    assert torch.allclose(
        subject.run(IDS, edits=[assay.Patch("blocks.0.resid_pre", donor)]).logits, donor.logits, atol=1e-5
    )
    run = subject.run(IDS, edits=[assay.Patch("blocks.1.attn.z.2", donor, positions=4)], capture="blocks.1.attn.z")
    assert torch.equal(run["blocks.1.attn.z"][:, 4, 2], donor["blocks.1.attn.z"][:, 4, 2])
    assert not torch.equal(run["blocks.1.attn.z"][:, 4, 1], donor["blocks.1.attn.z"][:, 4, 1])


def test_a_patch_between_positions_of_padded_prompts() -> None:
    subject = SUBJECTS["llama"]
    donor = subject.run(IDS[:, :4], capture="blocks.1.resid_pre")
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    ids[0], mask[0], ids[1, 3:], mask[1, 3:] = IDS[0], 1, IDS[0, :6], 1
    edit = assay.Patch("blocks.1.resid_pre", donor, positions=-1, source_positions=1)
    run = subject.run(ids, mask=mask, edits=[edit], capture="blocks.1.resid_pre")
    for row in range(2):
        assert torch.equal(run["blocks.1.resid_pre"][row, -1], donor["blocks.1.resid_pre"][0, 1])


def test_the_mean_is_over_the_whole_run_and_its_real_tokens() -> None:
    """Positions say where it is put, not what it is the mean of; padding does not count."""
    subject, site = SUBJECTS["llama"], "blocks.1.resid_post"
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    ids[0], mask[0], ids[1, 3:], mask[1, 3:] = IDS[0], 1, IDS[0, :6], 1
    plain = subject.run(ids, mask=mask, capture=site)[site]
    mean = torch.cat([plain[0], plain[1, 3:]]).mean(0)
    edit = assay.Ablate(site, "mean", positions="last")
    found = subject.run(ids, mask=mask, edits=[edit], capture=site)[site]
    assert torch.allclose(found[:, -1], mean.expand(2, 32), atol=1e-6)
    assert torch.equal(found[:, :-1], plain[:, :-1])
    cells = [edit, assay.Ablate(site, "mean")]
    batch = subject.tokens(ids, mask=mask)
    expected = [subject.run(batch, edits=[cell]).logits[:, -1, 5] for cell in cells]
    assert torch.allclose(
        subject.sweep(batch, cells, lambda x: x[:, -1, 5], reduce=None), torch.stack(expected), atol=1e-5
    )


def test_position_embeddings_have_rows_too(tiny_module: Any) -> None:
    subject, ids = assay.load(tiny_module("gpt2")), torch.cat([IDS, IDS + 1])
    edit = assay.Add("pos_embed", 1.0, rows=1, positions=2)
    run = subject.run(ids, edits=[edit], capture=["pos_embed", "blocks.0.resid_pre"])
    plain = subject.run(ids, capture=["pos_embed", "blocks.0.resid_pre"])
    moved = run["blocks.0.resid_pre"] - plain["blocks.0.resid_pre"]
    expected = torch.zeros(2, 9, 32)
    expected[1, 2] = 1
    assert run["pos_embed"].shape == (2, 9, 32)
    assert torch.allclose(moved, expected, atol=1e-6)
    cells = [edit, assay.Add("pos_embed", 1.0)]
    by_one = [subject.run(ids, edits=[cell]).logits[:, -1, 5] for cell in cells]
    assert torch.allclose(subject.sweep(ids, cells, lambda x: x[:, -1, 5], reduce=None), torch.stack(by_one), atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    subject = SUBJECTS["llama"]
    cases: list[tuple[Any, str]] = [
        (assay.Add("blocks.1.resid_post", torch.ones(31)), r"\(31,\) does not broadcast"),
        (assay.Add("blocks.1.resid_post", 1.0, positions=9), "position 9 is outside a prompt of 9 tokens"),
        (assay.Add("blocks.1.resid_post", 1.0, positions="first"), "the only word is 'last'"),
        (assay.Add("blocks.1.resid_post", 1.0, rows=1), r"rows=1"),
        (assay.Add("blocks.1.resid_post", 1.0, heads=1), "has no heads"),
        (assay.Add("blocks.1.attn.z", 1.0, heads=4), "heads=4: 4 is outside 0 to 3"),
        (assay.Add("blocks.1.attn.z.1", 1.0, heads=2), "names a head already"),
        (assay.ProjectOut("blocks.1.resid_post", torch.zeros(32)), "zero or linearly dependent"),
        (assay.ProjectOut("blocks.1.resid_post", torch.ones(8)), "width 8 at a site of width 32"),
        (assay.Apply("blocks.1.resid_post", lambda x: x[:, 1:]), "the function returned"),
        (assay.Add("blocks.1.resid_post", 1.0, positions=slice(10, 20)), "selects no token"),
        (assay.Add("blocks.1.resid_post", 1.0, positions=[]), "selects no token"),
        (assay.Clamp("blocks.1.resid_post", torch.randn(2, 32), low=0.0), "one direction, and 2"),
        (assay.Patch("blocks.1.resid_post", torch.ones(1, 4, 32), positions=2, source_positions=5), "position 5"),
        (assay.Add("blocks.1.norm1.scale", 1.0), "can be captured, not edited"),
    ]
    for edit, message in cases:
        with pytest.raises(InvalidEdit, match=message):
            subject.run(IDS, edits=[edit])
    short = subject.run(IDS[:, :5], capture="blocks.1.resid_pre")
    with pytest.raises(InvalidEdit, match="source"):
        subject.run(IDS, edits=[assay.Patch("blocks.1.resid_pre", short)])
    with pytest.raises(InvalidEdit, match="low="):
        assay.Clamp("blocks.1.resid_post")


def test_a_value_may_have_an_entry_for_each_row_and_position() -> None:
    """The leading dimensions follow the order of rows= and positions=, however rows are grouped inside."""
    subject, site = SUBJECTS["llama"], "blocks.1.attn.z"
    rows = [IDS[0], IDS[0, :5], IDS[0, 2:8]]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 9 - len(row) :], mask[i, 9 - len(row) :] = row, 1
    generator = torch.Generator().manual_seed(0)
    plain = subject.run(ids, mask=mask, capture=site)[site]

    def check(edit: Any, expected: Tensor) -> None:
        found = subject.run(ids, mask=mask, edits=[edit], capture=site)
        assert torch.allclose(found[site], expected, atol=1e-6)
        cells = [edit, assay.Scale("blocks.2.mlp.out", 0.5)]
        for exact in ("auto", "forward"):
            swept = subject.sweep(
                subject.tokens(ids, mask=mask), cells, lambda x: x[:, -1, 5], reduce=None, exact=exact
            )
            assert torch.allclose(swept[0], found.logits[:, -1, 5], atol=1e-4)

    value = torch.randn(3, 1, 4, 8, generator=generator)
    check(assay.Add(site, value), plain + value)
    value = torch.randn(3, 2, 4, 8, generator=generator)
    expected = plain.clone()
    for i, row in enumerate(rows):
        expected[i, 9 - len(row) + 3], expected[i, -1] = value[i, 0], value[i, 1]
    check(assay.Set(site, value, positions=[3, -1]), expected)
    check(assay.Set(site, value[[2, 0, 1]], positions=[3, -1], rows=[2, 0, 1]), expected)
    expected = plain.clone()
    expected[2, [-1, 3]], expected[0, [-1, 2]] = value[0], value[1]
    positions = [[8, 2], [0], [5, 0]]  # each row has its own
    check(assay.Set(site, value[:2], positions=positions, rows=[2, 0]), expected)
    expected = plain.clone()
    expected[1:, :, 1] = value[:2, :1, 0]
    check(assay.Ablate(site, value[:2, :1, 0], heads=1, rows=[1, 2]), expected)
    for shape in ((2, 1, 4, 8), (3, 3, 4, 8)):
        with pytest.raises(InvalidEdit, match=r"entries for the (3 rows|2 positions) selected"):
            subject.run(ids, mask=mask, edits=[assay.Add(site, torch.ones(shape), positions=[0, 1])])


@pytest.mark.parametrize("padding", ["left", "right"])
def test_positions_by_text_are_each_rows_own(padding: str, tiny_subject: Any) -> None:
    texts = ["When Mary and John went to the store", "Paris and John"]
    site, v = "blocks.2.resid_post", torch.ones(32)
    options = {"padding": padding, "capture": site}
    by_text = tiny_subject.run(texts, edits=[assay.Add(site, v, positions=assay.At(" John"))], **options)
    by_index = tiny_subject.run(texts, edits=[assay.Add(site, v, positions=[[3], [-1]])], **options)
    assert torch.equal(by_text[site], by_index[site])
    plain = tiny_subject.run(texts, **options)[site]
    assert int((by_text[site] != plain).any(-1).sum()) == 2
    one = tiny_subject.run(texts, edits=[assay.Add(site, v, positions=assay.At(" went"), rows=0)], **options)
    span = tiny_subject.run(texts, edits=[assay.Add(site, v, positions=assay.Span(19, 23), rows=0)], **options)
    assert torch.equal(one[site], span[site])
    cells = [assay.Ablate(f"blocks.{b}.attn.z", positions=assay.At(" John")) for b in range(6)]
    batch = tiny_subject.tokens(texts, side="left")
    expected = [tiny_subject.run(batch, edits=[cell]).logits[:, -1, 5] for cell in cells]
    found = tiny_subject.sweep(batch, cells, lambda x: x[:, -1, 5], reduce=None)
    assert torch.allclose(found, torch.stack(expected), atol=1e-4)
    for wrong, message in (
        (assay.At(" store"), "row 1: no tokens spell ' store'"),
        (assay.Span(0, 20), "row 1: characters 0 to 20 of a text of 14"),
    ):
        with pytest.raises(InvalidEdit, match=message):
            tiny_subject.run(texts, edits=[assay.Add(site, v, positions=wrong)])


def test_a_patch_reads_where_the_source_says_it(tiny_subject: Any) -> None:
    """The name stands at another position in the other prompt; each is found in its own."""
    clean, corrupt, site = "When John and Mary went to the store", "Mary and John went", "blocks.3.resid_pre"
    donor = tiny_subject.run(clean, capture=site)
    edit = assay.Patch(site, donor, positions=assay.At(" John"), source_positions=assay.At(" John"))
    ids = tiny_subject.run(corrupt, edits=[edit], capture=site)
    (at,) = ids.batch.columns(assay.At(" John"))[0]
    assert torch.equal(ids[site][0, at], donor[site][0, 1])
    light = assay.Patch(site, donor.donor(site), positions=assay.At(" John"), source_positions=assay.At(" John"))
    assert torch.equal(tiny_subject.run(corrupt, edits=[light]).logits, ids.logits)


def test_raw_sites_refuse_what_their_shape_does_not_have() -> None:
    """A raw module's tensor may have no positions or rows; they are then not guessed."""

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.flat, self.out = torch.nn.Embedding(128, 6), torch.nn.Identity(), torch.nn.Linear(6, 4)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.flat(self.embed(ids).flatten(0, 1)).view(*ids.shape, 6)
            logits: Tensor = self.out(x.mean(1))
            return logits

    subject, ids = assay.load(Pooled().eval()), torch.cat([IDS, IDS + 1])
    edit = assay.Add("module:out.out", torch.ones(4), rows=1)
    moved = subject.run(ids, edits=[edit]).logits - subject.run(ids).logits
    assert torch.equal(moved.round(decimals=5), torch.tensor([[0.0] * 4, [1.0] * 4]))
    cases: list[tuple[Any, str]] = [
        (assay.Add("module:out.out", 1.0, positions=2), r"positions=2, and the site has no positions.*\(2, 4\)"),
        (assay.Add("module:flat.out", 1.0, rows=1), r"\(18, 6\) and does not have the 2 rows"),
        (assay.Add("module:flat.out", 1.0, positions=0), "no positions"),
    ]
    for wrong, message in cases:
        with pytest.raises(InvalidEdit, match=message):
            subject.run(ids, edits=[wrong])
    assert not torch.equal(subject.run(ids, edits=[assay.Add("module:flat.out", 1.0)]).logits, subject.run(ids).logits)


def test_half_precision_edits_keep_their_type_and_their_digits(tiny_module: Any) -> None:
    """Directions are orthonormal to float32 inside; what leaves has the site's type."""
    site = "blocks.1.resid_post"
    directions = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    for dtype in (torch.bfloat16, torch.float16):
        subject = assay.load(tiny_module("llama").to(dtype))
        plain = subject.run(IDS, capture=site)[site]
        for edit in (
            assay.Add(site, directions[0], scale=2.0),
            assay.Set(site, directions[0].double()),
            assay.Scale(site, 0.5),
            assay.Clamp(site, directions[0], low=0.0, high=0.0),
            assay.Clamp(site, low=-0.5),
            assay.Ablate(site, "mean"),
            assay.Ablate(site, "noise"),
            assay.Patch(site, plain.float() + 1),
            assay.ProjectOut(site, directions),
        ):
            run = subject.run(IDS, edits=[edit], capture=site)
            assert run[site].dtype == run.logits.dtype == dtype
        basis = torch.linalg.qr(directions.T.double()).Q
        exact = plain.double() - plain.double() @ basis @ basis.T
        assert torch.allclose(run[site].double(), exact, atol=float(plain.abs().max()) * torch.finfo(dtype).eps)


@pytest.fixture(autouse=True, scope="module")
def _subjects(tiny_module: Any) -> None:
    SUBJECTS["llama"] = assay.load(tiny_module("llama"))
