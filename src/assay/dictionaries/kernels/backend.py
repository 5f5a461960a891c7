"""The contract of the kernels, and the choice of a path for a device.

Conventions: `W_enc [latent, d_in]`, `W_dec [latent, d_out]`, `b_enc [latent]`, all float32, contiguous and on one
device; `h = x W_enc' + b_enc`. Pairs are a `SparseLatents`: row by row, latents ascending inside a row.

All paths agree with autograd on the dense formula, and with each other, to 1e-5 relative. Selections are exact: the
values that `torch.topk` gives, and among equal values the lower latent (in a batch: the earlier row, then the lower
latent). Every path gives the same bits again for the same input and number of threads. NaN in weights is not looked
for: a latent whose h is NaN is never selected.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.base.errors import AssayError, SpecError
from assay.dictionaries.kernels.values import AdamStep, ByLatent, Moments
from assay.dictionaries.latents import SparseLatents

BackendName = Literal["plain", "compiled", "triton"]
VARIABLE = "ASSAY_KERNELS"
"""The environment variable that names the path to take."""


@runtime_checkable
class Backend(Protocol):
    """One way to compute the heavy parts of a dictionary's training step.

    Attributes:
        name: `"plain"`, `"compiled"` or `"triton"`.
    """

    @property
    def name(self) -> BackendName:
        """Which path it is."""

    def select_rows(
        self, x: Float[Tensor, "rows d_in"], W: Float[Tensor, "latent d_in"], b: Float[Tensor, " latent"], k: int
    ) -> SparseLatents:
        """The `k` largest of h in each row, then those of them that are above 0 (TopK, then ReLU).

        Raises:
            SpecError: Shapes, types, devices or `k` do not fit.
            NumericalError: A row of `x` holds NaN or an infinity.
        """

    def select_batch(
        self, x: Float[Tensor, "rows d_in"], W: Float[Tensor, "latent d_in"], b: Float[Tensor, " latent"], total: int
    ) -> tuple[SparseLatents, float]:
        """The `total` largest of relu(h) over all rows together that are above 0, and the smallest of them (or 0).

        Raises:
            SpecError: Shapes, types, devices or `total` do not fit.
            NumericalError: A row of `x` holds NaN or an infinity.
        """

    def select_above(
        self,
        x: Float[Tensor, "rows d_in"],
        W: Float[Tensor, "latent d_in"],
        b: Float[Tensor, " latent"],
        bound: Float[Tensor, " latent"],
    ) -> SparseLatents:
        """Every h above its latent's bound, with the value h: JumpReLU's window, L1's active set, a gate.

        Raises:
            SpecError: Shapes, types or devices do not fit.
            NumericalError: A row of `x` holds NaN or an infinity.
        """

    def decode(
        self, pairs: SparseLatents, W_dec: Float[Tensor, "latent d_out"], bias: Float[Tensor, " d_out"]
    ) -> Float[Tensor, "rows d_out"]:
        """`bias` plus each row's sum of value * W_dec[latent].

        Raises:
            SpecError: Shapes, types or devices do not fit.
        """

    def residual(
        self,
        pairs: SparseLatents,
        W_dec: Float[Tensor, "latent d_out"],
        bias: Float[Tensor, " d_out"],
        target: Float[Tensor, "rows d_out"],
        scale: float,
    ) -> tuple[Float[Tensor, "rows d_out"], Float[Tensor, " pairs"], Float[Tensor, " rows"]]:
        """`decode`, its error and `slopes` in one pass over each row's latents.

        Returns:
            R = scale (decode - target); R[row] . W_dec[latent] for each pair; |decode - target|² for each row.

        Raises:
            SpecError: Shapes, types or devices do not fit.
        """

    def slopes(
        self,
        pairs: SparseLatents,
        R: Float[Tensor, "stacked d_out"],
        W_dec: Float[Tensor, "latent d_out"],
        rows: Int[Tensor, " pairs"] | None = None,
    ) -> Float[Tensor, " pairs"]:
        """R[row] . W_dec[latent] for each pair; `rows` where the pairs' rows of `R` are not their own.

        Raises:
            SpecError: Shapes, types or devices do not fit.
        """

    def by_latent(
        self,
        rows: Int[Tensor, " pairs"],
        latents: Int[Tensor, " pairs"],
        values: Float[Tensor, " pairs"],
        slopes: Float[Tensor, " pairs"],
        n_latents: int,
    ) -> ByLatent:
        """Sort pairs by latent; those of one latent keep their order.

        Raises:
            SpecError: Shapes, types or devices do not fit, or a latent is out of range.
        """

    def gradients(
        self,
        grouped: ByLatent,
        R: Float[Tensor, "stacked d_out"],
        X: Float[Tensor, "rows d_in"],
        *,
        W_dec: Float[Tensor, "latent d_out"] | None = None,
        pull: Float[Tensor, " latent"] | None = None,
        shift: Float[Tensor, " d_in"] | None = None,
    ) -> tuple[Float[Tensor, "latent d_out"], Float[Tensor, "latent d_in"], Float[Tensor, " latent"]]:
        """The gradients by W_dec, W_enc and b_enc as tensors, for tests, clipping and sums over processes.

            g_dec[f] = sum_p z_p R[r_p] + pull_f W_dec[f]
            g_enc[f] = sum_p s_p (X[r_p mod rows] - shift)
            g_b[f]   = sum_p s_p

        Args:
            grouped: Pairs p with their row r, activation z and slope s.
            R: The loss's derivative by the reconstruction; several losses may be stacked, each on `rows` rows.
            X: What the encoder read.
            W_dec: Needed with `pull`.
            pull: The derivative of a penalty on the decoder's norms, divided by the norm.
            shift: The decoder's bias, where it is subtracted before encoding.

        Raises:
            SpecError: Shapes, types or devices do not fit.
        """

    def update(
        self,
        grouped: ByLatent,
        R: Float[Tensor, "stacked d_out"],
        X: Float[Tensor, "rows d_in"],
        W_dec: Float[Tensor, "latent d_out"],
        W_enc: Float[Tensor, "latent d_in"],
        b_enc: Float[Tensor, " latent"],
        moments: Moments,
        adam: AdamStep,
        *,
        pull: Float[Tensor, " latent"] | None = None,
        shift: Float[Tensor, " d_in"] | None = None,
        unit_norm: bool = False,
    ) -> tuple[Float[Tensor, " latent"], Float[Tensor, " d_in"]]:
        """`gradients` and a step of Adam on weights and moments in place, latent by latent, with no gradient tensor.

        Latents without pairs take the step too: their moments decay, as in `torch.optim.Adam`.

        Args:
            grouped: As in `gradients`; so are `R`, `X`, `pull` and `shift`.
            R: See above.
            X: See above.
            W_dec: Changed in place, as are `W_enc`, `b_enc` and `moments`.
            W_enc: See above.
            b_enc: See above.
            moments: See above.
            adam: The settings of this step.
            pull: See above.
            shift: See above.
            unit_norm: Take from a decoder row's gradient its part along the row, and scale the row to norm 1 after.

        Returns:
            The gradient g_b of b_enc, and sum_f g_b[f] W_enc[f] with W_enc as it was before: the gradient of a decoder
            bias that is subtracted before encoding is the column sum of R minus the latter.

        Raises:
            SpecError: Shapes, types or devices do not fit; nothing was changed.
        """


def backend(device: torch.device | str, prefer: BackendName | None = None) -> Backend:
    """Return the fastest path that `device` and this machine have.

    That is Triton on CUDA and the compiled path on a CPU; plain PyTorch where these are missing, with one warning that
    says what to install. `prefer`, or else the environment variable `ASSAY_KERNELS`, names one path and takes no other.

    Raises:
        SpecError: The path that was named is unknown, or cannot be had for this device on this machine.

    Example:
        >>> backend("cpu", "plain").name
        'plain'
    """
    device = torch.device(device)
    named = prefer or os.environ.get(VARIABLE) or None
    if named is not None:
        return _named(named, device, "prefer" if prefer else VARIABLE)
    if device.type not in ("cpu", "cuda"):
        return _make("plain")
    best: BackendName = "compiled" if device.type == "cpu" else "triton"
    try:
        return _make(best)
    except AssayError as error:
        _warn_once(f"dictionary kernels run on plain PyTorch, which is slower: {error} ({VARIABLE}=plain says no more)")
        return _make("plain")


def _named(name: str, device: torch.device, source: str) -> Backend:
    names = get_args(BackendName)
    if name not in names:
        raise SpecError(f"{source}={name!r} is no path of the kernels: {', '.join(names)} are", "backend")
    wanted = {"compiled": "cpu", "triton": "cuda"}.get(name, device.type)
    if device.type != wanted and not (name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise SpecError(f"{source}={name!r} runs on {wanted} and the tensors are on {device.type}", "backend")
    try:
        return _make(name)
    except AssayError as error:
        raise SpecError(f"{source}={name!r} cannot be had here: {error}", "backend") from error


@functools.cache
def _make(name: str) -> Backend:
    if name == "compiled":
        from assay.dictionaries.kernels.compiled import Compiled

        return Compiled()
    if name == "triton":
        from assay.dictionaries.kernels.triton import Triton

        return Triton()
    from assay.dictionaries.kernels.plain import Plain

    return Plain()


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
