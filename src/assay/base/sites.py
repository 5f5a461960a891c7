"""The grammar of site names: parsing, the TransformerLens spelling, and patterns.

A site is a named point in the forward pass, such as `blocks.5.attn.z` or `module:model.norm.out`. This module knows
which names are well formed; which of them a given model has is decided by its architecture map.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from assay.base.errors import UnknownSite, nearest

ATTENTION_POINTS: tuple[str, ...] = ("q", "k", "v", "rot_q", "rot_k", "scores", "pattern", "z", "result", "out")
"""What an attention layer offers, in forward order; all but `out` have heads."""

BLOCK_POINTS: tuple[str, ...] = (
    "resid_pre", "resid_mid", "resid_cross", "resid_post",
    "norm1", "norm1.scale", "norm_cross", "norm_cross.scale", "norm2", "norm2.scale",
    *(f"attn.{name}" for name in ATTENTION_POINTS),
    *(f"cross_attn.{name}" for name in ATTENTION_POINTS),
    "ssm.gate", "ssm.x", "ssm.dt", "ssm.B", "ssm.C", "ssm.post", "ssm.out",
    "mlp.in", "mlp.router", "mlp.weights", "mlp.experts", "mlp.pre", "mlp.gate", "mlp.post", "mlp.out",
)  # fmt: skip
"""Every point a block can have. Which of them a model's blocks do have is for its architecture map to say."""

STACKS: tuple[str, ...] = ("encoder", "decoder", "vision", "text")
"""First parts of site names in models with two stacks of blocks: `decoder.blocks.3.cross_attn.pattern`."""

GLOBAL_POINTS: tuple[str, ...] = ("embed", "pos_embed", "final_norm", "final_norm.scale", "logits")
"""Every point outside the blocks."""

HEAD_POINTS = frozenset(f"{kind}.{name}" for kind in ("attn", "cross_attn") for name in ATTENTION_POINTS[:-1])
"""The points with a head dimension: a head may be named as a last part, `blocks.5.attn.z.3`."""

_TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre", "hook_resid_mid": "resid_mid", "hook_resid_post": "resid_post",
    "hook_attn_out": "attn.out", "hook_mlp_out": "mlp.out",
    "ln1.hook_scale": "norm1.scale",
    "ln2.hook_scale": "norm2.scale",
    "attn.hook_q": "attn.q", "attn.hook_k": "attn.k", "attn.hook_v": "attn.v",
    "attn.hook_rot_q": "attn.rot_q", "attn.hook_rot_k": "attn.rot_k",
    "attn.hook_attn_scores": "attn.scores", "attn.hook_pattern": "attn.pattern",
    "attn.hook_z": "attn.z", "attn.hook_result": "attn.result",
    "mlp.hook_post": "mlp.post", "mlp.hook_pre_linear": "mlp.pre",
}  # fmt: skip
_TRANSFORMER_LENS_GLOBAL = {
    "hook_embed": "embed",
    "hook_pos_embed": "pos_embed",
    "ln_final.hook_scale": "final_norm.scale",
}
_BLOCK = re.compile(r"blocks\.(?P<index>\*|-?\d+(?:-\d+)?)\.(?P<rest>.+)")


@dataclass(frozen=True, slots=True)
class Site:
    """A point of the forward pass, by canonical name.

    Args:
        point: `embed`, `logits`, ... or, inside a block, `attn.z`, `resid_post`, ...; for raw modules the dotted path.
        block: The block's index, or None outside the blocks.
        head: One head of a point that has heads, or None for all of them.
        module: `in` or `out` for a raw `module:` site, else None.
        stack: `encoder` or `decoder` (`vision` or `text`) in models with two stacks of blocks, else "".
    """

    point: str
    block: int | None = None
    head: int | None = None
    module: str | None = None
    stack: str = ""

    def __str__(self) -> str:
        """Return the canonical name."""
        if self.module is not None:
            return f"module:{self.point}.{self.module}" if self.point else f"module:{self.module}"
        stem = self.point if self.block is None else f"blocks.{self.block}.{self.point}"
        name = stem if self.head is None else f"{stem}.{self.head}"
        return f"{self.stack}.{name}" if self.stack else name

    @property
    def whole(self) -> Site:
        """The same site with all its heads."""
        return replace(self, head=None)


@lru_cache(maxsize=8192)  # a run over all sites, or a sweep over all cells, reads the same names again and again
def parse_site(name: str, *, gated: bool = False) -> Site:
    """Read one site name, in assay's or TransformerLens's spelling.

    Args:
        name: For instance `blocks.5.attn.z`, `blocks.5.attn.z.3`, `blocks.5.attn.hook_z` or `module:model.norm.out`.
        gated: Whether the model's MLP is gated; TransformerLens's `mlp.hook_pre` is then the gate's projection.

    Returns:
        The site, with a canonical name.

    Raises:
        UnknownSite: If the name is not in the grammar; the message offers the nearest names.

    Example:
        >>> str(parse_site("blocks.5.attn.hook_z"))
        'blocks.5.attn.z'
    """
    if name.startswith("module:"):
        return _parse_module(name)
    stack, stem = split_stack(name)
    match = _BLOCK.fullmatch(stem)
    if match is None:
        point = _TRANSFORMER_LENS_GLOBAL.get(stem, stem)
        if point not in GLOBAL_POINTS or (stack and point == "logits"):
            raise UnknownSite(f"no site {name!r}{_suggest(name)}")
        return Site(point, stack=stack)
    if not match["index"].isdigit():
        raise UnknownSite(f"{name!r} is a pattern (or has a negative block), and one site is needed here")
    block, rest = int(match["index"]), match["rest"]
    found, head = _split_head(rest, gated)
    if found is None:
        raise UnknownSite(f"no site {name!r}{_suggest(name)}")
    return Site(found, block, head, stack=stack)


def split_stack(name: str) -> tuple[str, str]:
    """Split a name's stack off: `decoder.blocks.0.attn.z` into `decoder` and the rest; "" where none is named."""
    first, _, rest = name.partition(".")
    return (first, rest) if first in STACKS else ("", name)


def expand_sites(
    names: str | list[str] | tuple[str, ...], n_blocks: int | Mapping[str, int], *, gated: bool = False
) -> list[str]:
    """Expand patterns over blocks into single names: `blocks.*.resid_post`, `blocks.10-14.attn.z`.

    Args:
        names: One name or pattern, or several.
        n_blocks: The number of blocks of the model, or of each stack by name.
        gated: Passed on to `parse_site`.

    Returns:
        Canonical names, in the order given, without repeats.

    Raises:
        UnknownSite: If a name is unknown or a range leaves the model.

    Example:
        >>> expand_sites("blocks.0-1.hook_resid_pre", n_blocks=2)
        ['blocks.0.resid_pre', 'blocks.1.resid_pre']
    """
    out: dict[str, None] = {}
    for name in [names] if isinstance(names, str) else names:
        stack, stem = split_stack(name)
        match = None if name.startswith("module:") else _BLOCK.fullmatch(stem)
        count = n_blocks if isinstance(n_blocks, int) else n_blocks.get(stack, 0)
        indices = _block_range(match["index"], name, count) if match else [None]
        for index in indices:
            prefix = f"{stack}." if stack else ""
            single = name if index is None or match is None else f"{prefix}blocks.{index}.{match['rest']}"
            out[str(parse_site(single, gated=gated))] = None
    return list(out)


def _block_range(text: str, name: str, n_blocks: int) -> list[int | None]:
    if text == "*":
        return list(range(n_blocks))
    first, _, last = text.partition("-") if not text.startswith("-") else (text, "", "")
    low, high = int(first), int(last or first)
    if low < 0 or high >= n_blocks or low > high:
        raise UnknownSite(f"no site {name!r}: this model has blocks 0 to {n_blocks - 1}")
    return list(range(low, high + 1))


def _split_head(rest: str, gated: bool) -> tuple[str | None, int | None]:
    point: str | None
    for candidate, head in ((rest, None), _last_number(rest)):
        if candidate == "mlp.hook_pre":
            point = "mlp.gate" if gated else "mlp.pre"
        else:
            point = _TRANSFORMER_LENS.get(candidate, candidate if candidate in BLOCK_POINTS else None)
        if point is not None and (head is None or point in HEAD_POINTS):
            return point, head
    return None, None


def _last_number(rest: str) -> tuple[str, int | None]:
    stem, _, last = rest.rpartition(".")
    return (stem, int(last)) if last.isascii() and last.isdigit() else ("", None)


def _parse_module(name: str) -> Site:
    path, _, side = name.removeprefix("module:").rpartition(".")
    if side not in ("in", "out"):
        raise UnknownSite(f"{name!r} must end in .in or .out: 'module:{name.removeprefix('module:')}.out'")
    return Site(path, module=side)


def _suggest(name: str) -> str:
    if name.endswith("hook_normalized"):
        return "; TransformerLens reads it before the norm's gain: assay has 'norm1', 'norm2', 'final_norm', after it"
    stack, stem = split_stack(name)
    match = _BLOCK.fullmatch(stem)
    prefix = f"{stack}." * bool(stack) + (f"blocks.{match['index']}." if match else "")
    valid = [prefix + point for point in BLOCK_POINTS] if match else []
    return nearest(name, [*valid, *GLOBAL_POINTS]) or (
        "; sites look like 'blocks.5.attn.z', 'blocks.3.resid_post', 'logits' or 'module:path.to.module.out'"
    )
