"""Directional ablation, by edits and by weights.

As edits, the component along a direction is taken off everything that enters a block and everything that a layer adds:

    x <- x - r^ (r^ . x)    at every block's input, every attention's and every MLP's output

As weights, nothing that writes to the stream can write along it any more, biases and learned positions included:

    W <- W - r^ r^' W,    b <- b - r^ (r^ . b)

The two give the same logits up to rounding, wherever what a module writes is added to the stream as it is. Behind a
norm (Gemma 2) it is not, and no change of the weights before the norm is the same as the edit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.activations.edits import ProjectOut
from assay.activations.forward import forward
from assay.activations.subject import Subject
from assay.base.errors import NumericalError, SpecError, UnsupportedArchitecture
from assay.directions.vectors import Direction
from assay.subjects.parts import Parts
from assay.subjects.tokens import from_ids

WRITTEN = ("attn.out", "cross_attn.out", "mlp.out", "ssm.out")
"""The points of a block at which something is added to the stream."""

TOLERANCE = 1e-4
"""How much of a written vector's norm may be left along a direction after the edit of the weights; float32 leaves
1e-6. `HALF` holds for half precision, whose rounding alone leaves 1e-3."""

HALF = 1e-2

Along = Direction | Float[Tensor, "*k d"]

Writer = tuple[nn.Module, str, int]
"""A module, the name of its tensor that writes to the stream, and the tensor's axis that is the stream's."""


def stream_sites(subject: Subject) -> list[str]:
    """Every site that stands for what the stream holds or is given: block inputs and what each layer adds.

    Example:
        >>> stream_sites(subject)[:3]
        ['blocks.0.resid_pre', 'blocks.0.attn.out', 'blocks.0.mlp.out']
    """
    parts, prefix = subject.parts, f"{subject.parts.name}." * bool(subject.parts.name)
    return [
        f"{prefix}blocks.{block}.{point}"
        for block in range(len(parts.blocks))
        for point in ("resid_pre", *WRITTEN)
        if parts.has(point, block)
    ]


def ablate_everywhere(subject: Subject, direction: Along) -> list[ProjectOut]:
    """The edits that keep a direction (or a span of several) out of the stream: directional ablation.

    Args:
        subject: The subject.
        direction: A `Direction`, or vectors `[d]` or `[k, d]`.

    Returns:
        One `ProjectOut` a site of `stream_sites`. Doing it twice is doing it once.

    Raises:
        SpecError: The direction is of another model, or has another width.
        NumericalError: It is zero, not finite, or the vectors are dependent.

    Source: Arditi et al. 2024, section 2.4.

    Example:
        >>> edits = ablate_everywhere(subject, torch.ones(32))
        >>> run = subject.run("When Mary", edits=edits, capture="blocks.3.resid_pre")
        >>> bool(run["blocks.3.resid_pre"].sum(-1).abs().max() < 1e-4)
        True
    """
    basis = _basis(subject, direction)
    return [ProjectOut(site, basis) for site in stream_sites(subject)]


def orthogonalised(subject: Subject, direction: Along) -> Subject:
    """A copy of a subject whose weights cannot write along a direction.

    The user's own module is not touched: the copy has a module of its own. Where the unembedding shares the embedding's
    matrix, the copy's is given one of its own first, or reading would change with writing.

    Args:
        subject: The subject.
        direction: A `Direction`, or vectors `[d]` or `[k, d]`.

    Returns:
        A subject that answers, unedited, what `ablate_everywhere` makes of the first, to 1e-3 in logits.

    Raises:
        SpecError: The direction is of another model, or has another width.
        NumericalError: It is zero, not finite, or the vectors are dependent.
        UnsupportedArchitecture: What a module writes goes through a norm before it is added, weights are quantised or
            kept elsewhere, or something that was not found still writes along the direction.

    Source: Arditi et al. 2024, section 4.1; they leave biases as they are and edit a tied unembedding with the
        embedding.

    Example:
        >>> r = torch.randn(32, generator=torch.Generator().manual_seed(0))
        >>> edited = orthogonalised(subject, r)
        >>> by_hooks = subject.run("When Mary", edits=ablate_everywhere(subject, r)).logits
        >>> bool((edited.run("When Mary").logits - by_hooks).abs().max() < 1e-3)
        True
    """
    basis = _basis(subject, direction).double()
    _refuse_norms(subject)
    module = copy.deepcopy(subject.module)
    edited = _beside(subject, module)
    writers = list(_writers(edited.parts))
    _untie(module, writers)
    with torch.no_grad():
        for owner, name, axis in writers:
            weight = _owned(owner, name)
            weight.copy_(_without(weight.double(), basis.to(weight.device), axis))
    _prove(edited, basis)
    return edited


def _basis(subject: Subject, direction: Along) -> Tensor:
    """An orthonormal basis `[k, d]` of what is to be removed, float32."""
    if isinstance(direction, Direction):
        direction.check(subject)
        rows = direction.vector[None]
    else:
        rows = torch.as_tensor(direction).detach().to("cpu")
        rows = rows[None] if rows.ndim == 1 else rows
    d = subject.parts.d_model
    if rows.ndim != 2 or rows.shape[-1] != d:
        raise SpecError(f"directions have the shape {tuple(rows.shape)}; the stream takes [k, {d}]", "direction")
    rows = rows.double()
    if not bool(torch.isfinite(rows).all()) or not bool(rows.any(1).all()):
        raise NumericalError("a direction is zero or not finite")
    rows = rows / rows.norm(dim=1, keepdim=True)
    if len(rows) > d or float(torch.linalg.svdvals(rows)[-1]) < 1e-6:
        raise NumericalError(f"the {len(rows)} directions are linearly dependent; leave one out")
    basis: Tensor = torch.linalg.qr(rows.T)[0].T.float()
    return basis


def _refuse_norms(subject: Subject) -> None:
    """Refuse a stream that is not the sum of what linear maps write."""
    parts = subject.parts
    name, why = type(subject.module).__name__, "and a norm's output cannot be kept off a direction by weights before it"
    if len(subject.stacks) > 1:
        raise UnsupportedArchitecture(
            f"{name} has the stacks {', '.join(subject.stacks)}, which share embeddings; use ablate_everywhere"
        )
    if parts.architecture.inputs != "tokens" or not parts.has("embed"):
        raise UnsupportedArchitecture(f"{name} does not start from a table of tokens; use ablate_everywhere")
    if parts.post_norm:
        raise UnsupportedArchitecture(
            f"{name} applies a norm to the stream after each addition, {why}; use ablate_everywhere"
        )
    for block in range(len(parts.blocks)):
        for layer in (parts.stack.attn, parts.stack.cross, parts.stack.mlp):
            found = parts.find(parts.blocks[block], layer.post) if layer is not None else None
            if found is not None:
                raise UnsupportedArchitecture(
                    f"{name} puts {found[1]} ({type(found[0]).__name__}) between a layer and the stream, {why}: the "
                    "edit of the weights would not equal the ablation; use ablate_everywhere"
                )
    embed = parts.points(None)["embed"]().module
    if not isinstance(embed, nn.Embedding | nn.Linear):
        raise UnsupportedArchitecture(
            f"{name} starts its stream with a {type(embed).__name__} over the embedding, {why}; use ablate_everywhere"
        )


def _beside(subject: Subject, module: nn.Module) -> Subject:
    """A subject of a copy of the module, read by the map that was proved on the original."""
    own = subject.tokenizer is not None
    edited = Subject(
        module,
        subject.tokenizer,
        architecture=subject.architecture,
        name=f"{subject.name}, orthogonalised",
        own_tokenizer=own,
    )
    edited.declared, edited.sides = dict(subject.declared), subject.sides
    edited.overwritten, edited.own_positions = set(subject.overwritten), subject.own_positions
    edited.checks = subject.checks
    return edited


def _untie(module: nn.Module, writers: Sequence[Writer]) -> None:
    """Give whatever shares a writer's tensor without writing (the unembedding) one of its own."""
    mine = {(id(owner), name) for owner, name, _ in writers}
    written = {id(getattr(owner, name, None)) for owner, name, _ in writers}
    for owner in module.modules():
        for name, weight in list(owner._parameters.items()):
            if weight is None or id(weight) not in written or (id(owner), name) in mine:
                continue
            owner._parameters[name] = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            config: Any = getattr(module, "config", None)
            if hasattr(config, "tie_word_embeddings"):
                config.tie_word_embeddings = False


def _writers(parts: Parts) -> Iterator[Writer]:
    """Everything that writes to the stream."""
    for name in ("embed", "pos_embed"):
        make = parts.points(None).get(name)
        if make is None:
            continue
        module = make().module
        if isinstance(module, nn.Linear):
            yield from _linear(module)
        else:  # a table; sinusoidal ones are a buffer of another name
            yield module, "weight" if getattr(module, "weight", None) is not None else "weights", -1
    for block in range(len(parts.blocks)):
        stack, root = parts.stack, parts.blocks[block]
        for layer in (stack.attn, stack.cross):
            if layer is not None:
                yield from _linear(parts.of(block, layer.proj))
        if stack.ssm is not None:
            yield from _linear(parts.of(block, f"{stack.ssm.path}.out_proj"))
        if stack.mlp is None:
            continue
        routed = parts.find(root, stack.mlp.router) is not None and parts.find(root, stack.mlp.path) is not None
        if routed:
            yield from _experts(parts.of(block, stack.mlp.path or ""), parts.d_model)
        else:
            yield from _linear(parts.of(block, stack.mlp.down))


def _linear(module: nn.Module) -> Iterator[Writer]:
    """A linear map's matrix and bias; `nn.Linear` keeps `[out, in]`, transformers' `Conv1D` `[in, out]`."""
    yield module, "weight", -1 if type(module).__name__ == "Conv1D" else 0
    if getattr(module, "bias", None) is not None:
        yield module, "bias", 0


def _experts(root: nn.Module, d: int) -> Iterator[Writer]:
    """The maps out of every expert: linear ones by name, and stacks `[expert, in, out]` or `[expert, out, in]`."""
    for path, module in root.named_modules():
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in ("down_proj", "w2", "output_linear"):
            yield from _linear(module)
        stacked = getattr(module, "down_proj", None)
        if isinstance(stacked, nn.Parameter) and stacked.ndim == 3:
            turned = getattr(module, "is_transposed", None)
            if turned is None:
                turned = stacked.shape[-1] == d and stacked.shape[-2] != d
            yield module, "down_proj", -1 if turned else -2
            if isinstance(getattr(module, "down_proj_bias", None), nn.Parameter):
                yield module, "down_proj_bias", -1


def _owned(owner: nn.Module, name: str) -> Tensor:
    """A weight that can be written to.

    Raises:
        UnsupportedArchitecture: It is packed, or kept elsewhere.
    """
    weight = getattr(owner, name, None)
    if not isinstance(weight, Tensor) or weight.device.type == "meta" or not weight.is_floating_point():
        kept = "absent" if not isinstance(weight, Tensor) else f"{weight.dtype} on {weight.device}"
        raise UnsupportedArchitecture(
            f"the {name} of {type(owner).__name__} is {kept}; weights are edited in floating point where they compute. "
            "Load the model so, or use ablate_everywhere"
        )
    return weight


def _without(weight: Tensor, basis: Tensor, axis: int) -> Tensor:
    """A weight without what it writes along a basis: `W - W B' B` along the stream's axis."""
    moved = weight.movedim(axis, -1)
    return (moved - (moved @ basis.T) @ basis).movedim(-1, axis)


def _prove(edited: Subject, basis: Tensor) -> None:
    """See on a few tokens that nothing writes along the directions any more.

    Raises:
        UnsupportedArchitecture: Something does, and the map does not say what.
    """
    embed: Any = edited.parts.points(None)["embed"]().module
    size = int(getattr(embed, "num_embeddings", None) or edited.config.vocab_size)
    ids = (torch.arange(6, device=edited.device) * 7 + 5).remainder(size)[None]
    sites = stream_sites(edited)
    run = forward(edited, from_ids(ids), capture=sites)
    for site in sites:
        held = run[site].double().cpu()
        left = float((held @ basis.T.cpu()).norm() / held.norm().clamp(min=1e-30))
        if not left <= (HALF if run[site].dtype in (torch.float16, torch.bfloat16) else TOLERANCE):
            raise UnsupportedArchitecture(
                f"after the edit {site} of {type(edited.module).__name__} still holds {left:.2g} of its norm along the "
                "direction: something writes to the stream that its map does not name. Use ablate_everywhere"
            )
