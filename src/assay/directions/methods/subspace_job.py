"""The `subspace` study: what is fitted, and what is measured on other groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from assay.base.errors import NothingFound, SpecError
from assay.base.findings import Findings
from assay.base.hashing import digest
from assay.base.method import Context, Progress, StepSpec
from assay.base.rng import numpy_stream
from assay.base.snippets import snippet
from assay.directions.methods.common import RATE, mean_tokens
from assay.directions.methods.rows import text_rows
from assay.directions.methods.subspace import SubspaceSpec

NEEDED = ("base", "source", "answer", "original", "group")
CAUSE = "cause"
"""The attribute of rows whose answer changes."""


def planned(card: Any, spec: SubspaceSpec, seed: int) -> list[StepSpec]:
    """List the steps of a study from its model's card, without loading weights."""
    rows = _read(spec)
    site = spec.site or f"blocks.{card.n_layers // 2}.resid_post"
    return _steps(rows, spec, site, seed, mean_tokens(card, [row["base"] for row in rows]), card.parameters)


def _read(spec: SubspaceSpec) -> list[dict[str, str]]:
    rows = text_rows(spec.data, NEEDED, ("attribute",), field="data")
    for number, row in enumerate(rows, 1):
        if not changes(row) and not row.get("attribute"):
            raise SpecError(
                f"data: row {number} of {spec.data} must not change (its answer is the original), and lacks an "
                "attribute: say what it is about",
                "data",
            )
    if not any(changes(row) for row in rows):
        raise SpecError(f"data: in no row of {spec.data} does the answer differ from the original", "data")
    groups = sorted({row["group"] for row in rows if changes(row)})
    if len(groups) < 4:
        raise SpecError(f"data: {spec.data} has {len(groups)} groups; 4 or more can be split in two", "data")
    return rows


def changes(row: Mapping[str, str]) -> bool:
    """Whether a row's answer is another than the base's own."""
    return row["answer"] != row["original"]


def _steps(
    rows: list[dict[str, str]], spec: SubspaceSpec, site: str, seed: int, length: int = 1, parameters: int = 0
) -> list[StepSpec]:
    fitted = ("position", "kind", "k", "epochs", "lr", "held_out")
    inputs = {"rows": digest(rows), "site": site, "seed": seed, **{name: getattr(spec, name) for name in fitted}}
    held = max(1, round(len(rows) * spec.held_out))
    fit = spec.epochs * (len(rows) - held)

    def step(name: str, more: dict[str, Any], n: int, back: int) -> StepSpec:
        tokens = (n + 2 * back) * length
        seconds = tokens * parameters / RATE
        return StepSpec(name=name, inputs=inputs | more, forwards=n, backwards=back, tokens=tokens, seconds=seconds)

    drawn = {"random": spec.random, "permutations": spec.permutations}
    return [
        step("fit", {}, fit + 3 * len(rows), fit),
        step("scores", drawn, (2 * spec.random + 16) * held, 0),
        step("refits", {"refits": spec.refits}, spec.refits * (fit + 2 * len(rows)), spec.refits * fit),
    ]


def run(subject: Any, spec: SubspaceSpec, ctx: Context) -> Findings:
    """Measure, and say what it means."""
    from assay.directions.methods.subspace_report import Report

    rows = _read(spec)
    site = spec.site or f"blocks.{subject.n_blocks // 2}.resid_post"
    measured = _Measured(subject, rows, spec, site, ctx.seed)
    first, second, third = _steps(rows, spec, site, ctx.seed)
    fit = ctx.step(first, measured.fit)
    measured.found = fit
    scores = ctx.step(second, measured.scores)
    refits = ctx.step(third, measured.refits)
    ctx.artifact("subspace", arrays={"basis": np.asarray(fit["basis"]), "pca": np.asarray(fit["pca"])})
    python = snippet(subject.reference, "subspace", spec, ctx.seed)
    report = Report(
        rows=rows, spec=spec, site=site, fit=fit, scores=scores, refits=refits["accuracy"], python=python, ctx=ctx
    )
    return Findings(
        findings=report.findings(), views=report.views(), summary=report.summary(), warnings=report.warnings()
    )


class _Measured:
    """What is measured.

    Args:
        subject: The subject.
        rows: The rows, as they were read.
        spec: The spec.
        site: Where.
        seed: The study's seed.
    """

    def __init__(self, subject: Any, rows: list[dict[str, str]], spec: SubspaceSpec, site: str, seed: int) -> None:
        self.subject, self.rows, self.spec, self.site, self.seed = subject, rows, spec, site, seed
        self.found: Mapping[str, Any] = {}

    @cached_property
    def ids(self) -> tuple[list[int], list[int]]:
        """The first token of each row's answer and original, after its base."""
        found = tuple(first_tokens(self.subject, self.rows, name) for name in ("answer", "original"))
        for row, answer, original in zip(self.rows, *found, strict=True):
            if changes(row) and answer == original:
                raise SpecError(
                    f"{row['answer']!r} and {row['original']!r} begin with the same token after {row['base']!r}: leave "
                    "that row out",
                    "data",
                )
        return found[0], found[1]

    def interchanges(self, keep: Sequence[int], answer: Sequence[int] | None = None) -> Any:
        """Some rows, as the functions take them."""
        from assay.directions.subspaces import Interchanges

        own = [self.ids[0][i] for i in keep] if answer is None else answer
        return Interchanges(
            base=tuple(self.rows[i]["base"] for i in keep),
            source=tuple(self.rows[i]["source"] for i in keep),
            answer=tuple(own),
            choices=tuple(sorted({*self.ids[0], *self.ids[1]})),
            positions=self.spec.position,
        )

    def split(self) -> tuple[list[int], list[int]]:
        """Rows to fit on and rows to score, of those that the model answers rightly; no group is on both sides."""
        from assay.directions.subspaces.interchange import answers

        everything = list(range(len(self.rows)))
        said, _ = answers(self.subject, self.interchanges(everything))
        known = [i for i in everything if int(said[i]) == self.ids[1][i]]
        groups = sorted({self.rows[i]["group"] for i in known if changes(self.rows[i])})
        if len(groups) < 4:
            raise NothingFound(
                f"{self.subject.name} answers {len(known)} of {len(self.rows)} bases as the file's originals say, in "
                f"{len(groups)} groups; 4 or more can be split: give prompts whose answers it knows"
            )
        order = numpy_stream(self.seed, "subspace", "split").permutation(len(groups)).tolist()
        n = min(max(2, round(self.spec.held_out * len(groups))), len(groups) - 2)
        held = {groups[i] for i in order[:n]}
        fitted = set(groups) - held
        return (
            [i for i in known if self.rows[i]["group"] in fitted],
            [i for i in known if self.rows[i]["group"] in held],
        )

    def aligned(self, data: Any, seed: int) -> Any:
        """DAS, or boundless DAS."""
        from assay.directions.subspaces import boundless_das, das

        said: dict[str, Any] = {"epochs": self.spec.epochs, "lr": self.spec.lr, "seed": seed}
        if self.spec.kind == "das":
            return das(self.subject, self.site, data, self.spec.k, **said)
        return boundless_das(self.subject, self.site, data, **said)

    def fit(self, progress: Progress) -> Mapping[str, Any]:
        """The subspace, and the principal components of the same rows."""
        from assay.directions.subspaces import interchange_accuracy

        progress(0, 2, "asking the bases")
        train, test = self.split()
        data = self.interchanges(train)
        progress(1, 2, f"fitting on {len(train)} rows")
        fit = self.aligned(data, self.seed)
        base, source = data.read(self.subject, self.site)
        held = np.concatenate([base.float().cpu().numpy(), source.float().cpu().numpy()]).astype(np.float64)
        rows = np.linalg.svd(held - held.mean(0), full_matrices=False)[2]
        gaps = (source - base).float().cpu().numpy()[[changes(self.rows[i]) for i in train]]
        basis = fit.subspace.basis.numpy()
        leading = np.linalg.svd(gaps @ basis.T, full_matrices=False)[2][0] @ basis
        progress(2, 2, "fitted")
        return {
            "basis": basis,
            "pca": rows[: len(basis)].astype(np.float32),
            "leading": leading.astype(np.float32),
            "losses": list(fit.losses),
            "train": train,
            "test": test,
            "own": interchange_accuracy(self.subject, fit.subspace, data),
        }

    def space(self, vectors: Any) -> Any:
        """The subspace that arrays span at the site."""
        import torch

        from assay.directions.subspaces import Subspace

        return Subspace.spanned_by(torch.tensor(np.asarray(vectors), dtype=torch.float32), self.site)

    def held(self, keep: Sequence[int]) -> tuple[Any, Any]:
        """Some rows, and what their sources hold at the site."""
        data = self.interchanges(keep)
        return data, data.read(self.subject, self.site)[1]

    def said(self, space: Any, data: Any, source: Any) -> np.ndarray:
        """What the model answers to rows once a subspace is exchanged."""
        from assay.directions.subspaces.interchange import answers

        found, _ = answers(self.subject, data, lambda rows: space.edits(source[rows], positions=data.positions))
        return np.asarray(found.tolist())

    def scores(self, progress: Progress) -> Mapping[str, Any]:
        """What the held-out rows are answered after each exchange, and the illusion test."""
        import torch

        from assay.directions.subspaces import Subspace

        test = [int(i) for i in self.found["test"]]
        basis = np.asarray(self.found["basis"])
        k, d = basis.shape
        right = np.asarray([self.ids[0][i] for i in test])
        held = self.held(test)
        said = self.said(self.space(basis), *held)
        hits: dict[str, Any] = {"fitted": (said == right).astype(float)}
        progress(1, self.spec.random + 4, "exchanging the subspace")
        hits["pca"] = (self.said(self.space(self.found["pca"]), *held) == right).astype(float)
        whole = Subspace(site=self.site, basis=torch.eye(d))
        hits["whole"] = (self.said(whole, *held) == right).astype(float)
        random = []
        for draw in range(self.spec.random):
            other = Subspace.random(self.site, k, d, seed=self.seed * 1000 + draw)
            random.append(self.said(other, *held) == right)
            progress(draw + 2, self.spec.random + 4, "random subspaces")
        rng = numpy_stream(self.seed, "subspace", "permuted answers")
        cause = np.asarray([changes(self.rows[i]) for i in test])
        permuted = [float((said[cause] == rng.permutation(right[cause])).mean()) for _ in range(self.spec.permutations)]
        progress(self.spec.random + 3, self.spec.random + 4, "the illusion test")
        return {
            **hits,
            "random": np.asarray(random).astype(float),
            "permuted": permuted,
            "illusion": self.illusion([i for i in test if changes(self.rows[i])]),
        }

    def illusion(self, keep: list[int]) -> dict[str, Any]:
        """The illusion test of the leading direction, and the effects of random ones."""
        import torch

        from assay.directions.subspaces import Subspace, illusion_test
        from assay.directions.subspaces.interchange import answers

        data, leading = self.interchanges(keep), self.space(np.asarray(self.found["leading"])[None])
        original = [self.ids[1][i] for i in keep]
        d = leading.basis.shape[1]
        narrow = self.subject.site(self.site).point == "mlp.post"
        # Whatever writes to the residual stream is read by all that comes later: there is no null space to speak of.
        found = illusion_test(self.subject, leading, data, tuple(original), reads=None if narrow else torch.eye(d))
        columns = {token: column for column, token in enumerate(data.choices)}
        at = np.arange(len(keep))
        to, own = (np.asarray([columns[token] for token in ids]) for ids in (data.answer, original))
        _, source = data.read(self.subject, self.site)

        def apart(space: Any) -> np.ndarray:
            edits = None if space is None else lambda rows: space.edits(source[rows], positions=data.positions)
            logits = answers(self.subject, data, edits)[1].double().numpy()
            difference: np.ndarray = logits[at, to] - logits[at, own]
            return difference

        before = apart(None)
        rise = apart(leading) - before
        random = [
            float((apart(Subspace.random(self.site, 1, d, seed=self.seed * 1000 + draw)) - before).mean())
            for draw in range(self.spec.random)
        ]
        names = ("v", "v_row", "v_null", "full", "row_share", "null_share")
        numbers = {name: float(getattr(found, name)) for name in names}
        return {**numbers, "reasons": list(found.reasons), "split": narrow, "rises": rise.tolist(), "random": random}

    def refits(self, progress: Progress) -> Mapping[str, Any]:
        """The accuracy of subspaces fitted to permuted answers."""
        train, test = ([int(i) for i in self.found[name]] for name in ("train", "test"))
        cause = [i for i in test if changes(self.rows[i])]
        right = np.asarray([self.ids[0][i] for i in cause])
        held = self.held(cause) if self.spec.refits else ()
        accuracy = []
        for draw in range(self.spec.refits):
            order = numpy_stream(self.seed, "subspace", "refit", draw).permutation(len(train))
            fit = self.aligned(self.interchanges(train, [self.ids[0][train[i]] for i in order]), self.seed)
            accuracy.append(float((self.said(fit.subspace, *held) == right).mean()))
            progress(draw + 1, self.spec.refits, "fitting to permuted answers")
        return {"accuracy": accuracy}


def first_tokens(subject: Any, rows: Sequence[Mapping[str, str]], name: str) -> list[int]:
    """The first token that a text adds to its row's base.

    Raises:
        SpecError: It adds none, or changes the tokens of the base.
    """
    alone = subject.batch([row["base"] for row in rows])
    longer = subject.batch([row["base"] + row[name] for row in rows])
    found = []
    for i, row in enumerate(rows):
        before, after = list(alone.prompt(i)), list(longer.prompt(i))
        if len(after) <= len(before) or after[: len(before)] != before:
            raise SpecError(
                f"{row[name]!r} does not follow {row['base']!r} as tokens of its own: end prompts before a space, and "
                f"begin the {name} with it",
                "data",
            )
        found.append(int(after[len(before)]))
    return found
