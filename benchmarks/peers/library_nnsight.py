"""The benchmark's work in nnsight 0.8."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import nnsight
import torch
from nnsight import TransformersModel
from torch import Tensor

DISTRIBUTIONS = ["nnsight"]


def load(folder: str, *, patterns: bool = False) -> Any:
    """The wrapped model; patterns come out of eager attention only."""
    more = {"attn_implementation": "eager"} if patterns else {}
    return TransformersModel(folder, task="text-generation", dispatch=True, **more)


def run(model: Any, ids: Tensor, what: str) -> Callable[[], tuple[Tensor, Any]]:
    """A trace that saves what is asked, in the order in which the model computes it."""
    return {"plain": _plain, "one": _one, "all": _all, "patterns": _patterns}[what](model, ids)


def _plain(model: Any, ids: Tensor) -> Callable[[], tuple[Tensor, Any]]:
    def work() -> tuple[Tensor, Any]:
        with torch.no_grad(), model.trace(ids, use_cache=False):
            logits = model.lm_head.output.save()
        return logits, []

    return work


def _one(model: Any, ids: Tensor) -> Callable[[], tuple[Tensor, Any]]:
    def work() -> tuple[Tensor, Any]:
        with torch.no_grad(), model.trace(ids, use_cache=False):
            hidden = model.model.layers[15].output.save()
            logits = model.lm_head.output.save()
        return logits, [hidden]

    return work


def _all(model: Any, ids: Tensor) -> Callable[[], tuple[Tensor, Any]]:
    def work() -> tuple[Tensor, Any]:
        with torch.no_grad(), model.trace(ids, use_cache=False):
            found = nnsight.save([])
            for layer in model.model.layers:
                found.append(layer.input)
                found.append(layer.self_attn.q_proj.output)
                found.append(layer.self_attn.k_proj.output)
                found.append(layer.self_attn.v_proj.output)
                found.append(layer.self_attn.o_proj.input)
                found.append(layer.post_attention_layernorm.input)
                found.append(layer.mlp.output)
                found.append(layer.output)
            logits = model.lm_head.output.save()
        return logits, found

    return work


def _patterns(model: Any, ids: Tensor) -> Callable[[], tuple[Tensor, Any]]:
    def work() -> tuple[Tensor, Any]:
        with torch.no_grad(), model.trace(ids, use_cache=False):
            found = nnsight.save([])
            for layer in model.model.layers:
                found.append(layer.input)
                found.append(layer.self_attn.q_proj.output)
                found.append(layer.self_attn.k_proj.output)
                found.append(layer.self_attn.v_proj.output)
                found.append(layer.self_attn.o_proj.input)
                found.append(layer.self_attn.output[1])
                found.append(layer.post_attention_layernorm.input)
                found.append(layer.mlp.output)
                found.append(layer.output)
            logits = model.lm_head.output.save()
        return logits, found

    return work


def generate(model: Any, ids: Tensor, vector: Tensor, block: int, new: int) -> Callable[[], Tensor]:
    """`generate`, one vector added at each step."""

    def work() -> Tensor:
        with model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0) as tracer:
            for _ in tracer.iter[:new]:
                model.model.layers[block].output += vector
            tokens = tracer.result.save()
        return tokens

    return work


Cells = Sequence[tuple[int, int]]


def sweep(
    model: Any,
    clean: Tensor,
    corrupt: Tensor,
    metric: Callable[[Tensor], Tensor],
    blocks: range,
    positions: range,
) -> tuple[Callable[[], Tensor], str]:
    """Several cells a forward, logits at the last position only, in whichever of the ways below is the fastest here."""
    cells = [(i, p) for i in blocks for p in positions]

    def record() -> dict[int, Tensor]:
        with torch.no_grad(), model.trace(clean, use_cache=False):
            donor = nnsight.save({})
            for i in blocks:
                donor[i] = model.model.layers[i].input
        return donor

    def invokes(some: Cells, donor: dict[int, Tensor]) -> Tensor:
        with torch.no_grad(), model.trace(use_cache=False, logits_to_keep=1) as tracer:
            found = nnsight.save([])
            for i, p in some:
                with tracer.invoke(corrupt):
                    model.model.layers[i].input[:, p] = donor[i][:, p]
                    found.append(metric(model.lm_head.output))
        return torch.cat(found)

    def rows(some: Cells, donor: dict[int, Tensor]) -> Tensor:
        with torch.no_grad(), model.trace(corrupt.repeat(len(some), 1), use_cache=False, logits_to_keep=1):
            for k, (i, p) in enumerate(some):  # in the order of the blocks
                model.model.layers[i].input[k, p] = donor[i][0, p]
            found = metric(model.lm_head.output).save()
        return found

    ways = {f"{n} {how.__name__} a forward": (how, n) for how in (invokes, rows) for n in (8, 16, 32)}
    donor = record()
    speeds = {}
    for name, (how, n) in ways.items():
        how(cells[:n], donor)
        start = time.process_time()
        how(cells[:n], donor)
        speeds[name] = (time.process_time() - start) / len(cells[:n])
    best = min(speeds, key=lambda name: speeds[name])
    how, n = ways[best]

    def work() -> Tensor:
        donor = record()
        return torch.cat([how(cells[k : k + n], donor) for k in range(0, len(cells), n)])

    return work, best
