"""Builds kernels.c with this machine's C compiler on first use, and loads it.

The library is kept in `artifacts.home()/"kernels"` under a name made from the source, the compiler, its flags and the
processor's instruction sets: a home shared by several machines holds one library for each kind, and none is ever loaded
where it would not run. It is written under another name and renamed, so two processes that build at once do no harm.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from assay.base.artifacts import home, replacing
from assay.base.errors import AssayError, OutputError

SOURCE = Path(__file__).with_name("kernels.c")
VERSION = 1
"""What `assay_version` of a sound library answers."""

_COMMON = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing")
_FLAGS = (
    (*_COMMON, "-march=native", "-fopenmp"),
    (*_COMMON, "-march=native", "-fopenmp-simd"),  # a compiler without OpenMP's runtime: one thread
    _COMMON,
)
"""Tried in this order; the first set that the compiler takes is the one."""

_SECONDS = 300.0

# p: address, l: int64, i: int32, f: float; `>` comes before what is returned.
_SIGNATURES = {
    "assay_topk_tile": "pllipllppppi",
    "assay_topk_end": "lllpppi",
    "assay_pack": "llpppppi",
    "assay_above_count": "pllpppi",
    "assay_above_fill": "pllippppppi",
    "assay_merge": "llpppppppi",
    "assay_sample": "pllplp>l",
    "assay_kth_bound": "pll>f",
    "assay_keep_total": "llppp",
    "assay_first_bad_row": "pll>l",
    "assay_decode": "ppplplppi",
    "assay_slopes": "pplplppi",
    "assay_residual": "ppplplppfpppi",
    "assay_by_latent": "ppppllpppp",
    "assay_gradients": "pppplplpllppppppi",
    "assay_update": "pppplplpllpppippppppppppppi>i",
    "assay_version": ">i",
}
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int32, "f": ctypes.c_float}


class CannotCompile(AssayError):
    """There is no C compiler here, or it could not build the kernels."""


@functools.cache
def library() -> ctypes.CDLL:
    """Return the loaded kernels, built first where they are not yet.

    Raises:
        CannotCompile: There is no C compiler, or it refused the source; the message says what to do.
    """
    compiler = find_compiler()
    path = home() / "kernels" / f"{_digest(compiler)}.so"
    if path.is_file():
        with contextlib.suppress(OSError, AttributeError, CannotCompile):
            return _load(path)
    try:
        with replacing(path) as temporary:
            _build(compiler, temporary)
        return _load(path)
    except (OSError, OutputError):  # a home that cannot be written to: built for this process alone
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            _build(compiler, Path(folder) / path.name)
            return _load(Path(folder) / path.name)


def find_compiler() -> list[str]:
    """Return the command of the C compiler: `$CC`, else `cc`, `gcc` or `clang`.

    Raises:
        CannotCompile: None of them is there.
    """
    for command in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = shlex.split(command)
        if words and (found := shutil.which(words[0])):
            return [found, *words[1:]]
    raise CannotCompile(
        "no C compiler was found ($CC, cc, gcc, clang); install one (Debian: apt install gcc; macOS: xcode-select "
        "--install; conda: conda install c-compiler)"
    )


def _digest(compiler: list[str]) -> str:
    """The identity of the library: what it is made from, by what, and for which processor."""
    said = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=False
    ).stdout
    parts = [SOURCE.read_text("utf-8"), repr(compiler), said, repr(_FLAGS), _processor()]
    return hashlib.sha256("\0".join(parts).encode("utf-8")).hexdigest()[:32]


def _processor() -> str:
    """What `-march=native` depends on: the processor's model and its instruction sets."""
    lines = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines():
            if not line.strip():
                break  # the first of several
            name = line.partition(":")[0].strip()
            if name in {"vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part", "stepping"}:
                lines.append(line)
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *lines])


def _build(compiler: list[str], path: Path) -> None:
    said = ""
    for flags in _FLAGS:
        command = [*compiler, *flags, "-x", "c", str(SOURCE), "-o", str(path), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CannotCompile(f"the C compiler {compiler[0]!r} did not run: {error}") from error
        if done.returncode == 0:
            return
        said = done.stderr.strip()[-500:] or f"exit status {done.returncode}"
    raise CannotCompile(f"the C compiler {compiler[0]!r} could not build the kernels: {said}")


def _load(path: Path) -> ctypes.CDLL:
    # PyTorch brings its own OpenMP runtime; loaded first, it serves the kernels too where the two have one name.
    import torch  # noqa: F401

    loaded = ctypes.CDLL(str(path))
    for name, signature in _SIGNATURES.items():
        takes, _, gives = signature.partition(">")
        function = getattr(loaded, name)
        function.argtypes = [_TYPES[letter] for letter in takes]
        function.restype = _TYPES[gives] if gives else None
    if loaded.assay_version() != VERSION:
        raise CannotCompile(f"{str(path)!r} is no library of this version's kernels: remove it")
    return loaded
