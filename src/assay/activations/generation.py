"""Generation with edits and captures under the module's own cache, whole or token by token."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from assay.activations.apply import Window
from assay.activations.context import RunState, current_run
from assay.activations.decoding import TextSoFar, Token, decoding_loop, draw_from_streams
from assay.activations.edits import Edit
from assay.activations.forward import forward, plan_requests
from assay.activations.hooks import running
from assay.activations.options import ApplyTo as ApplyTo
from assay.activations.options import check, own_generate, setting
from assay.activations.planning import refuse_too_much
from assay.activations.serving import watch
from assay.activations.values import Captured, Run, named
from assay.base.errors import AssayError, SiteError, SpecError
from assay.subjects.model import Model
from assay.subjects.tokens import Batch, from_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One new token of each row, as a stream gives it.

    Args:
        index: Which new token it is; 0 is the first.
        ids: `[batch]`; padding in rows that have ended.
        text: For each row the text that its token completes; "" while a character is incomplete, and without a
            tokenizer.
        logits: `[batch, vocab]`, what the token was chosen from.
        captured: What was captured while this token was made; the prompt's values come with the first.
        finished: Whether each row has ended.
    """

    index: int
    ids: Int[Tensor, " batch"]
    text: tuple[str, ...]
    logits: Float[Tensor, "batch vocab"]
    captured: Captured
    finished: tuple[bool, ...]


def generate(
    model: Model,
    batch: Batch,
    edits: Sequence[Edit],
    capture: str | Sequence[str],
    *,
    apply_to: ApplyTo | None,
    max_new_tokens: int,
    seed: int | None = None,
    logits: bool = True,
    **options: Any,
) -> Run:
    """Generate from a left-padded (or unpadded) batch; see `Subject.generate`.

    Raises:
        SpecError: If edits or captures are given without saying where they apply, the context is too short, or an
            option is one that edits and captures cannot follow.
    """
    if seed is not None:
        with Stream(
            model, batch, edits, capture, apply_to=apply_to, max_new_tokens=max_new_tokens, seed=seed, **options
        ) as stream:
            stream.keep_logits = logits
            for _ in stream:
                pass
            return stream.run
    work = _Work(model, batch, edits, capture, apply_to, max_new_tokens, options, logits)
    with work.going(), work.preparing():
        module: Any = model.module
        output = module.generate(**work.inputs, **work.config, output_logits=logits, return_dict_in_generate=True)
    return work.result(output.sequences, list(output.logits) if logits else [])


class Stream:
    """A generation that gives its tokens as they are made. It runs only while the next token is asked for.

    Between tokens nothing of it is on the module, so other runs may come in between; leaving it unfinished costs
    nothing. Use it as an iterator of `Step`, and as a context manager where it should end with a block. Threads may ask
    it for tokens at the same time: each gets one, in turn. A step that fails ends the stream, and asking for more then
    raises an error that says so.

    Args:
        model: The subject.
        batch: The prompts, padded on the left or not at all.
        edits: See `Subject.generate`, as for the others.
        capture: Sites to read.
        apply_to: "prompt", "new" or "all".
        max_new_tokens: How many tokens to add at most.
        seed: The seed of the sampling.
        keep: Collect logits and captures for `run`; without it memory does not grow.
        options: Passed on to the module's `generate`.

    Raises:
        SpecError: As `generate`.
    """

    def __init__(
        self,
        model: Model,
        batch: Batch,
        edits: Sequence[Edit] = (),
        capture: str | Sequence[str] = (),
        *,
        apply_to: ApplyTo | None = None,
        max_new_tokens: int = 32,
        seed: int | None = None,
        keep: bool = True,
        **options: Any,
    ) -> None:
        if seed is not None and not options.get("do_sample"):
            raise SpecError(f"seed={seed} has no effect on greedy decoding: add do_sample=True", "seed")
        self.keep_logits = self._keep = keep
        self._work = _Work(model, batch, edits, capture, apply_to, max_new_tokens, options, keep)
        self._logits: list[Tensor] = []
        self._sequence = batch.ids
        self._done: tuple[bool, ...] = (False,) * batch.size
        self._count, self._exhausted = 0, False
        self._failed: BaseException | None = None
        self._turn, self._going = threading.RLock(), False
        self._texts: list[TextSoFar] = []
        if model.tokenizer is not None:
            prompts = [batch.prompt(row) if batch.inputs is None else [] for row in range(batch.size)]
            self._texts = [TextSoFar(model.tokenizer, prompt) for prompt in prompts]
        draw = None if seed is None else draw_from_streams(batch, seed)
        with self._work.going(), self._work.preparing():
            self._tokens = _started(model.module, {**self._work.inputs, **self._work.config}, decoding_loop(draw))

    def __iter__(self) -> Stream:
        """The stream itself."""
        return self

    def __next__(self) -> Step:
        """Make one token in each row.

        Raises:
            SpecError: If a step has failed before, or this one is asked for from within another.
        """
        with self._turn:
            if self._going:
                raise SpecError("this stream is making a token already: ask for the next one when it is there")
            if self._failed is not None:
                raise SpecError(
                    f"this stream ended with an error, {type(self._failed).__name__}: {self._failed}; start it again"
                ) from self._failed
            self._going = True
            try:
                return self._step()
            except BaseException as error:
                if isinstance(error, StopIteration):
                    self._exhausted = True
                else:
                    self._failed = error
                self.close()
                raise
            finally:
                self._going = False

    def _step(self) -> Step:
        state = self._work.state
        before = {name: pieces[-1] for name, pieces in state.pieces.items()}
        with self._work.going():
            token = next(self._tokens)
        latest = {name: pieces[-1] for name, pieces in state.pieces.items()}
        new = {name: piece for name, piece in latest.items() if piece is not before.get(name)}
        if not self._keep:
            state.forget()
        if self.keep_logits:
            self._logits.append(token.logits)
        text = self._text(token)
        self._sequence, self._done, self._count = token.sequence, token.finished, self._count + 1
        return Step(
            index=self._count - 1,
            ids=token.ids,
            text=text,
            logits=token.logits,
            captured=self._work.captured(new),
            finished=token.finished,
        )

    def _text(self, token: Token) -> tuple[str, ...]:
        if not self._texts:
            return ("",) * len(self._done)
        each = zip(self._texts, token.ids.tolist(), token.finished, self._done, strict=True)
        return tuple("" if done else text.add(new, last=last) for text, new, last, done in each)

    def __enter__(self) -> Stream:
        """The stream itself."""
        return self

    def __exit__(self, *_: Any) -> None:
        """End it."""
        self.close()

    def close(self) -> None:
        """End it: no more tokens come, and the cache is given back. What was made stays in `run`."""
        self._tokens = iter(())

    @property
    def run(self) -> Run:
        """What `generate` returns, as far as the stream has come."""
        return self._work.result(self._sequence, self._logits, whole=self._exhausted)


def _started(module: Any, options: dict[str, Any], loop: Any) -> Iterator[Token]:
    """The module's own preparations with a decoding loop at their end; nothing is decoded yet."""
    try:
        tokens = module.generate(**options, custom_generate=loop)
    except (TypeError, AttributeError, KeyError) as error:
        tokens = error
    if isinstance(tokens, Iterator):
        return tokens
    if isinstance(tokens, Exception) and not own_generate(module):
        raise tokens
    raise SpecError(
        f"{type(module).__name__} has a generate of its own, which does not give tokens one by one; streams and seeds "
        f"need that"
    )


class _Work:
    """A generation's state, options and hooks, shared by the two ways of driving it."""

    def __init__(
        self,
        model: Model,
        batch: Batch,
        edits: Sequence[Edit],
        capture: str | Sequence[str],
        apply_to: ApplyTo | None,
        max_new_tokens: int,
        options: dict[str, Any],
        logits: bool,
    ) -> None:
        check(model, batch, edits, capture, apply_to, max_new_tokens, options)
        _learn_overwritten(model, batch, capture)
        self.model, self.batch, self.apply_to = model, batch, apply_to
        target = _decoded(model, batch)
        new = 0 if apply_to == "prompt" else max_new_tokens - 1
        old = 0 if apply_to == "new" else target.width
        refuse_too_much(model, batch, capture, captured=old + new, n=max_new_tokens if logits else 0)
        windows = {name: _window(stack, apply_to) for name, stack in batch.stacks.items()}
        self.begun = False
        self.state = _Growing(
            plan_requests(model, capture, edits),
            replace(_window(target, apply_to), width=0),
            append=True,
            windows=windows,
        )
        self.asked = bool(edits or capture)
        inside = any(request.point.side == "attention" for request in self.state.requests.values())
        if inside and setting(model, options, "cache_implementation", "dynamic") == "static":
            raise SpecError("a static cache has room for keys to come: attention's inside needs a dynamic one")
        after = "logits" in self.state.requests or any(
            request.site.module is not None and not _in_a_block(model, request.point.module)
            for request in self.state.requests.values()
        )
        if after and model.module._supports_logits_to_keep():  # type: ignore[operator]
            options = {"logits_to_keep": 0, **options}  # of every position: they are a site like any other
        self.cached = bool(setting(model, options, "use_cache", True))
        self.inputs = _inputs(batch)
        self.config = {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "pad_token_id": _pad_id(model),
            **options,
            "use_cache": self.cached,
            "num_beams": 1,
            "num_return_sequences": 1,
        }

    @contextmanager
    def going(self) -> Iterator[None]:
        """The run's hooks are on the module, and forwards count as its own."""
        handles = [self.model.module.register_forward_pre_hook(self._advance, with_kwargs=True, prepend=True)]
        handles += watch(self.state, self.model)
        try:
            with torch.no_grad(), running(self.state):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """What `generate` finds wrong with its options before the first forward is an error in them."""
        try:
            yield
        except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
            if self.begun:
                raise
            raise SpecError(f"{type(self.model.module).__name__}.generate refuses this: {error}") from error

    def _advance(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward: move the window to the columns that it covers."""
        state = self.state
        if current_run() is not state:
            return
        self.begun = True
        if state.limited is not None:
            state.limited.check()
        given = kwargs.get("decoder_input_ids", kwargs.get("input_ids", args[0] if args else None))
        if given is None:
            given = kwargs["inputs_embeds"]
        width, before = given.shape[1], state.window.last
        if before == 0 and width != state.window.batch.width and state.windows:
            state.window = replace(_window(from_ids(given), self.apply_to), width=0)  # Whisper's own first tokens
        again = width == before + 1 and width > 1  # without a cache, every column is computed again
        state.window = replace(state.window, first=0 if again else before, width=width)
        if again:
            state.forget(state.windows)

    def captured(self, tensors: dict[str, Tensor]) -> Captured:
        """Captured tensors, by any spelling of their sites."""
        heads = {name: request.point.head_dim for name, request in self.state.requests.items()}
        return Captured(tensors=tensors, head_dims=heads, resolve=self.model.site)

    def result(self, sequence: Tensor, logits: list[Tensor], *, whole: bool = True) -> Run:
        """The run so far; of a whole one, everything that was asked for must have happened."""
        if self.asked and whole:
            self.state.check_fired()
        joined = {name: named(_join(name, pieces), pieces[0].dims) for name, pieces in self.state.pieces.items()}  # type: ignore[attr-defined]
        vocab = logits[0].shape[-1] if logits else 0
        stacked = torch.stack(logits, 1) if logits else torch.empty(self.batch.size, 0, vocab)
        return Run(
            logits=named(stacked, ("batch", "pos", "vocab")),
            batch=self.batch,
            captured=self.captured(joined),
            generated=sequence,
        )


class _Growing(RunState):
    """A run whose forwards cover one part of the prompts after the other."""

    __slots__ = ()

    def _within_span(self, kept: Tensor, dims: tuple[str, ...], window: Window) -> Tensor:
        """Only the columns that captures apply to, of a raw site as well: its second dimension has the positions."""
        covered = window.last - window.first
        if dims[1:2] == ("dim1",) and kept.shape[1] == covered and (kept.ndim > 2 or not kept.is_floating_point()):
            dims = (dims[0], "pos", *dims[2:])
        elif not {"pos", "query"} & set(dims) and window.span != (window.first, window.last) and not self.windows:
            raise SiteError(
                f"a capture shaped {tuple(kept.shape)} does not say which of its dimensions has the positions, and "
                f"only some of {covered} are wanted: capture it with apply_to='all', or use the cache"
            )
        return super()._within_span(kept, dims, window)


def _in_a_block(model: Model, module: nn.Module) -> bool:
    """Whether a module is part of a block; what comes after the blocks may get the last column alone."""
    if model.architecture is None:
        return False
    return any(part is module for block in model.parts.blocks for part in block.modules())


def _learn_overwritten(model: Model, batch: Batch, capture: str | Sequence[str]) -> None:
    """Learn on one token whether the module writes over what raw sites capture; loading has seen the standard ones."""
    raw = [str(site) for site in model.expand(capture) if site.module is not None]
    if raw and batch.inputs is None:
        with contextlib.suppress(AssayError):
            forward(model, from_ids(batch.ids[:1, -1:]), capture=raw)


def _decoded(model: Model, batch: Batch) -> Batch:
    """The prompt of the stack that generates: the batch, or what a decoder starts with."""
    return from_ids(batch.ids) if getattr(model.config, "is_encoder_decoder", False) else batch


def _window(batch: Batch, apply_to: ApplyTo | None) -> Window:
    low, high = {"prompt": (0, batch.width), "new": (batch.width, None)}.get(apply_to or "all", (0, None))
    return Window(batch, low=low, high=high)


def _inputs(batch: Batch) -> dict[str, Any]:
    """What the module's `generate` is called with."""
    if batch.inputs is None:
        return {"input_ids": batch.ids, "attention_mask": batch.mask}
    given = {
        name: value for name, value in batch.inputs.items() if not name.startswith("decoder_") and name != "labels"
    }
    if "input_ids" in given and "encoder" in batch.stacks:  # without a mask, generate takes one id for padding
        given.setdefault("attention_mask", batch.stacks["encoder"].mask)
    return given | ({"decoder_input_ids": batch.ids} if "decoder_input_ids" in batch.inputs and batch.width > 1 else {})


def _join(name: str, pieces: list[Tensor]) -> Tensor:
    """Join the steps along positions; patterns and scores are padded with what a query gives to keys after it."""
    closed = float("-inf") if "attn.scores" in name else 0.0
    dims = pieces[0].dims  # type: ignore[attr-defined]
    along = dims.index("pos") if "pos" in dims else dims.index("query") if "query" in dims else 1
    if not {"pos", "query"} & set(dims) and any(piece.ndim < 2 or piece.shape[1] != 1 for piece in pieces[1:]):
        shapes = ", ".join(str(tuple(piece.shape)) for piece in pieces[:3])
        raise SiteError(
            f"{name!r} was captured shaped {shapes}: these are not a prompt and then single tokens, [batch, pos, ...], "
            f"so they cannot be joined; capture it step by step with subject.stream"
        )
    if "key" in dims:
        width = max(piece.shape[-1] for piece in pieces)
        pieces = [nn.functional.pad(piece, (0, width - piece.shape[-1]), value=closed) for piece in pieces]
    return torch.cat(pieces, along) if len(pieces) > 1 else pieces[0]


def _pad_id(model: Model) -> int | None:
    for owner in (model.tokenizer, getattr(model.module, "generation_config", None), model.config):
        value = getattr(owner, "pad_token_id", None)
        if value is not None:
            return int(value)
    end = getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)
    return int(end[0]) if isinstance(end, list) else end
