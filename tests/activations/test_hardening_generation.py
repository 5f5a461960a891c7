"""Generation refuses what edits and captures cannot follow, and raw sites cover what the standard ones do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch

import assay
from assay.base.errors import Cancelled, SiteError, SpecError
from assay.subjects.tiny import tiny_model

IDS = torch.tensor([[5, 17, 33, 64, 9, 101, 42], [8, 90, 2, 11, 54, 3, 19]])
FOUR: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None}


@pytest.fixture
def untyped() -> Iterator[None]:
    """Types are not checked at run time, as they are not for users: what is wrong reaches assay's own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("start", ["generate", "stream"])
def test_options_that_edits_cannot_follow_are_refused(start: str, tiny_module: Any) -> None:
    module = tiny_module("llama")
    begin = getattr(assay.load(module), start)
    cache = module(IDS[:, :4], use_cache=True).past_key_values
    called: list[int] = []
    handle = module.register_forward_pre_hook(lambda *_: called.append(1))
    with pytest.raises(SpecError, match="past_key_values= holds tokens"):
        begin(IDS, past_key_values=cache, **FOUR)
    with pytest.raises(SpecError, match="past_key_values= holds tokens"):
        begin({"input_ids": IDS[:, 4:], "past_key_values": cache}, **FOUR)
    with pytest.raises(SpecError, match="guidance_scale=1"):
        begin(IDS, guidance_scale=1.5, **FOUR)
    for name in ("attention_mask", "mask", "input_ids", "inputs", "inputs_embeds", "decoder_input_ids"):
        with pytest.raises(SpecError, match=f"{name}= would be the prompts once more"):
            begin(IDS, **{name: torch.ones_like(IDS)}, **FOUR)
    with pytest.raises(SpecError, match="max_new_tokens="):
        begin(IDS, max_length=20)
    for wrong in (0, 2.5, "3", True):
        with pytest.raises(SpecError, match="max_new_tokens="):
            begin(IDS, max_new_tokens=wrong)
    for options in ({"temprature": 0.5}, {"do_sample": True, "temperature": 0.0}, {"generation_config": 3}):
        with pytest.raises(SpecError, match=r"LlamaForCausalLM\.generate refuses this"):
            begin(IDS, **options, **FOUR)
    handle.remove()
    assert not called, "nothing ran"
    assert cache.get_seq_length() == 4


def test_a_guidance_scale_of_one_is_no_guidance(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    plain = subject.generate(IDS, **FOUR).generated
    assert torch.equal(subject.generate(IDS, guidance_scale=1.0, **FOUR).generated, plain)
    subject.module.generation_config.guidance_scale = 2.0
    try:
        with pytest.raises(SpecError, match="guidance_scale=1"):
            subject.generate(IDS, **FOUR)
    finally:
        subject.module.generation_config.guidance_scale = None


RAW = [
    "model.layers.0.mlp.out",
    "model.layers.1.self_attn.q_proj.in",
    "model.embed_tokens.in",
    "lm_head.in",
    "lm_head.out",
]


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("apply_to", ["prompt", "new", "all"])
def test_raw_sites_cover_the_same_tokens_with_and_without_a_cache(name: str, apply_to: Any, tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    site = f"module:{name}"
    found = [
        subject.generate(IDS, [], site, apply_to=apply_to, use_cache=use_cache, **FOUR) for use_cache in (True, False)
    ]
    stream = subject.stream(IDS, [], site, apply_to=apply_to, **FOUR)
    for _ in stream:
        pass
    whole = subject.run(found[0].generated[:, :-1], capture=site)[site]
    low, high = {"prompt": (0, 7), "new": (7, 10), "all": (0, 10)}[apply_to]
    for run in (*found, stream.run):
        assert torch.allclose(run[site].float(), whole[:, low:high].float(), atol=1e-4)


def test_raw_edits_at_the_unembedding_are_those_of_the_standard_site(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    value = torch.randn(32, generator=torch.Generator().manual_seed(0))
    for apply_to in ("prompt", "all"):
        runs = [
            subject.generate(
                IDS, [assay.Add(site, value, positions=-1)], apply_to=apply_to, use_cache=use_cache, **FOUR
            )
            for site in ("final_norm", "module:lm_head.in")
            for use_cache in (True, False)
        ]
        for run in runs[1:]:
            assert torch.allclose(run.logits, runs[0].logits, atol=1e-4)


def test_raw_captures_without_positions_are_not_joined_wrongly() -> None:
    subject = assay.load(tiny_model("mixtral"))
    ids, site = IDS % 60, "module:model.layers.0.mlp.gate.out"  # rows and positions in one dimension
    with pytest.raises(SiteError, match="cannot be joined"):
        subject.generate(ids, [], site, apply_to="all", **FOUR)
    with pytest.raises(SiteError, match="which of its dimensions has the positions"):
        subject.generate(ids, [], site, apply_to="prompt", use_cache=False, **FOUR)
    assert subject.generate(ids, [], site, apply_to="prompt", **FOUR)[site].shape[0] == ids.numel()
    steps = [step.captured[site].shape[0] for step in subject.stream(ids, [], site, apply_to="all", keep=False, **FOUR)]
    assert steps == [14, 2, 2, 2]


def test_threads_share_a_stream_token_by_token(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    expected = subject.generate(IDS, max_new_tokens=24, eos_token_id=None).generated
    stream = subject.stream(IDS, max_new_tokens=24, eos_token_id=None)
    indices: list[int] = []
    errors: list[BaseException] = []

    def take() -> None:
        try:
            for step in stream:
                indices.append(step.index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(indices) == list(range(24))
    assert torch.equal(stream.run.generated, expected)


def test_a_stream_asked_from_within_its_own_step_says_so(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    held: list[Any] = []
    inner = assay.Apply("blocks.0.mlp.out", lambda x: (next(held[0]), x)[1])
    held.append(subject.stream(IDS, [inner], apply_to="all", **FOUR))
    with pytest.raises(SpecError, match="making a token already"):
        next(held[0])


def test_a_stream_that_failed_does_not_look_finished(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    calls: list[int] = []

    def third(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return x

    stream = subject.stream(IDS, [assay.Apply("blocks.0.mlp.out", third)], apply_to="all", **FOUR)
    with pytest.raises(RuntimeError, match="out of luck"):
        list(stream)
    for _ in range(2):
        with pytest.raises(SpecError, match="ended with an error, RuntimeError: out of luck"):
            next(stream)
    assert stream.run.generated.shape == (2, 9), "what was made is kept"

    event = threading.Event()
    with assay.limits(cancel=event):
        stopped = subject.stream(IDS, **FOUR)
        next(stopped)
        event.set()
        with pytest.raises(Cancelled):
            next(stopped)
        with pytest.raises(SpecError, match="Cancelled"):
            next(stopped)
    closed = subject.stream(IDS, **FOUR)
    closed.close()
    assert list(closed) == [], "closing is no error"


def test_a_cancel_function_that_fails_ends_the_run_with_its_error(tiny_module: Any) -> None:
    module = tiny_module("llama")
    subject = assay.load(module)

    def broken() -> bool:
        raise LookupError("no such job")

    with assay.limits(cancel=broken), pytest.raises(LookupError, match="no such job"):
        subject.run(IDS, capture="blocks.*.mlp.out")
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
