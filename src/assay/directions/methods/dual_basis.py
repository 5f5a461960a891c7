"""The registered `dual-basis` method and what a user may ask of it. Importing this module imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from assay.base.findings import Findings
from assay.base.method import Context, method


class DualBasisSpec(BaseModel):
    """Does writing one concept move the readouts of others, and does the dual basis keep them still?"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path = Field(
        description="JSON lines with text, labels (0 or 1 for each concept) and perhaps group.",
        json_schema_extra={"positional": True, "file": True},
    )
    unrelated: Path = Field(
        description="JSON lines with text: the guard, on which nothing should change.", json_schema_extra={"file": True}
    )
    site: str = Field(
        default="", description="Where probes are fitted and vectors are added; the middle block when not given."
    )
    later: str = Field(
        default="", description="Where it is read again downstream; three quarters of the way when not given."
    )
    kind: Literal["difference of means", "lda", "ridge"] = Field(default="ridge", description="How probes are fitted.")
    test: float = Field(default=0.3, gt=0, lt=1, description="The share of the rows that is held out, in whole groups.")
    amount: float = Field(
        default=1.0,
        gt=0,
        description="How far each vector moves its own readout, in gaps between the means of the two classes.",
    )
    texts: int = Field(default=64, ge=8, description="On how many held-out texts movements are measured, at most.")
    controls: int = Field(default=20, ge=2, description="How many sets of vectors of each kind of control.")
    ridge: float = Field(
        default=0.0, ge=0, description="Accept cross-talk: the ridge of both duals, for probes of length 1."
    )

    def title(self) -> str:
        """The question, as a report's heading."""
        return f"Can the concepts of {self.data.stem} be written apart?"


@method(name="dual-basis", spec=DualBasisSpec, version="1", steps="assay.directions.methods.dual_basis_job:planned")
def dual_basis(subject: Any, spec: DualBasisSpec, ctx: Context) -> Findings:
    """Write each of several concepts by its probe, by the dual and by the on-distribution dual, and see what moves.

    **What it computes.** One probe a concept at one site, fitted on some groups. For each concept three vectors, all
    scaled to move its own readout as far: the probe's weight, the dual, and the dual under the covariance of the
    activations. Each is added at the last token of held-out texts while the model runs, and every probe is read: at
    the site, and at a later one, where probes are fitted of their own. On unrelated text, the KL of the next token.

    **Controls.** Sets of vectors of the same norms, isotropic and drawn from the covariance of the activations, run
    through the same measurement.

    **When it misleads.** At the site the dual is still by algebra; only what happens downstream is about the model.
    What is not listed may move. A readout that moves is no behaviour that changes. Probes whose held-out AUROC is low
    read noise, and so do their movements.

    **Source.** Golub and Van Loan, "Matrix computations", section 5.5 (pseudo-inverse); the on-distribution form is
    the minimum of the Mahalanobis length under the same constraints.
    """
    from assay.directions.methods.dual_basis_job import run

    return run(subject, spec, ctx)
