"""The `train-dictionary` study: train, measure on what was held out, hold against chance, say."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from assay.base.artifacts import user_path
from assay.base.errors import SpecError
from assay.base.findings import Findings
from assay.base.method import Context, Progress, StepSpec
from assay.base.snippets import snippet
from assay.dictionaries.methods.train import TrainSpec
from assay.dictionaries.methods.train_report import Report
from assay.dictionaries.settings import Training

_FLOPS = 1.2e11
"""Multiplications and additions that a step's matrix product does in a second on two cores, for the plan."""
_NULL_ROWS = 512
"""Held-out rows on which random dictionaries are fitted."""
_RATE = 8e10
"""Parameters times tokens that a forward does in a second on two cores, for the plan."""


def planned(card: Any, spec: TrainSpec, seed: int) -> list[StepSpec]:
    """List the steps of a study from its model's card, without loading weights."""
    return _steps(_Data(spec), spec, seed, card.parameters)


class _Data:
    """The store, divided into what is trained on and what is held out.

    Raises:
        SpecError: The store has no such site, or too few rows.
    """

    def __init__(self, spec: TrainSpec) -> None:
        from assay.activations.store import Store

        self.store = Store.open(user_path(spec.store), verify=False)
        if not spec.reads and len(self.store.sites) != 1:
            raise SpecError(
                f"the store has several sites: name one with reads ({', '.join(self.store.sites)})", "reads"
            )
        self.reads = spec.reads or self.store.sites
        self.writes = spec.writes or self.reads
        self.spec = spec
        self.first = self.store.n - spec.held_out
        if self.first < spec.batch:
            raise SpecError(
                f"the store has {self.store.n:,} rows; with {spec.held_out:,} held out fewer than a batch of "
                f"{spec.batch:,} are left: harvest more, or hold out fewer",
                "held_out",
            )
        self.width = sum(self.store.widths[self.store._site(name)] for name in self.reads)

    def source(self, seed: int) -> Any:
        """The rows that are trained on."""
        return self.store.source(self.spec.batch, seed, sites=sorted({*self.reads, *self.writes}), n=self.first)

    def rows(self) -> tuple[Any, Any, list[int]]:
        """What is read and what is written of the held-out rows, and the document of each."""
        import torch

        index = np.arange(self.first, self.store.n)
        found = self.store.rows(index, sorted({*self.reads, *self.writes}))
        x, y = (torch.cat([found[self.store._site(n)] for n in names], dim=1) for names in (self.reads, self.writes))
        return x, y, self.store.tokens(index)["document"].tolist()

    def texts(self) -> Any:
        """Token ids of whole held-out rows of the corpus, all as long as the longest, `[texts, pos]`.

        Raises:
            SpecError: There are fewer than two.
        """
        import torch

        index = np.arange(self.first, self.store.n)
        _, places = np.unique(self.store.tokens(index)["row"], return_index=True)
        contexts = [self.store.context(int(index[place])) for place in places[1:]]  # the first may be cut
        longest = max((len(ids) for ids in contexts), default=0)
        whole = [torch.from_numpy(ids) for ids in contexts if len(ids) == longest][: self.spec.texts]
        if len(whole) < 2:
            raise SpecError("fewer than two whole texts are held out: hold out more rows", "held_out")
        return torch.stack(whole)

    def left_out(self) -> dict[str, Any]:
        """What the harvest left out, which the model keeps as it is."""
        manifest = self.store.parts[0][1]
        asked = manifest.request["filter"]
        limit = manifest.thresholds.get(self.store._site(self.writes[0])) if manifest.thresholds else None
        return {"leave_first": int(asked["skip_first"] or asked["skip_bos"]), "leave_longer_than": limit}


def _steps(data: _Data, spec: TrainSpec, seed: int, parameters: int) -> list[StepSpec]:
    settings = spec.training(seed).model_dump(mode="json")
    sites = {"reads": list(data.reads), "writes": list(data.writes), "cross_layer": spec.cross_layer}
    inputs = {"data": data.store.describe(), "first": data.first, "settings": settings, **sites}
    parts = len(data.reads) if spec.cross_layer else 1
    product = 2.0 * spec.batch * data.width * spec.latents
    training = 2.5 * spec.steps * product / _FLOPS
    weights = 4 * parts * spec.latents * (2 * data.width + 1)
    held = {"held_out": spec.held_out, "draws": spec.draws}
    steps = [
        StepSpec(name="train", inputs=inputs, tokens=spec.steps * spec.batch, bytes=3 * weights, seconds=training),
        StepSpec(
            name="reconstruction",
            inputs=inputs | held,
            seconds=spec.draws * 2.0 * _NULL_ROWS * 32 * product / spec.batch / _FLOPS,
        ),
        StepSpec(
            name="model",
            inputs=inputs | held | {"texts": spec.texts},
            forwards=spec.texts * (5 + spec.draws),
            tokens=spec.texts * 128 * (5 + spec.draws),
            seconds=spec.texts * 128 * (5 + spec.draws) * parameters / _RATE,
        ),
    ]
    if spec.arms:
        steps.append(StepSpec(name="arms", inputs=inputs | held, seconds=4 * training))
    return steps


def run(subject: Any, spec: TrainSpec, ctx: Context) -> Findings:
    """Train, measure, and say what it means."""
    data = _Data(spec)
    harvested = data.store.parts[0][1].request
    if harvested["fingerprint"] != subject.fingerprint:
        raise SpecError(
            f"{str(spec.store)!r} holds activations of {harvested['model']!r}, whose weights are not those of "
            f"{subject.name!r}: give the model they were harvested from",
            "store",
        )
    measured = _Measured(subject, data, spec, ctx.seed)
    steps = {step.name: step for step in _steps(data, spec, ctx.seed, 0)}
    curves = ctx.step(steps["train"], measured.train)
    measured.ensure(str(curves["sha256"]))
    found = {name: ctx.step(steps[name], getattr(measured, name)) for name in ("reconstruction", "model")}
    arms = ctx.step(steps["arms"], measured.arms) if spec.arms else {}
    ctx.artifact("curves", table={name: list(curves[name]) for name in _CURVES})
    report = Report(
        spec=spec,
        site=str(curves["site"]),
        curves=curves,
        rows=found["reconstruction"],
        model=found["model"],
        arms=arms,
        python=snippet(subject.reference, "train-dictionary", spec, ctx.seed),
        ctx=ctx,
    )
    return Findings(
        findings=report.findings(), views=report.views(), summary=report.summary(), warnings=report.warnings()
    )


_CURVES = ("step", "squared_error", "fvu", "l0", "dead", "penalty")


class _Measured:
    """What is trained and measured.

    Args:
        subject: The subject.
        data: The store, divided.
        spec: The spec.
        seed: The study's seed.
    """

    def __init__(self, subject: Any, data: _Data, spec: TrainSpec, seed: int) -> None:
        self.subject, self.data, self.spec, self.seed = subject, data, spec, seed
        self.folder = user_path(spec.dictionary)
        self._dictionary: Any = None

    @property
    def dictionary(self) -> Any:
        """The trained dictionary, from its folder."""
        if self._dictionary is None:
            from assay.dictionaries.formats import load

            self._dictionary = load(self.folder / "dictionary")
        return self._dictionary

    @cached_property
    def held(self) -> tuple[Any, Any, list[int]]:
        """The held-out rows."""
        return self.data.rows()

    def trained(self, settings: Training, out: Path, progress: Progress | None) -> Any:
        """Train with these settings, or go on where a run in that folder stopped."""
        from assay.dictionaries.training.runs import train

        return train(
            self.data.source(self.seed),
            settings,
            reads=self.data.reads,
            writes=None if self.data.writes == self.data.reads else self.data.writes,
            cross_layer=self.spec.cross_layer,
            out=out,
            checkpoint_every=self.spec.checkpoint_every,
            model=self.subject.reference or self.subject.name,
            share_latents=self.spec.share_latents,
            log=self.spec.log,
            progress=progress,
        )

    def train(self, progress: Progress) -> Mapping[str, Any]:
        """The dictionary, in its folder; its curves."""
        found = self.trained(self.spec.training(self.seed), self.folder, progress)
        self._dictionary = found.dictionary
        return {**found.curves, "sha256": _digest(self.folder / "dictionary"), "site": found.dictionary.site}

    def ensure(self, sha256: str) -> None:
        """Have the dictionary of a finished training, whose folder may be gone or another, where it should be.

        Raises:
            SpecError: The folder holds another dictionary.
        """
        place = self.folder / "dictionary"
        if not place.exists():
            self.trained(self.spec.training(self.seed), self.folder, None)
        if _digest(place) != sha256:
            raise SpecError(
                f"{str(place)!r} holds another dictionary than this study's: choose another folder", "dictionary"
            )

    def reconstruction(self, progress: Progress) -> Mapping[str, Any]:
        """What it does to held-out rows, and what random dictionaries do."""
        from assay.controls.dictionaries import random_dictionaries
        from assay.dictionaries.metrics import reconstruction

        x, y, documents = self.held
        groups = documents if len(set(documents)) > 1 else None
        found = reconstruction(self.dictionary, x, y, groups=groups, seed=self.seed)
        k = max(1, round(found.l0))
        null = random_dictionaries(
            y[:_NULL_ROWS], self.dictionary.n_latents, k, draws=self.spec.draws, seed=self.seed, progress=progress
        )
        single = {f.name: getattr(found, f.name) for f in fields(found) if not f.name.endswith("_interval")}
        return {
            **single,
            "fve_interval": found.fve_interval.to_dict(),
            "l0_interval": found.l0_interval.to_dict(),
            "random": np.asarray(null),
        }

    def model(self, progress: Progress) -> Mapping[str, Any]:
        """What the model loses on the dictionary's reconstructions, and on errors that point anywhere."""
        from assay.dictionaries.metrics import random_error_losses, recovered

        ids, left = self.data.texts(), self.data.left_out()
        total = len(ids) * (5 + self.spec.draws)
        found = recovered(self.subject, self.dictionary, ids, **left, seed=self.seed)
        progress(5 * len(ids), total, "random errors")
        null = random_error_losses(
            self.subject,
            self.dictionary,
            ids,
            **left,
            draws=self.spec.draws,
            seed=self.seed,
            progress=lambda done, _, message="": progress((5 + done) * len(ids), total, "random errors"),
        )
        single = {f.name: getattr(found, f.name) for f in fields(found) if f.name != "intervals"}
        intervals = {name: interval.to_dict() for name, interval in found.intervals.items()}
        return {**single, "intervals": intervals, "random": np.asarray(null), "texts": len(ids)}

    def arms(self, progress: Progress) -> Mapping[str, Any]:
        """The same training with a part left as it started."""
        from assay.dictionaries.metrics import reconstruction

        x, y, _ = self.held
        found = {}
        for index, part in enumerate(("decoder", "encoder")):
            settings = self.spec.training(self.seed).model_copy(update={"frozen": part})
            made = self.trained(
                settings,
                self.folder / f"frozen-{part}",
                lambda done, total, message="", index=index: progress(index * total + done, 2 * total, message),
            )
            measured = reconstruction(made.dictionary, x, y, seed=self.seed)
            found[part] = {"fve": measured.fve, "l0": measured.l0, "interval": measured.fve_interval.to_dict()}
        return found


def _digest(folder: Path) -> str:
    """The hash of a dictionary's files."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        total.update(path.name.encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
