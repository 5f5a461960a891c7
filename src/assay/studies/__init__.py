"""Studies: a spec becomes a plan, a run, findings and a report."""

from __future__ import annotations

from assay.studies.events import Event, Watcher
from assay.studies.recheck import Rechecked, recheck
from assay.studies.registry import find_method, load_methods
from assay.studies.study import Study

__all__ = ["Event", "Rechecked", "Study", "Watcher", "find_method", "load_methods", "recheck"]
