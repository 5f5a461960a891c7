"""The modules of one model that an architecture map names, and the points on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from assay.base.errors import UnsupportedArchitecture
from assay.base.sites import HEAD_POINTS, Site
from assay.subjects.architecture import ArchitectureMap, FusedProjection
from assay.subjects.norms import read_norm
from assay.subjects.points import RESIDUAL, Dims, Point, ResultPoint, ScalePoint

HEADS: Dims = ("batch", "pos", "head", "d_head")
HIDDEN: Dims = ("batch", "pos", "d_mlp")
PATTERN: Dims = ("batch", "head", "query", "key")


class Parts:
    """The parts of a decoder, found by their paths.

    Args:
        module: The causal language model.
        architecture: Its family's map.

    Raises:
        UnsupportedArchitecture: If a path leads nowhere.
    """

    def __init__(self, module: nn.Module, architecture: ArchitectureMap) -> None:
        self.module = module
        self.architecture = architecture
        config: Any = module.config
        self.blocks = list(self._get(module, architecture.blocks))  # type: ignore[call-overload]
        self.final_norm = self._get(module, architecture.final_norm)
        self.unembed: nn.Module = module.get_output_embeddings()  # type: ignore[operator]
        self.d_model: int = config.hidden_size
        self.n_heads: int = config.num_attention_heads
        self.n_kv_heads: int = getattr(config, "num_key_value_heads", None) or self.n_heads
        self.d_head: int = getattr(config, "head_dim", None) or self.d_model // self.n_heads
        self.parallel = architecture.is_parallel(config)
        self.softcap = architecture.softcap(config)
        for block in range(len(self.blocks)):
            for path in (architecture.norm1, architecture.norm2, architecture.attn, architecture.mlp):
                self.of(block, path)

    def of(self, block: int, path: str) -> nn.Module:
        """A module inside a block."""
        return self._get(self.blocks[block], path)

    def attention(self, block: int) -> nn.Module:
        """A block's attention module."""
        return self.of(block, self.architecture.attn)

    def output_matrix(self, block: int) -> Tensor:
        """`W_O`, `[heads * d_head, d_model]`: what `z` is multiplied by on its way out."""
        return linear_matrix(self.of(block, f"{self.architecture.attn}.{self.architecture.attn_proj}"))

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        """`W_U` as `[vocab, d_model]`, and the bias `[vocab]` or None."""
        bias = getattr(self.unembed, "bias", None)
        weight: Tensor = self.unembed.weight  # type: ignore[assignment]
        return weight, bias

    def heads(self, point: str) -> int:
        """How many heads a point has (0 for none): keys and values have the model's true number."""
        if point not in HEAD_POINTS:
            return 0
        return self.n_kv_heads if point in ("attn.k", "attn.v", "attn.rot_k") else self.n_heads

    def has(self, point: str) -> bool:
        """Whether this architecture has a point."""
        return {
            "resid_mid": not self.parallel,
            "mlp.gate": self.architecture.mlp_gate is not None,
            "pos_embed": self.architecture.pos_embed is not None,
        }.get(point, True)

    def point(self, site: Site) -> Point:
        """The point of a standard site."""
        if site.block is None:
            return self._outside(site.point)
        group, _, name = site.point.rpartition(".")
        if site.point.startswith("norm"):
            return self._norm_point(site.block, site.point)
        return {"": self._residual, "attn": self._attn, "mlp": self._mlp}[group](site.block, name)

    def _outside(self, point: str) -> Point:
        architecture = self.architecture
        if point in ("embed", "pos_embed"):
            path = architecture.embed if point == "embed" else architecture.pos_embed
            assert path is not None
            return Point(module=self._get(self.module, path), path=path, side="out", dims=RESIDUAL)
        if point == "final_norm":
            return Point(module=self.final_norm, path=architecture.final_norm, side="out", dims=RESIDUAL)
        return self._scale(self.final_norm, architecture.final_norm)

    def _scale(self, module: nn.Module, path: str) -> ScalePoint:
        norm = read_norm(module, self.d_model)
        return ScalePoint(module=module, path=path, side="in", dims=(*RESIDUAL[:2], "one"), norm=norm)

    def _norm_point(self, block: int, point: str) -> Point:
        name, _, scale = point.partition(".")
        path = self.architecture.norm1 if name == "norm1" else self.architecture.norm2
        module = self.of(block, path)
        full = f"{self.architecture.blocks}.{block}.{path}"
        return self._scale(module, full) if scale else Point(module=module, path=full, side="out", dims=RESIDUAL)

    def _residual(self, block: int, name: str) -> Point:
        path = f"{self.architecture.blocks}.{block}"
        if name == "resid_mid":
            return Point(
                module=self.of(block, self.architecture.norm2),
                path=f"{path}.{self.architecture.norm2}",
                side="in",
                dims=RESIDUAL,
                in_place=True,
            )
        side = "in" if name == "resid_pre" else "out"
        return Point(module=self.blocks[block], path=path, side=side, dims=RESIDUAL)  # type: ignore[arg-type]

    def _attn(self, block: int, name: str) -> Point:
        architecture = self.architecture
        path = f"{architecture.blocks}.{block}.{architecture.attn}"
        attention = self.attention(block)
        if name in ("rot_q", "rot_k", "scores", "pattern"):
            dims, head_dim = (HEADS, 2) if name.startswith("rot") else (PATTERN, 1)
            return Point(module=attention, path=path, side="attention", dims=dims, head_dim=head_dim)
        if name == "out":
            norm = architecture.attn_post_norm
            where, module = (
                (f"{architecture.blocks}.{block}.{norm}", self.of(block, norm)) if norm else (path, attention)
            )
            return Point(module=module, path=where, side="out", dims=RESIDUAL)
        projection = self._get(attention, architecture.attn_proj)
        where = f"{path}.{architecture.attn_proj}"
        if name == "z":
            view = _split_heads(self.n_heads)
            return Point(module=projection, path=where, side="in", dims=HEADS, view=view, head_dim=2)
        if name == "result":
            return ResultPoint(
                module=projection,
                path=where,
                side="out",
                dims=("batch", "pos", "head", "d_model"),
                head_dim=2,
                n_heads=self.n_heads,
                weight=lambda: linear_matrix(projection),
            )
        return self._projection(attention, path, name)

    def _projection(self, attention: nn.Module, path: str, name: str) -> Point:
        projections = self.architecture.projections
        if isinstance(projections, FusedProjection):
            where, view = projections.path, _fused(projections.layout, "qkv".index(name), self.n_heads)
        else:
            where = {"q": projections.q, "k": projections.k, "v": projections.v}[name]
            view = _split_heads(self.heads(f"attn.{name}"))
        return Point(
            module=self._get(attention, where), path=f"{path}.{where}", side="out", dims=HEADS, view=view, head_dim=2
        )

    def _mlp(self, block: int, name: str) -> Point:
        architecture = self.architecture
        root = f"{architecture.blocks}.{block}"
        if name == "out":
            path = architecture.mlp_post_norm or architecture.mlp
            return Point(module=self.of(block, path), path=f"{root}.{path}", side="out", dims=RESIDUAL)
        if name == "in":
            mlp = self.of(block, architecture.mlp)
            return Point(module=mlp, path=f"{root}.{architecture.mlp}", side="in", dims=RESIDUAL)
        leaf = {"pre": architecture.mlp_up, "gate": architecture.mlp_gate, "post": architecture.mlp_down}[name]
        path = f"{architecture.mlp}.{leaf}"
        side = "in" if name == "post" else "out"
        return Point(module=self.of(block, path), path=f"{root}.{path}", side=side, dims=HIDDEN)  # type: ignore[arg-type]

    def _get(self, root: nn.Module, path: str) -> nn.Module:
        try:
            return root.get_submodule(path)
        except AttributeError:
            raise UnsupportedArchitecture(
                f"the map of {self.architecture.family} expects {path!r} in {type(root).__name__}, which is not there"
            ) from None


def linear_matrix(module: nn.Module) -> Tensor:
    """A linear map's matrix as `[in, out]`, for `nn.Linear` and transformers' `Conv1D` alike."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, nn.Linear) else weight


def linear_bias(module: nn.Module) -> Tensor | None:
    """A linear map's bias, or None."""
    bias: Tensor | None = getattr(module, "bias", None)
    return bias


def _split_heads(n_heads: int) -> Callable[[Tensor], Tensor]:
    def view(raw: Tensor) -> Tensor:
        return raw.view(*raw.shape[:-1], n_heads, -1)

    return view


def _fused(layout: str, index: int, n_heads: int) -> Callable[[Tensor], Tensor]:
    def thirds(raw: Tensor) -> Tensor:
        return raw.view(*raw.shape[:-1], 3, n_heads, -1).select(-3, index)

    def per_head(raw: Tensor) -> Tensor:
        return raw.view(*raw.shape[:-1], n_heads, 3, -1).select(-2, index)

    return thirds if layout == "thirds" else per_head
