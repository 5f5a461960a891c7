"""The fixtures of studies, in `tests/studies/study_fixtures.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "studies"))

from study_fixtures import home, log, method, model_folder, small_disk, start

__all__ = ["home", "log", "method", "model_folder", "small_disk", "start"]
