"""What runs and edits must not do in silence, and what they say instead."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from family_models import built
from torch import Tensor, nn

import assay
from assay.base.errors import AssayError, InvalidEdit, SiteError, SpecError, UnknownSite, UnsupportedArchitecture
from assay.subjects.tiny import tiny_model

IDS = torch.tensor([[5, 17, 33, 64, 9, 40], [11, 42, 37, 3, 8, 20]])
SITE = "blocks.0.resid_post"
VECTOR = torch.linspace(-1.0, 1.0, 32)


@pytest.fixture(scope="module", name="subject")
def _subject() -> Any:
    return assay.load(tiny_model("llama"))


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    """As users run it: without the tests' own checks of types, which would refuse wrong ones first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 9]


# Modules that were replaced, and linear maps that are no nn.Linear


class Lora(nn.Module):
    """A projection with a low-rank one beside it, whose `weight` is the projection's alone, as in PEFT."""

    def __init__(self, base: nn.Linear, size: float = 1.0) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        with torch.no_grad():
            self.down.weight.copy_(torch.sin(torch.arange(self.down.weight.numel())).view_as(self.down.weight))
            self.up.weight.copy_(size * torch.cos(torch.arange(self.up.weight.numel())).view_as(self.up.weight))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.up(self.down(x))
        return out


class Wrapped(nn.Module):
    """A projection inside a module that has no weight."""

    def __init__(self, base: nn.Linear, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = base, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.inner(x))


def test_sites_follow_modules_that_were_replaced_after_loading() -> None:
    module = tiny_model("llama")
    subject = assay.load(module)
    subject.run(IDS, capture=subject.sites())
    attention = module.model.layers[0].self_attn
    attention.q_proj, attention.o_proj = Lora(attention.q_proj), Lora(attention.o_proj)
    module.lm_head = Lora(module.lm_head)
    fresh = assay.load(module)
    assert fresh.refused == "" and fresh.checks
    names = subject.sites()
    found, expected = subject.run(IDS, capture=names), fresh.run(IDS, capture=names)
    for name in names:
        assert torch.equal(found[name], expected[name]), name
    raw = subject.run(IDS, capture="module:model.layers.0.self_attn.q_proj.out")
    assert torch.equal(found["blocks.0.attn.q"].flatten(2), raw["module:model.layers.0.self_attn.q_proj.out"])
    for name in ("blocks.0.attn.q", "blocks.0.attn.out", "blocks.0.attn.result"):
        edit = assay.Scale(name, 0.5)
        assert torch.equal(subject.run(IDS, edits=[edit]).logits, fresh.run(IDS, edits=[edit]).logits), name
        assert not torch.equal(subject.run(IDS, edits=[edit]).logits, found.logits), name
    cells = [assay.Scale(f"blocks.0.attn.q.{head}", 0.5) for head in range(4)]
    one_by_one = torch.stack([metric(subject.run(IDS, edits=[cell]).logits).mean() for cell in cells])
    assert torch.allclose(subject.sweep(IDS, cells, metric), one_by_one, atol=1e-5)


def test_replaced_modules_that_the_map_does_not_fit_are_said_to_be_so() -> None:
    module = tiny_model("llama")
    subject = assay.load(module)
    kept = module.model.layers[0].self_attn
    module.model.layers[0].self_attn = nn.Identity()
    for _ in range(2):
        with pytest.raises(UnsupportedArchitecture, match="replaced since it was loaded"):
            subject.run(IDS, capture=SITE)
    module.model.layers[0].self_attn = kept
    assert torch.equal(subject.run(IDS).logits, module(IDS).logits)


@pytest.mark.parametrize("around", ["lora", "wrapped"])
def test_each_heads_own_write_goes_through_the_whole_projection(around: str) -> None:
    module = tiny_model("llama")
    attention = module.model.layers[1].self_attn
    attention.o_proj = Lora(attention.o_proj) if around == "lora" else Wrapped(attention.o_proj, lambda x: 2 * x + 1)
    subject = assay.load(module)
    assert subject.refused == ""
    inner = "module:model.layers.1.self_attn.o_proj." + ("base_layer.out" if around == "lora" else "inner.out")
    run = subject.run(IDS, capture=["blocks.1.attn.result", "blocks.1.attn.out", inner])
    bias = 0.0 if around == "lora" else 1.0
    assert torch.allclose(run["blocks.1.attn.result"].sum(2) + bias, run["blocks.1.attn.out"], atol=1e-5)
    assert run[inner].shape == (2, 6, 32), "asking the projection for its matrix is no part of the run"
    by_result = subject.run(IDS, edits=[assay.Ablate("blocks.1.attn.result.2")]).logits
    assert torch.allclose(by_result, subject.run(IDS, edits=[assay.Ablate("blocks.1.attn.z.2")]).logits, atol=1e-5)


def test_a_projection_that_is_not_linear_is_named() -> None:
    module = tiny_model("llama")
    attention = module.model.layers[0].self_attn
    attention.o_proj = Wrapped(attention.o_proj, torch.tanh)
    refused = assay.load(module).refused
    assert "'model.layers.0.self_attn.o_proj': Wrapped is no plain linear map" in refused


# Captures of what was edited


@pytest.mark.parametrize("name", ["llama", "gpt2", "granite", "whisper"])
def test_a_capture_of_each_heads_write_shows_its_edit(name: str) -> None:
    family = built(name)
    for site in [s for s in family.subject.sites() if s.endswith(".result") and ".0." in s]:
        plain = family.subject.run(family.x, capture=site)[site]
        whole = family.subject.run(family.x, capture=site, edits=[assay.Scale(site, 1.5)])[site]
        assert torch.allclose(whole, 1.5 * plain, atol=1e-6), site
        one = family.subject.run(family.x, capture=[f"{site}.1", site], edits=[assay.Ablate(f"{site}.1", positions=0)])
        assert not one[f"{site}.1"][:, 0].any() and torch.equal(one[site][:, 1:], plain[:, 1:]), site


# Experts


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_experts_that_are_not_there_are_refused(name: str) -> None:
    subject = assay.load(tiny_model(name))
    site = next(site for site in subject.sites() if site.endswith("mlp.experts"))
    chosen = subject.run(IDS, capture=site)[site]
    n = subject.run(IDS, capture=site.replace("experts", "router"))[site.replace("experts", "router")].shape[-1]
    bad = [assay.Set(site, n), assay.Set(site, 99), assay.Set(site, -1), assay.Add(site, 1), assay.Scale(site, 2)]
    assert int(chosen.max()) == n - 1
    for edit in bad:
        with pytest.raises(InvalidEdit, match=f"experts 0 to {n - 1}"):
            subject.run(IDS, edits=[edit])
    fractions = [assay.Ablate(site, "mean"), assay.Set(site, 0.5), assay.Set(site, float("inf"))]
    fractions += [assay.Patch(site, chosen + 0.5)]
    for edit in fractions:
        with pytest.raises(InvalidEdit, match="whole numbers are needed"):
            subject.run(IDS, edits=[edit])
    with pytest.raises(SpecError, match=r"no gradient at .*mlp.experts' .whole numbers"):
        subject.run(IDS, capture=site, grad=metric)
    assert torch.equal(
        subject.run(IDS, capture=site, edits=[assay.Patch(site, chosen.flip(-1))])[site], chosen.flip(-1)
    )


# Selectors


def test_iterators_select_as_their_lists_do(subject: Any) -> None:
    def run(**where: Any) -> Tensor:
        found: Tensor = subject.run(IDS, edits=[assay.Add("blocks.0.attn.z", 1.0, **where)]).logits
        return found

    assert torch.equal(run(positions=(p for p in (1, 3))), run(positions=[1, 3]))
    assert torch.equal(run(positions=map(iter, [[1], [0, 2]])), run(positions=[[1], [0, 2]]))
    assert torch.equal(run(rows=iter([1])), run(rows=[1]))
    assert torch.equal(run(heads=reversed([0, 2])), run(heads=[2, 0]))
    donor = subject.run(IDS.flip(0), capture=SITE)
    patch = assay.Patch(SITE, donor, positions=iter([1, 2]), source_positions=iter([3, 4]))
    same = assay.Patch(SITE, donor, positions=[1, 2], source_positions=[3, 4])
    assert torch.equal(subject.run(IDS, edits=[patch]).logits, subject.run(IDS, edits=[same]).logits)


def test_what_is_selected_twice_is_selected_once(subject: Any) -> None:
    def at(*edits: Any) -> Tensor:
        found: Tensor = subject.run(IDS, edits=edits, capture="blocks.0.attn.z")["blocks.0.attn.z"]
        return found

    name, two = "blocks.0.attn.z", torch.randn(2, 4, 8)
    assert torch.equal(at(assay.Add(name, 1.0, positions=[1, -5, 1])), at(assay.Add(name, 1.0, positions=1)))
    assert torch.equal(at(assay.Add(name, 1.0, heads=[1, 1])), at(assay.Add(name, 1.0, heads=[1])))
    for edit in (assay.Set(name, two, positions=[1, 1]), assay.Set(name, two[:, 0], heads=[1, 1])):
        with pytest.raises(InvalidEdit, match=r"2 entries for the 1 positions|does not broadcast"):
            at(edit)


# Values


NAN = float("nan")
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a complex number": (lambda: assay.Add(SITE, 1j), "complex"),
    "complex directions": (lambda: assay.ProjectOut(SITE, torch.ones(32) * 1j), "complex"),
    "a complex function": (lambda: assay.Apply(SITE, lambda x: x.to(torch.complex64)), "complex"),
    "truth values": (lambda: assay.Apply(SITE, lambda x: x > 0), "truth values"),
    "a function without numbers": (lambda: assay.Apply(SITE, lambda x: x.to("meta")), "meta"),
    "no directions": (lambda: assay.ProjectOut(SITE, torch.zeros(0, 32)), "0 directions"),
    "more directions than room": (lambda: assay.ProjectOut(SITE, torch.randn(33, 32)), "33 directions"),
    "NaN directions": (lambda: assay.ProjectOut(SITE, torch.full((32,), NAN)), "NaN"),
    "bounds that cross": (lambda: assay.Clamp(SITE, low=1.0, high=-1.0), "low=1.0 is above high=-1.0"),
    "a NaN bound": (lambda: assay.Clamp(SITE, low=NAN), "low=nan"),
    "a bound of text": (lambda: assay.Clamp(SITE, low="a"), "low= is one number"),  # type: ignore[arg-type]
    "NaN": (lambda: assay.Set(SITE, NAN), "nan"),
    "a tensor with NaN": (lambda: assay.Add(SITE, torch.tensor([1.0, NAN]).repeat(16)), "NaN"),
    "an array with NaN": (lambda: assay.Add(SITE, np.full(32, NAN)), "NaN"),  # type: ignore[arg-type]
    "an ablation to NaN": (lambda: assay.Ablate(SITE, torch.full((32,), NAN)), "NaN"),
    "a NaN scale": (lambda: assay.Add(SITE, VECTOR, scale=NAN), "scale=nan"),
    "a scale of text": (lambda: assay.Add(SITE, VECTOR, scale="2"), "scale= is one number"),  # type: ignore[arg-type]
    "two scales": (lambda: assay.Add(SITE, VECTOR, scale=torch.ones(2)), r"shaped \(2,\)"),  # type: ignore[arg-type]
    "too many rows": (lambda: assay.Patch(SITE, torch.randn(3, 6, 32)), "3 rows, and this run 2"),
    "no function": (lambda: assay.Apply(SITE, 3), "a function of a tensor"),  # type: ignore[arg-type]
    "no site": (lambda: assay.Add(5, VECTOR), "the site comes first"),  # type: ignore[arg-type]
    "no numbers": (lambda: assay.Add(SITE, VECTOR.to("meta")), "meta"),
    "no number": (lambda: assay.Add(SITE, "x"), "a number or a tensor"),  # type: ignore[arg-type]
    "a size of text": (lambda: assay.Ablate(SITE, "noise", sigma="1"), "sigma="),  # type: ignore[arg-type]
    "a seed of text": (lambda: assay.Ablate(SITE, "noise", seed="1"), "seed='1'"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_would_be_changed_or_lost_are_refused(case: str, subject: Any) -> None:
    make, message = REFUSED[case]
    with pytest.raises(InvalidEdit, match=message):
        subject.run(IDS, edits=[make()])


def test_infinity_closes_scores_and_one_number_in_a_tensor_is_a_scale(subject: Any) -> None:
    closed = assay.Set("blocks.0.attn.scores", float("-inf"), positions=5, heads=0)
    first = torch.zeros(6)
    first[0] = 1.0
    opened = assay.Set("blocks.0.attn.scores", torch.where(first > 0, 0.0, float("-inf")), positions=5, heads=0)
    pattern = subject.run(IDS, edits=[opened], capture="blocks.0.attn.pattern")["blocks.0.attn.pattern"]
    assert torch.equal(pattern[:, 0, 5], first.expand(2, 6)) and closed.value == float("-inf")
    scaled = subject.run(IDS, edits=[assay.Add(SITE, VECTOR, scale=torch.tensor([2.0]))]).logits
    assert torch.equal(scaled, subject.run(IDS, edits=[assay.Add(SITE, VECTOR, scale=2.0)]).logits)
    bounded = assay.Clamp(SITE, low=np.float32(-0.5), high=torch.tensor(0.5))
    assert bounded == assay.Clamp(SITE, low=-0.5, high=0.5)


@pytest.mark.parametrize("given", [assay.Add(SITE, 1.0), None, "embed", 3, {"a": 1}])
def test_edits_come_as_a_list(given: Any, subject: Any) -> None:
    with pytest.raises(InvalidEdit, match="edits= is a list of edits"):
        subject.run(IDS, edits=given)


def test_edits_that_can_be_read_once_act_in_every_forward_of_a_run(subject: Any) -> None:
    """A module that writes over what was captured is run again, with the same edits."""

    class Over(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(10, 4), nn.Linear(4, 10)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.out(self.embed(input_ids))
            x.relu_()
            return x

    net, ids = assay.load(Over().eval()), torch.tensor([[1, 2, 3]])
    edits = [assay.Add("module:embed.out", 1.0)]
    expected = net.run(ids, edits=edits, capture="module:out.out")
    fresh = assay.load(net.module)
    found = fresh.run(ids, edits=iter(edits), capture="module:out.out")  # type: ignore[arg-type]
    assert torch.equal(found.logits, expected.logits)
    assert not torch.equal(found.logits, fresh.run(ids).logits)
    assert torch.equal(
        subject.run(IDS, edits=iter([assay.Ablate(SITE)])).logits, subject.run(IDS, edits=[assay.Ablate(SITE)]).logits
    )  # type: ignore[arg-type]


def test_declarations_are_a_mapping_of_texts() -> None:
    subject = assay.load(tiny_model("llama"))
    for wrong in (["q"], {"q": 3}, {3: "lm_head.out"}):
        with pytest.raises(SiteError):
            subject.declare(wrong)
        with pytest.raises(SiteError):
            assay.load(subject.module, sites=wrong)  # type: ignore[arg-type]


# Random draws at stacks that read no tokens


def _inputs(name: str) -> dict[str, Tensor]:
    """Three rows that differ, made of the two of the family's own."""
    called = {key: torch.cat([value, value[:1]]) for key, value in built(name).called.items()}
    generator = torch.Generator().manual_seed(7)
    for key, value in called.items():
        if value.is_floating_point():
            called[key] = value + torch.randn(value.shape, generator=generator)
        elif key.endswith("input_ids"):
            called[key] = torch.randint(4, 60, value.shape, generator=generator)
    return called


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("clip", "vision.blocks.0.resid_post"),
        ("clip", "text.blocks.0.resid_post"),
        ("vit", "blocks.0.resid_post"),
        ("whisper", "encoder.blocks.0.resid_post"),
        ("whisper", "decoder.blocks.0.cross_attn.k"),
        ("whisper", "decoder.blocks.0.cross_attn.rot_k"),
        ("t5", "encoder.blocks.0.resid_post"),
        ("t5", "decoder.blocks.0.cross_attn.v"),
    ],
)
def test_draws_belong_to_the_input_of_every_stack(name: str, site: str) -> None:
    subject, inputs = built(name).subject, _inputs(name)
    order = [2, 0, 1]
    other, alone = ({key: value[rows] for key, value in inputs.items()} for rows in (order, [1]))
    base, base_alone = subject.run(inputs, capture=site)[site], subject.run(alone, capture=site)[site]

    def at(x: Any, edit: Any) -> Tensor:
        found: Tensor = subject.run(x, edits=[edit], capture=site)[site]
        return found

    noise = assay.Ablate(site, "noise", sigma=1.0, seed=3)
    drawn = at(inputs, noise) - base.mean((0, 1))
    assert torch.allclose(at(other, noise) - base.mean((0, 1)), drawn[order], atol=1e-4)
    assert torch.allclose(at(alone, noise)[0] - base_alone.mean((0, 1)), drawn[1], atol=1e-4)
    assert (drawn[0] - drawn[1]).abs().max() > 0.1
    resample = assay.Ablate(site, "resample", seed=1)
    resampled = at(inputs, resample)
    assert torch.allclose(at(other, resample), resampled[order], atol=1e-6)
    pool = subject.run(inputs, capture=site)
    from_pool = at(alone, assay.Ablate(site, pool, seed=1))[0]
    for row, value in ((0, resampled[0]), (1, resampled[1]), (2, resampled[2]), (1, from_pool)):
        donors = [k for k in range(3) if torch.allclose(value, base[k], atol=1e-6)]
        assert donors and row not in donors


@pytest.mark.parametrize("site", ["encoder.blocks.0.resid_post", "decoder.blocks.0.resid_post"])
def test_an_encoders_padding_changes_no_draw(site: str) -> None:
    subject = built("t5").subject
    ids = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    noise = assay.Ablate(site, "noise", sigma=1.0)
    both = {"input_ids": ids, "attention_mask": mask}
    x, y = subject.run(both, capture=site)[site], subject.run(both, edits=[noise], capture=site)[site]
    alone = {"input_ids": ids[1:, :3]}
    a, b = subject.run(alone, capture=site)[site], subject.run(alone, edits=[noise], capture=site)[site]
    n = a.shape[1]  # a decoder that starts by itself has one position
    mean = torch.cat([x[0], x[1, :n]]).mean(0)
    assert torch.allclose(y[1, :n] - mean, b[0] - a[0].mean(0), atol=1e-4)


# Training mode, gradients, pickling


def test_a_part_in_training_mode_is_refused_where_it_matters() -> None:
    module = tiny_model("gpt2", resid_pdrop=0.5)
    subject = assay.load(module)
    module.transformer.h[0].mlp.train()
    with pytest.raises(SpecError, match=r"'transformer.h.0.mlp.dropout' in GPT2LMHeadModel is in training mode"):
        subject.run(IDS)
    module.eval()
    plain = subject.run(IDS).logits
    module.transformer.h[0].ln_1.train()  # which does the same in both
    assert torch.equal(subject.run(IDS).logits, plain)
    llama = tiny_model("llama", attention_dropout=0.5)
    subject = assay.load(llama)
    llama.model.layers[1].self_attn.train()
    with pytest.raises(SpecError, match=r"model.layers.1.self_attn"):
        subject.run(IDS)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(3), nn.LSTM(4, 4, 2, dropout=0.5)])
def test_a_module_without_a_map_is_held_to_evaluation_mode_too(layer: nn.Module) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer, self.out = nn.Embedding(10, 4), layer, nn.Linear(4, 10)

        def forward(self, input_ids: Tensor) -> Tensor:
            found = self.layer(self.embed(input_ids))
            result: Tensor = self.out(found[0] if isinstance(found, tuple) else found)
            return result

    net, ids = Net().train(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    subject = assay.load(net)
    with pytest.raises(SpecError, match=r"'layer'.*call .eval"):
        subject.run(ids)
    net.eval()
    assert torch.allclose(subject.run(ids).logits, net(ids), atol=1e-6)


@pytest.mark.parametrize("wrong", [lambda x: x.mean(), lambda x: x[:, -1], lambda x: x[:1, -1, 5]])
def test_a_metric_for_gradients_gives_one_value_a_row(wrong: Any, subject: Any) -> None:
    with pytest.raises(SpecError, match="one value a row"):
        subject.run(IDS, capture=SITE, grad=wrong)


def test_gradients_that_were_not_asked_for_say_so(subject: Any) -> None:
    run = subject.run(IDS, capture=SITE)
    with pytest.raises(SiteError, match=r"not differentiated in this run .*give a metric as grad="):
        run.grad[SITE]
    assert not run.grad and SITE not in run.grad
    assert len(subject.run(IDS, capture=SITE, grad=metric).grad) == 1


def test_weights_made_in_inference_mode_have_no_gradients() -> None:
    with torch.inference_mode():
        module = tiny_model("llama")
    subject = assay.load(module)
    assert subject.run(IDS, capture=SITE)[SITE].shape == (2, 6, 32)
    with pytest.raises(SpecError, match="inference_mode"):
        subject.run(IDS, capture=SITE, grad=metric)


def test_a_gradient_that_nothing_leads_to_is_refused() -> None:
    subject = assay.load(tiny_model("gpt2").requires_grad_(False))
    with pytest.raises(SpecError, match="no gradient at 'pos_embed'"):
        subject.run(IDS, capture="pos_embed", grad=metric)
    assert subject.run(IDS, capture="embed", grad=metric).grad["embed"].any()


def test_a_subject_that_was_used_can_be_pickled(subject: Any) -> None:
    expected = subject.run(IDS, capture=[SITE, "blocks.1.attn.result"], grad=metric)
    again = pickle.loads(pickle.dumps(subject))
    found = again.run(IDS, capture=[SITE, "blocks.1.attn.result"], grad=metric)
    assert torch.equal(found[SITE], expected[SITE]) and torch.equal(found.grad[SITE], expected.grad[SITE])
    assert again.fingerprint == subject.fingerprint and again.checks == subject.checks
    run = pickle.loads(pickle.dumps(expected))
    assert torch.equal(run[SITE], expected[SITE]) and run[SITE].dims == ("batch", "pos", "d_model")


def test_a_pickled_subject_keeps_the_hash_of_its_source() -> None:
    from assay.activations.subject import Subject

    subject = Subject(tiny_model("llama"), fingerprint="the hash of its files")
    again = pickle.loads(pickle.dumps(subject))
    assert again.fingerprint == "the hash of its files"
    again.module.lm_head.weight.data[0, 0] += 1
    assert again.fingerprint != "the hash of its files"
    assert pickle.loads(pickle.dumps(again)).fingerprint == again.fingerprint


# Messages


@pytest.mark.parametrize("name", ["blocks.0.ssm.outt", "blocks.0.cross_attn.zz", "blocks.1.mlp.routers"])
def test_only_sites_that_the_model_has_are_offered(name: str, subject: Any) -> None:
    for ask in (subject.site, lambda name: subject.run(IDS, capture=name)):
        with pytest.raises(UnknownSite) as error:
            ask(name)
        offered = str(error.value).split("did you mean")[1].split("'")[1::2]
        assert offered and set(offered) <= set(subject.sites())


def test_prompts_in_lists_and_no_prompts_are_called_what_they_are(subject: Any) -> None:
    for prompt in ([[1, 2, 3]], [1, 2, 3]):
        with pytest.raises(SpecError, match=r"token ids .* tensor \[batch, pos\]"):
            subject.tokens(prompt)
        with pytest.raises(SpecError, match=r"token ids .* tensor \[batch, pos\]"):
            subject.run(prompt)
    with pytest.raises(SpecError, match="no prompt was given"):
        subject.tokens([])
    with pytest.raises(SpecError, match="no tokenizer"):
        subject.tokens(["a text"])


def test_weights_that_are_no_numbers_are_blamed_for_logits_that_are_none() -> None:
    module = tiny_model("llama")
    with torch.no_grad():
        module.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    refused = assay.load(module).refused
    assert "logits hold NaN" in refused and "'model.layers.0.mlp.up_proj.weight'" in refused
    assert "capturing" not in refused


def test_a_compiled_module_is_said_to_be_compiled() -> None:
    in_place, part = tiny_model("llama"), tiny_model("llama")
    in_place.compile(backend="eager")
    part.model.layers[1].mlp.compile(backend="eager")
    for module, name in (
        (torch.compile(tiny_model("llama"), backend="eager"), "Llama"),
        (in_place, "Llama"),
        (part, "'model.layers.1.mlp'"),
    ):
        subject = assay.load(module)
        assert f"{name}" in subject.refused and "torch.compile" in subject.refused
        with pytest.raises(AssayError, match=r"torch\.compile"):
            subject.run(IDS, capture=SITE)
