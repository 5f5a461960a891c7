"""An oracle for circuits: activations read and replaced by plain torch hooks, which know nothing of assay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import assay
from assay import Subject
from assay.circuits import Task

CLEAN = (5, 17, 40, 9, 77, 30, 21)
CORRUPT = (5, 17, 63, 9, 77, 51, 21)
ANSWER, FOIL = 12, 99
DIFFER = (2, 5)
"""The positions at which the two prompts differ."""

Place = tuple[int, str]
"""A block and a point of it: `resid_pre`, `z`, `attn.out` or `mlp.out`."""


@dataclass(frozen=True)
class Layout:
    """Where a family keeps what is patched; paths inside a block, and what attention and MLP write through."""

    blocks: str
    projection: str
    attention: str
    mlp: str


LLAMA = Layout("model.layers", "self_attn.o_proj", "self_attn", "mlp")
GEMMA = Layout(
    "model.layers", "self_attn.o_proj", "post_attention_layernorm", "post_feedforward_layernorm"
)  # what is added to the stream
LAYOUTS = {
    "gpt2": Layout("transformer.h", "attn.c_proj", "attn", "mlp"),
    "gpt_neox": Layout("gpt_neox.layers", "attention.dense", "attention", "mlp"),
    "gpt_neox_sequential": Layout("gpt_neox.layers", "attention.dense", "attention", "mlp"),
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
}


class Raw:
    """A module under raw hooks.

    Args:
        family: Its family.
        module: The module.
    """

    def __init__(self, family: str, module: nn.Module) -> None:
        self.module, self.layout = module, LAYOUTS[family]
        self.n_heads = int(module.config.num_attention_heads)
        self.blocks: Any = module.get_submodule(self.layout.blocks)

    def site(self, place: Place) -> tuple[nn.Module, str]:
        """The module to hook, and on which side."""
        block, point = place
        path = {"z": self.layout.projection, "attn.out": self.layout.attention, "mlp.out": self.layout.mlp}.get(point)
        return (
            (self.blocks[block], "in")
            if path is None
            else (
                self.blocks[block].get_submodule(path),
                "in" if point == "z" else "out",
            )
        )

    @contextmanager
    def replacing(self, changes: Mapping[Place, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """Replace what passes at each place by a function of it."""
        with ExitStack() as stack:
            for place, change in changes.items():
                module, side = self.site(place)

                def before(module: nn.Module, args: Any, change: Any = change) -> Any:
                    return (change(args[0]), *args[1:])

                def after(module: nn.Module, args: Any, output: Any, change: Any = change) -> Any:
                    if isinstance(output, Tensor):
                        return change(output)
                    return (change(output[0]), *output[1:])

                handle = (
                    module.register_forward_pre_hook(before) if side == "in" else module.register_forward_hook(after)
                )
                stack.callback(handle.remove)
            yield

    def logits(self, ids: Tensor, changes: Mapping[Place, Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        """The module's logits with these changes."""
        with self.replacing(changes or {}):
            return self.module(input_ids=ids, use_cache=False).logits

    def difference(self, ids: Tensor, changes: Mapping[Place, Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        """The logit difference at the last position, one value a row."""
        last = self.logits(ids, changes)[:, -1]
        return last[:, ANSWER] - last[:, FOIL]

    def read(self, ids: Tensor, places: list[Place]) -> dict[Place, Tensor]:
        """What passes at each place, heads side by side in the last dimension of `z`."""
        found: dict[Place, Tensor] = {}

        def keep(place: Place) -> Callable[[Tensor], Tensor]:
            def change(x: Tensor) -> Tensor:
                found[place] = x
                return x

            return change

        self.logits(ids, {place: keep(place) for place in places})
        return found


def swap(donor: Tensor, *, position: int | None = None, heads: Any = None, n_heads: int = 1) -> Any:
    """A change that puts the donor's values at one position (or all), for some heads (or all)."""

    def change(x: Tensor) -> Tensor:
        new, source = x.clone(), donor.expand_as(x)
        columns = slice(None) if position is None else slice(position, position + 1)
        if heads is None:
            new[:, columns] = source[:, columns]
            return new
        size = x.shape[-1] // n_heads
        for head in heads:
            at = slice(head * size, (head + 1) * size)
            new[:, columns, at] = source[:, columns, at]
        return new

    return change


@dataclass(frozen=True, kw_only=True)
class Case:
    """One family's tiny model, as a subject and under raw hooks, with two prompts."""

    family: str
    subject: Subject
    raw: Raw

    clean = torch.tensor([CLEAN])
    corrupt = torch.tensor([CORRUPT])
    differ = DIFFER

    @cached_property
    def task(self) -> Task:
        return Task.from_tokens(CLEAN, CORRUPT, ANSWER, FOIL)

    def ids(self, direction: str) -> tuple[Tensor, Tensor]:
        """Base and donor of a direction."""
        return (self.corrupt, self.clean) if direction == "denoising" else (self.clean, self.corrupt)

    @staticmethod
    def swap(donor: Tensor, **where: Any) -> Any:
        return swap(donor, **where)


@pytest.fixture(scope="session")
def make_case(tiny_module: Callable[..., Any]) -> Callable[..., Case]:
    """The case of a family; float64 where finite differences are taken."""
    made: dict[tuple[str, torch.dtype], Case] = {}

    def make(family: str, dtype: torch.dtype = torch.float32) -> Case:
        if (family, dtype) not in made:
            module = tiny_module(family).to(dtype)
            made[family, dtype] = Case(family=family, subject=assay.load(module), raw=Raw(family, module))
        return made[family, dtype]

    return make


@pytest.fixture
def case(family: str, make_case: Callable[..., Case]) -> Case:
    """The case of every family in turn."""
    return make_case(family)
