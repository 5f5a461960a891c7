"""An eraser as a value: its edits do to a model what it does to rows, and its file gives it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import assay
from assay import ProjectOut
from assay.base.errors import DamagedFile, NumericalError, SpecError
from assay.directions import Origin
from assay.directions.erasure import Eraser, inlp, leace, mean_projection

SITE = "blocks.1.resid_post"
IDS = torch.tensor([[5, 17, 40, 9, 77, 30, 21], [8, 3, 90, 14, 61, 7, 11]])


def rows(n: int = 400, d: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + y[:, None] * rng.standard_normal(d) * 3 + 1, y


@pytest.mark.parametrize("make", [leace, mean_projection, lambda x, y: inlp(x, y, rounds=3).eraser])
def test_its_edits_do_what_it_does_to_rows(tiny_subject: Any, make: Any) -> None:
    eraser = make(*rows())
    before = tiny_subject.run(IDS, capture=SITE)[SITE].double().numpy()
    after = tiny_subject.run(IDS, capture=SITE, edits=eraser.edits(site=SITE))[SITE].double().numpy()
    assert after == pytest.approx(eraser(before), abs=1e-4)
    one = tiny_subject.run(IDS, capture=SITE, edits=eraser.edits(site=SITE, positions=[2]))[SITE].double().numpy()
    assert one[:, 2] == pytest.approx(eraser(before)[:, 2], abs=1e-4)
    assert np.array_equal(one[:, 3], before[:, 3].astype(np.float32))


def test_orthogonal_erasers_are_data_and_oblique_ones_code() -> None:
    assert not any(isinstance(edit, assay.Apply) for edit in mean_projection(*rows()).edits(site=SITE))
    assert [type(edit) for edit in leace(*rows()).edits(site=SITE)] == [assay.Apply]
    centred = Eraser(site=SITE, read=np.eye(32)[:1], write=np.eye(32)[:1], mean=np.zeros(32))
    assert [type(edit) for edit in centred.edits()] == [ProjectOut]
    assert Eraser(site=SITE, read=np.zeros((0, 4)), write=np.zeros((0, 4)), mean=np.ones(4)).edits() == []


def test_a_file_gives_it_back(tmp_path: Path) -> None:
    origin = Origin(method="?", data="d" * 32, train=(0, 2), test=(1,), seed=3)
    eraser = leace(*rows(), site=SITE, origin=origin)
    eraser.save(tmp_path / "eraser.safetensors")
    back = Eraser.load(tmp_path / "eraser.safetensors")
    assert np.array_equal(back.read, eraser.read) and np.array_equal(back.write, eraser.write)
    assert (back.site, back.origin) == (SITE, eraser.origin)
    assert back.origin.method == "LEACE" and back.origin.train == (0, 2)
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(DamagedFile, match="is no eraser"):
        Eraser.load(tmp_path / "other")


def test_another_subject_or_a_wrong_shape_is_refused(tiny_subject: Any) -> None:
    foreign = leace(*rows(), site=SITE, origin=Origin(method="?", subject="0" * 64))
    with pytest.raises(SpecError, match="fit it again"):
        foreign.check(tiny_subject)
    with pytest.raises(SpecError, match="has 32"):
        mean_projection(*rows(d=8), site=SITE).check(tiny_subject)
    with pytest.raises(SpecError, match="fitted on 8 numbers"):
        mean_projection(*rows(d=8))(np.zeros((3, 9)))
    with pytest.raises(NumericalError, match="erasing twice would not be once"):
        Eraser(site=SITE, read=np.eye(3)[:1], write=2 * np.eye(3)[:1], mean=np.zeros(3))
    with pytest.raises(NumericalError, match="not finite"):
        Eraser(site=SITE, read=np.eye(3)[:1], write=np.eye(3)[:1], mean=np.full(3, np.nan))


def test_inlp_projects_out_all_weights_and_stops_at_the_majority() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(1200) % 3
    x = rng.standard_normal((1200, 10)) + 4 * np.eye(10)[y]
    found = inlp(x, y, seed=1)
    q = found.eraser.read
    assert np.abs(q @ q.T - np.eye(len(q))).max() < 1e-10
    assert found.eraser.orthogonal and found.eraser.rank >= 2
    assert found.stopped and found.accuracies[-1] <= found.majority < found.accuracies[0]
    assert inlp(x, y, seed=1).accuracies == found.accuracies
    short = inlp(x, y, rounds=1)
    assert not short.stopped and short.eraser.rank == 2  # three rows of weights that sum to nothing
    with pytest.raises(SpecError, match=r"held_out is 1\.5"):
        inlp(x, y, held_out=1.5)
