"""Limits: runs that are cancelled, late or too large stop, say so, and leave the module as it was."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import assay
from assay.activations.planning import planned_bytes
from assay.base.errors import Cancelled, SpecError

IDS = torch.tensor([[5, 17, 33, 64, 9, 101, 42, 77, 3]])


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


class After:
    """Says stop from the n-th time on that it is asked."""

    def __init__(self, n: int) -> None:
        self.n, self.asked = n, 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked > self.n


def count_blocks(module: nn.Module) -> tuple[list[int], Any]:
    """How often a block of the model was entered."""
    seen: list[int] = []
    handles = [block.register_forward_pre_hook(lambda *_: seen.append(1)) for block in module.model.layers]
    return seen, handles


def test_a_run_is_stopped_between_blocks(tiny_module: Any) -> None:
    module = tiny_module("llama")
    subject = assay.load(module)
    plain = subject.run(IDS).logits
    stops = []
    for n in range(8):
        seen, handles = count_blocks(module)
        stop = After(n)
        try:
            with assay.limits(cancel=stop):
                subject.run(IDS)
        except Cancelled:
            stops.append(len(seen))
        for handle in handles:
            handle.remove()
        assert hooks_of(module) == 0
    assert stops == sorted(stops)
    assert {0, 1, 2} <= set(stops), "before any block, and between blocks"
    assert len(stops) < 8, "a run that is not told to stop ends"
    assert torch.equal(subject.run(IDS).logits, plain)


def test_captures_edits_gradients_sweeps_and_means_are_stopped(tiny_module: Any, tiny_subject: Any) -> None:
    module = tiny_module("llama")
    subject = assay.load(module)
    cells = [assay.Ablate(f"blocks.{b}.attn.z", positions=p) for b in range(3) for p in range(9)]
    work = {
        "captures": lambda: subject.run(IDS, capture="blocks.*.attn.pattern"),
        "edits": lambda: subject.run(IDS, edits=cells[:3]),
        "gradients": lambda: subject.run(IDS, capture="blocks.1.mlp.out", grad=lambda x: x[:, -1, 5]),
        "sweep": lambda: subject.sweep(IDS, cells, lambda x: x[:, -1, 5]),
        "full sweep": lambda: subject.sweep(IDS, cells, lambda x: x[:, -1, 5], exact="forward", max_rows=2),
        "means": lambda: subject.mean(IDS.expand(6, -1), "blocks.1.mlp.out", max_rows=2),
    }
    for name, call in work.items():
        whole = After(10**9)
        with assay.limits(cancel=whole):
            call()
        for n in (0, whole.asked // 2, whole.asked - 1):
            with assay.limits(cancel=After(n)), pytest.raises(Cancelled):
                call()
            assert hooks_of(module) == 0, name
        call()


def test_a_deadline_holds_inside_a_long_forward() -> None:
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleList(nn.Identity() for _ in range(200))
            self.done = 0

        def forward(self, ids: Tensor) -> Tensor:
            x = ids.float()[..., None]
            for step in self.steps:
                x = step(x)
                time.sleep(0.002)
                self.done += 1
            return x

    module = Slow().eval()
    subject = assay.load(module)
    with assay.limits(seconds=0.05), pytest.raises(Cancelled, match=r"longer than its limit of 0\.05 s"):
        subject.run(torch.ones(1, 2, dtype=torch.long))
    assert 0 < module.done < 200
    assert hooks_of(module) == 0


def test_limits_belong_to_their_thread_and_task(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    cancelled = threading.Event()
    cancelled.set()

    def limited() -> str:
        with assay.limits(cancel=cancelled):
            try:
                subject.run(IDS)
            except Cancelled:
                return "stopped"
        return "ran"

    def free() -> str:
        subject.run(IDS)
        return "ran"

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: job(), [limited, free] * 20))
    assert found == ["stopped", "ran"] * 20

    async def task(cancel: bool) -> str:
        event = threading.Event()
        with assay.limits(cancel=event):
            for _ in range(3):
                await asyncio.sleep(0)
                if cancel:
                    event.set()
                try:
                    await asyncio.to_thread(subject.run, IDS)  # the task's limits go with it
                except Cancelled:
                    return "stopped"
        return "ran"

    async def together() -> list[str]:
        return list(await asyncio.gather(*(task(i % 2 == 0) for i in range(6))))

    assert asyncio.run(together()) == ["stopped", "ran"] * 3
    subject.run(IDS)


def test_both_of_two_nested_limits_hold(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    with assay.limits(max_bytes=1000):
        with assay.limits(max_bytes=10**9, seconds=100), pytest.raises(SpecError, match="limit is 1,000"):
            subject.run(IDS)
        with assay.limits(cancel=lambda: True), pytest.raises(Cancelled):
            subject.run(IDS)
    with assay.limits(seconds=1e-9), assay.limits(seconds=100), pytest.raises(Cancelled, match="1e-09 s"):
        subject.run(IDS)
    with assay.limits():
        assert subject.run(IDS).logits.shape == (1, 9, 128)


def kept(*tensors: Tensor) -> int:
    """The bytes of storages, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize(
    "capture",
    [
        "blocks.*.resid_post",
        ["blocks.1.attn.q", "blocks.1.attn.k", "blocks.1.attn.v"],
        ["blocks.*.attn.pattern", "blocks.0.mlp.post", "final_norm.scale"],
        "blocks.2.attn.result",
        [],
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_the_plan_is_what_a_run_keeps_and_the_limit_is_exact(family: str, capture: Any, tiny_module: Any) -> None:
    """Also where queries, keys and values are views of one tensor, and under a batch of padded prompts."""
    subject = assay.load(tiny_module(family))
    ids = torch.cat([IDS, IDS + 1])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    batch = subject.tokens(ids, mask=mask)
    run = subject.run(batch, capture=capture)
    size = kept(*run.captured.tensors.values(), run.logits)
    assert planned_bytes(subject, batch, capture) == size
    with assay.limits(max_bytes=size):
        subject.run(batch, capture=capture)
    with assay.limits(max_bytes=size - 1), pytest.raises(SpecError, match=f"would keep {size:,} bytes"):
        subject.run(batch, capture=capture)


def test_too_much_is_refused_before_the_model_runs(tiny_module: Any) -> None:
    module = tiny_module("llama")
    subject = assay.load(module)
    widths: list[int] = []
    handle = module.register_forward_pre_hook(lambda m, a, k: widths.append(k["input_ids"].shape[1]), with_kwargs=True)
    try:
        with assay.limits(max_bytes=9_000):
            for call in (
                lambda: subject.run(IDS, capture="blocks.*.mlp.post"),
                lambda: subject.run(IDS, capture="blocks.1.mlp.post", grad=lambda x: x[:, -1, 5]),
                lambda: subject.generate(IDS, capture="blocks.*.mlp.post", apply_to="all", max_new_tokens=20),
                lambda: subject.generate(IDS, max_new_tokens=50),
                lambda: subject.stream(IDS, max_new_tokens=50),
            ):
                with pytest.raises(SpecError, match="would keep"):
                    call()
            assert set(widths) == {1}, "one token tells"
            run = subject.generate(IDS, max_new_tokens=50, logits=False, eos_token_id=None)
            assert run.generated.shape == (1, 59)
            steps = [step.index for step in subject.stream(IDS, max_new_tokens=50, keep=False, eos_token_id=None)]
            assert len(steps) == 50
    finally:
        handle.remove()


def test_what_cannot_be_planned_is_stopped_at_the_capture_that_is_too_much() -> None:
    class Growing(nn.Module):
        """What leaves `wide` does not depend on the tokens, so one token does not tell: it refuses one."""

        def __init__(self) -> None:
            super().__init__()
            self.small, self.wide, self.after = nn.Identity(), nn.Identity(), nn.Identity()

        def forward(self, ids: Tensor) -> Tensor:
            if ids.shape[1] == 1:
                raise RuntimeError("one token is too few")
            x = self.small(ids.float()[..., None])
            return self.after(x + self.wide(torch.zeros(*ids.shape, 5000)).sum())

    module = Growing().eval()
    subject = assay.load(module)
    reached: list[int] = []
    module.after.register_forward_hook(lambda *_: reached.append(1))
    with assay.limits(max_bytes=100_000), pytest.raises(SpecError, match=r"with 'module:wide\.out' this run keeps"):
        subject.run(IDS, capture=["module:small.out", "module:wide.out"])
    assert not reached
    assert subject.run(IDS, capture=["module:small.out", "module:wide.out"]).logits.shape == (1, 9, 1)


def test_limits_are_positive_numbers_and_cancel_is_callable() -> None:
    for options in ({"seconds": 0}, {"seconds": float("nan")}, {"max_bytes": -5}, {"max_bytes": True}, {"cancel": 3}):
        with pytest.raises(SpecError, match=next(iter(options))), assay.limits(**options):
            pass
