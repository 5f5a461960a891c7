"""A small real method for the tests of studies and the command line: are a prompt's token embeddings unusually long?

It writes a line to the file $TALLY_LOG for each step that it computes, so a test can count computations across
processes, and waits in the step named by $TALLY_HOLD (after creating "$TALLY_LOG.held"), so a test can stop it there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from assay.base.errors import SpecError
from assay.base.findings import Control, Finding, Findings
from assay.base.method import Context, Progress, StepSpec, method
from assay.base.rng import numpy_stream
from assay.base.stats import permutation_p


class TallySpec(BaseModel):
    """What to measure."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field(description="The text whose tokens are measured.", json_schema_extra={"positional": True})
    draws: int = Field(default=19, ge=1, le=9999, description="How many random sets of tokens to compare with.")
    measure: Literal["norm", "spread"] = Field(default="norm", description="What is measured of each embedding.")
    fold: bool = Field(default=False, description="Make the prompt lower case first.")
    weights: Path | None = Field(
        default=None, description="A JSON list with one weight a token.", json_schema_extra={"file": True}
    )

    @field_validator("prompt")
    @classmethod
    def _not_empty(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        return prompt


def steps(card: Any, spec: TallySpec, seed: int) -> list[StepSpec]:
    """The two steps, with what each is expected to cost."""
    text = spec.prompt.lower() if spec.fold else spec.prompt
    tokens = card.encode(text)
    weights = None if spec.weights is None else json.loads(spec.weights.read_text())
    inputs = {"tokens": tokens, "measure": spec.measure, "weights": weights}
    return [
        StepSpec(name="measure", inputs=inputs, forwards=1, tokens=len(tokens), bytes=4 * card.d_model, seconds=0.5),
        StepSpec(
            name="draws",
            inputs=inputs | {"draws": spec.draws, "seed": seed},
            forwards=spec.draws,
            backwards=2,
            tokens=spec.draws * len(tokens),
            bytes=8 * card.d_model,
            seconds=1.5,
        ),
    ]


def count(step: str, progress: Progress, total: int) -> None:
    """Log that a step is being computed, and wait in it if this is the one to hold."""
    log = os.environ.get("TALLY_LOG")
    if log:
        with Path(log).open("a") as file:
            file.write(f"{step}\n")
    progress(0, total)
    if os.environ.get("TALLY_HOLD") == step:
        Path(f"{log}.held").touch()
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            progress(0, total, "holding")
            time.sleep(0.01)
        raise RuntimeError("held for two minutes and nobody came")


@method(name="tally", spec=TallySpec, version="1", steps="tally:steps")
def tally(subject: Any, spec: TallySpec, ctx: Context) -> Findings:
    """Compare the embeddings of a prompt's tokens with those of random tokens.

    **What it computes.** The mean over the tokens of the embedding's norm (or spread),
    placed among means over random tokens.

    **Controls.** Random sets of as many tokens.

    **When it misleads.** Frequent tokens have shorter embeddings in most models.

    Rare ones do not.

    **Source.** None; it exists to test what carries methods.

    Args:
        subject: Any subject with an embedding.
        spec: What to measure.
        ctx: The context.
    """
    from assay.studies.target import LoadedCard

    table = subject.module.get_input_embeddings().weight.detach().numpy().astype(np.float64)
    measure = {"norm": lambda rows: np.linalg.norm(rows, axis=-1), "spread": lambda rows: rows.std(axis=-1)}[
        spec.measure
    ]
    first, second = steps(LoadedCard(subject), spec, ctx.seed)
    tokens, weights = first.inputs["tokens"], first.inputs["weights"]
    if weights is not None and len(weights) != len(tokens):
        raise SpecError(f"weights: {len(weights)} weights were given for {len(tokens)} tokens", field="weights")

    def one(progress: Progress) -> Mapping[str, Any]:
        count("measure", progress, 1)
        return {"values": measure(table[tokens]), "tokens": tuple(tokens)}

    def many(progress: Progress) -> Mapping[str, Any]:
        count("draws", progress, spec.draws)
        stream = numpy_stream(ctx.seed, "tally", "draws")
        null = []
        for draw in range(spec.draws):
            null.append(float(measure(table[stream.integers(len(table), size=len(tokens))]).mean()))
            progress(draw + 1, spec.draws)
        if spec.draws < 20:
            ctx.warn(f"{spec.draws} draws cannot give a p below {1 / (spec.draws + 1):.2f}")
        ctx.artifact("null", arrays={"null": np.array(null)})
        return {"null": np.array(null)}

    values = ctx.step(first, one)
    null = ctx.step(second, many)["null"]
    assert np.array_equal(ctx.step(second, many)["null"], null)  # asking twice is free
    estimate = float(np.average(values["values"], weights=weights))
    ctx.artifact("tokens", table={"token": values["tokens"], "value": values["values"]})
    p = permutation_p(estimate, null.tolist(), side="greater")
    control = Control(name="random tokens", description="As many random tokens.", null=tuple(null), p=p, side="greater")
    finding = Finding(
        claim="The prompt's embeddings are longer than those of random tokens",
        estimate=estimate,
        unit=spec.measure,
        n=len(tokens),
        interval_note="one prompt",
        controls=(control,),
        verdict="supported" if p < 0.05 else "not distinguishable from control",
        cost=ctx.cost("measure", "draws"),
        provenance=ctx.provenance({"tokens": values["tokens"]}),
    )
    return Findings(findings=(finding,), summary=(f"The mean {spec.measure} is {estimate:.3f}.",))
