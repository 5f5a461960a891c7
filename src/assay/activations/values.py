"""What a run returns: logits, captured tensors with named dimensions, and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from assay.base.errors import SiteError, nearest
from assay.base.sites import Site, parse_site
from assay.subjects.tokens import Batch


def named(tensor: Tensor, dims: tuple[str, ...]) -> Tensor:
    """Attach names to a tensor's dimensions, as `tensor.dims`."""
    tensor.dims = dims  # type: ignore[attr-defined]
    return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """Tensors by canonical site name; a head of a captured site is read by naming it.

    Args:
        tensors: Whole sites, or single heads where only those were asked for.
        head_dims: For each site with heads, which dimension counts them.
        resolve: From any accepted spelling to a site.
        what: What these are, for messages.
    """

    tensors: Mapping[str, Tensor]
    head_dims: Mapping[str, int | None]
    resolve: Callable[[str], Site]
    what: str = "captured"

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of a site, by any accepted spelling.

        Raises:
            SiteError: If it is not among these.
        """
        site = self.resolve(name)
        if str(site) in self.tensors:
            return self.tensors[str(site)]
        whole = str(site.whole)
        head_dim = self.head_dims.get(whole)
        if site.head is not None and whole in self.tensors and head_dim is not None:
            tensor = self.tensors[whole]
            dims = tensor.dims  # type: ignore[attr-defined]
            return named(tensor.select(head_dim, site.head), dims[:head_dim] + dims[head_dim + 1 :])
        given = ", ".join(list(self.tensors)[:5]) + (", ..." if len(self.tensors) > 5 else "")
        raise SiteError(
            f"{name!r} was not {self.what} in this run{nearest(str(site), self.tensors)}"
            + (f" ({self.what}: {given})" if given else f" (nothing was {self.what}: {self._how})")
        )

    @property
    def _how(self) -> str:
        """How to have something here."""
        return "give a metric as grad=" if self.what == "differentiated" else "name sites in capture="

    def __contains__(self, name: object) -> bool:
        """Whether a site is here, in any spelling."""
        try:
            return isinstance(name, str) and self[name] is not None
        except SiteError:
            return False

    def __iter__(self):  # type: ignore[no-untyped-def]
        """Iterate over the canonical names."""
        return iter(self.tensors)

    def __len__(self) -> int:
        """How many sites are here."""
        return len(self.tensors)


def no_gradients() -> Captured:
    """The gradients of a run without a metric: none, and a word about it where one is asked for."""
    return Captured(tensors={}, head_dims={}, resolve=parse_site, what="differentiated")


@dataclass(frozen=True, slots=True, kw_only=True)
class Donor:
    """What a run had at one site, and where its prompts lie in it: all that `Patch` and `Ablate` need of a run.

    Args:
        tensor: The site's tensor, whole, shaped as it was captured.
        batch: The tokens, and where each prompt lies in them.
    """

    tensor: Tensor
    batch: Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One forward pass: its logits, what was captured, and gradients where asked.

    Args:
        logits: `[batch, pos, vocab]` (the module's own output where it has no logits).
        batch: The tokens, and where each prompt lies in them.
        captured: The captured tensors.
        grad: The metric's gradient at the captured sites; empty without a metric.
        value: The metric, one value a row, if one was given.
    """

    logits: Tensor
    batch: Batch
    captured: Captured
    grad: Captured = field(default_factory=no_gradients)
    value: Tensor | None = None
    generated: Tensor | None = field(default=None)

    def __getitem__(self, name: str) -> Tensor:
        """A captured tensor, by any accepted spelling of its site."""
        return self.captured[name]

    def __contains__(self, name: object) -> bool:
        """Whether a site was captured."""
        return name in self.captured

    def whole(self, name: str) -> Tensor:
        """The captured tensor of a site with all its heads, or of the one head that was captured."""
        whole = str(self.captured.resolve(name).whole)
        return self.captured.tensors[whole] if whole in self.captured.tensors else self.captured[name]

    def donor(self, name: str) -> Donor:
        """What `Patch` and `Ablate` need of this run at one site: without its logits and its other captures."""
        return Donor(tensor=self.whole(name), batch=self.batch)

    def __repr__(self) -> str:
        """One line: shapes, not numbers."""
        captured = ", ".join(list(self.captured)[:3]) + (", ..." if len(self.captured) > 3 else "")
        return f"<Run logits {tuple(self.logits.shape)}, captured {len(self.captured)}: {captured or 'nothing'}>"

    @property
    def tokens(self) -> Tensor:
        """The token ids, `[batch, pos]`."""
        return self.batch.ids
