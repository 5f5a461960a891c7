"""What one family of methods may ask of another without knowing it."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Dictionary(Protocol):
    """A trained dictionary: an SAE, a transcoder or a crosscoder; its units are latents.

    Attributes:
        site: Where it reads.
        n_latents: How many latents it has.
        decoder: One row a latent, what it writes, `[latent, d]`.
    """

    @property
    def site(self) -> str:
        """Where it reads."""

    @property
    def n_latents(self) -> int:
        """How many latents it has."""

    @property
    def decoder(self) -> Any:
        """What each latent writes, `[latent, d]`."""

    def encode(self, x: Any, /) -> Any:
        """Activations of latents for activations of the site, `[..., d]` to `[..., latent]`."""

    def decode(self, z: Any, /) -> Any:
        """What the latents say the activations are, `[..., latent]` to `[..., d]`."""
