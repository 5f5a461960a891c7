"""Every family's sites are what plain hooks at hand-written places see, and edits are those hooks' changes."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from family_facts import ROWS, At, inputs
from family_models import Built, built, close
from plain_hooks import attention_calls, eager_copy, logits_of, read_all, run_changed, softmaxes, traces
from torch import Tensor

import assay
from assay.base.errors import InvalidEdit, UnknownSite
from assay.subjects.families import FAMILIES

DERIVED = re.compile(r"(attn\.(rot_q|rot_k|scores|pattern|result)|\.scale|^logits)$")
BLOCKED = -1e30


@pytest.fixture(params=list(ROWS), name="family")
def _family(request: pytest.FixtureRequest) -> Built:
    return built(request.param)


def test_every_model_type_has_its_facts() -> None:
    assert {row.model_type for row in ROWS.values()} == {name for family in FAMILIES for name in family.model_types}


def test_captures_are_what_plain_hooks_see(family: Built) -> None:
    subject, facts = family.subject, family.row.facts
    assert not subject.refused
    assert {site for site in subject.sites() if not DERIVED.search(site)} == set(facts)
    output, seen = read_all(family.module, family.called, facts)
    assert torch.equal(subject.run(family.x).logits, logits_of(output))
    run = subject.run(family.x, capture=subject.sites())
    assert torch.equal(run.logits, logits_of(output))
    for site, expected in seen.items():
        found = run[site]
        if site.endswith("pos_embed"):
            expected = expected.expand(found.shape[0], *expected.shape[-2:])
        assert found.shape == expected.shape, site
        assert torch.equal(found, expected), site
        assert len(found.dims) == found.ndim, site


@torch.no_grad()
def test_the_stream_is_what_the_model_reports(family: Built) -> None:
    subject = family.subject
    output = copy.deepcopy(family.module)(**family.called, output_hidden_states=True)
    run = subject.run(family.x, capture=[s for s in subject.sites() if s.endswith(("resid_pre", "resid_post"))])
    for stack in subject.stacks:
        owner = getattr(output, f"{stack}_model_output", None) or output
        hidden = getattr(owner, f"{stack}_hidden_states" if stack in ("encoder", "decoder") else "hidden_states")
        at = f"{stack}.blocks." if stack else "blocks."
        if "ssm.x" in str(family.row.facts):  # state-space models report what leaves each block, the last one normed
            assert torch.equal(run[f"{at}0.resid_post"], hidden[0])
        else:
            assert torch.equal(run[f"{at}0.resid_pre"], hidden[0])
            assert torch.equal(run[f"{at}1.resid_pre"], hidden[1])


@torch.no_grad()
def test_patterns_and_scores_are_those_of_attention_written_out(family: Built) -> None:
    subject = family.subject
    twice = "ALiBi" in family.row.name  # Falcon's own eager path adds these biases twice, and then is another model
    twin = copy.deepcopy(family.module) if twice else eager_copy(family.module)
    modules = family.attentions(twin)
    with softmaxes({}, list(modules.values())) as seen:
        output = twin(**family.called, **({} if twice else {"output_attentions": True}))
    wanted = [f"{name}.{what}" for name in modules for what in ("scores", "pattern")]
    run = subject.run(family.x, capture=wanted)
    for name, module in modules.items():
        scores, pattern = (x.view(run[f"{name}.pattern"].shape[0], -1, *x.shape[-2:]) for x in seen[module])
        keys = run[f"{name}.pattern"].shape[-1]
        assert scores.shape[-1] == keys or hasattr(module, "sinks")
        assert close(run[f"{name}.pattern"], pattern[..., :keys], 1e-5), name
        seen_here = scores[..., :keys] > BLOCKED
        assert torch.equal(run[f"{name}.scores"] > BLOCKED, seen_here), name
        difference = torch.where(seen_here, run[f"{name}.scores"] - scores[..., :keys], 0.0)
        if hasattr(module, "sinks"):  # the softmax is given scores less their largest
            largest = torch.where(seen_here, difference, -torch.inf).amax(-1, keepdim=True)
            difference = torch.where(seen_here, difference - largest, 0.0)
        assert float(difference.abs().max()) <= 1e-5 * max(1.0, float(scores[scores > BLOCKED].abs().max())), name
    returned = [
        pattern
        for owner in (output, getattr(output, "vision_model_output", None), getattr(output, "text_model_output", None))
        for kind in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
        for pattern in (getattr(owner, kind, None) or ())
    ]
    assert len(returned) == (0 if twice else len(modules))
    for pattern in returned:
        fitting = [found for n in modules if (found := run[f"{n}.pattern"]).shape == pattern.shape]
        assert any(close(found, pattern, 1e-5) for found in fitting)


@torch.no_grad()
def test_rotated_queries_and_keys_are_what_the_attention_function_gets(family: Built) -> None:
    subject = family.subject
    wanted = [site for site in subject.sites() if site.endswith(("rot_q", "rot_k"))]
    with attention_calls() as seen:
        family.module(**family.called)
    run = subject.run(family.x, capture=wanted)
    modules = family.attentions(family.module)
    assert len(wanted) == 2 * len(seen)
    for site in wanted:
        expected = seen[modules[site.rpartition(".")[0]]][site.endswith("rot_k")]
        assert torch.equal(run[site], expected.transpose(1, 2)), site


@torch.no_grad()
def test_scales_and_results_follow_from_what_they_are_made_of(family: Built) -> None:
    subject, facts = family.subject, family.row.facts
    scales = [site for site in subject.sites() if site.endswith(".scale")]
    results = [site for site in subject.sites() if site.endswith(".result")]
    run = subject.run(family.x, capture=[*scales, *results, *(site.replace(".result", ".z") for site in results)])
    before = {site: replace(facts[site.removesuffix(".scale")], side="in") for site in scales}
    _, entering = read_all(family.module, family.called, before)
    for site in scales:
        module = family.module.get_submodule(facts[site.removesuffix(".scale")].path)
        x = entering[site]
        names = ("variance_epsilon", "eps", "epsilon")
        eps = next((getattr(module, name) for name in names if hasattr(module, name)), 1e-5)  # OLMo's is not kept
        if "LayerNorm" in type(module).__name__ and "T5" not in type(module).__name__:
            x = x - x.mean(-1, keepdim=True)
        assert close(run[site], (x.pow(2).mean(-1, keepdim=True) + eps).sqrt(), 1e-6), site
    for site in results:
        at = facts[site.replace(".result", ".z")]
        factor = facts[site.replace(".result", ".out")].factor
        projection: Any = family.module.get_submodule(at.path)
        z = run[site.replace(".result", ".z")]
        for head in range(z.shape[2]):
            alone = torch.zeros_like(z)
            alone[:, :, head] = z[:, :, head]
            written = projection(alone.flatten(-2)) - projection(torch.zeros_like(z).flatten(-2))
            assert close(run[site][:, :, head], written * factor, 1e-5), site
            assert torch.equal(run[f"{site}.{head}"], run[site][:, :, head])


def test_heads_are_counted_as_the_model_has_them(family: Built) -> None:
    subject, facts = family.subject, family.row.facts
    _, seen = read_all(family.module, family.called, facts)
    heads = {site: value for site, value in seen.items() if site.endswith(("1.attn.q", "1.attn.k", "attn.v", "attn.z"))}
    run = subject.run(family.x, capture=[f"{site}.{value.shape[2] - 1}" for site, value in heads.items()])
    for site, value in heads.items():
        n = value.shape[2]
        assert subject.stacks[subject.site(site).stack].heads(subject.site(site).point) == n, site
        assert torch.equal(run[f"{site}.{n - 1}"], value[:, :, -1])
        with pytest.raises(UnknownSite, match=f"heads 0 to {n - 1}"):
            subject.site(f"{site}.{n}")


def hand_made(site: str, facts: dict[str, At]) -> At:
    """Where a plain hook changes a site: its own place, or, for the stream within a block, what is added to it."""
    at = facts[site]
    if at.side == "in" and site.endswith(("resid_mid", "resid_cross")):
        return facts[site.replace("resid_mid", "attn.out").replace("resid_cross", "cross_attn.out")]
    return at


def edit_and_change(site: str, row: int, value: Tensor, kind: int, added: bool) -> tuple[Any, Any]:
    """An edit of one row, position and head, and the same thing done to the tensor by hand."""
    vector, other = torch.linspace(-1.0, 2.0, value.shape[-1]), 0.7 * value.roll(1, 1)
    index = (row, 2, value.shape[2] - 1) if value.ndim == 4 else (row, 2)
    where = dict(zip(("rows", "positions", "heads"), index, strict=False))
    kinds = {
        0: (assay.Add(site, vector, scale=2.0, **where), lambda old: old + 2.0 * vector),
        1: (assay.Set(site, vector, **where), lambda old: vector),
        2: (assay.Ablate(site, "zero", **where), lambda old: torch.zeros_like(old)),
        3: (assay.Patch(site, other, **where), lambda old: other[index]),
        4: (assay.Scale(site, -0.5, **where), lambda old: -0.5 * old),
    }
    edit, new = kinds[0 if added else kind % 5]

    def change(whole: Tensor) -> Tensor:
        whole = whole.clone()
        whole[index] = new(whole[index])
        return whole

    return edit, change


@torch.no_grad()
def test_edits_are_what_plain_hooks_do(family: Built) -> None:
    """At every site of the last block and around it, each in a row of its own; the kinds of edit go round."""
    subject, facts = family.subject, family.row.facts
    first = list(ROWS).index(family.row.name)
    without = ("pos_embed", "mlp.router", "mlp.experts")
    sites = [site for site in facts if "blocks.0." not in site and not site.endswith(without)]
    called = inputs(family.row.inputs, rows=len(sites))
    x = called["input_ids"] if family.row.inputs == "tokens" else called
    run = subject.run(x, capture=sites)
    sites = [site for site in sites if run[site].shape[1] > 2]
    edits, changes = [], []
    for row, site in enumerate(sites):
        at = hand_made(site, facts)
        edit, change = edit_and_change(site, row, run[site], first + row, added=at is not facts[site])
        edits.append(edit)
        changes.append((at, change))
    edited = subject.run(x, edits=edits, capture=sites)
    expected = logits_of(run_changed(family.module, called, changes))
    assert close(edited.logits, expected, 1e-6)
    for row, (site, (_, change)) in enumerate(zip(sites, changes, strict=True)):
        assert close(edited[site][row], change(run[site])[row], 1e-6), (site, edits[row])
        if not (family.row.inputs.startswith("image") or site.endswith("ssm.dt")):
            assert not torch.equal(edited.logits[row], run.logits[row]), (site, edits[row])


@torch.no_grad()
def test_chosen_experts_can_be_exchanged(family: Built) -> None:
    subject, facts = family.subject, family.row.facts
    site = "blocks.1.mlp.experts"
    if site not in facts:
        assert "mlp.experts" not in str(list(facts))
        return
    chosen = subject.run(family.x, capture=site)[site]
    others = (chosen[1, 2] + 1) % 4
    edited = subject.run(family.x, edits=[assay.Set(site, others, rows=1, positions=2)], capture=site)

    def change(whole: Tensor) -> Tensor:
        whole = whole.clone()
        whole[1, 2] = others
        return whole

    expected = logits_of(run_changed(family.module, family.called, [(facts[site], change)]))
    assert edited[site].dtype == chosen.dtype
    assert torch.equal(edited[site], change(chosen))
    assert close(edited.logits, expected, 1e-6)
    assert not torch.equal(edited.logits, logits_of(family.module(**family.called)))


@torch.no_grad()
def test_edited_patterns_mix_the_values(family: Built) -> None:
    """One head's pattern turned the other way round among the keys a query sees, against softmax's output changed."""
    subject = family.subject
    twice = "ALiBi" in family.row.name
    twin = copy.deepcopy(family.module) if twice else eager_copy(family.module)
    for name, module in family.attentions(twin).items():
        if "blocks.0" in name:
            continue
        site = f"{name}.pattern"
        pattern = subject.run(family.x, capture=site)[site]
        head, query = pattern.shape[1] - 1, 2
        seen = pattern[1, head, query] > 0
        wanted = torch.linspace(0.1, 0.9, pattern.shape[-1])
        new = torch.where(seen, wanted, 0.0)  # a key that the query cannot see stays closed to it
        edits = [assay.Set(site, wanted, rows=1, positions=query, heads=head)]

        def change(
            whole: Tensor, new: Tensor = new, at: tuple[int, int, int] = (pattern.shape[0], head, query)
        ) -> Tensor:
            shaped = whole.view(at[0], -1, *whole.shape[-2:]).clone()
            shaped[1, at[1], at[2], : new.shape[-1]] = new
            return shaped.view(whole.shape)

        with softmaxes({(module, "pattern"): change}, [module]):
            expected = logits_of(twin(**family.called))
        edited = subject.run(family.x, edits=edits, capture=site)
        assert close(edited.logits, expected, 1e-5), site
        assert close(edited[site][1, head, query], new, 1e-6), site


def test_what_cannot_be_edited_is_refused(family: Built) -> None:
    subject, sites = family.subject, family.subject.sites()
    scale = next((site for site in sites if site.endswith("1.norm1.scale")), None)
    router = next((site for site in sites if site.endswith("1.mlp.router")), None)
    for site, why in ((scale, "can be captured, not edited"), (router, "edit 'mlp.experts' and 'mlp.weights'")):
        if site is not None:
            with pytest.raises(InvalidEdit, match=why):
                subject.run(family.x, edits=[assay.Scale(site, 2.0)])


def test_nothing_is_left_on_the_module(family: Built) -> None:
    """After all of the above, and the self-check: no hook, no attribute, no changed configuration."""
    assert traces(family.module) == family.before
