"""The registered `train-dictionary` method and what a user may ask of it. Importing this module imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from assay.base.findings import Findings
from assay.base.method import Context, method
from assay.dictionaries.settings import Training

ArmName = Literal["decoder", "encoder", "random-tokens", "reinitialised"]
"""What a dictionary is trained once more without: a part that learns, language, or a trained model."""


class TrainSpec(Training):
    """A dictionary of a site: what it explains, and what the model keeps when it runs on it."""

    store: Path = Field(
        description="A folder of activations that `assay harvest` wrote, of the same model.",
        json_schema_extra={"positional": True, "file": ["manifest.json", "rank-*/manifest.json"]},
    )
    dictionary: Path = Field(description="Where the dictionary, its curves and its checkpoints go.")
    reads: tuple[str, ...] = Field(
        default=(), description="The site it reads, or several for a crosscoder; where not given, the store's only one."
    )
    writes: tuple[str, ...] = Field(
        default=(), description="The site it writes, for a transcoder; where not given, what it reads."
    )
    cross_layer: bool = Field(default=False, description="Latents of each site write to that site and all later ones.")
    held_out: int = Field(default=2048, ge=64, description="Rows at the end of the store that are not trained on.")
    texts: int = Field(default=16, ge=2, description="Held-out texts on which the model runs on the dictionary.")
    draws: int = Field(default=19, ge=19, description="Random dictionaries and random errors to hold it against.")
    arms: tuple[ArmName, ...] = Field(
        default=(),
        description="Train it once more for each: with the decoder or the encoder left as it started; on the model "
        "reading random tokens; on the model with redrawn weights.",
    )
    checkpoint_every: int = Field(default=500, ge=1, description="Steps between two checkpoints.")
    share_latents: int = Field(
        default=1, ge=1, description="Under torchrun, how many processes divide the latents; others divide each batch."
    )
    log: Literal["trackio", "wandb"] | None = Field(
        default=None, description="Show curves while they grow, in trackio or Weights & Biases."
    )
    training_seed: int = Field(
        default=0, ge=0, description="Of the first weights, the order of the rows, and the arms; --seed draws the rest."
    )
    seed: int = Field(default=0, description="Not used: see training_seed.", json_schema_extra={"cli": False})

    def title(self) -> str:
        """The question, as a report's heading."""
        return f"What does a {self.family} dictionary of {self.latents} latents explain?"

    @model_validator(mode="after")
    def _sites(self) -> TrainSpec:
        if self.cross_layer and len(self.reads) != len(self.writes or self.reads):
            raise ValueError(
                "a cross-layer transcoder reads and writes as many sites; give one --writes for each --reads"
            )
        if self.frozen != "none" and {"decoder", "encoder"} & {*self.arms}:
            raise ValueError("frozen and arms are two ways to ask for the same control; give one of them")
        if len(set(self.arms)) != len(self.arms):
            raise ValueError(f"an arm is named twice: {', '.join(self.arms)}")
        if str(self.dictionary) == ".":  # what an empty text becomes as a path
            raise ValueError("dictionary names no folder of its own; give one for the dictionary")
        if self.seed:
            raise ValueError("a dictionary's seed is training_seed, and the study's own is beside its spec")
        return self

    def leaves(self) -> tuple[Path, ...]:
        """The dictionary."""
        return (self.dictionary / "dictionary",)

    def training(self) -> Training:
        """How the dictionary is trained."""
        given = {name: getattr(self, name) for name in Training.model_fields}
        return Training(**(given | {"seed": self.training_seed}))


@method(name="train-dictionary", spec=TrainSpec, version="3", steps="assay.dictionaries.methods.train_job:planned")
def train_dictionary(subject: Any, spec: TrainSpec, ctx: Context) -> Findings:
    """Train a dictionary on stored activations, and say what it explains beyond chance.

    **What it computes.** A dictionary of one of eight families at one site (a crosscoder at several; a transcoder from
    one to another; a cross-layer transcoder), by sparse closed-form steps. On rows that were held out: the share of
    variance explained (both formulas), L0 with its spread, dead and dense latents, alignment of encoder and decoder. On
    texts that were held out: cross-entropy and KL recovered, against zero and against mean ablation.

    **Controls.** The share of variance that as many random directions explain with as many active, chosen and fitted
    for each row; errors of the same length that point anywhere, put where the dictionary's are; on request (`arms`)
    the same training with a frozen decoder, with a frozen encoder, on the model reading random tokens, and on the model
    with redrawn weights.

    **When it misleads.** A share of variance is not a share of meaning: a few directions carry most of it. What is
    recovered against zero ablation flatters, for zeros are far from anything the model has seen: read it against the
    mean. Dictionaries of untrained models look good on these numbers too.

    **Source.** Bricken et al. 2023; Gao et al. 2024 (arXiv 2406.04093); Rajamanoharan et al. 2024 (arXiv 2407.14435);
    Gurnee 2024 for random errors; each family names its own.
    """
    from assay.dictionaries.methods.train_job import run

    return run(subject, spec, ctx)
