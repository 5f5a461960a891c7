"""Which path is taken, and what is said where the one that was asked for cannot be had."""

from __future__ import annotations

import warnings

import pytest

from assay.base.errors import SpecError
from assay.dictionaries.kernels import backend as module
from assay.dictionaries.kernels import building
from assay.dictionaries.kernels.backend import VARIABLE, Backend, backend


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    building.library.cache_clear()
    module._make.cache_clear()
    module._warn_once.cache_clear()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)


def test_a_path_is_a_backend(path: Backend) -> None:
    assert isinstance(path, Backend)


def test_the_cpu_takes_the_compiled_path(both: tuple[Backend, Backend]) -> None:
    assert backend("cpu").name == "compiled"
    assert both[1] is backend("cpu")  # and keeps its buffers


def test_the_variable_names_a_path_and_an_argument_outranks_it(
    both: tuple[Backend, Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "plain")
    assert backend("cpu").name == "plain"
    assert backend("cpu", "compiled").name == "compiled"


def test_other_devices_take_plain_pytorch() -> None:
    assert backend("meta").name == "plain"


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_plain_pytorch_warns_once() -> None:
    with pytest.warns(UserWarning, match=r"no C compiler was found .*apt install gcc.*ASSAY_KERNELS=plain"):
        assert backend("cpu").name == "plain"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend("cpu").name == "plain"


@pytest.mark.usefixtures("no_compiler")
def test_a_path_that_was_named_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="prefer='compiled' cannot be had here: no C compiler"):
        backend("cpu", "compiled")
    monkeypatch.setenv(VARIABLE, "compiled")
    with pytest.raises(SpecError, match="ASSAY_KERNELS='compiled' cannot be had here"):
        backend("cpu")


@pytest.mark.parametrize(
    ("device", "named", "message"),
    [
        ("cpu", "fast", "ASSAY_KERNELS='fast' is no path of the kernels: plain, compiled, triton are"),
        ("cuda", "compiled", "ASSAY_KERNELS='compiled' runs on cpu and the tensors are on cuda"),
        ("cpu", "triton", "ASSAY_KERNELS='triton' runs on cuda and the tensors are on cpu"),
    ],
)
def test_a_name_that_makes_no_sense_is_refused(
    device: str, named: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, named)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SpecError, match=message):
        backend(device)
