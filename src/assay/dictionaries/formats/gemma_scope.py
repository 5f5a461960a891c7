"""Gemma Scope's files for Gemma 2: `params.npz` with `W_enc [d, latent]`, `W_dec`, `b_enc`, `b_dec`, `threshold`.

JumpReLU, the decoder bias is not subtracted. Which site they are for is in the path alone: the collection's name
(`gemma-scope-2b-pt-res`, `-mlp`, `-att`, `-transcoders`) and `layer_N`. Attention dictionaries read the heads' `z` side
by side, as wide as their tensors say. The transcoders read the norm's output before its gain: `sites.after_gain`.
A dictionary of embeddings was trained on embeddings before Gemma multiplies them by sqrt(d); that factor is folded.
"""

from __future__ import annotations

import math
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from assay.base.artifacts import replacing
from assay.base.errors import DamagedFile, SpecError
from assay.dictionaries.activations import JumpReLU, ReLU
from assay.dictionaries.dictionary import Card, Dictionary
from assay.dictionaries.formats.format import Format, check_shapes, plain, take
from assay.dictionaries.formats.sites import cannot_hold, card_sites, centred, refuse_normalised, single

_FILE = "params.npz"
_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_COLLECTION = re.compile(r"gemma-scope-(?P<size>\d+b)-(?P<tuned>pt|it)-(?P<kind>res|mlp|att|transcoders)")
_SITES = {"res": "resid_post", "mlp": "mlp.out", "att": "attn.z", "transcoders": "ln2.hook_normalized"}


def _file(path: Path) -> Path:
    return path / _FILE if path.is_dir() else path


def _recognises(path: Path) -> bool:
    file = _file(path)
    if file.suffix != ".npz" or not file.is_file():
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            return {f"{name}.npy" for name in _NAMES} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return path.name == _FILE or path.is_dir()  # named like one and damaged: reading it says so


def _read(path: Path, site: str | None = None, writes: str | None = None) -> Dictionary:
    """Read one.

    Args:
        path: The folder of `params.npz`, or the file.
        site: Where it reads, where the path does not say.
        writes: Where it writes, if elsewhere.
    """
    file = _file(path)
    arrays = _arrays(file)
    found = take({name: torch.from_numpy(array) for name, array in arrays.items()}, _NAMES, where=file)
    shapes = {"W_enc": "d_in latents", "W_dec": "latents d_out", "b_enc": "latents", "b_dec": "d_out"}
    sizes = check_shapes(found, shapes | {"threshold": "latents"}, where=file)
    model, read, written = _place(file)
    if site is None and read is None:
        raise SpecError(
            f"{str(file)!r} does not say what it is for, nor does its path (gemma-scope-2b-pt-res/layer_12/...); give "
            "site=..., such as 'blocks.12.resid_post'",
            "site",
        )
    dictionary = Dictionary(
        W_enc=found["W_enc"].T.contiguous(),
        b_enc=found["b_enc"],
        W_dec=found["W_dec"],
        b_dec=found["b_dec"],
        activation=JumpReLU(threshold=found["threshold"]),
        card=Card(
            **card_sites(site or str(read), sizes["d_in"], writes or (None if site else written), sizes["d_out"]),
            model=model,
            family="jumprelu",
            source={"format": "gemma-scope", "path": "/".join(file.parts[-4:])},
        ),
    )
    return dictionary.folded(1 / math.sqrt(sizes["d_in"])) if dictionary.site == "embed" else dictionary


def _arrays(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedFile(
            f"{str(file)!r} is not a readable file of arrays ({error}); files that would run code are not read"
        ) from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
            raise DamagedFile(f"{name!r} of {str(file)!r} is no array of numbers")
    return arrays


def _place(file: Path) -> tuple[str, str | None, str | None]:
    """Model, site read and site written, as far as the path says."""
    text = file.absolute().as_posix()
    collection, layer = _COLLECTION.search(text), re.search(r"layer_(\d+)", text)
    if collection is None:
        return "", None, None
    model = f"google/gemma-2-{collection['size']}" + "-it" * (collection["tuned"] == "it")
    if "embedding" in text:
        return model, "embed", None
    if layer is None:
        return model, None, None
    read = f"blocks.{layer[1]}.{_SITES[collection['kind']]}"
    return model, read, f"blocks.{layer[1]}.mlp.out" if collection["kind"] == "transcoders" else None


def _write(dictionary: Any, path: Path) -> Path:
    """Write `params.npz`, in the folder `path` or as the file where that ends in `.npz`."""
    if not isinstance(dictionary, Dictionary):
        raise SpecError("gemma-scope files hold no cross-layer transcoders; 'gemma-scope-2' and 'assay' do", "format")
    single(dictionary, "gemma-scope")
    refuse_normalised(dictionary, "gemma-scope")
    if dictionary.W_skip is not None:
        raise SpecError("gemma-scope files have no skip; 'gemma-scope-2', 'circuit-tracer' and 'assay' do", "format")
    if not isinstance(dictionary.activation, ReLU | JumpReLU):
        raise cannot_hold("gemma-scope", dictionary, "JumpReLU (and ReLU, as a threshold of 0)")
    flat = centred(dictionary, False)
    if flat.site == "embed":
        flat = flat.folded(math.sqrt(flat.card.d_in))
    threshold = flat.activation.threshold if isinstance(flat.activation, JumpReLU) else torch.zeros_like(flat.b_enc)
    tensors = {"W_enc": flat.W_enc.T, "W_dec": flat.W_dec, "b_enc": flat.b_enc, "b_dec": flat.b_dec}
    file = path if path.suffix == ".npz" else path / _FILE
    with replacing(file) as temporary, temporary.open("wb") as handle:
        arrays = {name: plain(tensor).numpy() for name, tensor in {**tensors, "threshold": threshold}.items()}
        np.savez(handle, **arrays)  # type: ignore[arg-type]
    return path


FORMAT = Format(
    name="gemma-scope",
    about="Gemma Scope (Gemma 2): params.npz, whose path says what it is for",
    recognises=_recognises,
    read=_read,
    write=_write,
)
