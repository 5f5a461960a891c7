"""Self-repair: direct, total and repaired effect are what a hand computes, and nothing repairs what nothing reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import assay
from assay.base.errors import SpecError
from assay.controls.repair import self_repair
from assay.subjects.tokens import from_texts

IDS = torch.tensor([[5, 17, 40, 9, 77, 30, 21], [8, 30, 21, 77, 3, 44, 60], [99, 4, 50, 61, 33, 12, 7]])
ANSWER, FOIL = 12, 98
PARALLEL = ("gpt_neox",)


@pytest.fixture(scope="module")
def make(tiny_module):
    made = {}

    def subject(family):
        if family not in made:
            made[family] = assay.load(tiny_module(family))
        return made[family]

    return subject


@pytest.mark.parametrize("ablation", ["mean", "resample"])
def test_no_part_repairs_what_no_part_reads(family, make, ablation):
    """The last MLP, and the last heads where attention and MLP are parallel: all repair is the final norm's."""
    last = ["blocks.2.mlp.out", *(["blocks.2.attn.z.1"] if family in PARALLEL else [])]
    for component in last:
        found = self_repair(make(family), IDS, component, ANSWER, FOIL, ablation=ablation)
        size = np.abs(found.direct).max()
        assert size > 1e-3
        assert np.abs(found.by_parts).max() < 1e-4 * max(1.0, size)
        assert found.repair == pytest.approx(found.by_norm + found.by_parts)
        assert np.abs(found.by_norm).max() > 10 * np.abs(found.by_parts).max()


def test_without_a_final_norm_nothing_at_all_is_repaired(tiny_module):
    module = tiny_module("llama")
    module.model.norm = torch.nn.Identity()
    subject = assay.load(module, check=False)
    last = self_repair(subject, IDS, "blocks.2.mlp.out", ANSWER, FOIL)
    assert np.abs(last.direct).max() > 0.1
    assert np.abs(last.repair).max() < 1e-4
    earlier = self_repair(subject, IDS, "blocks.1.mlp.out", ANSWER, FOIL)
    assert np.abs(earlier.by_norm).max() < 1e-12
    assert np.abs(earlier.repair).max() > 1e-2


def test_a_part_that_is_not_ablated_at_the_last_token_has_no_direct_effect(make):
    found = self_repair(make("llama"), IDS, "blocks.0.mlp.out", ANSWER, FOIL, positions=slice(0, -1))
    assert np.abs(found.direct).max() == 0
    assert np.abs(found.total).max() > 1e-3
    last = self_repair(make("llama"), IDS, "blocks.2.mlp.out", ANSWER, FOIL, positions=slice(0, -1))
    assert np.abs([last.direct, last.total]).max() < 1e-5


@torch.no_grad()
def test_a_head_and_an_mlp_are_what_a_hand_computes(make):
    """Llama, by hooks of our own: the mean put in place, and the stream before the last norm."""
    subject = make("llama")
    module = subject.module
    projection, mlp = module.model.layers[1].self_attn.o_proj, module.model.layers[0].mlp
    u = (module.lm_head.weight[ANSWER] - module.lm_head.weight[FOIL]) * module.model.norm.weight

    def difference(stream):
        return stream / (stream.pow(2).mean(-1, keepdim=True) + module.model.norm.variance_epsilon).sqrt() @ u

    def stream(*hooks):
        seen = {}
        handles = [*hooks, module.model.norm.register_forward_pre_hook(lambda m, a: seen.update(x=a[0][:, -1]))]
        try:
            logits = module(IDS).logits[:, -1]
        finally:
            for handle in handles:
                handle.remove()
        return seen["x"], logits

    seen = {}
    x, logits = stream(
        projection.register_forward_pre_hook(lambda m, a: seen.update(z=a[0].clone())),
        mlp.register_forward_hook(lambda m, a, out: seen.update(mlp=out.clone())),
    )
    mean_z, mean_mlp = seen["z"].mean((0, 1)), seen["mlp"].mean((0, 1))

    def put_z(m, a):
        z = a[0].clone()
        z[..., 16:24] = mean_z[16:24]  # head 2 of width 8
        return (z,)

    head, _ = stream(projection.register_forward_pre_hook(put_z))
    whole, _ = stream(mlp.register_forward_hook(lambda m, a, out: mean_mlp.expand_as(out)))
    scale = (x.pow(2).mean(-1, keepdim=True) + module.model.norm.variance_epsilon).sqrt()
    deltas = {
        "blocks.1.attn.z.2": (seen["z"][:, -1, 16:24] - mean_z[16:24]) @ projection.weight[:, 16:24].T,
        "blocks.0.mlp.out": seen["mlp"][:, -1] - mean_mlp,
    }
    for (component, delta), after in zip(deltas.items(), (head, whole), strict=True):
        found = self_repair(subject, IDS, component, ANSWER, FOIL)
        assert found.clean == pytest.approx((logits[:, ANSWER] - logits[:, FOIL]).numpy(), abs=1e-4)
        assert found.direct == pytest.approx((delta / scale @ u).numpy(), abs=1e-4)
        assert found.rescaled == pytest.approx((difference(x) - difference(x - delta)).numpy(), abs=1e-4)
        assert found.total == pytest.approx((difference(x) - difference(after)).numpy(), abs=1e-4)
        assert np.abs(found.by_parts).max() > 1e-3


def test_the_total_effect_is_that_of_the_subjects_own_ablation(family, make):
    subject = make(family)
    mean = subject.mean(IDS, "blocks.0.attn.z")["blocks.0.attn.z"]
    ablated = subject.run(IDS, edits=[assay.Ablate("blocks.0.attn.z", mean)]).logits[:, -1]
    own = subject.run(IDS).logits[:, -1]
    found = self_repair(subject, IDS, "blocks.0.attn.z", ANSWER, FOIL)
    if subject.parts.softcap is not None:  # the effects are those before the cap
        cap = subject.parts.softcap
        own, ablated = cap * torch.atanh(own / cap), cap * torch.atanh(ablated / cap)
    drop = (own - ablated)[:, ANSWER] - (own - ablated)[:, FOIL]
    assert found.total == pytest.approx(drop.detach().numpy(), abs=2e-3)


def test_the_direct_effects_of_heads_add_up_and_groups_are_ablated_together(family, make):
    subject = make(family)
    heads = [f"blocks.1.attn.z.{head}" for head in range(4)]
    alone = [self_repair(subject, IDS, head, ANSWER, FOIL) for head in heads]
    group, whole = (self_repair(subject, IDS, part, ANSWER, FOIL) for part in (heads, "blocks.1.attn.z"))
    assert sum(found.direct for found in alone) == pytest.approx(group.direct, abs=1e-5)
    assert group.direct == pytest.approx(whole.direct, abs=1e-6)
    assert group.total == pytest.approx(whole.total, abs=1e-4)
    assert group.components == tuple(heads)


def test_a_part_that_undoes_another_repairs_it_in_full(tiny_module):
    """The last MLP takes away whatever the stream holds and writes a constant: all of an ablation comes back."""
    module, seen = tiny_module("llama"), {}
    constant = torch.linspace(-1, 1, 32)
    with torch.no_grad():
        module.model.layers[2].self_attn.o_proj.weight.zero_()
    module.model.layers[2].register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    module.model.layers[2].mlp.down_proj.forward = lambda x: constant - seen["x"]
    found = self_repair(assay.load(module, check=False), IDS, "blocks.1.mlp.out", ANSWER, FOIL)
    assert np.abs(found.direct).max() > 1e-2
    assert np.abs(found.total).max() < 1e-4
    assert found.share == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_prompts_of_different_length_are_each_read_at_their_own_end(make, tiny_tokenizer, padding):
    subject = assay.load(make("gpt2").module, tokenizer=tiny_tokenizer)
    texts = ["When Mary and John went to the store", "When Mary went"]
    batch = from_texts(tiny_tokenizer, texts, side=padding)
    both = self_repair(subject, batch, "blocks.1.mlp.out", ANSWER, FOIL, reference=IDS)
    each = [self_repair(subject, text, "blocks.1.mlp.out", ANSWER, FOIL, reference=IDS) for text in texts]
    for name in ("clean", "direct", "rescaled", "total"):
        assert getattr(both, name) == pytest.approx(np.concatenate([getattr(one, name) for one in each]), abs=1e-4)


def test_answers_may_differ_by_row_and_turning_them_turns_the_signs(make):
    subject = make("gpt2")
    answers, foils = [12, 13, 14], [98, 97, 96]
    found = self_repair(subject, IDS, "blocks.1.attn.z.0", answers, torch.tensor(foils))
    turned = self_repair(subject, IDS, "blocks.1.attn.z.0", foils, answers)
    assert found.direct == pytest.approx(-turned.direct)
    assert found.total == pytest.approx(-turned.total)
    one = self_repair(subject, IDS, "blocks.1.attn.z.0", 12, 98)
    assert found.direct[0] == pytest.approx(one.direct[0])
    assert found.share == pytest.approx(found.repair.mean() / found.direct.mean())
    effect = found.effect("direct", side="greater")
    assert effect.estimate == pytest.approx(found.direct.mean())
    assert effect.control.p == pytest.approx(turned.effect("direct", side="less").control.p)


def test_resampling_depends_on_its_seed_and_averages_its_draws(make):
    subject = make("gpt2")
    more = IDS.flip(1)

    def run(**options):
        return self_repair(
            subject, IDS, "blocks.1.mlp.out", ANSWER, FOIL, ablation="resample", reference=more, **options
        )

    assert np.array_equal(run(seed=1).total, run(seed=1).total)
    each = [run(draws=1, seed=seed).total for seed in (5, 6, 7)]
    assert run(draws=3, seed=5).total == pytest.approx(np.mean(each, axis=0))
    assert len({tuple(total) for total in each}) > 1


def test_bad_input_is_quoted(make):
    subject = make("gpt2")
    with pytest.raises(SpecError, match=r"'blocks\.1\.resid_post' is no part that writes"):
        self_repair(subject, IDS, "blocks.1.resid_post", ANSWER, FOIL)
    with pytest.raises(SpecError, match="needs a component"):
        self_repair(subject, IDS, [], ANSWER, FOIL)
    with pytest.raises(SpecError, match=r"shape \(2,\) for 3 prompts"):
        self_repair(subject, IDS, "blocks.1.mlp.out", [1, 2], FOIL)
    with pytest.raises(SpecError, match="id 128; the vocabulary has 128"):
        self_repair(subject, IDS, "blocks.1.mlp.out", 128, FOIL)
    with pytest.raises(SpecError, match="draws=0"):
        self_repair(subject, IDS, "blocks.1.mlp.out", ANSWER, FOIL, draws=0)
