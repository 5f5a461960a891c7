"""What others call a site: TransformerLens's hooks and the modules of Hugging Face models, both ways.

A name that is one of assay's sites becomes it. Two of TransformerLens's are kept as they are, because no file says
enough: `mlp.hook_pre`, which is another site in a gated MLP, and `ln1.hook_normalized`, which is a norm's output before
its gain, where assay's `norm1` is after it (`after_gain` turns a dictionary of the one into a dictionary of the other).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from assay.base.errors import SpecError, UnknownSite
from assay.base.sites import Site as Point
from assay.base.sites import parse_site
from assay.dictionaries.dictionary import Card, Dictionary, Site

_TO_HOOK = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn.out": "hook_attn_out",
    "mlp.out": "hook_mlp_out",
    "mlp.in": "mlp.hook_in",
    "mlp.post": "mlp.hook_post",
    **{f"attn.{name}": f"attn.hook_{name}" for name in ("q", "k", "v", "rot_q", "rot_k", "z", "result")},
}
_TO_HOOK_OUTSIDE = {"embed": "hook_embed", "pos_embed": "hook_pos_embed"}
_MORE_HOOKS = {"mlp.hook_in": "mlp.in", "mlp.hook_out": "mlp.out", "hook_mlp_in": "resid_mid"}
_KEPT = re.compile(r"blocks\.\d+\.(ln[12]\.hook_normalized|mlp\.hook_pre)|ln_final\.hook_normalized")
_NORMALISED = re.compile(r"(?P<block>blocks\.\d+\.)?ln(?P<which>1|2|_final)\.hook_normalized")
_MODULE = re.compile(
    r"(?:model\.|transformer\.|gpt_neox\.|language_model\.)*(?:layers|h|blocks)[._](?P<layer>\d+)(?:\.(?P<rest>.+))?"
)
_PARTS = {"mlp": "mlp.out", "self_attn": "attn.out", "attn": "attn.out", "attention": "attn.out", None: "resid_post"}
_EMBEDDINGS = {"embed_tokens", "wte", "embed_in", "embeddings"}


def from_hook(name: str) -> str:
    """The site of a TransformerLens hook.

    Raises:
        SpecError: No site of assay's is that point.

    Example:
        >>> from_hook("blocks.3.hook_resid_post"), from_hook("blocks.3.ln2.hook_normalized")
        ('blocks.3.resid_post', 'blocks.3.ln2.hook_normalized')
    """
    if _KEPT.fullmatch(name):
        return name
    stem, _, rest = name.partition(".")
    block, _, rest = rest.partition(".")
    if stem == "blocks" and rest in _MORE_HOOKS:
        return f"blocks.{block}.{_MORE_HOOKS[rest]}"
    try:
        return str(parse_site(name))
    except UnknownSite as error:
        raise SpecError(f"the file is for {name!r}, which is no site here ({error}); give site=...", "site") from error


def to_hook(site: str) -> tuple[str, int | None]:
    """The TransformerLens hook of a site, and the head where it names one.

    Raises:
        SpecError: TransformerLens has no such hook.

    Example:
        >>> to_hook("blocks.3.attn.z.5")
        ('blocks.3.attn.hook_z', 5)
    """
    if _KEPT.fullmatch(site):
        return site, None
    point = _point(site)
    if point.block is None and not point.stack and point.point in _TO_HOOK_OUTSIDE:
        return _TO_HOOK_OUTSIDE[point.point], None
    if point.block is not None and not point.stack and point.point in _TO_HOOK:
        return f"blocks.{point.block}.{_TO_HOOK[point.point]}", point.head
    raise SpecError(
        f"TransformerLens has no hook for {site!r}; give hook_name=... as the reader will look it up", "site"
    )


def from_module(name: str, model: str = "", *, reads: bool = False) -> str:
    """The site of a Hugging Face module's output, or of its input where `reads`.

    Args:
        name: The module's path, from the model or from its base model.
        model: The model's name: a Gemma's `mlp` leaves before a norm, which is no site but the module's own.
        reads: The module's input is meant: what a transcoder of it reads.

    Raises:
        SpecError: It is not known which site that is.

    Example:
        >>> from_module("layers.12"), from_module("model.layers.3.mlp", reads=True), from_module("h.0.attn")
        ('blocks.12.resid_post', 'blocks.3.mlp.in', 'blocks.0.attn.out')
    """
    if name.rpartition(".")[2] in _EMBEDDINGS and not reads:
        return "embed"
    match = _MODULE.fullmatch(name)
    if match is not None and match["rest"] in _PARTS:
        block, part = int(match["layer"]), _PARTS[match["rest"]]
        if "gemma" in model.lower() and part != "resid_post":  # a norm follows, and assay's mlp.out is after it
            return f"module:model.layers.{block}.{match['rest']}.{'in' if reads else 'out'}"
        if not reads:
            return f"blocks.{block}.{part}"
        if part in ("mlp.out", "resid_post"):
            return f"blocks.{block}.{'mlp.in' if part == 'mlp.out' else 'resid_pre'}"
    raise SpecError(
        f"the file is for the module {name!r}, and it is not known which site that is; give site=..., such as "
        f"'blocks.3.resid_post' or 'module:{name}.{'in' if reads else 'out'}'",
        "site",
    )


def to_module(site: str, architecture: str = "llama") -> str:
    """The module whose output is a site, as its path from the base model.

    Args:
        site: A canonical name.
        architecture: "llama" (and everything named like it), "gpt2" or "gpt_neox".

    Raises:
        SpecError: No module's output is that site.

    Example:
        >>> to_module("blocks.3.mlp.out"), to_module("blocks.3.attn.out", "gpt2")
        ('layers.3.mlp', 'h.3.attn')
    """
    names = {"llama": ("layers", "self_attn"), "gpt2": ("h", "attn"), "gpt_neox": ("layers", "attention")}
    if architecture not in names:
        raise SpecError(f"architecture is {architecture!r}; valid: {', '.join(names)}", "architecture")
    container, attention = names[architecture]
    point = _point(site)
    if point.module == "out":
        return re.sub(r"^(model|transformer|gpt_neox)\.", "", point.point)
    part = {"resid_post": "", "mlp.out": ".mlp", "attn.out": f".{attention}"}.get(point.point)
    if point.block is None or point.stack or part is None:
        raise SpecError(f"no module's output is {site!r}; give hookpoint=...", "hookpoint")
    return f"{container}.{point.block}{part}"


def layer_of(site: str) -> int:
    """The block a site is in.

    Raises:
        SpecError: It is in none.
    """
    found = re.search(r"(?:blocks|layers|h)\.(\d+)", site)
    if found is None:
        raise SpecError(f"{site!r} is in no block, and this format numbers blocks", "site")
    return int(found[1])


def card_sites(reads: str | Sequence[str], d_in: int, writes: str | None, d_out: int) -> dict[str, Any]:
    """The sites of a card: one that is read, and another that is written or the same."""
    if not isinstance(reads, str):
        raise SpecError(f"site is {reads!r}; files of this format read one site", "site")
    if writes is None and d_in != d_out:
        raise SpecError(f"it reads {d_in} numbers and writes {d_out}: give writes=..., the site it writes", "writes")
    read = Site(reads, d_in)
    return {"reads": (read,), "writes": (read if writes in (None, reads) else Site(str(writes), d_out),)}


def single(dictionary: Dictionary, format: str) -> tuple[Site, Site]:
    """The one site a dictionary reads and the one it writes.

    Raises:
        SpecError: It is a crosscoder.
    """
    card: Card = dictionary.card
    if len(card.reads) != 1 or len(card.writes) != 1:
        sites = ", ".join(site.name for site in (*card.reads, *card.writes))
        raise SpecError(f"{format} files hold dictionaries of one site, and this one has several: {sites}; use 'assay'")
    return card.reads[0], card.writes[0]


def after_gain(
    dictionary: Dictionary, gain: Float[Tensor, " d"], bias: Float[Tensor, " d"] | None = None
) -> Dictionary:
    """Make a dictionary of a norm's output before its gain one of `norm1`, `norm2` or `final_norm`, which is after it.

        W_enc <- W_enc / gain        b_enc <- b_enc - W_enc bias

    Args:
        dictionary: One that reads `ln1.hook_normalized` or the like: Gemma Scope's transcoders, Llama Scope's.
        gain: What the norm multiplies by, for a Gemma `1 + weight`.
        bias: What it then adds.

    Raises:
        SpecError: The dictionary reads something else, or a gain is zero.

    Example:
        >>> read = Site("blocks.0.ln2.hook_normalized", 2)
        >>> d = Dictionary(
        ...     W_enc=torch.eye(2),
        ...     b_enc=torch.zeros(2),
        ...     W_dec=torch.eye(2),
        ...     b_dec=torch.zeros(2),
        ...     card=Card(reads=(read,), writes=(Site("blocks.0.mlp.out", 2),)),
        ... )
        >>> after_gain(d, torch.tensor([2.0, 4.0])).site
        'blocks.0.norm2'
    """
    match = _NORMALISED.fullmatch(dictionary.site)
    if match is None or dictionary.kind != "transcoder" or dictionary.card.normalisation != "none":
        raise SpecError(f"{dictionary!r} is no transcoder of a norm's output before its gain")
    gain = gain.detach().to(dictionary.W_enc)
    if tuple(gain.shape) != (dictionary.card.d_in,) or not bool(gain.ne(0).all()):
        raise SpecError(
            f"gain has shape {tuple(gain.shape)}; it must be {dictionary.card.d_in} numbers, none zero", "gain"
        )
    name = f"{match['block'] or ''}{ {'1': 'norm1', '2': 'norm2', '_final': 'final_norm'}[match['which']] }"
    encoder = dictionary.W_enc / gain
    changed: dict[str, Any] = {"W_enc": encoder}
    if bias is not None:
        changed["b_enc"] = dictionary.b_enc - encoder @ bias.detach().to(encoder)
    if dictionary.W_skip is not None:
        changed["W_skip"] = dictionary.W_skip / gain
        if bias is not None:
            changed["b_dec"] = dictionary.b_dec - changed["W_skip"] @ bias.detach().to(encoder)
    card = replace(dictionary.card, reads=(Site(name, dictionary.card.d_in),), mean_norm=None)
    return replace(dictionary, **changed, card=card)


def centred(dictionary: Dictionary, wanted: bool) -> Dictionary:
    """The same dictionary with the decoder bias subtracted before encoding, or not.

    h = W_enc (x - b_dec) + b_enc = W_enc x + (b_enc - W_enc b_dec)
    """
    card = dictionary.card
    if card.centred == wanted:
        return dictionary
    if card.d_in != card.d_out:
        raise SpecError(f"{dictionary!r} writes {card.d_out} numbers, which cannot be subtracted from {card.d_in}")
    moved = dictionary.W_enc @ dictionary.b_dec
    return replace(
        dictionary, b_enc=dictionary.b_enc + (moved if wanted else -moved), card=replace(card, centred=wanted)
    )


def refuse_normalised(dictionary: Dictionary, format: str) -> None:
    """Refuse a dictionary that normalises each row, for a format that cannot say so.

    Raises:
        SpecError: It does.
    """
    if dictionary.card.normalisation != "none":
        raise SpecError(
            f"{format} files cannot say that each row is normalised ({dictionary.card.normalisation}); "
            "'saelens', 'openai' (TopK) and 'assay' can",
            "format",
        )


def cannot_hold(format: str, dictionary: Dictionary, holds: str) -> SpecError:
    """What is said of a nonlinearity or a part that a format has no place for."""
    name = dictionary.activation.name
    return SpecError(
        f"{format} files hold {holds}, and this dictionary is {name}; 'assay' and 'saelens' hold more", "format"
    )


def _point(site: str) -> Point:
    try:
        return parse_site(site)
    except UnknownSite as error:
        raise SpecError(f"{site!r} is no site: {error}", "site") from error


def uniform(threshold: Tensor) -> bool:
    """Whether every latent has the same threshold."""
    return bool(torch.all(threshold == threshold[:1]))
