"""Direct logit attribution: the logit difference as a sum over everything that writes to the residual stream.

The stream before the final norm is `x = sum_w x_w` over writers `w` (embeddings, heads, attention biases, MLPs). With
the norm's denominator `s(x)` frozen, the norm is linear, so with `u = W_U[answer] - W_U[foil]`

    logits[answer] - logits[foil]
        = sum_w  u . (g centre(x_w)) / s(x)  +  u . b_norm  +  (b_U[answer] - b_U[foil])  +  cap,

where `cap` is what a final soft-cap changes. A writer behind a post-norm (Gemma 2) is divided by that norm's own
frozen scale. Direct means direct: what a component does through later components is not in its part (Elhage et al.
2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from assay.activations.subject import Prompts, Subject
from assay.activations.values import Run
from assay.base.errors import NumericalError
from assay.subjects.norms import read_norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Decomposition:
    """The parts of a logit difference at the last position, averaged over rows.

    Args:
        names: `embed`, `pos_embed`, `L0H0`, ..., `attention biases`, `MLP0`, ..., `norm bias`, `unembedding bias`,
            `soft-cap`.
        parts: Their contributions, in logits, `[names]`.
        total: The logit difference itself.
    """

    names: tuple[str, ...]
    parts: Float[Tensor, " names"]
    total: float

    @property
    def error(self) -> float:
        """The sum's relative distance from the logit difference."""
        return abs(float(self.parts.sum()) - self.total) / max(abs(self.total), 1e-6)


@torch.no_grad()
def decompose(subject: Subject, prompt: Prompts, answer: int, foil: int) -> Decomposition:
    """Split a logit difference over everything that writes to the residual stream.

    Args:
        subject: The subject.
        prompt: One prompt, or several rows.
        answer: The answer's token id.
        foil: The foil's token id.

    Returns:
        The parts; they sum to the logit difference up to rounding.

    Raises:
        NumericalError: If the parts do not sum to it (1e-3 relative to the largest part), which a sound map excludes.
    """
    parts = subject.parts
    sites = [name for name in ("embed", "pos_embed", "final_norm.scale") if parts.has(name)]
    last = f"blocks.{subject.n_blocks - 1}.resid_post"
    writers = [
        f"blocks.{block}.{name}"
        for block in range(subject.n_blocks)
        for name in ("attn.z", "ssm.out", "mlp.out")
        if parts.has(name, block)
    ]
    run = subject.run(prompt, capture=[*sites, *writers, last])
    weight, bias = parts.unembedding()
    direction = (weight[answer] - weight[foil]).float()
    norm = read_norm(parts.final_norm, parts.d_model)
    at = run.batch.last
    scale = at(run["final_norm.scale"]).float()

    def read(x: Tensor) -> float:
        """One writer's part, from `[rows, d_model]` at the last position."""
        return float((norm.frozen(x.float(), scale.to(x.device)) @ direction.to(x.device)).mean())

    found = {name: read(at(run[name])) for name in sites if name != "final_norm.scale"}
    biases = torch.zeros_like(at(run["embed"]))
    for writer in writers:
        block = run.captured.resolve(writer).block or 0
        kind = writer.split(".")[2]
        if kind != "attn":
            found[f"{kind.upper()}{block}"] = read(at(run[writer]))
            continue
        heads, constant = _heads(subject, run, block)
        for head in range(heads.shape[1]):
            found[f"L{block}H{head}"] = read(heads[:, head])
        biases = biases + constant
    if bool(biases.abs().max() > 0):
        found["attention biases"] = read(biases)
    if bool(norm.bias.abs().max() > 0):
        found["norm bias"] = float(norm.bias.float() @ direction)
    if bias is not None:
        found["unembedding bias"] = float(bias[answer] - bias[foil])
    logits = at(run.logits).float()
    total = float((logits[:, answer] - logits[:, foil]).mean())
    if parts.softcap is not None:
        stream = (parts.unembed(parts.final_norm(at(run[last]))) * parts.logit_scale).float()
        found["soft-cap"] = total - float((stream[:, answer] - stream[:, foil]).mean())
    result = Decomposition(names=tuple(found), parts=torch.tensor(list(found.values())), total=total)
    size = max(abs(total), float(result.parts.abs().max()))
    if abs(float(result.parts.sum()) - total) > (1e-3 if run.logits.dtype == torch.float32 else 5e-2) * size:
        raise NumericalError(f"the parts sum to {float(result.parts.sum()):.6g}, the logit difference is {total:.6g}")
    return result


def _heads(subject: Subject, run: Run, block: int) -> tuple[Tensor, Tensor]:
    """Each head's own write at the last position, `[rows, heads, d_model]`, and the block's constant."""
    parts = subject.parts
    z = run.batch.last(run[f"blocks.{block}.attn.z"])
    matrix = parts.output_matrix(block).reshape(parts.n_heads, z.shape[-1], -1)
    written = torch.einsum("rhd,hdm->rhm", z, matrix)
    bias = parts.output_bias(block)
    constant = torch.zeros_like(written[:, 0]) if bias is None else bias.expand_as(written[:, 0])
    module = parts.attention_post(block)
    if module is None:
        return written, constant
    post = read_norm(module, parts.d_model)
    scale = post.scale(written.sum(1) + constant)
    return post.frozen(written, scale[:, None]), post.frozen(constant, scale) + post.bias
