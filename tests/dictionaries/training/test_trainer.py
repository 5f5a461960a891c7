"""The loop: known features are found, an interrupted run ends in the same bits, bad input leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from assay.base.errors import DamagedFile, NumericalError, SpecError, UnknownSite
from assay.dictionaries import CrossLayer, load
from assay.dictionaries.settings import Training
from assay.dictionaries.training.runs import train
from assay.dictionaries.training.source import Rows
from assay.zoo.features import SITE, Features

SMALL = {"latents": 64, "steps": 30, "batch": 128, "dead_after": 2000}
FAMILIES = ["topk", "batchtopk", "matryoshka", "jumprelu", "l1", "l1-april", "p-anneal", "gated"]


def settings(family: str = "topk", **more) -> Training:
    own = {"k": 4} if family in ("topk", "batchtopk", "matryoshka") else {"sparsity": 1.0}
    return Training(family=family, **(SMALL | own | more))


def features(**more) -> Features:
    return Features(**({"n": 48, "d": 16, "active": 2, "batch": 128} | more))


def weights(trained) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in trained.dictionary.tensors().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_falls_and_the_dictionary_says_what_the_last_step_saw(family):
    data = features()
    trained = train(data, settings(family, steps=300, lr=5e-3), reads=SITE)
    fvu = trained.curves["fvu"]
    assert fvu[-10:].mean() < 0.5 * fvu[:5].mean()
    rows = data.batch(299)[SITE]  # what the last step was given
    error = (trained.dictionary(rows) - rows).square().sum() / (rows - rows.mean(0)).square().sum()
    # one step of the optimiser, and for those with a threshold another way to choose, lie between the two
    assert float(error) == pytest.approx(float(fvu[-1]), rel=0.15)


@pytest.mark.parametrize("family", ["topk", "batchtopk", "jumprelu", "l1", "gated"])
def test_an_interrupted_run_ends_in_the_same_bits(family, tmp_path):
    whole = train(features(), settings(family), reads=SITE)

    def stop(done: int, total: int, message: str = "") -> None:
        if done == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(features(), settings(family), reads=SITE, out=tmp_path, checkpoint_every=5, progress=stop)
    again = train(features(), settings(family), reads=SITE, out=tmp_path, checkpoint_every=5)
    assert again.resumed_at == 15
    for name, array in weights(whole).items():
        assert np.array_equal(array, weights(again)[name]), name
    for name, column in whole.curves.items():
        assert np.array_equal(column, again.curves[name]), name


CHILD = """
import sys, torch
torch.set_num_threads(1)
from assay.dictionaries.settings import Training
from assay.dictionaries.training.runs import train
from assay.zoo.features import SITE, Features
train(Features(n=48, d=16, active=2, batch=128), Training(family="batchtopk", k=4, latents=64, steps=4000, batch=128),
      reads=SITE, out=sys.argv[1], checkpoint_every=3)
"""


def test_a_killed_process_goes_on_to_the_same_bits(tmp_path):
    """SIGKILL at whatever the process is doing, several times; the weights are those of the run that was left alone."""
    asked = Training(family="batchtopk", k=4, latents=64, steps=4000, batch=128)
    child = [sys.executable, "-c", CHILD, str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(3):
        process = subprocess.Popen(child, env=environment)
        before = len(list((tmp_path / "killed").glob("checkpoints/*/state.json")))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if len(list((tmp_path / "killed").glob("checkpoints/*/state.json"))) > min(before, 1):
                time.sleep(0.35)
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed = sorted((tmp_path / "killed" / "checkpoints").glob("*/state.json"))
    assert killed and json.loads(killed[-1].read_text())["step"] < 4000
    data = Features(n=48, d=16, active=2, batch=128)
    again = train(data, asked, reads=SITE, out=tmp_path / "killed", checkpoint_every=3000)
    whole = train(data, asked, reads=SITE)
    assert 0 < again.resumed_at < 4000
    for name, array in weights(whole).items():
        assert np.array_equal(array, weights(again)[name]), name


def test_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path):
    train(features(), settings(steps=20), reads=SITE, out=tmp_path, checkpoint_every=5)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_0000000015", "step_0000000020"]
    newest = tmp_path / "checkpoints" / kept[1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-8] + b"12345678")
    with pytest.warns(UserWarning, match="does not have the hash"):
        again = train(features(), settings(steps=20), reads=SITE, out=tmp_path, checkpoint_every=5)
    assert again.resumed_at == 15
    for place in (tmp_path / "checkpoints").iterdir():
        (place / "state.safetensors").unlink()
    with pytest.warns(UserWarning), pytest.raises(DamagedFile, match="every checkpoint"):
        train(features(), settings(steps=20), reads=SITE, out=tmp_path)


def test_a_folder_of_another_run_is_refused(tmp_path):
    train(features(), settings(steps=5), reads=SITE, out=tmp_path)
    with pytest.raises(SpecError, match="holds a run with other settings"):
        train(features(), settings(steps=5, seed=1), reads=SITE, out=tmp_path)
    with pytest.raises(SpecError, match="holds a run with other data"):
        train(features(seed=1), settings(steps=5), reads=SITE, out=tmp_path)


def test_what_is_written_can_be_read(tmp_path):
    trained = train(features(), settings(steps=5), reads=SITE, out=tmp_path, model="a model")
    read = load(tmp_path / "dictionary")
    assert read.card == trained.dictionary.card
    rows = features().batch(9)[SITE]
    assert torch.equal(read(rows), trained.dictionary(rows))


def two_sites(rows: int = 512) -> Rows:
    stream = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 8, generator=stream)
    y = torch.relu(x @ torch.randn(8, 6, generator=stream)) * 5
    return Rows({"blocks.0.mlp.in": x, "blocks.0.mlp.out": y, "blocks.1.mlp.in": y[:, :].repeat(1, 2)[:, :8],
                 "blocks.1.mlp.out": y.flip(1)}, batch=128)  # fmt: skip


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("family", ["topk", "l1-april", "jumprelu"])
def test_a_transcoder_learns_what_a_site_leads_to(family, skip):
    data = two_sites()
    asked = settings(family, steps=400, lr=5e-3, skip=skip)
    trained = train(data, asked, reads="blocks.0.mlp.in", writes="blocks.0.mlp.out")
    assert trained.dictionary.kind == "transcoder"
    assert (trained.dictionary.W_skip is not None) == skip
    rows = data.batch(0)
    out = trained.dictionary(rows["blocks.0.mlp.in"])
    target = rows["blocks.0.mlp.out"]
    assert float((out - target).square().sum() / (target - target.mean(0)).square().sum()) < 0.35


@pytest.mark.parametrize("family", ["topk", "batchtopk", "l1-april"])
def test_a_crosscoder_reads_and_writes_both_sites(family):
    data = two_sites()
    sites = ["blocks.0.mlp.in", "blocks.0.mlp.out"]
    trained = train(data, settings(family, steps=300, lr=5e-3), reads=sites)
    assert trained.dictionary.kind == "crosscoder"
    assert trained.curves["fvu"][-1] < 0.5 * trained.curves["fvu"][0]
    parts = trained.dictionary.split(trained.dictionary(torch.cat([data.batch(0)[s] for s in sites], dim=1)))
    assert {name: part.shape[1] for name, part in parts.items()} == {"blocks.0.mlp.in": 8, "blocks.0.mlp.out": 6}


@pytest.mark.parametrize("family", ["topk", "batchtopk", "jumprelu", "l1-april"])
def test_a_cross_layer_transcoder_writes_later_layers(family):
    data = two_sites()
    reads, writes = ["blocks.0.mlp.in", "blocks.1.mlp.in"], ["blocks.0.mlp.out", "blocks.1.mlp.out"]
    trained = train(data, settings(family, steps=300, lr=5e-3), reads=reads, writes=writes, cross_layer=True)
    made = trained.dictionary
    assert isinstance(made, CrossLayer) and made.layers[0].W_dec.shape[1] == 12
    rows = data.batch(299)
    for layer, name in zip(made.layers, reads, strict=True):
        assert layer.card.mean_norm == pytest.approx(float(data.batch(0)[name].norm(dim=1).mean()), rel=1e-4)
    out = made(torch.stack([rows[name] for name in reads], dim=1))
    target = torch.stack([rows[name] for name in writes], dim=1)
    error = (out - target).square().sum() / (target - target.mean(0)).square().sum()
    assert float(error) < 0.6 * float(trained.curves["fvu"][0])


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"reads": "blocks.1.resid_post"}, UnknownSite, "have no site"),
        ({"reads": [SITE, SITE]}, SpecError, "named twice"),
    ],
)
def test_bad_requests_write_nothing(asked, error, said, tmp_path):
    with pytest.raises(error, match=said):
        train(features(), settings(steps=5), out=tmp_path / "new", **asked)
    assert not (tmp_path / "new").exists()


def test_rows_that_are_not_finite_are_named(tmp_path):
    rows = torch.randn(256, 8)
    rows[3, 2] = float("nan")
    with pytest.raises(NumericalError, match="NaN"):
        train(Rows({SITE: rows}, batch=128), settings(latents=16, steps=5), reads=SITE, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"family": "l1", "k": 3}, "k means nothing for family 'l1'"),
        ({"family": "topk", "k": 100}, "smaller k"),
        ({"family": "matryoshka", "groups": (0.5, 0.2)}, "add up to 1"),
        ({"family": "matryoshka", "latents": 8, "k": 2, "groups": (0.01, 0.99)}, "each needs one"),
        ({"family": "l1", "sparsity": float("inf")}, "finite"),
        ({"family": "topk", "dead": "resample"}, "dead='aux'"),
        ({"family": "jumprelu", "target_l0": 4.0}, "penalty='target'"),
        ({"family": "topk", "betas": (0.9, 1.0)}, r"\[0, 1\)"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Training(**({"latents": 64} | given))


def test_frozen_parts_stay_as_they_started():
    for frozen, name in (("decoder", "W_dec"), ("encoder", "W_enc")):
        short = train(features(), settings(steps=1, frozen=frozen), reads=SITE).dictionary
        longer = train(features(), settings(steps=20, frozen=frozen), reads=SITE).dictionary
        torch.testing.assert_close(getattr(short, name), getattr(longer, name), rtol=0, atol=0)
        other = "W_enc" if name == "W_dec" else "W_dec"
        assert not torch.allclose(getattr(short, other), getattr(longer, other))
