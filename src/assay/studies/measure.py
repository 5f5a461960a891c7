"""What a step costs: wall seconds, and the largest resident memory of the process while it ran."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

_STATM = Path("/proc/self/statm")
_INTERVAL = 0.05


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes; where the system does not tell, its peak so far."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return peak_bytes()


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Meter:
    """Measures a block: `seconds` of wall time and `peak_bytes` of resident memory (of the process, not an increase).

    The memory is the kernel's exact high-water mark when the block raised it, else the largest of samples taken every
    50 ms; the mark itself is never reset, since others may be reading it.

    Example:
        >>> with Meter() as meter:
        ...     _ = bytearray(1_000_000)
        >>> meter.seconds > 0 and meter.peak_bytes > 1_000_000
        True
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Meter:
        self._mark = peak_bytes()
        self._largest = resident_bytes()
        self._thread = threading.Thread(target=self._sample, name="assay-memory", daemon=True)
        self._thread.start()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        mark = peak_bytes()
        self.peak_bytes = mark if mark > self._mark else max(self._largest, resident_bytes())

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._largest = max(self._largest, resident_bytes())
