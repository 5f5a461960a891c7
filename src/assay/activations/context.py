"""The state of one run: what it asked for, and what it has seen so far."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field

from torch import Tensor, nn

from assay.activations.apply import Placed, Window, apply_edits
from assay.activations.current import CURRENT, no_run
from assay.activations.serving import Guard, guard
from assay.activations.values import named
from assay.base.errors import SiteError, SiteNotFired
from assay.base.sites import Site
from assay.subjects.declared import DeclaredPoint
from assay.subjects.points import Point, Traffic


@dataclass(slots=True)
class Request:
    """Everything a run wants of one site.

    Args:
        site: The site, with all its heads.
        point: Where it is read.
        edits: The edits at it, in the order given.
        captures: The names under which it is kept: the whole site, single heads, or none.
        guard: Hand the model a copy of what is kept, because the model would write over it.
    """

    site: Site
    point: Point
    edits: list[Placed] = field(default_factory=list)
    captures: list[Site] = field(default_factory=list)
    fired: bool = False
    guard: bool = False


@dataclass(slots=True)
class RunState:
    """One run in progress.

    Args:
        requests: What it wants, by site.
        window: Which part of which prompts the current forward covers.
        keep_graph: Keep raw tensors for gradients.
        append: Collect captures of successive forwards (generation) instead of keeping the last.
        windows: What it covers of the other stacks, by name.
        rows: The number of rows of the forward, when it is not that of the window's batch.
        attention: Called in the place of each attention function, with the function and what it was to be given.
        limited: Holds it to the limits that were set where it began, if any were.
    """

    requests: dict[str, Request]
    window: Window
    keep_graph: bool = False
    append: bool = False
    captured: dict[str, Tensor] = field(default_factory=dict)
    raws: dict[str, Tensor] = field(default_factory=dict)
    pieces: dict[str, list[Tensor]] = field(default_factory=dict)

    seen: list[tuple[Request, Tensor, int]] = field(default_factory=list)
    windows: dict[str, Window] = field(default_factory=dict)
    rows: int | None = None
    attention: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    by_attention: dict[nn.Module, dict[str, Request]] = field(default_factory=dict)
    limited: Guard | None = field(default_factory=guard)

    def __post_init__(self) -> None:
        """Index what is asked of attention functions by module."""
        if self.window.batch.stacks and not self.windows:
            self.windows = {name: Window(batch) for name, batch in self.window.batch.stacks.items()}
        for request in self.requests.values():
            if request.point.side in ("attention", "function"):
                name = request.site.point.rpartition(".")[2]
                self.by_attention.setdefault(request.point.module, {})[name] = request

    @property
    def watches_attention(self) -> bool:
        """Whether attention functions have anything to do for this run."""
        return bool(self.by_attention) or self.attention is not None

    @property
    def n_rows(self) -> int:
        """The number of rows of the forward."""
        return self.rows or self.window.batch.size

    def attention_requests(self, module: nn.Module) -> dict[str, Request]:
        """What is asked of one attention module, by the last part of the point's name."""
        return self.by_attention.get(module, {})

    def window_of(self, request: Request) -> Window:
        """The positions that a request's stack has in this forward."""
        stack = request.point.stack
        return self.windows.get(stack, self.window) if self.windows else self.window

    def serve(self, request: Request, traffic: Traffic) -> bool:
        """Apply a request to what passes through a module; return whether it was changed."""
        window = self.window_of(request)
        if self.limited is not None:
            self.limited.check()
        if window.empty:
            return False
        request.fired = True
        point = request.point
        changed, written = False, None
        if request.edits:
            value = self.rows_of(request, _read(point, traffic))
            base = value.clone() if point.in_place else value
            new = apply_edits(base, request.edits, window, point)
            if new is not base:
                point.write(traffic, new)
                changed, written = True, new
        if request.captures:
            raw = point.raw(traffic)
            if written is None or not point.derived:  # which is computed beside the model, and knows of no edit
                written = self.rows_of(request, _read(point, traffic))
            self.keep(request, written, raw)
            self.seen.append((request, raw, _version(raw)))
            if request.guard and point.side != "attention":
                point.replace(traffic, raw.clone())
                changed = True
        return changed

    def rows_of(self, request: Request, value: Tensor) -> Tensor:
        """Position embeddings come once for all rows; give each row its own view of them."""
        rows = self.n_rows
        if request.site.point != "pos_embed" or value.shape[0] == rows:
            return value
        return value.expand(rows, *value.shape[1:])

    def keep(self, request: Request, value: Tensor, raw: Tensor) -> None:
        """Keep a captured value, whole or by head."""
        for site in request.captures:
            part, dims = value, request.point.dims
            if site.head is not None and request.point.head_dim is not None:
                if site.head >= value.shape[request.point.head_dim]:
                    raise SiteError(f"no site {str(site)!r}: there are {value.shape[request.point.head_dim]} of them")
                part = value.select(request.point.head_dim, site.head)
                dims = dims[: request.point.head_dim] + dims[request.point.head_dim + 1 :]
            name = str(site)
            if self.keep_graph:
                self.raws[name] = raw
            dims = dims or tuple(f"dim{i}" for i in range(part.ndim))
            kept = named(part.detach(), dims)
            own = request.site.module is not None or isinstance(request.point, DeclaredPoint)
            if own and name in self.captured and not self.append:
                raise SiteError(f"{name!r}: its module is called more than once in a forward, and has no one value")
            if self.append:
                window = self.window_of(request)
                kept = named(align_keys(self._within_span(kept, dims, window), request.site.point, window), dims)
                if request.point.stack in self.windows:  # another stack's tokens, computed once or every time alike
                    self.pieces[name] = []
                self.pieces.setdefault(name, []).append(kept)
            if self.limited is not None:
                self.limited.keep(name, kept)
            self.captured[name] = kept

    def _within_span(self, kept: Tensor, dims: tuple[str, ...], window: Window) -> Tensor:
        """Only the columns that captures apply to (generation without a cache passes all columns each time)."""
        low, high = window.span
        along = next((dims.index(d) for d in ("pos", "query") if d in dims), None)
        if along is None or kept.shape[along] == high - low:
            return kept
        return kept.narrow(along, low - window.first, high - low)

    def forget(self, stacks: Container[str] = ()) -> None:
        """Let go of what was kept of earlier forwards (generation), but for that of some stacks."""
        kept = {str(s) for r in self.requests.values() if r.point.stack in stacks for s in r.captures}
        for name in [name for name in self.pieces if name not in kept]:
            del self.pieces[name]
        self.captured.clear()
        self.seen.clear()
        if self.limited is not None:
            self.limited.forget()

    def overwritten(self) -> set[str]:
        """The sites whose tensors the model wrote over, in place, after they were captured."""
        return {str(request.site) for request, raw, version in self.seen if _version(raw) != version}

    def check_fired(self) -> None:
        """Raise if anything asked for never happened."""
        missing = [str(request.site) for request in self.requests.values() if not request.fired]
        if missing:
            raise SiteNotFired(
                f"never reached in this run: {', '.join(missing)}. Its module was not called"
                + (" for any of the positions asked for (apply_to)" if self.append else "")
            )


def _read(point: Point, traffic: Traffic) -> Tensor:
    """What a point shows. A derived one may ask the module itself, in a call that is no part of the run."""
    if not point.derived:
        return point.read(traffic)
    with no_run():
        return point.read(traffic)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written over; those made in inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def align_keys(kept: Tensor, point: str, window: Window) -> Tensor:
    """Put the keys of a step's scores or pattern at their columns.

    A cache of a sliding window holds the last keys only; a prompt that is read again without a cache has keys after it.
    """
    if point not in ("attn.scores", "attn.pattern"):
        return kept
    closed = float("-inf") if point == "attn.scores" else 0.0
    return nn.functional.pad(kept, (window.last - kept.shape[-1], 0), value=closed)[..., : window.span[1]]


def current_run() -> RunState | None:
    """The run that this thread (or task) is in the middle of, if any."""
    run: RunState | None = CURRENT.get()
    return run
