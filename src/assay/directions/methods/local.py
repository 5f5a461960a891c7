"""The registered `local` method and what a user may ask of it. Importing this module imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from assay.base.findings import Findings
from assay.base.method import Context, method


class LocalSpec(BaseModel):
    """How much of a token's activation is already there when the model reads the last few tokens alone?"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path = Field(
        description="JSON lines with text: three or more, none shorter than the largest of ks in tokens.",
        json_schema_extra={"positional": True, "file": True},
    )
    sites: str = Field(default="blocks.*.resid_post", description="Where is looked: a site, or a pattern of sites.")
    ks: tuple[int, ...] = Field(
        default=(1, 2, 5, 10), min_length=1, description="How many tokens are kept, the last included."
    )
    k: int = Field(default=5, ge=1, description="The one of ks that the findings speak of, fixed beforehand.")
    texts: int = Field(default=256, ge=3, description="How many of the texts are read, at most.")
    draws: int = Field(default=999, ge=2, description="How often texts are paired with unrelated ones.")

    def title(self) -> str:
        """The question, as a report's heading."""
        return f"How much of {self.data.stem} is local?"


@method(name="local", spec=LocalSpec, steps="assay.directions.methods.local_job:planned")
def local(subject: Any, spec: LocalSpec, ctx: Context) -> Findings:
    """Read each text's last token with its whole context and with the last few tokens alone, at every block.

    **What it computes.** The cosine between the two activations of the same last token, both less the mean over texts,
    at every site and for every number of tokens kept. The raw cosine is not shown: late blocks share a large common
    part, which makes it high for unrelated tokens too.

    **Controls.** The same between each text and the shortened form of another: the floor, and its spread over random
    pairs. The null of a site is the largest over all sites of each draw, so that looking at all of them is paid for.
    For the fall with depth, sites are exchanged within each text.

    **When it misleads.** A high value says that the rest of the context changes little there; it does not say which
    computation is local. Texts of one form (that all end in a full stop, say) leave nothing local to see, for the last
    tokens are the same everywhere. The shortened text begins elsewhere: what a model does at its first tokens is then
    nearer. Whether early layers work locally in general is disputed; the interval is over these texts.

    **Source.** The statistic is this project's, centred and with its floor; the uncentred comparison is common.
    """
    from assay.directions.methods.local_job import run

    return run(subject, spec, ctx)
