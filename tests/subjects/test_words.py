"""Text and tokens of a model: by its loaded tokenizer and by its card, which must agree to the last token."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

import assay
from assay.base.errors import SpecError, TokenError
from assay.subjects.card import Card
from assay.subjects.words import CardText, ModelText, Tokenizer, single_token

Pair = tuple[ModelText, CardText]


@pytest.fixture(scope="module", params=["llama", "gpt2", "with BOS"])
def pair(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_module: Callable[..., Any],
    tiny_tokenizer: Any,
) -> Pair:
    """A model's text by both ways; one whose tokenizer puts BOS before every prompt."""
    tokenizer = tiny_tokenizer
    if request.param == "with BOS":
        tokenizer = copy.deepcopy(tiny_tokenizer)
        template = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
        tokenizer.backend_tokenizer.post_processor = template
    module = tiny_module("gpt2" if request.param == "gpt2" else "llama")
    folder = tmp_path_factory.mktemp("model")
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelText(assay.load(str(folder))), CardText(Card(folder))


@given(text=st.text(alphabet="When Mary gave\n,.é<bos>ʬ", max_size=40), special=st.booleans())
def test_the_card_reads_text_as_the_loaded_model_does(pair: Pair, text: str, special: bool) -> None:
    loaded, card = pair
    assert card.encode(text, special=special) == loaded.encode(text, special=special)


def test_special_tokens_are_there_unless_refused(pair: Pair, request: pytest.FixtureRequest) -> None:
    for text in pair:
        assert text.encode("When", special=False) == text.encode("When")[-1:]
        assert len(text.encode("When")) == (2 if "BOS" in request.node.callspec.id else 1)


def test_every_token_has_the_same_text(pair: Pair) -> None:
    loaded, card = pair
    words = [loaded.decode(token) for token in range(124)]
    assert [card.decode(token) for token in range(124)] == words
    assert " Mary" in words
    assert words[1] == "<bos>"


def test_the_context_is_the_models(pair: Pair) -> None:
    assert [text.context for text in pair] == [64, 64]
    assert all(isinstance(text, Tokenizer) for text in pair)


def test_a_word_that_is_one_token(pair: Pair) -> None:
    for text in pair:
        token = single_token(text, " Mary", field="answer")
        assert text.decode(token) == " Mary"
        assert single_token(text, " Maryland", field="answer", first=True) == token


def test_a_word_that_is_several_tokens_shows_them(pair: Pair) -> None:
    for text in pair:
        with pytest.raises(TokenError, match=r"foil 'to the' is 3 tokens \('t' \+ 'o' \+ ' the'\)") as caught:
            single_token(text, "to the", field="foil")
        assert caught.value.field == "foil"
        assert "--first-token" in str(caught.value)


def test_no_word(pair: Pair) -> None:
    for text in pair:
        for first in (False, True):
            with pytest.raises(TokenError, match="answer '' has no tokens"):
                single_token(text, "", field="answer", first=first)


def test_a_model_without_a_tokenizer_has_no_text(tiny_module: Callable[..., Any]) -> None:
    with pytest.raises(SpecError, match="load it with tokenizer=") as caught:
        ModelText(assay.load(tiny_module("gpt2")))
    assert caught.value.field == "model"


def test_a_model_that_says_nothing_of_its_context_has_no_limit(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert CardText(Card(tmp_path)).context is None
