"""One run of the base, kept: what entered each block, how the block was called, and what its attention was given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from assay.activations.apply import Window
from assay.activations.context import RunState, current_run
from assay.activations.edits import Edit
from assay.activations.forward import call, plan_requests
from assay.activations.hooks import running
from assay.subjects.model import Model
from assay.subjects.points import Traffic
from assay.subjects.tokens import Batch


class ReplayRefused(Exception):
    """Replay is not valid here; the caller runs full forwards instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attended:
    """What one attention function was given.

    Args:
        key: `[batch, pos, key heads, d_head]`, rotated.
        value: `[batch, pos, key heads, d_value]`.
        mask: None (causal), or boolean or additive `[batch or 1, heads or 1, pos, pos]`.
        causal: Whether no position sees a later one.
        others: The names of its other arguments that hold tensors.
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    others: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """How one block was called.

    Args:
        arguments: Its arguments beside the stream, by name.
        attended: What its attention functions were given, one entry a call.
    """

    arguments: dict[str, Any]
    attended: list[Attended]


class Recording:
    """A base run of a decoder: enough to call its blocks again, on other rows or on some columns.

    Args:
        model: The subject.
        batch: The base prompts.
        base_edits: Edits on the embeddings, made in the base itself.

    Raises:
        ReplayRefused: If the run cannot be told by its blocks: several stacks, inputs that are not tokens, a block that
            is not called once, logits that do not come from the stream.
    """

    def __init__(self, model: Model, batch: Batch, base_edits: Sequence[Edit]) -> None:
        if len(model.stacks) != 1 or batch.inputs is not None or batch.args:
            raise ReplayRefused("more than one stack, or inputs that are not tokens")
        if any(model.site(edit.site).point not in ("embed", "pos_embed") for edit in base_edits):
            raise ReplayRefused("base edits beyond the embeddings")
        if not model.parts.has_unembedding:
            raise ReplayRefused("the logits are not read from the stream by a norm and a matrix")
        self.model, self.batch = model, batch
        self.blocks = model.parts.blocks
        self.vocab = 0
        self.calls: list[Call] = []
        self.streams: list[Tensor] = []
        """What enters each block, `[batch, pos, d_model]`, and what leaves the last."""
        output = self._run(base_edits)
        if len(self.calls) != len(self.blocks) or len(self.streams) != len(self.blocks) + 1:
            raise ReplayRefused("the blocks were not each called once")
        self._check_logits(output)
        self.why_not_packed = self._why_not_packed()
        if self.why_not_packed:  # keys and values serve nothing else
            for each in self.calls:
                each.attended.clear()

    def attended(self, block: int) -> Attended:
        """What a block's one attention function was given."""
        return self.calls[block].attended[0]

    def verify(self, block: int, found: Tensor, columns: slice) -> None:
        """Refuse a replay in which an unedited cell is not what the base is.

        Args:
            block: The block that it enters; one more than the last for what leaves it.
            found: Its stream there, of any shape with `batch * columns` tokens.
            columns: Its columns.

        Raises:
            ReplayRefused: If it differs by more than float rounding.
        """
        expected = self.streams[block][:, columns]
        real = self.batch.mask[:, columns].bool().to(expected.device)
        error = differs(found.to(expected.device).reshape(expected.shape)[real], expected[real])
        if error:
            raise ReplayRefused(f"an unedited replay differs from the base by {error:.2g}")

    def packed_arguments(
        self, block: int, rows: Tensor, columns: Tensor, taken: dict[int, Any] | None = None
    ) -> dict[str, Any]:
        """A block's arguments for tokens taken from anywhere in the base, as one row of them.

        Args:
            block: The block.
            rows: The base row of each token, `[tokens]`.
            columns: Its column.
            taken: What was taken before for these tokens, by the argument's id; it is added to.

        Raises:
            ReplayRefused: If it is not known how an argument belongs to tokens.
        """
        size, width = self.batch.size, self.batch.width
        taken = {} if taken is None else taken

        def take(name: str, value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(take(name, item) for item in value)
            if not isinstance(value, Tensor) or value.numel() == 1 or "mask" in name:
                return value  # a mask is replaced where attention is called
            if id(value) not in taken:
                at = columns.to(value.device)
                if value.ndim >= 2 and value.shape[0] in (1, size) and value.shape[1] == width:
                    taken[id(value)] = value[0 if value.shape[0] == 1 else rows.to(value.device), at][None]
                elif value.shape == (width,):
                    taken[id(value)] = value[at]
                else:
                    raise ReplayRefused(
                        f"the argument {name!r}, shaped {tuple(value.shape)}, does not belong to tokens"
                    )
            return taken[id(value)]

        return {name: take(name, value) for name, value in self.calls[block].arguments.items()}

    def repeated_arguments(self, block: int, times: int) -> dict[str, Any]:
        """A block's arguments for the whole base, several times over."""
        size = self.batch.size

        def repeat(name: str, value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(repeat(name, item) for item in value)
            if not isinstance(value, Tensor) or value.ndim < 2:
                return value
            if value.shape[0] == size == 1:
                return value.expand(times, *value.shape[1:])
            if value.shape[0] == size or name == "alibi":  # which has rows and heads in one dimension
                return value.repeat(times, *[1] * (value.ndim - 1))
            return value

        return {name: repeat(name, value) for name, value in self.calls[block].arguments.items()}

    def _run(self, base_edits: Sequence[Edit]) -> Any:
        state = RunState(plan_requests(self.model, (), base_edits), Window(self.batch))
        state.attention = self._attention
        handles = [
            block.register_forward_pre_hook(_only(state, self._before), with_kwargs=True) for block in self.blocks
        ]
        handles.append(self.blocks[-1].register_forward_hook(_only(state, self._after), with_kwargs=True))
        options = {"logits_to_keep": 1} if self.model.takes("logits_to_keep") else {}
        try:
            with running(state):
                output = call(self.model, self.batch, **options)
        finally:
            for handle in handles:
                handle.remove()
        state.check_fired()
        return output

    def _before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(self.calls) == len(self.blocks) or block is not self.blocks[len(self.calls)]:
            raise ReplayRefused("the blocks were not each called once, in their order")
        stream = Traffic(block, args, kwargs).tensor_in()
        named = {**dict(zip(inspect.signature(block.forward).parameters, args, strict=False)), **kwargs}
        arguments = {name: value for name, value in named.items() if value is not stream}
        for name, value in arguments.items():
            if hasattr(value, "update") and not isinstance(value, dict):  # a cache, though none was asked for
                arguments[name] = None
        self.streams.append(stream.clone())
        self.calls.append(Call(arguments=arguments, attended=[]))

    def _after(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.streams.append(Traffic(block, args, kwargs, output).tensor_out().clone())

    def _attention(
        self,
        function: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        more: dict[str, Any],
    ) -> Any:
        size, width = self.batch.size, self.batch.width
        if self.calls and query.shape[::2] == key.shape[::2] == (size, width):
            flag = more.get("is_causal")
            attended = Attended(
                key=key.transpose(1, 2).clone(memory_format=torch.contiguous_format),
                value=value.transpose(1, 2).clone(memory_format=torch.contiguous_format),
                mask=mask,
                causal=_is_causal(mask, width, bool(getattr(module, "is_causal", True) if flag is None else flag)),
                others=frozenset(name for name, other in more.items() if isinstance(other, Tensor)),
            )
            self.calls[-1].attended.append(attended)
        return function(module, query, key, value, mask, **more)

    def _check_logits(self, output: Any) -> None:
        """The stream has to give the logits: a few of them, at the last column of the prompts that reach it."""
        real = self.batch.mask[:, -1].bool()
        logits = output if isinstance(output, Tensor) else output.logits
        self.vocab = logits.shape[-1]
        some = torch.arange(min(64, logits.shape[-1]))
        if differs(unembed(self.model, self.streams[-1][:, -1][real], some), logits[:, -1][real][:, : len(some)]):
            raise ReplayRefused("the logits do not come from the stream after the last block")

    def _why_not_packed(self) -> str:
        """Why cells cannot be laid end to end (see `assay.activations.packing`); "" when they can.

        They can when positions meet nowhere but in one attention function a block, which only looks back. What is
        outside attention is put to the test by every replay.
        """
        implementation = getattr(self.model.parts.config, "_attn_implementation", "")
        if implementation not in ("sdpa", "eager"):
            return "attention is neither sdpa nor eager"
        one = torch.zeros(1, dtype=torch.long)
        for index, each in enumerate(self.calls):
            if len(each.attended) != 1:
                return "a block does not call one attention function"
            attended = each.attended[0]
            if not attended.causal or (attended.mask is None and implementation == "eager" and self.batch.width > 1):
                return "attention looks ahead"
            if attended.others - {"position_ids", "s_aux", "cache_position"}:
                return f"attention is given {', '.join(sorted(attended.others))}"
            if any("mask" in name and isinstance(x, Tensor) and x.ndim != 4 for name, x in each.arguments.items()):
                return "the blocks are given a mask of tokens"
            try:
                self.packed_arguments(index, one, one)
            except ReplayRefused as error:
                return str(error)
        return ""


def unembed(model: Model, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
    """The logits of a part of the stream, by the model's own modules.

    Args:
        model: The subject.
        hidden: `[..., d_model]`, after the last block.
        ids: Which logits, `[n]`: no others are computed where the unembedding is a plain matrix.

    Returns:
        `[..., vocab]`, or `[..., n]`.
    """
    parts = model.parts
    matrix = parts.unembed
    hooked = matrix._forward_hooks or matrix._forward_pre_hooks or hasattr(matrix, "_hf_hook")
    if ids is None or type(matrix) is not nn.Linear or hooked or parts.logit_scale != 1.0:
        logits = parts.logits(hidden)
        return logits if ids is None else logits[..., ids.to(logits.device)]
    weight, bias = parts.unembedding()
    ids = ids.to(weight.device)
    some = nn.functional.linear(parts.final_norm(hidden), weight[ids], None if bias is None else bias[ids])
    return some if parts.softcap is None else torch.tanh(some / parts.softcap) * parts.softcap


def differs(found: Tensor, expected: Tensor) -> float:
    """By how much two tensors differ beyond float rounding: 0 when they agree.

    Args:
        found: `[tokens, features]`.
        expected: The same shape.

    Returns:
        The largest difference relative to an entry and its token's mean size, where that is more than rounding.
    """
    half = expected.dtype in (torch.float16, torch.bfloat16)
    found, expected = found.float(), expected.float()
    scale = expected.abs() + expected.abs().mean(-1, keepdim=True)
    error = ((found - expected).abs() / scale.clamp(min=1e-12)).max() if found.numel() else torch.zeros(())
    return 0.0 if bool(error <= (0.1 if half else 1e-3)) else float(error.nan_to_num(torch.inf))


def _is_causal(mask: Tensor | None, width: int, flag: bool) -> bool:
    """Whether attention with this mask looks back only."""
    if mask is None or width == 1:
        return flag or width == 1
    if mask.ndim != 4 or mask.shape[-2:] != (width, width):
        return False
    ahead = torch.ones(width, width, dtype=torch.bool, device=mask.device).triu(1)
    closed = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
    return bool(closed[..., ahead].all())


def _only(state: RunState, hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that acts for one run alone."""

    def guarded(module: nn.Module, *rest: Any) -> None:
        if current_run() is state:
            hook(module, *rest)

    return guarded
