"""`assay check`: the controls of a saved result, drawn again."""

from __future__ import annotations

import json
import sys

from rich.table import Table
from rich.text import Text

from assay.cli.present import VERDICT_STYLES, number_text, output
from assay.cli.progress import watching
from assay.studies.recheck import recheck


def check(path: str, *, seed: int | None, model: str, as_json: bool, quiet: bool) -> int:
    """Print each finding's verdict then and now; the exit code is 1 when one has changed.

    Args:
        path: A result's folder or its findings.jsonl.
        seed: Where the random streams begin.
        model: How to load the model, when it lies elsewhere.
        as_json: Print JSON.
        quiet: Show no progress.
    """
    with watching("check", quiet=quiet) as watcher:
        found = recheck(path, seed=seed, model=model, progress=watcher)
    changed = sum(not pair.holds for pair in found)
    if as_json:
        text = json.dumps([pair.to_dict() for pair in found], indent=2, ensure_ascii=False, allow_nan=False)
        sys.stdout.write(text + "\n")
        return 1 if changed else 0
    table = Table("claim", "estimate", "now", "verdict", "now", box=None)
    for pair in found:
        verdicts = [Text(f.verdict, style=VERDICT_STYLES[f.verdict]) for f in (pair.saved, pair.again)]
        estimates = [number_text(f.estimate) for f in (pair.saved, pair.again)]
        table.add_row(Text(pair.saved.claim), *estimates, *verdicts)
    console = output()
    console.print(table)
    held = f"{len(found) - changed} of {len(found)} verdicts are the same with the controls drawn again"
    console.print(f"\n{held}{'.' if not changed else '; those that changed rest on too few draws, or on luck.'}")
    return 1 if changed else 0
