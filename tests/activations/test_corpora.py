"""Corpora: the same documents whatever file they are in, taken up at any of them, and read in constant memory."""

from __future__ import annotations

import gzip
import json
import pydoc_data.topics
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.activations.corpora import PIECE, Texts, open_corpus
from assay.base.artifacts import write_parquet
from assay.base.errors import DamagedFile, MissingExtra, SpecError

TOPICS: list[str] = [text for _, text in sorted(pydoc_data.topics.topics.items())]
"""Some 80 texts of the language reference, which every Python has."""


def documents(corpus: Any, start: int = 0) -> dict[int, str]:
    found: dict[int, str] = {}
    for number, piece, text in corpus.pieces(start):
        assert len(text) <= PIECE
        assert (piece == 0) == (number not in found)
        found[number] = found.get(number, "") + text
    return found


@pytest.fixture(params=["lines.jsonl", "lines.jsonl.gz", "table.parquet", "two files"])
def topics(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    lines = [json.dumps({"n": n, "text": text}) + "\n" for n, text in enumerate(TOPICS)]
    if request.param == "table.parquet":
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.table({"text": TOPICS, "n": list(range(len(TOPICS)))})
        parquet.write_table(table, tmp_path / request.param, row_group_size=7)
        return open_corpus(tmp_path / request.param)
    if request.param == "two files":
        (tmp_path / "b.jsonl").write_text("".join(lines[30:]), "utf-8")
        (tmp_path / "a.jsonl").write_text("".join(lines[:30]) + "\n", "utf-8")  # a blank line is no document
        return open_corpus(tmp_path)
    opened = gzip.open if request.param.endswith("gz") else open
    with opened(tmp_path / request.param, "wt", encoding="utf-8") as file:
        file.writelines(lines)
    return open_corpus(tmp_path / request.param)


def test_the_documents_are_those_that_were_written(topics: Any) -> None:
    assert list(documents(topics).values()) == TOPICS


@pytest.mark.parametrize("start", [1, 6, 7, 8, 29, 30, 31, len(TOPICS) - 1, len(TOPICS)])
def test_it_is_taken_up_at_any_document(start: int, topics: Any) -> None:
    assert documents(topics, start) == {n: text for n, text in enumerate(TOPICS) if n >= start}


def test_a_text_file_is_one_document_its_paragraphs_or_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One.\nTwo.\n\n\nThree.\n", "utf-8")
    assert documents(open_corpus(path)) == {0: "One.\nTwo.\n\n\nThree.\n"}
    assert documents(open_corpus(path, split="paragraph")) == {0: "One.\nTwo.", 1: "Three."}
    assert documents(open_corpus(path, split="line")) == {0: "One.", 1: "Two.", 2: "Three."}
    assert documents(open_corpus(path, split="line"), 2) == {2: "Three."}
    assert documents(open_corpus([path, path]), 1) == {1: "One.\nTwo.\n\n\nThree.\n"}


@given(st.text(alphabet="ab \n", max_size=40), st.integers(1, 9))
def test_a_long_document_comes_in_pieces_that_make_it_whole(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("assay.activations.corpora.PIECE", size)
        pieces = [piece for _, _, piece in Texts([text]).pieces()]
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size for piece in pieces) or text == ""
    for left, right in pairwise(pieces):  # a word is cut only where it is longer than a piece
        assert left[-1] == "\n" or right[0] == " " or "\n" not in left


def test_a_large_file_is_read_in_constant_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    path.write_text("".join(TOPICS) * 20, "utf-8")
    assert path.stat().st_size > 5e6
    tracemalloc.start()
    for _ in open_corpus(path).pieces():
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * PIECE


def test_what_it_is_follows_its_contents(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"text": "One."}\n')
    second.write_text('{"text": "Two."}\n')
    hashes = [open_corpus(path).describe()["hash"] for path in (first, second)]
    assert hashes[0] != hashes[1]
    assert open_corpus(first, field="title").describe()["hash"] != hashes[0]
    assert Texts(["One."]).describe()["hash"] != Texts(["One", "."]).describe()["hash"]
    second.write_text('{"text": "One."}\n')
    moved = second.rename(tmp_path / "elsewhere.jsonl")
    (tmp_path / "deeper").mkdir()
    moved.rename(tmp_path / "deeper" / "a.jsonl")
    assert open_corpus(tmp_path / "deeper" / "a.jsonl").describe()["hash"] == hashes[0]


def test_token_ids_are_documents_too(tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    path.write_text('{"text": [3, 4]}\n{"text": [5]}\n')
    assert [ids for _, _, ids in open_corpus(path).pieces()] == [[3, 4], [5]]
    assert [ids for _, _, ids in Texts([[3, 4]]).pieces()] == [[3, 4]]


@pytest.mark.parametrize(
    ("contents", "options", "said"),
    [
        ('{"text": "a"}\n{"txet": "b"}\n', {}, r"bad.jsonl, line 2 has no field 'text'; did you mean 'txet'"),
        ('{"text": 3}\n', {}, r"line 1: field 'text' is 3; a text or a list of token ids"),
        ('{"text": "a"\n', {}, r"line 1 is no JSON"),
        ("[1]\n", {}, r"line 1 is a JSON list; an object with 'text'"),
        ('{"text": "a"}\n', {"encoding": "klingon"}, r"encoding='klingon' is none"),
        ('{"text": "a"}\n', {"split": "lines"}, r"split='lines'; did you mean 'line'"),
        ('{"text": "a"}\n', {"kind": "csv"}, r"kind='csv': 'text', 'jsonl' or 'parquet'"),
    ],
)
def test_what_cannot_be_read_is_told(contents: str, options: dict[str, str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(contents)
    with pytest.raises(SpecError, match=said):
        list(open_corpus(path, **options).pieces())


def test_files_that_are_not_there_or_not_alike_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("")
    (tmp_path / "data.parquet").write_text("")
    (tmp_path / "data.bin").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpecError, match=r"no text to read at '.*dato.jsonl'; did you mean 'data.jsonl'"):
        open_corpus(tmp_path / "dato.jsonl")
    with pytest.raises(SpecError, match="no text to read"):
        open_corpus(tmp_path / "empty")
    with pytest.raises(SpecError, match="files of one kind"):
        open_corpus([tmp_path / "data.jsonl", tmp_path / "data.parquet"])
    with pytest.raises(SpecError, match=r"'data.bin' ends in none of .*say kind="):
        open_corpus(tmp_path / "data.bin")
    with pytest.raises(SpecError, match="one text would be taken for its characters"):
        Texts("One.")
    with pytest.raises(SpecError, match="document 1 is 3"):
        Texts(["One.", 3])


def test_damaged_files_are_told(tmp_path: Path) -> None:
    table = tmp_path / "table.parquet"
    write_parquet(table, {"body": ["One."]})
    with pytest.raises(SpecError, match=r"no column 'text' \(it has 'body'\)"):
        list(open_corpus(table).pieces())
    table.write_bytes(table.read_bytes()[:-8])
    with pytest.raises(DamagedFile, match="not a readable Parquet file"):
        list(open_corpus(table).pieces())
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(b"One. " * 999)[:-12])
    with pytest.raises(DamagedFile, match="cannot be unpacked"):
        list(open_corpus(packed).pieces())
    latin = tmp_path / "latin.txt"
    latin.write_bytes("déjà vu".encode("latin-1"))
    with pytest.raises(SpecError, match=r"is not written in utf-8 .*say encoding="):
        list(open_corpus(latin).pieces())
    assert documents(open_corpus(latin, encoding="latin-1")) == {0: "déjà vu"}


def test_the_hub_names_the_extra_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    corpus = open_corpus("hub:user/name:config", field="body", part="validation")
    assert corpus.describe()["config"] == "config"
    with pytest.raises(MissingExtra, match=r"assay\[hub\]"):
        list(corpus.pieces())


def test_a_data_set_is_streamed_from_any_document(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    from assay.activations.corpora import Hub

    write_parquet(tmp_path / "train.parquet", {"body": ["One.", "Two.", None]})
    corpus = Hub(name="parquet", field="body", options={"data_files": str(tmp_path / "train.parquet")})
    assert documents(corpus) == {0: "One.", 1: "Two.", 2: ""}
    assert documents(corpus, 1) == {1: "Two.", 2: ""}
