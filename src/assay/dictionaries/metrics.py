"""How good a dictionary is: what it reconstructs, how sparsely, and what the model loses when it runs on it.

Two measures go by the name "explained variance", and both are here under their own:

    fve          1 - sum_b |y_b - y_hat_b|^2 / sum_b |y_b - mean y|^2            over all rows together
    fve_rowwise  mean_b (1 - |y_b - y_hat_b|^2 / |y_b - mean y|^2)               row by row; SAELens before version 6

What the model loses is a share of what it loses when the site is ablated, to zero and to its mean:

    ce_recovered = (CE_ablated - CE_dictionary) / (CE_ablated - CE)              1: nothing is lost
    kl_recovered = 1 - KL(model || dictionary) / KL(model || ablated)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.activations.edits import Edit, Set
from assay.base.errors import NumericalError, SpecError
from assay.base.method import Progress
from assay.base.stats import Interval, bootstrap_interval
from assay.dictionaries.crosslayer import CrossLayer
from assay.dictionaries.dictionary import Dictionary, Site

DENSE = 0.1
"""A latent active in more than this share of the rows is called dense."""
_BLOCK = 2048


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reconstruction:
    """What a dictionary does to held-out rows.

    Attributes:
        rows: How many.
        fve: Share of the variance explained, over all rows together.
        fve_interval: Its bootstrap interval over rows, or over groups of rows.
        fve_rowwise: The mean of the share row by row.
        cosine: Mean cosine of a row and its reconstruction.
        length_ratio: Mean length of the reconstruction over that of the row.
        l0: Mean number of active latents.
        l0_interval: Its bootstrap interval.
        l0_quantiles: The 5, 25, 50, 75 and 95 per cent quantiles of the same.
        dead: Share of latents never active in these rows.
        dense: Share of latents active in more than a tenth of them.
        frequency: Share of rows in which each latent is active.
        scale: Mean activation of each latent where it is active, times its decoder row's length; NaN if it never is.
        alignment: Cosine of each latent's encoder and decoder rows; NaN where they read and write different widths.
    """

    rows: int
    fve: float
    fve_interval: Interval
    fve_rowwise: float
    cosine: float
    length_ratio: float
    l0: float
    l0_interval: Interval
    l0_quantiles: tuple[float, ...]
    dead: float
    dense: float
    frequency: Float[np.ndarray, " latent"]
    scale: Float[np.ndarray, " latent"]
    alignment: Float[np.ndarray, " latent"]

    def density(self, bins: int = 20) -> tuple[Float[np.ndarray, " edges"], Int[np.ndarray, " bins"]]:
        """Edges and counts of a histogram of log10 frequency, of the latents that are ever active."""
        alive = self.frequency[self.frequency > 0]
        logs = np.log10(alive) if len(alive) else np.zeros(0)
        counts, edges = np.histogram(logs, bins=bins, range=(min(-6.0, float(logs.min(initial=0))), 0.0))
        return edges, counts


def reconstruction(
    dictionary: Dictionary | CrossLayer,
    x: Float[Tensor, "rows d_in"],
    y: Float[Tensor, "rows d_out"] | None = None,
    *,
    groups: Sequence[Any] | None = None,
    seed: int = 0,
) -> Reconstruction:
    """Measure a dictionary on rows that it was not trained on.

    Args:
        dictionary: The dictionary; of a cross-layer transcoder the sites lie side by side too.
        x: Rows it reads, sites side by side.
        y: What it should write; `x` where not given.
        groups: A label a row (its document), where rows of one group are alike: whole groups are resampled.
        seed: Of the bootstrap.

    Raises:
        SpecError: There are fewer than two rows, or `y` is missing for a transcoder.
        NumericalError: A row is not finite, or all rows are one.

    Example:
        >>> from assay.dictionaries import Card, TopK
        >>> eye = torch.eye(4)
        >>> d = Dictionary(
        ...     W_enc=eye,
        ...     b_enc=torch.zeros(4),
        ...     W_dec=eye,
        ...     b_dec=torch.zeros(4),
        ...     activation=TopK(k=1),
        ...     card=Card(reads=(Site("blocks.0.resid_post", 4),)),
        ... )
        >>> found = reconstruction(d, torch.eye(4)[[0, 1, 2, 0]])
        >>> found.fve, found.l0, found.dead
        (1.0, 1.0, 0.25)
    """
    layers = len(dictionary.layers) if isinstance(dictionary, CrossLayer) else 0
    if y is None and (isinstance(dictionary, CrossLayer) or dictionary.kind == "transcoder"):
        raise SpecError("a transcoder writes what it does not read: give the rows it should write as y", "y")
    y = x if y is None else y
    if len(x) < 2 or len(x) != len(y):
        raise SpecError(f"there are {len(x)} rows to read and {len(y)} to reconstruct; give two or more of each", "x")
    if not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise NumericalError("a row holds NaN or infinite numbers")
    mean = y.double().mean(0)
    counted = torch.zeros(dictionary.n_latents, dtype=torch.float64)
    summed = torch.zeros_like(counted)
    per_row = []
    for start in range(0, len(x), _BLOCK):
        rows, wanted = x[start : start + _BLOCK], y[start : start + _BLOCK].double()
        rows = torch.unflatten(rows, 1, (layers, -1)) if layers else rows
        z = dictionary.encode(rows)
        guess = dictionary(rows).flatten(1).double()
        counted += (z != 0).sum(0).cpu()
        summed += z.double().sum(0).cpu()
        per_row.append(_row_measures(wanted, guess, mean, z))
    table = torch.cat(per_row).cpu().numpy()
    if not table[:, 1].sum() > 0:
        raise NumericalError("every row is the same: there is no variance to explain")
    whole = _by_group(table[:, :3], groups)
    frequency = (counted / len(x)).numpy()
    lengths = dictionary.decoder.double().norm(dim=1).cpu()
    return Reconstruction(
        rows=len(x),
        fve=_fve(whole),
        fve_interval=bootstrap_interval(whole, _fve, seed=seed),
        fve_rowwise=float((1 - table[:, 0] / np.maximum(table[:, 1], 1e-30)).mean()),
        cosine=float(table[:, 3].mean()),
        length_ratio=float(table[:, 4].mean()),
        l0=float(table[:, 2].mean()),
        l0_interval=bootstrap_interval(whole, _l0, seed=seed),
        l0_quantiles=tuple(float(q) for q in np.quantile(table[:, 2], (0.05, 0.25, 0.5, 0.75, 0.95))),
        dead=float((counted == 0).double().mean()),
        dense=float((frequency > DENSE).mean()),
        frequency=frequency,
        scale=(torch.where(counted > 0, summed / counted, torch.nan) * lengths).numpy(),
        alignment=_alignment(dictionary),
    )


def _row_measures(wanted: Tensor, guess: Tensor, mean: Tensor, z: Tensor) -> Tensor:
    """For each row: squared error, squared distance from the mean, L0, cosine, and ratio of lengths."""
    return torch.stack(
        [
            (wanted - guess).square().sum(1),
            (wanted - mean).square().sum(1),
            (z != 0).sum(1).double(),
            torch.nn.functional.cosine_similarity(wanted, guess, dim=1),
            guess.norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-30),
        ],
        dim=1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """What a model keeps when a site holds a dictionary's reconstruction, per token.

    Attributes:
        tokens: Predictions measured.
        ce: The model's own cross-entropy, in nats.
        ce_dictionary: With the reconstruction.
        ce_zero: With the site set to zero.
        ce_mean: With the site set to its mean over these texts, without what is left as it is.
        kl_dictionary: Mean KL divergence of the model from the model with the reconstruction, in nats.
        kl_zero: The same of zero ablation.
        kl_mean: The same of mean ablation.
        ce_recovered_zero: Share recovered, against zero.
        ce_recovered_mean: Share recovered, against the mean.
        kl_recovered_zero: The same of KL.
        kl_recovered_mean: The same of KL.
        intervals: A bootstrap interval over texts for each of the four shares, by name.
    """

    tokens: int
    ce: float
    ce_dictionary: float
    ce_zero: float
    ce_mean: float
    kl_dictionary: float
    kl_zero: float
    kl_mean: float
    ce_recovered_zero: float
    ce_recovered_mean: float
    kl_recovered_zero: float
    kl_recovered_mean: float
    intervals: Mapping[str, Interval]


_SHARES: dict[str, Callable[[np.ndarray], float]] = {
    "ce_recovered_zero": lambda s: (s[3] - s[2]) / (s[3] - s[1]),
    "ce_recovered_mean": lambda s: (s[4] - s[2]) / (s[4] - s[1]),
    "kl_recovered_zero": lambda s: 1 - s[5] / s[6],
    "kl_recovered_mean": lambda s: 1 - s[5] / s[7],
}


def recovered(
    subject: Any,
    dictionary: Dictionary | CrossLayer,
    tokens: Int[Tensor, "texts pos"],
    *,
    leave_first: int = 0,
    leave_longer_than: float | None = None,
    batch: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Recovered:
    """Run a model on a dictionary's reconstructions, and say what it loses.

    Every site the dictionary writes is set to its reconstruction from the model's own activations. What was left out
    when the dictionary was trained (first tokens, rows of extreme length) can be left as it is here too; ablations
    leave the same positions alone.

    Args:
        subject: The model.
        dictionary: The dictionary.
        tokens: Whole texts of one length, without padding.
        leave_first: Positions at the start of each text that stay as they are.
        leave_longer_than: Positions whose row (of the first site that is written) is longer stay as they are.
        batch: Texts at a time.
        seed: Of the bootstrap.
        progress: Told after each batch.

    Raises:
        SpecError: There are fewer than two texts, or a text has one token.
        UnknownSite: The model has no such site.
        InvalidEdit: A site is not as wide as the dictionary's.
    """
    if len(tokens) < 2 or tokens.shape[1] < 2:
        raise SpecError(f"tokens are {list(tokens.shape)}; give two or more texts of two or more tokens", "tokens")
    reads, writes = _sites(dictionary)
    means = _means(subject, writes, tokens, batch, leave_first, leave_longer_than)
    table = []
    for start in range(0, len(tokens), batch):
        ids = tokens[start : start + batch]
        clean = subject.run(ids, capture=[site.name for site in dict.fromkeys((*reads, *writes))])
        values = _reconstructed(dictionary, clean, reads, writes)
        leave = _left_alone(clean, writes[0], leave_first, leave_longer_than)
        arms = {
            "dictionary": values,
            "zero": {name: torch.zeros_like(value) for name, value in values.items()},
            "mean": {name: means[name].to(value.device).expand_as(value) for name, value in values.items()},
        }
        logits = {"clean": clean.logits}
        for arm, changed in arms.items():
            edits: list[Edit] = []
            for name, value in changed.items():
                kept = clean[name].float().reshape(value.shape)
                edits.append(Set(name, torch.where(leave[..., None], kept, value).reshape(clean[name].shape)))
            logits[arm] = subject.run(ids, edits=edits).logits
        table.append(_losses(logits, ids))
        if progress is not None:
            progress(min(start + batch, len(tokens)), len(tokens))
    sums = np.concatenate(table)
    return _shares(sums, seed)


def random_error_losses(
    subject: Any,
    dictionary: Dictionary | CrossLayer,
    tokens: Int[Tensor, "texts pos"],
    *,
    leave_first: int = 0,
    leave_longer_than: float | None = None,
    draws: int = 19,
    batch: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[float]:
    """The model's cross-entropy, in nats, with errors of the dictionary's length that point anywhere, draw by draw.

    Args:
        subject: The model.
        dictionary: The dictionary.
        tokens: As in `recovered`, as is all that follows.
        leave_first: See there.
        leave_longer_than: See there.
        draws: How many.
        batch: Texts at a time.
        seed: Of the draws.
        progress: Told after each batch, in units of whole draws.
    """
    from assay.controls.dictionaries import random_errors

    reads, writes = _sites(dictionary)
    sums = np.zeros(draws)
    for start in range(0, len(tokens), batch):
        ids = tokens[start : start + batch]
        clean = subject.run(ids, capture=[site.name for site in dict.fromkeys((*reads, *writes))])
        values = _reconstructed(dictionary, clean, reads, writes)
        leave = _left_alone(clean, writes[0], leave_first, leave_longer_than)
        kept = {site.name: _flat(clean, site) for site in writes}
        errors = {  # of each text by itself, so that the batch changes nothing
            name: [
                random_errors(error, draws=draws, seed=seed, of=f"{name} {start + text}")
                for text, error in enumerate(value - kept[name])
            ]
            for name, value in values.items()
        }
        for draw in range(draws):
            edits: list[Edit] = []
            for name, drawn in errors.items():
                error = torch.where(leave[..., None], 0, torch.stack([next(text) for text in drawn]))
                edits.append(Set(name, (kept[name] + error).reshape(clean[name].shape)))
            logs = torch.log_softmax(subject.run(ids, edits=edits).logits[:, :-1].float(), dim=-1)
            sums[draw] -= float(logs.gather(-1, ids[:, 1:, None].to(logs.device)).sum())
            if progress is not None:
                progress(round((start / len(tokens)) * draws) + draw * len(ids) // len(tokens), draws)
    return [float(value) for value in sums / (len(tokens) * (tokens.shape[1] - 1))]


def _shares(sums: np.ndarray, seed: int) -> Recovered:
    """From sums per text (tokens, four CE, three KL) to means and shares."""
    total = sums.sum(0)
    means = total[1:] / total[0]
    values, intervals = {}, {}
    for name, share in _SHARES.items():
        values[name] = _share(share, sums)
        intervals[name] = bootstrap_interval(sums, partial(_share, share), seed=seed)
    return Recovered(
        tokens=int(total[0]),
        ce=float(means[0]),
        ce_dictionary=float(means[1]),
        ce_zero=float(means[2]),
        ce_mean=float(means[3]),
        kl_dictionary=float(means[4]),
        kl_zero=float(means[5]),
        kl_mean=float(means[6]),
        intervals=intervals,
        **values,
    )


def _share(share: Callable[[np.ndarray], float], sums: np.ndarray) -> float:
    return float(share(sums.sum(0)))


def _losses(logits: Mapping[str, Tensor], ids: Tensor) -> np.ndarray:
    """Per text: predictions, CE of clean, dictionary, zero and mean, KL of the last three from clean."""
    logs = {arm: torch.log_softmax(values[:, :-1].float(), dim=-1) for arm, values in logits.items()}
    following = ids[:, 1:, None].to(logs["clean"].device)
    ce = [-logs[arm].gather(-1, following)[..., 0].sum(1) for arm in ("clean", "dictionary", "zero", "mean")]
    weights = logs["clean"].exp()
    kl = [(weights * (logs["clean"] - logs[arm])).sum((1, 2)) for arm in ("dictionary", "zero", "mean")]
    count = torch.full_like(ce[0], ids.shape[1] - 1)
    return torch.stack([count, *ce, *kl], dim=1).double().cpu().numpy()


def _sites(dictionary: Dictionary | CrossLayer) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    if isinstance(dictionary, CrossLayer):
        return tuple(layer.card.reads[0] for layer in dictionary.layers), dictionary.layers[0].card.writes
    return dictionary.card.reads, dictionary.card.writes


def _flat(run: Any, site: Site) -> Tensor:
    """A site's activations, `[batch, pos, width]`: heads are concatenated."""
    return torch.as_tensor(run[site.name]).float().flatten(2)


def _reconstructed(
    dictionary: Dictionary | CrossLayer, run: Any, reads: Iterable[Site], writes: Sequence[Site]
) -> dict[str, Tensor]:
    parts = [_flat(run, site) for site in reads]
    if isinstance(dictionary, CrossLayer):
        out = dictionary(torch.stack(parts, dim=-2))
        return {site.name: out[..., index, :] for index, site in enumerate(writes)}
    dictionary.check_inputs(torch.cat(parts, dim=-1)[:, 1:])
    return dictionary.split(dictionary(torch.cat(parts, dim=-1)))


def _left_alone(run: Any, site: Site, first: int, longer: float | None) -> Tensor:
    rows = _flat(run, site)
    leave = torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device)
    leave[:, :first] = True
    return leave if longer is None else leave | (rows.norm(dim=-1) > longer)


def _means(
    subject: Any, sites: Sequence[Site], tokens: Tensor, batch: int, first: int, longer: float | None
) -> dict[str, Tensor]:
    """The mean of each site over the positions that are not left alone: one sink token would rule it."""
    sums, count = {site.name: torch.zeros(site.width, dtype=torch.float64) for site in sites}, 0
    for start in range(0, len(tokens), batch):
        run = subject.run(tokens[start : start + batch], capture=list(sums))
        used = ~_left_alone(run, sites[0], first, longer)
        count += int(used.sum())
        for site in sites:
            sums[site.name] += _flat(run, site)[used].double().sum(0).cpu()
    return {name: (total / max(count, 1)).float() for name, total in sums.items()}


def _by_group(table: np.ndarray, groups: Sequence[Any] | None) -> np.ndarray:
    """Sums per group with the number of rows as a last column; rows are their own groups where none are given."""
    counted = np.column_stack([table, np.ones(len(table))])
    if groups is None:
        return counted
    if len(groups) != len(table):
        raise SpecError(f"there are {len(groups)} groups for {len(table)} rows", "groups")
    _, which = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.zeros((which.max() + 1, counted.shape[1]))
    np.add.at(sums, which, counted)
    if len(sums) < 2:
        raise SpecError(
            "all rows are of one group, so nothing can be said about others; give rows of several", "groups"
        )
    return sums


def _fve(sums: np.ndarray) -> float:
    total = sums.sum(0)
    return float(1 - total[0] / total[1])


def _l0(sums: np.ndarray) -> float:
    total = sums.sum(0)
    return float(total[2] / total[3])


def _alignment(dictionary: Dictionary | CrossLayer) -> Float[np.ndarray, " latent"]:
    if isinstance(dictionary, CrossLayer) or dictionary.W_enc.shape != dictionary.W_dec.shape:
        return np.full(dictionary.n_latents, np.nan)
    both = torch.nn.functional.cosine_similarity(dictionary.W_enc.double(), dictionary.W_dec.double(), dim=1)
    return np.asarray(both.cpu().numpy())
