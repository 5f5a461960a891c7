"""The registered `behaviour` method and what a user may ask of it. Importing this module imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from assay.base.findings import Findings
from assay.base.method import Context, method


class BehaviourSpec(BaseModel):
    """Does a behaviour go through one direction: is it needed, does it suffice, and is it only that?"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path = Field(
        description="JSON lines with text; trigger where it has one (and so shows the behaviour); answer, what it "
        "says otherwise; and group.",
        json_schema_extra={"positional": True, "file": True},
    )
    openers: tuple[str, ...] = Field(
        min_length=1, description="Words that open the behaviour; each counts by its first token."
    )
    positions: tuple[int, ...] = Field(
        default=(-1, -2, -3), min_length=1, description="Which tokens are tried, counted from the prompt's end."
    )
    last: float = Field(default=0.2, ge=0, lt=1, description="The share of blocks at the end that are left out.")
    kl: float = Field(
        default=0.1,
        gt=0,
        description="The most that ablating may change the next token without the behaviour, in nats.",
    )
    test: float = Field(default=0.4, gt=0, lt=1, description="The share of the prompts that is reported, whole groups.")
    choice: float = Field(default=0.2, gt=0, lt=1, description="The share that the direction is chosen on.")
    controls: int = Field(default=40, ge=2, description="How many directions of each kind of control.")
    untrained: int = Field(default=19, ge=1, description="How many draws of untrained weights.")

    def title(self) -> str:
        """The question, as a report's heading."""
        return f"Does {self.data.stem} go through one direction?"


@method(name="behaviour", spec=BehaviourSpec, version="1", steps="assay.directions.methods.behaviour_job:planned")
def behaviour(subject: Any, spec: BehaviourSpec, ctx: Context) -> Findings:
    """Choose the direction that a behaviour goes through, and test on other prompts what it is needed and enough for.

    **What it computes.** Differences of means at every block's input and several positions, on some groups; on others
    the one is chosen whose ablation leaves least of the behaviour, after filters (late blocks, damage where the
    behaviour is absent, no effect when added). On the rest: how much of the behaviour its ablation everywhere takes
    away, whether editing the weights does the same, how much adding it brings, what ablating it does to prompts
    without the trigger, and whether it reads which prompts have the trigger.

    **Controls.** Directions of the same norm, isotropic, drawn from the covariance of the activations, and from
    shuffled labels; the whole pipeline, its choice not held back by filters, on untrained weights.

    **When it misleads.** One direction can carry a behaviour that others carry too: necessity is a matter of the drop,
    not of its being complete. Groups that are trigger words tell whether it holds for other triggers; groups of
    something else do not.

    **Source.** Arditi et al. 2024 (arXiv 2406.11717), sections 2 to 4 and appendix C.
    """
    from assay.directions.methods.behaviour_job import run

    return run(subject, spec, ctx)
