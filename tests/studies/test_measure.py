"""A step's cost: wall seconds and the process's largest memory while it ran."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest

from assay.studies.measure import Meter, peak_bytes, resident_bytes

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the system does not tell")
MIB = 1 << 20


def test_memory_that_was_freed_again_is_seen() -> None:
    """A block that needs more than the process ever had raises the kernel's own mark, which is exact."""
    before = resident_bytes()
    ballast = peak_bytes() - before + 64 * MIB
    with Meter() as meter:
        np.ones(ballast, dtype=np.uint8)
    assert meter.peak_bytes >= before + ballast - MIB
    assert meter.seconds > 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_later_small_block_is_not_charged_for_an_earlier_peak() -> None:
    np.ones(256 * MIB, dtype=np.uint8)
    assert peak_bytes() > resident_bytes() + 128 * MIB
    with Meter() as meter:
        pass
    assert meter.peak_bytes < peak_bytes() - 128 * MIB


def test_the_sampler_is_gone_afterwards_even_after_an_error() -> None:
    before = threading.active_count()
    with pytest.raises(RuntimeError), Meter():
        raise RuntimeError
    assert threading.active_count() == before
