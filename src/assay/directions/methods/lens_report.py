"""What the measurements of the `lens` study say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay.base.findings import Control, Finding
from assay.base.method import Context
from assay.base.rng import numpy_stream
from assay.base.stats import Interval, bootstrap_interval
from assay.base.views import Distribution, Lines, Series, Table, View
from assay.controls.verdicts import compare, verdict

LENSES = ("logit lens", "tuned lens")
FEW = 10
"""Texts below which an interval over them is called weak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the measurements say.

    Args:
        texts: What was read.
        digest: The hash of everything that was read or trained on.
        block: The block that the findings speak of.
        name: What the texts are called.
        shuffles: How often texts are paired with other texts' streams.
        read: What both lenses say, by lens: KL `[site, text, stream's text]`; rank, probability and agreement
            `[site, text, token]`.
        swapped: The KL with the maps at other blocks; empty without a tuned lens.
        untrained: The mean reciprocal rank on untrained weights, a draw.
        python: What runs the study again.
        ctx: The study's context.
    """

    texts: list[str]
    digest: str
    block: int
    name: str
    shuffles: int
    read: Mapping[str, Any]
    swapped: Mapping[str, Any]
    untrained: Mapping[str, Any]
    python: str
    ctx: Context

    @property
    def lenses(self) -> tuple[str, ...]:
        """The lenses there are."""
        return LENSES if self.swapped else LENSES[:1]

    @property
    def sites(self) -> list[str]:
        """Where was read."""
        return [str(site) for site in self.read["sites"]]

    @property
    def at(self) -> int:
        """The place of the block that the findings speak of; place 0 is before the first block."""
        return self.block + 1

    def kl(self, lens: str) -> np.ndarray:
        """From each text's next tokens to what the lens says of its own stream, `[site, text]`, nats a token."""
        return np.asarray(np.einsum("saa->sa", np.asarray(self.read[f"{lens} kl"])))

    def floor(self, lens: str) -> np.ndarray:
        """The same of the streams of all other texts, `[site, text]`."""
        table = np.asarray(self.read[f"{lens} kl"])
        return np.asarray((table.sum(-1) - self.kl(lens)) / (table.shape[-1] - 1))

    def settled(self, lens: str) -> np.ndarray:
        """The first site from which on the lens puts the last token's answer first, by text: `len(sites)` for none."""
        agrees = np.asarray(self.read[f"{lens} agrees"])[:, :, -1].astype(bool)
        return np.asarray(len(agrees) - np.logical_and.accumulate(agrees[::-1], axis=0).sum(0))

    def findings(self) -> tuple[Finding, ...]:
        """Every claim."""
        nearer = (self.nearer(),) if self.swapped else ()
        return (*nearer, *(self.foretells(lens) for lens in self.lenses), self.learnt())

    def nearer(self) -> Finding:
        """The tuned lens against the logit lens."""
        gain = self.kl("logit lens") - self.kl("tuned lens")
        estimate, plain = float(gain.mean()), float(self.kl("logit lens").mean())
        said = "the maps of the tuned lens given to other blocks, in another order each time"
        control = compare("other blocks' maps", said, estimate, plain - np.asarray(self.swapped["kl"]))
        by_site = [bootstrap_interval(row, seed=self.ctx.seed) for row in gain]
        return self._finding(
            f"on texts of {self.name} that it was not trained on, the tuned lens is nearer to the model than the logit "
            "lens (mean over blocks)",
            estimate,
            "nats a token (KL)",
            control,
            bootstrap_interval(gain.mean(0), seed=self.ctx.seed),
            ("tuned lens", "nearer"),
            logit=plain,
            tuned=plain - estimate,
            gain=dict(zip(self.sites, gain.mean(1).tolist(), strict=True)),
            above=sum(interval.low > 0 for interval in by_site),
            below=sum(interval.high < 0 for interval in by_site),
        )

    def foretells(self, lens: str) -> Finding:
        """What a lens says of a text's stream against what it says of other texts' streams."""
        table = np.asarray(self.read[f"{lens} kl"])[self.at]
        floor, own = self.floor(lens)[self.at], self.kl(lens)[self.at]
        rng, n = numpy_stream(self.ctx.seed, "lens", "texts"), len(own)
        null = [(floor - table[np.arange(n), rng.permutation(n)]).mean() for _ in range(self.shuffles)]
        estimate = float((floor - own).mean())
        said = "texts paired with the streams of texts at random, read at the same places from the end"
        return self._finding(
            f"after block {self.block} the {lens} says what the model will say of this text, more than what it says of "
            "others",
            estimate,
            "nats a token (KL)",
            compare("other texts' streams", said, estimate, np.asarray(null)),
            bootstrap_interval(floor - own, seed=self.ctx.seed),
            (lens, "foretells"),
            own=float(own.mean()),
            others=float(floor.mean()),
        )

    def learnt(self) -> Finding:
        """The rank of the model's own next token, against models with untrained weights."""
        ranks = 1 / np.asarray(self.read["logit lens rank"])[self.at]
        estimate, null = float(ranks.mean()), np.asarray(self.untrained["reciprocal rank"])
        said = "the same architecture with Gaussian weights, whose own next tokens are foretold"
        return self._finding(
            f"after block {self.block} the logit lens ranks the model's own next token higher than it does in models "
            "with untrained weights",
            estimate,
            "mean of 1 / rank",
            compare("untrained weights", said, estimate, null),
            bootstrap_interval(ranks.mean(1), seed=self.ctx.seed),
            ("logit lens", "learnt"),
        )

    def _finding(
        self,
        claim: str,
        estimate: float,
        unit: str,
        control: Control,
        interval: Interval,
        tags: tuple[str, ...],
        **detail: Any,
    ) -> Finding:
        return Finding(
            claim=claim,
            estimate=estimate,
            unit=unit,
            n=len(self.texts),
            controls=(control,),
            interval=interval,
            verdict=verdict(estimate, (control,), interval),
            cost=self.ctx.cost(),
            provenance=self.ctx.provenance(self.digest),
            tags=tags,
            detail=detail,
        )

    def _place(self, i: float) -> str:
        """A place among the sites, in words."""
        if i >= len(self.sites):
            return "only with the last block"
        return "before the first block" if i < 1 else f"after block {i - 1:g}"

    def summary(self) -> tuple[str, ...]:
        """Headline lines."""
        found = []
        for lens in self.lenses:
            kl = self.kl(lens).mean(1)
            found.append(
                f"{lens}: KL {kl[0]:.2f} before the first block, {kl[self.at]:.2f} after block {self.block}, "
                f"{kl[-1]:.2f} before the last; the answer settles {self._place(float(np.median(self.settled(lens))))} "
                "(median)."
            )
        if self.swapped:
            nearer = self.nearer()
            found.append(f"The tuned lens is nearer by {nearer.estimate:.2f} nats over the blocks ({nearer.verdict}).")
        return tuple(found)

    def warnings(self) -> tuple[str, ...]:
        """What to know before believing any of it."""
        found = []
        if len(self.texts) < FEW:
            found.append(f"{len(self.texts)} texts make rough intervals: give more.")
        if self.swapped and (self.kl("tuned lens").mean(1) > self.kl("logit lens").mean(1)).any():
            worse = np.flatnonzero(self.kl("tuned lens").mean(1) > self.kl("logit lens").mean(1))
            found.append(
                f"At {len(worse)} of {len(self.sites)} sites ({self.sites[worse[0]]} first) the tuned lens is farther "
                "from the model than the logit lens: train it on more text."
            )
        return tuple(found)

    def table(self) -> dict[str, list[Any]]:
        """Every reading of every text, as columns."""
        n, sites = len(self.texts), self.sites
        columns: dict[str, list[Any]] = {
            "site": [site for site in sites for _ in range(n)],
            "text": list(range(n)) * len(sites),
        }
        for lens in self.lenses:
            columns[f"{lens} KL"] = self.kl(lens).ravel().tolist()
            for what in ("rank", "probability"):
                columns[f"{lens} {what}"] = np.asarray(self.read[f"{lens} {what}"])[:, :, -1].ravel().tolist()
        return columns

    def _line(self, name: str, values: np.ndarray) -> Series:
        found = [bootstrap_interval(row, seed=self.ctx.seed) for row in values]
        low, high = [interval.low for interval in found], [interval.high for interval in found]
        return Series(name=name, values=values.mean(-1).tolist(), low=low, high=high)

    def views(self) -> tuple[View, ...]:
        """The charts."""
        places = ["input", *(f"block {block}" for block in range(len(self.sites) - 1))]

        def lines(id: str, title: str, series: list[Series], y: str) -> Lines:
            return Lines(
                id=id, section="By depth", title=title, caption="Bands are intervals over texts.", x=places,
                series=series, x_title="after", y_title=y, python=self.python,
            )  # fmt: skip

        apart = [self._line(lens, self.kl(lens)) for lens in self.lenses]
        apart += [Series(name=f"{lens}, other texts", values=self.floor(lens).mean(1).tolist()) for lens in self.lenses]
        ranks = [self._line(lens, np.asarray(self.read[f"{lens} probability"]).mean(-1)) for lens in self.lenses]
        maps = self.kl("logit lens").mean() - np.asarray(self.swapped.get("kl", 0.0))
        found: list[View] = [
            lines("kl", "How far the lens is from what the model says", apart, "nats a token (KL)"),
            lines("probability", "Probability of the token that the model puts first", ranks, "probability"),
        ]
        if self.swapped:
            found.append(
                Distribution(
                    id="maps",
                    section="The tuned lens",
                    title="Nearer than the logit lens, and with other blocks' maps",
                    null={"other blocks' maps": maps.tolist()},
                    estimate=self.nearer().estimate,
                    unit="nats a token (KL)",
                    python=self.python,
                )
            )  # fmt: skip
        settled = {lens: self.settled(lens) for lens in self.lenses}
        words = [str(word) for word in self.read["words"]]
        found.append(
            Table(
                id="settles",
                section="By text",
                title="Where the answer settles",
                caption="From there on the lens puts the model's own next token first, at the last token of the text.",
                columns=["text", "says next", *self.lenses],
                rows=[
                    [text, word, *(self._place(float(settled[lens][i])) for lens in self.lenses)]
                    for i, (text, word) in enumerate(zip(self.texts, words, strict=True))
                ],
                python=self.python,
            )
        )
        return tuple(found)
