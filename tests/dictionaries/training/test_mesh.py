"""Two processes train what one trains."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch

from assay.base.errors import SpecError
from assay.dictionaries import load
from assay.dictionaries.settings import Training
from assay.dictionaries.training.mesh import Mesh, mesh
from assay.dictionaries.training.runs import train
from assay.zoo.features import SITE, Features

ASKED = {
    asked.family: asked
    for asked in (
        Training(family="topk", k=3, latents=64, steps=40, batch=128, lr=3e-3, dead_after=500),
        Training(family="batchtopk", k=3, latents=64, steps=40, batch=128, lr=3e-3, dead_after=500),
        Training(
            family="jumprelu",
            penalty="target",
            target_l0=3.0,
            sparsity=1.0,
            threshold=4.0,
            bandwidth=1.0,
            latents=64,
            steps=40,
            batch=128,
            lr=3e-3,
            dead="resample",
            resample_every=10,
            dead_after=128,
        ),
        Training(family="gated", sparsity=1.0, latents=64, steps=40, batch=128, lr=3e-3, dead="none", dead_after=500),
        Training(family="p-anneal", sparsity=1.0, latents=64, steps=40, batch=128, lr=3e-3, dead="none"),
    )
}
CHILD = """
import json, sys, torch
torch.set_num_threads(1)
from assay.dictionaries.settings import Training
from assay.dictionaries.training.runs import train
from assay.zoo.features import SITE, Features

for job in json.loads(sys.argv[1]):
    def stop(done, total, message=""):
        if done == job["until"]:
            raise InterruptedError
    try:
        train(Features(n=48, d=16, active=2, batch=128), Training(**job["asked"]), reads=SITE, out=job["out"],
              share_latents=job["latent"], checkpoint_every=10, progress=stop)
    except InterruptedError:
        pass
"""


def in_two_processes(jobs: list[dict]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-c", CHILD, json.dumps(jobs)]
    children = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for child in children:
        _, said = child.communicate(timeout=300)
        assert child.returncode == 0, said


def job(asked: Training, out: Path, latent: int, until: int = 0) -> dict:
    return {"asked": asked.model_dump(exclude_unset=True), "out": str(out), "latent": latent, "until": until}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every family trained by two processes that share rows, and by two that share latents; one of them cut short."""
    place = tmp_path_factory.mktemp("mesh")
    jobs = [job(asked, place / f"{family}-{latent}", latent) for latent in (1, 2) for family, asked in ASKED.items()]
    in_two_processes([*jobs, job(ASKED["topk"], place / "cut", 2, until=25)])
    return place


@pytest.mark.xdist_group("mesh")
@pytest.mark.parametrize("latent", [1, 2])
@pytest.mark.parametrize("family", ASKED)
def test_two_processes_have_the_curve_of_one(family, latent, folder):
    data = Features(n=48, d=16, active=2, batch=128)
    alone = train(data, ASKED[family], reads=SITE)
    together = pyarrow.parquet.read_table(folder / f"{family}-{latent}" / "curves.parquet").to_pydict()
    # a pre-activation within rounding of a threshold of 4 may fall on either side: a jump in one number of 8192
    jump = 1e-2 if family == "jumprelu" else 1e-3
    off = np.abs(np.asarray(together["squared_error"]) / alone.curves["squared_error"] - 1)
    assert np.median(off) < 1e-4 and off.max() < jump
    np.testing.assert_allclose(together["penalty"], alone.curves["penalty"], rtol=jump, atol=1e-6)
    np.testing.assert_allclose(together["l0"], alone.curves["l0"], rtol=1e-2, atol=1.5 / 128)
    np.testing.assert_allclose(together["dead"], alone.curves["dead"], atol=1 / 64)
    read = load(folder / f"{family}-{latent}" / "dictionary")
    rows = data.batch(100)[SITE]
    assert read.n_latents == 64
    error = (read(rows) - alone.dictionary(rows)).norm() / alone.dictionary(rows).norm()
    assert float(error) < 0.02


@pytest.mark.xdist_group("mesh")
def test_two_processes_go_on_where_they_stopped(folder):
    assert not (folder / "cut" / "dictionary").exists()
    in_two_processes([job(ASKED["topk"], folder / "cut", 2)])
    one, two = (load(folder / name / "dictionary") for name in ("topk-2", "cut"))
    assert all(torch.equal(a, b) for a, b in zip(one.tensors().values(), two.tensors().values(), strict=True))


def test_what_cannot_be_divided_is_refused(monkeypatch):
    with pytest.raises(SpecError, match="65 latents cannot be divided"):
        Mesh(latent=2).share(65)
    with pytest.raises(SpecError, match="3 rows cannot be divided"):
        Mesh(data=2).rows(torch.zeros(3, 1))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SpecError, match="cannot be arranged with 2"):
        mesh(2)
