"""The `lens` study: what is measured, held against what."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from assay.base.artifacts import user_path
from assay.base.errors import NumericalError, SpecError
from assay.base.findings import Findings
from assay.base.hashing import digest, file_sha256
from assay.base.method import Context, Progress, StepSpec
from assay.base.rng import numpy_stream
from assay.base.snippets import snippet
from assay.directions.methods.common import RATE, mean_tokens
from assay.directions.methods.lens import LensSpec
from assay.directions.methods.lens_report import Report
from assay.directions.methods.rows import text_rows

DRAWS = 4e7
"""Weights drawn in a second on one core."""

TRAINING = ("steps", "batch", "optimiser", "lr")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a study is given.

    Args:
        texts: What is read.
        train: What a lens is trained on; none when empty.
        block: The block that the findings speak of.
        blocks: How many the model has.
        given: The hash of a lens that was trained before, or an empty string.
    """

    texts: list[str]
    train: list[str]
    block: int
    blocks: int
    given: str

    @classmethod
    def read(cls, spec: LensSpec, blocks: int) -> Inputs:
        """Read the files and see that they fit together.

        Raises:
            SpecError: They do not; the field is named.
        """
        if spec.train is not None and spec.lens is not None:
            raise SpecError("train makes a tuned lens and lens names one: give one of the two", "lens")
        block = spec.block if spec.block is not None else blocks // 2 - 1
        if not 0 <= block < blocks - 1:
            raise SpecError(
                f"block {block} has none after it, or there is none: this model has {blocks} blocks, and the last "
                "one's stream is the output itself; give 0 to the last but one",
                "block",
            )
        texts = [row["text"] for row in text_rows(spec.data, ("text",), field="data")][: spec.texts]
        if len(set(texts)) < 2 or len(set(texts)) < len(texts):
            raise SpecError(f"{spec.data}: give two texts or more, each once; other texts are a control", "data")
        train = [] if spec.train is None else [row["text"] for row in text_rows(spec.train, ("text",), field="train")]
        both = sorted(set(train) & set(texts))
        if both:
            raise SpecError(
                f"{len(both)} of the texts of {spec.data} are in {spec.train} too ({both[0][:40]!r}): a lens is read "
                "on texts that it was not trained on; take them out of one of the files",
                "train",
            )
        given = ""
        if spec.lens is not None:
            given = file_sha256(user_path(spec.lens))
        return cls(texts=texts, train=train, block=block, blocks=blocks, given=given)

    @property
    def tuned(self) -> bool:
        """Whether there is a tuned lens."""
        return bool(self.train or self.given)

    @property
    def digest(self) -> str:
        """The hash of all that is read."""
        return digest([self.texts, self.train, self.given])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Steps:
    """The steps of one study; costs in rows of the model, the lens's own reading of the vocabulary included.

    Args:
        inputs: The texts.
        spec: The spec.
        seed: The study's seed.
        length: Mean tokens of a text that is read.
        train_length: Mean tokens of a text that is trained on.
        parameters: The model's parameters.
        d: Its width.
        vocabulary: How many tokens it knows.
    """

    inputs: Inputs
    spec: LensSpec
    seed: int
    length: int = 1
    train_length: int = 1
    parameters: int = 0
    d: int = 0
    vocabulary: int = 0

    def _step(self, name: str, rows: int, length: int, heads: float, **more: Any) -> StepSpec:
        # softmaxes over the vocabulary cost about what the unembedding does
        seconds = (rows * length * self.parameters + 2 * heads * self.d * self.vocabulary) / RATE
        own = {"texts": digest(self.inputs.texts), "tokens": self.spec.tokens, "seed": self.seed}
        return StepSpec(name=name, inputs=own | more, forwards=rows, tokens=rows * length, seconds=seconds)

    @property
    def _lens(self) -> dict[str, Any]:
        if self.inputs.given:
            return {"lens": self.inputs.given}
        if not self.inputs.train:
            return {}
        return {"train": digest(self.inputs.train), **{name: getattr(self.spec, name) for name in TRAINING}}

    @property
    def _read(self) -> float:
        """Tokens read through the unembedding by one lens at every block."""
        return float(len(self.inputs.texts) * self.spec.tokens * self.inputs.blocks)

    def train(self) -> StepSpec:
        """The tuned lens."""
        rows = self.spec.steps * self.spec.batch if self.inputs.train else 0
        done = self._step("train", rows, self.train_length, 3.0 * rows * self.train_length * self.inputs.blocks)
        inputs = {"seed": self.seed, **self._lens}
        size = self.inputs.blocks * self.d * (self.d + 1) * 16  # maps, gradients and two moments, float32
        return replace(done, inputs=inputs, bytes=size)

    def read(self) -> StepSpec:
        """Both lenses at every block."""
        return self._step(
            "read", len(self.inputs.texts), self.length, self._read * (1 + self.inputs.tuned), **self._lens
        )

    def swapped(self) -> StepSpec:
        """The tuned lens's maps at other blocks."""
        n = self.spec.controls
        return self._step("other blocks", len(self.inputs.texts), self.length, self._read * n, controls=n, **self._lens)

    def untrained(self) -> StepSpec:
        """The logit lens on untrained weights."""
        n = self.spec.untrained
        rows = n * len(self.inputs.texts)
        step = self._step("untrained", rows, self.length, 0.0, untrained=n, block=self.inputs.block)
        return replace(step, seconds=step.seconds + n * self.parameters / DRAWS)

    def all(self) -> list[StepSpec]:
        """Every step, in order."""
        if not self.inputs.tuned:
            return [self.read(), self.untrained()]
        return [self.train(), self.read(), self.swapped(), self.untrained()]


def planned(card: Any, spec: LensSpec, seed: int) -> list[StepSpec]:
    """List the steps of a study from its model's card, without loading weights."""
    inputs = Inputs.read(spec, card.n_layers)
    length, train_length = (mean_tokens(card, texts) for texts in (inputs.texts, inputs.train))
    return _Steps(
        inputs=inputs,
        spec=spec,
        seed=seed,
        length=length,
        train_length=train_length,
        parameters=card.parameters,
        **_size(card),
    ).all()


def _size(card: Any) -> dict[str, int]:
    """Width and vocabulary, as far as the card tells."""
    config = card.config.get("text_config") or card.config
    d = config.get("hidden_size") or config.get("n_embd") or 0
    return {"d": int(d), "vocabulary": int(config.get("vocab_size") or 0)}


def run(subject: Any, spec: LensSpec, ctx: Context) -> Findings:
    """Measure, and say what it means."""
    inputs = Inputs.read(spec, subject.n_blocks)
    steps = _Steps(inputs=inputs, spec=spec, seed=ctx.seed)
    measured = _Measured(subject, inputs, spec, ctx.seed)
    measured.check()
    if inputs.tuned:
        measured.lens = _lens(ctx.step(steps.train(), measured.train))
        ctx.artifact("tuned-lens", arrays=measured.lens.arrays())
    read = ctx.step(steps.read(), measured.read)
    swapped = ctx.step(steps.swapped(), measured.swapped) if inputs.tuned else {}
    untrained = ctx.step(steps.untrained(), measured.untrained)
    report = Report(
        texts=inputs.texts,
        digest=inputs.digest,
        block=inputs.block,
        name=spec.data.stem,
        shuffles=spec.shuffles,
        read=read,
        swapped=swapped,
        untrained=untrained,
        python=snippet(subject.reference, "lens", spec, ctx.seed),
        ctx=ctx,
    )
    ctx.artifact("readings", table=report.table())
    return Findings(
        findings=report.findings(), views=report.views(), summary=report.summary(), warnings=report.warnings()
    )


def _lens(arrays: Mapping[str, Any]) -> Any:
    from assay.directions.tuned_lens import TunedLens

    return TunedLens.from_arrays({name: np.asarray(arrays[name]) for name in ("weight", "bias", "about")})


class _Measured:
    """What is measured; the model is read once, and only if something needs it.

    Args:
        subject: The subject.
        inputs: The texts.
        spec: The spec.
        seed: The study's seed.
    """

    def __init__(self, subject: Any, inputs: Inputs, spec: LensSpec, seed: int) -> None:
        self.subject, self.inputs, self.spec, self.seed = subject, inputs, spec, seed
        self.lens: Any = None
        self._told: Progress | None = None

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """The stream before the first block and after each but the last."""
        from assay.directions.tuned_lens import lens_sites

        return lens_sites(self.subject)

    def check(self) -> None:
        """See that every text has the tokens that are read, and that a lens that was given belongs here."""
        from assay.directions.tuned_lens import TunedLens

        for number, text in enumerate(self.inputs.texts, 1):
            length = self.subject.batch([text]).lengths[0]
            if length < self.spec.tokens:
                raise SpecError(
                    f"text {number} ({text[:40]!r}) has {length} tokens and the last {self.spec.tokens} are read: "
                    "lower tokens, or leave it out",
                    "tokens",
                )
        if self.inputs.given:
            lens = TunedLens.load(str(self.spec.lens), self.subject)
            if lens.sites != self.sites:
                raise SpecError(f"{self.spec.lens} reads other sites ({lens.sites[0]} ...) than this model's", "lens")

    def train(self, progress: Progress) -> Mapping[str, Any]:
        """The tuned lens, as arrays."""
        from assay.directions.tuned_lens import TunedLens, train_tuned_lens

        if self.inputs.given:
            return TunedLens.load(str(self.spec.lens), self.subject).arrays()
        spec = self.spec
        lens = train_tuned_lens(
            self.subject,
            self.inputs.train,
            steps=spec.steps,
            batch=spec.batch,
            optimiser=spec.optimiser,
            lr=spec.lr,
            seed=self.seed,
            progress=lambda done, total: progress(done, total, "training"),
        )
        return lens.arrays()

    def _streams(self, subject: Any, sites: tuple[str, ...]) -> tuple[dict[str, Any], Any]:
        """The last tokens' streams by site, `[texts, tokens, d]`, and the log-probabilities of what is said next."""
        import torch

        n, texts = self.spec.tokens, self.inputs.texts
        streams: dict[str, list[Any]] = {site: [] for site in sites}
        final = []
        with torch.no_grad():
            for text in texts:
                run = subject.run([text], capture=list(sites))
                end = run.batch.starts[0] + run.batch.lengths[0]
                for site in sites:
                    streams[site].append(run[site][0, end - n : end])
                final.append(run.logits[0, end - n : end].float().log_softmax(-1))
        return {site: torch.stack(rows) for site, rows in streams.items()}, torch.stack(final)

    @cached_property
    def own(self) -> tuple[dict[str, Any], Any]:
        """The same of the subject at every site."""
        return self._streams(self.subject, self.sites)

    def _said(self, site: str, stream: Any, lens: Any) -> Any:
        """What a lens says of streams of a site: log-probabilities."""
        given = stream if lens is None else lens.translated(site, stream).to(stream.dtype)
        return self.subject.parts.logits(given).float().log_softmax(-1)

    def read(self, progress: Progress) -> Mapping[str, Any]:
        """Both lenses at every site.

        KL is from each text's next tokens to what the lens says of every text's stream, `[site, text, stream's text]`.
        """
        import torch

        streams, final = self.own
        answer = final.argmax(-1, keepdim=True)
        probability = final.exp()
        entropy = (probability * final).sum(-1)  # [texts, tokens], negative
        found: dict[str, Any] = {"sites": list(self.sites), "answer": answer[:, -1, 0].numpy(force=True)}
        found["words"] = [self.subject.text(row)[0] if self.subject.tokenizer else "" for row in answer[:, -1:, 0]]
        names = {"logit lens": None} | ({"tuned lens": self.lens} if self.lens is not None else {})
        with torch.no_grad():
            for place, (name, lens) in enumerate(names.items()):
                table, ranks, chance, agrees = [], [], [], []
                for i, site in enumerate(self.sites):
                    said = self._said(site, streams[site], lens)
                    cross = torch.einsum("apv,bpv->pab", probability, said)
                    table.append((entropy.T[:, :, None] - cross).mean(0).double().numpy(force=True))
                    at = said.gather(-1, answer)
                    ranks.append((said > at).sum(-1).double().numpy(force=True) + 1)
                    chance.append(at[..., 0].exp().double().numpy(force=True))
                    agrees.append((said.argmax(-1, keepdim=True) == answer)[..., 0].numpy(force=True))
                    progress(place * len(self.sites) + i + 1, len(names) * len(self.sites), f"reading by the {name}")
                found |= {
                    f"{name} kl": _finite(np.stack(table), name),
                    f"{name} rank": np.stack(ranks),
                    f"{name} probability": np.stack(chance),
                    f"{name} agrees": np.stack(agrees).astype(np.uint8),
                }
        return found

    def _orders(self) -> Iterator[np.ndarray]:
        """Different orders of the maps, none of them their own, as many as are asked for or there are."""
        rng, n = numpy_stream(self.seed, "lens", "blocks"), len(self.sites)
        seen = {tuple(range(n))}
        while len(seen) < min(self.spec.controls, math.factorial(n) - 1) + 1:
            order = rng.permutation(n)
            if tuple(order.tolist()) not in seen:
                seen.add(tuple(order.tolist()))
                yield order

    def swapped(self, progress: Progress) -> Mapping[str, Any]:
        """The mean KL over sites and texts when each map reads another block's stream, for each order."""
        import torch

        streams, final = self.own
        probability, found = final.exp(), []
        with torch.no_grad():
            for order in self._orders():
                total = 0.0
                for i, site in enumerate(self.sites):
                    said = self._said(self.sites[order[i]], streams[site], self.lens)
                    total += float((probability * (final - said)).sum(-1).mean())
                found.append(total / len(self.sites))
                progress(len(found), self.spec.controls, "maps at other blocks")
        return {"kl": _finite(np.asarray(found), "tuned lens")}

    def untrained(self, progress: Progress) -> Mapping[str, Any]:
        """How the logit lens ranks the model's own next tokens after one block, on untrained weights."""
        import torch

        from assay.activations.subject import Subject
        from assay.controls.weights import WeightNull

        subject, site = self.subject, self.sites[self.inputs.block + 1]
        null, found = WeightNull(subject.module, "gaussian"), []
        for number in range(self.spec.untrained):
            module = null.draw(self.seed, number)
            other = Subject(module, subject.tokenizer, architecture=subject.architecture, name=f"untrained {number}")
            streams, final = self._streams(other, (site,))
            with torch.no_grad():
                said = other.parts.logits(streams[site]).float()
            at = said.gather(-1, final.argmax(-1, keepdim=True))
            found.append(float((1 / (1 + (said > at).sum(-1).double())).mean()))
            progress(number + 1, self.spec.untrained, "untrained weights")
        return {"reciprocal rank": np.asarray(found)}


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise NumericalError(f"the {name} is not finite at {int((~np.isfinite(values)).sum())} places; lower lr")
    return values
