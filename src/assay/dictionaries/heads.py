"""Which heads a latent of concatenated heads belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from assay.base.errors import SpecError
from assay.dictionaries.dictionary import Dictionary, Site


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadShares:
    """How much of each latent lies in each head; rows add up to 1, and are 0 for a latent that is 0.

    Attributes:
        encoder: The share of the squared length of the encoder's row that lies in a head's columns: what it reads.
        decoder: The same of the decoder's row: what it writes.
    """

    encoder: Float[np.ndarray, "latent head"]
    decoder: Float[np.ndarray, "latent head"]


def head_shares(dictionary: Dictionary, heads: int, site: str | None = None) -> HeadShares:
    """Each latent's share per head, where a site's heads lie side by side (`blocks.i.attn.z`).

        share[f, h] = |W[f, columns of h]|^2 / sum_h' |W[f, columns of h']|^2

    Args:
        dictionary: A dictionary that reads and writes the site.
        heads: How many heads there are.
        site: Which of a crosscoder's sites; its only one when not given.

    Raises:
        SpecError: The dictionary does not read and write the site, or its width is no multiple of `heads`.

    Source: Kissane et al. 2024 (arXiv 2406.17759), attribution of attention-output latents to heads by decoder weights;
    the encoder's is the same of what is read.

    Example:
        >>> from assay.dictionaries import Card, ReLU
        >>> W = torch.tensor([[3.0, 0.0, 0.0, 4.0]])
        >>> z = (Site("blocks.0.attn.z", 4),)
        >>> card = Card(reads=z, writes=z)
        >>> made = Dictionary(
        ...     W_enc=W, b_enc=torch.zeros(1), W_dec=W, b_dec=torch.zeros(4), activation=ReLU(), card=card
        ... )
        >>> head_shares(made, heads=2).decoder.round(2).tolist()
        [[0.36, 0.64]]
    """
    encoder = _columns(dictionary.W_enc, dictionary.card.reads, site)
    decoder = _columns(dictionary.W_dec, dictionary.card.writes, site)
    return HeadShares(encoder=_shares(encoder, heads), decoder=_shares(decoder, heads))


def _columns(weights: Tensor, sites: Sequence[Site], wanted: str | None) -> Tensor:
    names = [site.name for site in sites]
    if wanted is None and len(names) != 1:
        raise SpecError(f"the dictionary has several sites: name one with site ({', '.join(names)})", "site")
    if wanted is not None and wanted not in names:
        raise SpecError(f"the dictionary has no site {wanted!r}, only {', '.join(names)}", "site")
    at = 0 if wanted is None else names.index(wanted)
    return torch.split(weights, [site.width for site in sites], dim=1)[at]


def _shares(rows: Tensor, heads: int) -> Float[np.ndarray, "latent head"]:
    if heads < 1 or rows.shape[1] % heads:
        raise SpecError(f"a width of {rows.shape[1]} is not divided into {heads} heads", "heads")
    squares = torch.unflatten(rows.detach().double().square(), 1, (heads, -1)).sum(2)
    total = squares.sum(1, keepdim=True)
    return np.asarray(torch.where(total > 0, squares / total, 0.0).cpu().numpy())
