"""Curves shown while they grow, by trackio or Weights & Biases: whichever is asked for and installed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

from assay.base.errors import MissingExtra

TrackerName = Literal["trackio", "wandb"]
_PROJECT = "assay-dictionaries"


@runtime_checkable
class Tracker(Protocol):
    """What is told of a run."""

    every: int
    """Steps between two things it is told."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the values of a step."""

    def finish(self) -> None:
        """Be done with the run."""


class _Nobody:
    every = 1 << 62

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class _Client:
    """A run of trackio or Weights & Biases, whose clients have the same three calls."""

    every = 10

    def __init__(self, name: TrackerName, run: str, asked: Mapping[str, Any]) -> None:
        try:
            self._client = importlib.import_module(name)
        except ImportError as error:
            raise MissingExtra(name, name) from error
        self._run = self._client.init(project=_PROJECT, name=run or None, config=dict(asked))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send the values of a step."""
        self._run.log(dict(values), step=step)

    def finish(self) -> None:
        """End the run."""
        self._run.finish()


def tracker(name: TrackerName | None, run: str, asked: Mapping[str, Any]) -> Tracker:
    """Return the tracker of a name, or one that keeps nothing.

    Args:
        name: Which, or None.
        run: What the run is called there.
        asked: What it was asked, kept beside the curves.

    Raises:
        MissingExtra: It is not installed.
    """
    return _Nobody() if name is None else _Client(name, run, asked)
