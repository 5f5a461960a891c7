"""One value, one text, one hash: in any order, in any process."""

from __future__ import annotations

import enum
import hashlib
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from assay.base.errors import SpecError
from assay.base.hashing import canonical_json, digest, file_sha256, plain

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


class Colour(enum.Enum):
    RED = "red"


class Spec(BaseModel):
    prompt: str = "a"
    scale: float = 1
    layers: tuple[int, ...] = (1, 2)


class LooseSpec(BaseModel):
    names: set[str] = {"a", "b"}


def test_the_text_is_the_written_one():
    value = {"b": [1, 1.0, 0.1, -0.0], "a": {"z": None, "y": True}, "é": "\n"}
    assert canonical_json(value) == '{"a":{"y":true,"z":null},"b":[1,1.0,0.1,-0.0],"\\u00e9":"\\n"}'


def test_the_digest_is_the_head_of_the_sha256_of_the_text():
    assert digest({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()[:32]


@given(JSON)
def test_reading_the_text_gives_the_value_back(value):
    assert json.loads(canonical_json(value)) == value


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_the_order_of_keys_does_not_matter(value):
    assert digest(dict(reversed(value.items()))) == digest(value)


@pytest.mark.parametrize(
    ("value", "same"),
    [
        (np.float64(0.1), 0.1),
        (np.int64(3), 3),
        (np.bool_(True), True),
        ((1, (2,)), [1, [2]]),
        (Colour.RED, "red"),
        (Spec(), {"prompt": "a", "scale": 1.0, "layers": [1, 2]}),
        ({"spec": Spec()}, {"spec": {"prompt": "a", "scale": 1.0, "layers": [1, 2]}}),
    ],
)
def test_values_that_mean_the_same_hash_the_same(value, same):
    assert digest(value) == digest(same)


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), ("1", 1), (None, "null"), ([], {}), (True, 1), ([1, 2], [12])])
def test_values_that_differ_hash_differently(one, other):
    assert digest(one) != digest(other)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [0.0, math.nan]}, "value.a[1] is nan"),
        (np.float32(np.inf), "value is inf"),
        ({1: "a"}, "the key 1 of type int"),
        ({"a": {1, 2}}, "value.a has type set"),
        (np.zeros(2), "value has type ndarray"),
        (Spec, "value has type ModelMetaclass"),
        (Spec(scale=math.nan), "value.scale is nan"),
        (LooseSpec(), "value.names is a set"),
    ],
)
def test_what_has_no_canonical_form_is_refused_with_its_place(value, place):
    with pytest.raises(SpecError) as caught:
        canonical_json(value)
    assert place in str(caught.value)


def test_plain_values_hold_builtin_types_only():
    converted = plain({"a": (np.float32(0.5), np.int8(2), np.str_("x"))})
    assert converted == {"a": [0.5, 2, "x"]}
    assert [type(item) for item in converted["a"]] == [float, int, str]


def test_a_digest_is_the_same_in_processes_with_other_hash_seeds():
    code = "from assay.base.hashing import digest; print(digest({k: [k, 0.1] for k in {'x', 'y', 'layer', 'head'}}))"
    here = digest({k: [k, 0.1] for k in ("x", "y", "layer", "head")})
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == here


def test_the_hash_of_a_file_is_that_of_its_bytes_and_progress_reaches_the_end(tmp_path):
    content = bytes(range(256)) * 10_000  # more than two pieces
    path = tmp_path / "weights.bin"
    path.write_bytes(content)
    seen: list[tuple[int, int]] = []
    assert file_sha256(path, lambda done, total: seen.append((done, total))) == hashlib.sha256(content).hexdigest()
    assert len(seen) == 3
    assert seen[-1] == (len(content), len(content))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_empty_file_has_a_hash(tmp_path):
    path = tmp_path / "empty"
    path.touch()
    assert file_sha256(str(path)) == hashlib.sha256(b"").hexdigest()
