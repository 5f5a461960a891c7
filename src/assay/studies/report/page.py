"""The page: views in numbered figures by section, findings as cards, provenance, and the policy that seals it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template, select_autoescape
from markupsafe import Markup

from assay.base.errors import FindingError
from assay.base.findings import Finding, Findings
from assay.base.labels import token_label
from assay.base.views import Cell, Heatmap, Prompt, TableData, Text, View
from assay.studies.report import colour
from assay.studies.report.cards import VERDICTS, bytes_text, card, seconds_text
from assay.studies.report.charts import FULL, HALF, Chart, draw, fits_half, half_height
from assay.studies.report.scale import decimals, fixed

MAX_ROWS = 600
"""Rows of a table that the page shows; "Copy CSV" always gives all of them."""

_HASH = re.compile(r"[0-9a-f]{16,}")


@cache
def _template(name: str) -> Template:
    """Return a template; everything it is given is escaped unless it is `Markup`."""
    environment = Environment(
        loader=PackageLoader("assay.studies.report", "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


@cache
def resource(name: str) -> str:
    """Return the text of a style sheet or script of this package."""
    return files("assay.studies.report").joinpath(name).read_text(encoding="utf-8").strip()


@cache
def styles(*names: str) -> str:
    """Return style sheets joined, with the palette."""
    sheet = "\n".join([*(resource(name) for name in names), colour.stylesheet()])
    return re.sub(r"\n\s*", "\n", re.sub(r"/\*.*?\*/", "", sheet, flags=re.DOTALL)).strip()


def page(
    findings: Findings,
    *,
    title: str,
    subtitle: str,
    spec: Mapping[str, Any],
    provenance: Mapping[str, Any],
    limits: Sequence[str],
) -> str:
    """Return the whole page; see `assay.studies.report.render`."""
    _check_ids(findings.views)
    prompt = next((view for view in findings.views if isinstance(view, Prompt)), None)
    cards = [card(finding, i) for i, finding in enumerate(findings)]
    sections, payload = _sections([view for view in findings.views if view is not prompt])
    payload += [{"id": c["id"], "geometry": c["geometry"]} for c in cards if c["geometry"]]
    theme, script, style = resource("theme.js"), resource("report.js"), styles("card.css", "style.css")
    allowed = [f"script-src {_sha(theme)} {_sha(script)}", f"style-src {_sha(style)}", "img-src data:"]
    policy = "; ".join(["default-src 'none'", *allowed, "base-uri 'none'", "form-action 'none'"])
    source = _template("report.html.j2").render(
        title=title,
        subtitle=subtitle,
        policy=policy,
        theme=Markup(theme),
        script=Markup(script),
        style=Markup(style),
        question=_question(prompt, spec),
        meta=_meta(findings, spec, provenance),
        summary=findings.summary,
        warnings=findings.warnings,
        counts=_counts(findings),
        cards=cards,
        sections=sections,
        limits=limits,
        provenance=_rows(provenance or _own_provenance(findings)),
        artifacts=_artifacts(findings.artifacts),
        spec=json.dumps(spec, indent=2, ensure_ascii=False, default=str) if spec else "",
        data=Markup(embed(payload)),
    )
    return source.encode("utf-8", "replace").decode("utf-8")  # a broken token may hold half of a surrogate pair


def fragment(finding: Finding) -> str:
    """Return one card with its style; see `assay.studies.report.card_html`."""
    return _template("fragment.html.j2").render(card=card(finding, 0), style=Markup(styles("card.css")))


def _check_ids(views: Sequence[View]) -> None:
    ids = [view.id for view in views]
    repeated = sorted({name for name in ids if ids.count(name) > 1})
    if repeated:
        raise FindingError(f"a report needs a different id for each view; these repeat: {repeated}")


def embed(data: Any) -> str:
    """Return JSON that can stand in a `<script>` element whatever texts it holds.

    Example:
        >>> "<" in embed({"a": "</script>"})
        False
    """
    text = json.dumps(_rounded(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _rounded(data: Any) -> Any:
    if isinstance(data, float):
        return float(f"{data:.6g}") if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _rounded(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_rounded(value) for value in data]
    return data


def _sha(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# --- figures ---------------------------------------------------------------------------------------------------------


def _sections(views: Sequence[View]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the sections with their figures, and the data that the script needs for them."""
    by_name: dict[str, list[View]] = {}
    for view in views:
        by_name.setdefault(view.section, []).append(view)
    sections, payload, number = [], [], 0
    for k, (name, members) in enumerate(by_name.items()):
        figures = []
        for view, half in zip(members, _halves(members), strict=True):
            number += 0 if isinstance(view, Text) else 1
            chart = draw(view, HALF if half else FULL)
            figures.append(_figure(view, chart, number, half))
            if not isinstance(view, Text):
                payload.append(_data(view, chart, k))
        sections.append({"id": f"section-{k + 1}", "name": name or "Results", "figures": figures})
    return sections, payload


def _halves(views: Sequence[View]) -> list[bool]:
    """Return which views share a row: neighbours that both fit in half of it and are about as tall."""
    out: list[bool] = []
    while len(out) < len(views):
        pair = views[len(out) : len(out) + 2]
        if len(pair) == 2 and all(fits_half(view) for view in pair):
            low, high = sorted(half_height(view) for view in pair)
            if low >= 0.55 * high:
                out += [True, True]
                continue
        out.append(False)
    return out


def _figure(view: View, chart: Chart | None, number: int, half: bool) -> dict[str, Any]:
    return {
        "id": f"fig-{view.id}",
        "kind": view.kind,
        "number": number,
        "title": view.title,
        "caption": view.caption,
        "python": view.python,
        "half": half,
        "markup": Markup(chart.markup) if chart else None,
        "summary": chart.summary if chart else "",
        "interactive": chart is not None and chart.geometry["k"] != "prompt",
        "legend": chart.legend if chart else [],
        "paragraphs": view.paragraphs if isinstance(view, Text) else [],
        "table": None if isinstance(view, Text) else html_table(view),
    }


def _data(view: View, chart: Chart | None, section: int) -> dict[str, Any]:
    columns, rows = view.table()
    out: dict[str, Any] = {"id": f"fig-{view.id}", "section": section, "python": view.python}
    out |= {"columns": columns, "rows": rows, "geometry": chart.geometry if chart else None}
    if isinstance(view, Heatmap):
        out |= {"titles": [view.row_title or "row", view.column_title or "column", view.unit]}
        out |= {"lattice": hashlib.sha256(repr((view.rows, view.columns)).encode()).hexdigest()[:12]}
    return out


def html_table(view: View) -> dict[str, Any]:
    """Return the table twin as the template shows it: texts, which columns are numbers, how many rows are left out."""
    columns, rows = view.table()
    numeric = [all(_is_number(row[j]) for row in rows) for j in range(len(columns))]
    places = _places(view, (columns, rows), numeric)
    names = [token_label(name) if isinstance(view, Heatmap) and view.column_tokens else name for name in columns]
    shown = [[_text(value, places[j]) for j, value in enumerate(row)] for row in rows[:MAX_ROWS]]
    return {
        "columns": names,
        "numeric": numeric,
        "rows": shown,
        "size": f"{len(rows):,} × {len(columns)}",
        "left": max(0, len(rows) - MAX_ROWS),
    }


def _is_number(value: Cell) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _places(view: View, table: TableData, numeric: Sequence[bool]) -> list[int]:
    columns, rows = table
    if isinstance(view, Heatmap):
        return [decimals([value for row in view.values for value in row])] * len(columns)
    out = []
    for j in range(len(columns)):
        values = [row[j] for row in rows]
        out.append(decimals([v for v in values if isinstance(v, int | float)]) if numeric[j] else 0)
    return out


def _text(value: Cell, places: int) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if value is None or isinstance(value, float):
        return fixed(value, places if value is None or value != int(value) or places else 0)
    return token_label(value) if value != value.strip() or not value.isprintable() else value


# --- header and provenance -------------------------------------------------------------------------------------------


def _question(prompt: Prompt | None, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the prompt, answer and foil: from the `Prompt` view, or as plain texts from the spec."""
    if prompt is not None:
        chart = draw(prompt, FULL)
        words = Markup(chart.markup) if chart else None
        return {
            "words": words,
            "text": "",
            "contrast": prompt.contrast is not None,
            "answer": token_label(prompt.answer) if prompt.answer else "",
            "foil": token_label(prompt.foil) if prompt.foil else "",
        }
    answer, foil = str(spec.get("answer") or ""), str(spec.get("foil") or "")
    return {
        "words": None,
        "text": str(spec.get("prompt") or ""),
        "contrast": False,
        "answer": token_label(answer) if answer else "",
        "foil": token_label(foil) if foil else "",
    }


def _meta(findings: Findings, spec: Mapping[str, Any], provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the few facts that stand under the title."""
    known = {**(_own_provenance(findings)), **provenance}
    out = []
    for name, keys in (("Model", ("model",)), ("Date", ("date", "computed", "created")), ("Seed", ("seed",))):
        value = next((known[key] for key in keys if known.get(key) not in (None, "")), None)
        if value is not None:
            out.append((name, _date(str(value)) if name == "Date" else str(value)))
    seconds, forwards = known.get("seconds"), known.get("forwards")
    if isinstance(forwards, int) and forwards:
        out.append(("Forward passes", f"{forwards:,}"))
    if isinstance(seconds, int | float) and seconds:
        out.append(("Compute", seconds_text(seconds)))
    version = dict(known.get("versions") or {}).get("assay")
    if version:
        out.append(("assay", str(version)))
    return out


def _date(text: str) -> str:
    return text[:16].replace("T", " ") if re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d", text) else text


def _own_provenance(findings: Findings) -> dict[str, Any]:
    """Return the provenance of the findings, for when the caller gave none."""
    for finding in findings:
        own = finding.provenance
        hashes = {name: getattr(own, f"{name}_hash") for name in ("weights", "tokenizer", "data", "spec")}
        return {"model": own.model, **hashes, "seed": own.seed, "versions": dict(own.versions)}
    return {}


def _rows(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    out = []
    for key, value in provenance.items():
        if value is None or value == "" or value == {}:
            continue
        name = key.replace("_", " ")
        row: dict[str, Any] = {"name": name[:1].upper() + name[1:], "code": False, "items": None, "value": ""}
        if isinstance(value, Mapping):
            row["items"] = [(str(k), str(v)) for k, v in value.items()]
        elif "bytes" in key and isinstance(value, int | float):
            row |= {"name": row["name"].replace(" bytes", " memory"), "value": bytes_text(value)}
        elif key in ("seconds", "wall_seconds") and isinstance(value, int | float):
            row |= {"name": "Compute", "value": seconds_text(value)}
        elif isinstance(value, int) and not isinstance(value, bool):
            row["value"] = f"{value:,}" if key != "seed" else str(value)
        else:
            row |= {"value": str(value), "code": bool(_HASH.search(str(value))) or key in ("command", "model")}
        out.append(row)
    return out


def _artifacts(artifacts: Mapping[str, Any]) -> list[tuple[str, str]]:
    out = []
    for name, about in artifacts.items():
        facts = about if isinstance(about, Mapping) else {}
        size = facts.get("bytes", facts.get("size"))
        parts = [str(facts[key]) for key in ("file", "path", "description") if facts.get(key)]
        out.append((name, " · ".join(parts + ([bytes_text(size)] if isinstance(size, int) else []))))
    return out


def _counts(findings: Findings) -> list[dict[str, Any]]:
    out = []
    for verdict, style in VERDICTS.items():
        first = next((i for i, finding in enumerate(findings) if finding.verdict == verdict), None)
        if first is not None:
            count = sum(finding.verdict == verdict for finding in findings)
            out.append({"verdict": verdict, "style": style, "count": count, "href": f"#finding-{first + 1}"})
    return out
