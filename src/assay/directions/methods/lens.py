"""The registered `lens` method and what a user may ask of it. Importing this module imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from assay.base.findings import Findings
from assay.base.method import Context, method


class LensSpec(BaseModel):
    """What would the model say if it stopped after each block, and does a trained lens read it better?"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path = Field(
        description="JSON lines with text: what the lenses are read on, and never trained on.",
        json_schema_extra={"positional": True, "file": True},
    )
    train: Path | None = Field(
        default=None,
        description="JSON lines with text: a tuned lens is trained on them.",
        json_schema_extra={"file": True},
    )
    lens: Path | None = Field(
        default=None,
        description="A tuned lens trained before: artifacts/tuned-lens.safetensors of such a study.",
        json_schema_extra={"file": True},
    )
    block: int | None = Field(
        default=None, ge=0, description="The block the findings speak of, fixed beforehand; the middle one by default."
    )
    tokens: int = Field(default=8, ge=1, description="How many tokens of each text are read, from its end.")
    texts: int = Field(default=64, ge=2, description="How many of the texts are read, at most.")
    steps: int = Field(default=250, ge=1, description="Training steps of the tuned lens.")
    batch: int = Field(default=8, ge=1, description="Training texts a step.")
    optimiser: Literal["adam", "sgd"] = Field(default="adam", description="Its optimiser; the published one is sgd.")
    lr: float | None = Field(default=None, gt=0, description="Its learning rate; 1e-3 for adam and 0.1 for sgd.")
    controls: int = Field(default=19, ge=2, description="How often the tuned lens's maps are given to other blocks.")
    shuffles: int = Field(default=999, ge=2, description="How often texts are paired with other texts' streams.")
    untrained: int = Field(default=19, ge=2, description="How many models with untrained weights are read alike.")

    def title(self) -> str:
        """The question, as a report's heading."""
        return f"What would the model say of {self.data.stem} after each block?"


@method(name="lens", spec=LensSpec, steps="assay.directions.methods.lens_job:planned")
def lens(subject: Any, spec: LensSpec, ctx: Context) -> Findings:
    """Read the stream after every block through the final norm and unembedding, as it is and through a trained map.

    **What it computes.** At the last tokens of each text, before the first block and after each but the last: the KL
    from the model's own next tokens to what the lens says, the rank and the probability of the token that the model
    itself puts first, and the block from which on the lens agrees to the end. With `train`, a tuned lens is trained on
    those texts (an affine map a block) and read on the others; with `lens`, one that was trained before, which must
    belong to this model's unembedding.

    **Controls.** Translators given to other blocks; the streams of other texts, read against this text's next tokens;
    the logit lens on the same model with untrained weights, which ranks its own next tokens.

    **When it misleads.** A lens shows that a linear (or affine) readout of the stream foretells the output on these
    texts, and no more. A lens that reads nothing is no evidence that nothing is there: early blocks need not write in
    the final basis. A tuned lens can learn what later blocks compute, so that it shows what is decodable and not what
    the model has computed or uses. A stream carries its input along, so untrained models agree with themselves early
    too; only what is above them is learnt. The block at which the answer settles is a property of the lens as much as
    of the model. Nothing here is causal: change the stream to learn what it does.

    **Source.** nostalgebraist 2020 (logit lens); Belrose et al. 2023 (arXiv 2303.08112) for the tuned lens.
    """
    from assay.directions.methods.lens_job import run

    return run(subject, spec, ctx)
