"""The loop: one source feeds one dictionary or many, with checkpoints, and the same end after any interruption.

The same call after an interruption goes on from the last whole checkpoint and ends in the same bits (on a CPU, with the
same number of threads): the batch of a step depends on the step, and everything else that a step depends on is in the
checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.activations.source import Source
from assay.base.artifacts import user_path, write_parquet
from assay.base.errors import OutputError, SpecError, UnknownSite, nearest
from assay.base.method import Progress
from assay.base.sites import parse_site
from assay.dictionaries.settings import Training
from assay.dictionaries.training import checkpoints
from assay.dictionaries.training.mesh import Mesh, mesh
from assay.dictionaries.training.tracking import Tracker, TrackerName, tracker
from assay.dictionaries.training.trainer import CURVES, Trained, Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A dictionary that is to be trained.

    Attributes:
        settings: How.
        reads: The site it reads, or several for a crosscoder or a cross-layer transcoder.
        writes: What it reconstructs, where that is not what it reads.
        cross_layer: Latents of each site that is read write to the site of the same place and every later one.
    """

    settings: Training
    reads: str | Sequence[str]
    writes: str | Sequence[str] | None = None
    cross_layer: bool = False


def train(
    source: Source,
    settings: Training,
    *,
    reads: str | Sequence[str],
    writes: str | Sequence[str] | None = None,
    cross_layer: bool = False,
    out: str | Path | None = None,
    checkpoint_every: int = 500,
    model: str = "",
    share_latents: int = 1,
    log: TrackerName | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train one dictionary.

    Args:
        source: Where rows come from.
        settings: How it is trained.
        reads: The site it reads, or several for a crosscoder or a cross-layer transcoder.
        writes: What it reconstructs, where that is not what it reads.
        cross_layer: Latents of each site that is read write to the site of the same place and every later one.
        out: A folder for the finished dictionary, its curves and its checkpoints; a run that was interrupted goes
            on from there. Nothing is written where it is not given.
        checkpoint_every: Steps between two checkpoints.
        model: Goes onto the card.
        share_latents: Under torchrun, how many processes divide the latents; the others divide each batch.
        log: Where curves are shown as they grow: "trackio" or "wandb", which must be installed.
        progress: Told after every step.

    Raises:
        UnknownSite: The source has no such site.
        SpecError: The folder holds another run, or what is asked cannot be divided among the processes.
        MissingExtra: What `log` names is not installed.
        NumericalError: A row or the loss is not finite.
        OutputError: Something cannot be written.

    Example:
        >>> from assay.dictionaries.training.source import Rows
        >>> rows = Rows({"blocks.0.resid_post": torch.randn(512, 8, generator=torch.manual_seed(0))}, batch=64)
        >>> trained = train(rows, Training(latents=16, k=2, steps=20, batch=64), reads="blocks.0.resid_post")
        >>> trained.dictionary, trained.steps
        (Dictionary(sae topk, 16 latents, blocks.0.resid_post), 20)
    """
    wanted = Wanted(settings=settings, reads=reads, writes=writes, cross_layer=cross_layer)
    folders = {"": None if out is None else user_path(out)}
    return _train(source, {"": wanted}, folders, checkpoint_every, model, share_latents, log, progress)[""]


def train_many(
    source: Source,
    wanted: Mapping[str, Wanted],
    *,
    out: str | Path | None = None,
    checkpoint_every: int = 500,
    model: str = "",
    share_latents: int = 1,
    log: TrackerName | None = None,
    progress: Progress | None = None,
) -> dict[str, Trained]:
    """Train many dictionaries from one pass over the rows: each batch is read once, and given to all.

    Args:
        source: Where rows come from.
        wanted: The dictionaries, by a name each; one may read other sites and take more steps than another.
        out: A folder in which each has its own; see `train`.
        checkpoint_every: See `train`, as for all that follows.
        model: See there.
        share_latents: See there.
        log: See there; each dictionary is a run of its name.
        progress: Told after every step, over all dictionaries.

    Raises:
        SpecError: Nothing is wanted, or a name is no name of a folder; and as `train` does.

    Example:
        >>> from assay.dictionaries.training.source import Rows
        >>> rows = Rows({"blocks.0.resid_post": torch.randn(512, 8, generator=torch.manual_seed(0))}, batch=64)
        >>> wanted = {
        ...     f"k{k}": Wanted(settings=Training(latents=16, k=k, steps=20, batch=64), reads="blocks.0.resid_post")
        ...     for k in (1, 2)
        ... }
        >>> {name: round(float(one.curves["l0"][-1])) for name, one in train_many(rows, wanted).items()}
        {'k1': 1, 'k2': 2}
    """
    if not wanted:
        raise SpecError("no dictionary is wanted: give at least one", "wanted")
    for name in wanted:
        if not name or Path(name).name != name or name.startswith("."):
            raise SpecError(f"{name!r} cannot name a dictionary: give a folder's name, such as 'topk-32'", "wanted")
    folders = {name: None if out is None else user_path(out) / name for name in wanted}
    return _train(source, wanted, folders, checkpoint_every, model, share_latents, log, progress)


def _train(
    source: Source,
    wanted: Mapping[str, Wanted],
    folders: Mapping[str, Path | None],
    every: int,
    model: str,
    share_latents: int,
    log: TrackerName | None,
    progress: Progress | None,
) -> dict[str, Trained]:
    grid = mesh(share_latents)
    runs = {name: _Run(source, one, folders[name], every, model, grid) for name, one in wanted.items()}
    waiting = [run for run in runs.values() if not run.trainer.done]
    if waiting:
        last = min(waiting, key=lambda run: run.trainer.state.step)
        if last.found is not None:
            source.restore(last.found.source)
    total = sum(one.settings.steps for one in wanted.values())
    trackers = {name: tracker(log if grid.rank == 0 else None, name, run.asked) for name, run in runs.items()}
    try:
        while waiting:
            step = min(run.trainer.state.step for run in waiting)
            batch = source.batch(step)
            for name, run in runs.items():
                if not run.trainer.done and run.trainer.state.step == step:
                    said = run.step(batch, trackers[name])
                    if progress is not None:
                        done = sum(each.trainer.state.step for each in runs.values())
                        progress(done, total, f"{name}: {said}" if name else said)
            waiting = [run for run in waiting if not run.trainer.done]
    finally:
        for each in trackers.values():
            each.finish()
    return {name: run.finish() for name, run in runs.items()}


class _Run:
    """One dictionary on its way: its trainer, its folder, and the checkpoint it went on from."""

    def __init__(self, source: Source, wanted: Wanted, folder: Path | None, every: int, model: str, grid: Mesh) -> None:
        self.source, self.folder, self.every, self.grid = source, folder, every, grid
        reads = _sites(source, wanted.reads)
        writes = _sites(source, wanted.writes) if wanted.writes else None
        self.asked = {
            "settings": wanted.settings.model_dump(mode="json"),
            "reads": list(reads),
            "writes": list(writes or reads),
            "cross_layer": wanted.cross_layer,
            "data": dict(source.describe()),
            "processes": [grid.data, grid.latent],
        }
        self.kept = folder / "checkpoints" if folder is not None else None
        if self.kept is not None and grid.size > 1:
            self.kept /= f"rank_{grid.rank}"
        if folder is not None:
            _check_place(folder)
        self.found = _agreed(self.kept, self.asked, grid)
        # what the first rows decide is in a checkpoint, and a stream need not be filled twice
        first = source.batch(0) if self.found is None else {n: torch.ones(1, w) for n, w in source.widths.items()}
        self.trainer = Trainer(
            wanted.settings, first, reads, writes, cross_layer=wanted.cross_layer, model=model, mesh=grid
        )
        if self.found is not None:
            self.trainer.restore(self.found.arrays)

    def step(self, batch: Mapping[str, Tensor], curves: Tracker) -> str:
        """Take a step, keep what there is to keep, and say how it stands."""
        report = self.trainer.step(batch)
        done = self.trainer.state.step
        if done % curves.every == 0 or self.trainer.done:
            curves.log(dict(zip(CURVES[1:], self.trainer.curves[-1][1:], strict=True)), done)
        if self.kept is not None and (done % self.every == 0 or self.trainer.done):
            now = checkpoints.Checkpoint(
                step=done, arrays=self.trainer.arrays(), asked=self.asked, source=self.source.state()
            )
            checkpoints.write(self.kept, now)
        return f"fvu {report.fvu:.3f}, L0 {report.l0:.1f}, dead {report.dead:.1%}"

    def finish(self) -> Trained:
        """The finished dictionary, in its folder where it has one."""
        dictionary = self.trainer.finished()
        columns = np.asarray(self.trainer.curves).reshape(-1, len(CURVES)).T
        curves = dict(zip(CURVES, columns, strict=True))
        if self.folder is not None and self.grid.rank == 0:
            write_parquet(self.folder / "curves.parquet", {name: column.tolist() for name, column in curves.items()})
            dictionary.save(self.folder / "dictionary")
        self.grid.wait()  # so that every process finds it there
        resumed = 0 if self.found is None else self.found.step
        return Trained(dictionary=dictionary, curves=curves, steps=self.trainer.state.step, resumed_at=resumed)


def _check_place(folder: Path) -> None:
    """Refuse a folder that cannot be written before anything is trained; nothing is made yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise OutputError(f"cannot write {str(folder)!r}: {str(there)!r} is a file; give another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {str(folder)!r}: {str(there)!r} is not writable; give another folder")


def _agreed(folder: Path | None, asked: Mapping[str, Any], grid: Mesh) -> checkpoints.Checkpoint | None:
    """The newest checkpoint that every process has, or None."""
    if folder is None:
        return None
    newest = checkpoints.latest(folder, asked)
    if grid.size == 1:
        return newest
    steps = [int(n) for n in grid.gathered(torch.tensor([newest.step if newest else 0]), along="all")]
    if min(steps) == 0:
        return None
    return newest if newest and newest.step == min(steps) else checkpoints.latest(folder, asked, at=min(steps))


def _sites(source: Source, asked: str | Sequence[str]) -> tuple[str, ...]:
    names = (asked,) if isinstance(asked, str) else tuple(asked)
    known = source.widths
    found = []
    for name in names:
        canonical = name if name in known else str(parse_site(name))
        if canonical not in known:
            raise UnknownSite(f"the data have no site {name!r}{nearest(name, known)}; they have {', '.join(known)}")
        found.append(canonical)
    if len(set(found)) != len(found):
        raise SpecError(f"a site is named twice: {', '.join(names)}", "reads")
    return tuple(found)
