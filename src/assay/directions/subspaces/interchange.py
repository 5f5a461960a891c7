"""A subspace of a site, and interchange interventions on it: give the base what the source has there, and nothing else.

    h_base <- h_base + R_S' (R_S h_src - R_S h_base)

R_S `[k, d]` has orthonormal rows, so what lies outside the subspace does not move at all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.activations.edits import Add, Edit, Positions, ProjectOut
from assay.activations.subject import Subject
from assay.base.artifacts import user_path, write_safetensors
from assay.base.errors import DamagedFile, NumericalError, SpecError
from assay.base.rng import torch_stream
from assay.directions.data import columns_of
from assay.directions.vectors import Origin

FORMAT = "assay.subspace/1"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subspace:
    """A subspace of a site's activations, by an orthonormal basis.

    Args:
        site: The site.
        basis: Orthonormal rows, `[k, d]`.
        origin: Where it comes from.

    Raises:
        SpecError: The basis is no matrix with at most as many rows as columns.
        NumericalError: Its rows are not finite or not orthonormal to 1e-4.

    Example:
        >>> plane = Subspace(site="blocks.0.resid_post", basis=torch.eye(3)[:2])
        >>> plane.swapped(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[7.0, 8.0, 9.0]])).tolist()
        [[7.0, 8.0, 3.0]]
    """

    site: str
    basis: Float[Tensor, "k d"]
    origin: Origin = field(default_factory=lambda: Origin(method="given"))

    def __post_init__(self) -> None:
        basis = self.basis.detach().to("cpu", torch.float32).clone()
        object.__setattr__(self, "basis", basis)
        if basis.ndim != 2 or not 1 <= len(basis) <= basis.shape[1]:
            raise SpecError(f"the basis has the shape {tuple(basis.shape)}; it must be [k, d], 1 <= k <= d", "basis")
        wide = basis.double()
        off = float((wide @ wide.T - torch.eye(len(basis)).double()).abs().max())
        if not off < 1e-4:
            raise NumericalError(f"the basis is off orthonormal by {off:.2g}; give Subspace.spanned_by(vectors)")

    @classmethod
    def spanned_by(cls, vectors: Float[Tensor, "k d"], site: str, origin: Origin | None = None) -> Subspace:
        """The subspace that vectors span.

        Raises:
            NumericalError: They are not finite, zero or linearly dependent.
        """
        rows = vectors.detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(rows).all()):
            raise NumericalError("the vectors are not all finite")
        if rows.ndim != 2 or not 1 <= len(rows) <= rows.shape[1]:
            raise SpecError(f"vectors have the shape {tuple(rows.shape)}; they must be [k, d], 1 <= k <= d", "vectors")
        sizes = torch.linalg.svdvals(rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30))
        if float(sizes[-1]) < 1e-6:
            raise NumericalError("the vectors are zero or linearly dependent; leave out those that add nothing")
        basis = torch.linalg.qr(rows.T)[0].T
        return cls(site=site, basis=basis, origin=origin or Origin(method="given"))

    @classmethod
    def random(cls, site: str, k: int, d: int, seed: int = 0) -> Subspace:
        """A uniformly random subspace of k of d dimensions: what a fitted one is held against."""
        draws = torch.randn(k, d, generator=torch_stream(seed, "random subspace"), dtype=torch.float64)
        return cls.spanned_by(draws, site, Origin(method="random subspace", seed=seed))

    @property
    def k(self) -> int:
        """Its dimension."""
        return len(self.basis)

    def swapped(self, base: Float[Tensor, "rows d"], source: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """The base's activations with the source's part in the subspace."""
        basis = self.basis.to(base)
        out: Tensor = base + ((source - base) @ basis.T) @ basis
        return out

    def edits(self, source: Float[Tensor, "rows d"], *, positions: Positions = "last") -> list[Edit]:
        """The interchange as data: take the base's part out, put the source's in, one a row."""
        basis = self.basis.to(source)
        part = (source @ basis.T) @ basis
        return [
            ProjectOut(self.site, basis, positions=positions),
            Add(self.site, part[:, None, :], positions=positions),
        ]

    def check(self, subject: Subject) -> None:
        """See that a subject is the one that the subspace was fitted on.

        Raises:
            SpecError: It has other weights.
            UnknownSite: It has no such site.
        """
        fitted = self.origin.subject
        if fitted and fitted != subject.fingerprint:
            raise SpecError(
                f"this subspace was fitted on the weights {fitted[:12]}, and {subject.name} has "
                f"{subject.fingerprint[:12]}: fit it again",
                "subject",
            )
        subject.site(self.site)

    def save(self, path: str | Path) -> None:
        """Write the subspace as one safetensors file."""
        about = {"format": FORMAT, "site": self.site, "origin": self.origin.to_dict()}
        write_safetensors(user_path(path), {"basis": self.basis.numpy()}, {"assay": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Subspace:
        """Read back what `save` wrote.

        Raises:
            DamagedFile: It is no such file.
        """
        from safetensors import SafetensorError, safe_open

        file = user_path(path)
        try:
            with safe_open(file, framework="pt") as opened:
                about: dict[str, Any] = json.loads((opened.metadata() or {}).get("assay", "{}"))
                if about.get("format") != FORMAT:
                    raise DamagedFile(f"{file} holds no subspace that assay wrote")
                basis = opened.get_tensor("basis")
        except (SafetensorError, OSError, ValueError) as error:
            raise DamagedFile(f"{file} is no subspace: {error}") from error
        return cls(site=about["site"], basis=basis, origin=Origin.from_dict(about["origin"]))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Interchanges:
    """Pairs of prompts, and what a causal model says the base's next token is once it has the source's variable.

    Args:
        base: Token ids `[rows, pos]`, or texts.
        source: As many of them.
        answer: The counterfactual answer's token id, one a row.
        choices: The ids among which an answer is looked for; the whole vocabulary when empty.
        positions: Where the base is changed: one token of each prompt, by a rule.
        source_positions: Where the source is read; the same rule when None.

    Raises:
        SpecError: The lengths differ, there are no rows, or an answer is not among the choices.
    """

    base: Tensor | Sequence[str]
    source: Tensor | Sequence[str]
    answer: tuple[int, ...]
    choices: tuple[int, ...] = ()
    positions: Any = "last"
    source_positions: Any = None

    def __post_init__(self) -> None:
        sizes = {"base": len(self.base), "source": len(self.source), "answer": len(self.answer)}
        if len(set(sizes.values())) > 1 or not self.answer:
            raise SpecError(f"interchanges need one of each a row, and at least one row; got {sizes}", "data")
        missing = sorted(set(self.answer) - set(self.choices)) if self.choices else []
        if missing:
            raise SpecError(f"answers {missing} are not among the choices {self.choices}", "answer")

    def __len__(self) -> int:
        return len(self.answer)

    def rows(self, keep: Sequence[int]) -> Interchanges:
        """Some of the rows."""

        def some(prompts: Tensor | Sequence[str]) -> Tensor | Sequence[str]:
            return prompts[list(keep)] if isinstance(prompts, Tensor) else tuple(prompts[i] for i in keep)

        return Interchanges(
            base=some(self.base),
            source=some(self.source),
            answer=tuple(self.answer[i] for i in keep),
            choices=self.choices,
            positions=self.positions,
            source_positions=self.source_positions,
        )

    def joined(self, other: Interchanges) -> Interchanges:
        """The rows of both, so that one subspace is fitted to several demands at once (as MDAS does).

        Raises:
            SpecError: They are of different kinds, or have other choices or positions.
        """
        alike = (self.choices, self.positions, self.source_positions) == (
            other.choices,
            other.positions,
            other.source_positions,
        )
        if not alike or isinstance(self.base, Tensor) != isinstance(other.base, Tensor):
            raise SpecError("interchanges that are joined need the same choices, positions and kind of prompt", "other")

        def both(a: Any, b: Any) -> Any:
            return torch.cat([a, b]) if isinstance(a, Tensor) else (*a, *b)

        return Interchanges(
            base=both(self.base, other.base),
            source=both(self.source, other.source),
            answer=self.answer + other.answer,
            choices=self.choices,
            positions=self.positions,
            source_positions=self.source_positions,
        )

    def read(self, subject: Subject, site: str, *, batch: int = 32) -> tuple[Tensor, Tensor]:
        """What base and source hold at the site, `[rows, d]` each; heads are refused.

        Raises:
            SpecError: A rule selects several tokens of a prompt, or the site is not `[batch, pos, features]`.
        """
        second = self.positions if self.source_positions is None else self.source_positions
        return (
            read_at(subject, self.base, site, self.positions, batch=batch),
            read_at(subject, self.source, site, second, batch=batch),
        )


@torch.no_grad()
def read_at(subject: Subject, prompts: Any, site: str, positions: Any, *, batch: int = 32) -> Float[Tensor, "rows d"]:
    """What a site holds at one token of each prompt.

    Raises:
        SpecError: The rule selects several tokens of a prompt, or the site is not `[batch, pos, features]`.
    """
    found = []
    for start in range(0, len(prompts), batch):
        run = subject.run(prompts[start : start + batch], capture=site)
        held = run[site]
        if held.ndim != 3:
            raise SpecError(f"{site} has {held.ndim} dimensions; a subspace lies in [batch, pos, features]", "site")
        columns = columns_of(run.batch, positions)
        if any(len(picked) != 1 for picked in columns) or len(columns) != len(held):
            raise SpecError(f"positions={positions!r} must select one token of each prompt", "positions")
        found.append(torch.stack([held[row, picked[0]] for row, picked in enumerate(columns)]))
    return torch.cat(found).detach()


@torch.no_grad()
def answers(
    subject: Subject, data: Interchanges, edits: Any = None, *, batch: int = 32
) -> tuple[Int[Tensor, " rows"], Float[Tensor, "rows choices"]]:
    """The answer of each base prompt, and the logits it was chosen from.

    Args:
        subject: The subject.
        data: The prompts.
        edits: Called with a list of row numbers; returns the edits for those rows.
        batch: How many prompts go through the model at once.
    """
    chosen, logits = [], []
    options = torch.tensor(data.choices) if data.choices else None
    for start in range(0, len(data), batch):
        keep = list(range(start, min(start + batch, len(data))))
        run = subject.run(data.rows(keep).base, edits=edits(keep) if edits is not None else ())
        ends = [s + n - 1 for s, n in zip(run.batch.starts, run.batch.lengths, strict=True)]
        last = run.logits[torch.arange(len(keep)), torch.tensor(ends)].float()
        if options is not None and not 0 <= int(options.min()) <= int(options.max()) < last.shape[1]:
            raise SpecError(f"choices {data.choices} are not all in the vocabulary of {last.shape[1]}", "choices")
        last = last if options is None else last[:, options.to(last.device)]
        best = last.argmax(-1).cpu()
        chosen.append(best if options is None else options[best])
        logits.append(last.cpu())
    return torch.cat(chosen), torch.cat(logits)


def interchange_accuracy(subject: Subject, subspace: Subspace, data: Interchanges, *, batch: int = 32) -> float:
    """The share of interchanges after which the model answers as the causal model does: IIA.

    Args:
        subject: The subject.
        subspace: Where the source's values are put.
        data: The interchanges, other than those the subspace was fitted on.
        batch: How many prompts go through the model at once.

    Source: Geiger et al. 2021, "Causal abstractions of neural networks", section 3.
    """
    subspace.check(subject)
    _, source = data.read(subject, subspace.site, batch=batch)
    if source.shape[1] != subspace.basis.shape[1]:
        raise SpecError(
            f"the subspace lies in {subspace.basis.shape[1]} dimensions, and {subspace.site} has {source.shape[1]}",
            "subspace",
        )

    def edits(keep: list[int]) -> list[Edit]:
        return subspace.edits(source[keep], positions=data.positions)

    chosen, _ = answers(subject, data, edits, batch=batch)
    return float((chosen == torch.tensor(data.answer)).double().mean())
