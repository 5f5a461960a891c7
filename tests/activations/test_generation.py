"""Generation under the module's own cache: the same as without one, edits where they were said to be."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

import pytest
import torch
from oracle import run_with, sites
from torch import Tensor, nn

import assay
from assay.activations.decoding import TextSoFar, draw_from_streams
from assay.base.errors import AssayError, Cancelled, SiteNotFired, SpecError
from assay.subjects.tiny import tiny_model

IDS = torch.tensor([[5, 17, 33, 64, 9, 101, 42]])
SMALL = IDS % 60


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_without_edits_it_is_the_modules_own(family: str, tiny_module: Any) -> None:
    module = tiny_module(family)
    subject = assay.load(module)
    expected = module.generate(IDS, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(IDS))
    run = subject.generate(IDS, max_new_tokens=6)
    assert torch.equal(run.generated, expected)
    with torch.no_grad():
        again = module(run.generated[:, :-1]).logits[:, IDS.shape[1] - 1 :]
    assert torch.allclose(run.logits, again, atol=1e-4)


@pytest.mark.parametrize("apply_to", ["prompt", "new", "all"])
def test_with_and_without_a_cache_agree(family: str, apply_to: Any, tiny_module: Any) -> None:
    subject = assay.load(tiny_module(family))
    value = 2 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    edits = [assay.Add("blocks.1.resid_post", value), assay.Scale("blocks.0.attn.z.1", 0.0)]
    capture = ["blocks.2.resid_post", "blocks.1.attn.z"]
    cached = subject.generate(IDS, edits, capture, apply_to=apply_to, max_new_tokens=5)
    plain = subject.generate(IDS, edits, capture, apply_to=apply_to, max_new_tokens=5, use_cache=False)
    assert torch.equal(cached.generated, plain.generated)
    assert torch.allclose(cached.logits, plain.logits, atol=1e-4)
    for name in capture:
        assert cached[name].shape[1] == {"prompt": 7, "new": 4, "all": 11}[apply_to]
        assert torch.allclose(cached[name], plain[name], atol=1e-4)
    untouched = subject.generate(IDS, max_new_tokens=5)
    assert not torch.allclose(cached.logits[:, -1], untouched.logits[:, -1], atol=1e-3)


@pytest.mark.parametrize("apply_to", ["prompt", "new", "all"])
def test_generation_equals_a_loop_with_a_raw_hook(family: str, apply_to: Any, tiny_module: Any) -> None:
    """By hand: the whole text through the module again for each token, a hook on the columns meant, and the best."""
    module = tiny_module(family)
    subject = assay.load(module)
    columns = {"prompt": slice(0, 7), "new": slice(7, None), "all": slice(None)}[apply_to]
    value = 2 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    for name in ("resid_post", "attn.out", "mlp.post"):
        spec = sites(family, 1)[f"blocks.1.{name}"]

        def change(x: Tensor) -> None:
            x[:, columns] += value.repeat(x.shape[-1] // 32)

        text, logits = IDS, []
        for _ in range(5):
            logits.append(run_with(module, text, spec, change)[:, -1])
            text = torch.cat([text, logits[-1].argmax(-1, keepdim=True)], 1)
        width = {"mlp.post": 128 if family == "gpt2" else 64}.get(name, 32)
        edit = assay.Add(f"blocks.1.{name}", value.repeat(width // 32))
        run = subject.generate(IDS, [edit], apply_to=apply_to, max_new_tokens=5, eos_token_id=None)
        assert torch.equal(run.generated, text), name
        assert torch.allclose(run.logits, torch.stack(logits, 1), atol=1e-4), name


@pytest.mark.parametrize("apply_to", ["prompt", "new", "all"])
@pytest.mark.parametrize("kind", ["bloom", "falcon", "mamba", "gpt_oss", "mixtral"])
def test_other_attention_and_state_spaces_generate_alike(kind: str, apply_to: Any) -> None:
    """ALiBi, attention sinks, experts, and a state instead of keys and values."""
    subject = assay.load(tiny_model(kind))
    site = "blocks.0.resid_post"
    width = subject.run(SMALL[:, :2], capture=site)[site].shape[-1]
    edits = [assay.Add(site, torch.randn(width, generator=torch.Generator().manual_seed(1)))]
    options: dict[str, Any] = {"apply_to": apply_to, "max_new_tokens": 4, "eos_token_id": None}
    cached, plain = (subject.generate(SMALL, edits, site, **options, use_cache=use) for use in (True, False))
    stream = subject.stream(SMALL, edits, site, **options)
    assert len(list(stream)) == 4
    for run in (plain, stream.run):
        assert torch.equal(cached.generated, run.generated)
        assert torch.allclose(cached.logits, run.logits, atol=1e-4)
        assert torch.allclose(cached[site], run[site], atol=1e-4)
    assert not torch.allclose(subject.generate(SMALL, max_new_tokens=4).logits[:, -1], cached.logits[:, -1], atol=1e-3)


def test_an_encoder_decoder_generates_from_its_encoders_text() -> None:
    """The prompt is the encoder's tokens and the decoder's start; new tokens are the decoder's."""
    module = tiny_model("bart")
    subject = assay.load(module)
    capture = ["encoder.blocks.0.resid_post", "decoder.blocks.1.resid_post", "decoder.blocks.0.cross_attn.pattern"]
    edits = [assay.Add("encoder.blocks.1.resid_post", 1.0, positions=[0, 3]), assay.Scale(capture[1], 1.5)]
    options: dict[str, Any] = {"apply_to": "all", "max_new_tokens": 4, "eos_token_id": None}
    cached, plain = (subject.generate(SMALL, edits, capture, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached.generated, plain.generated)
    assert [tuple(cached[name].shape) for name in capture] == [(1, 7, 32), (1, 4, 32), (1, 4, 4, 7)]
    assert all(torch.allclose(cached[name], plain[name], atol=1e-4) for name in capture)
    bare = subject.generate(SMALL, max_new_tokens=4, eos_token_id=None)
    expected = module.generate(SMALL, max_new_tokens=4, eos_token_id=None, do_sample=False)
    assert torch.equal(bare.generated, expected)
    with pytest.raises(SiteNotFired, match=r"encoder\.blocks"):
        subject.generate(SMALL, capture=capture[:1], apply_to="new", max_new_tokens=3)


def test_a_module_with_a_generate_of_its_own_says_that_it_gives_no_stream() -> None:
    subject = assay.load(tiny_model("whisper"))
    sound = torch.zeros(1, subject.config.num_mel_bins, 2 * subject.config.max_source_positions)
    with pytest.raises(SpecError, match="has a generate of its own"):
        subject.stream(sound, max_new_tokens=2)


def test_editing_the_prompt_is_not_editing_what_follows(tiny_module: Any) -> None:
    """The first new token depends on the prompt alone: "new" leaves its logits as they were."""
    subject = assay.load(tiny_module("llama"))
    plain = subject.generate(IDS, max_new_tokens=3)
    edit = [assay.Add("blocks.1.resid_post", torch.ones(32) * 3)]
    new = subject.generate(IDS, edit, apply_to="new", max_new_tokens=3)
    prompt = subject.generate(IDS, edit, apply_to="prompt", max_new_tokens=3)
    assert torch.equal(new.logits[:, 0], plain.logits[:, 0])
    assert not torch.allclose(prompt.logits[:, 0], plain.logits[:, 0], atol=1e-3)


def test_prompts_of_different_length_generate_as_alone(tiny_subject: Any) -> None:
    texts = ["When Mary went to the store", "When John"]
    edits = [assay.Add("blocks.2.resid_post", torch.ones(32), positions="last")]
    both = tiny_subject.generate(texts, edits, apply_to="prompt", max_new_tokens=4)
    for i, text in enumerate(texts):
        alone = tiny_subject.generate(text, edits, apply_to="prompt", max_new_tokens=4)
        assert torch.allclose(both.logits[i], alone.logits[0], atol=1e-4)


def padded() -> tuple[Tensor, Tensor]:
    ids, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    for i, row in enumerate((IDS[0], IDS[0, :4], IDS[0, 1:6])):
        ids[i, 7 - len(row) :], mask[i, 7 - len(row) :] = row, 1
    return ids, mask


@pytest.mark.parametrize("how", ["greedy", "sampled"])
@pytest.mark.parametrize("apply_to", ["prompt", "new", "all"])
def test_padded_batches_with_and_without_a_cache_agree(family: str, apply_to: Any, how: str, tiny_module: Any) -> None:
    """Every kind of edit and capture, attention's inside included, and each row as it is alone."""
    subject = assay.load(tiny_module(family))
    ids, mask = padded()
    v = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(3))  # each row its own
    sampled = {"do_sample": True, "seed": 5, "temperature": 0.8} if how == "sampled" else {}
    capture = ["blocks.1.attn.pattern", "blocks.2.attn.scores", "blocks.0.attn.k", "blocks.2.mlp.out"]

    def edits(rows: Any = None) -> list[Any]:
        value = v if rows is None else v[rows]
        return [
            assay.Add("blocks.1.resid_post", value),
            assay.Scale("blocks.1.attn.pattern.1", 0.5),
            assay.Scale("blocks.0.attn.rot_k", 0.7),
            assay.Ablate("blocks.0.mlp.out") if apply_to == "all" else assay.Scale("blocks.0.mlp.out", 0.1),
        ]

    def run(batch: Any, rows: Any = None, **options: Any) -> Any:
        options = {"apply_to": apply_to, "max_new_tokens": 4, "eos_token_id": None, **sampled, **options}
        return subject.generate(batch, edits(rows), capture, **options)

    batch = subject.tokens(ids, mask=mask)
    cached, plain = run(batch), run(batch, use_cache=False)
    assert torch.equal(cached.generated, plain.generated)
    assert torch.allclose(cached.logits, plain.logits, atol=1e-4)
    first, last = {"prompt": (0, 7), "new": (7, 10), "all": (0, 10)}[apply_to]
    for name in capture:
        keys = last if "key" in cached[name].dims else None
        assert cached[name].shape == plain[name].shape
        assert cached[name].shape[cached[name].dims.index("query" if keys else "pos")] == last - first
        for row in range(3):
            real = slice(max(0, int((mask[row] == 0).sum()) - first), None)
            a, b = (x[name][row, :, real] if keys else x[name][row, real] for x in (cached, plain))
            open_to = (a > torch.finfo(a.dtype).min / 2) & (b > torch.finfo(b.dtype).min / 2)
            assert torch.equal(a > torch.finfo(a.dtype).min / 2, b > torch.finfo(b.dtype).min / 2), name
            assert torch.allclose(a[open_to], b[open_to], atol=1e-4), name
    for row in range(3) if apply_to == "all" else ():
        alone = run(ids[row : row + 1, mask[row] == 1], rows=slice(row, row + 1))
        assert torch.equal(alone.generated[0, -4:], cached.generated[row, -4:])
        assert torch.allclose(alone.logits[0], cached.logits[row], atol=1e-4)


def test_edits_of_the_logits_and_at_chosen_prompt_positions(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    bias = torch.zeros(128).index_fill(0, torch.tensor([77]), 1e4)
    edits = [assay.Add("logits", bias), assay.Add("blocks.1.resid_post", torch.ones(32), positions=[0, -1])]
    for options in ({}, {"use_cache": False}):
        run = subject.generate(
            IDS, edits, ["logits", "blocks.1.resid_post"], apply_to="all", max_new_tokens=3, **options
        )
        assert run.generated[0, 7:].tolist() == [77, 77, 77]
        assert run["logits"].shape == (1, 9, 128)
        assert torch.allclose(run["logits"][:, -3:], run.logits, atol=1e-2)
        plain = subject.run(IDS, edits=edits, capture="blocks.1.resid_post")["blocks.1.resid_post"]
        assert torch.allclose(run["blocks.1.resid_post"][:, :7], plain, atol=1e-4)


def test_ablations_that_need_the_whole_run_have_it_in_the_prompt(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    ids, mask = padded()
    batch = subject.tokens(ids, mask=mask)
    for kind in ("mean", "noise"):
        edit = assay.Ablate("blocks.1.mlp.out", kind, positions="last")
        expected = subject.run(batch, edits=[edit]).logits[:, -1]
        for options in ({}, {"use_cache": False}):
            run = subject.generate(batch, [edit], apply_to="prompt", max_new_tokens=3, **options)
            assert torch.allclose(run.logits[:, 0], expected, atol=1e-4)
        with pytest.raises(SpecError, match="does not have yet"):
            subject.generate(batch, [edit], apply_to="all")


def test_sampling_without_a_seed_is_the_modules_own(tiny_module: Any) -> None:
    module = tiny_module("llama")
    subject = assay.load(module)
    torch.manual_seed(0)
    first = subject.generate(IDS, max_new_tokens=8, do_sample=True).generated
    torch.manual_seed(0)
    expected = module.generate(IDS, max_new_tokens=8, do_sample=True, attention_mask=torch.ones_like(IDS))
    assert torch.equal(first, expected)
    torch.manual_seed(0)
    stream = subject.stream(IDS, max_new_tokens=8, do_sample=True)
    assert torch.equal(torch.stack([step.ids for step in stream], 1), expected[:, 7:])


def test_a_seed_gives_each_prompt_its_own_stream(tiny_module: Any) -> None:
    """The same tokens in any batch and order; other tokens for a copy and another seed; nobody's generator moves."""
    subject = assay.load(tiny_module("llama"))
    ids = torch.cat([IDS, IDS + 1, IDS])
    options = {"max_new_tokens": 8, "do_sample": True, "eos_token_id": None}
    state = torch.get_rng_state()
    found = subject.generate(ids, seed=1, **options).generated
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(found, subject.generate(ids, seed=1, **options).generated)
    assert torch.equal(found[1:2], subject.generate(ids[1:2], seed=1, **options).generated)
    assert torch.equal(found[[1, 0, 2]], subject.generate(ids[[1, 0, 2]], seed=1, **options).generated)
    assert not torch.equal(found[0], found[2]), "a prompt repeated for more samples gets other samples"
    assert not torch.equal(found, subject.generate(ids, seed=2, **options).generated)
    with pytest.raises(SpecError, match="add do_sample=True"):
        subject.generate(ids, seed=1)


def test_draws_follow_the_probabilities_and_never_a_forbidden_token(tiny_subject: Any) -> None:
    n = 4000
    batch = tiny_subject.tokens(torch.ones(n, 1, dtype=torch.long))
    scores = torch.tensor([1.0, float("-inf"), 0.0, 2.0, float("-inf")]).expand(n, 5)
    drawn = draw_from_streams(batch, 0)(scores)
    expected = scores[0].softmax(-1)
    counts = torch.bincount(drawn, minlength=5) / n
    assert float(counts[[1, 4]].sum()) == 0
    assert torch.allclose(counts, expected, atol=4 * (0.25 / n) ** 0.5)


def test_a_stream_is_the_generation_token_by_token(family: str, tiny_module: Any) -> None:
    subject = assay.load(tiny_module(family))
    ids, mask = padded()
    batch = subject.tokens(ids, mask=mask)
    edits = [assay.Add("blocks.1.resid_post", torch.ones(32))]
    capture = ["blocks.2.resid_post", "blocks.1.attn.pattern", "blocks.0.attn.z.2"]
    for extra in ({}, {"do_sample": True, "seed": 3}, {"use_cache": False}):
        options = {"apply_to": "all", "max_new_tokens": 5, **extra}
        whole = subject.generate(batch, edits, capture, **options)
        stream = subject.stream(batch, edits, capture, **options)
        steps = list(stream)
        assert [step.index for step in steps] == list(range(whole.generated.shape[1] - 7))
        assert torch.equal(torch.stack([step.ids for step in steps], 1), whole.generated[:, 7:])
        assert torch.equal(torch.stack([step.logits for step in steps], 1), whole.logits)
        assert torch.equal(stream.run.generated, whole.generated)
        assert torch.equal(stream.run.logits, whole.logits)
        for name in capture:
            assert torch.equal(stream.run[name], whole[name])
        assert steps[0].captured["blocks.2.resid_post"].shape == (3, 7, 32)
        if "use_cache" not in extra:
            assert torch.equal(steps[2].captured["blocks.2.resid_post"], whole["blocks.2.resid_post"][:, 8:9])
            assert steps[2].captured["blocks.0.attn.z.2"].dims == ("batch", "pos", "d_head")


def test_a_stream_can_be_left_and_others_come_in_between(tiny_module: Any) -> None:
    module = tiny_module("llama")
    subject = assay.load(module)
    with torch.no_grad():
        plain = module(IDS).logits

    def pushed(by: float, **options: Any) -> Any:
        edits = [assay.Add("blocks.1.resid_post", torch.full((32,), by))]
        return subject.stream(IDS, edits, "blocks.2.mlp.out", apply_to="all", max_new_tokens=6, **options)

    alone = {by: [int(step.ids) for step in pushed(by)] for by in (0.0, 2.0, -2.0)}
    streams = {by: pushed(by) for by in alone}
    found: dict[float, list[int]] = {by: [] for by in alone}
    for _ in range(6):
        for by, stream in streams.items():
            found[by].append(int(next(stream).ids))
            assert hooks_of(module) == 0, "nothing of it is on the module between tokens"
            with torch.no_grad():
                assert torch.equal(module(IDS).logits, plain)
    assert found == alone
    left = pushed(2.0)
    next(left)
    next(left)
    part = left.run
    assert part.generated[0, 7:].tolist() == alone[2.0][:2]
    assert part["blocks.2.mlp.out"].shape == (1, 8, 32)
    left.close()
    assert list(left) == []
    with pushed(2.0, keep=False) as light:
        for step in light:
            assert len(step.captured) == 1
    assert light.run.logits.shape[1] == len(light.run.captured) == 0
    dropped = pushed(2.0)
    next(dropped)
    del dropped
    gc.collect()
    assert hooks_of(module) == 0


def test_streams_of_asyncio_tasks_do_not_mix(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))

    def stream(by: float) -> Any:
        edits = [assay.Add("blocks.1.resid_post", torch.full((32,), by))]
        return subject.stream(IDS, edits, apply_to="all", max_new_tokens=6)

    async def served(by: float) -> list[int]:
        tokens = []
        for step in stream(by):
            tokens.append(int(step.ids))
            await asyncio.sleep(0)
        return tokens

    async def threaded(by: float) -> list[int]:
        """Each token in whichever thread is free: a stream may wander."""
        it = stream(by)
        return [int((await asyncio.to_thread(next, it)).ids) for _ in range(6)]

    async def together() -> list[list[int]]:
        return await asyncio.gather(*(served(by) for by in (0.0, 2.0, -2.0)), *(threaded(by) for by in (0.0, 2.0)))

    alone = [[int(step.ids) for step in stream(by)] for by in (0.0, 2.0, -2.0)]
    assert asyncio.run(together()) == [*alone, *alone[:2]]


def test_a_generation_stops_when_it_is_told_to(tiny_module: Any) -> None:
    module = tiny_module("llama")
    subject = assay.load(module)
    event, tokens = threading.Event(), []
    with assay.limits(cancel=event):
        stream = subject.stream(IDS, [assay.Scale("blocks.1.mlp.out", 0.5)], apply_to="all", max_new_tokens=20)
        with pytest.raises(Cancelled, match="cancelled"):
            for step in stream:
                tokens.append(int(step.ids))
                if len(tokens) == 3:
                    event.set()
        assert len(tokens) == 3
        assert stream.run.generated.shape == (1, 10), "what was made is kept"
        with pytest.raises(Cancelled):
            subject.generate(IDS, max_new_tokens=5)
    assert hooks_of(module) == 0
    count = iter(range(1000))
    with assay.limits(cancel=lambda: next(count) > 30), pytest.raises(Cancelled):
        subject.generate(IDS, max_new_tokens=50, eos_token_id=None)
    assert next(count) < 60, "it stopped on its way"
    assert hooks_of(module) == 0


def test_text_comes_when_its_characters_are_whole(tiny_subject: Any) -> None:
    stream = tiny_subject.stream(["When Mary and John", "Paris"], max_new_tokens=6, eos_token_id=None)
    steps = list(stream)
    for row in range(2):
        new = stream.run.generated[row, -6:].tolist()
        assert "".join(step.text[row] for step in steps) == tiny_subject.tokenizer.decode(new, skip_special_tokens=True)

    class Bytes:
        def decode(self, ids: list[int], **_: Any) -> str:
            return bytes(ids).decode(errors="replace")

    text = TextSoFar(Bytes(), b"so ")
    data = "a 🙂é!".encode()
    pieces = [text.add(byte, last=i == len(data) - 1) for i, byte in enumerate(data)]
    assert "".join(pieces) == "a 🙂é!"
    assert pieces[2:6] == ["", "", "", "🙂"]
    assert TextSoFar(Bytes(), b"").add("é".encode()[0], last=True) == "\ufffd"


def test_rows_that_have_ended_get_padding_and_no_text(tiny_subject: Any) -> None:
    texts = ["When Mary and John", "Paris is the capital of"]
    free = tiny_subject.generate(texts, max_new_tokens=6, eos_token_id=None).generated[:, -6:]
    end = int(free[0, 1])
    expected = tiny_subject.module.generate(
        **{k: v for k, v in tiny_subject.tokens(texts).forward_inputs().items() if k != "position_ids"},
        max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=0,
    )  # fmt: skip
    stream = tiny_subject.stream(texts, max_new_tokens=6, eos_token_id=end)
    steps = list(stream)
    assert torch.equal(stream.run.generated, expected)
    assert steps[1].finished[0]
    assert all(step.text[0] == "" and int(step.ids[0]) == 0 for step in steps[2:])


def test_the_context_is_checked_before_anything_runs(tiny_module: Any) -> None:
    module = tiny_module("llama")
    subject = assay.load(module)
    called: list[int] = []
    handle = module.register_forward_pre_hook(lambda *_: called.append(1))
    try:
        for start in (subject.generate, subject.stream):
            with pytest.raises(SpecError, match=r"7 tokens and max_new_tokens=58 .* context of 64: at most 57"):
                start(IDS, max_new_tokens=58)
            with pytest.raises(SpecError, match="at least 1"):
                start(IDS, max_new_tokens=0)
        assert not called
    finally:
        handle.remove()
    assert subject.generate(IDS, max_new_tokens=57, eos_token_id=None).generated.shape == (1, 64)


def test_logits_need_not_be_kept(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    for options in ({}, {"do_sample": True, "seed": 0}):
        full = subject.generate(IDS, max_new_tokens=4, **options)
        light = subject.generate(IDS, max_new_tokens=4, logits=False, **options)
        assert torch.equal(light.generated, full.generated)
        assert light.logits.shape == (1, 0, 0)
        assert full.logits.shape == (1, 4, 128)


def test_where_edits_apply_must_be_said(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    edits = [assay.Add("blocks.1.resid_post", 1.0)]
    with pytest.raises(SpecError, match="'prompt', the 'new' tokens or 'all'"):
        subject.generate(IDS, edits)
    with pytest.raises(SpecError, match="num_beams=1"):
        subject.generate(IDS, edits, apply_to="all", num_beams=2)
    with pytest.raises(SpecError, match="drafts tokens"):
        subject.generate(IDS, edits, apply_to="all", prompt_lookup_num_tokens=2)
    with pytest.raises(SiteNotFired, match="apply_to"):
        subject.generate(IDS, edits, apply_to="new", max_new_tokens=1)
    with pytest.raises(SpecError, match="leaves the prompt as it is"):
        subject.generate(IDS, [assay.Add("blocks.1.resid_post", 1.0, positions="last")], apply_to="new")
    with pytest.raises(SpecError, match="streamer"):
        subject.generate(IDS, streamer=None)
    with pytest.raises(AssayError, match="does not generate"):
        assay.load(nn.Linear(2, 2).eval()).generate(torch.ones(1, 2, dtype=torch.long))
