"""Probes that are no line: one hidden layer, and attention over tokens.

Both can memorise, so both stop early on groups they were not fitted on, and both belong beside a control task
(`assay.controls.control_labels`). Neither is a `Probe`: there is no one vector to read or to convert.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from assay.base.errors import NumericalError, SpecError
from assay.base.rng import torch_stream
from assay.directions.probes.inputs import Groups, Labels, matrix, positives, standard
from assay.directions.probes.scores import auroc
from assay.directions.probes.splits import grouped_split
from assay.directions.vectors import Origin

WIDEST = 64
"""The widest hidden layer: wider ones memorise, and selectivity falls."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MLPProbe:
    """A readout with one hidden layer: `r(x) = out . relu(x hidden + shift) + bias`, a log odds.

    Args:
        site: The site it reads.
        hidden: In the units of the activations, `[d, width]`; standardisation is folded in.
        shift: Biases of the hidden layer.
        out: Weights of the output.
        bias: Bias of the output.
        reads: What a positive readout says.
        origin: Where it comes from.
    """

    site: str
    hidden: Float[Tensor, "d width"]
    shift: Float[Tensor, " width"]
    out: Float[Tensor, " width"]
    bias: float
    reads: str = ""
    origin: Origin = field(default_factory=lambda: Origin(method="mlp"))

    def __call__(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows"]:
        """The readout of activations at the site."""
        if x.shape[-1] != len(self.hidden):
            raise SpecError(f"the probe reads {len(self.hidden)} numbers at {self.site}; got {tuple(x.shape)}", "x")
        inner = torch.relu(x @ self.hidden.to(x) + self.shift.to(x))
        readout: Tensor = inner @ self.out.to(x) + self.bias
        return readout


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionProbe:
    """A readout of a whole sequence: `sum_k sum_t a_tk v_k . h_t + bias`, `a_tk = softmax_t(q_k . h_t + m_k t)`.

    Args:
        site: The site it reads.
        queries: One a head, in the units of the activations, `[heads, d]`.
        slopes: What a head's score gains from one token to the next, `[heads]`.
        values: What each head reads, `[heads, d]`.
        bias: The readout of zeros.
        reads: What a positive readout says.
        origin: Where it comes from.
    """

    site: str
    queries: Float[Tensor, "heads d"]
    slopes: Float[Tensor, " heads"]
    values: Float[Tensor, "heads d"]
    bias: float
    reads: str = ""
    origin: Origin = field(default_factory=lambda: Origin(method="attention"))

    def __call__(self, x: Float[Tensor, "rows tokens d"], mask: Bool[Tensor, "rows tokens"]) -> Float[Tensor, " rows"]:
        """The readout of sequences; `mask` is true at real tokens, on whichever side the padding is."""
        read = torch.einsum("rtd,kd->rtk", x, self.values.to(x))
        readout: Tensor = (self.attention(x, mask) * read).sum(dim=(1, 2)) + self.bias
        return readout

    def attention(
        self, x: Float[Tensor, "rows tokens d"], mask: Bool[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows tokens heads"]:
        """Where each head looks."""
        return _attend(x, mask, self.queries.to(x), self.slopes.to(x))

    def entropy(self, x: Float[Tensor, "rows tokens d"], mask: Bool[Tensor, "rows tokens"]) -> Float[Tensor, " heads"]:
        """The mean entropy of each head's attention over that of looking everywhere: 0 for one token, 1 for all alike.

        Rows of one token have nowhere else to look and are left out.
        """
        a = self.attention(x, mask)
        own = -torch.special.xlogy(a, a).sum(dim=1)
        many = mask.sum(dim=1) > 1
        share: Tensor = (own[many] / mask.sum(dim=1)[many].log()[:, None]).mean(dim=0)
        return share

    def without_position(self) -> AttentionProbe:
        """The same probe with its slopes at 0. If it reads much worse, it read length or position."""
        return replace(self, slopes=torch.zeros_like(self.slopes))


def fit_mlp(
    X: Float[np.ndarray, "rows d"],
    y: Labels,
    groups: Groups,
    *,
    site: str,
    width: int = 32,
    weight_decay: float = 1e-2,
    rate: float = 1e-3,
    steps: int = 500,
    patience: int = 30,
    held: float = 0.2,
    reads: str = "",
    origin: Origin | None = None,
    seed: int = 0,
) -> MLPProbe:
    """Fit a probe with one hidden layer by AdamW on all rows at once, stopped early on groups held out of the fit.

    Args:
        X: Training rows.
        y: Two labels, one a row.
        groups: The group of each row.
        site: The site the rows were read at.
        width: Of the hidden layer, at most 64.
        weight_decay: Of AdamW.
        rate: Its learning rate.
        steps: At most as many.
        patience: Stop when the loss on the held-out groups has not fallen for as many steps.
        held: The share of the rows to hold out.
        reads: What a positive readout says.
        origin: Where the rows come from.
        seed: Seed of the held-out groups and of the first weights.

    Raises:
        SpecError: The layer is too wide, or there are too few groups or classes.
        NumericalError: A row is not finite, or the loss is not.

    Source: Hewitt and Liang 2019, "Designing and interpreting probes with control tasks", section 4.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> X = rng.normal(size=(200, 2))
        >>> y = (X[:, 0] * X[:, 1] > 0).astype(int)  # no line separates these
        >>> probe = fit_mlp(X, y, np.arange(200), site="embed", rate=1e-2)
        >>> bool(((probe(torch.tensor(X)) > 0).numpy() == y).mean() > 0.85)
        True
    """
    if not 1 <= width <= WIDEST:
        raise SpecError(f"width is {width}; a probe's hidden layer has 1 to {WIDEST} units", "width")
    data = matrix(X)
    up = positives(y, len(data))
    split = grouped_split(groups, up, test=held, seed=seed)
    mean, scale = standard(data[split.train])
    Z = torch.tensor((data - mean) / scale, dtype=torch.float32)
    truth = torch.tensor(up, dtype=torch.float32)
    generator = torch_stream(seed, "mlp probe")
    net = nn.Sequential(nn.Linear(data.shape[1], width), nn.ReLU(), nn.Linear(width, 1))
    first, last = net[0], net[2]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    _draw(first, generator)
    _draw(last, generator)
    train, test = torch.tensor(split.train), torch.tensor(split.test)

    def loss(rows: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(net(Z[rows])[:, 0], truth[rows])

    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=weight_decay)
    took, reached = _train(net, optimiser, [lambda: loss(train)], lambda: loss(test), steps, patience)
    hidden = first.weight.detach().double().T / torch.tensor(scale)[:, None]
    given = origin or Origin(method="mlp")
    detail = {**given.detail, "width": width, "weight decay": weight_decay, "steps": took, "held-out loss": reached}
    return MLPProbe(
        site=site,
        hidden=hidden.float(),
        shift=(first.bias.detach().double() - torch.tensor(mean) @ hidden).float(),
        out=last.weight.detach()[0],
        bias=float(last.bias.detach()),
        reads=reads or _reads(y),
        origin=replace(given, method="mlp", seed=seed, detail=detail),
    )


def fit_attention(
    X: Float[Tensor, "rows tokens d"],
    mask: Bool[Tensor, "rows tokens"],
    y: Labels,
    groups: Groups,
    *,
    site: str,
    heads: int = 8,
    weight_decay: float = 1e-3,
    rate: float = 3e-3,
    epochs: int = 100,
    batch: int = 64,
    patience: int = 10,
    held: float = 0.2,
    position: bool = True,
    reads: str = "",
    origin: Origin | None = None,
    seed: int = 0,
) -> AttentionProbe:
    """Fit a probe that chooses the tokens it reads, by Adam, stopped early on groups held out of the fit.

    Its origin says, on those groups, the entropy of each head (see `AttentionProbe.entropy`), and the AUROC with the
    slopes as fitted and at 0: where the second is much lower, the probe read length or position.

    Args:
        X: Sequences of activations, padded on either side.
        mask: True at real tokens.
        y: Two labels, one a row.
        groups: The group of each row.
        site: The site the sequences were read at.
        heads: How many; a single one mixes what it looks for.
        weight_decay: Of AdamW.
        rate: Its learning rate.
        epochs: At most as many.
        batch: Rows a step.
        patience: Stop when the loss on the held-out groups has not fallen for as many epochs.
        held: The share of the rows to hold out.
        position: Whether the slopes are learned; else they stay 0.
        reads: What a positive readout says.
        origin: Where the rows come from.
        seed: Seed of the held-out groups, of the first weights and of the batches.

    Raises:
        SpecError: The shapes do not fit, a row has no token, or there are too few groups or classes.
        NumericalError: An activation at a real token is not finite, or the loss is not.

    Source: Press et al. 2022, "Train short, test long" (ALiBi), section 3, for the slopes.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> X = torch.randn(120, 5, 4, generator=generator)
        >>> y = np.arange(120) % 2
        >>> X[torch.arange(120), torch.randint(0, 5, (120,), generator=generator), 0] += torch.tensor(8.0 * y - 4.0)
        >>> mask = torch.ones(120, 5, dtype=torch.bool)
        >>> probe = fit_attention(X, mask, y, np.arange(120), site="embed", heads=2, rate=0.03)
        >>> bool(((probe(X, mask) > 0).numpy() == y).mean() > 0.85)
        True
    """
    X, mask = torch.as_tensor(X), torch.as_tensor(mask)
    if X.ndim != 3 or mask.shape != X.shape[:2]:
        raise SpecError(
            f"X has the shape {tuple(X.shape)}, mask {tuple(mask.shape)}; give [rows, tokens, d], [rows, tokens]",
            "X",
        )
    mask = mask.bool()
    up = positives(y, len(X))
    if heads < 1:
        raise SpecError(f"heads is {heads}; there must be at least one", "heads")
    split = grouped_split(groups, up, test=held, seed=seed)
    train, test = torch.tensor(split.train), torch.tensor(split.test)
    z, mean, sd = _standard_tokens(X.detach().float(), mask, train)
    truth = torch.tensor(up, dtype=torch.float32)
    generator = torch_stream(seed, "attention probe")
    net = _Attention(heads, z.shape[2], z.shape[1], generator)
    net.slopes.requires_grad_(position)

    def loss(rows: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(net(z[rows], mask[rows]), truth[rows])

    def epoch() -> list[Callable[[], Tensor]]:
        order = train[torch.randperm(len(train), generator=generator)]
        batches = [order[start : start + batch] for start in range(0, len(order), batch)]
        return [partial(loss, rows) for rows in batches]

    optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=rate, weight_decay=weight_decay)
    took, reached = _train(net, optimiser, epoch, lambda: loss(test), epochs, patience)
    values = net.values.detach().double() / sd
    given = origin or Origin(method="attention")
    detail = {**given.detail, "heads": heads, "epochs": took, "held-out loss": reached, "position": position}
    probe = AttentionProbe(
        site=site,
        queries=(net.queries.detach().double() / sd).float(),
        slopes=net.slopes.detach() / net.tokens,
        values=values.float(),
        bias=float(net.bias.detach().double() - (values @ mean).sum()),  # attention sums to 1 in each head
        reads=reads or _reads(y),
        origin=replace(given, method="attention", seed=seed, detail=detail),
    )
    return _described(probe, X[test].detach().float(), mask[test], up[split.test])


def _described(probe: AttentionProbe, x: Tensor, mask: Tensor, up: np.ndarray) -> AttentionProbe:
    """The probe with its entropies, and its AUROC with and without slopes, on the groups that stopped the fit."""
    read = {"auroc": probe, "auroc without position": probe.without_position()}
    scores = {f"held-out {name}": auroc(each(x, mask).double().numpy(), up) for name, each in read.items()}
    many = bool((mask.sum(dim=1) > 1).any())
    entropy = probe.entropy(x, mask).tolist() if many else None
    detail = {**probe.origin.detail, **scores, "entropy": entropy}
    return replace(probe, origin=replace(probe.origin, detail=detail))


class _Attention(nn.Module):
    def __init__(self, heads: int, d: int, tokens: int, generator: torch.Generator) -> None:
        super().__init__()
        self.tokens = tokens
        self.queries = nn.Parameter(0.1 * torch.randn(heads, d, generator=generator) / math.sqrt(d))
        self.values = nn.Parameter(0.1 * torch.randn(heads, d, generator=generator) / math.sqrt(d))
        self.slopes = nn.Parameter(torch.zeros(heads))  # per length of a sequence, so that it learns as fast as a query
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        a = _attend(z, mask, self.queries, self.slopes / self.tokens)
        return (a * torch.einsum("rtd,kd->rtk", z, self.values)).sum(dim=(1, 2)) + self.bias


def _standard_tokens(x: Tensor, mask: Tensor, train: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sequences standardised by the real tokens of the training rows, padding at 0; mean and deviation."""
    empty = (~mask.any(dim=1)).nonzero()
    if len(empty):
        raise SpecError(f"row {int(empty[0])} has no token: its mask is false throughout", "mask")
    if not bool(torch.isfinite(x[mask]).all()):
        raise NumericalError("an activation at a real token is NaN or infinite")
    seen = x[train][mask[train]].double()
    mean, sd = seen.mean(dim=0), seen.std(dim=0, unbiased=False)
    sd = torch.where(sd > 1e-12, sd, torch.ones_like(sd))
    return ((x - mean.float()) / sd.float()).masked_fill(~mask[..., None], 0.0), mean, sd


def _attend(x: Tensor, mask: Tensor, queries: Tensor, slopes: Tensor) -> Tensor:
    place = (mask.cumsum(dim=1) - 1).to(x)  # the first real token is 0, wherever the padding is
    scores = torch.einsum("rtd,kd->rtk", x, queries) + place[..., None] * slopes
    return scores.masked_fill(~mask[..., None], -math.inf).softmax(dim=1)


def _train(
    net: nn.Module,
    optimiser: torch.optim.Optimizer,
    losses: list[Callable[[], Tensor]] | Callable[[], list[Callable[[], Tensor]]],
    held: Callable[[], Tensor],
    most: int,
    patience: int,
) -> tuple[int, float]:
    """Minimise until the held-out loss stops falling; leaves the best weights, returns when and what it was."""
    with torch.no_grad():
        reached, at = float(held()), 0
    best = copy.deepcopy(net.state_dict())
    for step in range(1, most + 1):
        for loss in losses() if callable(losses) else losses:
            optimiser.zero_grad()
            value = loss()
            value.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        with torch.no_grad():
            now = float(held())
        if not math.isfinite(now):
            raise NumericalError(f"the loss is {now} after {step} steps: lower the rate")
        if now < reached:
            reached, at, best = now, step, copy.deepcopy(net.state_dict())
        elif step - at >= patience:
            break
    net.load_state_dict(best)
    return at, reached


def _draw(layer: nn.Linear, generator: torch.Generator) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / math.sqrt(layer.in_features))
        layer.bias.zero_()


def _reads(y: Any) -> str:
    low, high = np.unique(np.asarray(y)).tolist()
    return f"{high}, not {low}"
