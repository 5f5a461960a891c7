"""What a `train-dictionary` study says: its findings, its headline lines and its charts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from assay.base.findings import Finding
from assay.base.method import Context
from assay.base.stats import Interval
from assay.base.views import Distribution, Lines, Series, Table, View
from assay.controls.verdicts import compare, verdict
from assay.dictionaries.methods.train import TrainSpec

_ARMS = {
    "decoder": "decoder frozen",
    "encoder": "encoder frozen",
    "random-tokens": "random tokens",
    "reinitialised": "redrawn weights",
}
_OFF_TARGET = 0.2
"""How far, as a share of the target, L0 may end from it without a warning."""
_FEW_TEXTS = 8
"""Texts below which the bootstrap over them is called rough."""
_SHARES = ("ce_recovered_zero", "ce_recovered_mean", "kl_recovered_zero", "kl_recovered_mean")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the measurements say."""

    spec: TrainSpec
    site: str
    curves: Mapping[str, Any]
    rows: Mapping[str, Any]
    model: Mapping[str, Any]
    arms: Mapping[str, Any]
    heads: Mapping[str, Float[np.ndarray, "latent head"]]
    python: str
    ctx: Context

    def findings(self) -> tuple[Finding, Finding]:
        """Every claim."""
        return self.explains(), self.harmless()

    def explains(self) -> Finding:
        """More variance than random directions."""
        fve, interval = float(self.rows["fve"]), Interval.from_dict(self.rows["fve_interval"])
        control = compare(
            "random dictionaries",
            f"as many random directions, as many active ({max(1, round(float(self.rows['l0'])))}), fitted to each row",
            fve,
            np.asarray(self.rows["random"]),
        )
        return Finding(
            claim=f"{self.spec.latents} latents of {self.site} explain more of held-out rows than as many random "
            "directions",
            estimate=fve,
            unit="share of variance (fve)",
            n=int(self.rows["rows"]),
            controls=(control,),
            interval=interval,
            verdict=verdict(fve, (control,), interval),
            cost=self.ctx.cost("train", "reconstruction"),
            provenance=self.ctx.provenance(),
            tags=("dictionary", "reconstruction"),
            detail={name: self.rows[name] for name in ("l0", "dead", "dense", "fve_rowwise", "cosine", "length_ratio")},
        )

    def harmless(self) -> Finding:
        """What it leaves out harms the model less than a random error of the same length."""
        loss = float(self.model["ce_dictionary"]) - float(self.model["ce"])
        null = np.asarray(self.model["random"]) - float(self.model["ce"])
        control = compare(
            "random errors", "errors of the same length at each token that point anywhere", loss, null, "less"
        )
        return Finding(
            claim=f"what the dictionary leaves out of {self.site} harms the model less than random errors of its "
            "length",
            estimate=loss,
            unit="nats a token (CE)",
            n=int(self.model["tokens"]),
            controls=(control,),
            interval_note="a mean over the tokens of the texts; shares recovered have their intervals in the table",
            verdict=verdict(loss, (control,), claim_side="less"),
            cost=self.ctx.cost("model"),
            provenance=self.ctx.provenance(),
            tags=("dictionary", "model"),
            detail={name: float(self.model[name]) for name in _SHARES},
        )

    def summary(self) -> tuple[str, ...]:
        """Headline lines."""
        explains, harmless = self.findings()
        share, ci = float(self.model["ce_recovered_mean"]), self.model["intervals"]["ce_recovered_mean"]
        active, chance = float(self.rows["l0"]), float(np.mean(self.rows["random"]))
        random = float(np.mean(self.model["random"])) - float(self.model["ce"])
        beyond: tuple[str, ...] = ()
        if self.arms:
            each = ", ".join(f"{_ARMS[name]} {float(arm['fve']):.1%}" for name, arm in self.arms.items())
            beyond = (f"The same training explains: {each}; each of held-out rows of its own.",)
        return (
            f"{self.spec.family}, {self.spec.latents} latents at {self.site}: {explains.estimate:.1%} of the variance "
            f"with {active:.1f} active; random directions {chance:.1%} ({explains.verdict}).",
            f"The model on it recovers {share:.1%} (95% {ci['low']:.1%} to {ci['high']:.1%}) of the loss against mean "
            f"ablation, {float(self.model['ce_recovered_zero']):.1%} against zero; its errors cost "
            f"{harmless.estimate:.3f} nats, random ones {random:.3f} ({harmless.verdict}).",
            *beyond,
        )

    def warnings(self) -> tuple[str, ...]:
        """What to know before believing any of it."""
        found = []
        if float(self.rows["dead"]) > 0.2:
            found.append(f"{float(self.rows['dead']):.0%} of the latents are never active on held-out rows.")
        if float(self.rows["dense"]) > 0.02:
            found.append(f"{float(self.rows['dense']):.1%} of the latents are active on more than a tenth of the rows.")
        l0, target = float(self.rows["l0"]), self.spec.target_l0
        if self.spec.family == "jumprelu" and self.spec.penalty == "target" and abs(l0 / target - 1) > _OFF_TARGET:
            found.append(
                f"{l0:.1f} latents are active and the target is {target:g}: it is a penalty and no promise; give more "
                f"steps, or a sparsity above {self.spec.sparsity:g}."
            )
        texts = int(self.model["texts"])
        if texts < self.spec.texts:
            found.append(f"{texts} whole texts are held out, and {self.spec.texts} were asked for: hold out more rows.")
        if texts < _FEW_TEXTS:
            found.append(f"The interval of what the model recovers rests on {texts} texts: it is rough.")
        best = max(self.arms, key=lambda name: float(self.arms[name]["fve"]), default=None)
        if best is not None and float(self.arms[best]["fve"]) >= float(self.rows["fve"]):
            found.append(
                f"The same training explains as much with {_ARMS[best]} ({float(self.arms[best]['fve']):.1%}): this "
                "share of variance says nothing of what was learned."
            )
        return tuple(found)

    def views(self) -> tuple[View, ...]:
        """The charts."""
        steps = [float(value) for value in self.curves["step"]]
        keep = np.unique(np.linspace(0, len(steps) - 1, min(400, len(steps))).round().astype(int))

        def curve(name: str, title: str, unit: str) -> Lines:
            values = np.asarray(self.curves[name], dtype=float)[keep]
            return Lines(
                id=f"curve-{name}",
                section="Training",
                title=title,
                x=[steps[i] for i in keep],
                series=(Series(name=name, values=values.tolist()),),
                x_title="step",
                y_title=unit,
                python=self.python,
            )

        return (
            Table(
                id="measured",
                section="Held out",
                title="What it explains, and what the model keeps",
                columns=("measure", "value", "low", "high"),
                rows=self.table(),
                python=self.python,
            ),
            Distribution(
                id="random",
                section="Held out",
                title="Share of variance, and that of random dictionaries",
                null={"random dictionaries": np.asarray(self.rows["random"]).tolist()},
                estimate=float(self.rows["fve"]),
                unit="fve",
                python=self.python,
            ),
            curve("fvu", "Unexplained variance while training", "share"),
            curve("l0", "Active latents while training", "latents a row"),
            curve("dead", "Dead latents while training", "share"),
            self.density(),
            *self.of_heads(),
        )

    def of_heads(self) -> tuple[Table, ...]:
        """For each site of concatenated heads, what of the latents lies in which head."""
        made = []
        for number, name in enumerate(each for each in self.heads if each.startswith("decoder ")):
            site = name.removeprefix("decoder ")
            writes, reads = self.heads[name], self.heads[f"encoder {site}"]
            alive = writes.sum(1) > 0
            mostly = np.bincount(writes[alive].argmax(1), minlength=writes.shape[1])
            rows = [
                (head, float(writes[:, head].mean()), float(reads[:, head].mean()), int(mostly[head]))
                for head in range(writes.shape[1])
            ]
            made.append(
                Table(
                    id=f"heads-{number}",
                    section="Heads",
                    title=f"What of the latents lies in each head of {site}",
                    caption="Shares of the squared length of decoder and encoder rows, averaged over latents, and the "
                    "latents whose decoder row lies in that head more than in any other.",
                    columns=("head", "decoder share", "encoder share", "latents"),
                    rows=rows,
                    python=self.python,
                )
            )
        return tuple(made)

    def table(self) -> tuple[tuple[str, float, float | None, float | None], ...]:
        """Every measure, with its interval where it has one."""
        rows: list[tuple[str, float, float | None, float | None]] = []
        for name in ("fve", "l0"):
            interval = self.rows[f"{name}_interval"]
            rows.append((name, float(self.rows[name]), interval["low"], interval["high"]))
        rows += [
            (n, float(self.rows[n]), None, None) for n in ("fve_rowwise", "cosine", "length_ratio", "dead", "dense")
        ]
        for name in _SHARES:
            interval = self.model["intervals"][name]
            rows.append((name, float(self.model[name]), interval["low"], interval["high"]))
        names = ("ce", "ce_dictionary", "ce_zero", "ce_mean", "kl_dictionary", "kl_zero", "kl_mean")
        rows += [(n, float(self.model[n]), None, None) for n in names]
        for name, arm in self.arms.items():
            said = _ARMS[name]
            rows.append((f"fve, {said}", float(arm["fve"]), arm["interval"]["low"], arm["interval"]["high"]))
            rows.append((f"l0, {said}", float(arm["l0"]), None, None))
            if "fve_of_text" in arm:
                rows.append((f"fve, trained on {said}, of these rows", float(arm["fve_of_text"]), None, None))
        return tuple(rows)

    def density(self) -> Lines:
        """How often latents are active."""
        frequency = np.asarray(self.rows["frequency"], dtype=float)
        logs = np.log10(frequency[frequency > 0])
        counts, edges = np.histogram(logs, bins=30, range=(min(-4.0, float(logs.min(initial=0.0))), 0.0))
        return Lines(
            id="density",
            section="Held out",
            title="How often latents are active",
            caption="Latents by the share of rows in which they are active; those never active are not drawn.",
            x=[float(10 ** ((low + high) / 2)) for low, high in itertools.pairwise(edges)],
            series=(Series(name="latents", values=[float(count) for count in counts]),),
            x_title="share of rows",
            y_title="latents",
            log_x=True,
            python=self.python,
        )
