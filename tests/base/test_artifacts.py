"""Files are whole or absent, and what comes back is what was kept."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from assay.base.artifacts import (
    StepStore,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    home,
    read_parquet,
    read_safetensors,
    replacing,
    step_value,
    write_parquet,
    write_safetensors,
)
from assay.base.errors import DamagedFile, OutputError


def refuse(text: str) -> None:
    pytest.fail(f"the store warned: {text}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ASSAY_HOME": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/assay"),
        ({"ASSAY_HOME": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/assay"),
        ({"ASSAY_HOME": "~/kept", "HOME": "/c"}, "/c/kept"),
    ],
)
def test_home(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ASSAY_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert home() == Path(expected)


def test_text_and_json_are_written_as_they_are(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "new" / "a.txt", "é\r\n ")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "é\r\n ".encode()
    atomic_write_json(tmp_path / "a.json", {"é": [1, 0.1]})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"é": [1, 0.1]}
    with pytest.raises(ValueError, match="JSON"):
        atomic_write_json(tmp_path / "b.json", math.nan)
    assert not (tmp_path / "b.json").exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write_text(path, "old")
    with pytest.raises(RuntimeError, match="half way"), replacing(path) as temporary:
        temporary.write_text("ne")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_flush_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems say that they are full only when asked to put the data on the disk."""
    path = tmp_path / "a.txt"
    atomic_write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="no room left to write"):
        atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_nothing_half_written(small_disk: Path) -> None:
    big = np.zeros(100_000)
    with pytest.raises(OutputError, match="no room left"):
        atomic_write_bytes(small_disk / "a", big.tobytes())
    with pytest.raises(OutputError, match="no room left"):
        write_safetensors(small_disk / "a.safetensors", {"big": big})
    with pytest.raises(OutputError, match="no room left"):
        write_parquet(small_disk / "a.parquet", {"big": np.random.default_rng(0).normal(size=100_000)})
    with pytest.raises(OutputError, match="no room left"):
        StepStore(small_disk / "steps", refuse).put("ab", {"big": big})
    assert [path for path in small_disk.rglob("*") if path.is_file()] == []


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="in the way"):
        atomic_write_text(tmp_path / "file" / "a.txt", "a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="in the way"):
        atomic_write_text(tmp_path / "folder", "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


AWKWARD = {
    "transposed": np.arange(6).reshape(2, 3).T,
    "strided": np.arange(10.0)[::3],
    "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "big_endian": np.arange(3, dtype=">i4"),
    "scalar": np.array(2.5),
    "empty": np.zeros((0, 4), dtype=np.float32),
    "flags": np.array([True, False]),
    "half": np.array([1.5, np.inf, np.nan], dtype=np.float16),
    "complex": np.array([1 + 2j], dtype=np.complex64),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_arrays_come_back_whatever_their_layout(name: str, tmp_path: Path) -> None:
    array = AWKWARD[name]
    write_safetensors(tmp_path / "a.safetensors", {name: array})
    back = read_safetensors(tmp_path / "a.safetensors")[name]
    assert back.shape == array.shape
    assert back.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(back, array)


def test_arrays_of_objects_and_text_are_refused(tmp_path: Path) -> None:
    for array in (np.array([object()]), np.array(["a"])):
        with pytest.raises(OutputError, match="'bad' has dtype"):
            write_safetensors(tmp_path / "a.safetensors", {"bad": array})
    assert list(tmp_path.iterdir()) == []


def test_tables_come_back(tmp_path: Path) -> None:
    columns = {"token": ["a", None, "é"], "value": [1.5, 2.0, None], "n": [1, 2, 3], "yes": [True, False, None]}
    write_parquet(tmp_path / "a.parquet", columns)
    assert read_parquet(tmp_path / "a.parquet") == columns
    write_parquet(tmp_path / "b.parquet", {"x": np.arange(3)})
    assert read_parquet(tmp_path / "b.parquet") == {"x": [0, 1, 2]}


def test_columns_of_different_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"differ in length: \{'a': 1, 'b': 2\}"):
        write_parquet(tmp_path / "a.parquet", {"a": [1], "b": [1, 2]})
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_said_to_be(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"a": [1]})
    write_safetensors(tmp_path / "a.safetensors", {"a": np.arange(9)})
    for path, read in ((tmp_path / "a.parquet", read_parquet), (tmp_path / "a.safetensors", read_safetensors)):
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(DamagedFile, match="not a readable"):
            read(path)
        path.unlink()
        with pytest.raises(FileNotFoundError):
            read(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ARRAYS = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int64, np.bool_, np.uint8]), hnp.array_shapes(min_dims=0, min_side=0)
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(value=st.dictionaries(NAMES, JSON | ARRAYS, max_size=4))
def test_the_store_gives_back_what_it_was_given(
    value: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = StepStore(tmp_path_factory.mktemp("steps"), refuse)
    store.put("ab12", value)
    back = store.get("ab12")
    assert back is not None
    fresh = step_value(value)
    assert back.keys() == fresh.keys() == value.keys()
    for name, item in value.items():
        if isinstance(item, np.ndarray):
            assert back[name].dtype == fresh[name].dtype == item.dtype
            np.testing.assert_array_equal(back[name], item)
            np.testing.assert_array_equal(fresh[name], item)
        else:
            assert back[name] == fresh[name] == item


def test_json_and_numpy_meet_alike_fresh_and_kept(tmp_path: Path) -> None:
    value = {"pair": (1, 2), "nan": math.nan, "size": np.float32(2.5), "nested": {"a": np.int64(3), "b": np.arange(2)}}
    store = StepStore(tmp_path, refuse)
    store.put("ab", value)
    for back in (store.get("ab"), step_value(value)):
        assert back is not None
        assert (back["pair"], back["nested"]) == ([1, 2], {"a": 3, "b": [0, 1]})
        assert math.isnan(back["nan"])
        assert (back["size"].shape, back["size"].dtype) == ((), np.dtype("float32"))


def test_what_is_no_json_is_refused_by_name(tmp_path: Path) -> None:
    store = StepStore(tmp_path, refuse)
    with pytest.raises(OutputError, match="a step returned 'bad' of type set"):
        store.put("ab", {"bad": {1, 2}})
    assert list(tmp_path.rglob("*")) == []


def entry(store: StepStore) -> bytes:
    store.put("ab12", {"array": np.arange(5), "text": "token"})
    return store.path("ab12").read_bytes()


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    """Whichever byte is altered, the entry is gone, with a warning: in the header, its checksum, or the data."""
    told: list[str] = []
    store = StepStore(tmp_path, told.append)
    whole = entry(store)
    for place in range(len(whole)):
        store.path("ab12").write_bytes(whole[:place] + bytes([whole[place] ^ 0x01]) + whole[place + 1 :])
        assert store.get("ab12") is None, f"byte {place} of {whole!r}"
        assert "discarded a damaged cache entry" in told.pop()
        assert not told
        assert not store.path("ab12").exists()


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    told: list[str] = []
    store = StepStore(tmp_path, told.append)
    whole = entry(store)
    for length in range(len(whole)):
        store.path("ab12").write_bytes(whole[:length])
        assert not store.has("ab12")
        assert len(told) == length + 1


def test_by_default_damage_is_a_warning(tmp_path: Path) -> None:
    store = StepStore(tmp_path)
    entry(store)
    store.path("ab12").write_bytes(b"")
    with pytest.warns(UserWarning, match="discarded a damaged cache entry"):
        assert store.get("ab12") is None


def test_an_entry_of_another_format_is_discarded(tmp_path: Path) -> None:
    told: list[str] = []
    store = StepStore(tmp_path, told.append)
    write_safetensors(store.path("ab12"), {"a": np.arange(3)}, {"format": "assay-step/0"})
    assert store.get("ab12") is None
    assert "assay-step/0" in told[0]


def test_leftovers_of_killed_writers_go_after_an_hour(tmp_path: Path) -> None:
    store = StepStore(tmp_path, refuse)
    entry(store)
    old, young = (store.path("ab12").parent / name for name in (".tmp-1-old", ".tmp-2-young"))
    for path in (old, young):
        path.write_bytes(b"half")
    two_hours_ago = time.time() - 7200
    os.utime(old, (two_hours_ago, two_hours_ago))
    store.sweep()
    assert not old.exists()
    assert young.exists()
    assert store.has("ab12")


WRITER = """
import sys, numpy as np
from pathlib import Path
from assay.base.artifacts import StepStore
store = StepStore(Path(sys.argv[1]))
print("ready", flush=True)
for turn in range(100_000):
    store.put(f"ab{turn % 3}", {"array": np.full(20_000, turn % 7), "turn": turn % 7})
"""


def writer(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def check(store: StepStore) -> int:
    """The number of entries there are; each must be whole and agree with itself."""
    entries = [value for key in ("ab0", "ab1", "ab2") if (value := store.get(key)) is not None]
    for value in entries:
        assert set(value["array"].tolist()) == {value["turn"]}
    return len(entries)


def test_writers_killed_at_any_moment_leave_whole_entries(tmp_path: Path) -> None:
    store = StepStore(tmp_path, refuse)
    for attempt in range(5):
        process = writer(tmp_path)
        time.sleep(0.02 + 0.011 * attempt)
        process.kill()
        process.communicate()
        check(store)
    assert check(store) == 3


def test_two_writers_of_one_key_do_no_harm_to_a_reader(tmp_path: Path) -> None:
    store = StepStore(tmp_path, refuse)
    processes = [writer(tmp_path), writer(tmp_path)]
    try:
        seen = [check(store) for _ in range(100)]
        assert [process.poll() for process in processes] == [None, None]  # neither stumbled over the other
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert seen[-1] == 3
    assert check(store) == 3


def test_a_home_of_nobody_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_HOME", "~nobody-of-that-name/x")
    with pytest.raises(OutputError, match="ASSAY_HOME: '~nobody-of-that-name/x' begins with the home folder"):
        home()
