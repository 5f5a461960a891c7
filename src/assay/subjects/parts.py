"""The modules of one stack that an architecture map names, and the points on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from assay.base.errors import UnsupportedArchitecture
from assay.base.sites import HEAD_POINTS, Site
from assay.subjects.architecture import ArchitectureMap, Latent, Path, Stack, setting
from assay.subjects.block_points import BlockPoints, read_field
from assay.subjects.linear import linear_bias, linear_matrix
from assay.subjects.norms import read_norm
from assay.subjects.points import RESIDUAL, Dims, Point, PositionsPoint, ScalePoint


class Parts:
    """The parts of one stack of a model, found by their paths.

    Args:
        module: The model.
        architecture: Its family's map.
        name: The stack's name; "" when there is one.

    Raises:
        UnsupportedArchitecture: If a path leads nowhere.
    """

    def __init__(self, module: nn.Module, architecture: ArchitectureMap, name: str = "") -> None:
        self.module, self.architecture, self.name = module, architecture, name
        self.stack: Stack = architecture.stacks[name]
        self.base, self.prefix = _base(module, architecture)
        whole: Any = module.config
        config: Any = getattr(whole, self.stack.config, whole) if self.stack.config else whole
        self.config = config
        self.blocks = list(self._get(self.base, self.stack.blocks))  # type: ignore[call-overload]
        self.d_model = int(read_field(config, "hidden_size", "d_model", "n_embd"))
        self.parallel = bool(setting(config, self.stack.parallel))
        self.post_norm = bool(setting(config, self.stack.post_norm))
        if self.stack.attn is not None:
            self.n_heads, self.n_kv_heads = self._count_heads(config)
        else:
            self.n_heads = self.n_kv_heads = 0
        self.embed_factor = float(setting(config, self.stack.embed_scale) or 1.0)
        self.factor = float(setting(config, self.stack.residual_scale) or 1.0)
        self._points: dict[int | None, dict[str, Callable[[], Point]]] = {}
        for block in range(len(self.blocks)):
            self.points(block)

    def _count_heads(self, config: Any) -> tuple[int, int]:
        stated = setting(config, self.stack.n_heads)
        side = "encoder_attention_heads" if self.name == "encoder" else "decoder_attention_heads"
        heads = int(stated or read_field(config, side, "num_attention_heads", "n_head", "num_heads", "n_heads"))
        kv = setting(config, self.stack.n_kv_heads)
        return heads, int(kv or getattr(config, "num_key_value_heads", None) or heads)

    # What the stack is

    @cached_property
    def final_norm(self) -> nn.Module:
        """The norm after the last block (an identity where there is none)."""
        found = self.find(self.base, self.stack.final_norm)
        return nn.Identity() if found is None else found[0]

    @property
    def unembed(self) -> nn.Module:
        """The unembedding.

        Raises:
            UnsupportedArchitecture: If the stream is not unembedded by a norm and one matrix.
        """
        if not self.has_unembedding:
            raise UnsupportedArchitecture(
                f"{type(self.module).__name__} has no unembedding that reads its final norm: its logits are not linear "
                f"in the residual stream"
            )
        found: nn.Module = self.module.get_output_embeddings()  # type: ignore[operator]
        project = self.find(self.base, self.architecture.head.project)
        return found if project is None else Projected(project[0], found)

    @cached_property
    def has_unembedding(self) -> bool:
        """Whether logits are the final norm's output times a matrix, scaled and capped."""
        leads = self.name == list(self.architecture.stacks)[-1]
        get = getattr(self.module, "get_output_embeddings", None)
        return leads and self.architecture.head.linear and get is not None and get() is not None

    @cached_property
    def softcap(self) -> float | None:
        """The final logits' soft-cap, or None."""
        value = setting(self.module.config, self.architecture.head.softcap)
        return None if value is None else float(value)

    @cached_property
    def logit_scale(self) -> float:
        """What the logits are multiplied by before the soft-cap."""
        head, config = self.architecture.head, self.module.config
        scale, divisor = setting(config, head.scale), setting(config, head.divisor)
        return float(1.0 if scale is None else scale) / float(1.0 if divisor is None else divisor)

    def logits(self, hidden: Tensor) -> Tensor:
        """From the stream after the last block to logits, `[..., d_model] -> [..., vocab]`, by the model's modules."""
        normed, weight = self.final_norm(hidden), getattr(self.unembed, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():  # Mamba's stream is wider than its weights
            normed = normed.to(weight.dtype)
        logits: Tensor = self.unembed(normed)
        offset = self._logits_bias
        logits = logits if offset is None else logits + offset
        logits = logits if self.logit_scale == 1.0 else logits * self.logit_scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        """`W_U` as `[vocab, d_model]`, and the bias `[vocab]` or None, with the logits' scale in both."""
        unembed = self.unembed
        own = isinstance(unembed, Projected)
        weight: Tensor = unembed.weight if own else linear_matrix(unembed).T  # type: ignore[assignment]
        bias: Tensor | None = unembed.bias if own else linear_bias(unembed)  # type: ignore[assignment]
        offset = self._logits_bias
        bias = bias if offset is None else offset if bias is None else bias + offset
        if self.logit_scale == 1.0:
            return weight, bias
        return weight * self.logit_scale, None if bias is None else bias * self.logit_scale

    @property
    def _logits_bias(self) -> Tensor | None:
        """A buffer that some encoder-decoders add to the logits, `[vocab]`."""
        offset = getattr(self.module, "final_logits_bias", None)
        return offset.reshape(-1) if isinstance(offset, Tensor) and bool(offset.any()) else None

    def of(self, block: int, path: Path) -> nn.Module:
        """A module inside a block."""
        return self._get(self.blocks[block], path)

    def attention(self, block: int) -> nn.Module:
        """A block's attention module."""
        assert self.stack.attn is not None
        return self.of(block, self.stack.attn.path)

    def output_projection(self, block: int) -> nn.Module:
        """The module that multiplies `z` by `W_O`."""
        assert self.stack.attn is not None
        return self.of(block, self.stack.attn.proj)

    def output_matrix(self, block: int) -> Tensor:
        """`W_O`, `[heads * d_head, d_model]`: what `z` is multiplied by on its way out."""
        matrix = linear_matrix(self.output_projection(block))
        return matrix if self.factor == 1.0 else matrix * self.factor

    def output_bias(self, block: int) -> Tensor | None:
        """The output projection's bias, `[d_model]`, or None."""
        bias = linear_bias(self.output_projection(block))
        return bias if bias is None or self.factor == 1.0 else bias * self.factor

    def attention_post(self, block: int) -> nn.Module | None:
        """The module between attention's projection and the stream, if there is one."""
        assert self.stack.attn is not None
        found = self.find(self.blocks[block], self.stack.attn.post)
        return None if found is None else found[0]

    def heads(self, point: str) -> int:
        """How many heads a point has (0 for none): keys and values have the model's true number."""
        if point not in HEAD_POINTS:
            return 0
        latent = self.stack.attn is not None and isinstance(self.stack.attn.qkv, Latent)
        return self.n_kv_heads if point.endswith((".k", ".v", ".rot_k")) and not latent else self.n_heads

    # Its points

    def has(self, point: str, block: int = 0) -> bool:
        """Whether there is such a point, in a block or outside the blocks."""
        return point in self.points(block) or point in self.points(None)

    def points(self, block: int | None) -> dict[str, Callable[[], Point]]:
        """The points of a block (or of what is outside the blocks), in forward order, each to be built when asked."""
        if block not in self._points:
            self._points[block] = self._outside() if block is None else BlockPoints(self, block).table()
        return self._points[block]

    def point(self, site: Site) -> Point:
        """The point of a standard site."""
        return self.points(site.block)[site.point]()

    def _outside(self) -> dict[str, Callable[[], Point]]:
        table: dict[str, Callable[[], Point]] = {}
        for name, path, factor in (
            ("embed", self.stack.embed, self.embed_factor),
            ("pos_embed", self.stack.pos_embed, 1.0),
            ("final_norm", self.stack.final_norm, 1.0),
        ):
            found = self.find(self.base, path)
            if found is not None and name == "pos_embed":
                at = {"module": found[0], "path": found[1], "stack": self.name}
                table[name] = partial(PositionsPoint, side="out", dims=RESIDUAL, **at)  # type: ignore[arg-type]
            elif found is not None:
                table[name] = self.writes(found, RESIDUAL, factor=factor)
        if "final_norm" in table:
            table["final_norm.scale"] = lambda: self.scale(*self.found(self.base, self.stack.final_norm))
        return table

    def writes(self, found: tuple[nn.Module, str], dims: Dims, **more: Any) -> Callable[[], Point]:
        """A point at a module's output."""
        module, path = found
        return lambda: Point(module=module, path=path, side="out", dims=dims, stack=self.name, **more)

    def reads(self, found: tuple[nn.Module, str], dims: Dims, **more: Any) -> Callable[[], Point]:
        """A point at a module's input."""
        module, path = found
        return lambda: Point(module=module, path=path, side="in", dims=dims, stack=self.name, **more)

    def scale(self, module: nn.Module, path: str) -> ScalePoint:
        """A point at a norm's denominator."""
        norm = read_norm(module, self.d_model)
        dims = (*RESIDUAL[:2], "one")
        return ScalePoint(module=module, path=path, side="in", dims=dims, norm=norm, stack=self.name)

    # Finding modules

    def find(self, root: nn.Module, path: Path | None) -> tuple[nn.Module, str] | None:
        """The first of several paths that is there, with its full name; None if none is."""
        for candidate in (path,) if isinstance(path, str) else path or ():
            try:
                found = root.get_submodule(candidate)
            except AttributeError:
                continue
            return found, self.name_of(root, candidate)
        return None

    def found(self, root: nn.Module, path: Path | None) -> tuple[nn.Module, str]:
        """The first of several paths that is there."""
        found = self.find(root, path)
        if found is None:
            raise UnsupportedArchitecture(
                f"the map of {self.architecture.family} expects {path!r} in {type(root).__name__}, which is not there"
            )
        return found

    def _get(self, root: nn.Module, path: Path) -> nn.Module:
        return self.found(root, path)[0]

    def name_of(self, root: nn.Module, path: str) -> str:
        """The full name of a module by its path in the base model or in a block."""
        inside = "" if root is self.base else f"{self.stack.blocks}.{self._index[id(root)]}"
        return ".".join(part for part in (self.prefix, inside, path) if part)

    @cached_property
    def _index(self) -> dict[int, int]:
        return {id(block): i for i, block in enumerate(self.blocks)}


class Projected(nn.Module):
    """Two linear maps as one, where the embeddings are narrower than the stream (OPT-350M)."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        """One after the other."""
        out: Tensor = self.second(self.first(x))
        return out

    @property
    def weight(self) -> Tensor:
        """The product of their matrices, `[out, in]`."""
        return (linear_matrix(self.first) @ linear_matrix(self.second)).T

    @property
    def bias(self) -> Tensor | None:
        """What they add to a stream of zeros, `[out]`, or None."""
        first, second = linear_bias(self.first), linear_bias(self.second)
        return second if first is None else self.second(first)


def _base(module: nn.Module, architecture: ArchitectureMap) -> tuple[nn.Module, str]:
    """The base model and its path; the module itself when it has none."""
    if architecture.base is not None:
        return module.get_submodule(architecture.base), architecture.base
    base: nn.Module = getattr(module, "base_model", module)
    if base is module:
        return module, ""
    return base, next(name for name, found in module.named_modules() if found is base)
