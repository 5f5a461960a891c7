"""TopK, BatchTopK and Matryoshka: how many latents are active is set, and nothing is penalised.

    topk        the k largest of each row
    batchtopk   the k B largest of the whole batch; afterwards a threshold, the running mean of the smallest kept
    matryoshka  batchtopk whose reconstruction must be good from each nested group of latents alone

Sources: Gao et al. 2024 (arXiv 2406.04093), section 2.3; Bussmann et al. 2024 (arXiv 2412.06410); Bussmann et al. 2025
(arXiv 2503.17547).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from assay.dictionaries.activations import Activation, JumpReLU, TopK
from assay.dictionaries.families.family import Asked, Moment, Part, Selected
from assay.dictionaries.settings import Training

_RATE = 0.01
"""How fast the running threshold follows."""


class TopKFamily:
    """The k largest of each row."""

    unit_norm = True

    def begin(self, part: Part, settings: Training, x: Tensor) -> None:
        """Nothing of its own."""

    def select(self, part: Part, bias: Tensor, now: Moment) -> Selected:
        """The k largest of each row that are above 0."""
        pairs = now.kernels.select_rows(now.x, part.W_enc, bias, now.settings.k)
        return Selected(pairs=pairs, h=pairs.values)

    def ask(self, part: Part, selected: Selected, dz: Tensor, now: Moment) -> Asked:
        """The slope of a selected latent is 1."""
        return Asked(slopes=dz)

    def settle(self, part: Part) -> None:
        """Nothing of its own."""

    def activation(self, part: Part, settings: Training, memory: Mapping[str, Tensor]) -> Activation:
        """TopK, as in training."""
        return TopK(k=settings.k)


class BatchTopKFamily(TopKFamily):
    """The k B largest of the batch."""

    def select(self, part: Part, bias: Tensor, now: Moment) -> Selected:
        """The k B largest that are above 0; follows the smallest of them."""
        pairs, bound = now.kernels.select_batch(now.x, part.W_enc, bias, now.settings.k * now.rows)
        bound = torch.as_tensor(bound, dtype=torch.float64).cpu()
        before = now.memory.get(_name(part))
        now.memory[_name(part)] = bound if before is None else before + _RATE * (bound - before)
        return Selected(pairs=pairs, h=pairs.values)

    def activation(self, part: Part, settings: Training, memory: Mapping[str, Tensor]) -> Activation:
        """A JumpReLU with the running threshold for every latent."""
        threshold = float(memory[_name(part)]) if _name(part) in memory else 0.0
        return JumpReLU(threshold=torch.full_like(part.b_enc, max(threshold, 0.0)))


def _name(part: Part) -> str:
    """What a part's running threshold is called: a cross-layer transcoder has one for each layer it reads."""
    return f"threshold/{part.reads.start or 0}"
