"""A method's card comes from its docstring and its spec."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest

from assay.base.method import Method
from assay.studies.cards import HEADINGS, method_card, type_name
from assay.studies.registry import load_methods


def test_the_card_has_the_fixed_headings_and_the_settings(method: Method) -> None:
    card = method_card(method)
    assert (card.name, card.version) == ("tally", "1")
    assert card.summary == "Compare the embeddings of a prompt's tokens with those of random tokens."
    assert [heading for heading, _ in card.sections] == ["What it computes", "Controls", "When it misleads", "Source"]
    sections = dict(card.sections)
    assert sections["What it computes"].endswith("spread), placed among means over random tokens.")
    assert (
        sections["When it misleads"] == "Frequent tokens have shorter embeddings in most models.\n\nRare ones do not."
    )
    assert "The context." not in " ".join(sections.values())  # the docstring's Args are no part of the card
    settings = {setting.name: setting for setting in card.settings}
    assert (settings["prompt"].required, settings["prompt"].type) == (True, "text")
    assert (settings["draws"].default, settings["draws"].type) == ("19", "whole number")
    assert settings["measure"].type == "one of 'norm', 'spread'"
    assert settings["fold"].type == "yes or no"
    assert settings["weights"].description == "A JSON list with one weight a token."


def test_every_built_in_method_says_what_it_computes_and_when_it_misleads() -> None:
    for built_in in load_methods():
        headings = [heading for heading, _ in method_card(built_in).sections]
        assert set(headings) <= set(HEADINGS)
        assert {"What it computes", "Controls", "When it misleads", "Source"} <= set(headings)
        assert all(setting.description for setting in method_card(built_in).settings)


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (str | None, "text"),
        (int | float, "whole number or number"),
        (tuple[int, ...], "list of whole number"),
        (list[Path], "list of file"),
        (Annotated[bool, "note"], "yes or no"),
        (Literal["a", 2], "one of 'a', 2"),
    ],
)
def test_types_read_as_words(annotation: object, expected: str) -> None:
    assert type_name(annotation) == expected
