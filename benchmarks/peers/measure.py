"""Measure work as a ratio to a bare forward: CPU seconds, interleaved in one process, medians with n and spread.

Nothing but the standard library is imported here, because every peer's environment runs it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Work = Callable[[], object]


def cpu_seconds(work: Work) -> float:
    """CPU seconds of this process, all its threads, for one call. What it returns is let go within the time."""
    start = time.process_time()
    work()
    return time.process_time() - start


def interleaved(bare: Work, work: Work, *, n: int, seconds: float, chunk: int = 1) -> dict[str, Any]:
    """Ratios of `work` to `bare`, each from a round of bare, work, work, bare, so that slow drift cancels.

    A first round of each warms up and is not counted. Rounds stop at `n`, or, after two, when `seconds` have passed.

    Args:
        bare: What is compared with.
        work: What is measured.
        n: The number of rounds.
        seconds: About how long all rounds may take.
        chunk: How many bare calls make one measurement of it (where one call of the work is much longer).
    """
    bare()
    once = cpu_seconds(work)
    repeat = 2 if once < seconds / 8 else 1
    ratios, bares, works = [], [], []
    gc.collect()
    started = time.perf_counter()
    while len(ratios) < n:
        before = [cpu_seconds(bare) for _ in range(chunk)]
        mine = [cpu_seconds(work) for _ in range(repeat)]
        after = [cpu_seconds(bare) for _ in range(chunk)]
        bares += [*before, *after]
        works += mine
        ratios.append(statistics.fmean(mine) / statistics.fmean([*before, *after]))
        if len(ratios) >= 2 and time.perf_counter() - started > seconds:
            break
        if repeat == 1 and once > seconds:
            break
    return {**summary(ratios), "ratios": ratios, "bare_s": statistics.median(bares), "work_s": statistics.median(works)}


def summary(values: list[float]) -> dict[str, Any]:
    """The median, the quartiles (the extremes when there are fewer than four) and n."""
    ordered = sorted(values)
    if len(ordered) < 4:
        low, high = ordered[0], ordered[-1]
    else:
        low, _, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return {"median": statistics.median(ordered), "low": low, "high": high, "n": len(ordered)}


def reset_peak() -> bool:
    """Forget the peak of resident memory so far, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """The largest resident memory since the last reset; since the start where there is no reset."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
