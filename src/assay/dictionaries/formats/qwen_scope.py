"""Qwen Scope's files: `layerN.sae.pt` with `W_enc [latent, d]`, `W_dec [d, latent]`, `b_enc`, `b_dec`.

TopK of the residual stream, the bias is not subtracted. `k` is in the collection's name, `...-W32K-L0_50`, and not in
the file. Layout as SAELens 6.54 reads it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from assay.base.errors import SpecError
from assay.dictionaries.activations import TopK
from assay.dictionaries.dictionary import Card, Dictionary
from assay.dictionaries.formats.format import Format, check_shapes, pickle_keys, plain, read_pickle, take, write_pickle
from assay.dictionaries.formats.sites import cannot_hold, card_sites, centred, refuse_normalised, single

_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")


def _recognises(path: Path) -> bool:
    return set(_NAMES) == pickle_keys(path)


def _read(path: Path, site: str | None = None, k: int | None = None) -> Dictionary:
    """Read one.

    Args:
        path: The file.
        site: Where it reads, where the file's name does not say.
        k: How many latents a row keeps, where the path does not say.
    """
    found = take(read_pickle(path), _NAMES, where=path)
    shapes = {"W_enc": "latents d", "W_dec": "d latents", "b_enc": "latents", "b_dec": "d"}
    sizes = check_shapes(found, shapes, where=path)
    text = path.absolute().as_posix()
    kept = re.search(r"SAE-Res-(?P<model>.+?)-W\d+K-L0_(?P<k>\d+)", text)
    layer = re.search(r"layer(\d+)\.sae\.pt$", path.name)
    if site is None and layer is None:
        raise SpecError(
            f"{path.name!r} does not say what it is for; give site=..., such as 'blocks.8.resid_post'", "site"
        )
    if k is None and kept is None:
        raise SpecError(f"{str(path)!r} does not say how many latents a row keeps (...-L0_50/...); give k=...", "k")
    return Dictionary(
        W_enc=found["W_enc"],
        b_enc=found["b_enc"],
        W_dec=found["W_dec"].T.contiguous(),
        b_dec=found["b_dec"],
        activation=TopK(k=k if k is not None else int(kept["k"]) if kept else 0),
        card=Card(
            **card_sites(site or (f"blocks.{layer[1]}.resid_post" if layer else ""), sizes["d"], None, sizes["d"]),
            model=f"Qwen/{kept['model']}" if kept else "",
            family="topk",
            source={"format": "qwen-scope"},
        ),
    )


def _write(dictionary: Any, path: Path) -> Path:
    """Write the file `path`; its `k` is for the folder's name to say."""
    if not isinstance(dictionary, Dictionary):
        raise SpecError("qwen-scope files hold no cross-layer transcoders; 'circuit-tracer' and 'assay' do", "format")
    single(dictionary, "qwen-scope")
    refuse_normalised(dictionary, "qwen-scope")
    if not isinstance(dictionary.activation, TopK):
        raise cannot_hold("qwen-scope", dictionary, "TopK")
    if dictionary.kind == "transcoder" or dictionary.W_skip is not None:
        raise SpecError(
            "qwen-scope files hold SAEs without a skip; 'saelens', 'sparsify' and 'assay' hold others", "format"
        )
    flat = centred(dictionary, False)
    tensors = {"W_enc": flat.W_enc, "W_dec": flat.W_dec.T, "b_enc": flat.b_enc, "b_dec": flat.b_dec}
    return write_pickle(path, {name: plain(tensor) for name, tensor in tensors.items()})


FORMAT = Format(
    name="qwen-scope",
    about="Qwen Scope: layerN.sae.pt, whose collection's name says k",
    recognises=_recognises,
    read=_read,
    write=_write,
)
