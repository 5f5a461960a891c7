"""Harvests: what is stored is what the model computes, whole or absent, the same bytes however often it was killed."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import assay
from assay.activations import Harvest, Store, Texts, harvest, open_corpus
from assay.activations.shards import Manifest, locked, map_shard, write_shard
from assay.base.errors import Cancelled, DamagedFile, NumericalError, OutputError, SpecError, UnknownSite
from assay.base.moments import Moments
from assay.subjects.tiny import tiny_model

SITES = ["blocks.0.resid_post", "blocks.0.attn.z", "blocks.1.mlp.in"]
SMALL = {"context": 8, "rows": 2, "shard_bytes": 8 * 96 * 2 * 4}  # four rows a shard
CORPUS = Texts([[3 + (7 * d + i) % 60 for i in range(1 + d % 13)] for d in range(60)])
STREAM = [token for ids in CORPUS.documents for token in ids]
# What another process harvests: a module of its own, so that it need not import transformers.
ELSEWHERE = """
import time, torch, assay
from assay.activations import Texts, harvest

torch.set_num_threads(1)

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = torch.nn.Embedding(67, 24, _weight=torch.randn(67, 24, generator=generator))

    def forward(self, input_ids):
        return self.embed(input_ids).cumsum(1)

subject = assay.load(Net().eval())
corpus = Texts([[3 + (7 * d + i) % 60 for i in range(1 + d % 13)] for d in range(60)])
sites = ["module:embed.out", "module:out"]
small = {"context": 8, "rows": 2, "shard_bytes": 8 * 48 * 2 * 4}
"""


@pytest.fixture(scope="module")
def subject() -> Any:
    return assay.load(tiny_model("gpt2"))


@pytest.fixture(scope="module")
def whole(subject: Any, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return harvest(subject, CORPUS, SITES, out=tmp_path_factory.mktemp("whole"), **SMALL)


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def start(code: str, **environment: str) -> subprocess.Popen[bytes]:
    source = Path(assay.__file__).parent.parent
    given = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, "-c", ELSEWHERE + code], env=given)


def here() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(ELSEWHERE, names)
    return names


def test_it_stores_what_the_model_computes(whole: Store, subject: Any) -> None:
    tokens = whole.tokens(np.arange(whole.n))
    assert whole.n == sum(map(len, CORPUS.documents)) and whole.sites == tuple(SITES)
    assert tokens["token"].tolist() == STREAM
    assert tokens["document"].tolist() == [d for d, ids in enumerate(CORPUS.documents) for _ in ids]
    assert tokens["row"].tolist() == [i // 8 for i in range(whole.n)]
    assert tokens["pos"].tolist() == [i % 8 for i in range(whole.n)]
    stream = torch.tensor(STREAM)
    for row in (0, 7, whole.n // 8 - 1):
        run = subject.run(stream[None, 8 * row : 8 * row + 8], capture=SITES)
        stored = whole.rows(np.arange(8 * row, 8 * row + 8))
        for site in SITES:
            expected = run[site][0].flatten(1)
            torch.testing.assert_close(stored[site], expected, rtol=2**-8, atol=1e-5)
            assert stored[site].dtype == torch.float32
        assert whole.context(8 * row + 3).tolist() == stream[8 * row : 8 * row + 8].tolist()


def test_fp32_keeps_every_bit(subject: Any, tmp_path: Path) -> None:
    store = harvest(subject, CORPUS, "blocks.0.resid_post", out=tmp_path, dtype="float32", tokens=32, **SMALL)
    first = torch.tensor(STREAM)[:16].view(2, 8)
    run = subject.run(first, capture="blocks.0.resid_post")
    assert torch.equal(store.rows(np.arange(16))["blocks.0.resid_post"], run["blocks.0.resid_post"].flatten(0, 1))
    assert store.n == 32


def test_other_tools_can_read_the_shards(whole: Store) -> None:
    shard = whole.parts[0][1].shards[0]
    path = whole.folder / shard.name
    mapped = map_shard(path)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(mapped)
        for name in file.keys():
            tensor = file.get_tensor(name)
            bits = (
                tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
            )
            assert np.array_equal(bits, mapped[name])
    assert hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256
    assert path.stat().st_size == shard.bytes


def test_the_manifest_says_what_is_there(whole: Store, subject: Any) -> None:
    said = json.loads((whole.folder / "manifest.json").read_text())
    assert said["complete"] and said["tokens"] == whole.n and said["dtype"] == "bfloat16"
    assert said["request"]["fingerprint"] == subject.fingerprint
    assert said["request"]["rows"]["corpus"]["hash"] == CORPUS.describe()["hash"]
    assert {"python", "assay", "torch", "transformers", "numpy"} <= set(said["versions"])
    for site in SITES:
        rows = whole.rows(np.arange(whole.n), [site])[site]
        norms = rows.double().norm(dim=1)
        assert said["norms"][site]["mean_norm"] == pytest.approx(float(norms.mean()), rel=1e-12)
        assert said["norms"][site]["mean_square_norm"] == pytest.approx(float(norms.square().mean()), rel=1e-12)
        blocks = [Moments.of(block) for block in whole.blocks(site, 100)]
        moments = functools.reduce(Moments.merge, blocks)
        assert moments.n == whole.n
        np.testing.assert_allclose(whole.mean(site), moments.mean, atol=1e-12)


def test_the_same_call_gives_what_is_there(whole: Store, subject: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.folder.iterdir()}
    again = harvest(subject, CORPUS, SITES, out=whole.folder, **SMALL)
    assert again.n == whole.n
    assert {path: path.stat().st_mtime_ns for path in whole.folder.iterdir()} == before


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 100])
def test_as_many_tokens_as_were_asked_for(tokens: int, subject: Any, whole: Store, tmp_path: Path) -> None:
    store = harvest(subject, CORPUS, SITES, out=tmp_path, tokens=tokens, **SMALL)
    assert store.n == tokens
    index = np.arange(tokens)
    for site, values in store.rows(index).items():
        assert torch.equal(values, whole.rows(index)[site])


FILTERED = {**SMALL, "tokens": 130, "max_norm": 3.0, "skip_first": 1}


@pytest.fixture(scope="module")
def filtered(subject: Any, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return harvest(subject, CORPUS, SITES, out=tmp_path_factory.mktemp("filtered"), **FILTERED)


@pytest.mark.parametrize("at", [0, 20, 33, 90, 129])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(at: int, subject: Any, filtered: Store, tmp_path: Path) -> None:
    def stop(done: int, total: int, message: str = "") -> None:
        if done >= at:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        harvest(subject, CORPUS, SITES, out=tmp_path, progress=stop, **FILTERED)
    left = Manifest.read(tmp_path) if (tmp_path / "manifest.json").exists() else None
    assert (left is None) == (at < 33)  # the first shard has some thirty tokens
    assert left is None or (0 < left.tokens < at and not left.complete)
    again = harvest(subject, CORPUS, SITES, out=tmp_path, **FILTERED)
    assert again.n == filtered.n == 130
    assert contents(tmp_path) == contents(filtered.folder)


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    out, names = tmp_path / "killed", here()
    once = harvest(names["subject"], names["corpus"], names["sites"], out=tmp_path / "once", **names["small"])
    process = start(f"harvest(subject, corpus, sites, out={str(out)!r}, progress=lambda *_: time.sleep(0.02), **small)")
    while not (out / "manifest.json").exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(0.07)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    left = Manifest.read(out)
    assert 0 < left.tokens < once.n and not left.complete
    with pytest.raises(SpecError, match=r"has not finished \(\d+ tokens so far\)"):
        Store.open(out)
    (out / ".tmp-1-killed-shard").write_bytes(b"half")
    harvest(names["subject"], names["corpus"], names["sites"], out=out, **names["small"])
    assert contents(out) == contents(tmp_path / "once")


def test_processes_share_the_rows(tmp_path: Path) -> None:
    names, out = here(), tmp_path / "both"
    whole = harvest(names["subject"], names["corpus"], names["sites"], out=tmp_path / "whole", **names["small"])
    code = f"harvest(subject, corpus, sites, out={str(out)!r}, **small)"
    processes = [start(code, RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    assert [process.wait() for process in processes] == [0, 0]
    both = Store.open(out)
    assert both.n == whole.n and both.sites == whole.sites
    tokens = both.tokens(np.arange(both.n))
    first = Store.open(out / "rank-0-of-2").n
    assert (tokens["row"][:first] % 2 == 0).all() and (tokens["row"][first:] % 2 == 1).all()
    order = np.lexsort((tokens["pos"], tokens["row"]))
    for site, values in both.rows(order).items():
        assert torch.equal(values, whole.rows(np.arange(whole.n))[site])
        assert both.norms[site]["mean_norm"] == pytest.approx(whole.norms[site]["mean_norm"], rel=1e-12)
    (out / "rank-1-of-2" / "manifest.json").unlink()
    with pytest.raises(SpecError, match="rank-1-of-2"):
        Store.open(out)


def test_shares_of_tokens_add_up(subject: Any, tmp_path: Path) -> None:
    for rank in range(3):
        part = harvest(subject, CORPUS, SITES, out=tmp_path, tokens=100, rank=rank, world=3, **SMALL)
        assert part.n == (34, 33, 33)[rank]
    assert Store.open(tmp_path).n == 100
    with pytest.raises(SpecError, match="tokens=2 for 3 processes"):
        Harvest(subject, CORPUS, SITES, out=tmp_path, tokens=2, rank=0, world=3, **SMALL)
    with pytest.raises(SpecError, match="rank 3 of 3"):
        Harvest(subject, CORPUS, SITES, out=tmp_path, rank=3, world=3, **SMALL)


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "one bit":
        data[-9] ^= 4
    path.write_bytes(data[:-1] if how == "truncated" else data)
    if how == "gone":
        path.unlink()


@pytest.mark.parametrize("how", ["one bit", "truncated", "gone"])
def test_a_damaged_shard_is_named(how: str, subject: Any, tmp_path: Path) -> None:
    harvest(subject, CORPUS, SITES, out=tmp_path, tokens=80, **SMALL)
    damage(tmp_path / "shard-00001.safetensors", how)
    with pytest.raises(DamagedFile, match=r"shard-00001\.safetensors"):
        Store.open(tmp_path)
    with pytest.raises(DamagedFile, match=r"shard-00001\.safetensors"):
        harvest(subject, CORPUS, SITES, out=tmp_path, tokens=80, **SMALL)  # which is there, and not as it was
    if how == "one bit":
        with pytest.raises(DamagedFile, match=r"shard-00001\.safetensors"):
            Store.open(tmp_path, verify=False).verify()


def test_a_harvest_does_not_go_on_from_a_damaged_shard(subject: Any, tmp_path: Path) -> None:
    def stop(done: int, total: int, message: str = "") -> None:
        if done > 70:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        harvest(subject, CORPUS, SITES, out=tmp_path, progress=stop, **SMALL)
    damage(tmp_path / "shard-00001.safetensors", "one bit")
    with pytest.raises(DamagedFile, match=r"shard-00001\.safetensors"):
        harvest(subject, CORPUS, SITES, out=tmp_path, **SMALL)


def test_an_altered_manifest_is_refused(subject: Any, tmp_path: Path) -> None:
    harvest(subject, CORPUS, SITES, out=tmp_path, tokens=40, **SMALL)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"tokens": 8', '"tokens": 7'))
    with pytest.raises(DamagedFile, match="was altered"):
        Store.open(tmp_path)
    path.write_text("{")
    with pytest.raises(DamagedFile, match="no manifest"):
        Store.open(tmp_path)


def test_two_harvests_never_share_a_folder(subject: Any, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(OutputError, match="another harvest is writing"):
        harvest(subject, CORPUS, SITES, out=tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    harvest(subject, CORPUS, SITES, out=tmp_path, tokens=20, **SMALL)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": 21}, "tokens: 20, now 21"),
        ({"dtype": "float32"}, "dtype: bfloat16, now float32"),
        ({"context": 9}, "rows: "),
    ],
)
def test_another_harvest_is_not_mixed_in(change: dict[str, Any], said: str, subject: Any, tmp_path: Path) -> None:
    harvest(subject, CORPUS, SITES, out=tmp_path, tokens=20, **SMALL)
    before = contents(tmp_path)
    with pytest.raises(SpecError, match=f"holds another harvest .*{said}"):
        harvest(subject, CORPUS, SITES, out=tmp_path, **{"tokens": 20, **SMALL, **change})
    assert contents(tmp_path) == before


def test_a_corpus_that_is_too_short_gives_what_it_has(subject: Any, whole: Store, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=rf"the corpus gave {whole.n} tokens where 9,999 were asked for"):
        store = harvest(subject, CORPUS, SITES, out=tmp_path, tokens=9999, **SMALL)
    assert store.n == whole.n
    assert any("9,999" in note for note in store.notes)


def test_the_norm_filter_is_in_the_manifest(tmp_path: Path) -> None:
    module = tiny_model("gpt2")
    with torch.no_grad():
        module.transformer.wte.weight[9] *= 100
    subject = assay.load(module)
    ids = [[3 + (5 * d + i) % 40 for i in range(8)] for d in range(40)]
    store = harvest(subject, Texts(ids), "embed", out=tmp_path / "all", context=8)
    assert any("max_norm=10" in note for note in store.notes)
    kept = harvest(subject, Texts(ids), "embed", out=tmp_path / "filtered", context=8, max_norm=10.0)
    manifest = kept.parts[0][1]
    assert manifest.dropped() == {"norm": sum(row.count(9) for row in ids)}
    assert kept.n + manifest.dropped()["norm"] == store.n
    assert manifest.thresholds["embed"] == pytest.approx(10 * manifest.seen["embed"]["median_norm"])
    assert 9 not in kept.tokens(np.arange(kept.n))["token"]
    place = int(np.flatnonzero(kept.tokens(np.arange(kept.n))["row"] == 1)[0])
    assert kept.context(place).tolist() == ids[1]  # the row is whole, though 9 is not stored


def test_padding_is_never_stored(subject: Any, tmp_path: Path) -> None:
    store = harvest(subject, CORPUS, SITES, out=tmp_path, layout="document", **SMALL)
    lengths = [min(8, len(ids)) for ids in CORPUS.documents if len(ids) >= 2]
    assert store.n == sum(lengths)
    tokens = store.tokens(np.arange(store.n))
    assert tokens["pos"].tolist() == [p for length in lengths for p in range(length)]


def test_the_plan_says_what_it_takes(subject: Any, whole: Store, tmp_path: Path) -> None:
    plan = Harvest(subject, CORPUS, SITES, out=tmp_path / "new", tokens=160, **SMALL).plan
    assert plan.forwards == 20 and plan.share == 1.0 and plan.done == 0 and not (tmp_path / "new").exists()
    assert plan.sites == {SITES[0]: 32, SITES[1]: 32, SITES[2]: 32}
    store = harvest(subject, CORPUS, SITES, out=tmp_path / "new", tokens=160, **{**SMALL, "shard_bytes": 1 << 20})
    assert plan.bytes is not None
    written = sum(shard.bytes for shard in store.parts[0][1].shards)
    assert plan.bytes <= written <= 1.1 * plan.bytes + 3000  # and its header
    unknown = Harvest(subject, CORPUS, SITES, out=tmp_path / "other", **SMALL).plan
    assert unknown.forwards is unknown.bytes is unknown.seconds is None and unknown.tokens_per_second > 0
    json.dumps(plan.to_dict())


def untouched(tmp_path: Path, call: Callable[[Path], Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_input_leaves_nothing_behind(subject: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(corpus: Any = CORPUS, sites: Any = SITES, **options: Any) -> Callable[[Path], Any]:
        return lambda out: harvest(subject, corpus, sites, out=out, **{**SMALL, **options})

    untouched(tmp_path, made(sites=["blocks.0.resid_pots"]), UnknownSite, "did you mean")
    untouched(tmp_path, made(sites=["blocks.0.attn.pattern"]), SpecError, "no row for each token")
    untouched(tmp_path, made(Texts([])), SpecError, "the corpus has no row of at least 2 tokens")
    untouched(tmp_path, made(Texts([[], [3]])), SpecError, "no row of at least 2 tokens")
    untouched(tmp_path, made(Texts(["text"])), SpecError, "no tokenizer")
    untouched(tmp_path, made(Texts([[999, 3]])), SpecError, "token ids must lie in 0..66")
    untouched(tmp_path, made(context=64), SpecError, "the model's context is 40")
    untouched(tmp_path, made(dtype="float16"), SpecError, "dtype='float16'")
    untouched(tmp_path, made(tokens=0), SpecError, "tokens=0: at least 1")
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"title": "a"}\n')
    untouched(tmp_path, made(open_corpus(lines)), SpecError, "has no field 'text'")
    monkeypatch.setattr("assay.activations.harvesting._free", lambda _: 5000)
    untouched(tmp_path, made(tokens=200), OutputError, r"no room for this harvest: it takes [\d,]+ bytes .*5,000")


def test_what_is_not_finite_stops_it_and_whole_shards_stay(tmp_path: Path) -> None:
    subject = assay.load(tiny_model("gpt2"))
    with torch.no_grad():
        subject.module.transformer.wte.weight[66] = torch.nan
    ids = [[3 + i % 50 for i in range(8)] for _ in range(12)] + [[3, 66]]
    with pytest.raises(NumericalError, match="row 12, position 1"):
        harvest(subject, Texts(ids), "embed", out=tmp_path, **{**SMALL, "shard_bytes": 8 * 32 * 2 * 4})
    assert Manifest.read(tmp_path).tokens == 96 and not Manifest.read(tmp_path).complete


def test_a_filter_that_leaves_nothing_is_told(subject: Any, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="left out by the filter"):
        harvest(subject, CORPUS, SITES, out=tmp_path, skip_first=8, **SMALL)


def test_a_shard_is_the_same_bytes_in_any_order_of_its_tensors(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(5, dtype=torch.int64), "a": torch.ones(3, 1, dtype=torch.bfloat16), "c": torch.ones(2)}
    first = write_shard(tmp_path / "1", tensors, {"x": 1, "y": 2})
    second = write_shard(tmp_path / "2", dict(reversed(tensors.items())), {"y": 2, "x": 1})
    assert first == second and (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    with safe_open(tmp_path / "1", framework="pt") as file:
        assert all(torch.equal(file.get_tensor(name), value) for name, value in tensors.items())


def test_what_is_no_shard_is_told(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    for data in (b"", b"x" * 20, (5).to_bytes(8, "little") + b"[1,2]", (9).to_bytes(8, "little") + b'{"a":{}}'):
        path.write_bytes(data)
        with pytest.raises(DamagedFile, match="shard"):
            map_shard(path)


@pytest.mark.real_model
def test_the_real_model_is_read_halfway(real_subject: Any, tmp_path: Path) -> None:
    import pydoc_data.topics

    texts = Texts(sorted(pydoc_data.topics.topics.values())[:6])
    sites = ["blocks.15.resid_post", "blocks.15.attn.z", "blocks.3.mlp.out"]
    store = harvest(real_subject, texts, sites, out=tmp_path, tokens=120, context=32, rows=4, max_norm=10.0)
    assert store.n == 120 and store.widths == dict.fromkeys(sites, 576)
    manifest = store.parts[0][1]
    assert manifest.dropped()["norm"] >= 4  # the sink at the beginning of each row
    tokens = store.tokens(np.arange(120))
    assert not (tokens["pos"] == 0).any()
    row = torch.from_numpy(store.context(40))[None]
    run = real_subject.run(row, capture=sites)
    for site in sites:
        stored = store.rows(np.array([40]))[site][0]
        torch.testing.assert_close(stored, run[site][0, int(tokens["pos"][40])].flatten(), rtol=2**-7, atol=1e-3)
