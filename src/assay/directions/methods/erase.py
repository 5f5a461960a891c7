"""The registered `erase` method and what a user may ask of it. Importing this module imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from assay.base.findings import Findings
from assay.base.method import Context, method


class EraseSpec(BaseModel):
    """Can a label be taken out of a site, so that probes no longer find it on new rows, and does the model miss it?"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path = Field(
        description="JSON lines with text, label (two classes) and group: what must not be split.",
        json_schema_extra={"positional": True, "file": True},
    )
    site: str = Field(default="", description="Where; the output of the middle block when not given.")
    kind: Literal["leace", "mean projection"] = Field(default="leace", description="How it is erased.")
    shrinkage: bool = Field(
        default=True, description="Shrink the covariance (leace); needed below 10 rows a dimension."
    )
    position: Literal["last", "first", "mean"] = Field(default="last", description="Which token of a text is read.")
    held_out: float = Field(default=0.3, gt=0, lt=1, description="The share of the groups that is held out.")
    random: int = Field(default=39, ge=2, description="How many random erasures of the same rank, of each kind.")
    texts: int = Field(default=32, ge=2, description="How many of the texts the cost to the model is measured on.")

    def title(self) -> str:
        """The question, as a report's heading."""
        return f"Can {self.data.stem} be erased, and does the model miss it?"


@method(name="erase", spec=EraseSpec, version="2", steps="assay.directions.methods.erase_job:planned")
def erase(subject: Any, spec: EraseSpec, ctx: Context) -> Findings:
    """Erase a label from a site, and say what is left of it on rows that were not fitted on, and what it cost.

    **What it computes.** The eraser (LEACE by default) on some groups; on the others, the AUROC of a probe fitted after
    it on half of them and read on the other half; and, on the texts themselves, the KL between the model's next tokens
    with and without the erasure at every token.

    **Controls.** Random erasures of the same rank at the same site: isotropic, and drawn from the covariance of the
    activations. A probe must find the label after them; the model's loss under them is what any erasure costs.

    **When it misleads.** What is gone for linear probes may be there for others. At finite n the erased direction is an
    estimate: somebody with rows of their own finds more than chance. Few groups make an interval that holds chance and
    much else; with fewer than two of a class to read there is none, and nothing is tested. Later blocks can rebuild
    what one site lost, and what the model loses at all tokens need not be what it uses at one.

    **Source.** Belrose et al. 2023 (arXiv 2306.03819); Elazar et al. 2021 (arXiv 2006.00995) for amnesic probing.
    """
    from assay.directions.methods.erase_job import run

    return run(subject, spec, ctx)
