"""The specification of the `explain` method: what a user may ask."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class ExplainSpec(BaseModel):
    """Why does the model continue a prompt with one token rather than another?"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field(
        min_length=1,
        description="The prompt, up to the token in question.",
        json_schema_extra={"positional": True},
    )
    answer: str | None = Field(
        default=None, description="The token the model says, with its leading space; the likeliest when not given."
    )
    foil: str | None = Field(
        default=None, description="The token it is compared with; the likeliest other token when not given."
    )
    corrupt: str | None = Field(
        default=None,
        description="A prompt of the same length for which the answer would be wrong. Without it, the embeddings of "
        "the prompt's content words are noised (causal tracing).",
    )
    first_token: bool = Field(default=False, description="Compare the first tokens of answers that are several tokens.")
    vary: Path | None = Field(
        default=None,
        description="JSON lines with clean, corrupt, answer and foil: the findings are tested on these prompts too.",
        json_schema_extra={"file": True},
    )
    top: int = Field(default=20, ge=1, description="How many components the sets are made of that are tested.")
    random_sets: int = Field(default=100, ge=1, description="How many random sets the top components are held against.")
    untrained: int = Field(
        default=10, ge=1, description="How many draws of each kind of untrained weights everything is held against."
    )
    sigmas: float = Field(
        default=3.0, gt=0, allow_inf_nan=False, description="Noise on embeddings, in their standard deviations."
    )
    draws: int = Field(default=3, ge=1, description="How many draws of that noise effects are averaged over.")

    def title(self) -> str:
        """The question, as a report's heading."""
        answer, foil = (text.strip() if text else None for text in (self.answer, self.foil))
        if answer is None:
            return (
                "Why this token rather than the runner-up?" if foil is None else f"Why this token rather than {foil}?"
            )
        return f"Why {answer} rather than {foil or 'the runner-up'}?"
