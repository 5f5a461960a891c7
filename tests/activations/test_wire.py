"""Edits over a wire: every one comes back as it was, code never leaves, and nothing that is wrong gets in."""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import assay
from assay.activations import wire
from assay.activations.edits import Edit
from assay.activations.values import Donor
from assay.base.errors import AssayError, InvalidEdit
from assay.subjects.tokens import Batch

IDS = torch.tensor([[5, 17, 33, 64, 9], [101, 42, 77, 3, 8]])
SITES = ["blocks.1.resid_post", "blocks.0.attn.z.3", "module:model.norm.out", "embed"]

finite = st.floats(-1e6, 1e6, allow_nan=False)
small = st.integers(-6, 6)
texts = st.text(min_size=1, max_size=8).filter(lambda text: text.isprintable())
slices = st.builds(slice, st.none() | small, st.none() | small, st.none() | st.integers(1, 3))
indices = st.none() | small | st.lists(small, max_size=4) | slices
spans = st.integers(0, 20).flatmap(lambda a: st.builds(assay.Span, st.just(a), st.integers(a + 1, a + 9)))
ats = st.builds(assay.At, texts, occurrence=st.none() | small | st.sampled_from(["last", "all"]))
positions = indices | st.just("last") | st.lists(st.lists(small, max_size=3), min_size=1, max_size=3) | ats | spans


@st.composite
def tensors(draw: Any) -> Tensor:
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(shape, generator=generator).to(dtype)
    return x.transpose(0, -1) if x.ndim > 1 and draw(st.booleans()) else x


def donor(lengths: list[int]) -> Donor:
    """Left-padded prompts of these lengths."""
    width, rows = max(lengths), len(lengths)
    ids, starts = torch.arange(rows * width).view(rows, width), tuple(width - n for n in lengths)
    tensor = torch.randn(rows, width, 3, generator=torch.Generator().manual_seed(width))
    return Donor(tensor=tensor, batch=Batch(ids=ids, starts=starts, lengths=tuple(lengths)))


donors = st.lists(st.integers(1, 4), min_size=1, max_size=3)
KINDS = [assay.Add, assay.Set, assay.Scale, assay.Clamp, assay.Ablate, assay.ProjectOut, assay.Patch]


@st.composite
def recipes(draw: Any) -> tuple[Any, str, Any, dict[str, Any]]:
    """An edit's class, site, value and the rest; a list of lengths stands for a donor."""
    where = {"positions": draw(positions), "rows": draw(indices), "heads": draw(indices)}
    site, kind = draw(st.sampled_from(SITES)), draw(st.sampled_from(KINDS))
    if kind in (assay.Add, assay.Set, assay.Scale):
        return kind, site, draw(tensors() | finite), {"scale": draw(finite), **where}
    if kind is assay.Clamp:
        low, high = draw(st.tuples(finite, finite | st.none()) | st.tuples(st.none(), finite))
        low, high = (low, high) if None in (low, high) else sorted((low, high))
        return kind, site, draw(st.none() | tensors()), {"low": low, "high": high, **where}
    if kind is assay.Ablate:
        value = draw(st.sampled_from(["zero", "mean", "resample", "noise"]) | tensors() | donors)
        sigma = draw(st.none() | st.floats(0, 9)) if isinstance(value, str) and value == "noise" else None
        return kind, site, value, {"sigma": sigma, "seed": draw(st.integers(0, 2**31)), **where}
    if kind is assay.ProjectOut:
        return kind, site, draw(tensors()), where
    return kind, site, draw(tensors() | donors), {"source_positions": draw(positions), **where}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Donor | Batch):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a) if f.name != "_read")
    return type(a) is type(b) and a == b


@given(recipe=recipes())
def test_every_edit_comes_back_as_it_was(recipe: tuple[Any, str, Any, dict[str, Any]]) -> None:
    kind, site, value, rest = recipe
    edit = kind(site, donor(value) if isinstance(value, list) else value, **rest)
    text = json.dumps(wire.dump(edit), allow_nan=False)
    back = wire.load(json.loads(text))
    assert type(back) is type(edit)
    for field in dataclasses.fields(edit):
        assert same(getattr(edit, field.name), getattr(back, field.name)), field.name


def test_what_came_over_the_wire_does_the_same(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    rows = torch.tensor([[0, 0, 9, 8, 7], [1, 2, 3, 4, 5]])
    donor = subject.run(rows, mask=torch.tensor([[0, 0, 1, 1, 1], [1] * 5]), capture=["blocks.1.attn.z", "embed"])
    v = torch.randn(2, 1, 32)
    given: list[Edit] = [
        assay.Add("blocks.1.resid_post", v, scale=2.0, positions=[0, -1]),
        assay.Patch("blocks.1.attn.z.2", donor, positions=[1, 2]),
        assay.Ablate("blocks.0.mlp.out", "noise", seed=4),
        assay.Ablate("embed", donor, rows=1, positions=0),
        assay.Clamp("blocks.2.mlp.post", low=-0.5, high=0.5),
        assay.ProjectOut("blocks.2.resid_pre", torch.randn(3, 32).bfloat16()),
        assay.Scale("blocks.1.attn.pattern", 0.5, heads=(0, 3)),
    ]
    sent = json.loads(json.dumps(wire.dump_all(given)))
    assert torch.equal(subject.run(IDS, edits=wire.load_all(sent)).logits, subject.run(IDS, edits=given).logits)


def test_code_is_never_sent_nor_read() -> None:
    edit = assay.Apply("embed", torch.relu)
    with pytest.raises(InvalidEdit, match=r"Apply\('embed'\) holds a function.*sent as data"):
        wire.dump(edit)
    with pytest.raises(InvalidEdit, match="Apply holds a function"):
        wire.load({"edit": "Apply", "site": "embed", "value": "torch.relu"})

    @dataclasses.dataclass(frozen=True, slots=True)
    class Own(assay.Scale):
        pass

    with pytest.raises(InvalidEdit, match="not an edit that can be sent"):
        wire.dump(Own("embed", 1.0))
    for value in (torch.tensor([float("nan")]), torch.tensor([1j]), torch.ones(2, dtype=torch.long)):
        with pytest.raises(InvalidEdit, match=r"not finite|float16, bfloat16"):
            wire.dump(assay.Add("embed", value))


def tensor(shape: Any = (2,), dtype: Any = "float32", data: Any = None, size: int = 8, **extra: Any) -> dict[str, Any]:
    coded = base64.b64encode(bytes(size)).decode()
    return {"dtype": dtype, "shape": list(shape), "data": coded if data is None else data, **extra}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


NAN = base64.b64encode(torch.tensor([float("nan"), 1.0]).numpy().tobytes()).decode()
DONOR = {"tensor": tensor((1, 2, 1)), "ids": [[1, 2]], "starts": [0], "lengths": [2]}
ADD = {"edit": "Add", "site": "embed", "value": 1.0}
ATTACKS: dict[str, tuple[Any, str]] = {
    "not a mapping": ([ADD], "not an edit"),
    "nothing": ({}, "edit"),
    "unknown edit": ({**ADD, "edit": "Delete"}, "edit"),
    "a class path": ({**ADD, "edit": "os.system"}, "edit"),
    "no site": ({"edit": "Add", "value": 1.0}, "site"),
    "empty site": ({**ADD, "site": ""}, "site"),
    "long site": ({**ADD, "site": "a" * 5000}, "site"),
    "site of another type": ({**ADD, "site": ["embed"]}, "site"),
    "unknown field": ({**ADD, "hook": "x"}, "hook"),
    "a dunder field": ({**ADD, "__class__": "Apply"}, "__class__"),
    "a field of another edit": ({**ADD, "low": 1.0}, "low"),
    "text for a number": ({**ADD, "scale": "2"}, "scale"),
    "a boolean for a number": ({**ADD, "scale": True}, "scale"),
    "nan scale": ({**ADD, "scale": float("nan")}, "scale"),
    "infinite scale": ({**ADD, "scale": float("inf")}, "scale"),
    "infinite value": ({**ADD, "value": float("-inf")}, "value"),
    "a huge whole number": ({**ADD, "value": 10**400}, "value"),
    "a boolean row": ({**ADD, "rows": True}, "rows"),
    "a fraction of a row": ({**ADD, "rows": 1.5}, "rows"),
    "a row past any batch": ({**ADD, "rows": 2**40}, "rows"),
    "too many rows": ({**ADD, "rows": [0] * 5000}, "rows"),
    "another word": ({**ADD, "positions": "first"}, "positions"),
    "too deep": ({**ADD, "positions": nested(3)}, "positions"),
    "very deep": ({**ADD, "positions": nested(900)}, "positions|deep"),
    "an empty text": ({**ADD, "positions": {"at": ""}}, "positions"),
    "a span of three": ({**ADD, "positions": {"span": [1, 2, 3]}}, "positions"),
    "a span backwards": ({**ADD, "positions": {"span": [5, 2]}}, "Span"),
    "a slice and a text": ({**ADD, "positions": {"at": "x", "start": 1}}, "positions"),
    "huge shape": ({**ADD, "value": tensor((2**31, 2**31, 2**31))}, "bytes of base64|characters of base64"),
    "past the largest size": ({**ADD, "value": tensor((2**40,))}, "value"),
    "negative size": ({**ADD, "value": tensor((-1, -2))}, "value"),
    "too many dimensions": ({**ADD, "value": tensor((1,) * 9)}, "value"),
    "shape of another length": ({**ADD, "value": tensor((3,))}, "characters of base64"),
    "a fraction of a size": ({**ADD, "value": tensor((2.0,))}, "value"),
    "a boolean size": ({**ADD, "value": tensor((True, 2))}, "value"),
    "another type": ({**ADD, "value": tensor(dtype="int64")}, "value"),
    "an object type": ({**ADD, "value": tensor(dtype="object")}, "value"),
    "not base64": ({**ADD, "value": tensor(data="*" * 12)}, "not base64"),
    "padding in the middle": ({**ADD, "value": tensor(data="AAAA====AAA=")}, "base64|bytes"),
    "nan inside": ({**ADD, "value": tensor(data=NAN)}, "not finite"),
    "bytes for text": ({**ADD, "value": tensor(data=bytes(12))}, "value"),
    "an extra key": ({**ADD, "value": tensor(device="cuda")}, "value"),
    "a pickle": ({**ADD, "value": {"pickle": "gASV"}}, "value"),
    "a kind of ablation": ({"edit": "Ablate", "site": "embed", "value": "median"}, "value"),
    "sigma without noise": ({"edit": "Ablate", "site": "embed", "sigma": 1.0}, "sigma"),
    "clamp without bounds": ({"edit": "Clamp", "site": "embed"}, "low="),
    "a donor of two batches": ({"edit": "Patch", "site": "embed", "value": {**DONOR, "ids": [[1, 2], [3]]}}, "batch"),
    "a donor past its end": ({"edit": "Patch", "site": "embed", "value": {**DONOR, "starts": [1]}}, "batch"),
    "a donor without rows": ({"edit": "Patch", "site": "embed", "value": {**DONOR, "ids": []}}, "batch"),
    "a donor of other rows": (
        {"edit": "Patch", "site": "embed", "value": {**DONOR, "tensor": tensor((2, 1))}},
        "1 rows of ids",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_wrong_does_not_get_in(name: str) -> None:
    data, message = ATTACKS[name]
    with pytest.raises(InvalidEdit, match=message) as error:
        wire.load(data)
    assert len(str(error.value)) < 1200, "an error does not send the attack back"
    assert isinstance(error.value, AssayError)


def test_sizes_are_held_to_before_anything_is_made() -> None:
    one = {**ADD, "value": tensor((512,), data=base64.b64encode(bytes(2048)).decode())}
    assert len(wire.load_all([one] * 3, max_bytes=3 * 2048)) == 3
    with pytest.raises(InvalidEdit, match="6,144 bytes, and the limit is 6,143"):
        wire.load_all([one] * 3, max_bytes=3 * 2048 - 1)
    with pytest.raises(InvalidEdit, match="1025 edits came, and 1024 is the limit"):
        wire.load_all([ADD] * 1025)
    with pytest.raises(InvalidEdit, match="as a list"):
        wire.load_all("Add")
    empty = wire.load({**ADD, "value": {"dtype": "float32", "shape": [0, 2**31], "data": ""}})
    assert isinstance(empty, assay.Add)


def test_the_schema_of_an_edit_is_published() -> None:
    from pydantic import TypeAdapter

    schema = TypeAdapter(wire.EditData).json_schema()
    assert set(schema["discriminator"]["mapping"]) == {
        "Add", "Set", "Scale", "Clamp", "Ablate", "ProjectOut", "Patch"
    }  # fmt: skip
