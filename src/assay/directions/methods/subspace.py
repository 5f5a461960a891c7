"""The registered `subspace` method and what a user may ask of it. Importing this module imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from assay.base.findings import Findings
from assay.base.method import Context, method


class SubspaceSpec(BaseModel):
    """Is there a subspace whose exchange makes the model answer as a causal model says?"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path = Field(
        description="JSON lines with base, source, answer (after the exchange), original (of base) and group; rows "
        "whose answer is the original are what must not change.",
        json_schema_extra={"positional": True, "file": True},
    )
    site: str = Field(default="", description="Where; the output of the middle block when not given.")
    position: int = Field(default=-1, description="Which token of base and source: -1 is the last, -2 the one before.")
    kind: Literal["das", "boundless das"] = Field(default="das", description="How the subspace is found.")
    k: int = Field(default=16, ge=1, description="Its dimension (das).")
    epochs: int = Field(default=10, ge=1, description="Passes over the rows that it is fitted on.")
    lr: float = Field(default=1e-2, gt=0, description="Adam's learning rate.")
    held_out: float = Field(default=0.5, gt=0, lt=1, description="The share of the groups that is held out.")
    random: int = Field(default=39, ge=2, description="How many random subspaces of the same dimension.")
    permutations: int = Field(default=199, ge=19, description="How many permutations of the held-out answers.")
    refits: int = Field(default=0, ge=0, description="How many subspaces to fit to permuted answers; 19 test.")

    def title(self) -> str:
        """The question, as a report's heading."""
        return f"Is there a subspace that carries {self.data.stem}?"


@method(name="subspace", spec=SubspaceSpec, version="1", steps="assay.directions.methods.subspace_job:planned")
def subspace(subject: Any, spec: SubspaceSpec, ctx: Context) -> Findings:
    """Fit a subspace by distributed alignment search on some groups, and exchange it on others.

    **What it computes.** Rows whose base the model answers rightly are kept. On some groups, the subspace (DAS, or
    boundless DAS, which finds its dimension too) whose exchange gives the answers. On the others: the share of rows
    answered so (interchange accuracy), the share of other attributes that stays (RAVEL's isolate), and the illusion
    test of the direction of it that varies most: its patch, its part that is read next, its part that is not, and the
    exchange of the whole site.

    **Controls.** Random subspaces of the same dimension; held-out answers permuted among the rows; on request,
    subspaces fitted to permuted answers. The principal components of the same dimension, and the whole site, are shown.

    **When it misleads.** A subspace can write an answer instead of carrying it: only new groups with answers of their
    own tell. A large k exchanges everything; look at isolate. Few groups make wide intervals. In the residual stream
    everything is read by something, so the null space is empty there, and only the whole component speaks.

    **Source.** Geiger et al. 2023 (arXiv 2303.02536); Wu et al. 2023 (arXiv 2305.08809); Huang et al. 2024 (arXiv
    2402.17700); Makelov et al. 2023 (arXiv 2311.17030).
    """
    from assay.directions.methods.subspace_job import run

    return run(subject, spec, ctx)
