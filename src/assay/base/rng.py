"""Named random streams: every draw comes from a generator keyed by a seed and a name.

    numpy_stream(seed, "bootstrap", "heads", 3)

The key is the SHA-256 of the seed and the names. So a stream does not depend on which streams were opened before it,
on the process, on `PYTHONHASHSEED`, or on how many numbers others drew: a resumed study draws what the uninterrupted
one drew, and adding a control changes no other control.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from assay.base.errors import SpecError
from assay.base.hashing import canonical_json

if TYPE_CHECKING:
    import torch


def stream_key(seed: int, *names: str | int) -> int:
    """Return the 256-bit key of a stream.

    Raises:
        SpecError: The seed is not an int, or a name is neither str nor int.
    """
    whole = int | np.integer
    if isinstance(seed, bool) or not isinstance(seed, whole):
        raise SpecError(f"a seed is an int, got {seed!r}", "seed")
    for name in names:
        if isinstance(name, bool) or not isinstance(name, whole | str):
            raise SpecError(f"a stream is named by str and int, got {name!r} of type {type(name).__name__}")
    text = canonical_json(["assay.rng/1", seed, *names])
    return int.from_bytes(hashlib.sha256(text.encode("ascii")).digest(), "little")


def numpy_stream(seed: int, *names: str | int) -> np.random.Generator:
    """Return the numpy generator (PCG64) of the stream `(seed, *names)`, at its beginning.

    Example:
        >>> a, b = numpy_stream(0, "flips"), numpy_stream(0, "flips")
        >>> bool(a.random() == b.random()), bool(a.random() == numpy_stream(0, "sets").random())
        (True, False)
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(stream_key(seed, *names))))


def torch_stream(seed: int, *names: str | int) -> torch.Generator:
    """Return the torch generator of the stream `(seed, *names)`, on the CPU, at its beginning.

    Draw on the CPU and move the result, and it does not depend on the device. torch's CPU generator uses the low 32
    bits of a seed only, so two different names share a stream with probability 2^-32.
    """
    import torch

    return torch.Generator().manual_seed(stream_key(seed, *names) % (1 << 32))
