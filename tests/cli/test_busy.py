"""On a busy machine waiting threads sleep; on a quiet one, and where the user has said, nothing is changed."""

from __future__ import annotations

import os

import pytest

from assay.cli.main import _busy, main

POLICY = "OMP_WAIT_POLICY"


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores, and no policy; what a test sets is undone."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setenv(POLICY, "")
    del os.environ[POLICY]


def load(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (value, 100.0 - value, 100.0 - value), raising=False)


@pytest.mark.parametrize(("value", "busy"), [(0.0, False), (3.0, False), (3.1, True), (40.0, True)])
def test_the_last_minute_decides(monkeypatch: pytest.MonkeyPatch, value: float, busy: bool) -> None:
    load(monkeypatch, value)
    assert _busy() is busy
    assert main(["--version"]) == 0
    assert os.environ.get(POLICY) == ("PASSIVE" if busy else None)


def test_what_the_user_said_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, 40.0)
    monkeypatch.setenv(POLICY, "ACTIVE")
    assert main(["--version"]) == 0
    assert os.environ[POLICY] == "ACTIVE"


def test_unknown_cores_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    load(monkeypatch, 0.8)
    assert _busy()


@pytest.mark.parametrize("keeps", ["none", "unreadable"])
def test_a_system_without_the_figure_is_not_busy(monkeypatch: pytest.MonkeyPatch, keeps: str) -> None:
    def unreadable() -> tuple[float, float, float]:
        raise OSError("no load average")

    if keeps == "none":
        monkeypatch.delattr(os, "getloadavg", raising=False)
    else:
        monkeypatch.setattr(os, "getloadavg", unreadable, raising=False)
    assert main(["--version"]) == 0
    assert POLICY not in os.environ
