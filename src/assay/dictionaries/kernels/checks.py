"""What every path of the kernels refuses, before anything is computed or changed."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.base.errors import NumericalError, SpecError
from assay.dictionaries.kernels.values import ByLatent, Moments
from assay.dictionaries.latents import SparseLatents


def tensors(*dims: tuple[str, Tensor | None, tuple[int | None, ...]], dtype: torch.dtype = torch.float32) -> None:
    """Refuse what is not a contiguous tensor of `dtype` on the first one's device with the shape it must have.

    Args:
        dims: For each tensor its name, itself (None is passed over) and its sizes; None for a size means any.
        dtype: The type of all of them.

    Raises:
        SpecError: One is not as it must be.
    """
    device = None
    for name, tensor, shape in dims:
        if tensor is None:
            continue
        device = device or tensor.device
        if tensor.dtype != dtype:
            raise SpecError(f"{name} is {tensor.dtype} where the kernels take {dtype}: convert it", name)
        if tensor.ndim != len(shape) or any(
            want is not None and have != want for have, want in zip(tensor.shape, shape, strict=True)
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise SpecError(f"{name} has the shape {list(tensor.shape)}, and [{wanted}] is needed", name)
        if tensor.device != device:
            raise SpecError(f"{name} is on {tensor.device} and {dims[0][0]} on {device}: put them on one device", name)
        if not tensor.is_contiguous():
            raise SpecError(f"{name} is not contiguous (strides {tensor.stride()}): give {name}.contiguous()", name)


def encoding(x: Tensor, W: Tensor, b: Tensor, bound: Tensor | None = None) -> None:
    """Refuse an encoder that does not fit its input.

    Raises:
        SpecError: As `tensors` does.
    """
    tensors(("W", W, (None, None)), ("x", x, (None, W.shape[-1])), ("b", b, (len(W),)), ("bound", bound, (len(W),)))


def finite_rows(x: Tensor) -> None:
    """Refuse rows with NaN or an infinity.

    Raises:
        NumericalError: There is one; the message names the first.
    """
    good = torch.isfinite(x).all(dim=1)
    if not bool(good.all()):
        refuse_row(int((~good).nonzero()[0]))


def refuse_row(row: int) -> None:
    """Say which row of x is not finite.

    Raises:
        NumericalError: Always.
    """
    raise NumericalError(f"row {row} of x holds NaN or an infinity: leave such rows out of the batch")


def count(name: str, value: int, most: int, of: str) -> None:
    """Refuse a number of latents to select that is not from 1 to what there is.

    Raises:
        SpecError: It is not.
    """
    if not 1 <= value <= most:
        raise SpecError(f"{name} is {value}, and {of} has {most}: give a whole number from 1 to {most}", name)


def pairs(pairs: SparseLatents, W_dec: Tensor, rows: int | None = None) -> None:
    """Refuse pairs that do not fit a decoder (and a number of rows), in shape, type or device.

    Raises:
        SpecError: They do not.
    """
    n = pairs.latents.numel()
    if pairs.n_latents != len(W_dec):
        raise SpecError(f"the pairs are of {pairs.n_latents} latents and W_dec has {len(W_dec)}", "W_dec")
    if rows is not None and pairs.n_rows != rows:
        raise SpecError(f"the pairs are of {pairs.n_rows} rows where there are {rows}", "pairs")
    tensors(("W_dec", W_dec, (None, None)), ("pairs.values", pairs.values, (n,)))
    indices(W_dec.device, n, ("pairs.latents", pairs.latents))
    tensors(("pairs.offsets", pairs.offsets, (None,)), dtype=torch.int64)


def indices(device: torch.device, n: int, *named: tuple[str, Tensor]) -> None:
    """Refuse what are not `n` contiguous int32 on `device`.

    Raises:
        SpecError: One is not.
    """
    for name, tensor in named:
        if tensor.device != device:
            raise SpecError(f"{name} is on {tensor.device} where {device} is needed", name)
        tensors((name, tensor, (n,)), dtype=torch.int32)


def in_range(name: str, tensor: Tensor, limit: int) -> None:
    """Refuse indices outside 0 .. limit - 1; on a CPU only, where reading them costs no wait.

    Raises:
        SpecError: There is one.
    """
    if tensor.device.type != "cpu" or not tensor.numel():
        return
    low, high = (int(edge) for edge in tensor.aminmax())
    if low < 0 or high >= limit:
        raise SpecError(f"{name} go from {low} to {high}, and must lie in 0 .. {limit - 1}", name)


def offsets(name: str, tensor: Tensor, n: int) -> None:
    """Refuse offsets that do not rise from 0 to `n`; on a CPU only.

    Raises:
        SpecError: They do not.
    """
    if tensor.device.type == "cpu" and (int(tensor[0]) != 0 or int(tensor[-1]) != n or bool((tensor.diff() < 0).any())):
        raise SpecError(f"{name} must rise from 0 to the number of pairs, {n}", name)


def gradients(
    grouped: ByLatent, R: Tensor, X: Tensor, W_dec: Tensor | None, pull: Tensor | None, shift: Tensor | None
) -> None:
    """Refuse parts of a gradient that do not fit each other.

    Raises:
        SpecError: They do not.
    """
    n, latents = grouped.rows.numel(), grouped.n_latents
    tensors(
        ("R", R, (None, None)),
        ("X", X, (None, None)),
        ("W_dec", W_dec, (latents, R.shape[-1])),
        ("pull", pull, (latents,)),
        ("shift", shift, (X.shape[-1],)),
        ("grouped.values", grouped.values, (n,)),
        ("grouped.slopes", grouped.slopes, (n,)),
    )
    indices(R.device, n, ("grouped.rows", grouped.rows))
    tensors(("grouped.offsets", grouped.offsets, (None,)), dtype=torch.int64)
    offsets("grouped.offsets", grouped.offsets, n)
    in_range("grouped.rows", grouped.rows, len(R))
    if (len(R) % len(X) if len(X) else len(R)) != 0:
        raise SpecError(f"R has {len(R)} rows, which is no multiple of the {len(X)} of X", "R")
    if pull is not None and W_dec is None:
        raise SpecError("pull is a multiple of the decoder's rows: give W_dec as well", "W_dec")


def weights(R: Tensor, X: Tensor, W_dec: Tensor, W_enc: Tensor, b_enc: Tensor, moments: Moments) -> None:
    """Refuse weights and moments that do not fit the gradient's parts.

    Raises:
        SpecError: They do not.
    """
    dec, enc, b = (len(W_dec), R.shape[-1]), (len(W_dec), X.shape[-1]), (len(W_dec),)
    tensors(
        ("W_dec", W_dec, dec),
        ("W_enc", W_enc, enc),
        ("b_enc", b_enc, b),
        ("moments.m_dec", moments.m_dec, dec),
        ("moments.v_dec", moments.v_dec, dec),
        ("moments.m_enc", moments.m_enc, enc),
        ("moments.v_enc", moments.v_enc, enc),
        ("moments.m_b", moments.m_b, b),
        ("moments.v_b", moments.v_b, b),
    )
