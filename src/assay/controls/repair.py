"""Self-repair: how much of what a part writes to the logits comes back when the part is ablated.

With a drop counted positive, `u` the unembedding of answer less foil, `x` the stream before the final norm at the last
position, `delta` what the part writes there less what its ablation writes, `x_abl` the stream of the ablated run, and
`f(x) = u . norm(x)`:

    direct   = u . (gain centre(delta)) / s(x)      the direct path alone, the norm's scale frozen
    rescaled = f(x) - f(x - delta)                  the direct path, the norm's scale computed again
    total    = f(x) - f(x_abl)                      everything computed again
    repair   = direct - total = (direct - rescaled) + (rescaled - total)

The first part of the repair is the final norm's doing, the second that of the parts which read the ablated one; nothing
reads the last MLP, so there the second is 0. A repair above the direct effect is over-correction. Ablation alone would
show `total`, a lower bound of what the part does. Logits are taken before a final soft-cap.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.activations.edits import Ablate, Edit, Positions
from assay.activations.subject import Prompts, Subject
from assay.activations.values import Run
from assay.base.errors import NumericalError, SpecError
from assay.base.sites import Site
from assay.base.stats import Side
from assay.controls.prompts import PromptEffect, prompt_effect
from assay.subjects.norms import Norm, read_norm

RepairAblation = Literal["mean", "resample"]
"""What takes a part's place. Not zero: later parts then see what they never see, and what they do is no repair."""

_WRITERS = ("attn.z", "mlp.out", "ssm.out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """The effects of a part, or of a group of parts, on the logit difference of each prompt.

    Args:
        components: What was ablated, all at once.
        ablation: What took its place.
        clean: The logit difference without ablation, before a soft-cap, `[rows]`.
        direct: The drop by the direct path with the final norm's scale frozen, `[rows]`.
        rescaled: The drop by the direct path with the scale computed again, `[rows]`.
        total: The drop with everything computed again, `[rows]`.
    """

    components: tuple[str, ...]
    ablation: str
    clean: Float[np.ndarray, " rows"]
    direct: Float[np.ndarray, " rows"]
    rescaled: Float[np.ndarray, " rows"]
    total: Float[np.ndarray, " rows"]

    @property
    def repair(self) -> Float[np.ndarray, " rows"]:
        """`direct - total`: the effect that came back."""
        return np.asarray(self.direct - self.total)

    @property
    def by_norm(self) -> Float[np.ndarray, " rows"]:
        """The repair made by the final norm's scale."""
        return np.asarray(self.direct - self.rescaled)

    @property
    def by_parts(self) -> Float[np.ndarray, " rows"]:
        """The repair made by parts that read the ablated ones."""
        return np.asarray(self.rescaled - self.total)

    @property
    def share(self) -> float:
        """The mean repair as a share of the mean direct effect; NaN where there is no direct effect."""
        direct = float(self.direct.mean())
        return float(self.repair.mean()) / direct if direct else float("nan")

    def effect(
        self,
        of: Literal["direct", "total", "repair", "by_norm", "by_parts"] = "repair",
        groups: Sequence[Hashable] | None = None,
        *,
        side: Side = "two",
        seed: int = 0,
    ) -> PromptEffect:
        """The mean of one of the effects with its interval and its sign-flip control; see `prompt_effect`."""
        return prompt_effect(getattr(self, of), groups, side=side, seed=seed)


@torch.no_grad()
def self_repair(
    subject: Subject,
    prompts: Prompts,
    components: str | Sequence[str],
    answer: int | Sequence[int] | Tensor,
    foil: int | Sequence[int] | Tensor,
    *,
    ablation: RepairAblation = "mean",
    reference: Prompts | None = None,
    positions: Positions = None,
    draws: int = 4,
    seed: int = 0,
) -> Repair:
    """Return the direct, total and repaired effect of a part on the logit difference of answer and foil.

    Args:
        subject: The subject.
        prompts: The prompts; each is read at its last token.
        components: Heads (`blocks.5.attn.z.3`), all heads of a block (`blocks.5.attn.z`), MLPs (`blocks.5.mlp.out`), or
            state-space layers (`blocks.5.ssm.out`). Several are ablated together, so that they cannot stand in for each
            other.
        answer: The answer's token id, one or one a row.
        foil: The foil's token id, one or one a row.
        ablation: "mean" puts in the mean over all tokens of the reference prompts; "resample" what another of them has
            at the same positions, averaged over draws.
        reference: Where means and donors come from; the prompts themselves by default.
        positions: Which tokens of the part are ablated; all by default.
        draws: How many donors each prompt gets, for "resample".
        seed: Seed of the choice of donors.

    Raises:
        SpecError: A component is none, or is named twice, or ids and prompts do not match.
        InvalidEdit: No other prompt is long enough to be a donor.
        UnsupportedArchitecture: The logits are not a norm and a matrix away from the stream.
        NumericalError: The stream does not give the subject's own logits, which a sound map excludes.

    Source: McGrath et al. 2023, "The Hydra effect"; Rushing and Nanda 2024, "Explorations of self-repair in language
    models", sections 3 and 4 (the norm's share).

    Example:
        >>> ids = torch.tensor([[5, 17, 40, 9], [8, 30, 21, 77]])
        >>> found = self_repair(subject, ids, "blocks.5.mlp.out", answer=12, foil=99)
        >>> bool(np.abs(found.by_parts).max() < 1e-4)
        True
    """
    named = (components,) if isinstance(components, str) else tuple(components)
    sites = [_component(subject, name) for name in named]
    if not sites:
        raise SpecError("self-repair needs a component, such as 'blocks.5.mlp.out'", "components")
    if ablation not in get_args(RepairAblation) or draws < 1:
        raise SpecError(
            f"ablation is {ablation!r} with draws={draws}; valid: 'mean', 'resample', from 1 draw", "ablation"
        )
    _apart(sites)
    last = f"blocks.{subject.n_blocks - 1}.resid_post"
    wanted = list(dict.fromkeys([*(str(site.whole) for site in sites), last]))
    clean = subject.run(prompts, capture=wanted)
    final = _Final.of(subject, clean.batch.size, answer, foil)
    x = clean.batch.last(clean[last]).double()
    _verify(subject, clean, final, x)
    effects = []
    for edits in _ablations(
        subject, prompts if reference is None else reference, sites, ablation, positions, draws, seed
    ):
        ablated = subject.run(prompts, capture=wanted, edits=edits)
        delta = torch.stack([_written(subject, clean, ablated, site) for site in sites]).sum(0)
        scale = final.scale(x)
        direct = final.read(delta, scale)
        before, without = final.logits(x), final.logits(x - delta)
        after = final.logits(ablated.batch.last(ablated[last]).double())
        effects.append(torch.stack([direct, before - without, before - after]))
    direct, rescaled, total = torch.stack(effects).mean(0).cpu().numpy()
    return Repair(
        components=tuple(str(site) for site in sites),
        ablation=ablation,
        clean=(final.logits(x) + final.constant).cpu().numpy(),
        direct=direct,
        rescaled=rescaled,
        total=total,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Final:
    """From the stream to the logit difference of each row, in float64.

    Args:
        norm: The final norm, or None where there is none.
        ids: The answers and the foils, `[2, rows]`.
        rows: Their rows of the unembedding, `[2, rows, d]`.
        biases: What is added to their logits whatever the stream, `[2, rows]`.
    """

    norm: Norm | None
    ids: Tensor
    rows: Float[Tensor, "two rows d"]
    biases: Float[Tensor, "two rows"]

    @classmethod
    def of(
        cls, subject: Subject, size: int, answer: int | Sequence[int] | Tensor, foil: int | Sequence[int] | Tensor
    ) -> _Final:
        parts = subject.parts
        weight, bias = parts.unembedding()
        ids = []
        for name, given in (("answer", answer), ("foil", foil)):
            try:
                asked = torch.as_tensor(given, device=weight.device)
            except (TypeError, ValueError, RuntimeError) as error:
                raise SpecError(f"{name} is {given!r}; give a token id, or one a row", name) from error
            if asked.is_floating_point():
                raise SpecError(f"{name} is {given!r}; token ids are whole numbers", name)
            found = asked.long()
            if found.ndim > 1 or (found.ndim and len(found) != size):
                raise SpecError(
                    f"{name} has the shape {tuple(found.shape)} for {size} prompts; give one or one a row", name
                )
            outside = found[(found < 0) | (found >= len(weight))]
            if len(outside):
                raise SpecError(f"{name} holds the id {int(outside[0])}; the vocabulary has {len(weight)}", name)
            ids.append(found.expand(size))
        both = torch.stack(ids)
        module = parts.final_norm
        norm = None if isinstance(module, nn.Identity) else read_norm(module, parts.d_model)
        rows = weight[both].double()
        biases = torch.zeros_like(both, dtype=torch.float64) if bias is None else bias[both].double()
        if norm is not None:
            biases = biases + rows @ norm.bias.double()
        return cls(norm=norm, ids=both, rows=rows, biases=biases)

    @property
    def constant(self) -> Tensor:
        """The part of the difference that no stream changes, `[rows]`."""
        return self.biases[0] - self.biases[1]

    def scale(self, x: Tensor) -> Tensor:
        """The norm's denominator, `[rows, d] -> [rows, 1]`."""
        if self.norm is None:
            return torch.ones_like(x[..., :1])
        return (self.norm.centre(x).pow(2).mean(-1, keepdim=True) + self.norm.eps).sqrt()

    def normed(self, x: Tensor, scale: Tensor) -> Tensor:
        """The norm without its bias, with a given denominator."""
        return x if self.norm is None else self.norm.frozen(x, scale)

    def read(self, x: Tensor, scale: Tensor) -> Tensor:
        """The difference that a part of the stream makes, `[rows]`."""
        return (self.normed(x, scale) * (self.rows[0] - self.rows[1])).sum(-1)

    def logits(self, x: Tensor) -> Tensor:
        """The difference that a whole stream makes, without its constant, `[rows]`."""
        return self.read(x, self.scale(x))


def _component(subject: Subject, name: str) -> Site:
    site = subject.site(name)
    point = str(site).split(".", 2)[-1] if site.block is not None else str(site)
    if site.block is None or not point.startswith(_WRITERS):
        raise SpecError(
            f"{name!r} is no part that writes to the stream; valid: heads (blocks.0.attn.z.3, or blocks.0.attn.z for "
            "all), blocks.0.mlp.out, blocks.0.ssm.out",
            "components",
        )
    return site


def _apart(sites: Sequence[Site]) -> None:
    """See that no part is named twice: what it writes would be counted twice."""
    for i, site in enumerate(sites):
        for other in sites[:i]:
            if site.whole == other.whole and (site.head is None or other.head is None or site.head == other.head):
                raise SpecError(f"{site} and {other} are the same part, or one holds the other", "components")


def _ablations(
    subject: Subject,
    reference: Prompts,
    sites: Sequence[Site],
    ablation: str,
    positions: Positions,
    draws: int,
    seed: int,
) -> list[list[Edit]]:
    """The edits of each draw. What is put in comes from runs without edits, also where one part feeds another."""
    whole = list(dict.fromkeys(str(site.whole) for site in sites))
    if ablation == "mean":
        mean = subject.mean(reference, whole)
        return [[Ablate(str(site), mean[str(site)], positions=positions) for site in sites]]
    donors = subject.run(reference, capture=whole)
    return [
        [Ablate(str(site), donors, positions=positions, seed=seed + draw) for site in sites] for draw in range(draws)
    ]


def _written(subject: Subject, clean: Run, ablated: Run, site: Site) -> Tensor:
    """What a part writes at the last position less what its ablation writes, `[rows, d_model]`."""
    whole, block = str(site.whole), site.block
    assert block is not None
    held = clean.batch.last(clean[whole]).double()
    lost = held - ablated.batch.last(ablated[whole]).double()
    if not whole.endswith("attn.z"):
        return lost
    parts = subject.parts
    matrix = parts.output_matrix(block).double().reshape(parts.n_heads, held.shape[-1], -1)
    heads = [site.head] if site.head is not None else list(range(parts.n_heads))
    written = torch.einsum("rhd,hdm->rm", lost[:, heads], matrix[heads])
    module = parts.attention_post(block)
    if module is None:
        return written
    post, bias = read_norm(module, parts.d_model), parts.output_bias(block)
    out = torch.einsum("rhd,hdm->rm", held, matrix)
    return post.frozen(written, post.scale(out if bias is None else out + bias.double()))


def _verify(subject: Subject, run: Run, final: _Final, x: Tensor) -> None:
    """See that the stream gives the logits that the subject gave."""
    normed = final.normed(x, final.scale(x))
    found = (normed * final.rows).sum(-1) + final.biases
    cap = subject.parts.softcap
    found = found if cap is None else torch.tanh(found / cap) * cap
    own = run.batch.last(run.logits)
    own = torch.stack([own.gather(1, ids[:, None].to(own.device))[:, 0] for ids in final.ids]).double()
    error = float((found - own).abs().max())
    if error > (1e-3 if run.logits.dtype == torch.float32 else 5e-2) * max(1.0, float(own.abs().max())):
        raise NumericalError(f"the stream gives logits that are off by {error:.3g} from those of {subject.name}")
