"""Texts as tokens: shaded by value, or with the places marked where two prompts part. These are HTML, so they wrap."""

from __future__ import annotations

from markupsafe import escape

from assay.base.labels import token_label
from assay.base.views import Prompt, Tokens
from assay.studies.report import colour
from assay.studies.report.charts.chart import Chart
from assay.studies.report.scale import decimals, short


def draw_tokens(view: Tokens) -> Chart:
    """Return the tokens on their shades, each over its number."""
    known = [v for v in view.values if v is not None]
    limit = max((abs(v) for v in known), default=0.0) or 1.0
    out = []
    for token, value in zip(view.tokens, view.values, strict=True):
        name = "none" if value is None else colour.level(value, limit, view.diverging)
        word = f'<b class="w {name}">{escape(token_label(token))}</b>'
        out.append(f'<span class="tok">{word}<small>{short(value, 2)}</small></span>')
        if "\n" in token:
            out.append("<br>")
    summary = f"{view.title}: text of {len(view.tokens)} tokens with a value each."
    if known:
        most = max(range(len(view.values)), key=lambda i: abs(view.values[i] or 0.0))
        summary = f"{summary[:-1]}; strongest {token_label(view.tokens[most])} {short(view.values[most])}."
    geometry = {"k": "tokens", "labels": [token_label(token) for token in view.tokens], "dp": decimals(known)}
    return Chart(markup=f'<div class="words">{"".join(out)}</div>', geometry=geometry, summary=summary)


def draw_prompt(view: Prompt) -> Chart:
    """Return the prompt's tokens; where the contrast differs, its token stands under the clean one."""
    contrast = view.contrast or view.tokens
    out = []
    for clean, corrupt in zip(view.tokens, contrast, strict=True):
        changed = clean != corrupt
        under = f'<small><i class="sr">corrupt: </i>{escape(token_label(corrupt))}</small>' if changed else ""
        style = "tok changed" if changed else "tok"
        out.append(f'<span class="{style}"><b class="w">{escape(token_label(clean))}</b>{under}</span>')
    summary = f"Prompt of {len(view.tokens)} tokens."
    return Chart(markup=f'<div class="words prompt">{"".join(out)}</div>', geometry={"k": "prompt"}, summary=summary)
