"""Dictionary files both ways: the peers' own packages write and assay reads, assay writes and they read.

    python benchmarks/dictionary_formats.py [--peers sae-lens,...] [--venvs FOLDER] [--golden FOLDER] [--openai FOLDER]

Each peer gets an environment of its own, made by pip the first time. A case is a small random dictionary and a few
rows; the table has the largest absolute difference of latents (z) and of reconstructions (y) between the peer and
assay. A case passes where both are within 1e-5, or 1e-5 of the largest reconstruction where that is above 1. Where a
peer reads a file otherwise than the file's own project does, the row says so, and the page on files explains it.

`--golden` also copies what the peers wrote into a folder, from which the test suite reads it without them. OpenAI's
code is no package: `--openai` is the folder of its `model.py`, from a checkout, and the case is left out without it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))

import torch
from environments import NotInstalled, environment
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from assay.base.artifacts import home
from assay.dictionaries import Card, CrossLayer, Dictionary, Gated, GroupMax, JumpReLU, ReLU, Site, TopK, load

WORKER = Path(__file__).parent / "peers" / "formats_worker.py"
D, F, ROWS, LAYERS = 8, 16, 8, 3
TRANSPOSED = "SAELens multiplies by the affine connection's transpose"
UNREAD = "SAELens transposes W_dec, which lies as it should"
GEMMA_2 = ("google/gemma-scope-2-1b-pt", "gemma_3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A dictionary for a peer to read.

    Attributes:
        name: Names the case.
        dictionary: What is written.
        format: The format it is written in.
        path: Where, below the case's folder.
        told: What the worker is told beside the path.
        differs: Why the peer is known to read it otherwise.
    """

    name: str
    dictionary: Dictionary | CrossLayer
    format: str
    path: str = "it"
    told: dict[str, Any] = field(default_factory=dict)
    differs: str = ""


def made(activation: Any, reads: str = "blocks.3.resid_post", writes: str = "", **more: Any) -> Dictionary:
    """A random dictionary; a transcoder where it writes elsewhere."""
    skip = torch.randn(D, D) if more.pop("skip", False) else None
    centred = more.pop("centred", not writes)
    return Dictionary(
        W_enc=torch.randn(F, D),
        b_enc=torch.randn(F) * 0.3 + more.pop("lift", 0.0),
        W_dec=torch.randn(F, D),
        b_dec=torch.randn(D) * 0.3,
        W_skip=skip,
        activation=activation,
        card=Card(
            reads=(Site(reads, D),),
            writes=(Site(writes, D),) if writes else (),
            model="gpt2",
            centred=centred,
            **more,
        ),
    )


def transcoder(activation: Any, **more: Any) -> Dictionary:
    """A random transcoder of an MLP."""
    return made(activation, reads="blocks.2.mlp.in", writes="blocks.2.mlp.out", **more)


def cross_layer(jump: bool, reads: str, skip: bool = False) -> CrossLayer:
    """A random cross-layer transcoder."""
    layers = []
    for index in range(LAYERS):
        later = LAYERS - index
        bias = torch.cat([torch.randn(D) * 0.3, torch.zeros((later - 1) * D)])
        affine = torch.cat([torch.randn(D, D), torch.zeros((later - 1) * D, D)]) if skip else None
        sites = tuple(Site(f"blocks.{m}.mlp.out", D) for m in range(index, LAYERS))
        layers.append(
            Dictionary(
                W_enc=torch.randn(F, D),
                b_enc=torch.randn(F) * 0.3,
                W_dec=torch.randn(F, later * D),
                b_dec=bias,
                W_skip=affine,
                activation=JumpReLU(threshold=torch.rand(F)) if jump else ReLU(),
                card=Card(reads=(Site(f"blocks.{index}.{reads}", D),), writes=sites),
            )
        )
    return CrossLayer(layers=tuple(layers))


def gated() -> Gated:
    """A random gate."""
    return Gated(log_gain=torch.randn(F) * 0.1, offset=torch.randn(F) * 0.1)


def jump() -> JumpReLU:
    """Random thresholds."""
    return JumpReLU(threshold=torch.rand(F))


def saelens_cases() -> Iterator[Case]:
    """Every architecture that SAELens loads for inference."""
    own = {"told": {"loader": "saelens"}, "format": "saelens"}
    yield Case(name="standard", dictionary=made(ReLU()), **own)
    yield Case(name="standard uncentred", dictionary=made(ReLU(), centred=False), **own)
    for normalisation in ("layer_norm", "constant_norm"):
        yield Case(name=f"standard {normalisation}", dictionary=made(ReLU(), normalisation=normalisation), **own)
    yield Case(name="topk", dictionary=made(TopK(k=4)), **own)
    yield Case(name="jumprelu", dictionary=made(jump()), **own)
    yield Case(name="gated", dictionary=made(gated()), **own)
    yield Case(name="hook_z", dictionary=made(ReLU(), reads="blocks.1.attn.z"), **own)
    for name, activation in (("transcoder", ReLU()), ("jumprelu_transcoder", jump())):
        for skip in (False, True):
            yield Case(name=f"{name}{' skip' * skip}", dictionary=transcoder(activation, skip=skip), **own)
    yield from saelens_of_others()


def saelens_of_others() -> Iterator[Case]:
    """Other projects' files, through SAELens's own converters."""

    def told(loader: str, repo: str, name: str) -> dict[str, Any]:
        base = repo.split("/")[1]
        return {"path": f"{base}/{name}", "told": {"loader": loader, "base": base, "repo": repo, "name": name}}

    where = told("gemma_2", "google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82")
    yield Case(name="gemma_2", dictionary=made(jump()), format="gemma-scope", **where)
    where = told("gemma_2_transcoder", "google/gemma-scope-2b-pt-transcoders", "layer_2/width_16k/average_l0_5")
    yield Case(name="gemma_2_transcoder", dictionary=transcoder(jump()), format="gemma-scope", **where)
    where = told("gemma_3", GEMMA_2[0], "resid_post/layer_3_width_16k_l0_small")
    yield Case(name="gemma_3", dictionary=made(jump()), format="gemma-scope-2", **where)
    where = told("gemma_3", GEMMA_2[0], "transcoder/layer_2_width_16k_l0_small")
    yield Case(name="gemma_3 transcoder", dictionary=transcoder(jump()), format="gemma-scope-2", **where)
    where = told("gemma_3", GEMMA_2[0], "transcoder/layer_2_width_16k_l0_small_affine")
    affine = transcoder(jump(), skip=True)
    yield Case(name="gemma_3 affine", dictionary=affine, format="gemma-scope-2", differs=TRANSPOSED, **where)
    where = told("goodfire", "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth")
    yield Case(name="goodfire", dictionary=made(ReLU()), format="goodfire", **where)
    where = told("qwen_scope", "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_4", "layer3.sae.pt")
    yield Case(name="qwen_scope", dictionary=made(TopK(k=4)), format="qwen-scope", **where)
    where = told("llama_scope", "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L3R-8x")
    shared = JumpReLU(threshold=torch.full((F,), 0.4))
    yield Case(name="llama_scope", dictionary=made(shared, centred=False), format="llama-scope", **where)
    for name, activation in (("AutoEncoder", ReLU()), ("TopK", TopK(k=4)), ("Gated", gated()), ("JumpRelu", jump())):
        where = told("dictionary_learning_1", "canrager/lm_sae", f"trainer_{name}")
        yield Case(name=f"d_l {name}", dictionary=made(activation), format="dictionary-learning", **where)
    told_sparsify: dict[str, Any] = {"path": "layers.3", "told": {"loader": "sparsify"}, "differs": UNREAD}
    yield Case(name="sparsify", dictionary=made(TopK(k=4)), format="sparsify", **told_sparsify)


def d_l_cases() -> Iterator[Case]:
    """Every class that assay writes."""
    for activation in (ReLU(), gated(), TopK(k=4), jump()):
        yield Case(name=activation.name, dictionary=made(activation), format="dictionary-learning")


def sparsify_cases() -> Iterator[Case]:
    """Each activation, with and without a skip, as an autoencoder and as a transcoder."""
    for activation in (TopK(k=4), GroupMax(k=4)):
        for skip in (False, True):
            name, shared = f"{activation.name}{' skip' * skip}", {"format": "sparsify"}
            yield Case(name=name, dictionary=made(activation, skip=skip), path="layers.3", **shared)
            made_one = transcoder(activation, skip=skip)
            yield Case(name=f"{name} transcoder", dictionary=made_one, path="layers.2.mlp", **shared)


def circuit_tracer_cases() -> Iterator[Case]:
    """Transcoders, cross-layer transcoders, and Gemma Scope's through its converters."""
    for activation in (ReLU(), jump(), TopK(k=4)):
        for skip in (False, True):
            extra = {"k": 4} if isinstance(activation, TopK) else {}
            lift = 6.0 if extra else 0.0  # its TopK keeps negative values, which no other does: there are none here
            yield Case(
                name=f"{activation.name}{' skip' * skip}",
                dictionary=transcoder(activation, skip=skip, lift=lift),
                format="circuit-tracer",
                told={"loader": "one", "file": "layer_2.safetensors", **extra},
            )
    for named, is_jump in (("clt relu", False), ("clt jumprelu", True)):
        clt = cross_layer(is_jump, "resid_mid")
        yield Case(name=named, dictionary=clt, format="circuit-tracer", told={"loader": "clt"})
    told = {"loader": "gemma-scope"}
    yield Case(name="gemma-scope transcoder", dictionary=transcoder(jump()), format="gemma-scope", told=told)
    affine, told = transcoder(jump(), skip=True), {"loader": "gemma-scope-2"}
    yield Case(name="gemma-scope-2 affine", dictionary=affine, format="gemma-scope-2", told=told)
    clt, told = cross_layer(True, "mlp.in", skip=True), {"loader": "gemma-scope-2-clt"}
    yield Case(name="gemma-scope-2 clt", dictionary=clt, format="gemma-scope-2", told=told)


def openai_cases() -> Iterator[Case]:
    """The two kinds that its loader knows."""
    yield Case(name="relu", dictionary=made(ReLU()), format="openai", path="it.pt")
    yield Case(name="topk", dictionary=made(TopK(k=4), normalisation="layer_norm"), format="openai", path="it.pt")


CASES = {
    "sae-lens": saelens_cases,
    "dictionary-learning": d_l_cases,
    "eai-sparsify": sparsify_cases,
    "circuit-tracer": circuit_tracer_cases,
    "openai": openai_cases,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    peer: str
    direction: str
    name: str
    format: str
    z: float = float("nan")
    y: float = float("nan")
    said: str = ""
    failed: bool = False


def differences(peer: dict[str, torch.Tensor], z: torch.Tensor, y: torch.Tensor) -> tuple[float, float, bool]:
    """The largest absolute differences, and whether they are too large."""
    dz, dy = float((peer["z"] - z).abs().max()), float((peer["y"] - y).abs().max())
    bound = 1e-5 * max(1.0, float(y.abs().max()), float(z.abs().max()))
    return dz, dy, not max(dz, dy) <= bound


def run(python: Path, what: str, peer: str, folder: Path, openai: Path | None) -> None:
    """Run the worker in a peer's environment; its last words are raised where it fails."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    env = {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if peer == "openai":
        env["PYTHONPATH"] = str(openai)
    command = [str(python), str(WORKER), what, peer, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{peer} ({what}): {done.stderr[-2000:]}")


def reading(peer: str, folder: Path) -> Iterator[Row]:
    """What the peer wrote, as assay reads it."""
    for case in sorted(folder.iterdir()):
        held = load_file(case / "io.safetensors")
        with safe_open(case / "io.safetensors", framework="pt") as file:
            found = load(case / file.metadata()["path"])
        name = found.layers[0].card if isinstance(found, CrossLayer) else found.card
        z, y, failed = differences(held, found.encode(held["x"]), found(held["x"]))
        yield Row(
            peer=peer, direction="assay reads", name=case.name, format=name.source["format"], z=z, y=y, failed=failed
        )


def writing(peer: str, python: Path, folder: Path, openai: Path | None) -> Iterator[Row]:
    """What assay wrote, as the peer reads it."""
    cases = list(CASES[peer]())
    rows: list[torch.Tensor] = []
    for number, case in enumerate(cases):
        place = folder / f"{number:02d}"
        place.mkdir(parents=True)
        where = case.dictionary.save(place / case.path, case.format)
        told = {"path": where.relative_to(place).as_posix(), **case.told}
        rows.append(
            torch.randn(ROWS, LAYERS, D) if isinstance(case.dictionary, CrossLayer) else torch.randn(ROWS, D) + 0.3
        )
        save_file({"x": rows[-1]}, place / "x.safetensors")
        (place / "case.json").write_text(json.dumps(told), encoding="utf-8")
    run(python, "read", peer, folder, openai)
    for number, case in enumerate(cases):
        place, shared = folder / f"{number:02d}", {"peer": peer, "direction": f"{peer} reads", "name": case.name}
        if (place / "error.txt").is_file():
            said = (place / "error.txt").read_text("utf-8").splitlines()[0][:160]
            text = f"{case.differs} ({said})" if case.differs else said
            yield Row(**shared, format=case.format, said=text, failed=not case.differs)
            continue
        ours = case.dictionary
        z, y, failed = differences(load_file(place / "out.safetensors"), ours.encode(rows[number]), ours(rows[number]))
        yield Row(**shared, format=case.format, z=z, y=y, said=case.differs, failed=failed != bool(case.differs))


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| direction | case | format | max abs z | max abs y | |", "|---|---|---|---|---|---|"]
    for row in rows:
        said = f"FAILED {row.said}" if row.failed else row.said
        lines.append(
            f"| {row.direction} | {row.peer}: {row.name} | {row.format} | {row.z:.1e} | {row.y:.1e} | {said} |"
        )
    return "\n".join(lines)


def keep_golden(source: Path, target: Path) -> None:
    """Copy what a peer wrote, instead of what was there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def main() -> None:
    """Compare, print the table, and end with 1 where a case failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", default=",".join(CASES), help="which, separated by commas")
    parser.add_argument("--venvs", type=Path, default=home() / "peers", help="where environments are kept")
    parser.add_argument("--golden", type=Path, help="a folder for what the peers write")
    parser.add_argument("--openai", type=Path, help="the folder of OpenAI's model.py")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows: list[Row] = []
    for peer in options.peers.split(","):
        if peer == "openai" and options.openai is None:
            print("openai: left out (--openai names no checkout)", file=sys.stderr)
            continue
        try:
            python = environment("dictionary-learning" if peer == "openai" else peer, options.venvs)
        except NotInstalled as error:
            print(f"{peer}: not installed: {error}", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as folder:
            theirs = Path(folder) / "theirs"
            run(python, "write", peer, theirs, options.openai)
            if options.golden:
                keep_golden(theirs, options.golden / peer)
            rows += reading(peer, theirs)
            rows += writing(peer, python, Path(folder) / "ours", options.openai)
    print(table(rows))
    raise SystemExit(1 if any(row.failed for row in rows) else 0)


if __name__ == "__main__":
    main()
