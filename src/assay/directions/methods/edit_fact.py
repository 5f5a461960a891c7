"""The registered `edit-fact` method and what a user may ask of it. Importing this module imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from assay.base.findings import Findings
from assay.base.method import Context, method


class EditFactSpec(BaseModel):
    """Can one block's MLP be made to say another object of a fact, and nothing else?"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path = Field(
        description="JSON lines, one fact each: prompt (with {}), subject, target, original, and lists of paraphrases "
        "and neighbours.",
        json_schema_extra={"positional": True, "file": True},
    )
    text: Path = Field(
        description="JSON lines with text: ordinary text, for the covariance of the MLP's inputs.",
        json_schema_extra={"file": True},
    )
    unrelated: Path = Field(
        description="JSON lines with text: what the model must go on to say as before.",
        json_schema_extra={"file": True},
    )
    lines: int = Field(default=4, ge=1, description="How many of the unrelated texts are used.")
    block: int | None = Field(default=None, ge=0, description="Whose MLP; a third of the way up when not given.")
    steps: int = Field(default=20, ge=1, description="Steps of the search for the new value.")
    lr: float = Field(default=0.5, gt=0, description="Its learning rate.")
    kl: float = Field(default=0.0625, ge=0, description="What it costs to change what the subject is.")
    decay: float = Field(default=0.5, ge=0, description="What the length of the change costs.")
    reach: float = Field(default=4.0, gt=0, description="The longest change, as a multiple of the old value's length.")
    ridge: float = Field(default=0.01, ge=0, description="Added to the covariance, as a share of its mean diagonal.")
    random: int = Field(default=19, ge=2, description="How many random keys, and random values, to compare with.")

    def title(self) -> str:
        """The question, as a report's heading."""
        return f"Can the facts of {self.data.stem} be rewritten in one MLP?"


@method(name="edit-fact", spec=EditFactSpec, version="1", steps="assay.directions.methods.edit_fact_job:planned")
def edit_fact(subject: Any, spec: EditFactSpec, ctx: Context) -> Findings:
    """Rewrite facts by a rank-one change of one MLP, one at a time, and say what else each change moved.

    **What it computes.** For each fact, on a copy of the model: ROME's change of the MLP's output matrix, and the rise
    of the log odds of the new object over the true one on the fact's prompt (efficacy), on its paraphrases
    (generalisation) and on its neighbours, whose object must stay (specificity); and the KL of the next tokens of
    unrelated text. Intervals are over facts.

    **Controls.** The same change with another key, drawn from the second moment of the MLP's inputs at the same norm;
    with another value, in a random direction at the same norm; and the same matrix added to each other block.

    **When it misleads.** The new object can become likelier everywhere: look at the neighbours. Where an edit succeeds
    is not where the fact is stored. Few facts make wide intervals; facts that share a subject or an object are not
    independent. One edit at a time says nothing about many at once.

    **Source.** Meng et al. 2022 (arXiv 2202.05262), section 3.1; Hase et al. 2023 (arXiv 2301.04213) for what success
    does not show.
    """
    from assay.directions.methods.edit_fact_job import run

    return run(subject, spec, ctx)
