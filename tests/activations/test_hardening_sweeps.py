"""Sweeps hold their promises for odd metrics, containers and caches; what they cannot do has a clear error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

import assay
from assay.activations.lazy import Known, LazyLogits
from assay.base.errors import InvalidEdit, SpecError

IDS = torch.tensor([[5, 17, 33, 64, 9, 101, 42, 77, 3]])
TWO = torch.cat([IDS, IDS.flip(1)])


@pytest.fixture
def untyped() -> Iterator[None]:
    """Types are not checked at run time, as they are not for users: what is wrong reaches assay's own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 7]


def cells() -> list[Any]:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    return [assay.Add(f"blocks.{b}.resid_post", vector, positions=p) for b in range(3) for p in range(9)]


def one_by_one(subject: Any, ids: Tensor, each: Any, some: list[Any], **options: Any) -> Tensor:
    """The metric of one run a cell."""
    return torch.stack([each(subject.run(ids, edits=[cell], **options).logits).float() for cell in some])


LOOKING_ACROSS: list[Any] = [
    lambda logits: logits[:, -1, 5] - logits[:, -1, 5].mean(),
    lambda logits: logits[:, -1, 5] * torch.arange(len(logits)),
    lambda logits: logits[:, -1].softmax(0)[:, 5],
    lambda logits: (logits - logits.mean(0)).logsumexp(-1).sum(-1),
]


@pytest.mark.parametrize("each", LOOKING_ACROSS)
def test_a_metric_that_looks_across_rows_is_refused(each: Any, tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    with pytest.raises(SpecError, match="from its own logits"):
        subject.sweep(IDS, cells(), each)
    alone = one_by_one(subject, IDS, each, cells()[:3])
    assert torch.allclose(subject.sweep(IDS, cells()[:3], each, exact="forward"), alone[:, 0], atol=1e-5)


def test_with_several_prompts_a_metric_sees_those_of_one_cell(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    found = subject.sweep(TWO, cells()[:6], LOOKING_ACROSS[0], reduce=None)
    assert torch.allclose(found, one_by_one(subject, TWO, LOOKING_ACROSS[0], cells()[:6]), atol=1e-4)


def test_cells_that_change_nothing_do_not_hide_a_metric_that_looks_across_rows(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    nothing = [assay.Add("blocks.0.resid_post", 0.0, positions=0) for _ in range(16)]
    with pytest.raises(SpecError, match="from its own logits"):
        subject.sweep(IDS, [*nothing, *cells()], LOOKING_ACROSS[0], max_rows=4)


def test_holding_a_metric_costs_two_calls_on_one_row(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    rows: list[int] = []

    def counting(logits: Tensor) -> Tensor:
        rows.append(len(logits))
        return metric(logits)

    subject.sweep(IDS, cells(), counting, max_rows=5)
    assert rows.count(1) <= 2 + 1, "the first group alone is looked at twice (and one cell may be left over)"
    assert sum(rows) == len(cells()) + 2


def test_counts_and_truth_values_are_numbers(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("gpt2"))
    best = int(subject.run(IDS).logits[0, -1].argmax())
    for each in (lambda logits: logits[:, -1].argmax(-1), lambda logits: logits[:, -1].argmax(-1) == best):
        for some in (cells(), cells()[:1]):
            found = subject.sweep(IDS, some, each)
            assert found.is_floating_point()
            assert torch.equal(found, one_by_one(subject, IDS, each, some)[:, 0])
        both = subject.sweep(TWO, cells(), each)
        assert torch.allclose(both, one_by_one(subject, TWO, each, cells()).mean(1))


def test_a_complex_metric_measures_two_things_in_one_sweep(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("gpt2"))
    found = subject.sweep(IDS, cells(), lambda logits: torch.complex(metric(logits), logits[:, 2, 5]))
    assert torch.allclose(found.real, subject.sweep(IDS, cells(), metric), atol=1e-5)
    assert torch.allclose(found.imag, subject.sweep(IDS, cells(), lambda logits: logits[:, 2, 5]), atol=1e-5)
    with pytest.raises(SpecError, match="from its own logits"):
        subject.sweep(IDS, cells(), lambda logits: torch.complex(metric(logits), LOOKING_ACROSS[0](logits)))


def assigns(logits: Tensor) -> Tensor:
    logits[:, -1, 9] = 0
    return logits[:, -1].logsumexp(-1)


def writes_in_place(logits: Tensor) -> Tensor:
    last = logits[:, -1]
    last -= 1
    logits[:, 2] += torch.arange(logits.shape[-1])
    return logits[:, 2, 9] + logits.logsumexp(-1).sum(-1) + logits[:, -1, 5]


@pytest.mark.parametrize("each", [assigns, writes_in_place])
@pytest.mark.parametrize("ids", [IDS, TWO], ids=["one", "two"])
def test_a_metric_may_write_to_its_logits(each: Any, ids: Tensor, tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    expected = one_by_one(subject, ids, each, cells())
    assert torch.allclose(subject.sweep(ids, cells(), each, reduce=None), expected, atol=1e-3, rtol=1e-5)


def test_writing_to_some_rows_leaves_the_others() -> None:
    stream = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    lazy = LazyLogits(Known(stream, torch.arange(12).view(4, 3)), lambda x, ids: x if ids is None else x[:, ids], 4)
    full = stream.view(4, 3, 4).clone()
    part, alone = lazy.rows(1, 3), lazy.alone(0)
    part[:, 1] = 7.0
    alone[0, -1] = 5.0
    column = lazy.alone(3)[:, 2]
    column += 1
    assert torch.equal(lazy.full(), full)
    assert torch.equal(lazy[:, 2], full[:, 2])
    assert torch.equal(alone[:, -1], torch.full((1, 4), 5.0))
    full[1:3, 1] = 7.0
    for key in ((slice(None), 1), (slice(None), 1, 2), (slice(None), 0), slice(None)):
        assert torch.equal(part[key], full[1:3][key])


def test_an_unembedding_replaced_after_loading_is_the_one_that_counts(tiny_module: Any) -> None:
    module = tiny_module("llama", seed=3)
    subject = assay.load(module)
    torch.manual_seed(0)
    module.lm_head = nn.Sequential(nn.Linear(32, 50), nn.Tanh()).eval()
    expected = one_by_one(subject, IDS, metric, cells())[:, 0]
    assert torch.allclose(subject.sweep(IDS, cells(), metric), expected, atol=1e-4)
    assert torch.allclose(
        subject.sweep(IDS, cells(), lambda x: x.logsumexp(-1).sum(-1)),
        one_by_one(subject, IDS, lambda x: x.logsumexp(-1).sum(-1), cells())[:, 0],
        atol=1e-3,
    )


@pytest.mark.usefixtures("untyped")
def test_edits_may_come_from_iterators(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    base = [assay.Scale("embed", 1.5), assay.Scale("blocks.0.mlp.out", 0.5)]
    for exact in ("auto", "forward"):
        for some in (base, base[:1]):
            expected = subject.sweep(IDS, cells(), metric, base_edits=some, exact=exact)
            given: Any = iter(some)
            assert torch.equal(subject.sweep(IDS, cells(), metric, base_edits=given, exact=exact), expected)
        given = ((cell for cell in [each]) for each in cells())
        assert torch.allclose(subject.sweep(IDS, given, metric, exact=exact), subject.sweep(IDS, cells(), metric))


@pytest.mark.usefixtures("untyped")
def test_containers_that_hold_no_edits_are_refused(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    for wrong in (cells()[0], None, 3):
        with pytest.raises(InvalidEdit, match="edits= is a sequence of cells"):
            subject.sweep(IDS, wrong, metric)
        with pytest.raises(InvalidEdit, match="base_edits= is a sequence of edits"):
            subject.sweep(IDS, cells(), metric, base_edits=wrong)
    for wrong in ([3], [None], [[3]], [cells()[0], []]):
        with pytest.raises(InvalidEdit, match="a cell is an edit"):
            subject.sweep(IDS, wrong, metric)
    with pytest.raises(InvalidEdit, match="base_edits: edits are Add"):
        subject.sweep(IDS, cells(), metric, base_edits=[3])


@pytest.mark.usefixtures("untyped")
def test_options_are_refused_before_anything_runs(tiny_module: Any) -> None:
    module = tiny_module("llama")
    subject = assay.load(module)
    called: list[int] = []
    handle = module.register_forward_pre_hook(lambda *_: called.append(1))
    for rows in ("2", 0, 1.5, True):
        with pytest.raises(SpecError, match="max_rows="):
            subject.sweep(IDS, cells(), metric, max_rows=rows)
        with pytest.raises(SpecError, match="max_rows="):
            subject.mean(IDS, "blocks.0.mlp.out", max_rows=rows)
    with pytest.raises(SpecError, match="metric='logit_diff'"):
        subject.sweep(IDS, cells(), "logit_diff")
    with pytest.raises(SpecError, match="progress=3"):
        subject.sweep(IDS, cells(), metric, progress=3)
    handle.remove()
    assert not called


def test_a_cache_among_the_inputs_is_not_written_to(tiny_module: Any) -> None:
    module = tiny_module("llama")
    subject = assay.load(module)
    cache = module(IDS[:, :5], use_cache=True).past_key_values  # part of a graph
    inputs = {"input_ids": IDS[:, 5:], "past_key_values": cache}
    batch = subject.batch(inputs)
    for x in (inputs, batch, inputs):
        run = subject.run(x, capture="blocks.1.mlp.out", edits=[assay.Scale("blocks.0.mlp.out", 1.0)])
        assert torch.allclose(run.logits, module(IDS).logits[:, 5:], atol=1e-4)
        assert cache.get_seq_length() == 5
    with pytest.raises(SpecError, match="past_key_values is a cache, and a sweep"):
        subject.sweep(inputs, cells(), metric)
    assert cache.get_seq_length() == 5
