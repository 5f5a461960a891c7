"""The report: findings and their charts as one HTML file that needs nothing else.

Charts are SVG drawn here, so they are there without any script, in print, and for whatever reads the file next; a small
script adds values under the pointer, the same by keyboard, and copying. The file names no other file and no network
address, and its content security policy forbids both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.base.findings import Finding, Findings

__all__ = ["card_html", "render"]


def render(
    findings: Findings,
    *,
    title: str,
    subtitle: str = "",
    spec: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    limits: Sequence[str] = (),
) -> str:
    """Return one self-contained HTML page that shows findings.

    Args:
        findings: What a study returned. Its first `Prompt` view stands in the header; the other views become figures
            under their sections, in order.
        title: The headline.
        subtitle: A line under it.
        spec: The study's spec, shown as JSON; without a `Prompt` view its `prompt`, `answer` and `foil` are the header.
        provenance: What was run, on what, when, and what it cost; the findings' own provenance when absent.
        limits: What the study does not show, one paragraph each.

    Returns:
        The text of the file, to be written as UTF-8.

    Raises:
        FindingError: Two views have the same id.

    Example:
        >>> from assay.base.findings import Findings
        >>> render(Findings(findings=()), title="Nothing yet")[:15]
        '<!doctype html>'
    """
    from assay.studies.report.page import page

    return page(
        findings, title=title, subtitle=subtitle, spec=spec or {}, provenance=provenance or {}, limits=tuple(limits)
    )


def card_html(finding: Finding) -> str:
    """Return one finding as an HTML fragment with its own style, for notebooks.

    Example:
        >>> from assay.base.findings import Finding
        >>> finding = Finding(
        ...     claim="Two is more than one",
        ...     estimate=1.0,
        ...     unit="units",
        ...     n=1,
        ...     control_waived="arithmetic",
        ...     interval_note="exact",
        ...     verdict="not testable",
        ... )
        >>> "Two is more than one" in card_html(finding)
        True
    """
    from assay.studies.report.page import fragment

    return fragment(finding)
