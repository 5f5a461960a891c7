"""The registered `steer` method and what a user may ask of it. Importing this module imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from assay.base.findings import Findings
from assay.base.method import Context, method


class SteerSpec(BaseModel):
    """Does adding a direction move what the model says next, more than other directions do, and at what cost?"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path = Field(
        description="JSON lines with positive, negative and perhaps group: the pairs that the direction is fitted on.",
        json_schema_extra={"positional": True, "file": True},
    )
    prompts: Path = Field(
        description="JSON lines with text: prompts whose next token shows the behaviour.",
        json_schema_extra={"file": True},
    )
    toward: tuple[str, ...] = Field(
        min_length=1,
        description="Words that the next token becomes with the direction; each counts by its first token.",
    )
    away: tuple[str, ...] = Field(min_length=1, description="Words that it becomes against the direction.")
    unrelated: Path = Field(
        description="JSON lines with text: the guard, on which nothing should change.", json_schema_extra={"file": True}
    )
    contrasts: Path | None = Field(
        default=None,
        description="JSON lines with name, positive and negative: other contrasts, fitted alike, as semantic controls.",
        json_schema_extra={"file": True},
    )
    site: str = Field(
        default="", description="Where the direction is fitted and added; the middle block when not given."
    )
    kind: Literal["difference of means", "caa", "pca_diff", "pca_center"] = Field(
        default="difference of means", description="How the direction is fitted."
    )
    doses: tuple[float, ...] = Field(
        default=(-0.2, -0.1, -0.05, 0.05, 0.1, 0.2),
        min_length=2,
        description="In units of the mean norm of the activations at the site; one or more above 0.",
    )
    kl: float = Field(default=0.1, gt=0, description="The most that the guard's KL may be, in nats a token.")
    ce: float = Field(default=0.05, gt=0, description="The most that the guard's cross-entropy may rise, in nats.")
    controls: int = Field(default=20, ge=2, description="How many vectors of each kind of control.")

    @field_validator("doses")
    @classmethod
    def _one_is_positive(cls, doses: tuple[float, ...]) -> tuple[float, ...]:
        if not any(dose > 0 for dose in doses):
            raise ValueError(f"none of {list(doses)} is above 0, where the effect is reported: give one, such as 0.1")
        return doses

    def title(self) -> str:
        """The question, as a report's heading."""
        return f"Does the direction of {self.data.stem} steer the model?"


@method(name="steer", spec=SteerSpec, version="1", steps="assay.directions.methods.steer_job:planned")
def steer(subject: Any, spec: SteerSpec, ctx: Context) -> Findings:
    """Fit a direction on pairs of texts, add it at several doses, and hold what it does against other directions.

    **What it computes.** The direction (a difference of means by default) at one site; at every dose the change of the
    log odds of the words it should bring about against those it should not, on prompts that it was not fitted on; and,
    on unrelated text, the KL from the unsteered model and the change of its cross-entropy.

    **Controls.** Vectors of the same norm at the same doses: isotropic, drawn from the covariance of the activations,
    from the same fit on shuffled labels, and, with `contrasts`, the same fit on other meanings.

    **When it misleads.** The words decide what is seen: a direction may raise them without the meaning. A large dose
    breaks the model, and broken models say anything: read effects within the budget only. The effect differs from
    prompt to prompt; the share of prompts that it moves the other way is in the finding.

    **Source.** Turner et al. 2023 (arXiv 2308.10248); Rimsky et al. 2024 (arXiv 2312.06681); Tan et al. 2024 (arXiv
    2407.12404) for prompts on which steering backfires.
    """
    from assay.directions.methods.steer_job import run

    return run(subject, spec, ctx)
