"""Check every model family on a small random model, and write the record and the table that come of it.

Writes `src/assay/subjects/verified.json`, which `assay families` prints, and the table in `docs/families.md`. Run it
after a declaration is added, or for a new version of transformers.
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path

import torch

from assay.activations.verification import Verified, make_record, model_types, verify

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "src" / "assay" / "subjects" / "verified.json"
PAGE = ROOT / "docs" / "families.md"
MARK = "<!-- families -->"


def table(rows: list[Verified], versions: dict[str, str]) -> str:
    """The rows as Markdown, a line for each family."""
    lines = [
        f"Checked on small random models with transformers {versions['transformers']} and torch {versions['torch']}: "
        f"{len(rows)} model types in {len({row.family for row in rows})} families.",
        "",
        "| family | `config.model_type` | sites of a two-block model | identities | largest error | notes |",
        "|---|---|---|---|---|---|",
    ]
    for family, group in groupby(rows, key=lambda row: row.family):
        members = list(group)
        notes = dict.fromkeys(note for row in members for note in (*row.notes, *(f"`{s}.`" for s in row.stacks)))
        lines.append(
            f"| {family} | {', '.join(f'`{row.model_type}`' for row in members)} | {_span([r.sites for r in members])} "
            f"| {_span([r.identities for r in members])} | {max(r.error for r in members):.0e} | {', '.join(notes)} |"
        )
    return "\n".join(lines)


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def main() -> int:
    """Check, write, and return 1 if a family failed."""
    torch.set_num_threads(1)
    rows = []
    for model_type in model_types():
        rows.append(verify(model_type))
        sys.stderr.write(f"{rows[-1].status:9} {model_type} {rows[-1].why}\n")
    found = make_record(rows)
    failed = [row.model_type for row in rows if row.status == "failed"]
    if failed:
        sys.stderr.write(f"failed: {', '.join(failed)}; nothing is written\n")
        return 1
    RECORD.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    before, _, rest = PAGE.read_text("utf-8").partition(MARK)
    _, _, after = rest.partition(MARK)
    PAGE.write_text(f"{before}{MARK}\n{table(rows, found['versions'])}\n{MARK}{after}", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
