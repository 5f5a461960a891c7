"""How a dictionary is trained, as data that crosses borders. Importing this module imports no torch."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

FamilyName = Literal["topk", "batchtopk", "matryoshka", "jumprelu", "l1", "l1-april", "p-anneal", "gated"]
"""What can be trained, on any site or sites."""

_OF_FAMILY: dict[str, tuple[str, ...]] = {
    "k": ("topk", "batchtopk", "matryoshka"),
    "groups": ("matryoshka",),
    "sparsity": ("jumprelu", "l1", "l1-april", "p-anneal", "gated"),
    "target_l0": ("jumprelu",),
    "penalty": ("jumprelu",),
    "bandwidth": ("jumprelu",),
    "threshold": ("jumprelu",),
    "p_end": ("p-anneal",),
}
"""Settings that mean something for some families only."""
_RELU = ("l1", "l1-april", "p-anneal")


def _usual(family: str) -> str:
    return "aux" if family in _OF_FAMILY["k"] else "resample"


class Training(BaseModel):
    """How a dictionary is trained.

    Rows are multiplied by one factor a site, so that their mean length is `sqrt(d)`; the loss `L` is the squared error
    summed over `d` and averaged over the batch, in those units, with outliers held back, and the penalty. What is
    minimised is `d log L`: Adam's steps are those of `L`, but for what its moments remember of other steps. The factor
    is folded into the weights at the end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    family: FamilyName = Field(default="topk", description="What kind of dictionary.")
    latents: int = Field(default=4096, ge=1, description="How many latents (for a cross-layer transcoder, a layer).")
    k: int = Field(default=32, ge=1, description="Active latents a row: topk, batchtopk, matryoshka.")
    groups: tuple[float, ...] = Field(
        default=(0.0625, 0.125, 0.25, 0.5625),
        description="Shares of the latents in each nested group, adding up to 1: matryoshka.",
    )
    sparsity: float = Field(
        default=3.0, gt=0, description="Weight of the sparsity penalty: jumprelu, l1, l1-april, p-anneal, gated."
    )
    penalty: Literal["l0", "tanh", "target"] = Field(
        default="l0",
        description="jumprelu: the number of active latents, a tanh of them, or its distance from a target.",
    )
    target_l0: float = Field(default=32.0, gt=0, description="jumprelu with penalty target: active latents a row.")
    bandwidth: float = Field(default=0.05, gt=0, description="jumprelu: width of the window of its estimator.")
    threshold: float | None = Field(
        default=None,
        ge=0,
        description="jumprelu: where thresholds start; where not given, 0.01, and with penalty target where each "
        "latent is active in four times its share of the first rows.",
    )
    p_end: float = Field(default=0.2, gt=0, le=1, description="p-anneal: the power that |z|^p ends with.")
    steps: int = Field(default=2000, ge=1, description="Optimiser steps.")
    batch: int = Field(default=2048, ge=1, description="Rows a step.")
    lr: float | None = Field(
        default=None, gt=0, description="Adam's rate at its highest; 2e-4 / sqrt(latents / 16384) where not given."
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="Adam's betas.")
    eps: float = Field(default=1e-8, gt=0, description="Adam's epsilon.")
    warmup: float = Field(default=0.02, ge=0, lt=1, description="Share of the steps in which the rate rises.")
    decay: float = Field(default=0.2, ge=0, le=1, description="Share of the steps, the last, in which it falls to 0.")
    sparsity_warmup: float = Field(default=0.1, ge=0, lt=1, description="Share of the steps in which `sparsity` rises.")
    relative: bool = Field(
        default=True,
        description="Divide the gradient of each step by its loss, so that early steps do not rule Adam's moments.",
    )
    outliers: float | None = Field(
        default=10.0,
        gt=0,
        description="How many times as hard as the usual row an outlier may pull; None for no bound.",
    )
    clip: float | None = Field(default=None, gt=0, description="Largest norm of a step's gradient; slower where given.")
    centred: bool | None = Field(
        default=None,
        description="Subtract the decoder's bias before encoding; where not given, for all but transcoders.",
    )
    bias: Literal["zero", "mean", "median"] = Field(
        default="median", description="Where the decoder's bias starts: the first rows' mean or geometric median."
    )
    skip: bool = Field(default=False, description="A linear map beside the latents: a skip transcoder.")
    dead: Literal["none", "aux", "resample", "ghost", "ghost-scaled"] | None = Field(
        default=None,
        description="What is done about latents that stay silent; where not given, aux for topk, batchtopk and "
        "matryoshka, and resample for those with a penalty.",
    )
    dead_after: int = Field(default=1_000_000, ge=1, description="Rows without activity that make a latent dead.")
    aux: float = Field(default=1 / 32, ge=0, description="dead=aux: weight of the loss of the dead latents.")
    resample_every: int = Field(default=500, ge=1, description="dead=resample: steps between two resamplings.")
    frozen: Literal["none", "decoder", "encoder"] = Field(
        default="none", description="A part that stays as it started: a control that learns the other part alone."
    )
    seed: int = Field(default=0, ge=0, description="Of the first weights and the order of the data.")

    @model_validator(mode="before")
    @classmethod
    def _chosen(cls, given: Any) -> Any:
        """A remedy for dead latents that suits the family, where none was given."""
        if not isinstance(given, dict) or given.get("dead") is not None:
            return given
        return given | {"dead": _usual(str(given.get("family", "topk")))}

    @model_validator(mode="after")
    def _checked(self) -> Training:
        for name, families in _OF_FAMILY.items():
            changed = getattr(self, name) != type(self).model_fields[name].default
            if changed and self.family not in families:
                raise ValueError(
                    f"{name} means nothing for family {self.family!r} (it is for {', '.join(families)}); leave it out"
                )
        if self.family in _OF_FAMILY["k"] and self.k > self.latents:
            raise ValueError(f"k is {self.k} and there are {self.latents} latents; give a smaller k")
        if abs(sum(self.groups) - 1) > 1e-6 or min(self.groups, default=0) <= 0:
            raise ValueError(f"groups are {self.groups}; they are positive shares that add up to 1")
        if self.family == "matryoshka" and min(self.sizes()) < 1:
            raise ValueError(f"groups of {self.sizes()} latents: each needs one; give more latents, or other groups")
        if self.target_l0 != type(self).model_fields["target_l0"].default and self.penalty != "target":
            raise ValueError("target_l0 is used by penalty='target' alone; give both")
        if self.dead == "resample" and self.family in _OF_FAMILY["k"]:
            raise ValueError(f"resampling is for families with a penalty; for {self.family!r} use dead='aux'")
        if self.dead is not None and self.dead.startswith("ghost") and self.family not in _RELU:
            raise ValueError(
                f"ghost gradients are for the L1 families; for {self.family!r} use dead={_usual(self.family)!r}"
            )
        if self.dead == "aux" and self.family in _RELU:
            raise ValueError(
                f"the auxiliary loss reaches latents that others crowd out, and those of {self.family!r} are dead "
                "because they are below 0; use dead='resample'"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; each lies in [0, 1)")
        return self

    @property
    def rate(self) -> float:
        """Adam's rate at its highest."""
        return self.lr if self.lr is not None else 2e-4 / math.sqrt(self.latents / 16384)

    def rate_at(self, step: int) -> float:
        """Adam's rate at a step counted from 0: a linear rise, a plateau, a linear fall to 0 after the last step."""
        rise = max(1, round(self.warmup * self.steps)) if self.warmup else 0
        fall = round(self.decay * self.steps)
        up = min(1.0, (step + 1) / rise) if rise else 1.0
        down = min(1.0, (self.steps - step) / fall) if fall else 1.0
        return self.rate * up * down

    def sparsity_at(self, step: int) -> float:
        """The weight of the sparsity penalty at a step counted from 0."""
        rise = round(self.sparsity_warmup * self.steps)
        return self.sparsity * (min(1.0, (step + 1) / rise) if rise else 1.0)

    def sizes(self) -> tuple[int, ...]:
        """Latents in each nested group of a Matryoshka dictionary; the last takes what rounding leaves."""
        ends = [round(self.latents * sum(self.groups[: i + 1])) for i in range(len(self.groups) - 1)] + [self.latents]
        starts = [0, *ends[:-1]]
        return tuple(end - start for start, end in zip(starts, ends, strict=True))
