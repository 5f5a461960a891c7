"""The library is built once for a machine, survives races and damage, and agrees whatever instructions it may use."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from assay.dictionaries.kernels import building
from assay.dictionaries.kernels.building import CannotCompile, find_compiler, library
from assay.dictionaries.kernels.compiled import Compiled
from assay.dictionaries.kernels.plain import Plain


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    try:
        find_compiler()
    except CannotCompile as error:
        pytest.skip(str(error))
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    library.cache_clear()
    yield
    library.cache_clear()


def built(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "home" / "kernels").iterdir())


def test_it_is_built_once(tmp_path: Path) -> None:
    library()
    (path,) = built(tmp_path)
    first = path.stat().st_mtime_ns, path.stat().st_ino
    library.cache_clear()
    library()
    assert built(tmp_path) == [path]
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == first


def test_a_damaged_library_is_built_again(tmp_path: Path) -> None:
    name = f"{building._digest(find_compiler())}.so"
    path = tmp_path / "home" / "kernels" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a library")
    assert library().assay_version() == building.VERSION
    assert path.stat().st_size > 1000


def test_another_processor_or_compiler_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = find_compiler()
    here = building._digest(compiler)
    assert building._digest([*compiler, "-O1"]) != here
    monkeypatch.setattr(building, "_processor", lambda: "another")
    assert building._digest(compiler) != here


def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    # Building needs no PyTorch, whose import takes longer than the build: a stand-in, so that the two do meet.
    code = "import sys, types; sys.modules['torch'] = types.ModuleType('torch')\n"
    code += "from assay.dictionaries.kernels.building import library; print(library().assay_version())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in processes] == [str(building.VERSION)] * 2
    assert len(built(tmp_path)) == 1


def test_a_home_that_cannot_be_written_to_costs_only_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "file"))
    assert library().assay_version() == building.VERSION


def test_a_source_that_is_refused_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "broken.c"
    source.write_text("int assay_version(void) { return nothing_of_that_name; }")
    monkeypatch.setattr(building, "SOURCE", source)
    with pytest.raises(CannotCompile, match=r"could not build the kernels: [\s\S]*nothing_of_that_name"):
        library()
    assert built(tmp_path) == []


def test_a_compiler_that_is_not_there_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler --flag")
    assert "no-such-compiler" not in find_compiler()[0]
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CannotCompile, match="apt install gcc"):
        find_compiler()


@pytest.mark.parametrize("flags", [("-mno-avx512f",), ("-mno-avx", "-mno-avx512f"), ("-O0",)], ids=" ".join)
def test_other_instructions_give_the_same(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    if platform.machine() not in ("x86_64", "AMD64") and flags != ("-O0",):
        pytest.skip("these flags are of x86")
    monkeypatch.setattr(building, "_FLAGS", tuple((*each, *flags) for each in building._FLAGS))
    path, plain = Compiled(), Plain()
    generator = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*shape, generator=generator).round() for shape in ((40, 6), (333, 6), (333,)))
    for found, expected in (
        (path.select_rows(x, W, b, 9), plain.select_rows(x, W, b, 9)),
        (path.select_batch(x, W, b, 500)[0], plain.select_batch(x, W, b, 500)[0]),
        (path.select_above(x, W, b, b), plain.select_above(x, W, b, b)),
    ):
        assert torch.equal(found.latents, expected.latents) and torch.equal(found.values, expected.values)
        decoded = path.decode(found, W, x[0].clone())
        assert torch.allclose(decoded, plain.decode(found, W, x[0].clone()), rtol=1e-6, atol=1e-4)
