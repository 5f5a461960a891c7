"""The output folder is checked first, filled last, and never holds half a result."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from assay.base.errors import OutputError
from assay.studies import output
from assay.studies.output import check_writable, write_folder

FILES: dict[str, bytes | Path] = {"artifacts/a.safetensors": b"a" * 100, "report.html": b"<html>", "study.json": b"{}"}


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", what="the folder")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").mkdir()
    check_writable(tmp_path / "kept", what="the folder")
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"the folder '.*file/below' cannot be used: '.*file' is a file"):
        check_writable(tmp_path / "file" / "below", what="the folder")


def test_a_dangling_link_is_said(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    with pytest.raises(OutputError, match="link"):
        check_writable(tmp_path / "link", what="the folder")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="not allowed to write"):
            check_writable(tmp_path / "out", what="the folder")
    finally:
        tmp_path.chmod(0o700)


def test_a_read_only_disk_is_said(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OutputError, match="not allowed to write"):
        check_writable(small_disk / "out", what="the folder")


def test_a_full_disk_is_said_before_anything_runs(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(b"x" * (1_500_000))
    with pytest.raises(OutputError, match="bytes of free disk"):
        check_writable(small_disk / "out", what="the folder")
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_a_disk_that_fills_leaves_no_new_folder(small_disk: Path) -> None:
    check_writable(small_disk / "out", what="the folder")
    with pytest.raises(OutputError, match="no room left"):
        write_folder(small_disk / "out", {"report.html": b"r" * 1000, "artifacts/big.safetensors": b"x" * 3_000_000})
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_leaves_the_folder_that_was_there(small_disk: Path) -> None:
    write_folder(small_disk / "out", FILES)
    before = content(small_disk)
    with pytest.raises(OutputError, match="no room left"):
        write_folder(small_disk / "out", {"report.html": b"new", "artifacts/big.safetensors": b"x" * 3_000_000})
    assert content(small_disk) == before


def test_the_folder_may_be_a_disk_of_its_own(small_disk: Path) -> None:
    write_folder(small_disk, FILES)
    assert content(small_disk) == FILES


def test_new_and_old_folders_get_the_same(tmp_path: Path) -> None:
    source = tmp_path / "blob"
    source.write_bytes(b"blob")
    files = {**FILES, "artifacts/b.parquet": source}
    write_folder(tmp_path / "new" / "out", files)
    (tmp_path / "old").mkdir()
    write_folder(tmp_path / "old", files)
    assert content(tmp_path / "new" / "out") == content(tmp_path / "old") == {**FILES, "artifacts/b.parquet": b"blob"}


def test_the_users_files_stay_and_stale_artifacts_go(tmp_path: Path) -> None:
    listed = {"artifacts": {"old": {"file": "artifacts/old.safetensors"}, "evil": {"file": "../mine.txt"}}}
    first = {"artifacts/old.safetensors": b"old", "study.json": json.dumps(listed).encode(), "report.html": b"1"}
    write_folder(tmp_path / "out", first)
    (tmp_path / "mine.txt").write_text("outside")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "artifacts" / "notes.txt").write_text("mine too")
    write_folder(tmp_path / "out", FILES)
    assert content(tmp_path / "out") == {**FILES, "notes.txt": b"mine", "artifacts/notes.txt": b"mine too"}
    assert (tmp_path / "mine.txt").exists()


def test_a_folder_that_appears_meanwhile_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes that finish together, the second finds the folder that the first renamed into place."""
    really = output._fill

    def another_finishes_first(target: Path, what: bytes | Path) -> None:
        really(target, what)
        (tmp_path / "out" / "artifacts").mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / "study.json").write_text("theirs")

    monkeypatch.setattr(output, "_fill", another_finishes_first)
    write_folder(tmp_path / "out", FILES)
    assert content(tmp_path) == {f"out/{name}": data for name, data in FILES.items()}


def test_stages_of_killed_processes_go_after_an_hour(tmp_path: Path) -> None:
    old, young = (tmp_path / "out" / f".assay-stage-out-{i}-{'a' * 12}" for i in (1, 2))
    others = [
        tmp_path / "out" / name for name in (".assay-notes", ".assay-stage-other-1-" + "a" * 12, ".assay-stage-out")
    ]
    for stage in (old, young, *others):
        stage.mkdir(parents=True)
        (stage / "half").write_text("half")
    two_hours_ago = time.time() - 7200
    for stage in (old, *others):
        os.utime(stage, (two_hours_ago, two_hours_ago))
    write_folder(tmp_path / "out", FILES)
    assert not old.exists()
    assert young.exists()
    assert all(other.exists() for other in others), "what assay did not stage for this folder is not touched"


def test_nothing_is_replaced_when_one_file_cannot_be(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", FILES)
    before = content(tmp_path)
    last = list(FILES)[-1]
    (tmp_path / "out" / last).unlink()
    (tmp_path / "out" / last).mkdir()
    with pytest.raises(OutputError, match="is a folder, and a file has to go there"):
        write_folder(tmp_path / "out", dict.fromkeys(FILES, b"new"))
    assert content(tmp_path) == {name: data for name, data in before.items() if not name.endswith(last)}
