"""Edits over a wire: to JSON and back. Data only; what arrives is checked before anything is made of it.

    wire.load(wire.dump(Add("blocks.3.resid_post", v, positions=At(" John"))))

A tensor is `{"dtype": "float32", "shape": [2, 64], "data": base64 of its bytes, little-endian}`. A `Run` is sent as its
`Donor` at the edit's site. `Apply` holds code and is refused on both sides. What is read is held to a number of bytes;
fields that no edit has, other types, and numbers that are not finite are refused, each with its place in the message.
"""

from __future__ import annotations

import base64
import binascii
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr, TypeAdapter
from pydantic import ValidationError as PydanticError
from torch import Tensor

from assay.activations.edits import Ablate, Add, Apply, Clamp, Edit, Patch, ProjectOut, Scale, Set
from assay.activations.values import Donor, Run
from assay.base.errors import AssayError, InvalidEdit
from assay.subjects.positions import At, Span
from assay.subjects.tokens import Batch, is_whole_number

MAX_BYTES = 64 * 1024 * 1024
"""The bytes of tensors that one `load` accepts when nothing else is said."""

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_MAX_DIMS, _MAX_ITEMS, _MAX_TEXT, _MAX_INT = 6, 4096, 4096, 2**31

Whole = Annotated[StrictInt, Field(ge=-_MAX_INT, le=_MAX_INT)]
Size = Annotated[StrictInt, Field(ge=0, le=_MAX_INT)]
Number = Annotated[StrictFloat | StrictInt, Field(allow_inf_nan=False, ge=-1e300, le=1e300)]
Text = Annotated[StrictStr, Field(min_length=1, max_length=_MAX_TEXT)]
Wholes = Annotated[list[Whole], Field(max_length=_MAX_ITEMS)]


class _Strict(BaseModel):
    """Nothing is converted, and nothing is there that is not named."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TensorData(_Strict):
    """A tensor."""

    dtype: Literal["float16", "bfloat16", "float32", "float64"]
    shape: Annotated[list[Size], Field(max_length=_MAX_DIMS)]
    data: StrictStr


class SliceData(_Strict):
    """A slice."""

    start: Whole | None = None
    stop: Whole | None = None
    step: Whole | None = None


class AtData(_Strict):
    """The tokens that spell a text."""

    at: Text
    occurrence: Whole | Literal["last", "all"] | None = None
    tokens: Literal["all", "first", "last"] = "all"


class SpanData(_Strict):
    """The tokens of some characters."""

    span: Annotated[list[Size], Field(min_length=2, max_length=2)]


class DonorData(_Strict):
    """What a run had at the edit's site, and where its prompts lie in it."""

    tensor: TensorData
    ids: Rows
    starts: Annotated[list[Size], Field(max_length=_MAX_ITEMS)]
    lengths: Annotated[list[Size], Field(max_length=_MAX_ITEMS)]


Rows = Annotated[list[Wholes], Field(max_length=_MAX_ITEMS)]
Indices = Whole | Wholes | SliceData | None
Positions = Literal["last"] | Whole | Wholes | Rows | SliceData | AtData | SpanData | None


class _EditData(_Strict):
    site: Text
    positions: Positions = None
    rows: Indices = None
    heads: Indices = None


class AddData(_EditData):
    """See `assay.Add`; the same for the others."""

    edit: Literal["Add"]
    value: TensorData | Number
    scale: Number = 1.0


class SetData(_EditData):
    """See `assay.Set`."""

    edit: Literal["Set"]
    value: TensorData | Number
    scale: Number = 1.0


class ScaleData(_EditData):
    """See `assay.Scale`."""

    edit: Literal["Scale"]
    value: TensorData | Number
    scale: Number = 1.0


class ClampData(_EditData):
    """See `assay.Clamp`."""

    edit: Literal["Clamp"]
    value: TensorData | None = None
    low: Number | None = None
    high: Number | None = None


class AblateData(_EditData):
    """See `assay.Ablate`."""

    edit: Literal["Ablate"]
    value: Literal["zero", "mean", "resample", "noise"] | TensorData | DonorData = "zero"
    sigma: Number | None = None
    seed: Whole = 0


class ProjectOutData(_EditData):
    """See `assay.ProjectOut`."""

    edit: Literal["ProjectOut"]
    value: TensorData


class PatchData(_EditData):
    """See `assay.Patch`."""

    edit: Literal["Patch"]
    value: TensorData | DonorData
    source_positions: Positions = None


EditData = Annotated[
    AddData | SetData | ScaleData | ClampData | AblateData | ProjectOutData | PatchData, Field(discriminator="edit")
]
"""Every edit that a wire carries; `TypeAdapter(EditData).json_schema()` is its schema."""

_EDITS: dict[str, type[Any]] = {cls.__name__: cls for cls in (Add, Set, Scale, Clamp, Ablate, ProjectOut, Patch)}
_ADAPTER: TypeAdapter[Any] = TypeAdapter(EditData)
_FIELDS = ("value", "scale", "low", "high", "sigma", "seed", "source_positions", "positions", "rows", "heads")


def dump(edit: Edit) -> dict[str, Any]:
    """An edit as JSON holds it: dicts, lists, texts and numbers.

    Args:
        edit: Any edit but `Apply`.

    Returns:
        Its fields; those at their defaults are left out.

    Raises:
        InvalidEdit: If it is `Apply`, or holds what a wire does not carry.

    Example:
        >>> from assay.activations import wire
        >>> wire.dump(Scale("blocks.1.mlp.out", 0.5, positions="last"))
        {'edit': 'Scale', 'site': 'blocks.1.mlp.out', 'value': 0.5, 'positions': 'last'}
    """
    name = type(edit).__name__
    if isinstance(edit, Apply):
        raise InvalidEdit(f"Apply({edit.site!r}) holds a function, and edits are sent as data: {', '.join(_EDITS)}")
    if _EDITS.get(name) is not type(edit):
        raise InvalidEdit(f"{edit!r:.80} is not an edit that can be sent: {', '.join(_EDITS)}")
    data: dict[str, Any] = {"edit": name, "site": edit.site}
    for field in _FIELDS:
        default = edit.__dataclass_fields__[field].default if field in edit.__dataclass_fields__ else None
        value = getattr(edit, field, None)
        if value is not None and not (isinstance(value, str | int | float) and value == default):
            data[field] = _plain(value, field, edit)
    _validated(data)
    return data


def dump_all(edits: Sequence[Edit]) -> list[dict[str, Any]]:
    """Several edits, in order; see `dump`."""
    return [dump(edit) for edit in edits]


def load(data: Any, *, max_bytes: int = MAX_BYTES) -> Edit:
    """Read an edit that came over a wire.

    Args:
        data: What `dump` gave, after JSON.
        max_bytes: The largest number of bytes that its tensors may have.

    Returns:
        The edit, its tensors on the CPU.

    Raises:
        InvalidEdit: If it is not an edit, is too large, or holds numbers that are not finite.

    Example:
        >>> from assay.activations import wire
        >>> wire.load({"edit": "Ablate", "site": "blocks.1.mlp.out", "value": "mean", "rows": [0, 2]})
        Ablate(site='blocks.1.mlp.out', value='mean', sigma=None, seed=0, positions=None, rows=[0, 2], heads=None)
    """
    return load_all([data], max_bytes=max_bytes)[0]


def load_all(items: Any, *, max_bytes: int = MAX_BYTES, max_edits: int = 1024) -> list[Edit]:
    """Read several edits; see `load`.

    Args:
        items: The edits, as data.
        max_bytes: The largest number of bytes that all their tensors may have together.
        max_edits: The largest number of edits.

    Raises:
        InvalidEdit: As `load`, and if there are too many.
    """
    if not isinstance(items, list | tuple):
        raise InvalidEdit(f"edits come as a list, not {type(items).__name__}")
    if len(items) > max_edits:
        raise InvalidEdit(f"{len(items)} edits came, and {max_edits} is the limit")
    checked = [_validated(item) for item in items]
    size = sum(_declared_bytes(item) for item in checked)
    if size > max_bytes:
        raise InvalidEdit(f"the tensors of these edits have {size:,} bytes, and the limit is {max_bytes:,}")
    return [_edit(item) for item in checked]


def _plain(value: Any, field: str, edit: Edit) -> Any:
    name = f"{type(edit).__name__}({edit.site!r}): {field}"
    if isinstance(value, Run):
        value = value.donor(edit.site)
    if isinstance(value, Donor):
        batch = value.batch
        places = {"ids": batch.ids.tolist(), "starts": list(batch.starts), "lengths": list(batch.lengths)}
        return {"tensor": _tensor_data(value.tensor, name), **places}
    if isinstance(value, At):
        return {"at": value.text, "occurrence": value.occurrence, "tokens": value.tokens}
    if isinstance(value, Span):
        return {"span": [value.start, value.stop]}
    if isinstance(value, slice):
        return {"start": value.start, "stop": value.stop, "step": value.step}
    if isinstance(value, Tensor):
        return value.tolist() if field in ("positions", "rows", "heads") else _tensor_data(value, name)
    if isinstance(value, str | float | bool):
        return value
    if is_whole_number(value):
        return int(value)
    if isinstance(value, Sequence) and field in ("positions", "source_positions", "rows", "heads"):
        return [_plain(item, field, edit) for item in value]
    raise InvalidEdit(f"{name} is {value!r:.60}, which a wire does not carry")


def _tensor_data(tensor: Tensor, name: str) -> dict[str, Any]:
    dtype = next((word for word, kind in _DTYPES.items() if kind == tensor.dtype), None)
    if dtype is None:
        raise InvalidEdit(f"{name} has the type {tensor.dtype}; {', '.join(_DTYPES)} are sent")
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidEdit(f"{name} holds numbers that are not finite")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw = bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""
    if sys.byteorder == "big":
        raw = _swapped(raw, tensor.element_size())
    return {"dtype": dtype, "shape": list(tensor.shape), "data": base64.b64encode(raw).decode("ascii")}


def _swapped(raw: bytes, size: int) -> bytes:
    return b"".join(raw[at : at + size][::-1] for at in range(0, len(raw), size))


def _validated(data: Any) -> Any:
    """Check an edit's fields and types, and say in one line what is wrong first."""
    kind = data.get("edit") if isinstance(data, Mapping) else None
    if kind == "Apply":
        raise InvalidEdit(f"Apply holds a function, and edits come as data: {', '.join(_EDITS)}")
    try:
        return _ADAPTER.validate_python(dict(data) if isinstance(data, Mapping) else data)
    except PydanticError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        places = [".".join(map(str, detail["loc"])) or "edit" for detail in details[:3]]
        what = "; ".join(
            f"{place[:120]}: {detail['msg'][:200]}" for place, detail in zip(places, details, strict=False)
        )
        raise InvalidEdit(f"this is not an edit ({what})") from None
    except RecursionError:
        raise InvalidEdit("this is not an edit: it is nested too deeply") from None


def _tensors(item: Any) -> list[TensorData]:
    value = getattr(item, "value", None)
    value = value.tensor if isinstance(value, DonorData) else value
    return [value] if isinstance(value, TensorData) else []


def _declared_bytes(item: Any) -> int:
    """The bytes that an edit's tensors say they have; their data must be as long."""
    total = 0
    for tensor in _tensors(item):
        size = math.prod(tensor.shape) * _DTYPES[tensor.dtype].itemsize
        coded = 4 * ((size + 2) // 3)
        if len(tensor.data) != coded:
            raise InvalidEdit(
                f"{item.edit}({item.site!r:.80}): a {tensor.dtype} tensor shaped {tensor.shape} has {size:,} bytes, "
                f"which are {coded:,} characters of base64; {len(tensor.data):,} came"
            )
        total += size
    value = getattr(item, "value", None)
    return total + (sum(map(len, value.ids)) * 8 if isinstance(value, DonorData) else 0)


def _edit(item: Any) -> Edit:
    given = {field: getattr(item, field) for field in _FIELDS if field in item.model_fields_set}
    name = f"{item.edit}({item.site!r:.80})"
    if isinstance(given.get("value"), TensorData):
        given["value"] = _tensor(given["value"], name)
    elif isinstance(given.get("value"), DonorData):
        given["value"] = _donor(given["value"], name)
    for field in ("positions", "source_positions", "rows", "heads"):
        if field in given:
            given[field] = _selector(given[field])
    for field in ("value", "scale", "low", "high", "sigma"):
        if isinstance(given.get(field), int):
            given[field] = float(given[field])
    try:
        edit: Edit = _EDITS[item.edit](item.site, **given)
    except InvalidEdit:
        raise
    except (AssayError, TypeError) as error:
        raise InvalidEdit(f"{name}: {error}") from None
    return edit


def _selector(value: Any) -> Any:
    if isinstance(value, SliceData):
        return slice(value.start, value.stop, value.step)
    try:
        if isinstance(value, AtData):
            return At(value.at, value.occurrence, value.tokens)
        if isinstance(value, SpanData):
            return Span(*value.span)
    except AssayError as error:
        raise InvalidEdit(str(error)) from None
    return value


def _tensor(data: TensorData, name: str) -> Tensor:
    try:
        raw = base64.b64decode(data.data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidEdit(f"{name}: its tensor is not base64 ({error})") from None
    dtype = _DTYPES[data.dtype]
    if len(raw) != math.prod(data.shape) * dtype.itemsize:
        raise InvalidEdit(f"{name}: a tensor shaped {data.shape} does not have {len(raw):,} bytes")
    if sys.byteorder == "big":
        raw = _swapped(raw, dtype.itemsize)
    if not raw:
        return torch.empty(data.shape, dtype=dtype)
    tensor = torch.frombuffer(bytearray(raw), dtype=dtype).reshape(data.shape)
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidEdit(f"{name}: its tensor holds numbers that are not finite")
    return tensor


def _donor(data: DonorData, name: str) -> Donor:
    rows, widths = len(data.ids), {len(row) for row in data.ids}
    width = next(iter(widths), 0)
    fits = len(widths) == 1 and len(data.starts) == len(data.lengths) == rows and width > 0
    if not fits or any(
        length < 1 or start + length > width for start, length in zip(data.starts, data.lengths, strict=False)
    ):
        raise InvalidEdit(f"{name}: its donor's ids, starts and lengths do not describe one batch")
    if data.tensor.shape[:1] != [rows]:
        raise InvalidEdit(f"{name}: its donor has {rows} rows of ids, and a tensor shaped {data.tensor.shape}")
    batch = Batch(ids=torch.tensor(data.ids), starts=tuple(data.starts), lengths=tuple(data.lengths))
    return Donor(tensor=_tensor(data.tensor, name), batch=batch)
