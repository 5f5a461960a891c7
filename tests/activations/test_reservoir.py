"""The reservoir: every token leaves it once, mixed, and a stream that is restored gives what would have come."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import assay
from assay.activations import Live, Reservoir, Texts
from assay.base.errors import SpecError
from assay.subjects.tiny import tiny_model

SITES = ["blocks.0.resid_post", "blocks.0.attn.z"]
CORPUS = Texts([[3 + (7 * d + i) % 60 for i in range(2 + d % 13)] for d in range(40)])


@pytest.fixture(scope="module")
def subject() -> Any:
    return assay.load(tiny_model("gpt2"))


def stream(subject: Any, **options: Any) -> Live:
    given = {"batch_size": 16, "size": 64, "context": 8, "rows": 3, "seed": 0, **options}
    return Live(subject, CORPUS, SITES, **given)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9), st.integers(0, 5))
def test_no_row_is_lost_or_doubled(size: int, batch: int, steps: int, seed: int) -> None:
    batch = min(size, batch)
    reservoir = Reservoir(size, {"x": 1, "y": 2}, seed=seed)
    made = torch.arange(float(size + steps * batch))[:, None]
    reservoir.put(0, {"x": made[:size], "y": made[:size].repeat(1, 2)})
    out = []
    for step in range(steps):
        fresh = made[size + step * batch : size + (step + 1) * batch]
        found = reservoir.swap(step, {"x": fresh, "y": fresh.repeat(1, 2)})
        assert torch.equal(found["y"], found["x"].repeat(1, 2))
        out.append(found["x"])
    assert torch.equal(torch.cat([*out, reservoir.slots["x"]]).flatten().sort().values, made.flatten())


def test_what_is_drawn_depends_on_seed_and_step_alone() -> None:
    one, two = Reservoir(100, {"x": 1}, seed=3), Reservoir(100, {"x": 5}, seed=3)
    assert torch.equal(one.drawn(7, 20), two.drawn(7, 20))
    assert torch.equal(one.drawn(7, 20), one.drawn(7, 30)[:20])
    assert len(one.drawn(7, 100).unique()) == 100
    assert not torch.equal(one.drawn(8, 20), one.drawn(7, 20))
    assert not torch.equal(Reservoir(100, {"x": 1}, seed=4).drawn(7, 20), one.drawn(7, 20))


def test_every_slot_is_as_likely() -> None:
    reservoir = Reservoir(50, {"x": 1}, seed=0)
    counts = torch.bincount(torch.cat([reservoir.drawn(step, 10) for step in range(500)]), minlength=50)
    # Draws of one step are without replacement, which makes the counts more even than a multinomial: the lower tail.
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_neighbours_leave_far_apart() -> None:
    reservoir, size, batch = Reservoir(1024, {"x": 1}, seed=0), 1024, 32
    reservoir.put(0, {"x": torch.zeros(size, 1)})
    left: dict[int, int] = {}
    for step in range(400):
        fresh = torch.arange(step * batch, (step + 1) * batch, dtype=torch.float32)[:, None] + 1
        left |= {int(token): step for token in reservoir.swap(step, {"x": fresh})["x"].flatten() if token}
    stays = torch.tensor([step - (token - 1) // batch for token, step in left.items() if token < 200 * batch])
    assert 25 < float(stays.float().mean()) < 39  # size / batch is 32
    together = sum(left.get(t, -1) == left.get(t + 1, -2) for t in range(1, 6000))
    assert together / 6000 < 0.05


def test_bfloat16_slots_give_float32_batches() -> None:
    reservoir = Reservoir(4, {"x": 3}, seed=0, dtype=torch.bfloat16)
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    reservoir.put(0, {"x": values})
    found = reservoir.swap(0, {"x": values})["x"]
    assert found.dtype == torch.float32
    assert torch.equal(found, values[reservoir.drawn(0, 4)].bfloat16().float())


def test_a_stream_gives_what_the_model_computes(subject: Any) -> None:
    live = stream(subject)
    every = torch.tensor([token for ids in CORPUS.documents for token in ids])
    known: dict[str, list[torch.Tensor]] = {site: [] for site in SITES}
    for at in range(0, len(every), 8):
        run = subject.run(every[None, at : at + 8], capture=SITES)
        for site in SITES:
            known[site].append(run[site][0].flatten(1))
    table = {site: torch.cat(parts) for site, parts in known.items()}
    for step in range(12):
        batch = live.batch(step)
        nearest = [(batch[site][:, None] - table[site]).norm(dim=-1) for site in SITES]
        for distance in nearest:
            assert float(distance.min(1).values.max()) < 1e-4
        assert torch.equal(nearest[0].argmin(1), nearest[1].argmin(1))  # the same tokens at both sites
    assert live.epoch == (64 + 12 * 16) // len(every)


@pytest.mark.parametrize(("before", "after"), [(0, 3), (1, 12), (5, 2), (17, 8)])
def test_a_restored_stream_goes_on_as_if_nothing_had_happened(subject: Any, before: int, after: int) -> None:
    live, other = stream(subject), stream(subject)
    for step in range(before):
        live.batch(step)
    kept = io.BytesIO()
    torch.save(live.state(), kept)
    expected = [live.batch(before + step) for step in range(after)]
    kept.seek(0)
    other.restore(torch.load(kept, weights_only=True))
    for step, batch in enumerate(expected):
        found = other.batch(before + step)
        assert all(torch.equal(found[site], batch[site]) for site in SITES)
    assert other.epoch == live.epoch


def test_a_state_is_a_copy(subject: Any) -> None:
    live = stream(subject)
    live.batch(0)
    state = live.state()
    expected = [live.batch(step) for step in range(1, 6)]
    live.restore(state)
    again = [live.batch(step) for step in range(1, 6)]
    assert all(torch.equal(a[site], b[site]) for a, b in zip(expected, again, strict=True) for site in SITES)


def test_a_stream_goes_forward_only(subject: Any) -> None:
    live = stream(subject)
    first = live.batch(0)
    again = live.batch(0)  # a trainer may look at its first batch before it begins
    assert all(torch.equal(first[site], again[site]) for site in SITES)
    again[SITES[0]].zero_()
    assert torch.equal(live.batch(0)[SITES[0]], first[SITES[0]])
    live.batch(1)
    for step in (0, 3):
        with pytest.raises(SpecError, match=f"is at step 2, and step {step} was asked for"):
            live.batch(step)


def test_processes_read_different_rows(subject: Any) -> None:
    tokens = []
    for rank in (0, 1):
        live = stream(subject, rank=rank, world=2, size=32)
        live.batch(0)
        tokens.append(live.state()["cursor"]["row"] % 2)
    assert tokens == [1, 0]  # the row after one of its own


def test_a_stream_is_told_from_another(subject: Any) -> None:
    live = stream(subject)
    state = live.state()
    for other in (
        {"seed": 1},
        {"size": 65},
        {"batch_size": 8},
        {"context": 7},
        {"max_norm": 50.0},
        {"dtype": "bfloat16"},
    ):
        with pytest.raises(SpecError, match="of another source"):
            stream(subject, **other).restore(state)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 65}, "batch_size=65, size=64"),
        ({"batch_size": 0}, "a batch has from 1 row"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"rank": 1}, "rank is below world"),
    ],
)
def test_options_are_checked(options: dict[str, Any], said: str, subject: Any) -> None:
    with pytest.raises(SpecError, match=said):
        stream(subject, **options)


def test_a_corpus_that_gives_nothing_is_told(subject: Any) -> None:
    with pytest.raises(SpecError, match="no row of at least 2 tokens"):
        Live(subject, Texts([[3]]), SITES, batch_size=1)
    live = Live(subject, CORPUS, SITES, batch_size=1, size=4, context=8, skip_first=8)
    with pytest.raises(SpecError, match="every token of the corpus is left out"):
        live.batch(0)
    with pytest.raises(SpecError, match="at least one slot"):
        Reservoir(0, {"x": 1})
    with pytest.raises(SpecError, match="a batch of 5 from a reservoir of 4"):
        Reservoir(4, {"x": 1}).drawn(0, 5)
