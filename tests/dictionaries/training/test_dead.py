"""Dead latents: gradients of the remedies against autograd, and each remedy's effect against doing nothing."""

from __future__ import annotations

import functools

import pytest
import torch
from dense import LATENTS, PLAIN, ROWS, SETTINGS, D, loss

from assay.dictionaries.dictionary import Site
from assay.dictionaries.families.family import Selected
from assay.dictionaries.kernels.backend import backend
from assay.dictionaries.latents import SparseLatents
from assay.dictionaries.settings import Training
from assay.dictionaries.training.begin import begin
from assay.dictionaries.training.dead import count, resample
from assay.dictionaries.training.mesh import Mesh
from assay.dictionaries.training.step import dense_gradients, forward_backward
from assay.dictionaries.training.trainer import Trainer
from assay.dictionaries.training.weights import row_weights
from assay.zoo.features import SITE, Features

SITES = (Site(SITE, D),)
AUX = ("topk", "batchtopk", "matryoshka", "jumprelu", "gated")
GHOST = ("l1", "l1-april", "p-anneal")


def shut(name: str, **more):
    """A state in which a third of the latents are lower than the others, and those that are silent count as dead."""
    settings = Training(
        **({"latents": LATENTS, "steps": 10, "batch": ROWS, "sparsity_warmup": 0.0, "dead_after": 10} | SETTINGS[name]),
        **more,
    )
    stream = torch.Generator().manual_seed(2)
    x = torch.randn(ROWS, D, generator=stream) * 3 + 1
    state = begin(settings, x, x, SITES, SITES)
    for weight_name, weight in state.weights():
        if "threshold" not in weight_name:
            weight += 0.1 * torch.randn(weight.shape, generator=stream)
    part = state.parts[0]
    if name in ("jumprelu", "gated"):  # open, but never as much as it takes
        part.own[{"jumprelu": "threshold", "gated": "offset"}[name]][::3] = {"jumprelu": 9.0, "gated": -9.0}[name]
    else:
        part.b_enc[::3] -= 8.0 if name in GHOST else 1.5
    return settings, state, x * state.scale_in


def compared(name: str, path: str, extra, longer: float = 1.0, **more):
    """Closed-form gradients and autograd's of the family's loss plus an extra one, with which latents were dead."""
    settings, state, x = shut(name, **(PLAIN | more))
    x[[5, 40]] *= longer
    kernels = backend("cpu", path)
    weights = {n.rpartition(".")[2]: w.clone().requires_grad_() for n, w in state.weights()}
    gradients, _, error = forward_backward(state, settings, kernels, x, x)
    dead = state.silent[0] >= settings.dead_after
    assert 2 < int(dead.sum()) < LATENTS
    held = row_weights(settings, x, error, Mesh())
    assert bool((held < 0.05).any()) == (longer > 1)
    before = loss(weights, x, x, settings, state.step, state.centred, held=held)
    (before + extra(weights, x, -error, dead, settings, held)).backward()
    found = dense_gradients(state, settings, kernels, gradients)
    for weight_name, tensor in found.items():
        wanted = weights[weight_name.rpartition(".")[2]].grad
        assert float((tensor - wanted).norm() / wanted.norm()) <= 1e-5, weight_name
    return found, dead


def auxiliary_loss(weights, x, left, dead, settings, held):
    h = ((x - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"])[:, dead]
    top = h.topk(min(D // 2, int(dead.sum())), dim=1)
    z = torch.zeros_like(h).scatter(1, top.indices, top.values.relu())
    guess = z @ weights["W_dec"][dead]
    spread = (x - x.mean(0)).square().sum() / (left - left.mean(0)).square().sum()
    return settings.aux * spread * (held @ (guess - left).square().sum(1)) / len(x)


def ghost_loss(weights, x, left, dead, settings, held):
    active = (((x - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"])[:, dead]).exp()
    written = active @ weights["W_dec"][dead]
    scale = (left.norm(dim=1, keepdim=True) / (2 * written.norm(dim=1, keepdim=True) + 1e-6)).detach()
    miss = held @ (scale * written - left).square().sum(1) / len(x)
    main = held @ left.square().sum(1) / len(x)
    share = dead.float().mean() if settings.dead == "ghost-scaled" else 1.0
    return miss * (main / miss).detach() * share


@pytest.mark.parametrize("path", ["plain", "compiled"])
@pytest.mark.parametrize("name", AUX)
def test_gradients_of_the_auxiliary_loss_are_autograds(name, path):
    with_aux, dead = compared(name, path, auxiliary_loss, dead="aux", aux=0.5)
    assert with_aux["0.W_dec"][dead].norm() > 0 and with_aux["0.W_enc"][dead].norm() > 0


@pytest.mark.parametrize("path", ["plain", "compiled"])
@pytest.mark.parametrize("dead", ["ghost", "ghost-scaled"])
@pytest.mark.parametrize("name", GHOST)
def test_ghost_gradients_are_autograds(name, dead, path):
    compared(name, path, ghost_loss, dead=dead)


@pytest.mark.parametrize(("name", "dead"), [("topk", "aux"), ("gated", "aux"), ("l1", "ghost"), ("p-anneal", "ghost")])
def test_the_remedies_hold_outliers_back_too(name, dead):
    extra = auxiliary_loss if dead == "aux" else ghost_loss
    compared(name, "plain", extra, longer=30.0, outliers=2.0, dead=dead)


def test_dead_latents_do_not_all_start_again_from_one_outlier():
    def chosen(**more):
        settings, state, x = shut("l1", dead="resample", **more)
        x[5] *= 300.0
        error = 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
        error[5] *= 300.0
        which = state.silent[0] >= 0
        state.silent[0][:] = settings.dead_after
        resample(state, settings, x, error)
        outlier = torch.nn.functional.normalize(-error[5], dim=0)
        return float(((state.parts[0].W_dec[which] @ outlier) > 0.999).float().mean())

    assert chosen(outliers=None) == 1.0 and chosen(outliers=1.0) < 0.2


def test_scaled_ghost_gradients_are_the_published_ones_times_the_dead_share():
    found = {}
    for dead in ("ghost", "ghost-scaled"):
        settings, state, x = shut("l1", dead=dead)
        gradients, _, _ = forward_backward(state, settings, backend("cpu"), x, x)
        found[dead] = gradients.parts[0].extra
        share = float((state.silent[0] >= settings.dead_after).float().mean())
    for name in ("W_enc", "b_enc", "W_dec"):
        published, scaled = getattr(found["ghost"], name), getattr(found["ghost-scaled"], name)
        assert 0 < share < 1 and float((scaled - share * published).norm() / scaled.norm()) <= 1e-5


def test_no_remedy_without_dead_latents():
    for name, dead in (("topk", "aux"), ("l1", "ghost")):
        settings, state, x = shut(name, dead=dead)
        state.silent[0][:] = -ROWS  # what was seen before makes none of them dead
        with_remedy, _, _ = forward_backward(state, settings, backend("cpu"), x, x)
        _, other, _ = shut(name, dead="none")
        without, _, _ = forward_backward(other, settings.model_copy(update={"dead": "none"}), backend("cpu"), x, x)
        assert with_remedy.parts[0].extra is None
        assert torch.equal(with_remedy.parts[0].slopes, without.parts[0].slopes)


def selected(z: torch.Tensor) -> list[Selected]:
    pairs = SparseLatents.from_dense(z)
    return [Selected(pairs=pairs, h=pairs.values)]


def test_silence_is_counted_in_rows_and_ended_by_any_row():
    settings, state, _ = shut("topk")
    state.silent[0][:] = 0
    z = torch.zeros(4, LATENTS)
    z[3, 5] = 1.0
    z[0, 6] = 1.0
    dead = count(state, settings, selected(z), Mesh())
    assert state.silent[0][[4, 5, 6]].tolist() == [4, 0, 0] and not dead[0].any()
    z[3, 5] = 0.0
    for rows in (4, 8, 12):
        assert state.silent[0][5] == rows - 4
        dead = count(state, settings, selected(z), Mesh())
    assert state.silent[0][[5, 6]].tolist() == [12, 0]
    assert dead[0][5] and not dead[0][6], "one row in four is not dead"


def test_a_pair_that_is_near_but_not_active_does_not_end_the_silence():
    settings, state, x = shut("jumprelu", dead="none")
    state.silent[0][:] = 0
    part = state.parts[0]
    h = (x - state.b_dec) @ part.W_enc.T + part.b_enc
    part.own["threshold"][::2] = h.max(0).values[::2] + 0.1  # the window reaches 0.2 below
    gradients, _, _ = forward_backward(state, settings, backend("cpu"), x, x)
    near = set(gradients.parts[0].pairs.latents.tolist())
    active = set(gradients.parts[0].pairs.latents[gradients.parts[0].pairs.values > 0].tolist())
    assert near - active == set(range(0, LATENTS, 2)), "these are only inside the window"
    assert {f for f in range(LATENTS) if state.silent[0][f] == 0} == active


@pytest.mark.parametrize("family", ["l1", "l1-april", "gated", "jumprelu"])
def test_resampled_latents_start_again_with_the_published_lengths(family):
    settings, state, x = shut(family, dead="resample")
    part = state.parts[0]
    for name, moments in state.moments.items():
        for moment in moments:
            moment += 1.0
        if name.rpartition(".")[2] in part.own:
            part.own[name.rpartition(".")[2]][:] = 3.0
    dead = torch.zeros(LATENTS, dtype=torch.bool)
    dead[::3] = True
    state.silent[0][:] = torch.where(dead, 10, 0)
    error = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    error[7] *= 1000  # nearly all of the squared squared error
    living = part.W_enc[~dead].clone()
    assert resample(state, settings, x, error) == int(dead.sum())
    assert torch.equal(part.W_enc[~dead], living)
    torch.testing.assert_close(part.W_dec[dead], (-error[7] / error[7].norm()).expand(int(dead.sum()), -1))
    wanted = (x[7] - x.mean(0)) / (x[7] - x.mean(0)).norm() * 0.2 * living.norm(dim=1).mean()
    torch.testing.assert_close(part.W_enc[dead], wanted.expand(int(dead.sum()), -1))
    assert not part.b_enc[dead].any() and not state.silent[0][dead].any()
    for name, moments in state.moments.items():
        for moment in moments:
            if name.startswith("0."):
                assert not moment[dead].any() and bool((moment[~dead] == 1).all()), name
            else:
                assert bool((moment == 1).all()), name
    start = {"threshold": settings.threshold, "log_gain": 0.0, "offset": 0.0}
    for name, weight in part.own.items():
        assert bool((weight[dead] == start[name]).all()) and bool((weight[~dead] == 3).all())


@pytest.mark.parametrize(("frozen", "name"), [("decoder", "W_dec"), ("encoder", "W_enc")])
def test_resampling_leaves_a_frozen_part(frozen, name):
    settings, state, x = shut("l1", dead="resample", frozen=frozen)
    state.silent[0][:6] = 100
    before = {n: getattr(state.parts[0], n).clone() for n in ("W_enc", "W_dec")}
    assert resample(state, settings, x, x * 0.5) == 6
    changed = {n for n, w in before.items() if not torch.equal(w, getattr(state.parts[0], n))}
    assert changed == {"W_enc", "W_dec"} - {name}


def test_resampling_draws_the_same_again_and_does_nothing_where_all_live():
    one, two = (shut("l1", dead="resample") for _ in range(2))
    for settings, state, x in (one, two):
        state.silent[0][:6] = 100
        resample(state, settings, x, x * 0.5)
    assert torch.equal(one[1].parts[0].W_enc, two[1].parts[0].W_enc)
    before = one[1].parts[0].W_enc.clone()
    assert resample(one[1], one[0], one[2], one[2]) == 0
    assert torch.equal(one[1].parts[0].W_enc, before)


FEATURES = {"n": 40, "d": 16, "active": 2, "batch": 128}
REMEDIES = {"topk": {"k": 2}, "jumprelu": {"sparsity": 2.0}, "gated": {"sparsity": 3.0}}


@functools.cache
def trained(family: str, dead: str, bias: float) -> tuple[float, float]:
    """Half the latents begin far below 0. The share that is silent at the end, and how many features were found."""
    data = Features(**FEATURES)
    more = {"resample_every": 40} if dead == "resample" else {}
    asked = Training(
        family=family, latents=64, steps=300, batch=128, lr=4e-3, dead=dead, dead_after=1280,
        **(REMEDIES.get(family, {"sparsity": 1.0}) | more),
    )  # fmt: skip
    trainer = Trainer(asked, data.batch(0), [SITE])
    trainer.state.parts[0].b_enc[::2] = bias
    for step in range(asked.steps):
        report = trainer.step(data.batch(step))
    assert report.dead == pytest.approx(float((trainer.state.silent[0] >= 1280).float().mean()))
    return report.dead, data.recovered(trainer.finished().decoder)


def test_the_auxiliary_loss_revives_what_others_crowd_out():
    (silent, found), (silent_without, found_without) = trained("topk", "aux", -3.0), trained("topk", "none", -3.0)
    assert silent < silent_without - 0.05 and found > found_without + 0.02


def test_the_auxiliary_loss_does_not_reach_what_is_below_zero_everywhere():
    assert trained("topk", "aux", -8.0)[0] >= 0.5


@pytest.mark.parametrize("family", ["l1", "gated", "jumprelu"])
def test_resampling_revives_and_finds_more(family):
    (silent, found), (silent_without, found_without) = trained(family, "resample", -8.0), trained(family, "none", -8.0)
    assert silent_without > 0.4 and silent < 0.1
    assert found > found_without + 0.03


@pytest.mark.parametrize("dead", ["ghost", "ghost-scaled"])
def test_ghost_gradients_revive(dead):
    silent, found = trained("l1", dead, -8.0)
    silent_without, found_without = trained("l1", "none", -8.0)
    assert silent < 0.75 * silent_without and found > found_without


def test_a_remedy_that_cannot_reach_a_family_is_refused_and_a_fitting_one_is_taken():
    with pytest.raises(ValueError, match="below 0; use dead='resample'"):
        Training(family="l1", dead="aux")
    assert {family: Training(family=family, k=4 if "k" in family else 32).dead for family in ("topk", "batchtopk")} == {
        "topk": "aux",
        "batchtopk": "aux",
    }
    assert {Training(family=f).dead for f in ("l1", "l1-april", "p-anneal", "gated", "jumprelu")} == {"resample"}
    again = Training(family="gated", dead="none")
    assert again.dead == "none" and Training(**again.model_dump()) == again
