"""Sites that the user declares, for modules that no map knows: a name, where it is, and what its dimensions are.

    assay.load(module, sites={
        "conv1": "features.0.out | batch channel height width",
        "hidden": "lstm.out[0] | batch pos d",
        "cell": "lstm.out[1][1] | layer batch d",
        "z": "attn.proj.in | batch pos (head=4 d_head)",
    })

What is left of the bar is a module's dotted path, a side, and items to take out of what is there: `[1]` of a tuple,
`[name]` of a mapping or of the keyword arguments. What is right of it names the dimensions. `batch` takes rows, `pos`
positions, `head` (or `channel`) heads; a group in brackets is one dimension seen as two.
"""

from __future__ import annotations

import copy as copying
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from assay.base.errors import AssayError, SiteError, UnknownSite, nearest
from assay.base.sites import GLOBAL_POINTS, STACKS
from assay.subjects.points import Dims, Point, Traffic

HEAD_NAMES = ("head", "channel")
"""Dimensions that `heads=` and a last number in a site's name select from."""

_WHERE = re.compile(r"(?:module:)?(?P<path>[\w.]*?)\.?(?P<side>in|out)(?P<items>(?:\[\w+\])*)")
_DIM = re.compile(r"[A-Za-z_]\w*")
_GROUP = re.compile(r"\(([^()]*)\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """A declared site.

    Args:
        path: The module's dotted path; "" for the whole module.
        side: `in` or `out`.
        items: What to take out of the arguments or the output, one after the other.
        dims: The names of the dimensions of what is read.
        groups: The dimensions that are one in the tensor: the first of them, and their sizes (-1 where it follows).
    """

    path: str
    side: str
    items: tuple[int | str, ...] = ()
    dims: Dims = ()
    groups: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def point(self, module: nn.Module) -> DeclaredPoint:
        """The point on a module."""
        head = next((self.dims.index(name) for name in HEAD_NAMES if name in self.dims), None)
        side: Any = self.side
        return DeclaredPoint(
            module=module,
            path=self.path,
            side=side,
            dims=self.dims,
            head_dim=head,
            items=self.items,
            groups=self.groups,
        )


def read_declaration(name: str, text: str) -> Declared:
    """Read one declaration.

    Args:
        name: The site's name.
        text: Where it is, and what its dimensions are.

    Returns:
        The declaration.

    Raises:
        SiteError: If the name is taken or the text is not understood; the message shows one that is.

    Example:
        >>> read_declaration("z", "attn.proj.in | batch pos (head=4 d_head)").dims
        ('batch', 'pos', 'head', 'd_head')
    """
    taken = name in GLOBAL_POINTS or name.partition(".")[0] in ("module", "blocks", *STACKS)
    if taken or not re.fullmatch(r"[A-Za-z_][\w.-]*", name) or name.rpartition(".")[2].isdigit():
        raise SiteError(
            f"a site cannot be called {name!r}: a name of its own, such as 'conv1' or 'enc.hidden', is needed"
        )
    where, bar, pattern = text.partition("|")
    match = _WHERE.fullmatch(where.strip())
    if match is None:
        raise SiteError(f"site {name!r}: {where.strip()!r} is not a place; 'lstm.out[0]' or 'fc.in' would be")
    items = tuple(int(item) if item.isdigit() else item for item in re.findall(r"\[(\w+)\]", match["items"]))
    dims, groups = _read_dims(name, pattern) if bar else ((), ())
    return Declared(path=match["path"], side=match["side"], items=items, dims=dims, groups=groups)


def _read_dims(name: str, pattern: str) -> tuple[Dims, tuple[tuple[int, tuple[int, ...]], ...]]:
    dims: list[str] = []
    groups = []
    for word in re.findall(r"\([^()]*\)|[^\s()]+", pattern):
        inside = _GROUP.fullmatch(word)
        parts = [part.partition("=") for part in (inside[1].split() if inside else [word])]
        if inside:
            groups.append((len(dims), tuple(int(size) if size.isdigit() else -1 for _, _, size in parts)))
        if any(
            not _DIM.fullmatch(part) or (equals and not (inside and size.isdigit())) for part, equals, size in parts
        ):
            raise SiteError(f"site {name!r}: {word!r} is not a dimension; 'pos' or '(head=4 d_head)' would be")
        dims += [part for part, _, _ in parts]
    open_sizes = [sizes for _, sizes in groups if len(sizes) < 2 or sizes.count(-1) > 1]
    if not dims or len(set(dims)) != len(dims) or open_sizes:
        raise SiteError(
            f"site {name!r}: the dimensions {pattern.strip()!r} need names that differ, and a group needs the sizes of "
            f"all its parts but one: 'batch pos (head=4 d_head)'"
        )
    if sum(head in dims for head in HEAD_NAMES) > 1:
        raise SiteError(f"site {name!r}: of 'head' and 'channel' there can be one, because heads= selects from it")
    return tuple(dims), tuple(groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredPoint(Point):
    """A point where the user said.

    Args:
        items: See `Declared`.
        groups: See `Declared`.
    """

    items: tuple[int | str, ...] = ()
    groups: tuple[tuple[int, tuple[int, ...]], ...] = field(default=())

    def raw(self, traffic: Traffic) -> Tensor:
        """The tensor, out of the arguments or the output."""
        if not self.items:
            return Point.raw(self, traffic)
        value: Any = self._whole(traffic)
        for at, item in enumerate(self.items):
            value = _item(value, item, f"{self.path}.{self.side}{_brackets(self.items[: at + 1])}")
        if not isinstance(value, Tensor):
            raise SiteError(f"{self._place}: a {type(value).__name__} is there, and no tensor{_hint(value)}")
        return value

    def replace(self, traffic: Traffic, raw: Tensor) -> None:
        """Put another tensor in its place, and leave the rest."""
        if not self.items:
            Point.replace(self, traffic, raw)
            return
        new = _with_item(self._whole(traffic), self.items, raw)
        if self.side == "out":
            traffic.output = new
        elif isinstance(self.items[0], int):
            traffic.args = new
        else:
            traffic.kwargs = new

    def unflatten(self, raw: Tensor, rows: int) -> Tensor:
        """The tensor with its groups seen as two dimensions."""
        if not self.dims:
            return raw
        grouped = len(self.dims) - sum(len(sizes) - 1 for _, sizes in self.groups)
        if raw.ndim != grouped:
            raise SiteError(f"{self._place}: {' '.join(self.dims)} was declared, and its tensor is {tuple(raw.shape)}")
        for first, sizes in self.groups:
            known = math.prod(size for size in sizes if size > 0)
            if raw.shape[first] % known or (-1 not in sizes and raw.shape[first] != known):
                raise SiteError(
                    f"{self._place}: a dimension of {raw.shape[first]} cannot be seen as "
                    f"{dict(zip(self.dims[first : first + len(sizes)], sizes, strict=True))}"
                )
            filled = [size if size > 0 else raw.shape[first] // known for size in sizes]
            raw = raw.view(*raw.shape[:first], *filled, *raw.shape[first + 1 :])
        return raw

    def flatten(self, value: Tensor, raw: Tensor) -> Tensor:
        """The new value in the tensor's own shape."""
        return value.reshape(raw.shape)

    @property
    def _place(self) -> str:
        return f"{self.path}.{self.side}{_brackets(self.items)}"

    def _whole(self, traffic: Traffic) -> Any:
        if self.side == "out":
            return traffic.output
        return traffic.args if isinstance(self.items[0], int) else traffic.kwargs


def _brackets(items: tuple[int | str, ...]) -> str:
    return "".join(f"[{item}]" for item in items)


def _hint(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f": it has items [0] to [{len(value) - 1}]"
    return f": it has {', '.join(f'[{key}]' for key in value)}" if isinstance(value, Mapping) else ""


def _item(value: Any, item: int | str, place: str) -> Any:
    try:
        return value[item]
    except (KeyError, IndexError, TypeError):
        keys = [str(key) for key in value] if isinstance(value, Mapping) else []
        raise SiteError(f"{place} is not there{nearest(str(item), keys) or _hint(value)}") from None


def _with_item(value: Any, items: tuple[int | str, ...], new: Tensor) -> Any:
    """The same structure with one item replaced; nothing that the model holds is written to."""
    if not items:
        return new
    at: Any = items[0]
    inner = _with_item(value[at], items[1:], new)
    if isinstance(value, Mapping):
        copy: Any = copying.copy(value)
        copy[at] = inner
        return copy
    each = [*value[:at], inner, *value[at + 1 :]]
    return value._replace(**{value._fields[at]: inner}) if hasattr(value, "_replace") else type(value)(each)


def no_such_site(name: str, declared: Mapping[str, Declared], error: AssayError) -> AssayError:
    """The error for a name that is neither declared nor standard, with the declared names that are near."""
    near = nearest(name, declared)
    return UnknownSite(f"no site {name!r}{near}") if near else error
