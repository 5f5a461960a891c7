"""The registered `function-vector` method and what a user may ask of it. Importing this module imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from assay.base.findings import Findings
from assay.base.method import Context, method


class FunctionVectorSpec(BaseModel):
    """Can one vector stand in for examples of a task?"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path = Field(
        description="JSON lines with input and output: the items of the task, no input twice.",
        json_schema_extra={"positional": True, "file": True},
    )
    heads: int = Field(default=10, ge=1, description="How many heads the vector is made of.")
    shots: int = Field(default=8, ge=1, description="How many examples a prompt has where it has any.")
    prompts: int = Field(default=12, ge=2, description="How many prompts the heads' means and effects are taken over.")
    every: int = Field(default=3, ge=1, description="Which blocks are tried: every one, every second, ...")
    scales: tuple[float, ...] = Field(default=(1.0, 2.0), min_length=1, description="Which multiples are tried.")
    random: int = Field(default=39, ge=2, description="How many random sets of heads, and vectors, to compare with.")

    def title(self) -> str:
        """The question, as a report's heading."""
        return f"Can one vector stand in for examples of {self.data.stem}?"


@method(
    name="function-vector",
    spec=FunctionVectorSpec,
    version="1",
    steps="assay.directions.methods.function_vector_job:planned",
)
def function_vector(subject: Any, spec: FunctionVectorSpec, ctx: Context) -> Findings:
    """Make a vector of the heads that carry a task, and see whether it does the task where there are no examples.

    **What it computes.** Half of the items give the examples: each head's mean output after them, and what that mean
    does to prompts whose examples are shuffled. The heads with the largest effects, summed, are the vector. Block and
    scale are chosen on a fifth of the items; the rest, which chose nothing, are what is reported: the probability and
    the rank of the answer, without examples, with and without the vector, and with examples.

    **Controls.** As many random heads, summed the same; random vectors of the same norm; both at the same block and
    scale.

    **When it misleads.** A vector that raises all words of a kind raises the answer too: look at the accuracy. Few
    items make wide intervals. What the first token of an answer shows is all that is scored.

    **Source.** Todd et al. 2024 (arXiv 2310.15213), sections 2.3 and 3.
    """
    from assay.directions.methods.function_vector_job import run

    return run(subject, spec, ctx)
