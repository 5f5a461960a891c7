"""Weight nulls keep scale or spectrum, destroy the rest, and never touch the user's module."""

from __future__ import annotations

import hashlib
import threading

import pytest
import torch
from torch import nn

from assay.base.errors import UnsupportedArchitecture
from assay.controls import WeightNull, reinitialised_module

MODELS = {
    "gpt2": {},
    "llama": {"tie_word_embeddings": True},
    "gemma2": {},
    "gpt_neox": {},
}
KINDS = ["gaussian", "spectrum"]
TOKENS = torch.tensor([[1, 5, 9, 30, 7, 2]])


@pytest.fixture(params=sorted(MODELS))
def model(request, tiny_module):
    return tiny_module(request.param, **MODELS[request.param])


def fingerprint(module):
    sha = hashlib.sha256()
    for name, tensor in module.state_dict(keep_vars=True).items():
        sha.update(name.encode())
        sha.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
        sha.update(str((id(tensor), tensor.data_ptr(), tensor.requires_grad)).encode())
    return sha.hexdigest()


def matrices(module):
    return {name: weight for name, weight in module.named_parameters() if weight.ndim >= 2}


@pytest.mark.parametrize("kind", KINDS)
def test_the_users_module_is_untouched_and_the_copy_shares_nothing_with_it(model, kind):
    before, config, logits = fingerprint(model), model.config.to_dict(), model(TOKENS).logits
    redrawn = reinitialised_module(model, kind, seed=0)
    with torch.no_grad():
        for weight in redrawn.parameters():
            weight.zero_()
        for buffer in redrawn.buffers():
            buffer.zero_()
    assert fingerprint(model) == before
    assert model.config.to_dict() == config
    assert torch.equal(model(TOKENS).logits, logits)
    ours = {id(part) for part in [*model.modules(), *model.parameters(), *model.buffers(), model.config]}
    theirs = {id(part) for part in [*redrawn.modules(), *redrawn.parameters(), *redrawn.buffers(), redrawn.config]}
    assert not ours & theirs


@pytest.mark.parametrize("kind", KINDS)
def test_architecture_mode_and_ties_are_kept(model, kind):
    redrawn = reinitialised_module(model, kind, seed=0)
    assert type(redrawn) is type(model)
    assert redrawn.config.to_dict() == model.config.to_dict()
    assert redrawn.config._attn_implementation == model.config._attn_implementation
    assert [name for name, _ in redrawn.named_modules()] == [name for name, _ in model.named_modules()]
    assert not any(part.training for part in redrawn.modules())
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == bool(model.config.tie_word_embeddings)
    assert (redrawn.get_input_embeddings().weight is redrawn.get_output_embeddings().weight) == tied
    for (name, theirs), ours in zip(redrawn.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(theirs, ours), name
    for theirs, ours in zip(redrawn.parameters(), model.parameters(), strict=True):
        assert (theirs.shape, theirs.dtype, theirs.requires_grad) == (ours.shape, ours.dtype, ours.requires_grad)


def test_rotary_tables_are_there_to_be_kept(tiny_module):
    """Otherwise the test of the buffers above would be about nothing."""
    redrawn = reinitialised_module(tiny_module("llama"), "gaussian", seed=0)
    tables = [buffer for name, buffer in redrawn.named_buffers() if "inv_freq" in name]
    assert tables
    assert float(tables[0][0]) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_finite_of_the_right_shape_and_unlike_the_models(model, kind):
    with torch.no_grad():
        ours, theirs = model(TOKENS).logits, reinitialised_module(model, kind, seed=0)(TOKENS).logits
    assert theirs.isfinite().all()
    assert theirs.shape == ours.shape
    cosine = torch.cosine_similarity((ours - ours.mean()).ravel(), (theirs - theirs.mean()).ravel(), dim=0)
    assert abs(float(cosine)) < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_stay_and_every_matrix_forgets_what_it_held(model, kind):
    redrawn = reinitialised_module(model, kind, seed=0)
    new = dict(redrawn.named_parameters())
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            assert torch.equal(new[name], weight), name
        else:
            cosine = torch.cosine_similarity(new[name].detach().ravel(), weight.detach().ravel(), dim=0)
            assert abs(float(cosine)) < 6 * weight.numel() ** -0.5, name


def test_the_spectrum_is_kept_and_the_singular_vectors_are_not(model):
    redrawn = dict(reinitialised_module(model, "spectrum", seed=0).named_parameters())
    for name, weight in matrices(model).items():
        u, s, v = torch.linalg.svd(weight.detach().double(), full_matrices=False)
        new_u, new_s, new_v = torch.linalg.svd(redrawn[name].detach().double(), full_matrices=False)
        assert torch.allclose(new_s, s, rtol=1e-4, atol=1e-5 * float(s[0])), name
        for old, new in ((u, new_u), (v.T, new_v.T)):
            k, d = 4, len(old)
            overlap = float((old[:, :k].T @ new[:, :k]).square().sum()) / k  # 1 for the same top space, k/d for any
            assert overlap < k / d + 6 * (2 / (k * d)) ** 0.5, name


def test_gaussian_matrices_have_the_mean_and_sd_of_their_own():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(200, 150), nn.Linear(150, 100))
    with torch.no_grad():
        module[0].weight.copy_(torch.rand(150, 200) ** 4 + 3.0)  # skewed, far from zero
        module[1].weight.mul_(1e-3)
    redrawn = reinitialised_module(module, "gaussian", seed=0)
    for ours, theirs in zip(matrices(module).values(), matrices(redrawn).values(), strict=True):
        ours, theirs = ours.detach(), theirs.detach()
        mean, sd, n = float(ours.mean()), float(ours.std()), ours.numel()
        assert float(theirs.mean()) == pytest.approx(mean, abs=5 * sd / n**0.5)
        assert float(theirs.std()) == pytest.approx(sd, rel=5 / (2 * n) ** 0.5)
        z = (theirs - mean) / sd
        assert abs(float((z**3).mean())) < 5 * (6 / n) ** 0.5  # no skew left
        assert float((z**4).mean()) == pytest.approx(3, abs=5 * (24 / n) ** 0.5)


def test_long_sides_keep_their_spectrum_and_are_done_in_slices(monkeypatch):
    """A vocabulary of 600 x 40, with the limits lowered so that it counts as long; both orientations."""
    from assay.controls import rotations, weights

    monkeypatch.setattr(rotations, "MIXED_UP_TO", 500)
    monkeypatch.setattr(weights, "_CHUNK", 256)
    torch.manual_seed(0)
    module = nn.ModuleList([nn.Embedding(600, 40), nn.Linear(600, 40, bias=False), nn.Linear(600, 601, bias=False)])
    redrawn = reinitialised_module(module, "spectrum", seed=0)
    for ours, theirs in zip(module.parameters(), redrawn.parameters(), strict=True):
        ours, theirs = ours.detach(), theirs.detach()
        spectrum = torch.linalg.svdvals(ours)
        assert torch.allclose(torch.linalg.svdvals(theirs), spectrum, rtol=1e-4, atol=1e-5 * float(spectrum[0]))
        assert abs(float(torch.cosine_similarity(ours.ravel(), theirs.ravel(), dim=0))) < 6 * ours.numel() ** -0.5
    rows = redrawn[0].weight.detach().norm(dim=1).sort().values
    assert torch.allclose(rows, module[0].weight.detach().norm(dim=1).sort().values, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_and_stacks_of_matrices_are_redrawn_each_as_a_matrix(kind):
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(8, 12, 3)
            self.experts = nn.Parameter(torch.randn(3, 10, 6) * torch.tensor([1.0, 5.0, 25.0])[:, None, None])

    torch.manual_seed(0)
    module = Mixture()
    redrawn = reinitialised_module(module, kind, seed=0)
    assert redrawn.conv.weight.shape == (12, 8, 3)
    assert not torch.allclose(redrawn.conv.weight, module.conv.weight)
    assert torch.equal(redrawn.conv.bias, module.conv.bias)
    if kind == "spectrum":
        svd = torch.linalg.svdvals
        assert torch.allclose(svd(redrawn.conv.weight.flatten(1)), svd(module.conv.weight.flatten(1)), rtol=1e-4)
        assert torch.allclose(svd(redrawn.experts), svd(module.experts), rtol=1e-4)
        unit = redrawn.experts.detach() / redrawn.experts.detach().norm(dim=(1, 2), keepdim=True)
        assert abs(float((unit[0] * unit[1]).sum())) < 0.6  # each expert is rotated by its own pair


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision_is_kept(tiny_module, kind, dtype):
    model = tiny_module("llama").to(dtype).train()
    redrawn = reinitialised_module(model, kind, seed=0)
    assert {weight.dtype for weight in redrawn.parameters()} == {dtype}
    assert redrawn.training
    rtol = 1e-10 if dtype == torch.float64 else 2e-2
    if kind == "spectrum":
        for ours, theirs in zip(matrices(model).values(), matrices(redrawn).values(), strict=True):
            spectrum = torch.linalg.svdvals(ours.detach().double())
            assert torch.allclose(
                torch.linalg.svdvals(theirs.double()), spectrum, rtol=rtol, atol=rtol * float(spectrum[0])
            )


@pytest.mark.parametrize("kind", KINDS)
def test_weights_tied_by_memory_alone_stay_tied(kind):
    one, other = nn.Linear(6, 5, bias=False), nn.Linear(6, 5, bias=False)
    other.weight = nn.Parameter(one.weight.data)  # two parameters, one memory
    redrawn = reinitialised_module(nn.ModuleList([one, other]), kind, seed=0)
    assert redrawn[0].weight is not redrawn[1].weight
    assert redrawn[0].weight.data_ptr() == redrawn[1].weight.data_ptr()
    assert not torch.allclose(redrawn[0].weight, one.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_can_be_kept(tiny_module, kind):
    model = tiny_module("llama", tie_word_embeddings=True)
    redrawn = reinitialised_module(model, kind, seed=0, keep_embeddings=True)
    assert torch.equal(redrawn.lm_head.weight, model.lm_head.weight)
    assert not torch.allclose(redrawn.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_reuse_one_buffer_and_do_not_depend_on_each_other(model, kind):
    null = WeightNull(model, kind)
    first = null.draw(3)
    memory = [weight.data_ptr() for weight in first.parameters()]
    kept = {name: value.clone() for name, value in first.state_dict().items()}
    other = null.draw(4)
    assert other is first
    assert [weight.data_ptr() for weight in other.parameters()] == memory
    assert not any(torch.equal(kept[name], weight) for name, weight in matrices(other).items())
    for weight in other.parameters():
        weight.data.fill_(7.0)  # whatever happens to a draw, the next one is made from the user's weights
    for again in (null.draw(3), WeightNull(model, kind).draw(3), reinitialised_module(model, kind, 3)):
        for name, value in again.state_dict().items():
            assert torch.equal(value, kept[name]), name
    for name, weight in matrices(null.draw(3, number=1)).items():
        assert not torch.equal(weight, kept[name]), name


def test_what_a_draw_does_to_its_buffers_does_not_reach_the_next_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    null = WeightNull(model, "gaussian")

    def run(module):
        module(torch.ones(8, 4))
        return float(module[1].running_mean.detach().norm())

    forwards = [run(null.draw(seed)) for seed in (0, 1, 2)]
    assert [run(null.draw(seed)) for seed in (2, 1, 0)] == forwards[::-1]
    assert float(model[1].running_mean.norm()) == 0.0


def test_a_sample_is_one_number_a_draw(tiny_module):
    model = tiny_module("gpt2")
    null = WeightNull(model, "spectrum")

    def run(module):
        with torch.no_grad():
            logits = module(TOKENS).logits
        return float(logits[0, -1, 3] - logits[0, -1, 4])

    sample = null.sample(run, n=4, seed=1)
    assert len(set(sample)) == 4
    assert sample == tuple(run(null.draw(1, number)) for number in range(4))
    assert null.sample(run, n=2, seed=1) == sample[:2]


def test_the_draw_of_a_tensor_does_not_depend_on_the_other_tensors():
    torch.manual_seed(0)
    small = nn.ModuleDict({"a": nn.Linear(120, 100)})
    large = nn.ModuleDict({"z": nn.Linear(100, 100), "a": small["a"]})
    for kind in KINDS:
        one, other = reinitialised_module(small, kind, 0), reinitialised_module(large, kind, 0)
        assert torch.equal(one["a"].weight, other["a"].weight)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_tensors_get_draws_of_their_own(kind):
    torch.manual_seed(0)
    one = nn.Linear(120, 100)
    other = nn.Linear(120, 100)
    other.load_state_dict(one.state_dict())
    redrawn = reinitialised_module(nn.ModuleList([one, other]), kind, seed=0)
    ours, theirs = (layer.weight.detach().ravel() for layer in redrawn)
    assert abs(float(torch.cosine_similarity(ours, theirs, dim=0))) < 6 * ours.numel() ** -0.5


def test_what_cannot_be_redrawn_is_refused():
    quantised = nn.Linear(3, 3)
    quantised.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedArchitecture, match=r"'weight' is of dtype torch.int8"):
        WeightNull(quantised, "gaussian")
    with pytest.raises(UnsupportedArchitecture, match="on the meta device"):
        WeightNull(nn.Linear(3, 3, device="meta"), "gaussian")
    locked = nn.Linear(3, 3)
    locked.lock = threading.Lock()
    with pytest.raises(UnsupportedArchitecture, match=r"Linear cannot be copied .*lock"):
        WeightNull(locked, "gaussian")
