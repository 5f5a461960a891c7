"""OpenAI's files: one `.pt` with a state dict and the activation's name.

`pre_bias [d]`, `latent_bias`, `encoder.weight [latent, d]`, `decoder.weight [d, latent]` (`decoder.linear.weight` where
it is tied), three counters, `activation` and `activation_state_dict`. The bias is subtracted before encoding.
A TopK file normalises each row by its mean and standard deviation, after which the bias is subtracted; a ReLU file does
not. Which site it is for is in the path alone: `resid_post_mlp_v5_32k/autoencoders/8.pt`.

Source: openai/sparse_autoencoder, `Autoencoder.from_state_dict`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.base.errors import DamagedFile, SpecError
from assay.dictionaries.activations import Activation, ReLU, TopK
from assay.dictionaries.dictionary import Card, Dictionary
from assay.dictionaries.formats.format import Format, check_shapes, pickle_keys, plain, read_pickle, take, write_pickle
from assay.dictionaries.formats.sites import cannot_hold, card_sites, centred, single

_NEEDED = ("pre_bias", "latent_bias", "encoder.weight")
_DECODERS = ("decoder.weight", "decoder.linear.weight")
_ACTIVATION = {"activation", "activation_state_dict", "activation.k", "activation.postact_fn"}
_COUNTERS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_PLACE = re.compile(
    r"(?P<where>mlp_post_act|resid_delta_mlp|resid_delta_attn|resid_post_mlp|resid_post_attn)(?:_v\d+(?:_\d+k)?)?"
    r"/autoencoders/(?P<layer>\d+)\.pt$"
)
_POINTS = {
    "mlp_post_act": "mlp.post",
    "resid_delta_mlp": "mlp.out",
    "resid_delta_attn": "attn.out",
    "resid_post_mlp": "resid_post",
    "resid_post_attn": "resid_mid",
}


def _recognises(path: Path) -> bool:
    return set(_NEEDED) <= pickle_keys(path)


def _read(path: Path, site: str | None = None) -> Dictionary:
    """Read one.

    Args:
        path: The `.pt` file.
        site: Where it reads, where the path does not say.
    """
    held = read_pickle(path)
    if not isinstance(held, Mapping):
        raise DamagedFile(f"{str(path)!r} holds {type(held).__name__} and should hold tensors by name")
    named = {name: value for name, value in held.items() if isinstance(value, Tensor) and name not in _ACTIVATION}
    for name in held:
        if name not in named and name not in _ACTIVATION:
            raise SpecError(f"{str(path)!r} has {name!r}, which means nothing here", str(name))
    decoder = next((name for name in _DECODERS if name in named), _DECODERS[0])
    found = take(named, (*_NEEDED, decoder), _COUNTERS, where=path)
    shapes = {"encoder.weight": "latents d", "pre_bias": "d", "latent_bias": "latents", "decoder.weight": "d latents"}
    shapes |= {"decoder.linear.weight": "latents d"}
    sizes = check_shapes(found, shapes | dict.fromkeys(_COUNTERS, "latents"), where=path)
    activation = _activation(held, path)
    match = _PLACE.search(path.absolute().as_posix())
    if site is None and match is None:
        raise SpecError(
            f"{str(path)!r} does not say what it is for; give site=..., such as 'blocks.8.resid_post'", "site"
        )
    read = site or (f"blocks.{match['layer']}.{_POINTS[match['where']]}" if match else "")
    rows = found[decoder].T.contiguous() if decoder == "decoder.weight" else found[decoder]
    return Dictionary(
        W_enc=found["encoder.weight"],
        b_enc=found["latent_bias"],
        W_dec=rows,
        b_dec=found["pre_bias"],
        activation=activation,
        card=Card(
            **card_sites(read, sizes["d"], None, sizes["d"]),
            model="gpt2" if match and site is None else "",
            family="topk" if isinstance(activation, TopK) else "l1",
            centred=True,
            normalisation="layer_norm" if isinstance(activation, TopK) else "none",
            source={"format": "openai", "activation": held.get("activation", "ReLU")},
        ),
    )


def _activation(held: Mapping[str, Any], path: Path) -> Activation:
    name, state = held.get("activation", "ReLU"), held.get("activation_state_dict") or {}
    if name == "ReLU":
        return ReLU()
    if name == "TopK" and state.get("postact_fn", "ReLU") == "ReLU" and "k" in state:
        return TopK(k=int(state["k"]))
    raise SpecError(
        f"{str(path)!r} has the activation {name!r} ({dict(state)}); read: ReLU, TopK with ReLU", "activation"
    )


def _write(dictionary: Any, path: Path) -> Path:
    """Write the file `path`; OpenAI's loader normalises rows where the activation is TopK and nowhere else."""
    if not isinstance(dictionary, Dictionary):
        raise SpecError("openai files hold no cross-layer transcoders; 'circuit-tracer' and 'assay' do", "format")
    single(dictionary, "openai")
    activation, normalisation = dictionary.activation, dictionary.card.normalisation
    if dictionary.kind == "transcoder" or dictionary.W_skip is not None:
        raise SpecError(
            "openai files hold SAEs without a skip; 'saelens', 'circuit-tracer' and 'assay' hold others", "format"
        )
    if not isinstance(activation, ReLU | TopK):
        raise cannot_hold("openai", dictionary, "ReLU, and TopK of normalised rows")
    wanted = "layer_norm" if isinstance(activation, TopK) else "none"
    if normalisation != wanted:
        raise SpecError(
            f"openai's loader takes rows of a {activation.name} file as {wanted!r}, and this dictionary has "
            f"{normalisation!r}; 'saelens' and 'assay' hold it",
            "format",
        )
    flat, latents = centred(dictionary, True), dictionary.n_latents
    tensors = {
        "pre_bias": flat.b_dec,
        "latent_bias": flat.b_enc,
        "stats_last_nonzero": torch.zeros(latents, dtype=torch.long),
        "latents_activation_frequency": torch.ones(latents),
        "latents_mean_square": torch.zeros(latents),
        "encoder.weight": flat.W_enc,
        "decoder.weight": flat.W_dec.T,
    }
    state: dict[str, Any] = {name: plain(tensor) for name, tensor in tensors.items()}
    state["activation"] = "TopK" if isinstance(activation, TopK) else "ReLU"
    state["activation_state_dict"] = {"k": activation.k, "postact_fn": "ReLU"} if isinstance(activation, TopK) else {}
    return write_pickle(path, state)


FORMAT = Format(
    name="openai",
    about="OpenAI's sparse autoencoders: one .pt file, whose path says what it is for",
    recognises=_recognises,
    read=_read,
    write=_write,
)
