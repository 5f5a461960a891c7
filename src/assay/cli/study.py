"""Running and planning a study from the command line: arguments to a study, a study to text."""

from __future__ import annotations

import json
import sys
from typing import Any

from assay.cli.commands import MethodCommand
from assay.cli.present import show_outcome, show_plan
from assay.cli.progress import watching
from assay.studies.run import Outcome, execute
from assay.studies.study import Study


def study_of(command: MethodCommand) -> Study:
    """Return the study a command line describes.

    Raises:
        SpecError: An option has no valid value.
    """
    return Study(method=command.method, model=command.common.model, spec=command.spec(), seed=command.common.seed)


def plan(command: MethodCommand) -> int:
    """Print what the study would do and cost."""
    return plan_study(study_of(command), quiet=command.common.quiet, as_json=command.common.json)


def run(command: MethodCommand) -> int:
    """Run the study with progress on standard error, and print its findings."""
    common = command.common
    return run_study(
        study_of(command), out=common.out, cache=not common.no_cache, quiet=common.quiet, as_json=common.json
    )


def plan_study(study: Study, *, quiet: bool, as_json: bool) -> int:
    """Print what a study would do and cost."""
    with watching(f"plan {study.method}", quiet=quiet) as watcher:
        planned = study.plan(progress=watcher)
    if as_json:
        _print_json({"method": study.method, "model": study.model, "seed": study.seed, **planned.to_dict()})
    else:
        show_plan(planned)
    return 0


def run_study(study: Study, *, out: str | None, cache: bool, quiet: bool, as_json: bool) -> int:
    """Run a study with progress on standard error, and print its findings."""
    with watching(study.method, quiet=quiet) as watcher:
        outcome = execute(study, out=out, watcher=watcher, cache=cache)
    if as_json:
        _print_json(outcome_dict(outcome))
    else:
        show_outcome(outcome, quiet=quiet)
    return 0


def outcome_dict(outcome: Outcome) -> dict[str, Any]:
    """Return the result of a run as JSON values, without the charts (they are in the report)."""
    cost = outcome.cost
    return {
        "study": outcome.key,
        "cached": outcome.cached,
        "seconds": outcome.seconds,
        "summary": list(outcome.findings.summary),
        "findings": [finding.to_dict() for finding in outcome.findings],
        "warnings": list(outcome.findings.warnings),
        "artifacts": dict(outcome.findings.artifacts),
        "cost": {
            "forwards": cost.forwards,
            "backwards": cost.backwards,
            "seconds": cost.seconds,
            "peak_bytes": cost.peak_bytes,
        },
        "out": None if outcome.out is None else str(outcome.out),
        "files": list(outcome.files),
    }


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
