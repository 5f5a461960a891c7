"""The grammar of site names: parsing, the TransformerLens spelling, and patterns.

A site is a named point in the forward pass, such as `blocks.5.attn.z` or `module:model.norm.out`. This module knows
which names are well formed; which of them a given model has is decided by its architecture map.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from assay.base.errors import UnknownSite, nearest

BLOCK_POINTS: tuple[str, ...] = (
    "resid_pre", "resid_mid", "resid_post",
    "norm1", "norm1.scale", "norm2", "norm2.scale",
    "attn.q", "attn.k", "attn.v", "attn.rot_q", "attn.rot_k",
    "attn.scores", "attn.pattern", "attn.z", "attn.result", "attn.out",
    "mlp.in", "mlp.pre", "mlp.gate", "mlp.post", "mlp.out",
)  # fmt: skip
"""Every point a block can have, in forward order."""

GLOBAL_POINTS: tuple[str, ...] = ("embed", "pos_embed", "final_norm", "final_norm.scale", "logits")
"""Every point outside the blocks."""

HEAD_POINTS = frozenset(
    f"attn.{name}" for name in ("q", "k", "v", "rot_q", "rot_k", "scores", "pattern", "z", "result")
)
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
    """

    point: str
    block: int | None = None
    head: int | None = None
    module: str | None = None

    def __str__(self) -> str:
        """Return the canonical name."""
        if self.module is not None:
            return f"module:{self.point}.{self.module}" if self.point else f"module:{self.module}"
        stem = self.point if self.block is None else f"blocks.{self.block}.{self.point}"
        return stem if self.head is None else f"{stem}.{self.head}"

    @property
    def whole(self) -> Site:
        """The same site with all its heads."""
        return Site(self.point, self.block, None, self.module)


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
    match = _BLOCK.fullmatch(name)
    if match is None:
        point = _TRANSFORMER_LENS_GLOBAL.get(name, name)
        if point not in GLOBAL_POINTS:
            raise UnknownSite(f"no site {name!r}{_suggest(name)}")
        return Site(point)
    if not match["index"].isdigit():
        raise UnknownSite(f"{name!r} is a pattern (or has a negative block), and one site is needed here")
    block, rest = int(match["index"]), match["rest"]
    found, head = _split_head(rest, gated)
    if found is None:
        raise UnknownSite(f"no site {name!r}{_suggest(name)}")
    return Site(found, block, head)


def expand_sites(names: str | list[str] | tuple[str, ...], n_blocks: int, *, gated: bool = False) -> list[str]:
    """Expand patterns over blocks into single names: `blocks.*.resid_post`, `blocks.10-14.attn.z`.

    Args:
        names: One name or pattern, or several.
        n_blocks: The number of blocks of the model.
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
        match = None if name.startswith("module:") else _BLOCK.fullmatch(name)
        indices = _block_range(match["index"], name, n_blocks) if match else [None]
        for index in indices:
            single = name if index is None or match is None else f"blocks.{index}.{match['rest']}"
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
    match = _BLOCK.fullmatch(name)
    prefix = f"blocks.{match['index']}." if match else ""
    valid = [prefix + point for point in BLOCK_POINTS] if match else []
    return nearest(name, [*valid, *GLOBAL_POINTS]) or (
        "; sites look like 'blocks.5.attn.z', 'blocks.3.resid_post', 'logits' or 'module:path.to.module.out'"
    )
