"""What the sites of one stack have to do with each other, whatever the model: the identities of the self-check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from assay.base.errors import UnsupportedArchitecture
from assay.subjects.architecture import Latent
from assay.subjects.linear import linear_bias, linear_matrix
from assay.subjects.norms import read_norm
from assay.subjects.parts import Parts
from assay.subjects.placement import quantised
from assay.subjects.points import Traffic

ACTIVATIONS = (
    *("act_fn", "activation_fn", "act", "activation", "activation_func"),
    *("intermediate_act_fn", "gelu_impl", "nonlinearity"),
)
"""What modules call their nonlinearity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One identity and how far the model is from it.

    Args:
        identity: What should hold.
        error: The largest absolute difference, relative to the largest value.
        tolerance: How much is float rounding.
    """

    identity: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is float rounding."""
        return self.error <= self.tolerance


def compare(identity: str, found: Tensor, expected: Tensor, tolerance: float) -> Check:
    """Hold one tensor against another; shapes that differ are as wrong as can be.

    Args:
        identity: What should hold.
        found: One side of it.
        expected: The other.
        tolerance: How much is rounding, relative to the largest value.
    """
    if found.shape != expected.shape:
        shapes = f"they are shaped {tuple(found.shape)} and {tuple(expected.shape)}"
        return failed(identity, shapes)
    scale = expected.float().abs().max().clamp(min=1e-12)
    error = float((found.float().to(expected.device) - expected.float()).abs().max() / scale)
    return Check(identity=identity, error=error if error == error else float("inf"), tolerance=tolerance)


def failed(identity: str, why: str) -> Check:
    """An identity that cannot even be computed."""
    return Check(identity=f"{identity} ({why})", error=float("inf"), tolerance=0.0)


@runtime_checkable
class Readable(Protocol):
    """What gives a tensor for a site's name: a run, one of its rows, or a record of what passed through the modules."""

    def __getitem__(self, name: str, /) -> Tensor:
        """What was captured at a site."""


class Row:
    """One row of a run.

    Args:
        run: The run.
        row: Which.
    """

    def __init__(self, run: Readable, row: int) -> None:
        self.run, self.row = run, row

    def __getitem__(self, name: str) -> Tensor:
        """What was captured at a site, with one row."""
        return self.run[name][self.row : self.row + 1]


@dataclass(slots=True)
class Identities:
    """The identities of one stack, on one run in which everything was captured.

    Args:
        parts: The stack.
        run: The run.
        loose: How much is rounding in the precision of the run.
        source: The stack that cross-attention reads from, if there is one.
    """

    parts: Parts
    run: Readable
    loose: float = 1e-4
    source: Parts | None = None

    def check(self, identity: str, found: Tensor, expected: Tensor) -> Check:
        """Hold one tensor against another, up to rounding."""
        return compare(identity, found, expected, self.loose)

    def at(self, block: int) -> str:
        """A block's name."""
        return f"{self.prefix}blocks.{block}"

    @property
    def prefix(self) -> str:
        """What the names of this stack's sites begin with."""
        return f"{self.parts.name}." if self.parts.name else ""

    def get(self, block: int, point: str, run: Readable | None = None) -> Tensor:
        """What was captured at a point of a block."""
        return (run or self.run)[f"{self.at(block)}.{point}"]

    def hidden_states(self, hidden: tuple[Tensor, ...]) -> Iterator[Check]:
        """What the model reports of its stream: what enters each block, or (state-space models) what leaves it."""
        n = len(self.parts.blocks)
        point, last = ("resid_pre", n) if self.parts.stack.ssm is None else ("resid_post", n - 1)
        for i, found in enumerate(hidden[:last]):
            yield self.check(f"{self.at(i)}.{point} equals output_hidden_states[{i}]", self.get(i, point), found)

    def embeddings(self) -> Iterator[Check]:
        """The stream starts with the embeddings."""
        if self.parts.has("embed"):
            stream = self.run[f"{self.prefix}embed"]
            if self.parts.has("pos_embed"):
                stream = stream + self.run[f"{self.prefix}pos_embed"]
            yield self.check(f"the embeddings make {self.at(0)}.resid_pre", stream, self.get(0, "resid_pre"))

    def block(self, i: int) -> Iterator[Check]:
        """All of a block's own."""
        parts = self.parts
        yield from self.norms(i)
        yield from self.adds_up(i, self.run)
        for kind in ("attn", "cross_attn"):
            if parts.has(f"{kind}.z", i):
                yield from self.reads(i, kind)
                yield from self.attention(i, kind)
        if parts.has("mlp.in", i):
            yield self.check(f"{self.at(i)}.mlp.in is what {self.read_by(i, 'mlp')}", *self.entering(i, "mlp"))
        if parts.has("mlp.post", i):
            yield from self.mlp(i)
        if parts.has("mlp.experts", i):
            yield self.experts(i)

    # What layers read

    def before(self, i: int, layer: str) -> str:
        """The point at which the stream enters a layer."""
        if self.parts.parallel or layer in ("attn", "ssm"):
            return "resid_pre"
        crossed = layer == "mlp" and self.parts.has("resid_cross", i)
        return "resid_cross" if crossed else "resid_mid"

    def norm_of(self, i: int, layer: str) -> str | None:
        """The norm that a layer reads through, None where it reads the stream itself."""
        if self.parts.post_norm:
            return None
        name = {"attn": "norm1", "ssm": "norm1", "cross_attn": "norm_cross", "mlp": "norm2"}[layer]
        names = (name, "norm1") if layer == "mlp" and self.parts.parallel else (name,)
        return next((name for name in names if self.parts.has(name, i)), None)

    def read_by(self, i: int, layer: str) -> str:
        """What a layer reads, in words."""
        norm = self.norm_of(i, layer)
        return f"leaves {norm}" if norm else f"there is at {self.before(i, layer)}"

    def entering(self, i: int, layer: str) -> tuple[Tensor, Tensor]:
        """What is captured before the MLP, and what should be there."""
        return self.get(i, f"{layer}.in"), self.get(i, self.norm_of(i, layer) or self.before(i, layer))

    def norms(self, i: int) -> Iterator[Check]:
        """Each norm is that of the stream its layer reads, as gain, scale and bias."""
        for layer in ("attn", "ssm", "cross_attn", "mlp"):
            name = self.norm_of(i, layer)
            here = self.parts.has(f"{layer}.out", i) and name is not None
            if here and not (layer == "mlp" and name == "norm1"):
                assert name is not None
                before = self.before(i, layer)
                found = self.normed(i, name, self.get(i, before))
                yield self.check(f"{self.at(i)}.{name} is the norm of {before}", found, self.get(i, name))

    def normed(self, i: int, name: str, x: Tensor) -> Tensor:
        """A stream through one of a block's norms, read as gain, scale and bias."""
        norm = read_norm(self.parts.points(i)[name]().module, self.parts.d_model)
        return norm.frozen(x, norm.scale(x)) + norm.bias

    def reads(self, i: int, kind: str) -> Iterator[Check]:
        """Queries are made of what is read here, and a cross-attention's keys of what leaves the other stack."""
        layer = self.parts.stack.attn if kind == "attn" else self.parts.stack.cross
        assert layer is not None
        latent = isinstance(layer.qkv, Latent)
        x = self.get(i, self.norm_of(i, kind) or self.before(i, kind))
        query = self.parts.points(i)[f"{kind}.q"]().module
        if not latent or linear_matrix(query).shape[0] == self.parts.d_model:
            yield self.projected(i, f"{kind}.q", x, self.read_by(i, kind))
        if kind == "cross_attn" and self.source is None:
            yield failed(f"{self.at(i)}.cross_attn reads another stack", "the map names none")
        elif kind == "cross_attn" and self.source is not None:
            there = f"{self.source.name}." if self.source.name else ""
            last = f"{there}blocks.{len(self.source.blocks) - 1}.resid_post"
            end = f"{there}final_norm" if self.source.has("final_norm") else last
            yield self.projected(i, f"{kind}.k", self.run[end], f"leaves {end}")

    def projected(self, i: int, point: str, x: Tensor, what: str) -> Check:
        """A projection of what is read is what was captured of it."""
        found, identity = self.parts.points(i)[point](), f"{self.at(i)}.{point} is made of what {what}"
        try:
            value = found.read(Traffic(found.module, (), {}, found.module(x), x.shape[0]))
        except RuntimeError as error:
            return failed(identity, str(error))
        return self.check(identity, value, self.get(i, point))

    # What layers write

    def adds_up(self, i: int, run: Readable) -> Iterator[Check]:
        """Every layer's output is added to the stream, and a post-norm block norms each sum."""
        name, parts, stream = self.at(i), self.parts, self.get(i, "resid_pre", run)
        layers = [("attn", "norm1", "resid_mid"), ("cross_attn", "norm_cross", "resid_cross")]
        layers += [("ssm", "", ""), ("mlp", "norm2", "resid_post")]
        for layer, norm, after in layers:
            if not parts.has(f"{layer}.out", i):
                continue
            out = self.get(i, f"{layer}.out", run)
            stream = stream.to(out.device) + out
            if parts.post_norm:
                stream = self.normed(i, norm, stream)
            if after != "resid_post" and parts.has(after, i):
                yield self.check(f"{name}: adding {layer}.out gives {after}", stream, self.get(i, after, run))
        whole = "norms of what enters plus each layer" if parts.post_norm else "what enters plus its layers' outputs"
        yield self.check(f"{name}: {whole} leaves", stream, self.get(i, "resid_post", run))

    def attention(self, i: int, kind: str) -> Iterator[Check]:
        """The pattern mixes values into `z`, sees nothing later where it is causal, and `z` is projected out."""
        name, parts, z = f"{self.at(i)}.{kind}", self.parts, self.get(i, f"{kind}.z")
        layer = parts.stack.attn if kind == "attn" else parts.stack.cross
        assert layer is not None
        if parts.has(f"{kind}.pattern", i):
            pattern, value = self.get(i, f"{kind}.pattern"), self.get(i, f"{kind}.v")
            yield self.mixed(f"{name}.pattern times v is z", pattern, value, z)
            if parts.stack.causal and kind == "attn":
                later = pattern.triu(1)
                yield self.check(f"{name}.pattern sees nothing later", later, torch.zeros_like(later))
        yield self.written(i, f"{kind}.out", parts.of(i, layer.proj), z.flatten(-2), layer.post, f"{kind}.z times W_O")

    def mixed(self, identity: str, pattern: Tensor, value: Tensor, z: Tensor) -> Check:
        """A pattern mixes values into z."""
        config: Any = self.parts.config
        clip = getattr(config, "clip_qkv", None) or getattr(getattr(config, "attn_config", None), "clip_qkv", None)
        value = value if clip is None else value.clamp(-clip, clip)
        shapes = pattern.shape[1] / value.shape[2], pattern.shape[-1] / value.shape[1]
        if shapes[0] % 1 or shapes[1] != 1:
            seen, has = (pattern.shape[1], pattern.shape[-1]), (value.shape[2], value.shape[1])
            return failed(identity, f"heads and keys: {seen} in the pattern, {has} in v")
        value = value.repeat_interleave(int(shapes[0]), 2)
        if pattern.shape[1] * value.shape[-1] != z.shape[2] * z.shape[3]:
            return failed(identity, f"{pattern.shape[1]} heads of {value.shape[-1]}, and z is {tuple(z.shape[2:])}")
        mixed = torch.einsum("bhqk,bkhd->bqhd", pattern.float(), value.to(pattern.device).float())
        return self.check(identity, mixed, z)

    def written(self, i: int, out: str, module: nn.Module, x: Tensor, post: Any, what: str) -> Check:
        """A projection, and what stands between it and the stream, give what a layer writes."""
        identity = f"{self.at(i)}.{what} is {out}"
        if quantised(module):  # it may round its inputs too: only the module knows
            found = module(x)
        else:
            try:
                matrix, bias = linear_matrix(module), linear_bias(module)
            except UnsupportedArchitecture as error:
                return failed(identity, f"{self.name_of(module)}: {error}")
            if x.shape[-1] != matrix.shape[0]:
                return failed(identity, f"they are {x.shape[-1]} and {matrix.shape[0]} wide")
            found = x.to(matrix.dtype) @ matrix.to(x.device)
            found = found if bias is None else found + bias.to(x.device)
        between = self.parts.find(self.parts.blocks[i], post)
        found = found if between is None else between[0](found)
        return self.check(identity, found * self.parts.factor, self.get(i, out))

    def name_of(self, module: nn.Module) -> str:
        """A module's dotted path in the model."""
        return next((repr(name) for name, found in self.parts.module.named_modules() if found is module), "a module")

    def mlp(self, i: int) -> Iterator[Check]:
        """What goes through the nonlinearity, and out."""
        name, parts = self.at(i), self.parts
        assert parts.stack.mlp is not None
        pre, post = self.get(i, "mlp.pre"), self.get(i, "mlp.post")
        down = parts.of(i, parts.stack.mlp.down)
        yield self.written(i, "mlp.out", down, post, parts.stack.mlp.post, "mlp.post times W_out")
        gated = parts.has("mlp.gate", i)
        activation = self.activation(i)
        if pre.shape != post.shape:
            yield self.check(f"{name}.mlp.pre and mlp.post are of the same units", pre, post)
        elif activation is not None:
            yield from self.nonlinear(i, activation, self.get(i, "mlp.gate") if gated else None, pre, post)

    def nonlinear(
        self, i: int, activation: Callable[[Tensor], Tensor], gate: Tensor | None, pre: Tensor, post: Tensor
    ) -> Iterator[Check]:
        """The nonlinearity of the gate times `pre`, or of `pre`, is `post`.

        Some models do more there (a clamp, a norm). A map is refused only where a mistake in it explains the values:
        gate and `pre` exchanged, or one of them taken twice or forgotten.
        """
        name = f"{self.at(i)}.mlp.gate" if gate is not None else f"{self.at(i)}.mlp.pre"
        rule = f"{name}, through the nonlinearity, " + ("times pre is post" if gate is not None else "is post")
        here = self.check(rule, activation(pre) if gate is None else activation(gate) * pre, post)
        if here.passed:
            yield here
            return
        values = [pre, *(() if gate is None else (gate,)), *self.beside(i, pre)]
        pairs = [(activation(a) * b) for a in values for b in values]
        if any(self.check("", found, post).passed for found in [*map(activation, values), *pairs]):
            yield here

    def beside(self, i: int, pre: Tensor) -> Iterator[Tensor]:
        """What other linear maps of the MLP, with as many units, make of what it reads."""
        module = self.parts.points(i)["mlp.pre"]().module
        path = self.parts.points(i)["mlp.pre"]().path
        around = self.parts.module.get_submodule(path.rpartition(".")[0])
        for other in around.children():
            if other is not module and isinstance(other, nn.Linear) and other.weight.shape == module.weight.shape:
                yield other(self.get(i, "mlp.in")).view(pre.shape)

    def activation(self, i: int) -> Callable[[Tensor], Tensor] | None:
        """The nonlinearity of a block's MLP, where a module around it has one under a usual name."""
        path = self.parts.points(i)["mlp.pre"]().path
        for depth in (1, 2):
            owner = self.parts.module.get_submodule(".".join(path.split(".")[:-depth]))
            for name in ACTIVATIONS:
                found = getattr(owner, name, None)
                if callable(found):
                    chosen: Callable[[Tensor], Tensor] = found
                    return chosen
        return None

    def experts(self, i: int) -> Check:
        """The experts chosen are experts, no token chooses one twice, and each choice has a weight."""
        chosen, weights = self.get(i, "mlp.experts"), self.get(i, "mlp.weights")
        n = self.get(i, "mlp.router").shape[-1]
        distinct = all(len(set(row)) == len(row) for row in chosen.flatten(0, -2).tolist())
        whole = not chosen.is_floating_point() and weights.is_floating_point()
        good = distinct and whole and chosen.shape == weights.shape and bool(((chosen >= 0) & (chosen < n)).all())
        return Check(
            identity=f"{self.at(i)}.mlp.experts are choices of experts", error=0.0 if good else 1.0, tolerance=0.0
        )

    def final(self) -> Iterator[Check]:
        """From the last block to the logits."""
        parts, prefix = self.parts, self.prefix
        normed = self.get(len(parts.blocks) - 1, "resid_post")
        if parts.has("final_norm"):
            found = self.run[f"{prefix}final_norm"]
            norm = read_norm(parts.final_norm, parts.d_model)
            expected = norm.frozen(normed, norm.scale(normed)) + norm.bias
            what = f"{prefix}final_norm is the norm of the last block's stream, read as gain and scale"
            yield self.check(what, expected[:, : found.shape[1]], found)
            normed = found
        if parts.has_unembedding:
            weight, bias = parts.unembedding()
            what = "final_norm times the unembedding (scaled, soft-capped) gives the logits"
            if normed.shape[-1] != weight.shape[-1]:
                yield failed(what, f"they are {normed.shape[-1]} and {weight.shape[-1]} wide")
                return
            logits = normed.to(weight.dtype) @ weight.T + (0 if bias is None else bias)
            if parts.softcap is not None:
                logits = parts.softcap * torch.tanh(logits / parts.softcap)
            yield self.check(what, logits, self.run["logits"])
