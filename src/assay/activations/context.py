"""The state of one run: what it asked for, and what it has seen so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from assay.activations.apply import Placed, Window, apply_edits
from assay.activations.current import CURRENT
from assay.activations.values import named
from assay.base.errors import SiteNotFired
from assay.base.sites import Site
from assay.subjects.points import Point, Traffic


@dataclass(slots=True)
class Request:
    """Everything a run wants of one site.

    Args:
        site: The site, with all its heads.
        point: Where it is read.
        edits: The edits at it, in the order given.
        captures: The names under which it is kept: the whole site, single heads, or none.
    """

    site: Site
    point: Point
    edits: list[Placed] = field(default_factory=list)
    captures: list[Site] = field(default_factory=list)
    fired: bool = False


@dataclass(slots=True)
class RunState:
    """One run in progress.

    Args:
        requests: What it wants, by site.
        window: Which part of which prompts the current forward covers.
        keep_graph: Keep raw tensors for gradients.
        append: Collect captures of successive forwards (generation) instead of keeping the last.
        rows: The number of rows of the forward, when it is not that of the window's batch.
        record_attention: Called with each attention module, its keys and its values.
    """

    requests: dict[str, Request]
    window: Window
    keep_graph: bool = False
    append: bool = False
    captured: dict[str, Tensor] = field(default_factory=dict)
    raws: dict[str, Tensor] = field(default_factory=dict)
    pieces: dict[str, list[Tensor]] = field(default_factory=dict)

    rows: int | None = None
    record_attention: Callable[[nn.Module, Tensor, Tensor], None] | None = None
    by_attention: dict[nn.Module, dict[str, Request]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Index what is asked of attention functions by module."""
        for request in self.requests.values():
            if request.point.side == "attention":
                self.by_attention.setdefault(request.point.module, {})[request.site.point] = request

    @property
    def watches_attention(self) -> bool:
        """Whether attention functions have anything to do for this run."""
        return bool(self.by_attention) or self.record_attention is not None

    def attention_requests(self, module: nn.Module) -> dict[str, Request]:
        """What is asked of one attention module, by point."""
        return self.by_attention.get(module, {})

    def serve(self, request: Request, traffic: Traffic) -> bool:
        """Apply a request to what passes through a module; return whether it was changed."""
        if self.window.empty:
            return False
        request.fired = True
        point = request.point
        changed = False
        if request.edits:
            value = self.rows_of(request, point.read(traffic))
            base = value.clone() if point.in_place else value
            new = apply_edits(base, request.edits, self.window, point)
            if new is not base:
                point.write(traffic, new)
                changed = True
        if request.captures:
            self.keep(request, self.rows_of(request, point.read(traffic)), point.raw(traffic))
        return changed

    def rows_of(self, request: Request, value: Tensor) -> Tensor:
        """Position embeddings come once for all rows; give each row its own view of them."""
        rows = self.rows or self.window.batch.size
        if request.site.point != "pos_embed" or value.shape[0] == rows:
            return value
        return value.expand(rows, *value.shape[1:])

    def keep(self, request: Request, value: Tensor, raw: Tensor) -> None:
        """Keep a captured value, whole or by head."""
        for site in request.captures:
            part, dims = value, request.point.dims
            if site.head is not None and request.point.head_dim is not None:
                part = value.select(request.point.head_dim, site.head)
                dims = dims[: request.point.head_dim] + dims[request.point.head_dim + 1 :]
            name = str(site)
            if self.keep_graph:
                self.raws[name] = raw
            dims = dims or tuple(f"dim{i}" for i in range(part.ndim))
            kept = named(part.detach(), dims)
            if self.append:
                kept = named(self._within_span(kept, dims), dims)
                self.pieces.setdefault(name, []).append(kept)
            self.captured[name] = kept

    def _within_span(self, kept: Tensor, dims: tuple[str, ...]) -> Tensor:
        """Only the columns that captures apply to (generation without a cache passes all columns each time)."""
        low, high = self.window.span
        along = next((dims.index(d) for d in ("pos", "query") if d in dims), None)
        if along is None or kept.shape[along] == high - low:
            return kept
        return kept.narrow(along, low - self.window.first, high - low)

    def check_fired(self) -> None:
        """Raise if anything asked for never happened."""
        missing = [str(request.site) for request in self.requests.values() if not request.fired]
        if missing:
            raise SiteNotFired(
                f"never reached in this run: {', '.join(missing)}. Its module was not called"
                + (" for any of the positions asked for (apply_to)" if self.append else "")
            )


def current_run() -> RunState | None:
    """The run that this thread (or task) is in the middle of, if any."""
    run: RunState | None = CURRENT.get()
    return run
