"""The whole job on a tiny Llama, run once for all tests of its result."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import assay
from assay import Study, Subject
from assay.base.method import Plan
from assay.studies.run import Outcome, execute
from assay.subjects.model import weights_hash

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"
ASKED = {"prompt": CLEAN, "answer": " Mary", "foil": " John", "corrupt": CORRUPT}
QUICK = {"top": 4, "random_sets": 6, "untrained": 1}
"""Few draws: enough for every chart and claim to be made, too few for most verdicts."""


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[str]]:
    """The names of the module's parts that are called while this lasts, whoever calls them."""
    names = {part: name or "the module" for name, part in module.named_modules()}
    seen: list[str] = []
    handle = register_module_forward_pre_hook(
        lambda part, args: seen.append(names[part]) if part in names else None  # type: ignore[func-returns-value]
    )
    try:
        yield seen
    finally:
        handle.remove()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One study of one subject that was run: before, its outcome, and after."""

    study: Study
    subject: Subject
    home: Path
    out: Path
    before: Plan
    outcome: Outcome
    weights: str

    @property
    def findings(self) -> Any:
        return self.outcome.findings

    def finding(self, *tags: str) -> Any:
        """The one finding with these tags."""
        (found,) = (finding for finding in self.findings if set(tags) <= set(finding.tags))
        return found

    def view(self, name: str) -> Any:
        """The view with this id."""
        return next(view for view in self.findings.views if view.id == name)

    def again(self, **changes: Any) -> tuple[Outcome, list[str]]:
        """Run it again, changed if so asked: its outcome and the parts of the module that were called."""
        spec = self.study.spec.model_dump() | changes
        with pytest.MonkeyPatch.context() as patch, calls_of(self.subject.module) as calls:
            patch.setenv("ASSAY_HOME", str(self.home))
            return execute(Study(method="explain", spec=spec), subject=self.subject), calls


@pytest.fixture(scope="session")
def subject(tiny_module: Callable[..., Any], tiny_tokenizer: Any) -> Subject:
    """A tiny Llama for which the corruption matters: 0.15 logits."""
    return assay.load(tiny_module("llama"), tokenizer=tiny_tokenizer)


@pytest.fixture(scope="session")
def run_job(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """Run a study in a home and an output folder of its own."""

    def run(subject: Subject, **spec: Any) -> Job:
        home, out = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("out") / "here"
        study = Study(method="explain", spec=ASKED | QUICK | spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ASSAY_HOME", str(home))
            weights, before = weights_hash(subject.module), study.plan(subject=subject)
            outcome = execute(study, subject=subject, out=out)
        return Job(
            study=study, subject=subject, home=home, out=out, before=before, outcome=outcome, weights=weights
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def job(run_job: Callable[..., Job], subject: Subject) -> Job:
    """The question with both prompts and both words."""
    return run_job(subject, random_sets=30)


@pytest.fixture(scope="session")
def noised(run_job: Callable[..., Job], subject: Subject) -> Job:
    """The bare prompt: no corrupt prompt, no answer, no foil."""
    return run_job(subject, prompt="When John went to", corrupt=None, answer=None, foil=None, draws=2, untrained=2)


@pytest.fixture(scope="session")
def varied(run_job: Callable[..., Job], subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The job with sixteen variations."""
    lines = []
    for place in ("the store", "the capital of France", "Paris", "a store"):
        for thing in ("a drink", "milk"):
            for answer, foil in ((" Mary", " John"), (" John", " Mary")):
                prompts = [f"When Mary and John went to {place},{who} gave {thing} to" for who in (foil, answer)]
                lines.append({"clean": prompts[0], "corrupt": prompts[1], "answer": answer, "foil": foil})
    path = tmp_path_factory.mktemp("vary") / "variations.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return run_job(subject, prompt="When Mary and John went to", corrupt="When Mary and Mary went to", vary=path)


@pytest.fixture(scope="session")
def ids(tiny_tokenizer: Any) -> Callable[[str], torch.Tensor]:
    """Token ids of a text, `[1, pos]`."""
    return lambda text: torch.tensor([tiny_tokenizer(text)["input_ids"]])
