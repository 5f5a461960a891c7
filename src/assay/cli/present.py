"""What the commands print: plans, findings, methods and cards as tables that read well without colour."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from assay.base.findings import Control, Cost, Finding, Findings
from assay.base.method import Method, Plan, StepSpec
from assay.studies.cards import MethodCard
from assay.studies.run import Outcome

VERDICT_STYLES = {
    "supported": "bold green",
    "not distinguishable from control": "yellow",
    "contradicted": "bold red",
    "not testable": "dim",
}
_PLAIN_WIDTH = 120


class Output(Console):
    """A console that leaves it to the command line what a reader who went away means."""

    def on_broken_pipe(self) -> None:
        """Raise the error again; rich itself would end the process with code 1."""
        raise BrokenPipeError


def output() -> Output:
    """Return a console on standard output; text that goes to a file or a pipe is laid out 120 columns wide."""
    return Output(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)


def byte_text(size: float) -> str:
    """Return a number of bytes in the largest unit that keeps it at or above one.

    Example:
        >>> byte_text(1536), byte_text(12)
        ('1.5 KiB', '12 B')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def second_text(seconds: float) -> str:
    """Return a duration as a reader says it.

    Example:
        >>> second_text(0.25), second_text(75), second_text(7300)
        ('0.2 s', '1 min 15 s', '2 h 01 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"


def number_text(value: float) -> str:
    """Return a number with three significant digits, and all digits of a larger whole part."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def cost_text(cost: Cost) -> str:
    """Return what something cost as one phrase."""
    parts = [f"{cost.forwards:,} forwards"]
    if cost.backwards:
        parts.append(f"{cost.backwards:,} backwards")
    parts.append(second_text(cost.seconds))
    if cost.peak_bytes:
        parts.append(f"peak memory {byte_text(cost.peak_bytes)}")
    return ", ".join(parts)


def show_outcome(outcome: Outcome, *, quiet: bool, console: Console | None = None) -> None:
    """Print the headline, the findings with their controls, the warnings, and where the files are."""
    console = console or output()
    for line in outcome.findings.summary:
        console.print(line, markup=False, style="bold", soft_wrap=True)
    if len(outcome.findings) and not quiet:
        console.print()
        console.print(findings_table(outcome.findings))
        for mark, note in interval_notes(outcome.findings).values():
            console.print(f"{mark} no interval: {note}", markup=False, style="dim")
    for warning in outcome.findings.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)
    console.print()
    if outcome.out is not None:
        rows = [("report", "report.html"), ("findings", "findings.jsonl"), ("study", "study.json")]
        if any(name.startswith("artifacts/") for name in outcome.files):
            rows.append(("artifacts", "artifacts/"))
        for label, name in rows:
            console.print(f"{label:<10} {outcome.out / name}", markup=False, soft_wrap=True)
    else:
        console.print("Nothing was written: --out FOLDER gives the report, the findings and the artifacts.")
    if outcome.cached:
        text = f"answered from the cache in {second_text(outcome.seconds)} (when computed: {cost_text(outcome.cost)})"
    else:
        text = f"{cost_text(outcome.cost)}; {second_text(outcome.seconds)} in all"
    console.print(f"{'cost':<10} {text}", markup=False, soft_wrap=True)


def findings_table(findings: Findings) -> Table:
    """Return the findings as a table: claim, verdict, estimate with interval, n, and each control."""
    table = Table(show_lines=True)
    table.add_column("Claim", ratio=5, overflow="fold")
    table.add_column("Verdict", ratio=2, min_width=15)  # "distinguishable"
    table.add_column("Estimate [interval]", ratio=3)
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("Controls", ratio=4, overflow="fold")
    notes = interval_notes(findings)
    for finding in findings:
        table.add_row(
            Text(finding.claim),
            Text(finding.verdict, style=VERDICT_STYLES.get(finding.verdict, "")),
            Text(estimate_text(finding, notes.get(finding.interval_note, ("", ""))[0])),
            str(finding.n),
            Text("\n".join(control_text(control) for control in finding.controls) or f"none: {finding.control_waived}"),
        )
    return table


def interval_notes(findings: Findings) -> dict[str, tuple[str, str]]:
    """Return why there is no interval, once for each reason: a mark such as `(a)` and the reason, by the reason."""
    reasons = dict.fromkeys(finding.interval_note for finding in findings if finding.interval is None)
    return {reason: (f"({_letters(place)})", reason) for place, reason in enumerate(filter(None, reasons))}


def _letters(place: int) -> str:
    return chr(ord("a") + place) if place < 26 else f"{_letters(place // 26 - 1)}{_letters(place % 26)}"


def estimate_text(finding: Finding, mark: str = "") -> str:
    """Return the estimate with its unit and its interval.

    Args:
        finding: The finding.
        mark: Stands in the interval's place when there is none, and refers to the reason.
    """
    value = f"{number_text(finding.estimate)} {finding.unit}".strip()
    if finding.interval is None:
        return f"{value} {mark}".strip()
    level = "" if abs(finding.interval.level - 0.95) < 1e-9 else f" ({finding.interval.level:.0%})"
    return f"{value}\n[{number_text(finding.interval.low)}, {number_text(finding.interval.high)}]{level}"


def control_text(control: Control) -> str:
    """Return a control as one line: its name, the estimate's place in it, p and the number of draws."""
    parts = []
    if control.place is not None:
        parts.append(f"above {control.place:.0f}%")
    parts.append(f"of {len(control.null)} draws" if parts else f"{len(control.null)} draws")
    if control.p is not None:
        parts.append(f"p = {number_text(control.p)}")
    return f"{control.name}: {' '.join(parts[:2]) if control.place is not None else parts[0]}" + (
        f", {parts[-1]}" if control.p is not None else ""
    )


def show_plan(plan: Plan, console: Console | None = None) -> None:
    """Print the steps with what each costs, the totals, and what would really run."""
    console = console or output()
    table = Table(pad_edge=False, box=None)
    table.add_column("Step", overflow="fold")
    for column in ("Forwards", "Backwards", "Tokens", "Memory", "Seconds", "Cached"):
        table.add_column(column, justify="right", no_wrap=True)
    for planned in plan.steps:
        table.add_row(*_plan_row(planned.step.name, [planned.step]), "yes" if planned.cached else "no")
    table.add_section()
    table.add_row(
        *_plan_row("all steps", [planned.step for planned in plan.steps]), f"{plan.cached} of {len(plan.steps)}"
    )
    table.add_row(*_plan_row("to run", [planned.step for planned in plan.remaining]), "")
    console.print(table)
    console.print()
    if plan.finished:
        console.print("The study is finished: running it answers from the cache.")
    else:
        left = sum(planned.step.seconds for planned in plan.remaining)
        console.print(f"{len(plan.remaining)} of {len(plan.steps)} steps would run, in about {second_text(left)}.")


def _plan_row(name: str, steps: Iterable[StepSpec]) -> tuple[str, ...]:
    listed = list(steps)
    return (
        name,
        f"{sum(step.forwards for step in listed):,}",
        f"{sum(step.backwards for step in listed):,}",
        f"{sum(step.tokens for step in listed):,}",
        byte_text(max((step.bytes for step in listed), default=0)),
        f"{sum(step.seconds for step in listed):.1f}",
    )


def show_methods(methods: Iterable[Method], console: Console | None = None) -> None:
    """Print each method's name with its one-line summary."""
    console = console or output()
    table = Table("Method", "What it does", box=None, pad_edge=False)
    for method in methods:
        table.add_row(method.name, Text(method.summary))
    console.print(table)
    console.print("\n[dim]assay methods NAME shows a method's card; assay NAME --help its options.[/dim]")


def show_card(card: MethodCard, console: Console | None = None) -> None:
    """Print a method's card."""
    console = console or output()
    console.print(Text(f"{card.name} (version {card.version})", style="bold"))
    console.print(Text(card.summary))
    for heading, text in card.sections:
        console.print()
        console.print(Text(heading, style="bold"))
        console.print(Text(text))
    console.print()
    console.print(Text("Settings", style="bold"))
    table = Table("Setting", "Type", "Default", "What it is", box=None, pad_edge=False)
    for setting in card.settings:
        default = "required" if setting.required else setting.default
        table.add_row(setting.name, Text(setting.type), Text(default), Text(setting.description))
    console.print(table)
