"""Reading: sites equal raw hooks, runs leave no trace, and nothing fails silently."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from oracle import outside, read, sites
from torch import Tensor, nn

import assay
from assay.base.errors import SiteError, SiteNotFired, SpecError, UnknownSite
from assay.subjects.model import weights_hash

IDS = torch.tensor([[5, 17, 33, 64, 9, 101, 42, 77, 3]])


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_logits_without_edits_are_bit_equal_and_sdpa_is_kept(family: str, tiny_module: Any) -> None:
    module = tiny_module(family)
    before = module.config._attn_implementation
    subject = assay.load(module)
    assert subject.module is module
    with torch.no_grad():
        plain = module(IDS).logits
    assert torch.equal(subject.run(IDS).logits, plain)
    every = subject.run(IDS, capture=subject.sites())
    assert torch.equal(every.logits, plain), "capturing everything changed the logits"
    assert module.config._attn_implementation == before


def test_every_site_equals_a_raw_hook(family: str, tiny_module: Any) -> None:
    module = tiny_module(family)
    subject = assay.load(module)
    run = subject.run(IDS, capture=subject.sites())
    by_hand = {**outside(family), **{k: v for block in range(3) for k, v in sites(family, block).items()}}
    for name, spec in by_hand.items():
        assert torch.equal(run[name], read(module, IDS, spec)), name
        assert len(run[name].dims) == run[name].ndim, name
    attention = {"attn.rot_q", "attn.rot_k", "attn.scores", "attn.pattern", "attn.result"}
    derived = {"norm1.scale", "norm2.scale", "final_norm.scale", "logits"}
    unread = {s.split(".", 2)[-1] if s.startswith("blocks") else s for s in subject.sites() if s not in by_hand}
    assert unread <= attention | derived, "a site without an oracle"


def test_attention_inside_is_what_the_model_computes(family: str, tiny_module: Any) -> None:
    """Patterns equal those that the model itself returns under eager attention."""
    eager = tiny_module(family, attn_implementation="eager")
    subject = assay.load(tiny_module(family))
    run = subject.run(IDS, capture=["blocks.*.attn.pattern", "blocks.*.attn.scores", "blocks.*.attn.result"])
    with torch.no_grad():
        expected = eager(IDS, output_attentions=True).attentions
    for block, pattern in enumerate(expected):
        found = run[f"blocks.{block}.attn.pattern"]
        assert torch.allclose(found, pattern, atol=1e-6)
        assert torch.allclose(run[f"blocks.{block}.attn.scores"].softmax(-1), found, atol=1e-6)
    assert run["blocks.1.attn.pattern"].dims == ("batch", "head", "query", "key")


def test_norm_scales_are_the_denominators(family: str, tiny_module: Any) -> None:
    subject = assay.load(tiny_module(family))
    run = subject.run(IDS, capture=["blocks.1.resid_pre", "blocks.1.norm1", "blocks.1.norm1.scale"])
    norm = subject.norm("blocks.1.norm1")
    x = run["blocks.1.resid_pre"]
    centred = x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x
    rebuilt = norm.gain * centred / run["blocks.1.norm1.scale"] + norm.bias
    assert torch.allclose(rebuilt, run["blocks.1.norm1"], atol=1e-5)


def test_heads_patterns_and_transformer_lens_names(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"))
    run = subject.run(IDS, capture=["blocks.*.attn.z", "blocks.0-1.hook_resid_pre", "blocks.2.attn.k.1"])
    assert torch.equal(run["blocks.1.attn.z.3"], run["blocks.1.attn.z"][:, :, 3])
    assert run["blocks.1.attn.z.3"].dims == ("batch", "pos", "d_head")
    assert torch.equal(run["blocks.0.resid_pre"], run["blocks.0.hook_resid_pre"])
    assert run["blocks.2.attn.k.1"].shape == (1, 9, 8)
    for lens, ours in {
        "blocks.1.attn.hook_z": "blocks.1.attn.z",
        "blocks.1.hook_attn_out": "blocks.1.attn.out",
        "blocks.1.mlp.hook_post": "blocks.1.mlp.post",
        "blocks.1.mlp.hook_pre": "blocks.1.mlp.gate",
        "blocks.1.ln1.hook_scale": "blocks.1.norm1.scale",
        "hook_embed": "embed",
        "ln_final.hook_scale": "final_norm.scale",
    }.items():
        assert subject.site(lens) == subject.site(ours)
    with pytest.raises(UnknownSite, match="before the norm's gain"):
        subject.site("blocks.1.ln1.hook_normalized")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_each_row_its_own_numbers(family: str, side: str, tiny_module: Any) -> None:
    subject = assay.load(tiny_module(family))
    rows = [IDS[0], IDS[0, :4], IDS[0, 2:8]]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    edits = [assay.Add("blocks.1.attn.out", torch.ones(32), positions="last")]
    run = subject.run(ids, mask=mask, capture=["blocks.2.resid_post", "blocks.1.attn.pattern"], edits=edits)
    for i, row in enumerate(rows):
        where = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        alone = subject.run(row[None], capture=["blocks.2.resid_post", "blocks.1.attn.pattern"], edits=edits)
        assert torch.allclose(run.logits[i, where], alone.logits[0], atol=1e-5)
        assert torch.allclose(run["blocks.2.resid_post"][i, where], alone["blocks.2.resid_post"][0], atol=1e-5)
        found = run["blocks.1.attn.pattern"][i, :, where, where]
        assert torch.allclose(found, alone["blocks.1.attn.pattern"][0], atol=1e-6)


def test_texts_of_different_length_are_padded_and_read_alike(tiny_subject: Any) -> None:
    texts = ["When Mary went to the store", "When John"]
    for padding in ("left", "right"):
        run = tiny_subject.run(texts, capture="blocks.5.resid_post", padding=padding)
        start = run.batch.starts[1]
        alone = tiny_subject.run(texts[1], capture="blocks.5.resid_post")
        found = run["blocks.5.resid_post"][1, start : start + run.batch.lengths[1]]
        assert torch.allclose(found, alone["blocks.5.resid_post"][0], atol=1e-5)


def test_gradients_are_those_of_finite_differences(family: str, tiny_module: Any) -> None:
    subject = assay.load(tiny_module(family).double())
    wanted = ["embed", "blocks.1.resid_pre", "blocks.0.attn.q", "blocks.1.attn.z", "blocks.1.mlp.post"]
    wanted += [
        "blocks.1.attn.pattern",
        "blocks.0.attn.rot_k",
        "blocks.1.attn.result",
        "final_norm",
        "blocks.1.attn.v.0",
    ]
    if subject.parts.has("resid_mid"):
        wanted.append("blocks.1.resid_mid")

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 5] - logits[:, -1, 7]

    run = subject.run(IDS, capture=wanted, grad=metric)
    assert run.grad is not None
    assert torch.allclose(run.logits, subject.run(IDS).logits, atol=1e-5)
    generator = torch.Generator().manual_seed(1)
    for name in wanted:
        step = torch.randn(run[name].shape, generator=generator, dtype=torch.float64)
        along = step.transpose(1, 2) if "pattern" in name else step

        def value(scale: float, name: str = name, along: Tensor = along) -> float:
            return float(metric(subject.run(IDS, edits=[assay.Add(name, along, scale=scale)]).logits))

        expected = (value(1e-3) - value(-1e-3)) / 2e-3  # norms compute in float32 whatever the weights are
        assert float((run.grad[name] * step).sum()) == pytest.approx(expected, rel=1e-2, abs=1e-3), name


def test_gradients_exist_when_no_parameter_wants_one(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama").requires_grad_(False))
    run = subject.run(IDS, capture="blocks.1.resid_post", grad=lambda logits: logits[:, -1, 5])
    assert run.grad is not None
    assert float(run.grad["blocks.1.resid_post"].abs().sum()) > 0


def test_threads_with_different_edits_never_mix(tiny_module: Any) -> None:
    module = tiny_module("llama")
    subject = assay.load(module)
    vectors = [torch.zeros(32), torch.ones(32), -torch.ones(32)]
    expected = [subject.run(IDS, edits=[assay.Add("blocks.1.resid_post", v)]).logits for v in vectors]
    with torch.no_grad():
        plain = module(IDS).logits
    wrong: list[str] = []

    def work(i: int) -> None:
        for _ in range(40):
            edits = [assay.Add("blocks.1.resid_post", vectors[i])]
            run = subject.run(IDS, edits=edits, capture=["blocks.1.attn.pattern"] if i == 1 else [])
            if not torch.equal(run.logits, expected[i]):
                wrong.append(f"thread {i}")

    def bare() -> None:
        for _ in range(60):
            with torch.no_grad():
                if not torch.equal(module(IDS).logits, plain):
                    wrong.append("the module's own call")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)] + [threading.Thread(target=bare)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert hooks_of(module) == 0


def test_an_exception_leaves_no_hook_and_no_change(family: str, tiny_module: Any) -> None:
    module = tiny_module(family)
    subject = assay.load(module)
    fingerprint, training = weights_hash(module), module.training

    def fail(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        subject.run(IDS, capture=subject.sites(), edits=[assay.Apply("blocks.1.mlp.out", fail)])
    with pytest.raises(ZeroDivisionError):
        subject.generate(IDS, edits=[assay.Apply("blocks.1.mlp.out", fail)], apply_to="all", max_new_tokens=2)
    assert hooks_of(module) == 0
    assert weights_hash(module) == fingerprint
    assert module.training == training
    with torch.no_grad():
        assert torch.equal(subject.run(IDS).logits, module(IDS).logits)


def test_unknown_sites_offer_the_nearest(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("gpt2"))
    with pytest.raises(UnknownSite, match=r"blocks\.1\.attn\.zz.*did you mean 'blocks\.1\.attn\.z'"):
        subject.run(IDS, capture="blocks.1.attn.zz")
    with pytest.raises(UnknownSite, match="blocks 0 to 2"):
        subject.run(IDS, capture="blocks.3.resid_pre")
    with pytest.raises(UnknownSite, match="heads 0 to 3"):
        subject.run(IDS, capture="blocks.1.attn.z.4")
    with pytest.raises(UnknownSite, match=r"mlp\.gate"):
        subject.run(IDS, capture="blocks.1.mlp.gate")
    with pytest.raises(UnknownSite, match="did you mean"):
        subject.run(IDS, capture="module:transformer.h.1.mlpp.out")
    with pytest.raises(UnknownSite, match=r"must end in \.in or \.out"):
        subject.run(IDS, capture="module:transformer.h.1.mlp")


def test_reading_what_was_not_captured_is_an_error(tiny_module: Any) -> None:
    run = assay.load(tiny_module("gpt2")).run(IDS, capture="blocks.1.resid_pre")
    with pytest.raises(SiteError, match="was not captured"):
        run["blocks.1.resid_post"]
    assert "blocks.1.resid_pre" in run
    assert "blocks.1.resid_post" not in run


def test_a_capture_that_never_fires_raises() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.used(ids[..., None].float().expand(*ids.shape, 3))
            return out

    module = Half()
    subject = assay.load(module)
    ids = torch.ones(1, 2, dtype=torch.long)
    run = subject.run(ids, capture="module:used.out", edits=[assay.Scale("module:used.out", 2.0)])
    assert torch.allclose(run["module:used.out"], 2 * subject.run(ids, capture="module:used.out")["module:used.out"])
    with pytest.raises(SiteNotFired, match=r"module:unused\.out"):
        subject.run(ids, capture="module:unused.out")
    with pytest.raises(SiteNotFired):
        subject.run(ids, edits=[assay.Add("module:unused.in", 1.0)])
    assert hooks_of(module) == 0


def test_bad_input_is_refused(tiny_module: Any, tiny_subject: Any) -> None:
    subject = assay.load(tiny_module("gpt2"))
    with pytest.raises(SpecError, match="no tokenizer"):
        subject.run("text")
    with pytest.raises(SpecError, match="context is 64"):
        subject.run(torch.ones(1, 65, dtype=torch.long))
    with pytest.raises(SpecError, match=r"0\.\.127"):
        subject.run(torch.tensor([[5, 128]]))
    with pytest.raises(SpecError, match="not empty"):
        subject.run(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(SpecError, match="no tokens"):
        tiny_subject.run("")
    with pytest.raises(SpecError, match="no prompt"):
        tiny_subject.run([])
    with pytest.raises(SpecError, match="unbroken"):
        subject.run(IDS, mask=torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1]]))
    with pytest.raises(SpecError, match="needs capture"):
        subject.run(IDS, grad=lambda logits: logits[:, -1, 0])
