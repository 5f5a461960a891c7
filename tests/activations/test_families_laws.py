"""What holds for every family: padding, threads, gradients, and modules that write over what was captured."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import pytest
import torch
from family_facts import ROWS
from family_models import Built, built, close
from plain_hooks import gradients_of, logits_of, read_all, traces
from torch import Tensor, nn

import assay
from assay.base.errors import SpecError
from assay.subjects.families import family_of
from assay.subjects.tiny import tiny_model

TEXTS = list(
    {row.model_type: name for name, row in reversed(ROWS.items()) if row.inputs in ("tokens", "pairs")}.values()
)
FEW = (
    *("gpt2", "llama", "falcon", "falcon, ALiBi", "bloom", "gptj", "mpt", "opt", "gemma2", "bert", "modernbert", "t5"),
    *("vit", "mamba", "mamba2", "mixtral", "gpt_oss", "deepseek_v3", "whisper", "clip"),
)


@pytest.fixture(params=list(ROWS), name="family")
def _family(request: pytest.FixtureRequest) -> Built:
    return built(request.param)


# Padding


def padded(ids: Tensor, lengths: list[int], side: str) -> tuple[Tensor, Tensor]:
    """Rows cut to lengths and padded, and their mask."""
    out, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(ids.shape[1] - length, None)
        out[row, place], mask[row, place] = ids[row, :length], 1
    return out, mask


def real(value: Tensor, dims: tuple[str, ...], row: int, lengths: dict[str, tuple[int, int]]) -> Tensor:
    """One row's values at its real positions; `lengths` has the start and the length of each kind of position."""
    value = value[row]
    for axis, name in enumerate(dims[1:]):
        if name in lengths:
            value = value.narrow(axis, *lengths[name])
    return value


@cache
def by_itself(name: str, length: int) -> Any:
    """The second prompt's start, run alone."""
    family = built(name)
    called = {key: value[1:] for key, value in family.called.items()}
    called["input_ids"] = called["input_ids"][:, :length]
    return family.subject.run(called, capture=seen_of(family.subject))


def seen_of(subject: Any) -> list[str]:
    """The sites that padding must not reach: those of the last block, which stand on all others, and outside."""
    return [site for site in subject.sites() if "blocks.0." not in site and not site.endswith(".result")]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TEXTS)
def test_padding_gives_each_prompt_its_own_numbers(name: str, side: str) -> None:
    family = built(name)
    subject, ids = family.subject, family.called["input_ids"]
    short = 4
    rows, mask = padded(ids, [ids.shape[1], short], side)
    pairs = family.row.inputs == "pairs"
    given: Any = family.called | {"input_ids": rows, "attention_mask": mask}
    if side not in subject.sides:
        with pytest.raises(SpecError, match=f"padded on the {side}: pad on the right"):
            subject.run(given)
        return
    sites = seen_of(subject)
    together, apart = subject.run(given, capture=sites), by_itself(name, short)
    start = ids.shape[1] - short if side == "left" else 0
    for site in sites:
        stack, point = subject.site(site).stack or ("decoder" if pairs else ""), subject.site(site).point
        cut, whole = (start, short), (0, together.logits.shape[1])
        queries = whole if stack == "decoder" else cut
        keys = cut if stack != "decoder" or "cross_attn" in point else whole
        own = cut if stack != "decoder" or point in ("cross_attn.k", "cross_attn.v", "cross_attn.rot_k") else whole
        lengths = {"pos": own, "query": queries, "key": keys}
        found = real(together[site], together[site].dims, 1, lengths)
        expected = apart[site][0]
        assert found.shape == expected.shape, site
        if point.endswith("scores"):
            assert torch.equal(found > -1e30, expected > -1e30), site
            found, expected = (x.clamp(min=-1e6) for x in (found, expected))
            found, expected = (torch.where(expected > -1e6, x, 0.0) for x in (found, expected))
            if "mpt" in name:  # its ALiBi counts from the end of the batch: a constant more for all keys of a query
                found = torch.where(expected == 0, 0.0, found - (found - expected)[..., :1])
        assert close(found.float(), expected.float(), 2e-5), site


def test_a_tokenizers_own_output_is_a_prompt() -> None:
    """What `tokenizer(texts, return_tensors="pt")` returns, padded on either side."""
    family = built("gpt2")
    ids = family.called["input_ids"]
    for side in ("left", "right"):
        rows, mask = padded(ids, [7, 4], side)
        found = family.subject.run({"input_ids": rows, "attention_mask": mask}, capture="blocks.1.resid_post")
        expected = family.subject.run(rows, mask=mask, capture="blocks.1.resid_post")
        assert torch.equal(found["blocks.1.resid_post"], expected["blocks.1.resid_post"])
    segments = {"input_ids": padded(ids, [7, 4], "left")[0], "attention_mask": padded(ids, [7, 4], "left")[1]}
    segments["token_type_ids"] = torch.ones_like(ids)
    bert = built("bert").subject
    alone = {"input_ids": ids[1:, :4], "token_type_ids": torch.ones(1, 4, dtype=torch.long)}
    assert close(bert.run(segments).logits[1, 3:], bert.run(alone).logits[0], 1e-5)


# Threads


@pytest.mark.parametrize("name", FEW)
def test_runs_in_threads_never_mix(name: str) -> None:
    family = built(name)
    subject, module = family.subject, family.module
    prefix = f"{list(subject.stacks)[-1]}." if list(subject.stacks)[-1] else ""
    site = f"{prefix}blocks.1.resid_pre"
    watched = [s for s in subject.sites() if s.endswith(("1.attn.pattern", "1.ssm.post"))]
    with torch.no_grad():
        plain = logits_of(module(**family.called))
    vectors = [torch.zeros(32), torch.linspace(-1.0, 2.0, 32)]
    expected = [subject.run(family.x, edits=[assay.Add(site, v)], capture=watched[-1:]) for v in vectors]
    wrong: list[str] = []

    def work(i: int) -> None:
        for _ in range(5):
            run = subject.run(family.x, edits=[assay.Add(site, vectors[i])], capture=watched[-1:])
            same = torch.equal(run.logits, expected[i].logits)
            same = same and all(torch.equal(run[s], expected[i][s]) for s in watched[-1:])
            wrong.extend([] if same else [f"thread {i}"])

    def bare() -> None:
        for _ in range(6):
            with torch.no_grad():
                own = logits_of(module(**family.called))
                wrong.extend([] if torch.equal(own, plain) else ["the module's own call"])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)] + [threading.Thread(target=bare)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert traces(module) == family.before


# Gradients


def metric(logits: Tensor) -> Tensor:
    """One value a row, of whatever the model gives."""
    return (logits.flatten(1) * torch.linspace(-1.0, 1.0, logits[0].numel())).sum(1)


def test_gradients_are_plain_autograds(family: Built) -> None:
    subject = family.subject
    left = {"pos_embed", "mlp.experts", "mlp.router"}  # without rows; whole numbers; without an effect
    facts = {
        site: at
        for site, at in family.row.facts.items()
        if subject.site(site).point not in left and site not in subject.overwritten
    }
    expected = gradients_of(family.module, family.called, facts, metric)
    run = subject.run(family.x, capture=list(facts), grad=metric)
    assert run.grad is not None
    assert close(run.logits, subject.run(family.x).logits, 1e-5)
    for site, gradient in expected.items():
        assert run.grad[site].shape == gradient.shape, site
        assert close(run.grad[site], gradient, 2e-5), site
    assert any(bool(gradient.any()) for gradient in expected.values())
    assert traces(family.module) == family.before


# Modules that write over what was captured


def test_falcons_mlp_output_is_kept_before_attention_is_added_to_it() -> None:
    module: Any = tiny_model("falcon")
    subject: Any = assay.Subject(module, architecture=family_of("falcon"))
    facts = {name: at for name, at in ROWS["falcon"].facts.items() if name.endswith("mlp.out")}
    ids = torch.tensor([[5, 9, 12, 30]])
    _, seen = read_all(module, {"input_ids": ids}, facts)
    for _ in range(2):  # the first run has to be repeated; the next knows
        run = subject.run(ids, capture="blocks.*.mlp.out")
        for site, expected in seen.items():
            assert torch.equal(run[site], expected)
        assert subject.overwritten == set(facts)
    assert torch.equal(run.logits, logits_of(module(ids)).detach())
    graph = subject.run(ids, capture=["blocks.0.mlp.out", "blocks.0.attn.out"], grad=metric)
    delta = torch.linspace(-1.0, 1.0, 32)
    for site in ("blocks.0.mlp.out", "blocks.0.attn.out"):
        shifted = [metric(subject.run(ids, edits=[assay.Add(site, delta, scale=s)]).logits) for s in (1e-2, -1e-2)]
        slope = float(shifted[0] - shifted[1]) / 2e-2
        assert float((graph.grad[site] * delta).sum()) == pytest.approx(slope, rel=2e-2)


class Net(nn.Module):
    """A small CNN whose nonlinearities write over what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True)
        self.conv2, self.relu2 = nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True)
        self.out = nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        found: Tensor = self.out(x.flatten(1))
        return found


@pytest.mark.parametrize("grad", [None, metric])
def test_in_place_nonlinearities_do_not_reach_what_was_captured(grad: Any) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    before = traces(net)
    subject = assay.load(net)
    x = torch.randn(2, 1, 8, 8)
    sites = ["module:conv1.out", "module:relu1.out", "module:conv2.out", "module:relu2.in"]
    for _ in range(2):
        run = subject.run(x, capture=sites, grad=grad)
        with torch.no_grad():
            first = net.conv1(x)
            second = net.conv2(first.relu())
        assert torch.equal(run["module:conv1.out"], first)
        assert torch.equal(run["module:relu1.out"], first.relu())
        assert torch.equal(run["module:conv2.out"], second)
        assert torch.equal(run["module:relu2.in"], second)
        assert subject.overwritten == {"module:conv1.out", "module:conv2.out", "module:relu2.in"}
    edited = subject.run(x, edits=[assay.Add("module:conv1.out", 0.5)], capture="module:conv1.out")
    assert torch.equal(edited["module:conv1.out"], first + 0.5)
    with torch.no_grad():
        assert torch.equal(edited.logits, net.out(net.conv2((first + 0.5).relu()).relu().flatten(1)))
    assert traces(net) == before
    if grad is None:
        return
    leaf = first.clone().requires_grad_()
    metric(net.out(net.conv2(leaf.relu()).relu().flatten(1))).sum().backward()
    assert leaf.grad is not None
    assert close(run.grad["module:conv1.out"], leaf.grad, 1e-6)


def test_runs_work_in_inference_mode() -> None:
    for name in ("gpt2", "falcon", "mixtral", "bloom"):
        family = built(name)
        sites = family.subject.sites()
        expected = family.subject.run(family.x, capture=sites)
        with torch.inference_mode():
            found = family.subject.run(family.x, capture=sites)
            gradient = family.subject.run(family.x, capture="blocks.1.resid_pre", grad=metric)
        assert all(torch.equal(found[site], expected[site]) for site in sites)
        assert bool(gradient.grad["blocks.1.resid_pre"].any())
