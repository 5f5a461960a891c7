"""A stream is its seed and its names, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from assay.base.errors import SpecError
from assay.base.rng import numpy_stream, stream_key, torch_stream

DRAW = """
import sys
from assay.base.rng import numpy_stream, torch_stream
import torch
names = sys.argv[1].split(",")
for name in names:
    draws = numpy_stream(7, name).random(3).tolist() + torch.rand(3, generator=torch_stream(7, name)).tolist()
    print(name, draws)
"""


def test_one_key_gives_one_stream():
    assert np.array_equal(numpy_stream(3, "a", 1).random(5), numpy_stream(3, "a", 1).random(5))
    assert torch.equal(torch.rand(5, generator=torch_stream(3, "a")), torch.rand(5, generator=torch_stream(3, "a")))


def test_the_numbers_of_a_key_never_change():
    """Recorded with numpy 2.4 and torch 2.13; a change here changes every published number."""
    assert numpy_stream(0, "bootstrap").integers(1000, size=4).tolist() == NUMPY_GOLDEN
    assert torch.randint(1000, (4,), generator=torch_stream(0, "bootstrap")).tolist() == TORCH_GOLDEN


NUMPY_GOLDEN = [550, 461, 802, 758]
TORCH_GOLDEN = [978, 277, 805, 203]


@pytest.mark.parametrize(
    ("one", "other"),
    [((0, "a"), (1, "a")), ((0, "a"), (0, "b")), ((0, "a", "b"), (0, "ab")), ((0, 1), (0, "1")), ((0,), (0, 0))],
)
def test_keys_that_differ_give_streams_that_differ(one, other):
    assert stream_key(*one) != stream_key(*other)
    assert not np.array_equal(numpy_stream(*one).random(4), numpy_stream(*other).random(4))
    assert not torch.equal(torch.rand(4, generator=torch_stream(*one)), torch.rand(4, generator=torch_stream(*other)))


def test_streams_do_not_depend_on_call_order_or_on_the_hash_seed():
    seen = []
    for order, hash_seed in (("a,b,c", "0"), ("c,a,b", "1"), ("b,c,a", "123")):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", DRAW, order]
        seen.append(
            sorted(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split("\n"))
        )
    assert seen[0] == seen[1] == seen[2]
    assert "a [" in "".join(seen[0])


def test_drawing_from_one_stream_moves_no_other_and_not_the_global_ones():
    torch.manual_seed(0)
    expected_global = torch.rand(2)
    expected = numpy_stream(1, "b").random(3)
    torch.manual_seed(0)
    numpy_stream(1, "a").random(1000)
    torch.rand(1000, generator=torch_stream(1, "a"))
    assert np.array_equal(numpy_stream(1, "b").random(3), expected)
    assert torch.equal(torch.rand(2), expected_global)


def test_streams_of_neighbouring_seeds_are_unrelated():
    draws = np.stack([numpy_stream(seed, "x").standard_normal(2000) for seed in range(30)])
    correlations = np.corrcoef(draws)[np.triu_indices(30, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(2000)  # 435 pairs; 5 sd
    assert abs(correlations.mean()) < 5 / np.sqrt(2000 * correlations.size)


def test_numpy_integers_are_seeds_like_any_other():
    assert stream_key(np.int64(3), "a", np.int32(1)) == stream_key(3, "a", 1)


@pytest.mark.parametrize("key", [(0.5, "a"), ("0", "a"), (True, "a"), (0, 1.5), (0, None), (0, False)])
def test_other_keys_are_refused(key):
    with pytest.raises(SpecError, match="got"):
        stream_key(*key)
