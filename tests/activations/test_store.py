"""Reading a store: batches are a function of the seed and the step, the same tokens in the same rows at every site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import assay
from assay.activations import Live, Source, Store, Texts, harvest
from assay.base.errors import SpecError

SITES = ["module:embed.out", "module:out"]


class Net(nn.Module):
    """Says which token it was given: the first number of a row is its id."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(67, 5, generator=torch.Generator().manual_seed(0))
        weight[:, 0] = torch.arange(67.0)
        self.embed = nn.Embedding(67, 5, _weight=weight)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed(input_ids)[..., :3] * 2


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    corpus = Texts([[3 + (7 * d + i) % 60 for i in range(1 + d % 13)] for d in range(60)])
    subject = assay.load(Net().eval())
    return harvest(
        subject, corpus, SITES, out=tmp_path_factory.mktemp("store"), context=8, rows=2, shard_bytes=8 * 8 * 2 * 6,
        dtype="float32",
    )  # fmt: skip


@given(st.integers(0, 40), st.integers(1, 90), st.integers(0, 3))
def test_a_batch_is_a_function_of_seed_and_step(store: Store, step: int, size: int, seed: int) -> None:
    batch, again = store.batch(step, size, seed), Store.open(store.folder, verify=False).batch(step, size, seed)
    index = store.source(size, seed).index(step)
    for site in SITES:
        assert batch[site].shape == (size, store.widths[site]) and batch[site].dtype == torch.float32
        assert torch.equal(batch[site], again[site])
    ids = store.tokens(index)["token"]
    assert batch["module:embed.out"][:, 0].tolist() == ids.tolist()
    assert torch.equal(batch["module:out"], 2 * batch["module:embed.out"][:, :3])


@pytest.mark.parametrize("size", [7, 64, 1000])
def test_an_epoch_has_every_token_once(store: Store, size: int) -> None:
    source = store.source(size, seed=1)
    steps = -(-3 * store.n // size)
    index = np.concatenate([source.index(step) for step in range(steps)])
    for epoch in range(3):
        assert np.array_equal(np.sort(index[epoch * store.n : (epoch + 1) * store.n]), np.arange(store.n))
    assert not np.array_equal(index[: store.n], index[store.n : 2 * store.n])


@given(st.integers(1, 5), st.integers(5, 40), st.integers(0, 9))
def test_processes_that_train_share_a_batch(store: Store, world: int, size: int, step: int) -> None:
    whole = store.source(size, 2).batch(step)
    for rank in range(world):
        source = store.source(size, 2, rank=rank, world=world)
        part = source.batch(step)
        assert source.batch_size == len(part[SITES[0]])
        for site in SITES:
            assert torch.equal(part[site], whole[site][rank::world])


def test_rows_come_in_the_order_they_were_asked_for(store: Store) -> None:
    index = np.array([store.n - 1, 0, 17, 17, 200, 3])
    rows = store.rows(index)["module:embed.out"]
    assert rows[:, 0].tolist() == store.tokens(index)["token"].tolist()
    assert len(store.parts[0][1].shards) > 3
    assert store.rows(np.empty(0, np.int64))["module:out"].shape == (0, 3)
    whole = torch.cat(list(store.blocks("module:out", 10)))
    assert torch.equal(whole[torch.from_numpy(index)], store.rows(index)["module:out"])


def test_a_batch_is_the_callers_own(store: Store) -> None:
    first = store.batch(0, 16)
    for values in first.values():
        values.zero_()
    assert float(store.batch(0, 16)[SITES[0]].abs().sum()) > 0


def test_stored_and_live_are_sources(store: Store) -> None:
    subject = assay.load(Net().eval())
    live = Live(subject, Texts([[3, 4, 5, 6]] * 9), SITES, batch_size=4, size=8, context=4)
    for source in (store.source(4), live):
        assert isinstance(source, Source)
        assert source.sites == tuple(SITES) and dict(source.widths) == {SITES[0]: 5, SITES[1]: 3}
        assert source.batch_size == 4
        state = source.state()
        source.restore(state)
        assert source.describe()["kind"] in ("store", "live")
        batch = source.batch(0)
        assert torch.equal(batch[SITES[1]], 2 * batch[SITES[0]][:, :3])


def test_a_state_of_another_source_is_refused(store: Store) -> None:
    state = store.source(8, seed=0).state()
    store.source(8, seed=0).restore(state)
    others: list[dict[str, Any]] = [{"seed": 1}, {"batch_size": 9}, {"sites": SITES[:1]}, {"world": 2}, {"chunk": 3}]
    for other in others:
        with pytest.raises(SpecError, match="of another source"):
            store.source(**{"batch_size": 8, "seed": 0, **other}).restore(state)


def test_what_is_not_there_is_told(store: Store, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no activations of 'module:embed\.in'; did you mean 'module:embed\.out'"):
        store.batch(0, 4, sites=["module:embed.in"])
    with pytest.raises(SpecError, match="rows -1 to 3"):
        store.rows(np.array([3, -1]))
    with pytest.raises(SpecError, match=r"holds no activations \(no manifest\.json\)"):
        Store.open(tmp_path)
    for options in ({"batch_size": 0}, {"batch_size": 4, "rank": 2, "world": 2}):
        with pytest.raises(SpecError):
            store.source(**options)
    with pytest.raises(SpecError, match="steps count from 0"):
        store.batch(-1, 4)


def test_sites_are_named_in_either_spelling(tiny_subject: Any, tmp_path: Path) -> None:
    text = Texts(["When Mary and John went to the store"] * 3)
    store = harvest(tiny_subject, text, "blocks.0.hook_resid_post", out=tmp_path, context=8)
    assert store.sites == ("blocks.0.resid_post",) and repr(store).startswith("<Store 27 tokens, bfloat16")
    assert store.batch(0, 2, sites=["blocks.0.hook_resid_post"])["blocks.0.resid_post"].shape == (2, 32)
    assert len(store) == store.n
