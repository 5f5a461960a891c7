"""`assay cache`: how much is kept, and its removal."""

from __future__ import annotations

import shutil

from rich.console import Console
from rich.table import Table

from assay.base.artifacts import home
from assay.cli.present import byte_text, output
from assay.studies.store import cache_sizes, clear_cache


def show(console: Console | None = None) -> int:
    """Print what each folder of the cache holds."""
    console = console or output()
    sizes = cache_sizes()
    console.print(f"{home()}", markup=False)
    if not sizes:
        console.print("empty")
        return 0
    table = Table("Folder", "Files", "Size", box=None, pad_edge=False)
    for entry in sizes:
        table.add_row(entry.name, str(entry.files), byte_text(entry.bytes))
    table.add_row("total", str(sum(entry.files for entry in sizes)), byte_text(sum(entry.bytes for entry in sizes)))
    console.print(table)
    console.print(f"{byte_text(shutil.disk_usage(home()).free)} free on its disk")
    return 0


def clear(*, models: bool, console: Console | None = None) -> int:
    """Remove the kept results, and the unpacked models if asked to."""
    console = console or output()
    freed = clear_cache(models=models)
    console.print(
        f"removed {byte_text(freed)} of {'results and models' if models else 'results'} from {home()}", markup=False
    )
    return 0
