"""Where a trainer takes activations from: the one contract of stored activations and of a live stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Source(Protocol):
    """Batches of activations at one or many sites, the same tokens in the same rows at all of them.

    Which tokens are in a batch is a function of the seed and the step alone. One source feeds any number of
    dictionaries: take the batch once, and give each its sites.

    Attributes:
        sites: The sites, in order.
        widths: Their widths.
        batch_size: How many rows a batch has.
    """

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites, in order."""

    @property
    def widths(self) -> Mapping[str, int]:
        """The width of each site."""

    @property
    def batch_size(self) -> int:
        """How many rows a batch has."""

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of a step: for each site `[batch, d]` in float32, a tensor of the caller's own."""

    def state(self) -> dict[str, Any]:
        """What a later process needs to go on from here: tensors and JSON values by name."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, with the batches that would have come.

        Raises:
            SpecError: The state is of another source.
        """

    def describe(self) -> dict[str, Any]:
        """Where the activations come from, as JSON values for a result's provenance."""
