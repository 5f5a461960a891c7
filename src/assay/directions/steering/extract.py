"""Directions to steer by, from prompts that differ in what is to be steered.

| method | vector | mind |
|---|---|---|
| `difference of means` | `mean h(+) - mean h(-)` over two sets | keeps the mean shift; the default choice |
| `caa` | `mean (h(+) - h(-))` over pairs, at the answer token | the same vector, for pairs that differ in one token |
| `pca_center` | first axis of `{h(+) - m, h(-) - m}`, `m` a pair's midpoint | uncentred: shift and variance count |
| `pca_diff` | first axis of `h(+) - h(-)` after their mean is taken off | the centring removes the mean shift itself |
| ActAdd | `h(+) - h(-)` of one pair, a vector for each of its first tokens | high variance; see `activation_addition` |

Every vector points from the second class to the first. Its `size` is the mean norm of the activations that it was
fitted on, its `level` where the second class lies along it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from assay.activations.edits import Add, Positions
from assay.activations.subject import Subject
from assay.base.errors import NumericalError, SpecError
from assay.base.hashing import digest
from assay.base.rng import numpy_stream
from assay.directions.data import read_sites
from assay.directions.vectors import Direction, Origin
from assay.subjects.tokens import from_ids

Method = Literal["difference of means", "caa", "pca_center", "pca_diff"]

Rows = Float[np.ndarray, "rows d"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """Prompts of two classes: those that a direction is to point to, and those that it points away from.

    Args:
        positive: Prompts of the first class.
        negative: Prompts of the second.
        paired: Row k of one belongs with row k of the other.
        groups: With pairs: what each is about; groups stay whole in a split. Each pair is its own group by default.
        writes: What the first class has and the second has not.

    Raises:
        SpecError: A class is empty, or pairs do not pair.

    Example:
        >>> pairs = Contrast(positive=("so good", "so kind"), negative=("so bad", "so rude"), writes="praise")
        >>> train, test = pairs.split(held_out=0.5, seed=0)
        >>> len(train), len(test)
        (1, 1)
    """

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    paired: bool = True
    groups: tuple[str, ...] = ()
    writes: str = "the first class"

    def __post_init__(self) -> None:
        if not self.positive or not self.negative:
            sizes = f"{len(self.positive)} and {len(self.negative)}"
            raise SpecError(f"a contrast needs prompts of both classes; got {sizes}", "data")
        if self.paired and len(self.positive) != len(self.negative):
            sizes = f"{len(self.positive)} and {len(self.negative)}"
            raise SpecError(
                f"pairs need as many of one class as of the other; got {sizes} (or say paired=False)", "data"
            )
        if self.groups and (not self.paired or len(self.groups) != len(self.positive)):
            raise SpecError(f"{len(self.groups)} groups for {len(self.positive)} pairs; give one a pair", "groups")

    @property
    def digest(self) -> str:
        """The hash of the prompts."""
        return digest([self.positive, self.negative, self.paired, self.groups])

    def split(self, held_out: float = 0.3, seed: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Pairs to fit on and pairs to test on, no group in both: numbers of pairs.

        Raises:
            SpecError: These are no pairs, or there are fewer than two groups.
        """
        if not self.paired:
            raise SpecError("only pairs are split by number; split two sets before they are made a contrast", "paired")
        names = self.groups or tuple(str(i) for i in range(len(self.positive)))
        unique = sorted(set(names))
        if len(unique) < 2 or not 0 < held_out < 1:
            raise SpecError(
                f"{len(unique)} groups cannot be split with held_out={held_out}: two groups, a share within 0..1",
                "held_out",
            )
        order = numpy_stream(seed, "contrast", "split").permutation(len(unique))
        n = min(len(unique) - 1, max(1, round(held_out * len(unique))))
        out = {unique[i] for i in order[:n]}
        rows = range(len(names))
        return tuple(i for i in rows if names[i] not in out), tuple(i for i in rows if names[i] in out)


def extract(
    subject: Subject,
    contrast: Contrast,
    sites: str | Sequence[str],
    method: Method = "difference of means",
    *,
    positions: Positions = "last",
    train: Sequence[int] | None = None,
    test: Sequence[int] = (),
    batch: int = 32,
) -> dict[str, Direction]:
    """Fit a direction at each of several sites.

    Args:
        subject: The subject.
        contrast: Prompts of two classes.
        sites: Site names and patterns.
        method: See this module's table.
        positions: Which token of each prompt; the answer's for CAA. Several are averaged.
        train: With pairs, the pairs to fit on; all but `test` when None.
        test: Pairs that are held out. How many of them the direction orders right is in its origin.
        batch: How many prompts go through the model at once.

    Returns:
        By site. `origin.detail` has `agreement`, the mean cosine between differences of two pairs (where it is low,
        steering works on some prompts and backfires on others), and `ordered`, the share of held-out pairs whose first
        prompt lies further along the direction.

    Raises:
        SpecError: The method needs pairs, or training and test pairs share a group.
        NumericalError: The classes do not differ, or an activation is not finite.

    Source: Rimsky et al. 2024, section 3 (CAA); Zou et al. 2023 and repeng 0.4 (PCA); arXiv 2505.22637 (agreement).

    Example:
        >>> pairs = Contrast(
        ...     positive=("When Mary went", "When Mary gave"), negative=("When John went", "When John gave")
        ... )
        >>> found = extract(subject, pairs, "blocks.2.resid_post", "caa")
        >>> found["blocks.2.resid_post"].origin.method
        'caa'
    """
    if method not in get_args(Method):
        raise SpecError(f"method is {method!r}; valid: {', '.join(map(repr, get_args(Method)))}", "method")
    if not contrast.paired and (method != "difference of means" or train is not None or test):
        raise SpecError(
            f"two sets without pairs allow 'difference of means' over all of them, not {method!r} or a split", "method"
        )
    fit, held = _split(contrast, train, test)
    texts = [*contrast.positive, *contrast.negative]
    found = read_sites(subject, texts, sites, positions=positions, batch=batch)
    n = len(contrast.positive)
    made = {}
    for site, rows in found.items():
        first, second = rows[:n], rows[n:]
        if contrast.paired:
            a, b = first[list(fit)], second[list(fit)]
        else:
            a, b = first, second
        detail: dict[str, Any] = {"positions": _said(positions), "rows": len(a) + len(b)}
        vector = direction_of(a, b, method)
        if contrast.paired:
            detail["agreement"] = agreement(a, b)
        if held:
            detail["ordered"] = float(np.mean((first[list(held)] - second[list(held)]) @ vector > 0))
        made[site] = Direction(
            site=site,
            vector=torch.from_numpy(vector).float(),
            size=float(np.linalg.norm(np.concatenate([a, b]).astype(np.float64), axis=1).mean()),
            writes=f"towards {contrast.writes}",
            level=float(b.astype(np.float64).mean(0) @ (vector / np.linalg.norm(vector))),
            origin=Origin(
                method=method,
                subject=subject.fingerprint,
                data=contrast.digest,
                train=fit,
                test=held,
                detail=detail,
            ),
        )
    return made


def direction_of(
    positive: Float[np.ndarray, "first d"],
    negative: Float[np.ndarray, "second d"],
    method: Method = "difference of means",
) -> Float[np.ndarray, " d"]:
    """The vector of a method, from activations.

    PCA's axis has no sign and no length of its own: its sign is the one that most pairs agree with, its length that of
    the mean difference along it (1 where that is zero, as `pca_diff` may have it).

    Args:
        positive: Activations of the first class.
        negative: Activations of the second, row by row its partner where the method works on pairs.
        method: See this module's table.

    Raises:
        SpecError: The shapes do not fit.
        NumericalError: Something is not finite, or the classes do not differ.

    Example:
        >>> x = np.array([[1.0, 0.0], [1.0, 1.0]])
        >>> direction_of(x, np.zeros((2, 2)), "caa").tolist()
        [1.0, 0.5]
    """
    a, b = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise SpecError(f"activations have the shapes {a.shape} and {b.shape}; they must be [rows, d] of one d", "rows")
    if method != "difference of means" and len(a) != len(b):
        raise SpecError(f"{method!r} works on pairs; got {len(a)} and {len(b)} rows", "rows")
    if not np.isfinite(a).all() or not np.isfinite(b).all():
        raise NumericalError("the activations are not all finite")
    shift: np.ndarray = a.mean(0) - b.mean(0)
    if method in ("difference of means", "caa"):
        if not shift.any():
            raise NumericalError("the two classes have the same mean, so no direction leads from one to the other")
        return shift
    differences = a - b
    if method == "pca_diff":
        differences = differences - shift  # as sklearn's PCA centres: what all pairs have in common is gone
    scale = np.abs(a - b).max()
    if len(a) < 2 or np.abs(differences).max() <= 1e-9 * scale or scale == 0:
        raise NumericalError(
            f"the differences of the {len(a)} pairs do not vary, so {method!r} finds no axis; use 'difference of means'"
        )
    axis = np.linalg.svd(differences, full_matrices=False)[2][0]
    along = (a - b) @ axis
    votes = int(np.sum(along > 0)) - int(np.sum(along < 0))
    axis = axis if votes > 0 or (votes == 0 and along.sum() >= 0) else -axis
    length = abs(float(shift @ axis))
    return np.asarray(axis * (length if length > 1e-9 * scale else 1.0))


def agreement(positive: Rows, negative: Rows) -> float:
    """The mean cosine between the differences of two pairs; 0 with one pair, which says nothing.

    Example:
        >>> agreement(np.array([[1.0, 0.0], [0.0, 1.0]]), np.zeros((2, 2)))
        0.0
    """
    differences = np.asarray(positive, np.float64) - np.asarray(negative, np.float64)
    norms = np.linalg.norm(differences, axis=1, keepdims=True)
    units = differences / np.where(norms == 0, 1, norms)
    n = len(units)
    if n < 2:
        return 0.0
    total = units.sum(0)
    return float((total @ total - np.sum(units * units)) / (n * (n - 1)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ActivationAddition:
    """What one prompt holds at its first tokens more than another: a vector for each of them.

    Args:
        site: The site it was read at and is added to.
        vectors: One a token, `[pos, d]`.
        tokens: The token ids of the two prompts, padded to one length.
        origin: Where it comes from.
    """

    site: str
    vectors: Float[Tensor, "pos d"]
    tokens: tuple[tuple[int, ...], tuple[int, ...]]
    origin: Origin = field(default_factory=lambda: Origin(method="actadd"))

    def add(self, coefficient: float = 1.0) -> Add:
        """The edit `x_t + coefficient * vectors_t` at the first tokens; the prompt must be at least as long."""
        return Add(self.site, self.vectors, scale=float(coefficient), positions=tuple(range(len(self.vectors))))

    def direction(self, position: int = -1) -> Direction:
        """One token's vector as a direction, for use elsewhere than at the first tokens."""
        return Direction(
            site=self.site,
            vector=self.vectors[position],
            writes=str(self.origin.detail.get("writes", "")),
            origin=self.origin,
        )


def activation_addition(
    subject: Subject, positive: str, negative: str, site: str, *, pad: str | None = " "
) -> ActivationAddition:
    """ActAdd: the difference of two prompts' activations, position by position.

        v_t = h_t(positive) - h_t(negative),    x_t <- x_t + coefficient * v_t  for the first tokens of a prompt

    Args:
        subject: The subject.
        positive: The prompt to steer towards.
        negative: The one to steer away from.
        site: Usually `blocks.i.resid_pre`.
        pad: The single token that the shorter prompt is lengthened with at its end; None refuses different lengths.

    Raises:
        SpecError: The prompts have different lengths, and there is nothing to lengthen one with.
        NumericalError: The two prompts hold the same everywhere.

    Source: Turner et al. 2023, section 3.

    Example:
        >>> found = activation_addition(subject, "When Mary", "When John", "blocks.1.resid_pre")
        >>> run = subject.run("When the store gave", edits=[found.add(2.0)])
        >>> found.vectors.shape
        torch.Size([2, 32])
    """
    batches = [subject.batch(text) for text in (positive, negative)]
    rows = [batch.prompt(0) for batch in batches]
    width = max(map(len, rows))
    if len(rows[0]) != len(rows[1]):
        filler = [] if pad is None else subject.tokenizer(pad, add_special_tokens=False)["input_ids"]
        if len(filler) != 1:
            raise SpecError(
                f"{positive!r} has {len(rows[0])} tokens and {negative!r} {len(rows[1])}, and pad={pad!r} is "
                f"{len(filler)} tokens; give prompts of one length, or a pad of one token",
                "pad",
            )
        rows = [[*row, *filler * (width - len(row))] for row in rows]
    with torch.no_grad():
        held = subject.run(from_ids(torch.tensor(rows).to(subject.device)), capture=site)[site]
    vectors = (held[0].float() - held[1].float()).reshape(width, -1).cpu()
    if not bool(torch.isfinite(vectors).all()) or not bool(vectors.any()):
        raise NumericalError(f"{positive!r} and {negative!r} hold the same at {site}, or something that is not finite")
    origin = Origin(
        method="actadd",
        subject=subject.fingerprint,
        data=digest([positive, negative]),
        detail={"writes": f"towards {positive!r}, away from {negative!r}"},
    )
    return ActivationAddition(
        site=str(subject.site(site)), vectors=vectors, tokens=(tuple(rows[0]), tuple(rows[1])), origin=origin
    )


def _split(
    contrast: Contrast, train: Sequence[int] | None, test: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The pairs to fit on and to test on, checked."""
    if not contrast.paired:
        return (), ()
    n = len(contrast.positive)
    held = tuple(int(i) for i in test)
    fit = tuple(i for i in range(n) if i not in set(held)) if train is None else tuple(int(i) for i in train)
    wrong = [i for i in (*fit, *held) if not 0 <= i < n]
    if wrong or not fit:
        raise SpecError(f"there are pairs 0 to {n - 1}; got {wrong[:3] or 'none to fit on'}", "train")
    names: Mapping[int, str] = dict(enumerate(contrast.groups or [str(i) for i in range(n)]))
    shared = sorted({names[i] for i in fit} & {names[i] for i in held})
    if shared:
        raise SpecError(f"the group {shared[0]!r} is fitted on and tested on; split by group (Contrast.split)", "test")
    return fit, held


def _said(positions: Positions) -> Any:
    """Positions as the origin keeps them."""
    return positions if isinstance(positions, int | str) or positions is None else str(positions)
