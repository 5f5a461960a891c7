"""The points of one block: a table from names to how each is read, made from the block's declaration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from assay.base.errors import UnsupportedArchitecture
from assay.subjects.architecture import Attention, Fused, Latent, Mlp, Path, setting
from assay.subjects.linear import linear_bias as linear_bias
from assay.subjects.linear import linear_matrix as linear_matrix
from assay.subjects.linear import out_width as out_width
from assay.subjects.points import RESIDUAL, ColumnsPoint, Dims, ExpertsPoint, Point, ResultPoint

if TYPE_CHECKING:
    from assay.subjects.parts import Parts

HEADS: Dims = ("batch", "pos", "head", "d_head")
HIDDEN: Dims = ("batch", "pos", "d_mlp")
PATTERN: Dims = ("batch", "head", "query", "key")
EXPERTS: Dims = ("batch", "pos", "expert")
CHOICES: Dims = ("batch", "pos", "choice")
STATE: Dims = ("batch", "pos", "d_ssm")


class BlockPoints:
    """Builds the table of one block's points."""

    def __init__(self, parts: Parts, block: int) -> None:
        self.parts, self.block, self.stack = parts, block, parts.stack
        self.root = parts.blocks[block]
        self.path = parts.name_of(parts.base, f"{self.stack.blocks}.{block}")

    def table(self) -> dict[str, Callable[[], Point]]:
        """The points, in forward order."""
        parts, stack = self.parts, self.stack
        table = {"resid_pre": parts.reads((self.root, self.path), RESIDUAL)}
        if stack.attn is not None:
            table |= self.norm("norm1", stack.attn.norm) | self.attention("attn", stack.attn)
        if stack.ssm is not None:
            table |= self.norm("norm1", stack.ssm.norm) | self.state_space()
        if stack.attn is not None and stack.mlp is not None and not parts.parallel:
            table["resid_mid"] = self.between(stack.attn.norm, stack.cross or stack.mlp)
        if stack.cross is not None:
            table |= self.norm("norm_cross", stack.cross.norm) | self.attention("cross_attn", stack.cross)
            table["resid_cross"] = self.between(stack.cross.norm, stack.mlp)
        if stack.mlp is not None:
            table |= self.norm("norm2", stack.mlp.norm) | self.mlp(stack.mlp)
        table["resid_post"] = parts.writes((self.root, self.path), RESIDUAL)
        return table

    def find(self, path: Path | None) -> tuple[nn.Module, str] | None:
        """The first of several paths in the block that is there, with its full name; None if none is."""
        return self.parts.find(self.root, path)

    def found(self, path: Path | None) -> tuple[nn.Module, str]:
        """The same, and an error if none is there."""
        return self.parts.found(self.root, path)

    def between(self, before: Path | None, after: Attention | Mlp | None) -> Callable[[], Point]:
        """The stream between two layers: what the second's norm reads, or (post-norm) what the first's gives."""
        if self.parts.post_norm:
            return self.parts.writes(self.found(before), RESIDUAL)
        assert after is not None
        found = self.find(after.norm) or self.find(after.path) or self.found(getattr(after, "up", None))
        return self.parts.reads(found, RESIDUAL, in_place=True)

    def norm(self, name: str, path: Path | None) -> dict[str, Callable[[], Point]]:
        """A norm's output and its denominator; nothing where there is none."""
        found = self.find(path)
        if found is None or isinstance(found[0], nn.Identity):
            return {}
        return {name: self.parts.writes(found, RESIDUAL), f"{name}.scale": lambda: self.parts.scale(*found)}

    def out(self, layer: Attention | Mlp, otherwise: tuple[nn.Module, str]) -> Callable[[], Point]:
        """What a layer adds to the stream: the output of what comes last before the addition."""
        return self.parts.writes(self.find(layer.post) or otherwise, RESIDUAL, factor=self.parts.factor)

    def attention(self, kind: str, attn: Attention) -> dict[str, Callable[[], Point]]:
        """The points of an attention layer."""
        parts = self.parts
        module, path = self.found(attn.path)
        projection = self.found(attn.proj)
        table = {f"{kind}.{name}": make for name, make in self.projections(kind, attn).items()}
        inside = {"interface": ("rot_q", "rot_k", "scores", "pattern"), "function": ("scores", "pattern")}
        for name in inside.get(attn.inside or "", ()):
            dims, head_dim = (HEADS, 2) if name.startswith("rot") else (PATTERN, 1)
            way = "attention" if attn.inside == "interface" else "function"
            side = {"module": module, "path": path, "side": way, "dims": dims, "head_dim": head_dim}
            away = self.stack.source if kind == "cross_attn" and name == "rot_k" else parts.name
            table[f"{kind}.{name}"] = partial(Point, **side, stack=away)  # type: ignore[arg-type]
        heads = _split_heads(parts.n_heads)
        table[f"{kind}.z"] = parts.reads(projection, HEADS, view=heads, head_dim=2)
        table[f"{kind}.result"] = lambda: ResultPoint(
            module=projection[0],
            path=projection[1],
            side="out",
            dims=("batch", "pos", "head", "d_model"),
            head_dim=2,
            n_heads=parts.n_heads,
            weight=lambda: linear_matrix(projection[0]),
            factor=parts.factor,
            stack=parts.name,
        )
        table[f"{kind}.out"] = self.out(attn, projection)
        return table

    def projections(self, kind: str, attn: Attention) -> dict[str, Callable[[], Point]]:
        """Queries, keys and values."""
        parts, qkv = self.parts, attn.qkv
        away = self.stack.source if kind == "cross_attn" else parts.name
        stacks = {"q": parts.name, "k": away, "v": away}
        if isinstance(qkv, Fused):
            found = self.found(qkv.path)
            return {name: self.fused(found, qkv.layout, name) for name in "qkv"}
        if isinstance(qkv, Latent):
            nope = int(setting(parts.config, qkv.nope))
            key_value = self.found(qkv.kv)

            def split(raw: Tensor) -> Tensor:
                return raw.view(raw.shape[0], raw.shape[-2], parts.n_heads, -1)

            return {
                "q": parts.writes(self.found(qkv.q), HEADS, view=split, head_dim=2),
                "k": parts.writes(key_value, HEADS, view=lambda raw: split(raw)[..., :nope], head_dim=2),
                "v": parts.writes(key_value, HEADS, view=lambda raw: split(raw)[..., nope:], head_dim=2),
            }
        table: dict[str, Callable[[], Point]] = {}
        for name, path in (("q", qkv.q), ("k", qkv.k), ("v", qkv.v)):
            module, where = self.found(path)
            more = {"view": _split_heads(parts.heads(f"{kind}.{name}")), "head_dim": 2, "stack": stacks[name]}
            side = {"module": module, "path": where, "side": "out", "dims": HEADS, **more}
            table[name] = partial(Point, **side)  # type: ignore[arg-type]
        return table

    def fused(self, found: tuple[nn.Module, str], layout: str, name: str) -> Callable[[], Point]:
        """Queries, keys or values of one fused map: a view where one exists, else the columns by number."""
        parts = self.parts
        q, kv = parts.n_heads, parts.n_kv_heads
        count = q if name == "q" else kv
        width = out_width(found[0])
        if width % (12 if layout == "sharded" else q + 2 * kv) or q % kv:
            raise UnsupportedArchitecture(
                f"{found[1]} has {width} columns, which are not {q} queries and {kv} keys and values of one width"
            )
        if layout == "blocks":
            first = {"q": 0, "k": q, "v": q + kv}[name]

            def blocks(raw: Tensor) -> Tensor:
                return _split_heads(q + 2 * kv)(raw).narrow(-2, first, count)

            return parts.writes(found, HEADS, view=blocks, head_dim=2)
        if layout == "grouped" and (q == kv or name != "q"):
            index = q // kv + "qkv".index(name) - 1

            def grouped(raw: Tensor) -> Tensor:
                return raw.view(*raw.shape[:-1], kv, q // kv + 2, -1).select(-2, index)

            return parts.writes(found, HEADS, view=grouped, head_dim=2)
        module, path = found
        columns = _grouped_queries(width, q, kv) if layout == "grouped" else _sharded(width, q, name)
        return lambda: ColumnsPoint(
            module=module,
            path=path,
            side="out",
            dims=HEADS,
            head_dim=2,
            columns=columns,
            n_heads=count,
            stack=parts.name,
        )

    def mlp(self, mlp: Mlp) -> dict[str, Callable[[], Point]]:
        """The points of a feed-forward layer, dense or of experts."""
        parts = self.parts
        module = self.find(mlp.path)
        if mlp.router is not None and (router := self.find(mlp.router)) is not None:
            assert module is not None
            return {"mlp.in": parts.reads(module, RESIDUAL), **self.experts(router), "mlp.out": self.out(mlp, module)}
        fused = mlp.gate_up or mlp.up_gate
        up = self.found(fused or mlp.up)
        down = self.found(mlp.down)
        table = {"mlp.in": parts.reads(module or up, RESIDUAL)}
        if fused is not None:
            for name, half in (("mlp.pre", 1), ("mlp.gate", 0)):
                index = 1 - half if mlp.up_gate else half
                table[name] = parts.writes(up, HIDDEN, view=_half(index))
        else:
            table["mlp.pre"] = parts.writes(up, HIDDEN)
            gate = self.find(mlp.gate)
            if gate is not None:
                table["mlp.gate"] = parts.writes(gate, HIDDEN)
        table["mlp.post"] = parts.reads(down, HIDDEN)
        table["mlp.out"] = self.out(mlp, down)
        return table

    def experts(self, router: tuple[nn.Module, str]) -> dict[str, Callable[[], Point]]:
        """A router's logits, which experts it chose, and what each one's output is multiplied by."""
        parts = self.parts
        if isinstance(router[0], nn.Linear) and "Router" not in type(router[0]).__name__:  # Phi-MoE's chooses too
            return {"mlp.router": parts.writes(router, EXPERTS)}
        why = "the router has chosen by the time its logits can be seen; edit 'mlp.experts' and 'mlp.weights'"
        return {
            "mlp.router": parts.writes(router, EXPERTS, read_only=why),
            "mlp.weights": parts.writes(router, CHOICES, item=1),
            "mlp.experts": lambda: ExpertsPoint(
                module=router[0], path=router[1], side="out", dims=CHOICES, item=2, stack=parts.name
            ),
        }

    def state_space(self) -> dict[str, Callable[[], Point]]:
        """A selective state space: gate, input, step size, B and C, and what leaves the scan."""
        parts, ssm = self.parts, self.stack.ssm
        assert ssm is not None
        config: Any = parts.config
        state = int(read_field(config, "state_size"))
        projected = self.found(f"{ssm.path}.in_proj")
        down = self.found(f"{ssm.path}.out_proj")
        width = linear_matrix(down[0]).shape[0]
        if ssm.kind == "mamba":
            rank = int(read_field(config, "time_step_rank"))
            small = self.found(f"{ssm.path}.x_proj")
            spans = [("x", projected, 0, width), ("gate", projected, width, width), ("dt", small, 0, rank)]
            spans += [("B", small, rank, state), ("C", small, rank + state, state)]
        else:
            groups = int(read_field(config, "n_groups")) * state
            first = out_width(projected[0]) - 2 * width - 2 * groups - int(config.num_heads)
            spans = [("gate", projected, first, width), ("x", projected, first + width, width)]
            spans += [("B", projected, first + 2 * width, groups), ("C", projected, first + 2 * width + groups, groups)]
            spans += [("dt", projected, first + 2 * width + 2 * groups, int(config.num_heads))]
        table = {
            f"ssm.{name}": parts.writes(where, STATE, view=_span(start, size)) for name, where, start, size in spans
        }
        table["ssm.post"] = parts.reads(down, STATE)
        table["ssm.out"] = parts.writes(down, RESIDUAL)
        return table


def read_field(config: Any, *names: str) -> Any:
    """The first of several fields that a config has.

    Raises:
        UnsupportedArchitecture: If it has none of them.
    """
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    raise UnsupportedArchitecture(f"{type(config).__name__} has none of the fields {', '.join(names)}")


def _split_heads(n_heads: int) -> Callable[[Tensor], Tensor]:
    def view(raw: Tensor) -> Tensor:
        return raw.view(*raw.shape[:-1], n_heads, -1)

    return view


def _half(index: int) -> Callable[[Tensor], Tensor]:
    def view(raw: Tensor) -> Tensor:
        return raw.chunk(2, -1)[index]

    return view


def _span(start: int, size: int) -> Callable[[Tensor], Tensor]:
    def view(raw: Tensor) -> Tensor:
        return raw.narrow(-1, start, size)

    return view


def _grouped_queries(width: int, n_heads: int, n_kv: int) -> Tensor:
    """The columns of the queries in groups of `[q ... q k v]`."""
    group = torch.arange(width).view(n_kv, n_heads // n_kv + 2, -1)
    return group[:, :-2].reshape(-1)


def _sharded(width: int, n_heads: int, name: str) -> Tensor:
    """CodeGen's columns: four shards of `[q | v | k]`, each over a quarter of the heads."""
    shards = torch.arange(width).view(4, 3, -1)
    return shards[:, "qvk".index(name)].reshape(-1)
