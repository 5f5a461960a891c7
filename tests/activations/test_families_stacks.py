"""Encoder-decoders, images and audio as a user meets them: inputs, names, positions, sweeps and generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_facts import inputs
from family_models import Built, built, close
from torch import Tensor

import assay
from assay.base.errors import InvalidEdit, SiteNotFired, SpecError, UnknownSite
from assay.subjects.tiny import tiny_model

PAIRS = ("t5", "bart", "whisper")
VECTOR = torch.linspace(-2.0, 3.0, 32)


@pytest.fixture(params=PAIRS, name="pair")
def _pair(request: pytest.FixtureRequest) -> Built:
    return built(request.param)


def source(pair: Built) -> dict[str, Tensor]:
    """The encoder's input, one row, without the decoder's."""
    return {name: value[:1] for name, value in pair.called.items() if not name.startswith("decoder_")}


# Inputs


def test_pixels_are_an_input() -> None:
    for name in ("vit", "dinov2", "clip_vision_model", "siglip_vision_model"):
        family = built(name)
        pixels = family.called["pixel_values"]
        run = family.subject.run(pixels, capture="blocks.*.attn.pattern")
        expected = family.subject.run({"pixel_values": pixels}, capture="blocks.*.attn.pattern")
        assert torch.equal(run.logits, expected.logits)
        pattern = run["blocks.1.attn.pattern"]
        assert pattern.dims == ("batch", "head", "query", "key")
        assert close(pattern.sum(-1), torch.ones(pattern.shape[:-1]), 1e-5)
        with pytest.raises(SpecError, match=r"reads image: give pixels \[batch, channel, height, width\]"):
            family.subject.run(torch.tensor([[5, 6, 7]]))
        with pytest.raises(SpecError, match="reads image and not text"):
            family.subject.run("a text")


def test_two_towers_need_both_inputs() -> None:
    subject, called = built("clip").subject, built("clip").called
    for alone in (called["pixel_values"], called["input_ids"]):
        with pytest.raises(SpecError, match="reads images and text together: give 'pixel_values' and 'input_ids'"):
            subject.run(alone)
    run = subject.run(called, capture=["vision.blocks.*.resid_post", "text.blocks.*.resid_post"])
    assert run["vision.blocks.0.resid_post"].shape == (2, 5, 32)
    assert run["text.blocks.1.resid_post"].shape == (2, 7, 32)


@torch.no_grad()
def test_audio_features_are_an_input_and_the_decoder_starts_by_itself() -> None:
    family = built("whisper")
    features = family.called["input_features"]
    run = family.subject.run(features, capture="decoder.blocks.*.cross_attn.pattern")
    start = torch.full((2, 1), family.module.config.decoder_start_token_id)
    expected = family.module(input_features=features, decoder_input_ids=start).logits
    assert torch.equal(run.logits, expected.detach())
    assert run["decoder.blocks.1.cross_attn.pattern"].shape == (2, 4, 1, 8)


@torch.no_grad()
def test_ids_are_the_encoders_and_the_decoder_starts_by_itself() -> None:
    for name in ("t5", "bart", "marian"):
        family = built(name)
        ids = family.called["input_ids"]
        start = torch.full((2, 1), family.module.config.decoder_start_token_id)
        expected = family.module(input_ids=ids, decoder_input_ids=start).logits.detach()
        assert torch.equal(family.subject.run(ids).logits, expected)
        assert torch.equal(family.subject.run({"input_ids": ids}).logits, expected)
        shifted = family.subject.run({"input_ids": ids, "labels": ids}, capture="decoder.blocks.0.resid_pre")
        assert shifted["decoder.blocks.0.resid_pre"].shape == (2, 7, 32)


def test_inputs_of_different_rows_are_refused(pair: Built) -> None:
    with pytest.raises(SpecError, match=r"one number of rows; these have \[1, 2\]"):
        pair.subject.run(source(pair) | {"decoder_input_ids": torch.ones(2, 3, dtype=torch.long)})


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_texts_are_padded_where_the_model_bears_it(name: str, tiny_tokenizer: Any) -> None:
    subject: Any = assay.load(tiny_model(name, vocab_size=128), tokenizer=tiny_tokenizer)
    texts = ["When Mary went to the store", "When John"]
    run = subject.run(texts, capture=["encoder.blocks.1.resid_post", "decoder.blocks.1.resid_post"])
    for row, text in enumerate(texts):
        alone = subject.run(text, capture=["encoder.blocks.1.resid_post", "decoder.blocks.1.resid_post"])
        assert close(run.logits[row], alone.logits[0], 1e-5)
        encoder = run.batch.of("encoder")
        start, length = encoder.starts[row], encoder.lengths[row]
        found = run["encoder.blocks.1.resid_post"][row, start : start + length]
        assert close(found, alone["encoder.blocks.1.resid_post"][0], 1e-5)
    if name == "bart":
        with pytest.raises(SpecError, match="padded on the left: pad on the right"):
            subject.run(texts, padding="left")
    edit = assay.Add("encoder.blocks.0.resid_post", VECTOR, positions=assay.At(" Mary"), rows=0)
    mary = subject.tokenizer(texts[0])["input_ids"].index(subject.tokenizer(" Mary")["input_ids"][0])
    by_number = assay.Add("encoder.blocks.0.resid_post", VECTOR, positions=mary, rows=0)
    assert torch.equal(subject.run(texts, edits=[edit]).logits, subject.run(texts, edits=[by_number]).logits)


# Names


def test_names_say_which_stack(pair: Built) -> None:
    for name in ("blocks.0.attn.z", "blocks.*.attn.z", "embed", "blocks.0-1.hook_resid_pre"):
        with pytest.raises(UnknownSite, match=r"say 'encoder\.") as refused:
            pair.subject.run(pair.called, capture=name)
        assert refused.match(r"or 'decoder\.")
    with pytest.raises(UnknownSite, match=r"say 'encoder\.blocks\.0\.attn\.z' or 'decoder\.blocks\.0\.attn\.z'"):
        pair.subject.run(pair.called, edits=[assay.Scale("blocks.0.attn.z", 0.0)])
    with pytest.raises(UnknownSite, match=r"has no site 'decoder\.blocks\.0\.attn\.z'; say 'blocks\.0\.attn\.z'"):
        built("llama").subject.run(built("llama").x, capture="decoder.blocks.0.attn.z")
    with pytest.raises(UnknownSite, match=r"no site 'encoder\.blocks\.0\.cross_attn\.z'"):
        pair.subject.run(pair.called, capture="encoder.blocks.0.cross_attn.z")
    names = ["decoder.blocks.*.cross_attn.pattern", "encoder.blocks.*.hook_attn_out"]
    run = pair.subject.run(pair.called, capture=names)
    assert len(run.captured) == 4
    n_keys = run["encoder.blocks.0.attn.out"].shape[1]
    assert run["decoder.blocks.1.cross_attn.pattern"].shape == (2, 4, 5, n_keys)


# Positions


def test_positions_are_those_of_the_sites_own_stack(pair: Built) -> None:
    subject, called = pair.subject, {name: value[:1] for name, value in pair.called.items()}
    n = subject.run(called, capture="encoder.blocks.0.resid_pre")["encoder.blocks.0.resid_pre"].shape[1]
    key, query = "decoder.blocks.1.cross_attn.k", "decoder.blocks.1.cross_attn.q"
    scores = "decoder.blocks.1.cross_attn.scores"
    plain = subject.run(called, capture=scores)[scores]
    for site, size, axis in ((key, n, 3), (query, 5, 2)):
        for position in (0, size - 1, "last", -2):
            found = subject.run(called, capture=scores, edits=[assay.Add(site, VECTOR[:8], positions=position)])[scores]
            changed = (found != plain).any(tuple({0, 1, 2, 3} - {axis})) if False else (found != plain)
            other = [d for d in range(4) if d != axis]
            at = changed.amax(other).nonzero().flatten().tolist()
            assert at == [size - 1 if position == "last" else position % size]
        with pytest.raises(InvalidEdit, match=f"position {size} is outside a prompt of {size} tokens"):
            subject.run(called, edits=[assay.Add(site, VECTOR[:8], positions=size)])


# Sweeps


@pytest.mark.parametrize("name", [*PAIRS, "vit", "clip", "bert", "modernbert"])
def test_sweeps_are_runs_one_by_one(name: str) -> None:
    family = built(name)
    subject = family.subject
    x = family.x[:1] if isinstance(family.x, Tensor) else {key: value[:1] for key, value in family.x.items()}
    pairs = "decoder" in subject.stacks
    first, last = (("encoder.", "decoder.") if pairs else ("vision.", "text.")) if len(subject.stacks) > 1 else ("", "")
    cells: list[Any] = [assay.Ablate(f"{first}blocks.0.attn.z", heads=head) for head in range(2)]
    cells += [assay.Add(f"{last}blocks.1.resid_pre", VECTOR, positions=p) for p in (0, -1)]
    cells += [assay.Scale(f"{last}blocks.0.mlp.post", 0.5), (cells[0], cells[2])]
    cells += [assay.Ablate("decoder.blocks.1.cross_attn.z.1")] if pairs else []

    def metric(logits: Tensor) -> Tensor:
        return (logits.flatten(1) * torch.linspace(-1.0, 1.0, logits[0].numel())).sum(1)

    found = subject.sweep(x, cells, metric)
    for value, cell in zip(found, cells, strict=True):
        expected = metric(subject.run(x, edits=cell if isinstance(cell, tuple) else [cell]).logits)[0]
        assert float(value) == pytest.approx(float(expected), rel=1e-4, abs=1e-4)


# Generation


def forced(pair: Built, generated: Tensor, **more: Any) -> Any:
    """One forward over what was generated, its last token aside."""
    return pair.subject.run(source(pair) | {"decoder_input_ids": generated[:, :-1]}, **more)


def test_generation_without_edits_is_the_modules_own(pair: Built) -> None:
    given = {**source(pair)}
    expected = pair.module.generate(**given, max_new_tokens=5, do_sample=False)
    found = pair.subject.generate(given, max_new_tokens=5)
    own = found.generated[:, 1:] if pair.row.name == "whisper" else found.generated  # Whisper's leaves its start out
    assert torch.equal(own, expected)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("apply_to", ["prompt", "new", "all"])
def test_generation_with_edits_is_the_forced_forward(pair: Built, apply_to: str, cache: bool) -> None:
    """Greedy tokens, logits and captures of an edited generation are those of one forward with the same edits."""
    edits: list[Any] = [assay.Add("decoder.blocks.0.resid_post", VECTOR, scale=0.3)]
    seen = ["decoder.blocks.1.resid_post", "decoder.blocks.1.cross_attn.pattern", "decoder.blocks.0.attn.z"]
    there = ["encoder.blocks.1.resid_post", "decoder.blocks.1.cross_attn.k", "decoder.blocks.1.cross_attn.rot_k"]
    if apply_to != "new":
        edits += [assay.Add("encoder.blocks.0.resid_post", VECTOR, positions=[1, -1])]
        edits += [assay.Scale("decoder.blocks.1.cross_attn.v", 0.5, positions=2)]
        seen += there
    run = pair.subject.generate(
        source(pair), edits=edits, capture=seen, apply_to=apply_to, max_new_tokens=5, eos_token_id=None, use_cache=cache
    )
    n = run.generated.shape[1] - 1
    columns = {"prompt": slice(0, 1), "new": slice(1, None), "all": slice(None)}[apply_to]
    same = [assay.Add("decoder.blocks.0.resid_post", VECTOR, scale=0.3, positions=columns), *edits[1:]]
    expected = forced(pair, run.generated, edits=same, capture=seen)
    assert n == 5
    assert torch.equal(expected.logits[0].argmax(-1), run.generated[0, 1:])
    assert close(run.logits, expected.logits, 1e-5)
    for site in seen:
        part = expected[site]
        if site not in there:
            part = part[:, :, columns] if "pattern" in site else part[:, columns]
        assert run[site].shape == part.shape, site
        assert close(run[site], part, 1e-5), site


def test_new_tokens_do_not_reach_the_encoder(pair: Built) -> None:
    with pytest.raises(SiteNotFired, match=r"encoder\.blocks\.0\.resid_post.*apply_to"):
        pair.subject.generate(
            source(pair), edits=[assay.Add("encoder.blocks.0.resid_post", VECTOR)], apply_to="new", max_new_tokens=2
        )


def test_a_decoder_goes_on_from_its_prompt(pair: Built) -> None:
    start = pair.module.config.decoder_start_token_id
    prompt = torch.tensor([[start, 9, 12]])
    given = source(pair) | {"decoder_input_ids": prompt}
    edits = [assay.Add("decoder.blocks.0.resid_post", VECTOR, scale=0.3, positions=2)]
    seen = ["decoder.blocks.1.resid_post"]
    run = pair.subject.generate(
        given, edits=edits, capture=seen, apply_to="prompt", max_new_tokens=3, eos_token_id=None
    )
    expected = forced(pair, run.generated, edits=edits, capture=seen)
    assert torch.equal(run.generated[:, :3], prompt)
    assert torch.equal(expected.logits[0, 2:].argmax(-1), run.generated[0, 3:])
    assert close(run[seen[0]], expected[seen[0]][:, :3], 1e-5)
    if pair.row.name != "whisper":
        with pytest.raises(SpecError, match=f"must begin with the token that this decoder starts with, {start}"):
            pair.subject.generate(source(pair) | {"decoder_input_ids": prompt[:, 1:]}, max_new_tokens=2)


def test_what_reads_images_does_not_generate() -> None:
    with pytest.raises(SpecError, match="does not generate"):
        built("vit").subject.generate(inputs("image")["pixel_values"])
