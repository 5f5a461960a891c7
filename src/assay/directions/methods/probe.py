"""The registered `probe` method and what a user may ask of it. Importing this module imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from assay.base.findings import Findings
from assay.base.method import Context, method


class ProbeSpec(BaseModel):
    """Can two classes of texts be told apart at a site, and is it the model that tells them apart?"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path = Field(
        description="JSON lines with text, label (two classes), group (what must not be split: a word, an entity) and, "
        "for memorisation, template.",
        json_schema_extra={"positional": True, "file": True},
    )
    sites: str = Field(
        default="blocks.*.resid_post", description="A site or a pattern; the best is chosen inside train."
    )
    kind: Literal["ridge", "lda", "difference of means"] = Field(default="ridge", description="The probe.")
    position: Literal["last", "first", "mean"] = Field(default="last", description="Which token of a text is read.")
    test: float = Field(default=0.3, gt=0, lt=1, description="The share of the groups that is held out.")
    permutations: int = Field(default=999, ge=19, description="How many permutations of the labels.")
    untrained: int = Field(default=10, ge=1, description="How many draws of each kind of untrained weights.")
    tasks: int = Field(default=20, ge=2, description="How many control tasks: random labels for each group.")

    def title(self) -> str:
        """The question, as a report's heading."""
        return f"Does the model tell the classes of {self.data.stem} apart?"


@method(name="probe", spec=ProbeSpec, version="1", steps="assay.directions.methods.probe_job:planned")
def probe(subject: Any, spec: ProbeSpec, ctx: Context) -> Findings:
    """Fit a probe on labelled texts, and say whether it reads the model or the data set.

    **What it computes.** A linear probe at every site, fitted on some groups and scored (AUROC) on others that share
    none with them; the site is chosen inside the training groups. How much better it does than what needs no model
    (words, length, position) and than the token embedding; how well it learns random labels of words it has seen and of
    words it has not.

    **Controls.** The same on permuted labels; on the same architecture with Gaussian and with spectrum-matched
    weights, with the choice of site made again; control tasks with the base rates of the labels; the best of the
    baselines on the same rows.

    **When it misleads.** What can be read need not be used: a probe shows correlation, and only an intervention (the
    method `steer`) shows more. Labels that go with a word or a template can be read off without the model: look at
    the baselines and at the selectivity on unseen words. Selectivity is measured at the site that was chosen with the
    true labels, which slightly favours them over the random ones. Groups that are not the ones that leak make every
    number too good.

    **Source.** Alain and Bengio 2016 (arXiv 1610.01644); Hewitt and Liang 2019 (arXiv 1909.03368) for control tasks;
    Westfall and Young 1993 for the best of many sites.
    """
    from assay.directions.methods.probe_job import run

    return run(subject, spec, ctx)
