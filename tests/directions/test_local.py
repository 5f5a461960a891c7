"""The local-processing test: 1 where the context cannot matter, the floor where documents are unrelated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import assay
from assay.base.errors import NumericalError, SpecError
from assay.directions.local import local_processing


def ids(n: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (n, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def subject(tiny_module: Any) -> Any:
    return assay.load(tiny_module("llama"))


def test_the_whole_context_is_itself_and_more_of_it_is_nearer(subject: Any) -> None:
    found = local_processing(subject, ids(20, 16), ks=(1, 4, 15, 16))
    assert found.sites == ("blocks.0.resid_post", "blocks.1.resid_post", "blocks.2.resid_post")
    assert found.cosine[:, 3] == pytest.approx(1.0)
    assert (found.cosine[:, 2] > found.cosine[:, 0]).all()
    assert (found.cosine > found.floor).all()
    assert found.cosine[1, 1] in found.interval("blocks.1.resid_post", 4)


def test_where_attention_writes_nothing_one_token_is_enough(tiny_module: Any) -> None:
    module = tiny_module("llama")
    with torch.no_grad():
        for layer in module.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    found = local_processing(assay.load(module), ids(10, 12), ks=(1, 5))
    assert found.cosine == pytest.approx(np.ones((3, 2)), abs=1e-5)


def test_the_floor_is_the_mean_over_all_other_documents(subject: Any) -> None:
    rows = ids(6, 9)
    site = "blocks.1.resid_post"
    found = local_processing(subject, rows, ks=(3,), sites=site, bos=1)
    full = torch.stack([subject.run(row[None], capture=site)[site][0, -1] for row in rows]).double()
    short = [torch.cat([torch.tensor([1]), row[-3:]]) for row in rows]
    cut = torch.stack([subject.run(row[None], capture=site)[site][0, -1] for row in short]).double()
    table = torch.nn.functional.cosine_similarity(
        (full - full.mean(0))[:, None], (cut - full.mean(0))[None], dim=-1
    ).numpy()
    assert found.by_document[0, 0] == pytest.approx(np.diagonal(table), abs=1e-5)
    assert found.floor[0, 0] == pytest.approx(table[~np.eye(6, dtype=bool)].mean(), abs=1e-5)


def test_centring_takes_out_what_all_tokens_share(tiny_module: Any) -> None:
    """A constant in the stream lifts the raw cosine of unrelated tokens to 1; the centred floor stays where it was."""
    module = tiny_module("gpt2")
    plain = local_processing(assay.load(module), ids(16, 10), ks=(2,), sites="blocks.2.resid_post").floor
    with torch.no_grad():
        module.transformer.h[2].mlp.c_proj.bias.add_(100.0)
    shifted = local_processing(assay.load(module), ids(16, 10), ks=(2,), sites="blocks.2.resid_post").floor
    assert shifted == pytest.approx(plain, abs=1e-3)
    assert abs(float(plain[0, 0])) < 0.3


def test_texts_are_read_with_the_tokenizers_start(tiny_subject: Any) -> None:
    texts = [
        "When Mary and John went to the store John gave a drink",
        "The capital of France is Paris and John went to the store",
        "a drink of milk and a drink to Mary and John went",
    ]
    found = local_processing(tiny_subject, texts, ks=(2, 5))
    assert found.n == 3 and found.cosine.shape == (6, 2) and np.isfinite(found.floor).all()


def test_what_cannot_be_measured_is_refused(subject: Any) -> None:
    with pytest.raises(SpecError, match="three or more"):
        local_processing(subject, ids(2, 8), ks=(1,))
    with pytest.raises(SpecError, match="shortest document has 8 tokens"):
        local_processing(subject, ids(4, 8), ks=(1, 9))
    with pytest.raises(SpecError, match="1 or more"):
        local_processing(subject, ids(4, 8), ks=(0,))
    with pytest.raises(SpecError, match="dimensions; give sites"):
        local_processing(subject, ids(4, 8), ks=(1,), sites="blocks.0.attn.z")
    with pytest.raises(NumericalError, match="vary the texts"):
        local_processing(subject, ids(1, 8).repeat(4, 1), ks=(1,))
    found = local_processing(subject, ids(4, 8), ks=(1,))
    with pytest.raises(SpecError, match="was not measured"):
        found.interval("blocks.9.resid_post", 1)
