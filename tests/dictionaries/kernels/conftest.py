"""Every path of the kernels that this machine has, in tiles so small that a tiny problem crosses their edges."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from assay.dictionaries.kernels import compiled, plain
from assay.dictionaries.kernels.backend import Backend, backend
from assay.dictionaries.kernels.building import CannotCompile, library


@pytest.fixture(params=["plain", "compiled"], scope="module")
def path(request: pytest.FixtureRequest) -> Backend:
    if request.param == "compiled":
        need_compiler()
    return backend("cpu", request.param)


@pytest.fixture(scope="module")
def both() -> tuple[Backend, Backend]:
    need_compiler()
    return backend("cpu", "plain"), backend("cpu", "compiled")


@pytest.fixture(params=[False, True], ids=["whole", "tiled"], scope="module")
def tiles(request: pytest.FixtureRequest) -> Iterator[bool]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            patch.setattr(plain, "CHUNK", 1 << 9)
            patch.setattr(compiled, "ROWS", 5)
            patch.setattr(compiled, "LATENTS", 70)
        yield request.param


class Bare:
    """A path without the run-time shape checks of the tests: what users have, where its own checks must do."""

    def __init__(self, path: Backend) -> None:
        self.path = path

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(inspect.unwrap(getattr(type(self.path), name)), self.path)


@pytest.fixture(scope="module")
def bare(path: Backend) -> Any:
    return Bare(path)


def need_compiler() -> None:
    try:
        library()
    except CannotCompile as error:
        pytest.skip(str(error))
