"""The interpretability illusion: a direction whose patch works though nothing reads it from the data.

    v = v_row + v_null

v_row lies in the row space of what reads the site next (`W_out` for MLP activations), v_null in its null space. A patch
along v can carry the concept's variation in v_null, which correlates with it and does nothing, over into v_row, which
does something and does not vary. Then v works, v_null alone does nothing, and the whole component, exchanged, does not
do what v does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from assay.activations.edits import Edit
from assay.activations.subject import Subject
from assay.base.errors import NumericalError, SpecError
from assay.directions.subspaces.interchange import Interchanges, Subspace, answers
from assay.directions.vectors import Direction
from assay.subjects.block_points import linear_matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Illusion:
    """The effects of patching a direction, its two parts, and the whole site; in logits towards the source's answer.

    Args:
        v: Effect of the direction.
        v_row: Effect of its part that is read next, as a direction of its own; 0 where there is none.
        v_null: Effect of its part that is not.
        full: Effect of the whole site.
        row_share: `|v_row| / |v|`.
        null_share: `|v_null| / |v|`.
        ratio: How many times larger than that of the whole an effect has to be to be flagged.
        n: Interchanges.
    """

    v: float
    v_row: float
    v_null: float
    full: float
    row_share: float
    null_share: float
    ratio: float
    n: int

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is flagged."""
        found = []
        if self.null_share > 0.5:
            found.append(f"{self.null_share:.2f} of the direction's length is not read by what comes next")
        if abs(self.v) > self.ratio * abs(self.full):
            found.append(f"its patch does {self.v:.3g}, that of the whole site {self.full:.3g}")
        return tuple(found)

    @property
    def flagged(self) -> bool:
        """Whether the direction may be an illusion."""
        return bool(self.reasons)


def next_read(subject: Subject, site: str) -> Float[Tensor, "d_out d"]:
    """What reads a site next, as a matrix: `W_out` of MLP activations, `W_O` of attention's.

    Raises:
        SpecError: The site is read by several parts, or not by one matrix; give `reads` yourself.
    """
    found = subject.site(site)
    if found.block is not None and found.stack == subject.parts.name and found.point == "mlp.post":
        return linear_matrix(subject.point(found).module).detach().T
    raise SpecError(
        f"what reads {site} next is not one matrix that assay knows of; it is for blocks.i.mlp.post. Give reads= "
        "[d_out, d], the rows that read it",
        "reads",
    )


def split_direction(
    v: Float[Tensor, " d"], reads: Float[Tensor, "d_out d"], *, cut: float = 1e-6
) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Split a vector into its part in the row space of a matrix and the rest.

    Args:
        v: The vector.
        reads: The matrix.
        cut: Singular values below this share of the largest count as zero.

    Raises:
        SpecError: The widths differ.

    Example:
        >>> row, null = split_direction(torch.tensor([3.0, 4.0]), torch.tensor([[1.0, 0.0]]))
        >>> row.tolist(), null.tolist()
        ([3.0, 0.0], [0.0, 4.0])
    """
    wide = v.detach().to("cpu", torch.float64)
    matrix = reads.detach().to("cpu", torch.float64)
    if matrix.ndim != 2 or matrix.shape[1] != len(wide):
        raise SpecError(f"the direction has {len(wide)} numbers, reads has the shape {tuple(matrix.shape)}", "reads")
    _, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    basis = right[sizes > cut * sizes[0]]
    row = (wide @ basis.T) @ basis
    return row.to(v.dtype), (wide - row).to(v.dtype)


def illusion_test(
    subject: Subject,
    direction: Direction | Subspace,
    data: Interchanges,
    original: tuple[int, ...],
    *,
    reads: Float[Tensor, "d_out d"] | None = None,
    ratio: float = 2.0,
) -> Illusion:
    """Patch a direction, its read part, its unread part and the whole site, from each source into its base.

    Args:
        subject: The subject.
        direction: The direction, or a subspace of one dimension.
        data: Interchanges; `answer` is the source's.
        original: The base's own answer, one a row. The effect is the rise of `logit[answer] - logit[original]`.
        reads: The matrix that reads the site next, `[d_out, d]`; known for `mlp.post`.
        ratio: Flag an effect that is this many times that of the whole site.

    Raises:
        SpecError: The widths do not fit, or the subspace has several dimensions.
        NumericalError: The direction is zero.

    Source: Makelov, Lange and Nanda 2023, "Is this the subspace you are looking for?", sections 3 and 4.
    """
    vectors = direction.basis if isinstance(direction, Subspace) else direction.vector[None]
    if len(vectors) != 1:
        raise SpecError(f"the illusion test is for one direction, and the subspace has {len(vectors)}", "direction")
    if len(original) != len(data):
        raise SpecError(f"there are {len(original)} original answers for {len(data)} interchanges", "original")
    v = vectors[0].double()
    size = float(v.norm())
    if not size > 0:
        raise NumericalError("the direction is zero")
    row, null = split_direction(v, next_read(subject, direction.site) if reads is None else reads)
    _, source = data.read(subject, direction.site)
    everything = Interchanges(
        base=data.base, source=data.source, answer=data.answer, positions=data.positions,
        source_positions=data.source_positions,
    )  # fmt: skip
    answer, own = torch.tensor(data.answer), torch.tensor(original)
    at = torch.arange(len(data))

    def difference(subspace: Subspace | None) -> Tensor:
        def edits(keep: list[int]) -> list[Edit]:
            return [] if subspace is None else subspace.edits(source[keep], positions=data.positions)

        _, logits = answers(subject, everything, edits)
        return (logits[at, answer] - logits[at, own]).double()

    before = difference(None)

    def effect(part: Tensor) -> float:
        if float(part.norm()) < 1e-6 * size:
            return 0.0
        return float((difference(Subspace.spanned_by(part[None], direction.site)) - before).mean())

    whole = Subspace(site=direction.site, basis=torch.eye(len(v)))
    return Illusion(
        v=effect(v),
        v_row=effect(row),
        v_null=effect(null),
        full=float((difference(whole) - before).mean()),
        row_share=float(row.norm()) / size,
        null_share=float(null.norm()) / size,
        ratio=ratio,
        n=len(data),
    )
