"""Replay: equal to raw hooks on one prompt at a time, no more work than it must do, refused where it is not valid."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import sites
from torch import Tensor, nn

import assay
from assay.activations import blocks, recording, sweep
from assay.activations.recording import ReplayRefused
from assay.activations.replay import Replay
from assay.subjects.tiny import tiny_model

LENGTHS = (9, 6, 4)
N_BLOCKS = 3


def prompts(side: str, generator: torch.Generator) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Three prompts of unequal length as one padded batch, with its mask, and each by itself."""
    alone = [torch.randint(3, 128, (1, n), generator=generator) for n in LENGTHS]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for row, own in enumerate(alone):
        n = own.shape[1]
        at = slice(9 - n, 9) if side == "left" else slice(0, n)
        ids[row, at], mask[row, at] = own[0], 1
    return ids, mask, alone


def last_difference(starts_right: bool) -> Callable[[Tensor], Tensor]:
    """A logit difference at each prompt's last token, of logits padded on the right or on the left."""
    last = torch.tensor([n - 1 if starts_right else 8 for n in LENGTHS])
    return lambda logits: logits[torch.arange(3), last, 5] - logits[torch.arange(3), last, 7]


Change = Callable[[Tensor], None]


def draw(rng: random.Random, family: str, generator: torch.Generator) -> tuple[Any, tuple[str, Change]]:
    """A random edit and the same as a raw change of the site's tensor `[1, pos, (heads,) features]`."""
    block = rng.randrange(N_BLOCKS)
    name = rng.choice([site for site in sites(family, block) if not site.endswith("resid_mid")])
    n_heads = {"attn.q": 4, "attn.z": 4, "attn.k": 2, "attn.v": 2}.get(name.partition(".")[2].partition(".")[2], 0)
    n_heads = 4 if n_heads == 2 and family.startswith("gpt") else n_heads
    at: Any = rng.choice([None, 0, 3, -1, "last", [1, -2], slice(2, None), slice(0, 3, 2)])
    head = rng.randrange(n_heads) if n_heads and rng.random() < 0.6 else None
    width = {"pre": 64, "gate": 64, "post": 64}.get(name.rpartition(".")[2], 8 if n_heads else 32)
    width = 128 if family.startswith(("gpt2", "gpt_neox")) and width == 64 and family == "gpt2" else width
    value = torch.randn(width, generator=generator)
    kind = rng.choice(["Add", "Set", "Scale", "Ablate", "Apply"])
    full = name if head is None else f"{name}.{head}"
    edit = {
        "Add": lambda: assay.Add(full, value, scale=2.0, positions=at),
        "Set": lambda: assay.Set(full, value, positions=at),
        "Scale": lambda: assay.Scale(full, 0.3, positions=at),
        "Ablate": lambda: assay.Ablate(full, positions=at),
        "Apply": lambda: assay.Apply(full, lambda x: x.flip(-1), positions=at),
    }[kind]()

    def change(x: Tensor) -> None:
        where = slice(None) if at is None else [-1] if at == "last" else [at] if isinstance(at, int) else at
        index = (slice(None), where) if head is None else (slice(None), where, head)
        old = x[index].clone()
        x[index] = {"Add": old + 2.0 * value, "Set": value.expand_as(old), "Scale": 0.3 * old}.get(
            kind, old.flip(-1) if kind == "Apply" else torch.zeros_like(old)
        )

    return edit, (name, change)


def by_hand(module: nn.Module, family: str, ids: Tensor, changes: list[tuple[str, Change]]) -> Tensor:
    """Logits of one prompt under raw hooks."""
    with contextlib.ExitStack() as stack, torch.no_grad():
        for name, change in changes:
            path, side, view = sites(family, int(name.split(".")[1]))[name]
            at = module.get_submodule(path)

            def changed(x: Tensor, view: Any = view, change: Change = change) -> Tensor:
                new = x.clone()
                change(view(new))
                return new

            def before(_: Any, args: Any, kwargs: Any, changed: Any = changed) -> Any:
                if args:
                    return (changed(args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": changed(kwargs["hidden_states"])}

            def after(_: Any, __: Any, output: Any, changed: Any = changed) -> Any:
                return (changed(output[0]), *output[1:]) if isinstance(output, tuple) else changed(output)

            handle = (
                at.register_forward_pre_hook(before, with_kwargs=True)
                if side == "in"
                else at.register_forward_hook(after)
            )
            stack.callback(handle.remove)
        logits: Tensor = module(ids).logits
        return logits


@pytest.mark.parametrize("side", ["left", "right"])
def test_random_cells_equal_raw_hooks_on_each_prompt_alone(family: str, side: str, tiny_module: Any) -> None:
    module = tiny_module(family)
    subject, rng, generator = assay.load(module), random.Random(family + side), torch.Generator().manual_seed(0)
    ids, mask, alone = prompts(side, generator)
    cells, changes = [], []
    while len(cells) < 20:
        drawn = [draw(rng, family, generator) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
        if len({name for _, (name, _) in drawn}) == len(drawn):  # two at one site: their order is tested elsewhere
            cells.append([edit for edit, _ in drawn])
            changes.append([change for _, change in drawn])
    metric = last_difference(side == "right")
    batch = subject.tokens(ids, mask=mask)
    found = subject.sweep(batch, cells, metric, reduce=None)
    for cell, change, values in zip(cells, changes, found, strict=True):
        for row, own in enumerate(alone):
            logits = by_hand(module, family, own, change)[0, -1]
            assert torch.allclose(values[row], logits[5] - logits[7], atol=2e-4), (cell, row)
    assert torch.allclose(found, subject.sweep(batch, cells, metric, reduce=None, max_rows=4), atol=1e-4)
    assert torch.allclose(found, subject.sweep(batch, cells, metric, reduce=None, exact="forward"), atol=1e-4)


def only_replay(monkeypatch: Any) -> None:
    def forbidden(*args: Any) -> None:
        assert not args[3], "full forwards were used"

    monkeypatch.setattr(sweep, "full_forwards", forbidden)


def count_tokens(monkeypatch: Any) -> list[tuple[int, int]]:
    """The block and the tokens of every call of a block from now on."""
    seen: list[tuple[int, int]] = []
    original = blocks.Blocks.call

    def counted(self: Any, block: int, state: Any, stream: Tensor, arguments: Any) -> Tensor:
        seen.append((block, stream.shape[0] * stream.shape[1]))
        return original(self, block, state, stream, arguments)

    monkeypatch.setattr(blocks.Blocks, "call", counted)
    return seen


IDS = torch.tensor([[5, 17, 33, 64, 9, 101, 42, 77, 3]])


def last(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 7]


def test_no_token_goes_through_a_block_that_it_need_not(family: str, tiny_module: Any, monkeypatch: Any) -> None:
    subject = assay.load(tiny_module(family))
    donor = subject.run((IDS + 40) % 128, capture="blocks.*.resid_pre")
    cells = [assay.Patch(f"blocks.{b}.resid_pre", donor, positions=p) for b in range(N_BLOCKS) for p in range(9)]
    expected = torch.stack([last(subject.run(IDS, edits=[cell]).logits)[0] for cell in cells])
    only_replay(monkeypatch)
    seen = count_tokens(monkeypatch)
    assert torch.allclose(subject.sweep(IDS, cells, last), expected, atol=1e-4)
    per_block = [sum(n for block, n in seen if block == b) for b in range(N_BLOCKS)]
    suffixes, unedited = 9 * 10 // 2, 4
    assert per_block[:2] == [suffixes + unedited, 2 * suffixes + unedited]
    columns = 2 * 9 + 1  # the last block: keys of what it leaves alone, then one column; all of what it edits
    assert per_block[2] == 3 * suffixes + unedited + columns


@pytest.mark.parametrize("position", [0, 3, -2])
def test_any_one_column_is_that_of_a_full_run(position: int, family: str, tiny_module: Any, monkeypatch: Any) -> None:
    """Of padded prompts too: what a column sees in the last block is up to that column alone."""
    subject = assay.load(tiny_module(family))
    ids, mask, _ = prompts("left", torch.Generator().manual_seed(1))
    cells = [assay.Scale(f"blocks.{b}.resid_post", -1.0, positions=p) for b in range(2) for p in (0, 2, "last")]
    only_replay(monkeypatch)
    for batch in (subject.tokens(IDS), subject.tokens(ids, mask=mask)):  # the first prompt has no padding
        found = subject.sweep(batch, cells, lambda logits: logits[:, position, 5], reduce=None)
        runs = [subject.run(batch, edits=[cell]).logits[:, position, 5] for cell in cells]
        assert torch.allclose(found[:, 0], torch.stack(runs)[:, 0], atol=1e-4)


def test_a_metric_that_reads_everything_costs_one_pass(tiny_module: Any, monkeypatch: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    cells = [assay.Ablate("blocks.1.mlp.out", positions=p) for p in range(9)]

    def everything(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1)[:, :, 5].mean(1)

    expected = torch.stack([everything(subject.run(IDS, edits=[cell]).logits)[0] for cell in cells])
    seen = count_tokens(monkeypatch)
    assert torch.allclose(subject.sweep(IDS, cells, everything), expected, atol=1e-4)
    assert sum(n for block, n in seen if block == 2) == 45 + 4


@pytest.mark.parametrize("max_rows", [1, 2, 5])
def test_memory_is_bounded_by_rows(max_rows: int, tiny_module: Any, monkeypatch: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    cells = [assay.Ablate(f"blocks.{b}.mlp.out", positions=p) for b in range(N_BLOCKS) for p in (0, 3, 8)]
    cells += [assay.Ablate(f"blocks.{b}.attn.z.{h}") for b in range(N_BLOCKS) for h in range(4)]
    expected = subject.sweep(IDS, cells, last)
    rows: list[int] = []

    def metric(logits: Tensor) -> Tensor:
        rows.append(len(logits))
        return last(logits)

    seen = count_tokens(monkeypatch)
    assert torch.allclose(subject.sweep(IDS, cells, metric, max_rows=max_rows), expected, atol=1e-5)
    assert max(n for _, n in seen) <= max_rows * 9
    assert max(rows) <= max_rows


def test_chunks_passes_and_what_is_kept_change_nothing(tiny_module: Any, monkeypatch: Any) -> None:
    subject = assay.load(tiny_module("gemma2"))
    cells = [assay.Ablate(f"blocks.{b}.attn.out", positions=p) for b in range(N_BLOCKS) for p in range(9)]
    expected = subject.sweep(IDS, cells, last)
    monkeypatch.setitem(blocks.CHUNK, "cpu", 20)
    monkeypatch.setattr("assay.activations.replay.PASS", 2)
    monkeypatch.setattr("assay.activations.replay.LOGITS", 1)
    monkeypatch.setattr(blocks, "PACKINGS", 0)
    only_replay(monkeypatch)
    assert torch.allclose(subject.sweep(IDS, cells, last), expected, atol=1e-5)


BUILDS = "bloom falcon mpt gptj gpt_neo xglm mamba mamba2 gpt_oss deepseek_v3 cohere2 mixtral granitemoe olmo2 phi3 opt"


@pytest.mark.parametrize("model_type", BUILDS.split())
def test_families_of_every_build_are_replayed(model_type: str, monkeypatch: Any) -> None:
    """Attention of its own, ALiBi, sinks, latent attention, experts, parallel and post-norm blocks, state spaces."""
    subject = assay.load(tiny_model(model_type))
    ids, other = IDS % 67, (IDS + 20) % 67
    points = [
        site for site in subject.sites() if site.startswith("blocks") and not site.endswith((".scale", ".router"))
    ]
    points = [site for site in points if not site.endswith("mlp.experts")]
    donor = subject.run(other, capture=points)
    rng = random.Random(model_type)
    cells: list[Any] = [assay.Patch(site, donor, positions=rng.choice([None, 4, "last"])) for site in points]
    cells += [assay.Ablate(site, "mean", positions=2) for site in points if site.endswith(("resid_mid", ".z", "ssm.x"))]
    expected = torch.stack([last(subject.run(ids, edits=[cell]).logits)[0] for cell in cells])
    only_replay(monkeypatch)
    assert torch.allclose(subject.sweep(ids, cells, last), expected, atol=1e-4)


@pytest.mark.parametrize("model_type", ["t5", "bart", "bert", "modernbert"])
def test_other_models_are_swept_by_full_forwards(model_type: str) -> None:
    subject = assay.load(tiny_model(model_type))
    ids = IDS % 67
    points = [site for site in subject.sites() if site.endswith(("resid_post", "mlp.out", "attn.z"))]
    cells = [assay.Ablate(site, positions=0) for site in points]
    expected = torch.stack([last(subject.run(ids, edits=[cell]).logits)[0] for cell in cells])
    assert torch.allclose(subject.sweep(ids, cells, last), expected, atol=1e-5)


class Mixing(nn.Module):
    """An MLP that also looks at the token before: what packed suffixes must not survive unnoticed."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

    def forward(self, x: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        out: Tensor = self.inner(x + 0.5 * before)
        return out


def test_tokens_that_meet_outside_attention_are_noticed(tiny_module: Any) -> None:
    module = tiny_module("llama")
    module.model.layers[1].mlp = Mixing(module.model.layers[1].mlp)
    subject = assay.load(module)
    cells = [assay.Add(f"blocks.{b}.resid_post", 1.0, positions=p) for b in range(2) for p in range(9)]
    expected = torch.stack([last(subject.run(IDS, edits=[cell]).logits)[0] for cell in cells])
    with torch.no_grad():
        replay = Replay(subject, subject.batch(IDS), (), lambda logits: last(logits)[:, None])
        assert not replay.base.why_not_packed
        with pytest.raises(ReplayRefused, match="differs from the base"):
            replay.run([(cell,) for cell in cells], lambda *_: None)
    assert torch.allclose(subject.sweep(IDS, cells, last), expected, atol=1e-4)


def test_a_block_that_remembers_is_noticed(tiny_module: Any) -> None:
    module = tiny_module("llama")
    subject = assay.load(module)
    calls: list[int] = []

    def drifting(_: Any, __: Any, output: Tensor) -> Tensor:
        calls.append(1)
        return output * (1 + 0.01 * len(calls))

    module.model.layers[1].mlp.register_forward_hook(drifting)
    with torch.no_grad(), pytest.raises(ReplayRefused, match="differs from the base"):
        replay = Replay(subject, subject.batch(IDS), (), lambda logits: last(logits)[:, None])
        replay.run([(assay.Ablate("blocks.0.mlp.out"),), (assay.Ablate("blocks.0.attn.out"),)], lambda *_: None)


def test_a_last_block_that_drifts_is_noticed(tiny_module: Any) -> None:
    module = tiny_module("llama")
    subject = assay.load(module)
    calls: list[int] = []

    def drifting(_: Any, __: Any, output: Tensor) -> Tensor:
        calls.append(1)
        return output * (1 + 0.01 * len(calls))

    module.model.layers[2].mlp.register_forward_hook(drifting)
    cells = [(assay.Ablate("blocks.0.mlp.out", positions=p),) for p in range(9)]
    for metric in (last, lambda logits: logits.mean((1, 2))):
        with torch.no_grad(), pytest.raises(ReplayRefused, match="differs from the base"):
            replay = Replay(subject, subject.batch(IDS), (), lambda logits, metric=metric: metric(logits)[:, None])  # type: ignore[misc]
            replay.run(cells, lambda *_: None)


def test_attention_that_looks_ahead_is_replayed_in_whole_rows(tiny_module: Any, monkeypatch: Any) -> None:
    module = tiny_module("llama")
    subject = assay.load(module)
    for layer in module.model.layers:
        layer.self_attn.is_causal = False
    cells = [assay.Add(f"blocks.{b}.resid_pre", 1.0, positions=p) for b in range(N_BLOCKS) for p in (0, 4, 8)]
    expected = torch.stack([last(subject.run(IDS, edits=[cell]).logits)[0] for cell in cells])
    only_replay(monkeypatch)
    seen = count_tokens(monkeypatch)
    assert torch.allclose(subject.sweep(IDS, cells, last), expected, atol=1e-4)
    assert [sum(n for block, n in seen if block == b) for b in range(3)] == [4 * 9, 7 * 9, 10 * 9], "late, and whole"


def test_a_function_sees_what_a_run_of_its_own_gives_it(tiny_module: Any, monkeypatch: Any) -> None:
    subject = assay.load(tiny_module("qwen2"))
    ids, mask, _ = prompts("left", torch.Generator().manual_seed(3))
    batch = subject.tokens(ids, mask=mask)
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x * 0.5

    places: list[dict[str, Any]] = [{}, {"positions": "last"}, {"positions": [0, -1]}, {"rows": [0, 2], "positions": 1}]
    cells = [assay.Apply(site, look, **at) for site in ("blocks.1.attn.z.2", "blocks.0.mlp.post") for at in places]
    for cell in cells:
        subject.run(batch, edits=[cell])
    alone = list(seen)
    seen.clear()
    only_replay(monkeypatch)
    subject.sweep(batch, cells[4:] + cells[:4], lambda logits: logits[:, -1, 5])
    order = sorted(range(len(alone)), key=lambda i: (alone[i].shape, float(alone[i].sum())))
    again = sorted(range(len(seen)), key=lambda i: (seen[i].shape, float(seen[i].sum())))
    assert len(seen) == len(alone)
    for i, j in zip(order, again, strict=True):
        assert torch.allclose(alone[i], seen[j], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_replayed_within_its_rounding(dtype: torch.dtype, tiny_module: Any, monkeypatch: Any) -> None:
    subject = assay.load(tiny_module("llama").to(dtype))
    cells = [assay.Ablate(f"blocks.{b}.mlp.out", positions=p) for b in range(N_BLOCKS) for p in range(9)]
    expected = torch.stack([last(subject.run(IDS, edits=[cell]).logits)[0] for cell in cells])
    only_replay(monkeypatch)
    found = subject.sweep(IDS, cells, last)
    assert found.dtype == dtype
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_an_error_of_a_function_is_the_functions_own(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))

    def broken(x: Tensor) -> Tensor:
        raise KeyError("of the function")

    with pytest.raises(KeyError, match="of the function"):
        subject.sweep(IDS, [assay.Apply("blocks.1.mlp.out", broken), assay.Ablate("blocks.1.mlp.out")], last)


def test_nothing_is_left_on_the_module(tiny_module: Any) -> None:
    module = tiny_module("llama")
    subject = assay.load(module)
    before = module(IDS).logits
    subject.sweep(IDS, [assay.Ablate(f"blocks.{b}.mlp.out", positions=3) for b in range(3)], last)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert torch.equal(module(IDS).logits, before)


def test_two_prompts_of_a_base_are_told_apart_in_attention(tiny_module: Any, monkeypatch: Any) -> None:
    """Suffixes of both prompts lie in one sequence; each has its own prompt's keys before it."""
    subject = assay.load(tiny_module("llama"))
    ids = torch.cat([IDS, (IDS * 3 + 1) % 128])
    cells = [assay.Add(f"blocks.{b}.attn.out", 1.0, rows=1, positions=p) for b in range(N_BLOCKS) for p in range(9)]
    base = last(subject.run(ids).logits)
    expected = torch.stack([last(subject.run(ids, edits=[cell]).logits) for cell in cells])
    only_replay(monkeypatch)
    found = subject.sweep(ids, cells, last, reduce=None)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(found[:, 0], base[0].expand(len(cells)), atol=1e-5)
    assert recording.differs(found[:, 1:], base[1].expand(len(cells), 1)) > 0
