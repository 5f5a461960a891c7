"""Goodfire's files: one `.pt` or `.pth` with `encoder_linear` and `decoder_linear`, weights and biases.

On disk `encoder_linear.weight [latent, d]`, `decoder_linear.weight [d, latent]`. ReLU, the bias is not subtracted. The
layer of the residual stream is in the file's name, `Llama-3.1-8B-Instruct-SAE-l19.pth`. Layout as SAELens
6.54 reads it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from assay.base.errors import SpecError
from assay.dictionaries.activations import ReLU
from assay.dictionaries.dictionary import Card, Dictionary
from assay.dictionaries.formats.format import Format, check_shapes, pickle_keys, plain, read_pickle, take, write_pickle
from assay.dictionaries.formats.sites import cannot_hold, card_sites, centred, refuse_normalised, single

_NAMES = ("encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias")


def _recognises(path: Path) -> bool:
    return set(_NAMES) <= pickle_keys(path)


def _read(path: Path, site: str | None = None) -> Dictionary:
    """Read one.

    Args:
        path: The file.
        site: Where it reads, where the file's name does not say.
    """
    found = take(read_pickle(path), _NAMES, where=path)
    shapes = ("latents d", "latents", "d latents", "d")
    sizes = check_shapes(found, dict(zip(_NAMES, shapes, strict=True)), where=path)
    named = re.fullmatch(r"(?P<model>.+)-SAE-l(?P<layer>\d+)", path.stem)
    if site is None and named is None:
        raise SpecError(
            f"{path.name!r} does not say what it is for; give site=..., such as 'blocks.19.resid_post'", "site"
        )
    return Dictionary(
        W_enc=found[_NAMES[0]],
        b_enc=found[_NAMES[1]],
        W_dec=found[_NAMES[2]].T.contiguous(),
        b_dec=found[_NAMES[3]],
        activation=ReLU(),
        card=Card(
            **card_sites(
                site or f"blocks.{named['layer']}.resid_post" if named else str(site), sizes["d"], None, sizes["d"]
            ),
            model=f"meta-llama/{named['model']}" if named and site is None else "",
            family="l1",
            source={"format": "goodfire"},
        ),
    )


def _write(dictionary: Any, path: Path) -> Path:
    """Write the file `path`."""
    if not isinstance(dictionary, Dictionary):
        raise SpecError("goodfire files hold no cross-layer transcoders; 'circuit-tracer' and 'assay' do", "format")
    single(dictionary, "goodfire")
    refuse_normalised(dictionary, "goodfire")
    if not isinstance(dictionary.activation, ReLU):
        raise cannot_hold("goodfire", dictionary, "ReLU")
    if dictionary.kind == "transcoder" or dictionary.W_skip is not None:
        raise SpecError(
            "goodfire files hold SAEs without a skip; 'saelens', 'circuit-tracer' and 'assay' hold others", "format"
        )
    flat = centred(dictionary, False)
    tensors = dict(zip(_NAMES, (flat.W_enc, flat.b_enc, flat.W_dec.T, flat.b_dec), strict=True))
    return write_pickle(path, {name: plain(tensor) for name, tensor in tensors.items()})


FORMAT = Format(
    name="goodfire",
    about="Goodfire: one .pt or .pth file of two linear maps",
    recognises=_recognises,
    read=_read,
    write=_write,
)
