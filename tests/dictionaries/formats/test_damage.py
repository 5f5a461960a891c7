"""Damaged, foreign and hostile files: each is refused by name, and nothing in a file is ever executed."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dictionary_files import Golden, change, golden, named
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.base.errors import AssayError, DamagedFile, NumericalError, SpecError, UnknownModel
from assay.dictionaries import ReLU, formats, load


def _tensors(case: Golden) -> list[str]:
    """The tensors of a file that a dictionary computes with."""
    names: list[str] = []
    spared = {"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square", "scaling_factor"}

    def look(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names.extend(
            name
            for name, value in held.items()
            if isinstance(value, torch.Tensor) and value.ndim and name not in spared
        )
        raise StopIteration

    with contextlib.suppress(StopIteration):
        change(case.weights, look)
    return [name for name in names if name != "group_sizes"]


def _format(case: Golden) -> str:
    read = load(case.where)
    card = read.card if hasattr(read, "card") else read.layers[0].card
    return card.source["format"]


def different() -> list[Golden]:
    """One file of each layout: of each format, one with each set of tensors."""
    found: dict[object, Golden] = {}
    for case in golden():
        found.setdefault((_format(case), frozenset(_tensors(case))), case)
    return list(found.values())


CASES = different()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_truncated_file_is_refused(case: Golden, tmp_path: Path) -> None:
    spoilt = case.copied(tmp_path)
    held = spoilt.weights.read_bytes()
    for kept in (0, 7, len(held) // 2, len(held) - 9):
        spoilt.weights.write_bytes(held[:kept])
        with pytest.raises((DamagedFile, SpecError)) as error:
            load(spoilt.where)
        assert spoilt.weights.name in str(error.value) or "no format known" in str(error.value)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_tensor_that_means_nothing_is_refused_by_name(case: Golden, tmp_path: Path) -> None:
    spoilt = case.copied(tmp_path)
    change(spoilt.weights, lambda held: held | {"W_gate": torch.zeros(3)})
    with pytest.raises(SpecError, match="W_gate"):
        load(spoilt.where, format=_format(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_tensor_that_is_missing_is_refused_by_name(case: Golden, tmp_path: Path) -> None:
    names = _tensors(case)
    for name in names:
        spoilt = case.copied(tmp_path / name)
        change(spoilt.weights, lambda held, name=name: {key: value for key, value in held.items() if key != name})
        if name in {"W_skip", "affine_skip_connection", "activation_function.threshold", "threshold_0"}:
            continue  # a file without it is another dictionary
        with pytest.raises(SpecError, match=name.replace(".", r"\.")):
            load(spoilt.where, format=_format(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_tensor_of_another_shape_is_refused_by_name(case: Golden, tmp_path: Path) -> None:
    for name in _tensors(case):
        spoilt = case.copied(tmp_path / name)
        change(spoilt.weights, lambda held, name=name: held | {name: held[name].flatten()[1:]})
        with pytest.raises(SpecError) as error:
            load(spoilt.where, format=_format(case))
        assert " has shape " in str(error.value)
        assert error.value.field in str(error.value)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_that_are_not_finite_are_refused(case: Golden, tmp_path: Path) -> None:
    name = _tensors(case)[0]
    for number in (float("nan"), float("inf")):
        spoilt = case.copied(tmp_path / str(number))
        change(spoilt.weights, lambda held, number=number: held | {name: torch.full_like(held[name], number)})
        with pytest.raises(NumericalError, match="NaN"):
            load(spoilt.where, format=_format(case))


def test_negative_thresholds_are_refused(tmp_path: Path) -> None:
    spoilt = named("sae-lens/gemma_scope_res").copied(tmp_path)
    change(spoilt.weights, lambda held: held | {"threshold": -held["threshold"] - 1})
    with pytest.raises(SpecError, match="not negative"):
        load(spoilt.where)


CONFIGS = {
    "sae-lens/topk": "cfg.json",
    "sae-lens/v5_standard": "cfg.json",
    "sae-lens/llama_scope": "hyperparams.json",
    "sae-lens/gemma_scope_2_res": "config.json",
    "eai-sparsify/topk": "cfg.json",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_key_that_means_nothing_is_refused_by_name_and_passed_over_when_told_to(name: str, tmp_path: Path) -> None:
    spoilt = named(name).copied(tmp_path)
    config = next(spoilt.folder.rglob(CONFIGS[name]))
    held = json.loads(config.read_text())
    config.write_text(json.dumps(held | {"whitening_v2": True}))
    with pytest.raises(SpecError, match="whitening_v2") as error:
        load(spoilt.where)
    assert error.value.field == "whitening_v2"
    assert torch.equal(load(spoilt.where, ignore=["whitening_v2"]).W_enc, load(named(name).where).W_enc)
    config.write_text(config.read_text()[:-5])
    with pytest.raises(DamagedFile, match="not readable JSON"):
        load(spoilt.where)


def configurations() -> list[tuple[Golden, str, tuple[str, ...]]]:
    """Every name in the JSON of the different layouts: the case, the file and the way to the name."""

    def names(document: object, way: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        for key, inner in document.items() if isinstance(document, dict) else ():
            yield (*way, key)
            yield from names(inner, (*way, key))

    found = []
    for case in CASES:
        for file in sorted(case.folder.rglob("*.json")):
            held = json.loads(file.read_text())
            found += [(case, file.relative_to(case.folder).as_posix(), way) for way in names(held)]
    return found


@given(
    where=st.sampled_from(configurations()),
    value=st.sampled_from([None, "x", [], {}, -1, 1e9, True, 0, "nan", [1, 2], ...]),
)
@settings(max_examples=150)
def test_whatever_a_configuration_says_it_is_read_or_refused(where, value) -> None:
    case, name, way = where
    with tempfile.TemporaryDirectory() as folder:
        spoilt = case.copied(Path(folder))
        file = spoilt.folder / name
        held = json.loads(file.read_text())
        inner = held
        for key in way[:-1]:
            inner = inner[key]
        if value is ...:
            del inner[way[-1]]
        else:
            inner[way[-1]] = value
        file.write_text(json.dumps(held))
        with contextlib.suppress(AssayError):
            load(spoilt.where)


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("file", ["ae.pt", "layer3.sae.pt", "resid_delta_mlp/autoencoders/2.pt", "Llama-SAE-l3.pth"])
@pytest.mark.parametrize("how", ["torch", "pickle", "beside tensors"])
def test_a_file_that_would_run_code_is_refused_and_does_not(file: str, how: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "executed", tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if how == "pickle":
        path.write_bytes(pickle.dumps(Hostile(mark)))
    elif how == "torch":
        torch.save(Hostile(mark), path)
    else:
        torch.save({"pre_bias": torch.zeros(2), "bias": torch.zeros(2), "W_enc": Hostile(mark)}, path)
    with pytest.raises(DamagedFile, match="would run code"):
        load(path)
    for format in formats.names():
        with pytest.raises(AssayError):
            load(path, format=format)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.exists()  # it does run where it is unpickled


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    import numpy as np

    mark = tmp_path / "executed"
    hostile = np.array([Hostile(mark)], dtype=object)
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    np.savez(tmp_path / "params.npz", **dict.fromkeys(names, hostile), allow_pickle=True)
    with pytest.raises(DamagedFile, match="would run code"):
        load(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["abstopk", "matching_pursuit", "temporal"])
def test_what_no_dictionary_here_can_be_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    spoilt = named("sae-lens/topk").copied(tmp_path)
    config = spoilt.folder / "cfg.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architecture": kind}))
    with pytest.raises(SpecError, match=f"{kind}.*Use SAELens"):
        load(spoilt.where)


def test_a_folder_of_something_else_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SpecError, match=r"holds: notes\.txt"):
        load(tmp_path)
    with pytest.raises(UnknownModel, match="there is no file"):
        load(tmp_path / "absent")
    with pytest.raises(SpecError, match="did you mean 'saelens'"):
        load(tmp_path, format="sae_lens")


def test_an_option_that_a_format_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no option 'sites'; did you mean 'site'"):
        load(named("eai-sparsify/topk").where, sites="blocks.0.resid_post")
    from dictionary_files import made

    with pytest.raises(SpecError, match="no option 'hook'"):
        made(ReLU()).save(tmp_path / "it", "saelens", hook="blocks.0.hook_mlp_out")
    assert not any(tmp_path.iterdir())
