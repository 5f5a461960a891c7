"""Rows of tokens: every token of the corpus once, in its order, whatever row they are taken up at."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.activations.corpora import Texts
from assay.activations.rows import Cursor, TokenRows, tokenizer_hash
from assay.base.errors import SpecError

BOS, EOS = 1, 2
TEXTS = ["When Mary and John went to the store", "", "Paris is the capital of France.", "milk " * 60, "drink"]

corpora = st.lists(st.lists(st.integers(3, 20), max_size=12), min_size=1, max_size=8)


@given(corpora, st.integers(2, 7), st.sampled_from(["pack", "split", "document"]), st.integers(1, 2))
def test_no_token_is_lost_or_moved(documents: list[list[int]], context: int, layout: Any, min_length: int) -> None:
    rows = list(TokenRows(Texts(documents), context=context, layout=layout, min_length=min_length, separator=EOS))
    assert [row.index for row in rows] == list(range(len(rows)))
    whole = [np.array([*ids, EOS]) for ids in documents if ids]
    if layout == "pack":
        chunks = [np.concatenate(whole)] if whole else []
    else:
        chunks = [ids[:context] if layout == "document" else ids for ids in whole]
    cut = [ids[at : at + context] for ids in chunks for at in range(0, len(ids), context)]
    expected = [ids.tolist() for ids in cut if len(ids) >= min_length]
    assert [row.ids.tolist() for row in rows] == expected
    for row in rows:
        for document in np.unique(row.documents):
            mine = row.ids[row.documents == document]
            assert mine.tobytes() in np.array([*documents[document], EOS], np.int32).tobytes()


@given(corpora, st.integers(2, 6), st.sampled_from(["pack", "split", "document"]), st.booleans(), st.integers(3, 9))
def test_they_are_taken_up_after_any_row(
    documents: list[list[int]], context: int, layout: Any, separated: bool, piece: int
) -> None:
    texts = ["".join(chr(97 + token) for token in ids) for ids in documents]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("assay.activations.corpora.PIECE", piece)  # so that documents have several
        rows = TokenRows(
            Texts(texts), _Letters(), context=context, layout=layout, separator="eos" if separated else "none"
        )
        every = list(rows)
        for row in every:
            rest = list(rows.rows(row.after))
            assert [(r.index, r.ids.tolist(), r.documents.tolist(), r.after) for r in rest] == [
                (r.index, r.ids.tolist(), r.documents.tolist(), r.after) for r in every[row.index + 1 :]
            ]
            assert row.after == Cursor(**row.after.to_dict())
        assert [r.index for r in rows.rows(2)] == list(range(2, len(every)))


class _Letters:
    """A tokenizer of single letters: where a text is cut makes no difference to it."""

    bos_token_id, eos_token_id = BOS, EOS

    def __call__(self, text: Any, **_: Any) -> dict[str, Any]:
        ids = [[ord(c) for c in one] for one in ([text] if isinstance(text, str) else text)]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    def get_vocab(self) -> dict[str, int]:
        return {}


@pytest.mark.parametrize("layout", ["pack", "split", "document"])
def test_text_is_tokenised_as_the_tokenizer_does(layout: Any, tiny_tokenizer: Any) -> None:
    rows = list(TokenRows(Texts(TEXTS), tiny_tokenizer, context=16, layout=layout, separator="none"))
    found: dict[int, list[int]] = {}
    for row in rows:
        for document, token in zip(row.documents.tolist(), row.ids.tolist(), strict=True):
            found.setdefault(document, []).append(token)
    for number, ids in found.items():
        expected = tiny_tokenizer(TEXTS[number], add_special_tokens=False)["input_ids"]
        assert ids == (expected[:16] if layout == "document" else expected)
    assert set(found) == ({0, 2, 3, 4} if layout != "split" or found.get(4) else {0, 2, 3})


def test_where_the_bos_token_goes(tiny_tokenizer: Any) -> None:
    def made(bos: Any, **options: Any) -> list[list[int]]:
        rows = TokenRows(Texts([[5, 6, 7], [8, 9]]), tiny_tokenizer, context=4, bos=bos, **options)
        assert all((row.ids[row.documents < 0] == BOS).all() for row in rows)
        return [row.ids.tolist() for row in rows]

    assert made("none") == [[5, 6, 7, EOS], [8, 9, EOS]]
    assert made("auto") == made("none")  # this tokenizer adds none itself
    assert made("row") == [[BOS, 5, 6, 7], [BOS, EOS, 8, 9], [BOS, EOS]]
    assert made("document", separator="none") == [[BOS, 5, 6, 7], [BOS, 8, 9]]
    assert made("row", layout="document", separator="none") == [[BOS, 5, 6, 7], [BOS, 8, 9]]


def test_rows_that_are_too_short_are_left_out() -> None:
    rows = TokenRows(Texts([[3], [4, 5, 6], [7, 8]]), context=3, layout="document", min_length=2)
    assert [row.ids.tolist() for row in rows] == [[4, 5, 6], [7, 8]]
    assert [row.index for row in rows] == [0, 1]


def test_what_they_are_follows_all_that_makes_them(tiny_tokenizer: Any) -> None:
    given = {"context": 8, "layout": "pack", "bos": "none", "separator": "eos", "min_length": 2}
    base = TokenRows(Texts(TEXTS), tiny_tokenizer, **given).describe()
    assert TokenRows(Texts(TEXTS), tiny_tokenizer, **given).describe() == base
    others: list[dict[str, Any]] = [
        {"context": 9},
        {"layout": "split"},
        {"bos": "row"},
        {"separator": "none"},
        {"min_length": 3},
    ]
    hashes = [TokenRows(Texts(TEXTS), tiny_tokenizer, **{**given, **other}).describe()["hash"] for other in others]
    hashes += [TokenRows(Texts(TEXTS[:2]), tiny_tokenizer, **given).describe()["hash"], base["hash"]]
    assert len(set(hashes)) == len(hashes)
    assert tokenizer_hash(tiny_tokenizer) == base["tokenizer"] != tokenizer_hash(None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layout": "packed"}, "layout='packed'; did you mean 'pack'"),
        ({"bos": "always"}, "bos='always'"),
        ({"context": 1}, "at least 2 tokens"),
        ({"min_length": 9}, "min_length=9"),
        ({"separator": "sep"}, "separator='sep'"),
        ({"bos": "row"}, "BOS token: there is no tokenizer"),
        ({"separator": "eos"}, "EOS token: there is no tokenizer"),
    ],
)
def test_options_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        TokenRows(Texts([[3, 4]]), **{"context": 8, **options})


def test_a_text_needs_a_tokenizer() -> None:
    with pytest.raises(SpecError, match="no tokenizer to read a text with"):
        list(TokenRows(Texts(["One."])))


def test_half_a_character_is_read_as_unknown(tiny_tokenizer: Any) -> None:
    rows = list(TokenRows(Texts(["Mary \ud800 John"]), tiny_tokenizer, context=32))
    assert len(rows) == 1 and len(rows[0].ids) > 2


def test_cursors_only_go_forward(tiny_tokenizer: Any) -> None:
    places = [row.after for row in TokenRows(Texts(TEXTS), tiny_tokenizer, context=8)]
    for a, b in pairwise(places):
        assert (a.row, a.document, a.piece, a.token) < (b.row, b.document, b.piece, b.token)
