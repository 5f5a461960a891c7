"""What a module is called with when that is not token ids alone: images, audio, an encoder's tokens and a decoder's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from assay.base.errors import SpecError
from assay.subjects.placement import place_of
from assay.subjects.tokens import Batch, copied, from_ids, long_ids

if TYPE_CHECKING:
    from assay.subjects.model import Model


def example_inputs(
    module: nn.Module, kind: str = "tokens", *, rows: int = 1, n_tokens: int = 6, pixels: int | None = None
) -> dict[str, Tensor]:
    """Inputs that a model can be run on: token ids, pixels or audio features, and a decoder's ids where it has one.

    Args:
        module: A transformers model.
        kind: `tokens`, `image` or `audio`.
        rows: How many rows.
        n_tokens: How many tokens a row.
        pixels: The side of the image; the config's when None.

    Returns:
        Keyword arguments for its forward.
    """
    config: Any = module.config
    text = getattr(config, "text_config", None)
    inputs: dict[str, Tensor] = {}
    if kind == "image":
        vision = getattr(config, "vision_config", None) or config
        size, channels = int(pixels or vision.image_size), int(vision.num_channels)
        inputs["pixel_values"] = _wave(rows, channels, size, size)
    elif kind == "audio":
        inputs["input_features"] = _wave(rows, int(config.num_mel_bins), 2 * int(config.max_source_positions))
    if kind == "tokens" or text is not None:
        inputs["input_ids"] = _some_ids(rows, n_tokens, int((text or config).vocab_size))
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _some_ids(rows, n_tokens - 1, int(config.vocab_size), 5)
    device, dtype = place_of(module)
    return {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in inputs.items()
    }


def _some_ids(rows: int, n_tokens: int, vocab: int, shift: int = 0) -> Tensor:
    """Ids that avoid the first few, which configurations use for padding and ends."""
    ids = (torch.arange(rows * n_tokens) * 7919 + 11 + shift) % max(1, vocab - 4) + min(4, vocab - 1)
    return ids.view(rows, n_tokens)


def _wave(*shape: int) -> Tensor:
    """A smooth signal, the same on every machine."""
    n = int(torch.tensor(shape).prod())
    return torch.sin(torch.arange(n) * 0.37).view(*shape)


def main_input(model: Model, x: Tensor) -> str:
    """The name under which a module is given one tensor.

    Args:
        model: A model with an architecture map.
        x: Pixels, audio features, or token ids for a model that reads images as well.

    Raises:
        SpecError: If it reads no such thing.
    """
    assert model.architecture is not None
    kind = model.architecture.inputs
    if kind == "image" and x.is_floating_point():
        return "pixel_values"
    if kind != "tokens" and not x.is_floating_point() and "text" not in model.stacks:
        wanted = "pixels [batch, channel, height, width]" if kind == "image" else "features [batch, mel bin, frame]"
        raise SpecError(f"{model.name} reads {kind}: give {wanted} as floats, not token ids", "x")
    return "input_ids" if not x.is_floating_point() else str(model.module.main_input_name)


DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
"""What tells an encoder-decoder which tokens its decoder reads."""

TOWER_INPUTS = {"vision": "pixel_values", "text": "input_ids"}
"""What the two towers of CLIP and SigLIP read."""


def start_token(model: Model) -> int:
    """The token that a decoder starts with.

    Args:
        model: An encoder-decoder.

    Raises:
        SpecError: If the configuration names none.
    """
    for owner in (model.config, getattr(model.module, "generation_config", None)):
        for name in ("decoder_start_token_id", "bos_token_id"):
            found = getattr(owner, name, None)
            if found is not None:
                return int(found)
    raise SpecError("this model's configuration names no token that its decoder starts with: give decoder_input_ids")


def batch_from(model: Model, inputs: Mapping[str, Any]) -> Batch:
    """A batch of a module's own keyword arguments, with the rows and positions of each of its stacks.

    Args:
        model: A model with an architecture map.
        inputs: What its forward takes: `input_ids` and `attention_mask`, `decoder_input_ids`, `pixel_values`, ...

    Returns:
        The batch. A stack that reads no token ids (images, audio) has as many positions as its first block is given.

    Raises:
        SpecError: If there is no tensor among the inputs, or their rows differ.
    """
    given = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    for name, value in given.items():
        if name.endswith("input_ids") and isinstance(value, list):
            raise SpecError(f"{name!r} must be a tensor [batch, pos], not a list: return_tensors='pt' gives one", "x")
        if name.endswith("input_ids") and isinstance(value, Tensor):
            given[name] = long_ids(value)
    rows = {value.shape[0] for value in given.values() if isinstance(value, Tensor) and value.ndim}
    if len(rows) != 1:
        raise SpecError(f"the inputs must have one number of rows; these have {sorted(rows) or 'no tensors'}", "x")
    names = list(model.stacks)
    absent = [name for stack, name in TOWER_INPUTS.items() if stack in names and given.get(name) is None]
    if absent:
        raise SpecError(
            f"{model.name} reads images and text together: give {' and '.join(map(repr, TOWER_INPUTS.values()))} by "
            f"name; {absent[0]!r} is not there",
            "x",
        )
    if "decoder" in names and not any(given.get(name) is not None for name in DECODER_INPUTS):
        given["decoder_input_ids"] = torch.full((*rows, 1), start_token(model), device=model.device)
    layouts: dict[str, Batch] = {}
    for name in names:
        side = "decoder_" if name == "decoder" else ""
        ids = given.get(f"{side}input_ids") if name != "vision" else None
        if isinstance(ids, Tensor):
            layouts[name] = from_ids(ids, given.get(f"{side}attention_mask"))
    missing = [name for name in names if name not in layouts]
    if missing:
        n = rows.pop()
        for name, width in _widths(model, given, missing).items():
            embedded = given.get("decoder_inputs_embeds" if name == "decoder" else "inputs_embeds")
            mask = given.get("decoder_attention_mask" if name == "decoder" else "attention_mask")
            own = embedded is not None and isinstance(mask, Tensor) and mask.shape == (n, width)
            layouts[name] = from_ids(
                torch.zeros(n, width, dtype=torch.long, device=model.device), mask if own else None
            )
    last = layouts.pop(names[-1])
    tokens = any(isinstance(given.get(name), Tensor) for name in ("input_ids", "inputs_embeds"))
    alone = not layouts and tokens and "position_ids" not in given
    if alone and last.padded and model.takes("position_ids") and not model.own_positions:
        given["position_ids"] = last.positions
    return Batch(ids=last.ids, starts=last.starts, lengths=last.lengths, inputs=given, stacks=layouts)


def as_mask(mask: Any) -> Tensor:
    """A mask as a tensor.

    Raises:
        SpecError: If it is not made of numbers.
    """
    try:
        found = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.is_complex():
        raise SpecError(f"a mask is a tensor [batch, pos] of 1 and 0, not {mask!r:.60}", "mask")
    return found


def with_mask(model: Model, x: Any, mask: Tensor) -> tuple[Any, Tensor | None]:
    """Prompts with a mask put where it acts: among a mapping's arguments, or beside token ids.

    Args:
        model: The model.
        x: Prompts of any kind.
        mask: 1 at real tokens.

    Returns:
        The prompts, and the mask where it goes beside them.

    Raises:
        SpecError: If it would not act, or contradicts a mask that is there.
    """
    if isinstance(x, Batch):
        if mask.shape != x.ids.shape or not torch.equal(mask.to(x.ids.device).bool(), x.mask.bool()):
            raise SpecError("a batch has a mask of its own, and this is another: give mask= where it is made", "mask")
        return x, None
    if isinstance(x, Mapping):
        return _mapping_with_mask(model, x, mask), None
    if isinstance(x, str) or (isinstance(x, Sequence) and not is_own(x)):
        return x, mask  # which texts do not have
    kind = "tokens" if model.architecture is None else model.architecture.inputs
    if not isinstance(x, Tensor) or is_own(x) or kind != "tokens":
        raise SpecError(
            "mask= goes with token ids; to other inputs give theirs by name, as {'inputs_embeds': ..., "
            "'attention_mask': ...}",
            "mask",
        )
    needed = ("attention_mask", *(("position_ids",) if model.config is None else ()))
    absent = [] if model.architecture is not None else [name for name in needed if not model.takes(name)]
    if absent and not bool(mask.bool().all()):
        raise SpecError(f"{model.name} has no argument {absent[0]!r}, so a mask cannot reach it", "mask")
    return x, mask


def _mapping_with_mask(model: Model, x: Mapping[str, Any], mask: Tensor) -> dict[str, Any]:
    named = next((x[name] for name in ("input_ids", "inputs_embeds") if isinstance(x.get(name), Tensor)), None)
    if named is None or not model.takes("attention_mask"):
        why = "there are none" if named is None else f"{model.name} takes no 'attention_mask'"
        raise SpecError(f"mask= goes with 'input_ids' or 'inputs_embeds', and {why}", "mask")
    if mask.shape != named.shape[:2]:
        raise SpecError(f"the mask is shaped {tuple(mask.shape)}, and the tokens {tuple(named.shape[:2])}", "mask")
    own = x.get("attention_mask")
    same = isinstance(own, Tensor) and own.shape == mask.shape and torch.equal(own.bool(), mask.to(own.device).bool())
    if own is not None and not same:
        raise SpecError("mask= and the mapping's 'attention_mask' differ: give one of them", "mask")
    return {**x, "attention_mask": mask if own is None else own}


def is_own(x: Any) -> bool:
    """Whether an input is the module's own, and not token ids or text: floats, a mapping, or a tuple with tensors."""
    if isinstance(x, Tensor):
        return x.is_floating_point() or x.is_complex()
    return isinstance(x, Mapping) or (isinstance(x, tuple) and any(isinstance(item, Tensor) for item in x))


def own_batch(x: Any, device: torch.device) -> Batch:
    """A batch of a module's own arguments, for modules that no map knows.

    Positions are those that a declared site's own tensor has, so the batch itself has one.

    Args:
        x: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        device: Where tensors go.

    Returns:
        The batch; its rows are the first dimension of the tensors.

    Raises:
        SpecError: If there is no tensor, or their first dimensions differ.
    """

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else copied(value)

    named = {name: moved(value) for name, value in x.items()} if isinstance(x, Mapping) else None
    args = () if named is not None else tuple(map(moved, x if isinstance(x, tuple) else (x,)))
    tensors = [value for value in (*args, *(named or {}).values()) if isinstance(value, Tensor) and value.ndim]
    rows = sorted({value.shape[0] for value in tensors})
    if len(rows) != 1:
        raise SpecError(
            f"the inputs must have one number of rows, which come first; these have {rows or 'no tensors'}", "x"
        )
    ids = torch.zeros(rows[0], 1, dtype=torch.long, device=device)
    return Batch(ids=ids, starts=(0,) * rows[0], lengths=(1,) * rows[0], inputs=named, args=args)


def rooted(batch: Batch) -> Batch:
    """The same batch with its floating inputs as leaves of a graph, so that gradients exist without parameters.

    Args:
        batch: A batch of a module's own arguments.
    """

    def leaf(value: Any) -> Any:
        wanted = isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad
        return value.detach().requires_grad_() if wanted else value

    named = None if batch.inputs is None else {name: leaf(value) for name, value in batch.inputs.items()}
    return replace(batch, inputs=named, args=tuple(map(leaf, batch.args)))


_LOOKING: ContextVar[dict[str, int] | None] = ContextVar("widths", default=None)


class _Seen(Exception):
    """Every stack's first block has been reached."""


def _widths(model: Model, inputs: Mapping[str, Any], stacks: list[str]) -> dict[str, int]:
    """How many positions each stack has for these inputs: the model is run until their first blocks are reached."""
    seen: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _LOOKING.get() is not seen:  # another thread's forward
                return
            seen[name] = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)).shape[1]
            if len(seen) == len(stacks):
                raise _Seen

        return hook

    handles = [model.stacks[name].blocks[0].register_forward_pre_hook(watch(name), with_kwargs=True) for name in stacks]
    token = _LOOKING.set(seen)
    try:
        with torch.no_grad():
            model.module(**{name: copied(value) for name, value in inputs.items()})
    except _Seen:
        pass
    finally:
        _LOOKING.reset(token)
        for handle in handles:
            handle.remove()
    return seen
