"""Nulls for a dictionary: what random directions explain at the same size, and what random errors of its size do.

A dictionary of many more latents than dimensions explains much of anything: the best few of thousands of *random*
directions come near any vector. And a reconstruction that is off by some length does some harm whatever is lost. Both
have to be known before a share of variance, or a loss in the model, says anything of what was learned.

A third question is what the same training finds where there is nothing to find: `harvest_arm` gives activations of the
same model reading random tokens, or of the same architecture with redrawn weights reading the same text.

These functions take arrays or stored activations and draw; they know no dictionary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from assay.activations.corpora import Corpus, Piece
from assay.activations.store import Store
from assay.activations.subject import Subject
from assay.base.errors import NumericalError, SpecError
from assay.base.method import Progress
from assay.base.rng import numpy_stream, torch_stream

Arm = Literal["random-tokens", "reinitialised"]
"""What a dictionary is trained on that has nothing to be found in it."""


_BLOCK = 512
"""Rows whose chosen directions are held at once."""


def random_dictionaries(
    rows: Float[Tensor, "rows d"],
    n_latents: int,
    k: int,
    *,
    draws: int = 19,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[float]:
    """The share of variance that `k` of `n_latents` random directions a row explain, for each of some draws.

        1 - sum_b min_z |x_b - mean - sum_{f in S_b} z_f v_f|^2 / sum_b |x_b - mean|^2        |S_b| = k

    with directions `v` uniform on the sphere. Rows are centred; each row's `k` are chosen greedily (matching pursuit)
    and then fitted together by least squares. A trained encoder is not given that: the null is generous.

    Args:
        rows: The held-out rows that the dictionary itself was measured on.
        n_latents: Size of the dictionary under test.
        k: Its mean number of active latents, rounded.
        draws: How many random dictionaries.
        seed: Of the draws.
        progress: Told after each draw.

    Raises:
        SpecError: k is below 1 or above the number of directions.
        NumericalError: The rows do not vary.

    Source: Mallat and Zhang 1993 (matching pursuit); the need for such a baseline after Heap et al. 2025 (arXiv
    2501.17727), who find that dictionaries of untrained models look good too.

    Example:
        >>> rows = torch.randn(64, 16, generator=torch.manual_seed(0))
        >>> few, many = random_dictionaries(rows, 64, 2, draws=1)[0], random_dictionaries(rows, 64, 8, draws=1)[0]
        >>> 0 < few < many < 1
        True
    """
    if not 1 <= k <= n_latents:
        raise SpecError(f"k is {k} and there are {n_latents} directions; give a k from 1 to that", "k")
    centred = rows - rows.mean(0)
    total = float(centred.double().square().sum())
    if not total > 0:
        raise NumericalError("every row is the same: there is no variance to explain")
    k = min(k, rows.shape[1])
    shares = []
    for draw in range(draws):
        stream = torch_stream(seed, "random dictionary", draw)
        directions = torch.nn.functional.normalize(torch.randn(n_latents, rows.shape[1], generator=stream), dim=1)
        directions = directions.to(rows.device)
        left = sum(float(_pursuit_error(block, directions, k)) for block in torch.split(centred, _BLOCK))
        shares.append(1 - left / total)
        if progress is not None:
            progress(draw + 1, draws)
    return shares


def random_errors(error: Float[Tensor, "*rows d"], *, draws: int = 19, seed: int = 0, of: str = "") -> Iterator[Tensor]:
    """Yield errors that point anywhere, each row as long as the given one.

    Args:
        error: The error.
        draws: How many.
        seed: Of the draws.
        of: What the error is of, where those of several sites or batches are drawn with one seed.

    Source: Gurnee 2024, "SAE reconstruction errors are (empirically) pathological".

    Example:
        >>> error = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> [round(float(drawn.norm(dim=1)[0]), 4) for drawn in random_errors(error, draws=2)]
        [5.0, 5.0]
    """
    lengths = error.norm(dim=-1, keepdim=True)
    for draw in range(draws):
        direction = torch.randn(error.shape, generator=torch_stream(seed, "random error", of, draw)).to(error.device)
        yield torch.nn.functional.normalize(direction, dim=-1) * lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomTokens:
    """A corpus of token ids with every id drawn anew, each token of the vocabulary as likely as any other.

    What is drawn for a document depends on the seed and its number alone, so the corpus can be taken up anywhere.

    Args:
        corpus: Documents of token ids; their lengths stay.
        vocab: The size of the vocabulary.
        keep: Special tokens: they stay in their places and are never drawn.
        seed: Of the draws.

    Raises:
        SpecError: Nothing is left to draw.

    Example:
        >>> from assay.activations.corpora import Texts
        >>> corpus = RandomTokens(corpus=Texts([[1, 7, 7], [1, 9]]), vocab=12, keep=(1,))
        >>> [(len(ids), ids[0]) for _, _, ids in corpus.pieces()]
        [(3, 1), (2, 1)]
    """

    corpus: Corpus
    vocab: int
    keep: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse an empty vocabulary."""
        if not np.setdiff1d(np.arange(self.vocab), self.keep).size:
            raise SpecError(f"there is no token to draw: vocab is {self.vocab}, {len(self.keep)} are kept", "vocab")

    def pieces(self, start: int = 0) -> Iterator[Piece]:
        """Yield (document, piece, token ids) from document `start` on."""
        pool = np.setdiff1d(np.arange(self.vocab), self.keep)
        for number, piece, ids in self.corpus.pieces(start):
            stream = numpy_stream(self.seed, "random tokens", number, piece)
            given = np.asarray(ids, dtype=np.int64)
            drawn = pool[stream.integers(pool.size, size=given.size)]
            yield number, piece, np.where(np.isin(given, self.keep), given, drawn).tolist()

    def describe(self) -> dict[str, Any]:
        """What it is, as JSON values."""
        own = {"vocab": self.vocab, "keep": sorted(self.keep), "seed": self.seed}
        return {"kind": "random tokens", "of": self.corpus.describe(), **own}


def harvest_arm(
    subject: Subject,
    store: Store,
    arm: Arm,
    *,
    out: str | Path,
    sites: tuple[str, ...] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> Store:
    """Harvest the rows of a store again where there is nothing to learn from them.

    - "random-tokens": the same model reads rows of the same lengths, with tokens drawn uniformly; special tokens stay.
    - "reinitialised": the same rows are read by the same architecture with every weight matrix drawn anew from a
      normal distribution of its own mean and standard deviation.

    Tokens are left out by the same rules as in the store, with norms held to the median of the arm's own. An
    interrupted harvest goes on when the same call is made again.

    Args:
        subject: The subject that the store was harvested from.
        store: The activations.
        arm: Which of the two.
        out: The folder to write.
        sites: Which of the store's sites; all when not given.
        seed: Of the tokens, or of the weights.
        progress: Told of tokens done and in all.

    Returns:
        As many tokens as the store has, or a few less where longer ones were left out.

    Raises:
        SpecError: The arm is unknown, or the folder holds another harvest.
        UnsupportedArchitecture: The weights cannot be redrawn: they are quantised or on the meta device.
        NumericalError: An activation of the arm is not finite.
        OutputError: It cannot be written there.

    Source: Heap et al. 2025 (arXiv 2501.17727) for dictionaries of models with redrawn weights.
    """
    from assay.activations.contexts import Contexts
    from assay.activations.harvesting import Harvest
    from assay.controls.weights import reinitialised_module

    if arm not in get_args(Arm):
        raise SpecError(f"arm is {arm!r}; valid: {', '.join(map(repr, get_args(Arm)))}", "arm")
    request = store.parts[0][1].request
    corpus: Corpus = Contexts(store)
    model = subject
    if arm == "random-tokens":
        vocab, special = _vocabulary(subject)
        corpus = RandomTokens(corpus=corpus, vocab=vocab, keep=special, seed=seed)
    else:
        module = reinitialised_module(subject.module, "gaussian", seed)
        model = Subject(module, subject.tokenizer, architecture=subject.architecture, name=f"{subject.name}, redrawn")
        model.declared.update(subject.declared)
    made = Harvest(
        model,
        corpus,
        list(sites or store.sites),
        out=out,
        tokens=store.n,
        dtype=store.dtype,
        context=request["rows"]["context"],
        layout="document",
        bos="none",
        separator="none",
        min_length=1,
        rows=request["rows_together"],
        rank=0,
        world=1,
        **request["filter"],
    )
    return made.run(progress)


def _vocabulary(subject: Subject) -> tuple[int, tuple[int, ...]]:
    """How many tokens there are to draw from, and which are special."""
    config = getattr(subject.config, "text_config", None) or subject.config
    sizes = [getattr(config, "vocab_size", None), len(subject.tokenizer) if subject.tokenizer is not None else None]
    known = [int(size) for size in sizes if size]
    if not known:
        raise SpecError("this model does not say how many tokens it knows: load it with tokenizer=", "arm")
    special = getattr(subject.tokenizer, "all_special_ids", None) or ()
    return min(known), tuple(sorted({int(token) for token in special}))


def _pursuit_error(rows: Tensor, directions: Tensor, k: int) -> Tensor:
    """The squared error of the best fit of `k` directions a row, chosen greedily."""
    left, chosen = rows.clone(), []
    for _ in range(k):
        match = left @ directions.T
        best = match.abs().argmax(1)
        chosen.append(best)
        left -= match.gather(1, best[:, None]) * directions[best]
    basis = directions[torch.stack(chosen, dim=1)].double()
    gram = basis @ basis.transpose(1, 2) + 1e-9 * torch.eye(k, dtype=torch.float64, device=rows.device)
    weights = torch.linalg.solve(gram, (basis @ rows.double()[:, :, None]))
    return torch.as_tensor((rows.double() - (basis * weights).sum(1)).square().sum())
