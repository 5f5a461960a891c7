"""A tuned lens begins as the logit lens, learns to be nearer to the output, and belongs to one unembedding."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import assay
from assay.base.errors import DamagedFile, SpecError
from assay.directions.tuned_lens import TunedLens, lens_divergence, lens_sites, train_tuned_lens, unembedding_hash


def ids(n: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 128, (n, 12), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def subject(tiny_module: Any) -> Any:
    return assay.load(tiny_module("llama"))


@pytest.fixture(scope="module")
def lens(subject: Any) -> TunedLens:
    return train_tuned_lens(subject, ids(128, 0), steps=40, batch=16, optimiser="adam", lr=2e-2)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_untrained_it_is_the_logit_lens(family: str, tiny_module: Any) -> None:
    subject = assay.load(tiny_module(family))
    sites = lens_sites(subject)
    d = subject.parts.d_model
    zero = TunedLens(
        sites=sites,
        weight=torch.zeros(len(sites), d, d),
        bias=torch.zeros(len(sites), d),
        unembedding=unembedding_hash(subject),
    )
    run = subject.run(ids(2, 1), capture=list(sites))
    with torch.no_grad():
        for site in sites:
            assert torch.equal(zero.logits(subject, site, run[site]), subject.parts.logits(run[site]).float())
    for found in lens_divergence(subject, zero, ids(3, 2)):
        assert found.logit_lens == found.tuned_lens > 0


def test_training_brings_every_layer_nearer_to_the_output_on_other_text(subject: Any, lens: TunedLens) -> None:
    for found in lens_divergence(subject, lens, ids(12, 1)):
        assert found.tuned_lens < found.logit_lens
        assert found.gain is not None and found.gain.low > 0
    assert lens.losses[-1] < lens.losses[0]
    assert lens.sites == ("blocks.0.resid_pre", "blocks.0.resid_post", "blocks.1.resid_post")


def test_the_published_optimiser_trains_too_and_the_first_loss_is_the_logit_lens(subject: Any) -> None:
    rows = ids(32, 3)
    lens = train_tuned_lens(subject, rows, steps=10, batch=32)
    whole = [found.logit_lens for found in lens_divergence(subject, lens, rows)]
    assert lens.losses[0] == pytest.approx(sum(whole) / len(whole), rel=1e-3)
    assert lens.losses[-1] < lens.losses[0]


def test_heavy_decay_keeps_it_at_the_logit_lens(subject: Any, lens: TunedLens) -> None:
    rows = ids(64, 0)
    free, held = (train_tuned_lens(subject, rows, steps=8, batch=8, decay=decay) for decay in (0.0, 5.0))
    assert float(held.weight.norm()) < 0.5 * float(free.weight.norm())


def test_the_subject_is_untouched(tiny_module: Any) -> None:
    module = tiny_module("gpt2")
    before = {name: p.clone() for name, p in module.named_parameters()}
    train_tuned_lens(assay.load(module), ids(8, 0), steps=2, batch=4)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None and parameter.requires_grad


def test_a_file_gives_it_back_and_another_unembedding_refuses_it(
    subject: Any, lens: TunedLens, tiny_module: Any, tmp_path: Path
) -> None:
    path = tmp_path / "lens.safetensors"
    lens.save(path)
    back = TunedLens.load(path, subject)
    assert torch.equal(back.weight, lens.weight) and torch.equal(back.bias, lens.bias)
    assert (back.sites, back.unembedding, back.losses, back.origin) == (
        lens.sites, lens.unembedding, lens.losses, lens.origin,
    )  # fmt: skip
    for changed in ("lm_head.weight", "model.norm.weight"):
        other = tiny_module("llama")
        with torch.no_grad():
            other.get_parameter(changed)[0].mul_(2.0)
        foreign = assay.load(other)
        with pytest.raises(SpecError, match="train one for it"):
            TunedLens.load(path, foreign)
        with pytest.raises(SpecError, match="train one for it"):
            lens_divergence(foreign, lens, ids(1, 0))
    inside = tiny_module("llama")
    with torch.no_grad():
        inside.model.layers[0].mlp.down_proj.weight.mul_(2.0)
    lens.check(assay.load(inside))  # a lens goes with the unembedding, not with the blocks
    (tmp_path / "other").write_bytes(b"x")
    with pytest.raises(DamagedFile):
        TunedLens.load(tmp_path / "other")


def test_what_does_not_fit_is_refused(subject: Any, lens: TunedLens) -> None:
    with pytest.raises(SpecError, match=r"not blocks\.2\.resid_post"):
        lens.translated("blocks.2.resid_post", torch.zeros(1, 32))
    with pytest.raises(SpecError, match="give a list"):
        train_tuned_lens(subject, ids(1, 0)[:0])
    with pytest.raises(SpecError, match="give a list"):
        lens_divergence(subject, lens, ids(1, 0)[:0])


def test_texts_of_any_length_are_read_without_their_padding(tiny_subject: Any) -> None:
    texts = ["When Mary and John went to the store", "Paris"]
    lens = train_tuned_lens(tiny_subject, texts, steps=1, batch=2)
    tokens = [len(tiny_subject.run(text).batch.ids[0]) for text in texts]
    each = [[f.logit_lens for f in lens_divergence(tiny_subject, lens, [text])] for text in texts]
    weighted = torch.tensor(tokens).double() @ torch.tensor(each).double() / sum(tokens)
    assert lens.losses[0] == pytest.approx(float(weighted.mean()), rel=1e-3)


def test_it_trains_to_what_the_package_tuned_lens_trains_to() -> None:
    here = Path(__file__).parent
    golden = json.loads((here / "golden_tuned_lens.json").read_text())
    spec = importlib.util.spec_from_file_location("golden", here / golden["origin"]["script"])
    assert spec is not None and spec.loader is not None
    made: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    rows = torch.from_numpy(made.rows())
    lens = train_tuned_lens(assay.load(made.model()), rows, steps=made.STEPS, batch=len(rows))
    assert lens.losses == pytest.approx(golden["losses"], rel=1e-4)
    assert torch.allclose(lens.weight, torch.tensor(golden["weight"]), atol=1e-5)
    assert torch.allclose(lens.bias, torch.tensor(golden["bias"]), atol=1e-5)
    assert float(lens.weight.abs().max()) > 1e-2
