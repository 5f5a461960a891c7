"""The `edit-fact` study: what is measured, and held against what."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from assay.base.artifacts import user_path
from assay.base.errors import SpecError
from assay.base.findings import Findings
from assay.base.hashing import digest
from assay.base.method import Context, Progress, StepSpec
from assay.base.rng import numpy_stream
from assay.base.snippets import snippet
from assay.directions.methods.common import RATE, mean_tokens
from assay.directions.methods.edit_fact import EditFactSpec
from assay.directions.methods.rows import text_rows

LISTS = ("paraphrases", "neighbours")
NEEDED = ("prompt", "subject", "target", "original")
ARMS = {
    "random keys": "the same value written at another key: drawn from the second moment of the MLP's inputs, rescaled",
    "random values": "another value written at the same key: a random direction, of the same norm",
    "other blocks": "the same change of the MLP's output matrix, made in each other block",
}


def planned(card: Any, spec: EditFactSpec, seed: int) -> list[StepSpec]:
    """List the steps of a study from its model's card, without loading weights."""
    rows, texts, unrelated = _read(spec)
    block = _block(spec, card.n_layers)
    lengths = (mean_tokens(card, [row["prompt"] for row in rows]) + 2, mean_tokens(card, texts))
    return _steps(rows, texts, unrelated, spec, block, seed, card.n_layers, lengths, card.parameters)


def _read(spec: EditFactSpec) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    texts, unrelated = (
        [row["text"] for row in text_rows(path, ("text",), field=field)]
        for path, field in ((spec.text, "text"), (spec.unrelated, "unrelated"))
    )
    return fact_rows(spec.data), texts, unrelated[: spec.lines]


def fact_rows(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines of facts.

    Raises:
        SpecError: The file cannot be read, a line is no fact, a fact stands there twice, or there is only one.
    """
    file = user_path(path)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"data: {file} cannot be read: {error}", "data") from error
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.append(_fact_row(line, f"data: {file}, line {number}"))
    asked = [(row["prompt"], row["subject"]) for row in found]
    twice = next((fact for fact in asked if asked.count(fact) > 1), None)
    if twice is not None:
        raise SpecError(f"data: {file} asks {twice[0]!r} of {twice[1]!r} twice; give each fact once", "data")
    if len(found) < 2:
        raise SpecError(f"data: {file} has {len(found)} facts; an interval over facts needs 2, and says more with 10")
    return found


def _fact_row(line: str, where: str) -> dict[str, Any]:
    wanted = 'give {"prompt": "The capital of {} is", "subject": ..., "target": ..., "original": ...}'
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SpecError(f"{where} is not JSON ({error}); {wanted}", "data") from error
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) and row[name].strip() for name in NEEDED):
        raise SpecError(f"{where} lacks a text; {wanted}", "data")
    unknown = sorted(set(row) - {*NEEDED, *LISTS, "essence"})
    if unknown:
        raise SpecError(f"{where} has {', '.join(unknown)}, which means nothing here; {wanted}", "data")
    for name in LISTS:
        given = row.get(name, [])
        if not isinstance(given, list) or not all(isinstance(text, str) and text.strip() for text in given):
            raise SpecError(f"{where}: {name} is {given!r}; give a list of texts", "data")
    for text in (row["prompt"], row.get("essence", "{}"), *row.get("paraphrases", [])):
        if not isinstance(text, str) or text.count("{}") != 1:
            raise SpecError(f"{where}: {text!r} must have one {{}} where the subject goes", "data")
    if row["target"].strip() == row["original"].strip():
        raise SpecError(f"{where}: the target {row['target']!r} is the original; give another object", "data")
    return row


def _block(spec: EditFactSpec, blocks: int) -> int:
    if spec.block is None:
        return blocks // 3
    if spec.block >= blocks:
        raise SpecError(f"block is {spec.block}; the model has the blocks 0 to {blocks - 1}", "block")
    return spec.block


def _others(block: int, blocks: int, spec: EditFactSpec) -> list[int]:
    """Other blocks, as many as there are random draws, spread evenly."""
    found = [other for other in range(blocks) if other != block]
    n = min(len(found), spec.random)
    return [found[i * len(found) // n] for i in range(n)]


def _steps(
    rows: Sequence[dict[str, Any]],
    texts: Sequence[str],
    unrelated: Sequence[str],
    spec: EditFactSpec,
    block: int,
    seed: int,
    blocks: int,
    lengths: tuple[int, int] = (1, 1),
    parameters: int = 0,
) -> list[StepSpec]:
    searched = {name: getattr(spec, name) for name in ("steps", "lr", "kl", "decay", "reach", "ridge")}
    covariance = {"text": digest(texts), "block": block}
    edits = covariance | searched | {"facts": digest(rows), "unrelated": digest(unrelated)}
    asked = sum(2 * (1 + sum(len(row.get(name, ())) for name in LISTS)) for row in rows)
    arms = 2 * spec.random + len(_others(block, blocks, spec))

    def step(name: str, inputs: dict[str, Any], n: int, back: int, tokens: int) -> StepSpec:
        seconds = tokens * parameters / RATE
        return StepSpec(name=name, inputs=inputs, forwards=n, backwards=back, tokens=tokens, seconds=seconds)

    search = 8 * spec.steps * len(rows)
    once = asked + len(rows) * len(unrelated)
    tokens = asked * lengths[0] + len(rows) * len(unrelated) * lengths[1]
    return [
        step("covariance", covariance, len(texts), 0, len(texts) * lengths[1]),
        step("edits", edits, search + 4 * once, search, 3 * search * (lengths[0] + 3) + 4 * tokens),
        step("controls", edits | {"random": spec.random, "seed": seed}, arms * once, 0, arms * tokens),
    ]


def run(subject: Any, spec: EditFactSpec, ctx: Context) -> Findings:
    """Measure, and say what it means."""
    from assay.directions.methods.edit_fact_report import Report

    rows, texts, unrelated = _read(spec)
    block = _block(spec, subject.n_blocks)
    measured = _Measured(subject, rows, texts, unrelated, spec, block, ctx.seed)
    first, second, third = _steps(rows, texts, unrelated, spec, block, ctx.seed, subject.n_blocks)
    measured.covariance = np.asarray(ctx.step(first, measured.moment)["covariance"])
    edits = ctx.step(second, measured.edits)
    controls = ctx.step(third, lambda progress: measured.controls(edits, progress))
    ctx.artifact("edits", arrays={name: np.asarray(edits[name]) for name in ("write", "read", "key", "value")})
    python = snippet(subject.reference, "edit-fact", spec, ctx.seed)
    report = Report(rows=rows, spec=spec, block=block, edits=edits, controls=controls, python=python, ctx=ctx)
    return Findings(
        findings=report.findings(), views=report.views(), summary=report.summary(), warnings=report.warnings()
    )


class _Measured:
    """What is measured. The user's model is read, never written to: changes are made on one copy.

    Args:
        subject: The subject.
        rows: The facts, as they were read.
        texts: Ordinary text.
        unrelated: Text that must go on as before.
        spec: The spec.
        block: Whose MLP.
        seed: The study's seed.
    """

    def __init__(
        self,
        subject: Any,
        rows: list[dict[str, Any]],
        texts: list[str],
        unrelated: list[str],
        spec: EditFactSpec,
        block: int,
        seed: int,
    ) -> None:
        from assay.directions.editing import facts

        self.subject, self.texts, self.unrelated = subject, texts, unrelated
        self.spec, self.block, self.seed = spec, block, seed
        self.facts = facts(rows)
        self.covariance: np.ndarray = np.zeros((0, 0))

    def moment(self, progress: Progress) -> Mapping[str, Any]:
        """The second moment of the MLP's inputs, and how many tokens it is of."""
        from assay.directions.editing import key_covariance

        told = lambda done, total: progress(done, total, "reading the MLP's inputs")  # noqa: E731
        found = key_covariance(self.subject, self.texts, self.block, progress=told)
        return {"covariance": found.numpy()}

    @cached_property
    def before(self) -> tuple[list[np.ndarray], Any]:
        """The log odds of each fact's prompts, and the next tokens of unrelated text, in the model as it is."""
        return [self.odds(self.subject, fact) for fact in self.facts], self.ahead(self.subject)

    def odds(self, subject: Any, fact: Any) -> np.ndarray:
        """The log odds of the new object over the true one: the prompt, then paraphrases, then neighbours."""
        from assay.directions.editing import continuation

        prompts = [fact.asked(text) for text in (fact.prompt, *fact.paraphrases)] + list(fact.neighbours)
        new, true = (continuation(subject, prompts, text) for text in (fact.target, fact.original))
        found: np.ndarray = np.asarray(new) - np.asarray(true)
        return found

    def ahead(self, subject: Any) -> list[Any]:
        """The log-probabilities of the next tokens of unrelated text, `[pos, vocabulary]` a text."""
        import torch

        with torch.no_grad():
            run = subject.run(self.unrelated)
        logs = run.logits.float().log_softmax(-1)
        return [
            logs[row, s : s + n] for row, (s, n) in enumerate(zip(run.batch.starts, run.batch.lengths, strict=True))
        ]

    def moved(self, subject: Any, which: int) -> tuple[np.ndarray, float]:
        """What a changed model gives: the rise of the log odds of a fact's prompts, and the KL on unrelated text."""
        odds, ahead = self.before
        total, n = 0.0, 0
        for old, new in zip(ahead, self.ahead(subject), strict=True):
            total += float((old.exp() * (old - new)).sum())
            n += len(old)
        return self.odds(subject, self.facts[which]) - odds[which], total / n

    def edits(self, progress: Progress) -> Mapping[str, Any]:
        """ROME of each fact, as the two factors of its change, and what it moved."""
        import torch

        from assay.directions.editing import rome

        spec = self.spec
        covariance = torch.tensor(self.covariance)
        searched = {name: getattr(spec, name) for name in ("steps", "lr", "kl", "decay", "reach", "ridge")}
        factors: dict[str, list[np.ndarray]] = {name: [] for name in ("write", "read", "key", "value")}
        rises, costs, scores, losses = [], [], [], []
        for i, fact in enumerate(self.facts):
            progress(i, len(self.facts), f"rewriting {fact.subject}")
            found = rome(self.subject, fact, self.block, covariance, **searched)
            change, key = found.change.double(), found.key.double()
            write = change @ key  # the change is write read', with read' key = 1
            read = change.T @ write / (write @ write)
            for name, part in zip(factors, (write, read, key, found.value), strict=True):
                factors[name].append(part.float().numpy())
            rise, cost = self.moved(found.subject, i)
            rises.append(rise.tolist())
            costs.append(cost)
            scores.append({name: value for name, value in asdict(found.score).items() if name != "drift"})
            losses.append(list(found.losses))
        progress(len(self.facts), len(self.facts), "facts rewritten")
        arrays = {name: np.stack(parts) for name, parts in factors.items()}
        return {**arrays, "rises": rises, "costs": costs, "scores": scores, "losses": losses}

    def draws(self, edits: Mapping[str, Any], which: int) -> dict[str, list[tuple[np.ndarray, np.ndarray, int]]]:
        """The controls of one fact: what is written, what reads it, and in which block."""
        write, read, key = (np.asarray(edits[name][which], np.float64) for name in ("write", "read", "key"))
        covariance = np.asarray(self.covariance, np.float64)
        covariance = covariance + self.spec.ridge * float(np.diag(covariance).mean()) * np.eye(len(covariance))
        values, vectors = np.linalg.eigh(covariance)
        values = values.clip(min=0.0)
        found: dict[str, list[tuple[np.ndarray, np.ndarray, int]]] = {name: [] for name in ARMS}
        for draw in range(self.spec.random):
            rng = numpy_stream(self.seed, "edit-fact", which, draw)
            other = vectors @ (np.sqrt(values) * rng.standard_normal(len(values)))
            other *= np.linalg.norm(key) / np.linalg.norm(other)
            solved = np.linalg.solve(covariance, other)
            found["random keys"].append((write, solved / (other @ solved), self.block))
            value = rng.standard_normal(len(write))
            found["random values"].append((value * np.linalg.norm(write) / np.linalg.norm(value), read, self.block))
        found["other blocks"] = [
            (write, read, block) for block in _others(self.block, self.subject.n_blocks, self.spec)
        ]
        return found

    def controls(self, edits: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
        """What the same changes with other keys, other values and in other blocks move."""
        changed = _Copy(self.subject)
        found: dict[str, Any] = {f"{name} {what}": [] for name in ARMS for what in ("rises", "costs")}
        for which, fact in enumerate(self.facts):
            for name, draws in self.draws(edits, which).items():
                progress(which, len(self.facts), f"{name} for {fact.subject}")
                rows = []
                for write, read, block in draws:
                    with changed.by(write, read, block) as subject:
                        rows.append(self.moved(subject, which))
                found[f"{name} rises"].append([rise.tolist() for rise, _ in rows])
                found[f"{name} costs"].append([cost for _, cost in rows])
        return found


class _Copy:
    """One copy of a model whose MLPs are changed by a rank-one matrix and put back, bit for bit."""

    def __init__(self, subject: Any) -> None:
        import copy

        from assay.activations.subject import load

        self.subject = load(copy.deepcopy(subject.module), tokenizer=subject.tokenizer)

    def by(self, write: np.ndarray, read: np.ndarray, block: int) -> Any:
        """The copy with a change in a block's MLP, within `with`."""
        import contextlib

        import torch

        module: Any = self.subject.point(self.subject.site(f"blocks.{block}.mlp.post")).module
        weight = module.weight
        change = torch.outer(torch.tensor(write), torch.tensor(read))
        change = change.T if type(module).__name__ == "Conv1D" else change

        @contextlib.contextmanager
        def held() -> Any:
            kept = weight.detach().clone()
            try:
                with torch.no_grad():
                    weight.add_(change.to(weight))
                yield self.subject
            finally:
                with torch.no_grad():
                    weight.copy_(kept)

        return held()
