"""Views: plain data that survive JSON, refuse what does not fit together, and have a table twin with all numbers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.base.errors import FindingError
from assay.base.labels import SLUG, slug, token_label
from assay.base.views import (
    KINDS,
    Bars,
    Distribution,
    Heatmap,
    Lines,
    Prompt,
    Scatter,
    Series,
    Table,
    Text,
    Tokens,
    View,
    view_from_dict,
)

ABOUT = {"id": "a-view", "section": "Section", "title": "Title", "caption": "Caption.", "python": "x = 1\n"}
EXAMPLES: list[View] = [
    Heatmap(
        **ABOUT,
        rows=["0", "1"],
        columns=[" a", " a", "b"],
        values=[[1, -2.5, None], [math.nan, 0, 4]],
        row_title="layer",
        column_title="token",
        unit="logits",
        column_tokens=True,
    ),
    Lines(
        **ABOUT,
        x=[1, 10, 100],
        series=[
            Series(name="kept", values=[0.1, 0.5, 0.9], low=[0, 0.4, 0.8], high=[0.2, 0.6, 1]),
            Series(name="null", values=[0, None, 0.1]),
        ],
        log_x=True,
    ),
    Lines(**ABOUT, x=["embed", "0", "1"], series=[Series(name="clean", values=[0.0, 1.0, 2.0])]),
    Bars(
        **ABOUT, labels=["a", "b"], values=[1.0, -1.0], low=[0.5, -2], high=[1.5, 0], groups=["g", "h"], unit="logits"
    ),
    Scatter(**ABOUT, x=[1, 2], y=[2, math.inf], labels=["p", "q"], x_title="exact", identity_line=True),
    Distribution(**ABOUT, null={"random": [0.1, 0.2], "fresh": [0.0]}, estimate=1.5, unit="logits"),
    Tokens(**ABOUT, tokens=["The", " cat", "\n"], values=[0.1, -0.2, None], unit="logits"),
    Prompt(**ABOUT, tokens=["a", " b"], contrast=["a", " c"], answer=" x", foil=" y"),
    Prompt(**ABOUT, tokens=["a", " b"]),
    Table(**ABOUT, columns=["name", "n", "ok"], rows=[["a", 1, True], ["b", 2.5, None]]),
    Text(**ABOUT, paragraphs=["One.", "Two."]),
]
NAMES = [f"{view.kind}-{i}" for i, view in enumerate(EXAMPLES)]


@pytest.mark.parametrize("view", EXAMPLES, ids=NAMES)
def test_a_view_survives_json(view: View) -> None:
    text = json.dumps(view.to_dict(), allow_nan=False)
    back = view_from_dict(json.loads(text))
    assert back == view
    assert type(back) is type(view)
    assert json.dumps(back.to_dict()) == text


@pytest.mark.parametrize("view", EXAMPLES, ids=NAMES)
def test_a_table_twin_is_rectangular_json_with_distinct_columns(view: View) -> None:
    columns, rows = view.table()
    assert len(set(columns)) == len(columns)
    assert all(len(row) == len(columns) for row in rows)
    json.dumps([columns, rows], allow_nan=False)


def test_every_kind_has_an_example_here() -> None:
    assert {view.kind for view in EXAMPLES} == set(KINDS)


@given(st.integers(0, 5), st.integers(0, 5), st.data())
def test_a_heatmap_and_its_table_hold_the_same_numbers(rows: int, columns: int, data: st.DataObject) -> None:
    numbers = st.one_of(st.none(), st.floats())
    values = data.draw(st.lists(st.lists(numbers, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    view = Heatmap(**ABOUT, rows=[str(i) for i in range(rows)], columns=[str(j) for j in range(columns)], values=values)
    kept = [[v if v is not None and math.isfinite(v) else None for v in row] for row in values]
    assert [list(row[1:]) for row in view.table()[1]] == kept
    assert view_from_dict(json.loads(json.dumps(view.to_dict(), allow_nan=False))) == view


def test_values_from_numpy_become_plain_and_immutable() -> None:
    view = Heatmap(**ABOUT, rows=["0"], columns=["0", "1"], values=np.array([[1, np.nan]], dtype=np.float32))
    assert view.values == ((1.0, None),)
    assert type(view.values[0][0]) is float
    table = Table(**ABOUT, columns=["a", "b"], rows=[[np.float32(0.5), np.int64(3)]])
    assert table.rows == ((0.5, 3),)
    assert [type(value) for value in table.rows[0]] == [float, int]
    with pytest.raises(AttributeError):
        view.values = ()  # type: ignore[misc]


def test_the_lines_table_puts_an_interval_beside_its_value() -> None:
    columns, rows = EXAMPLES[1].table()
    assert columns == ("x", "kept", "kept low", "kept high", "null")
    assert rows[1] == (10.0, 0.5, 0.4, 0.6, None)


def test_the_distribution_table_starts_with_the_estimate_and_keeps_every_draw() -> None:
    columns, rows = EXAMPLES[5].table()
    assert columns == ("draw", "random", "fresh")
    assert rows == (("estimate", 1.5, 1.5), (0, 0.1, 0.0), (1, 0.2, None))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Heatmap(**ABOUT, rows=["0"], columns=["a", "b"], values=[[1]]), ["row '0'", "1 entries", "2 columns"]),
        (lambda: Heatmap(**ABOUT, rows=["0"], columns=["a"], values=[[1], [2]]), ["values", "2 entries", "1 rows"]),
        (lambda: Lines(**ABOUT, x=[1], series=[Series(name="s", values=[1, 2])]), ["'s' values", "2 entries"]),
        (lambda: Lines(**ABOUT, x=[0, 1], series=[], log_x=True), ["logarithmic", "positive", "[0.0, 1.0]"]),
        (lambda: Lines(**ABOUT, x=[math.nan], series=[]), ["finite"]),
        (lambda: Series(name="s", values=[1], low=[0]), ["'s'", "one end"]),
        (lambda: Bars(**ABOUT, labels=["a"], values=[1], low=[0]), ["one end"]),
        (lambda: Bars(**ABOUT, labels=["a"], values=[1], groups=["g", "h"]), ["groups", "2 entries"]),
        (lambda: Bars(**ABOUT, labels="ab", values=[1, 2]), ["'ab'", "sequence"]),
        (lambda: Scatter(**ABOUT, x=[1], y=[1, 2], labels=["p"]), ["y has 2 entries"]),
        (lambda: Tokens(**ABOUT, tokens=["a"], values=[]), ["0 entries"]),
        (lambda: Prompt(**ABOUT, tokens=["a"], contrast=["a", "b"]), ["contrast"]),
        (lambda: Table(**ABOUT, columns=["a"], rows=[[1], [1, 2]]), ["row 1", "2 entries"]),
        (lambda: Text(**{**ABOUT, "id": "Not A Slug"}, paragraphs=[]), ["'Not A Slug'", "'not-a-slug'"]),
        (lambda: view_from_dict({"kind": "heatmaps"}), ["'heatmaps'", "did you mean 'heatmap'"]),
        (lambda: view_from_dict({"kind": "text", "id": "a"}), ["text view", "missing"]),
        (lambda: view_from_dict({**EXAMPLES[-1].to_dict(), "colour": 1}), ["colour"]),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_given(make: object, words: list[str]) -> None:
    with pytest.raises(FindingError) as caught:
        make()  # type: ignore[operator]
    for word in words:
        assert word in str(caught.value)


@given(st.text())
def test_a_slug_of_any_text_is_a_valid_id(text: str) -> None:
    assert SLUG.fullmatch(slug(text))


@given(st.text())
def test_a_token_label_is_visible(token: str) -> None:
    label = token_label(token)
    assert label
    assert not any(char.isspace() for char in label if char != "\u3000" and ord(char) < 0x2000)
    assert "\u202e" not in label
    assert "\x00" not in label


def test_tokens_that_differ_in_white_space_look_different() -> None:
    tokens = ["Mary", " Mary", "  Mary", "Mary ", "\n", "\t", " ", "", "\u200b"]
    assert len({token_label(token) for token in tokens}) == len(tokens)
