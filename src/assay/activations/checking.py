"""What an edit is refused for when it is made, and how the edits of a run are read: whatever shape they come in."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from assay.base.errors import InvalidEdit

_SELECTORS = ("positions", "source_positions", "rows", "heads")
_PLAIN = (type(None), int, str, slice)


def prepare(edit: Any) -> None:
    """Refuse an edit that fits no site, and keep what can be read only once.

    An iterator among its selectors becomes a tuple, because every site, every row and every forward reads it again.

    Args:
        edit: The edit, as it is being made.

    Raises:
        InvalidEdit: If its site is no text, or a number of its own is none.
    """
    if not isinstance(edit.site, str):
        name = type(edit).__name__
        raise InvalidEdit(
            f"{name}({edit.site!r:.60}): the site comes first, by name: {name}('blocks.5.resid_post', ...)"
        )
    for field in _SELECTORS:
        given = getattr(edit, field, None)
        if not isinstance(given, _PLAIN):
            kept = _kept(given)
            if kept is not given:
                object.__setattr__(edit, field, kept)
    value = getattr(edit, "value", None)
    if edit.needs_numbers or isinstance(value, Tensor):
        numbers(edit, value)
    scale = getattr(edit, "scale", None)
    if scale is not None and type(scale) is not float:
        number(edit, "scale", scale)
    elif scale is not None and math.isnan(scale):
        raise InvalidEdit(f"{name_of(edit)}: scale={scale} is not finite")


def name_of(edit: Any) -> str:
    """An edit in a message: its kind and its site."""
    return f"{type(edit).__name__}({edit.site!r})"


def _kept(selector: Any) -> Any:
    """A selector that can be read again: iterators, also those inside a sequence, as tuples."""
    if hasattr(selector, "__next__"):
        return tuple(map(_kept, selector))
    if isinstance(selector, list | tuple) and any(hasattr(item, "__next__") for item in selector):
        return tuple(map(_kept, selector))
    return selector


def number(edit: Any, field: str, value: Any) -> float:
    """One number that an edit was given, as a float.

    Args:
        edit: The edit.
        field: What it is called, for the message.
        value: What was given: a number, or a tensor of one.

    Raises:
        InvalidEdit: If it is something else, or not a number (NaN).
    """
    one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and value.device.type != "meta"
    if not (one or isinstance(value, Real)):
        shape = f" shaped {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise InvalidEdit(f"{name_of(edit)}: {field}= is one number, not {value!r:.60}{shape}")
    try:
        found = float(value)
    except (RuntimeError, OverflowError):  # inside a transform of torch.func there are no numbers yet
        return 0.0
    if math.isnan(found):
        raise InvalidEdit(f"{name_of(edit)}: {field}={found} is not finite")
    return found


def numbers(edit: Any, value: Any) -> None:
    """Refuse a value that is no number or tensor of numbers.

    Infinity is one: scores are closed with it.

    Raises:
        InvalidEdit: If it holds NaN, has no numbers (the "meta" device), or is no tensor.
    """
    if type(value) in (int, float):
        if value != value:
            raise InvalidEdit(f"{name_of(edit)}: its value {value} is not finite")
        return
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise InvalidEdit(f"{name_of(edit)}: a number or a tensor is needed, not {value!r:.60}") from None
    if value.device.type == "meta":
        raise InvalidEdit(f"{name_of(edit)}: its value is on the 'meta' device, where tensors have no numbers")
    if value.is_floating_point() or value.is_complex():
        with contextlib.suppress(RuntimeError):  # inside a transform of torch.func there are no numbers yet
            if bool(torch.isnan(value).any()):
                raise InvalidEdit(f"{name_of(edit)}: its value holds NaN, and is not finite")


def real(tensor: Tensor, x: Tensor, edit: Any) -> None:
    """Refuse complex numbers where the site has none: their imaginary part would be lost.

    Raises:
        InvalidEdit: If that is so.
    """
    if tensor.is_complex() and not x.is_complex():
        raise InvalidEdit(f"{name_of(edit)}: its value is complex ({tensor.dtype}), and the site's are {x.dtype}")


def put(new: Tensor, old: Tensor, edit: Any) -> Tensor:
    """An edit's result in the type and on the device of what it takes the place of.

    Args:
        new: The result.
        old: What was there.
        edit: The edit, for the message.

    Raises:
        InvalidEdit: If numbers would change on the way: complex ones, truth values, fractions where whole numbers are.
    """
    if new.dtype == old.dtype and new.device == old.device:
        return new
    name = name_of(edit)
    if new.device.type == "meta" and old.device.type != "meta":
        raise InvalidEdit(f"{name}: it gave a tensor on the 'meta' device, which has no numbers")
    real(new, old, edit)
    if new.dtype == torch.bool and old.dtype != torch.bool:
        raise InvalidEdit(f"{name}: it gave truth values where numbers of {old.dtype} are; say .to(x.dtype) if 0 and 1")
    whole = old.is_floating_point() or not new.is_floating_point()
    if not (whole or bool((torch.isfinite(new) & (new == new.round())).all())):
        raise InvalidEdit(f"{name}: whole numbers are needed there, such as experts' own")
    return new.to(device=old.device, dtype=old.dtype)


def edits_of(given: Any, what: str = "edits") -> tuple[Any, ...]:
    """The edits of a run as a tuple: a list, a tuple or whatever gives them one after the other.

    Args:
        given: What was passed.
        what: The argument's name, for the message.

    Raises:
        InvalidEdit: If it is one edit without a list, None, or no sequence.
    """
    if type(given) is tuple:
        return given
    if given is None or isinstance(given, str | Mapping | Tensor) or not isinstance(given, Iterable):
        listed = f"{what}=[{type(given).__name__}(...)]" if hasattr(given, "transform") else f"{what}=[]"
        raise InvalidEdit(f"{what}= is a list of edits, such as {listed}, not {given!r:.80}")
    return tuple(given)


def unit_rows(value: Any, x: Tensor, edit: Any) -> Tensor:
    """An orthonormal basis of the rows of a value, `[k, d]`, each along its row as far as those before it leave it.

    Args:
        value: Directions `[k, d]` or `[d]`, of any norm.
        x: What they are directions of, `[..., d]`.
        edit: The edit, for the message.

    Raises:
        InvalidEdit: If they are no directions there, or one is zero or made of the others.
    """
    try:
        value = torch.as_tensor(value)
        real(value, x, edit)
        wide = torch.promote_types(x.dtype, torch.float32)  # half precision is too coarse for a basis
        rows = value.reshape(-1, value.shape[-1]).to(device=x.device, dtype=wide)
    except (TypeError, ValueError, RuntimeError, IndexError):
        raise InvalidEdit(f"{name_of(edit)}: directions [k, d] are needed, not {value!r:.60}") from None
    if rows.shape[-1] != x.shape[-1]:
        raise InvalidEdit(f"{name_of(edit)}: directions of width {rows.shape[-1]} at a site of width {x.shape[-1]}")
    if not 0 < len(rows) <= x.shape[-1]:
        raise InvalidEdit(
            f"{name_of(edit)}: {len(rows)} directions at a site of width {x.shape[-1]}, which has room for 1 to "
            f"{x.shape[-1]}"
        )
    q, r = torch.linalg.qr(rows.T)
    diagonal = torch.diagonal(r)
    if not bool((diagonal.abs() > 1e-6 * rows.norm(dim=1).clamp(min=1e-30)).all()):
        raise InvalidEdit(f"{name_of(edit)}: the directions are zero or linearly dependent")
    signed: Tensor = q * diagonal.sign()
    return signed.T
