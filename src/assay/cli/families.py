"""`assay families`: which models have standard sites, and what was checked of each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from assay.cli.present import output

if TYPE_CHECKING:
    from assay.activations.verification import Verified


def families(wanted: str | None, *, check: bool, as_json: bool) -> int:
    """Print the record, or check now; the exit code is 1 when a check fails.

    Args:
        wanted: One model type; all of them when None.
        check: Build a small random model of each and run the self-check.
        as_json: Print JSON.
    """
    from assay.activations.verification import Verified, make_record, model_types, record, verify

    types = model_types() if wanted is None else [wanted]
    if check:
        bar = track(types, "checking", console=Console(stderr=True), transient=True, disable=as_json)
        found = make_record([verify(model_type) for model_type in bar])
    else:
        found = record()
        if wanted is not None and wanted not in {row["model_type"] for row in found["types"]}:
            verify(wanted)  # raises with the nearest names
        found["types"] = [row for row in found["types"] if wanted in (None, row["model_type"])]
    rows = [
        Verified(**{**row, **{key: tuple(row[key]) for key in ("padding", "stacks", "notes")}})
        for row in found["types"]
    ]
    if as_json:
        output().print_json(json.dumps(found))
    else:
        _show(rows, found["versions"], now=check)
    return 1 if any(row.status == "failed" for row in rows) else 0


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _show(rows: list[Verified], versions: dict[str, str], *, now: bool) -> None:
    table = Table("family", "model type", "status", "sites", "identities", "largest error", "notes", box=None)
    last = ""
    for row in rows:
        family = "" if row.family == last else row.family
        last = row.family
        what = row.why if row.status == "failed" else ", ".join(row.notes)
        numbers = (str(row.sites), str(row.identities), f"{row.error:.0e}")
        table.add_row(family, row.model_type, row.status, *numbers, what)
    console = output()
    console.print(table)
    when = "now" if now else "for this version of assay"
    with_ = ", ".join(f"{name} {version}" for name, version in versions.items())
    console.print(f"\n{len(rows)} model types, checked {when} on small random models with {with_}.")
    console.print("A model that is not listed gets a map from its modules' names, if one passes the same check.")
