"""One source feeds many dictionaries; each is what it would be alone, and goes on from where it stopped."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from assay.base.errors import MissingExtra, SpecError
from assay.dictionaries import load
from assay.dictionaries.settings import Training
from assay.dictionaries.training.runs import Wanted, train, train_many
from assay.zoo.features import SITE, Features

WANTED = {
    "small": Wanted(settings=Training(family="topk", k=2, latents=32, steps=20, batch=128), reads=SITE),
    "large": Wanted(settings=Training(family="batchtopk", k=4, latents=64, steps=30, batch=128), reads=SITE),
}


def features() -> Features:
    return Features(n=48, d=16, active=2, batch=128)


def same(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors().values(), two.tensors().values(), strict=True))


def test_each_is_what_it_would_be_alone(tmp_path):
    read = []

    class Counted(Features):
        def batch(self, step):
            read.append(step)
            return super().batch(step)

    found = train_many(Counted(n=48, d=16, active=2, batch=128), WANTED, out=tmp_path)
    assert read[len(WANTED) :] == list(range(30))  # once a step, after the first look of each
    for name, wanted in WANTED.items():
        alone = train(features(), wanted.settings, reads=SITE)
        assert same(found[name].dictionary, alone.dictionary)
        assert same(load(tmp_path / name / "dictionary"), alone.dictionary)
        assert found[name].steps == wanted.settings.steps


def test_all_go_on_together(tmp_path):
    def stop(done: int, total: int, message: str = "") -> None:
        assert total == 50
        if done == 24:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train_many(features(), WANTED, out=tmp_path, checkpoint_every=5, progress=stop)
    again = train_many(features(), WANTED, out=tmp_path, checkpoint_every=5)
    assert {name: one.resumed_at for name, one in again.items()} == {"small": 10, "large": 10}
    whole = train_many(features(), WANTED)
    assert all(same(again[name].dictionary, whole[name].dictionary) for name in WANTED)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden"])
def test_a_name_that_is_no_folder_is_refused(name):
    with pytest.raises(SpecError, match="cannot name a dictionary"):
        train_many(features(), {name: WANTED["small"]})


def test_nothing_wanted_is_refused():
    with pytest.raises(SpecError, match="at least one"):
        train_many(features(), {})


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_curves_are_shown_where_they_are_asked_for(name, tmp_path, monkeypatch):
    if importlib.util.find_spec(name) is None:
        with pytest.raises(MissingExtra, match=f"needs the package .{name}"):
            train(features(), WANTED["small"].settings, reads=SITE, log=name)
        return
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    train_many(features(), {"shown": WANTED["small"]}, log=name)
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"squared_error" in content for content in kept)
