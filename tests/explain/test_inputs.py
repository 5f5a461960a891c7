"""From a spec to token ids: what is read, and every bad input with its field and what was given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from assay.base.errors import SpecError, TokenError
from assay.explain.inputs import content_positions, read_inputs
from assay.explain.spec import ExplainSpec
from assay.subjects.words import ModelText

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"
Read = Callable[..., Any]
LINE = {"clean": CLEAN, "corrupt": CORRUPT, "answer": " Mary", "foil": " John"}


@pytest.fixture(scope="module")
def text(tiny_subject: Any) -> ModelText:
    return ModelText(tiny_subject)


@pytest.fixture
def read(text: ModelText) -> Read:
    def given(**fields: Any) -> Any:
        values = {"prompt": CLEAN, "answer": " Mary", "foil": " John", "corrupt": CORRUPT} | fields
        return read_inputs(text, ExplainSpec(**values))

    return given


@pytest.fixture
def vary(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: Any) -> Path:
        path = tmp_path / "variations.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(f"{line}\n" for line in texts), encoding="utf-8")
        return path

    return write


def refused(read: Read, **fields: Any) -> SpecError:
    with pytest.raises(SpecError) as caught:
        read(**fields)
    return caught.value


def test_texts_become_the_tokenizers_ids(read: Read, tiny_tokenizer: Any) -> None:
    question = read().question
    assert list(question.clean) == tiny_tokenizer(CLEAN)["input_ids"]
    assert list(question.corrupt) == tiny_tokenizer(CORRUPT)["input_ids"]
    assert [question.answer] == tiny_tokenizer(" Mary")["input_ids"]
    assert [question.foil] == tiny_tokenizer(" John")["input_ids"]
    assert question.noised == ()
    assert read().variations == ()


def test_answer_and_foil_may_be_left_out(read: Read) -> None:
    question = read(answer=None, foil=None).question
    assert (question.answer, question.foil) == (None, None)


@pytest.mark.parametrize("blank", [" ", "\n\t "])
@pytest.mark.parametrize("field", ["prompt", "corrupt"])
def test_an_empty_prompt(read: Read, field: str, blank: str) -> None:
    error = refused(read, **{field: blank})
    assert (error.field, str(error)) == (field, f"{field} is empty")


def test_an_answer_of_several_tokens_shows_them_and_the_way_out(read: Read) -> None:
    error = refused(read, answer=" Maryland")
    assert isinstance(error, TokenError)
    assert error.field == "answer"
    assert "answer ' Maryland' is 5 tokens (' Mary' + 'l' + 'a' + 'n' + 'd')" in str(error)
    assert "--first-token" in str(error)


def test_a_foil_of_several_tokens_names_the_foil(read: Read) -> None:
    error = refused(read, foil="John")  # no leading space
    assert isinstance(error, TokenError)
    assert error.field == "foil"
    assert "foil 'John' is 4 tokens ('J' + 'o' + 'h' + 'n')" in str(error)


def test_the_first_token_when_asked(read: Read, tiny_tokenizer: Any) -> None:
    question = read(answer=" Maryland", foil=" Johnson", first_token=True).question
    assert [question.answer] == tiny_tokenizer(" Mary")["input_ids"]
    assert [question.foil] == tiny_tokenizer(" John")["input_ids"]


def test_first_tokens_can_coincide(read: Read) -> None:
    error = refused(read, answer=" Maryland", foil=" Mary", first_token=True)
    assert isinstance(error, TokenError)
    assert (error.field, str(error)) == ("foil", "answer and foil are the same token, ' Mary'")


def test_an_answer_that_is_the_foil(read: Read) -> None:
    error = refused(read, foil=" Mary")
    assert isinstance(error, TokenError)
    assert error.field == "foil"
    assert "' Mary'" in str(error)


@pytest.mark.parametrize("field", ["answer", "foil"])
def test_an_answer_without_tokens(read: Read, field: str) -> None:
    error = refused(read, **{field: ""})
    assert isinstance(error, TokenError)
    assert (error.field, str(error)) == (field, f"{field} '' has no tokens")


def test_prompts_of_different_length_show_where_they_part(read: Read) -> None:
    error = refused(read, corrupt=CORRUPT.replace("the store", "the store and the store"))
    assert error.field == "corrupt"
    assert "clean has 14 tokens and corrupt 17" in str(error)
    assert "They part at token 8: clean goes on ',' ' John' ' gave' ' a' ..., corrupt ' and'" in str(error)


def test_a_prompt_that_is_the_others_beginning_parts_at_its_end(read: Read) -> None:
    error = refused(read, corrupt=CLEAN + " the store")
    assert "They part at token 14: clean goes on (the end), corrupt ' the' ' store'" in str(error)


def test_prompts_that_are_the_same(read: Read) -> None:
    error = refused(read, corrupt=CLEAN)
    assert error.field == "corrupt"
    assert "the same prompt" in str(error)


@pytest.mark.parametrize("field", ["prompt", "corrupt"])
def test_a_prompt_beyond_the_context(read: Read, field: str) -> None:
    error = refused(read, **{field: "When" + " the store" * 32})
    assert error.field == field
    assert f"{field} has 65 tokens, and the model's context is 64" in str(error)


def test_the_longest_prompt_is_read(read: Read) -> None:
    assert len(read(prompt="When" + " the" * 63, corrupt="When" + " a" * 63).question.clean) == 64


def test_without_a_corrupt_prompt_content_words_are_noised(read: Read) -> None:
    question = read(corrupt=None).question
    assert question.corrupt is None
    assert question.noised == (1, 3, 4, 7, 9, 10, 12)  # Mary John went store John gave drink; not the last token


def test_a_prompt_without_content_words_needs_a_corrupt_one(read: Read) -> None:
    error = refused(read, prompt=" to the", corrupt=None)
    assert error.field == "corrupt"
    assert "no content words" in str(error)
    assert read(prompt=" to the", corrupt=" a the").question.noised == ()


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["The", " Eiffel", " Tower", " is", " in"], (1, 2)),
        (["<|im_start|>", "user", "\n", "Paris", "<eos>", " Rome", "!"], (1, 3, 5)),
        ([" 1990", ",", " --", " ", "Ünder", " é", " x"], (0, 4, 5)),
        ([" THE", "you", " a<b", "<b>", " c d"], (2,)),
        ([" only"], ()),
        ([], ()),
    ],
)
def test_content_positions(tokens: list[str], expected: tuple[int, ...]) -> None:
    assert content_positions(tokens) == expected


def test_every_line_of_vary_is_a_question(read: Read, vary: Callable[..., Path]) -> None:
    other = LINE | {"clean": CORRUPT, "corrupt": CLEAN, "answer": " John", "foil": " Mary"}
    found = read(vary=vary(LINE, "", other, "   "))
    assert found.variations[0] == found.question
    assert (found.variations[1].clean, found.variations[1].answer) == (found.question.corrupt, found.question.foil)
    assert len(found.variations) == 2


def test_vary_without_a_corrupt_prompt_is_noised_too(read: Read, vary: Callable[..., Path]) -> None:
    line = {"clean": CLEAN, "answer": " Mary", "foil": " John"}
    found = read(corrupt=None, vary=vary(line, line | {"corrupt": None}))
    assert found.variations == (found.question, found.question)


def test_any_character_json_allows_may_stand_in_a_line(read: Read, vary: Callable[..., Path]) -> None:
    r"""A line ends at \n alone: JSON strings may hold the other things that end a line in Unicode."""
    line = '{"clean": "Mary\u2028 went\x85 to", "corrupt": "John\u2028 went\x85 to", "answer": " a", "foil": " and"}'
    assert len(read(vary=vary(line, line)).variations) == 2


def test_a_file_written_on_windows_is_read(read: Read, tmp_path: Path) -> None:
    path = tmp_path / "crlf.jsonl"
    path.write_bytes(f"{json.dumps(LINE)}\r\n{json.dumps(LINE)}\r\n".encode())
    assert len(read(vary=path).variations) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"not JSON \(Expecting property name"),
        ("[1, 2]", "a JSON object is needed, not list"),
        ('"text"', "a JSON object is needed, not str"),
        ({k: v for k, v in LINE.items() if k != "foil"}, "no text for foil; a line has clean, corrupt, answer, foil"),
        ({k: v for k, v in LINE.items() if k != "corrupt"}, "no text for corrupt"),
        (LINE | {"answer": 5}, "no text for answer"),
        (LINE | {"weight": 2, "anser": " Mary"}, "unknown anser, weight; a line has clean, corrupt, answer, foil"),
        (LINE | {"answer": " Maryland"}, r"answer: answer ' Maryland' is 5 tokens \(' Mary' \+ 'l'"),
        (LINE | {"foil": " Mary"}, "foil: answer and foil are the same token"),
        (LINE | {"corrupt": CLEAN}, "corrupt: clean and corrupt are the same prompt"),
        (LINE | {"corrupt": CLEAN + " the"}, "corrupt: clean has 14 tokens and corrupt 15"),
        (LINE | {"clean": " "}, "clean: clean is empty"),
        (LINE | {"clean": "the" + " the" * 80}, r"clean: clean has 8\d tokens, and the model's context is 64"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(
    read: Read, vary: Callable[..., Path], line: Any, message: str
) -> None:
    path = vary(LINE, "", line, LINE)
    with pytest.raises(SpecError, match=rf"variations\.jsonl, line 3.*{message}") as caught:
        read(vary=path)
    assert caught.value.field == "vary"
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, TokenError) == any(word in message for word in ("Maryland", "same token"))


@pytest.mark.parametrize("corrupt", [5, [CORRUPT]])
def test_a_corrupt_prompt_that_is_no_text_is_refused_where_it_may_be_left_out(
    read: Read, vary: Callable[..., Path], corrupt: Any
) -> None:
    line = LINE | {"corrupt": corrupt}
    error = refused(read, corrupt=None, vary=vary(line))
    assert "line 1: no text for corrupt" in str(error)


@pytest.mark.parametrize("given", ["absent.jsonl", "."])
def test_an_unreadable_file(read: Read, tmp_path: Path, given: str) -> None:
    error = refused(read, vary=tmp_path / given)
    assert error.field == "vary"
    assert str(tmp_path / given) in str(error)
    assert "cannot be read" in str(error)


def test_a_file_that_is_not_text(read: Read, tmp_path: Path) -> None:
    path = tmp_path / "binary.jsonl"
    path.write_bytes(b'{"clean": "\xff\xfe"}')
    assert "cannot be read" in str(refused(read, vary=path))


def test_a_file_without_lines(read: Read, vary: Callable[..., Path]) -> None:
    error = refused(read, vary=vary("", "  "))
    assert (error.field, "has no lines" in str(error)) == ("vary", True)


def test_a_subject_without_a_tokenizer(tiny_module: Any) -> None:
    import assay

    with pytest.raises(SpecError, match="load it with tokenizer=") as caught:
        ModelText(assay.load(tiny_module("gpt2")))
    assert caught.value.field == "model"


def test_a_byte_order_mark_is_no_part_of_the_first_line(read: Read, tmp_path: Path) -> None:
    path = tmp_path / "vary.jsonl"
    path.write_text(json.dumps(LINE) + "\n", encoding="utf-8-sig")
    assert len(read(vary=path).variations) == 1


def test_a_line_nested_too_deeply_is_malformed(read: Read, tmp_path: Path) -> None:
    path = tmp_path / "vary.jsonl"
    path.write_text("[" * 200_000)
    assert "line 1: not JSON" in str(refused(read, vary=path))


def test_a_file_of_an_unknown_user(read: Read) -> None:
    error = refused(read, vary=Path("~nobody-of-that-name/x"))
    assert (error.field, "home folder of a user" in str(error)) == ("vary", True)


@pytest.mark.parametrize("sigmas", [float("inf"), float("nan")])
def test_the_noise_is_finite(sigmas: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        ExplainSpec(prompt="a", sigmas=sigmas)
