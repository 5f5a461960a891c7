"""The `train-dictionary` study: train, measure on what was held out, hold against chance, say."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from assay.base.artifacts import user_path
from assay.base.errors import SpecError
from assay.base.findings import Findings
from assay.base.hashing import file_sha256
from assay.base.method import Context, Progress, StepSpec
from assay.base.snippets import snippet
from assay.dictionaries.methods.train import ArmName, TrainSpec
from assay.dictionaries.methods.train_report import Report
from assay.dictionaries.settings import Training

_HARVESTED = frozenset({"random-tokens", "reinitialised"})
"""Arms that have activations of their own."""
_FLOPS = 1.2e11
"""Multiplications and additions that a step's matrix product does in a second on two cores, for the plan."""
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

    def __init__(self, spec: TrainSpec, store: Any = None) -> None:
        from assay.activations.store import Store

        self.store = Store.open(user_path(spec.store), verify=False) if store is None else store
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

    def source(self) -> Any:
        """The rows that are trained on."""
        seed = self.spec.training_seed
        return self.store.source(self.spec.batch, seed, sites=sorted({*self.reads, *self.writes}), n=self.first)

    def rows(self) -> tuple[Any, Any, list[int]]:
        """What is read and what is written of the held-out rows, and the document of each."""
        import torch

        index = np.arange(self.first, self.store.n)
        found = self.store.rows(index, sorted({*self.reads, *self.writes}))
        x, y = (torch.cat([found[self.store._site(n)] for n in names], dim=1) for names in (self.reads, self.writes))
        return x, y, self.store.tokens(index)["document"].tolist()

    @cached_property
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
    settings = spec.training().model_dump(mode="json")
    sites = {"reads": list(data.reads), "writes": list(data.writes), "cross_layer": spec.cross_layer}
    inputs = {"data": data.store.describe(), "first": data.first, "settings": settings, **sites}
    parts = len(data.reads) if spec.cross_layer else 1
    product = 2.0 * spec.batch * data.width * spec.latents
    training = 2.5 * spec.steps * product / _FLOPS
    weights = 4 * parts * spec.latents * (2 * data.width + 1)
    held = {"held_out": spec.held_out, "draws": spec.draws, "seed": seed}
    active = min(spec.k if spec.family in ("topk", "batchtopk", "matryoshka") else 32, data.width)
    steps = [
        StepSpec(name="train", inputs=inputs, tokens=spec.steps * spec.batch, bytes=3 * weights, seconds=training),
        StepSpec(
            name="reconstruction",
            inputs=inputs | held,
            seconds=spec.draws * active * spec.held_out * product / spec.batch / _FLOPS,
        ),
        StepSpec(
            name="model",
            inputs=inputs | held | {"texts": spec.texts},
            forwards=len(data.texts) * (5 + spec.draws),
            tokens=data.texts.numel() * (5 + spec.draws),
            seconds=data.texts.numel() * (5 + spec.draws) * parameters / _RATE,
        ),
    ]
    for arm in spec.arms:
        again = arm in _HARVESTED  # activations are harvested once more
        steps.append(
            StepSpec(
                name=f"arm {arm}",
                inputs=inputs | {"held_out": spec.held_out, "seed": seed, "arm": arm},
                forwards=-(-data.store.n // _context(data)) if again else 0,
                tokens=spec.steps * spec.batch,
                bytes=3 * weights + (data.store.n * _token_bytes(data) if again else 0),
                seconds=training + (data.store.n * parameters / _RATE if again else 0),
            )
        )
    return steps


def _context(data: _Data) -> int:
    return int(data.store.parts[0][1].request["rows"]["context"])


def _token_bytes(data: _Data) -> int:
    widths = [data.store.widths[data.store._site(name)] for name in {*data.reads, *data.writes}]
    return sum(widths) * (2 if data.store.dtype == "bfloat16" else 4)


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
    if _HARVESTED & {*spec.arms} and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SpecError(
            "the arms random-tokens and reinitialised harvest in one process: train with torchrun and without them, "
            "then run the same command with them alone",
            "arms",
        )
    measured = _Measured(subject, data, spec, ctx.seed)
    steps = {step.name: step for step in _steps(data, spec, ctx.seed, 0)}
    curves = ctx.step(steps["train"], measured.train)
    measured.ensure(str(curves["sha256"]))
    found = {name: ctx.step(steps[name], getattr(measured, name)) for name in ("reconstruction", "model")}
    arms: dict[str, Any] = {arm: ctx.step(steps[f"arm {arm}"], partial(measured.arm, arm)) for arm in spec.arms}
    heads = measured.heads()
    if heads:
        ctx.artifact("heads", arrays=heads)
    ctx.artifact("curves", table={name: list(curves[name]) for name in _CURVES})
    report = Report(
        spec=spec,
        site=str(curves["site"]),
        curves=curves,
        rows=found["reconstruction"],
        model=found["model"],
        arms=arms,
        heads=heads,
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

    def trained(
        self, settings: Training, out: Path, progress: Progress | None, *, data: _Data | None = None, model: str = ""
    ) -> Any:
        """Train with these settings, or go on where a run in that folder stopped."""
        from assay.dictionaries.training.runs import train

        return train(
            (data or self.data).source(),
            settings,
            reads=self.data.reads,
            writes=None if self.data.writes == self.data.reads else self.data.writes,
            cross_layer=self.spec.cross_layer,
            out=out,
            checkpoint_every=self.spec.checkpoint_every,
            model=model or self.subject.reference or self.subject.name,
            share_latents=self.spec.share_latents,
            log=self.spec.log,
            progress=progress,
        )

    def train(self, progress: Progress) -> Mapping[str, Any]:
        """The dictionary, in its folder; its curves."""
        progress(0, self.spec.steps, "checking the store")
        self.data.store.verify()
        found = self.trained(self.spec.training(), self.folder, progress)
        self._dictionary = found.dictionary
        return {**found.curves, "sha256": _digest(self.folder / "dictionary"), "site": found.dictionary.site}

    def ensure(self, sha256: str) -> None:
        """Have the dictionary of a finished training, whose folder may be gone or another, where it should be.

        Raises:
            SpecError: The folder holds another dictionary.
        """
        place = self.folder / "dictionary"
        if not place.exists():
            self.trained(self.spec.training(), self.folder, None)
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
            y, self.dictionary.n_latents, k, draws=self.spec.draws, seed=self.seed, progress=progress
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

        ids, left = self.data.texts, self.data.left_out()
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

    def heads(self) -> dict[str, Float[np.ndarray, "latent head"]]:
        """Each latent's share per head, by "<what> <site>", where it reads and writes heads that lie side by side."""
        from assay.dictionaries.crosslayer import CrossLayer
        from assay.dictionaries.heads import head_shares

        found: dict[str, Float[np.ndarray, "latent head"]] = {}
        if isinstance(self.dictionary, CrossLayer) or self.data.writes != self.data.reads:
            return found
        ids = self.data.texts[:1, :2]
        for site in self.dictionary.card.reads:
            value = self.subject.run(ids, capture=site.name)[site.name]
            if "head" in value.dims and value.shape[-2] * value.shape[-1] == site.width:
                shares = head_shares(self.dictionary, value.shape[-2], site.name)
                found |= {f"decoder {site.name}": shares.decoder, f"encoder {site.name}": shares.encoder}
        return found

    def arm(self, arm: ArmName, progress: Progress) -> Mapping[str, Any]:
        """The same training without one thing, measured in the same way on held-out rows of its own."""
        from assay.controls.dictionaries import harvest_arm
        from assay.dictionaries.metrics import reconstruction

        folder, settings, data, name = self.folder / "arms" / arm, self.spec.training(), self.data, ""
        if arm == "decoder" or arm == "encoder":
            settings = settings.model_copy(update={"frozen": arm})
        else:
            name = f"{self.subject.name}, {arm}"
            sites = tuple(sorted({*data.reads, *data.writes}))
            seed = self.spec.training_seed
            store = harvest_arm(
                self.subject, data.store, arm, out=folder / "activations", sites=sites, seed=seed, progress=progress
            )
            data = _Data(self.spec, store)
        made = self.trained(settings, folder, progress, data=data, model=name)
        x, y, documents = data.rows()
        groups = documents if len(set(documents)) > 1 else None
        measured = reconstruction(made.dictionary, x, y, groups=groups, seed=self.seed)
        found = {"fve": measured.fve, "l0": measured.l0, "interval": measured.fve_interval.to_dict()}
        if arm == "random-tokens":  # the same model: what it explains of text can be asked
            found["fve_of_text"] = reconstruction(made.dictionary, *self.held[:2], seed=self.seed).fve
        return found


def _digest(folder: Path) -> str:
    """The hash of a dictionary's files."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        total.update(path.name.encode())
        total.update(bytes.fromhex(file_sha256(path)))
    return total.hexdigest()
