"""Positions by text: what a prompt's tokens spell, in byte-level, word-piece and sentence-piece tokenizers alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.base.errors import SpecError
from assay.subjects.positions import At, Span, read_ids, read_text
from assay.subjects.tokens import from_ids, from_texts

TEXT = "When Mary and John went to the store, John gave a drink to Mary"
TOKENIZERS: dict[str, Any] = {}
"""Filled by a fixture; hypothesis calls a test many times and takes no fixture of its own."""


def wrapped(tokenizer: Any, **special: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", **special)


def bytes_of(text: str) -> Any:
    """A byte-level tokenizer without merges: one token a byte, several a character outside ASCII."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate(["<pad>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer)


def sentence_piece() -> Any:
    """Words with `▁` for the space before them, a BOS token in front, and a decoder that drops the first space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = [f"▁{word}" for word in TEXT.replace(",", "").split()]
    pieces = dict.fromkeys(["<pad>", "<unk>", "<bos>", *words, ",", "▁"])
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(",", behavior="isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.decoder = decoders.Metaspace()
    return wrapped(tokenizer, bos_token="<bos>")


def lower_pieces() -> Any:
    """Lower-cased word pieces between special tokens, as BERT has them: offsets leave out the spaces."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = [word.lower() for word in TEXT.replace(",", "").split()]
    pieces = dict.fromkeys(["<pad>", "<unk>", "[CLS]", "[SEP]", *words, ",", "jo", "##hn"])
    pieces.pop("john")
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.decoder = decoders.WordPiece()
    return wrapped(tokenizer)


@pytest.fixture(autouse=True, scope="module")
def _tokenizers(tiny_tokenizer: Any) -> None:
    TOKENIZERS.update(words=tiny_tokenizer, bytes=bytes_of(TEXT), sentence_piece=sentence_piece(), lower=lower_pieces())


@pytest.mark.parametrize(
    ("kind", "john", "drink"),
    [
        ("words", [[3], [9]], [11, 12]),
        ("bytes", [[*range(13, 18)], [*range(37, 42)]], [*range(47, 55)]),
        ("sentence_piece", [[4], [10]], [12, 13]),
        ("lower", [[4, 5], [11, 12]], [14, 15]),
    ],
)
def test_a_text_is_found_where_its_tokens_are(kind: str, john: list[list[int]], drink: list[int]) -> None:
    batch = from_texts(TOKENIZERS[kind], [TEXT])
    reading = batch.read(0)
    assert "".join(reading.tokens) == TEXT
    assert reading.find(At(" John", occurrence=0)) == john[0]
    assert reading.find(At(" John", occurrence="last")) == reading.find(At(" John", occurrence=-1)) == john[1]
    assert reading.find(At(" John", occurrence="all")) == [*john[0], *john[1]]
    assert reading.find(At(" John", occurrence="all", tokens="last")) == [john[0][-1], john[1][-1]]
    assert reading.find(At(" John", occurrence=1, tokens="first")) == john[1][:1]
    assert reading.find(At(" a drink")) == drink


@pytest.mark.parametrize("kind", ["words", "bytes", "sentence_piece"])
def test_token_ids_alone_are_read_by_decoding(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    reading = read_ids(tokenizer, ids)
    assert reading == read_text(tokenizer, TEXT, ids)


@given(text=st.text(alphabet="ab é漢🙂\n", min_size=1, max_size=30))
def test_ids_and_offsets_tell_the_same_whatever_the_characters(text: str) -> None:
    """One byte a token: every token of a character that has several bytes covers the whole character."""
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer(text)["input_ids"]
    by_text, by_ids = read_text(tokenizer, text, ids), read_ids(tokenizer, ids)
    assert by_text == by_ids
    assert by_ids.text == text
    at = 0
    for character in text:
        for _ in range(len(character.encode())):
            start, stop = by_ids.regions[at]
            assert character in text[start:stop]
            at += 1
    assert at == len(ids)


def test_a_character_of_several_tokens_selects_them_all() -> None:
    batch = from_texts(TOKENIZERS["bytes"], ["go 🙂 on"])
    assert batch.columns(At("🙂")) == [[3, 4, 5, 6]]
    assert batch.columns(At(" 🙂")) == [[2, 3, 4, 5, 6]]
    assert batch.columns(Span(3, 4)) == [[3, 4, 5, 6]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_has_its_own_columns(side: str) -> None:
    texts = [TEXT, "When John went", "the store John"]
    batch = from_texts(TOKENIZERS["words"], texts, side=side)
    found = batch.columns(At(" John", occurrence="last"))
    assert found is not None
    for row, columns in enumerate(found):
        assert TOKENIZERS["words"].decode(batch.ids[row, columns]) == " John"
    assert batch.columns(At(" went"), rows=[0, 1]) == [
        [batch.starts[0] + 4],
        [batch.starts[1] + 2],
        [],
    ]
    assert batch.columns([[0], [1, -1], []]) == [
        [batch.starts[0]],
        [batch.starts[1] + 1, batch.starts[1] + 2],
        [],
    ]


@given(start=st.integers(0, len(TEXT) - 1), width=st.integers(1, 20))
def test_a_span_is_the_tokens_whose_letters_it_touches(start: int, width: int) -> None:
    stop = min(len(TEXT), start + width)
    if not TEXT[start:stop].strip():
        return
    expected: dict[str, list[str]] = {}
    for kind in ("words", "sentence_piece", "lower"):
        batch = from_texts(TOKENIZERS[kind], [TEXT])
        (found,) = batch.columns(Span(start, stop)) or [[]]
        pieces = [batch.read(0).tokens[position] for position in found]
        assert TEXT[start:stop].strip() in "".join(pieces)
        expected[kind] = pieces
    assert expected["words"] == expected["sentence_piece"], "who owns the space is no matter"


def test_what_is_not_there_is_said_with_the_tokens_that_are() -> None:
    batch = from_texts(TOKENIZERS["words"], [TEXT, "When John went"])
    cases: list[tuple[Any, str]] = [
        (At(" John"), r"row 0: ' John' occurs 2 times \(at positions 3, 9\): say occurrence=0, 1"),
        (At(" John", occurrence=2), "occurs 2 times, and occurrence=2"),
        (At("John", occurrence=0), "it lies inside the token ' John'"),
        (At(" Jon", occurrence=0), "did you mean ' John'.*'When' ' Mary'"),
        (At(" store"), r"row 1: no tokens spell ' store'.*the prompt's tokens: 'When' ' John' ' went'"),
        (Span(4, 5), "no token has characters 4 to 5, ' '"),
        (Span(10, 15), "row 1: characters 10 to 15 of a text of 14"),
        ([[0]], "positions for 1 rows, and there are 2"),
        ("first", r"the only word is 'last' \(a text is found by At\('first'\)\)"),
    ]
    for positions, message in cases:
        with pytest.raises(IndexError, match=message):
            batch.columns(positions)
    with pytest.raises(SpecError, match="were token ids"):
        from_ids(batch.ids[1:]).columns(Span(0, 3))
    with pytest.raises(SpecError, match="need a tokenizer"):
        from_ids(batch.ids[1:]).columns(At(" John"))
    for wrong in (lambda: At(""), lambda: At(" a", occurrence=True), lambda: Span(3, 3), lambda: Span(-1, 3)):
        with pytest.raises(SpecError, match=r"At\(|Span\("):
            wrong()


def test_long_prompts_are_shown_in_part() -> None:
    batch = from_ids(torch.tensor([[5, 6] * 40]))
    reading = read_ids(TOKENIZERS["words"], batch.prompt(0))
    with pytest.raises(IndexError) as error:
        reading.find(At("zz"))
    assert len(str(error.value)) < 300
