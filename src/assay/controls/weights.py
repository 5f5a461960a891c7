"""The same architecture with weights that learned nothing: what a claim about a trained model must not survive.

Two nulls, both of which keep each tensor's scale (a third, the model's own step-0 checkpoint, comes from outside:
`checkpoint_control`):

- `"gaussian"`: every entry of a weight matrix is drawn from N(m, s^2), with m and s that matrix's own mean and standard
  deviation. Nothing but the scale of each matrix is left.
- `"spectrum"`: W' = Q1 W Q2 with random orthogonal Q1 and Q2. The singular values stay exactly as training made them;
  the singular vectors, and with them every alignment between layers, are gone. A claim that dies under "gaussian" and
  lives here was about spectra.

Vectors (norm gains, biases) stay as they are: they set the scale at which the matrices work, and their few entries say
nothing about what the matrices computed. Gains drawn at random would turn signs and starve channels; a forward pass
broken that way is a null too easy to beat. Conv kernels are taken as (out, in * kernel) matrices, stacks of matrices as
one matrix each.

Sources: Heap et al. 2025, "Sparse autoencoders can interpret randomly initialized transformers" (the Gaussian null,
matched in scale); the spectrum-matched null is ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import nn
from torch.nn.modules.conv import _ConvNd

from assay.base.errors import SpecError, UnsupportedArchitecture
from assay.base.findings import Control
from assay.base.rng import torch_stream
from assay.base.stats import Side
from assay.controls.rotations import Rotation, Rotations, SignedPermutation
from assay.controls.verdicts import compare

WeightKind = Literal["gaussian", "spectrum"]
"""The weight nulls."""

_CHUNK = 8192  # rows of a vocabulary rotated at once


class WeightNull:
    """Many draws of one null, written into one buffer: memory for a single second copy of the weights.

    The user's module is read and never written. The copy has its own parameters; modules, buffers (rotary tables,
    masks), config, dtype, device, attention implementation and train or eval mode are copied from it, and tied weights
    stay tied. Hooks are copied too: the null is the model as it is used, with other weights.

    Args:
        module: The trained module.
        kind: `"gaussian"` or `"spectrum"`.
        keep_embeddings: Keep the `nn.Embedding` tables (and an unembedding tied to one) and redraw the rest.

    Raises:
        SpecError: `kind` is unknown.
        UnsupportedArchitecture: The module cannot be copied, or its weights are quantised or on the meta device.

    Example:
        >>> trained = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> null = WeightNull(trained, "spectrum")
        >>> redrawn = null.draw(seed=0)
        >>> bool(torch.allclose(torch.linalg.svdvals(redrawn[0].weight), torch.linalg.svdvals(trained[0].weight)))
        True
    """

    def __init__(self, module: nn.Module, kind: WeightKind, *, keep_embeddings: bool = False) -> None:
        if kind not in get_args(WeightKind):
            raise SpecError(f"kind is {kind!r}; valid: {', '.join(map(repr, get_args(WeightKind)))}", "kind")
        self.kind: WeightKind = kind
        self._original = module
        self._module = _copy_without_weights(module)
        self._tensors = tuple(_tensors(module, self._module, keep_embeddings))
        self._moments = {
            tensor.name: tensor.moments() for tensor in self._tensors if tensor.redrawn and kind == "gaussian"
        }

    @torch.no_grad()
    def draw(self, seed: int, number: int = 0) -> nn.Module:
        """Write one draw into the buffer and return the buffer: the module of the previous draw is this same object.

        Args:
            seed: Seed of the streams; each tensor has its own, named by the tensor.
            number: Which draw of this seed.
        """
        rotations = Rotations(seed, ("weights", number))
        for tensor in self._tensors:
            generator = torch_stream(seed, "weights", number, self.kind, tensor.name)
            if not tensor.redrawn:
                tensor.target.copy_(tensor.source)
            elif self.kind == "gaussian":
                _fill_normal(tensor.target, *self._moments[tensor.name], generator)
            else:
                for source, target in tensor.matrices():
                    left = rotations.draw(source.shape[0], generator)
                    _rotate_into(target, source, left, rotations.draw(source.shape[1], generator))
        self._restore_buffers()
        return self._module

    def sample(self, run: Callable[[nn.Module], float], n: int, seed: int) -> tuple[float, ...]:
        """Return `run(module)` for n draws: the null of whatever `run` estimates.

        Example:
            >>> null = WeightNull(nn.Linear(3, 1), "gaussian")
            >>> len(null.sample(lambda module: module(torch.ones(3)).item(), n=5, seed=0))
            5
        """
        return tuple(float(run(self.draw(seed, number))) for number in range(n))

    def _restore_buffers(self) -> None:
        """Undo what a run may have done to the copy's buffers (batch norm in train mode), so draws stay independent."""
        originals = dict(self._original.named_buffers())
        for name, buffer in self._module.named_buffers():
            source = originals.get(name)
            if source is not None and source.shape == buffer.shape:
                buffer.copy_(source)


def reinitialised_module(module: nn.Module, kind: WeightKind, seed: int, *, keep_embeddings: bool = False) -> nn.Module:
    """Return a new module of the same architecture with weights that learned nothing; the given one is not touched.

    One draw of a `WeightNull`, which see; to make many, use that class and its buffer.

    Raises:
        SpecError: `kind` is unknown.
        UnsupportedArchitecture: The module cannot be copied, or its weights are quantised or on the meta device.

    Example:
        >>> linear = nn.Linear(4, 4)
        >>> redrawn = reinitialised_module(linear, "gaussian", seed=0)
        >>> bool((redrawn.weight != linear.weight).all()), bool((redrawn.bias == linear.bias).all())
        (True, True)
    """
    return WeightNull(module, kind, keep_embeddings=keep_embeddings).draw(seed)


def checkpoint_control(
    run: Callable[[Any], float],
    trained: Any,
    checkpoints: Iterable[Any],
    *,
    name: str = "step-0 checkpoint",
    side: Side = "greater",
) -> Control:
    """Hold an estimate against the same estimate on checkpoints that learned nothing: the model before training.

    The true null of training, where its makers published it: the same architecture with the weights that training
    began with. One checkpoint is one draw, which shows and cannot test (p >= 1/2); several seeds of one model are as
    many draws.

    Args:
        run: The whole pipeline, from a subject or module to a number.
        trained: The trained subject or module.
        checkpoints: Subjects or modules of the same architecture; a function of no arguments is called for one when
            its turn comes, so that they need not be in memory together.
        name: What they are.
        side: The direction of the claim.

    Raises:
        SpecError: There is no checkpoint, or one has parameters of other names or shapes, or the trained weights.

    Example:
        >>> trained, before = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> control = checkpoint_control(lambda module: module.weight.abs().sum().item(), trained, [before])
        >>> len(control.null)
        1
    """
    expected = dict(_whole(trained).named_parameters())
    null = []
    for number, given in enumerate(checkpoints):
        lazy = callable(given) and not isinstance(given, nn.Module) and not hasattr(given, "module")
        checkpoint = given() if lazy else given
        found = dict(_whole(checkpoint).named_parameters())
        differ = [key for key in {**expected, **found} if _shape(expected.get(key)) != _shape(found.get(key))]
        if differ:
            key = differ[0]
            raise SpecError(
                f"checkpoint {number} is of another architecture: {key!r} has the shape {_shape(found.get(key))}, and "
                f"{_shape(expected.get(key))} in the trained model",
                "checkpoints",
            )
        if all(torch.equal(expected[key].cpu(), found[key].cpu()) for key in expected):
            raise SpecError(
                f"checkpoint {number} has the trained weights; give the model before training", "checkpoints"
            )
        null.append(float(run(checkpoint)))
    if not null:
        raise SpecError("there is no checkpoint to compare with", "checkpoints")
    said = f"the same pipeline on {len(null)} checkpoint{'s' if len(null) > 1 else ''} of the same architecture"
    return compare(name, said, float(run(trained)), null, side)


def _whole(given: Any) -> nn.Module:
    """The module of a subject, or a module itself."""
    module = given if isinstance(given, nn.Module) else getattr(given, "module", None)
    if not isinstance(module, nn.Module):
        raise SpecError(f"a checkpoint is a subject or a module, not {type(given).__name__}", "checkpoints")
    return module


def _shape(parameter: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if parameter is None else tuple(parameter.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    """A parameter of the original, its twin in the copy, and what to do with it."""

    name: str
    source: torch.Tensor
    target: torch.Tensor
    redrawn: bool
    flat: bool

    def moments(self) -> tuple[float, float]:
        """The mean and the standard deviation of the entries."""
        sd, mean = torch.std_mean(self.source.float(), correction=0)
        return float(mean), float(sd)

    def matrices(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The matrices of this tensor, as views, beside those of its twin."""
        if self.flat:
            yield self.source.flatten(1), self.target.view(len(self.target), -1)
        elif self.source.ndim == 2:
            yield self.source, self.target
        else:
            pairs = zip(self.source.flatten(0, -3), self.target.view(-1, *self.target.shape[-2:]), strict=True)
            yield from pairs


def _tensors(original: nn.Module, twin: nn.Module, keep_embeddings: bool) -> Iterator[_Tensor]:
    """Each distinct parameter of the original once, beside its twin."""
    embeddings, kernels = set(), set()
    for module in original.modules():
        if isinstance(module, nn.Embedding):
            embeddings.add(_identity(module.weight))
        elif isinstance(module, _ConvNd):
            kernels.add(_identity(module.weight))
    targets = dict(twin.named_parameters())
    seen = set()
    for name, source in original.named_parameters():
        identity = _identity(source)
        if identity in seen:  # tied by storage: its twin shares the storage of the first one's
            continue
        seen.add(identity)
        redrawn = source.ndim >= 2 and source.numel() > 0 and not (keep_embeddings and identity in embeddings)
        yield _Tensor(
            name=name,
            source=source.detach(),
            target=targets[name].detach(),
            redrawn=redrawn,
            flat=identity in kernels,
        )


def _copy_without_weights(module: nn.Module) -> nn.Module:
    """A deep copy whose parameters are allocated and not filled; parameters that share memory share it in the copy."""
    memory: dict[tuple[object, ...], torch.Tensor] = {}
    memo: dict[int, object] = {}
    for name, parameter in module.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point():
            what = "on the meta device" if parameter.is_meta else f"of dtype {parameter.dtype}"
            raise UnsupportedArchitecture(
                f"parameter {name!r} is {what}; a weight null needs floating-point weights in memory "
                "(load the model without quantisation)"
            )
        identity = _identity(parameter)
        if identity not in memory:
            memory[identity] = torch.empty_like(parameter.detach(), memory_format=torch.contiguous_format)
        memo[id(parameter)] = nn.Parameter(memory[identity], requires_grad=parameter.requires_grad)
    try:
        return copy.deepcopy(module, memo)
    except (TypeError, RuntimeError) as error:
        raise UnsupportedArchitecture(
            f"{type(module).__name__} cannot be copied for a weight null: deepcopy refuses something it holds ({error})"
        ) from error


def _identity(parameter: torch.Tensor) -> tuple[object, ...]:
    """What two parameters have in common when they are one: the same memory, seen the same way."""
    if parameter.numel() == 0 or parameter.is_meta:
        return (id(parameter),)
    return parameter.device, parameter.data_ptr(), parameter.dtype, tuple(parameter.shape), parameter.stride()


def _fill_normal(target: torch.Tensor, mean: float, sd: float, generator: torch.Generator) -> None:
    if target.device.type == "cpu" and target.dtype == torch.float32:
        target.normal_(mean, sd, generator=generator)
    else:
        target.copy_(torch.empty(target.shape, dtype=torch.float32).normal_(mean, sd, generator=generator))


def _rotate_into(
    target: Float[torch.Tensor, "rows columns"],
    source: Float[torch.Tensor, "rows columns"],
    left: Rotation,
    right: Rotation,
) -> None:
    """Write `left source right'` into target, a slice of rows at a time where the rows are a vocabulary."""
    work = torch.float64 if source.dtype == torch.float64 else torch.float32
    if isinstance(left, SignedPermutation):
        for start in range(0, len(source), _CHUNK):
            stop = min(start + _CHUNK, len(source))
            target[start:stop] = right(left.rows(source, start, stop).to(work).T).T
    else:
        target.copy_(right(left(source.to(work)).T).T)
