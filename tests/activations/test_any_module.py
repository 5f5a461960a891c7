"""Sites that the user declares on any module: read, edited, differentiated and swept as hooks by hand do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import assay
from assay.base.errors import InvalidEdit, SiteError, SpecError, UnknownSite
from assay.subjects.declared import read_declaration


class Cnn(nn.Module):
    """Two convolutions and a classifier; images come in as floats."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU())
        self.classify = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.classify(self.features(images).mean((2, 3)))
        return out


class Lstm(nn.Module):
    """A recurrent classifier; its module returns nested tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(3, 8, num_layers=2, batch_first=True), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden, (_, cell) = self.lstm(x)
        out: Tensor = self.out(torch.cat([hidden[:, -1], cell[-1]], -1))
        return out


class Mixer(nn.Module):
    """Attention over a grid, conditioned by a keyword argument: a block of a diffusion model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.time = nn.Conv2d(2, 8, 3, padding=1), nn.Linear(4, 8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, image: Tensor, *, time: Tensor) -> dict[str, Any]:
        x = self.conv(image) + self.time(time)[:, :, None, None]
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return {"noise": (tokens + self.proj(mixed)).transpose(1, 2).unflatten(-1, x.shape[2:]), "skip": [x]}


class Wrapped(nn.Module):
    """Gives the tensor of a `Mixer`, and hands it on through a module that takes several arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.join = Mixer(), Join()

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        found = self.mixer(image, time=time)
        out: Tensor = self.join(found["noise"], skip=found["skip"][0])
        return out


class Join(nn.Module):
    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return (x + skip).mean((2, 3))


def raw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, weight in enumerate(module.parameters()):
            weight.copy_(raw(i, *weight.shape) * 0.5)
    return module.eval()


def hooked(
    module: nn.Module, path: str, change: Callable[[Any, Any, Any], Any], x: Any, *, before: bool = False
) -> Any:
    """What a module gives with a hook by hand; `change` gets arguments, keywords and output."""
    at = module.get_submodule(path)
    if before:
        handle = at.register_forward_pre_hook(lambda m, a, k: change(a, k, None), with_kwargs=True)
    else:
        handle = at.register_forward_hook(lambda m, a, k, o: change(a, k, o), with_kwargs=True)
    try:
        with torch.no_grad():
            return module(*x)
    finally:
        handle.remove()


def test_a_cnn_by_channel_and_row() -> None:
    module = seeded(Cnn())
    subject = assay.load(
        module, sites={"conv1": "features.0.out | batch channel height width", "pooled": "classify.in"}
    )
    images, v = raw(0, 3, 1, 8, 8), raw(1, 6, 6)
    with torch.no_grad():
        assert torch.equal(subject.run(images).logits, module(images))
    run = subject.run(images, capture=["conv1", "conv1.2", "pooled", "module:features.1.out"])
    assert torch.equal(run["conv1"], module.features[0](images))
    assert run["conv1"].dims == ("batch", "channel", "height", "width")
    assert torch.equal(run["conv1.2"], run["conv1"][:, 2])
    assert run["conv1.2"].dims == ("batch", "height", "width")

    def change(_: Any, __: Any, out: Tensor) -> Tensor:
        new = out.clone()
        new[[0, 2], 1] += 2 * v
        return new

    edit = assay.Add("conv1.1", v, scale=2.0, rows=[0, 2])
    assert torch.allclose(subject.run(images, edits=[edit]).logits, hooked(module, "features.0", change, [images]))
    same = assay.Add("conv1", v, scale=2.0, rows=[0, 2], heads=[1])
    assert torch.equal(subject.run(images, edits=[same]).logits, subject.run(images, edits=[edit]).logits)
    mean = subject.run(images, edits=[assay.Ablate("conv1", "mean", heads=3)], capture="conv1")["conv1"]
    assert torch.allclose(mean[:, 3], run["conv1"][:, 3].mean(0).expand(3, -1, -1), atol=1e-6)
    assert torch.equal(mean[:, :3], run["conv1"][:, :3])
    swapped = subject.run(images, edits=[assay.Ablate("conv1", "resample")], capture="conv1")["conv1"]
    assert all(any(torch.equal(a, b) for b in run["conv1"]) and not torch.equal(a, run["conv1"][i])
               for i, a in enumerate(swapped))  # fmt: skip
    patched = subject.run(images, edits=[assay.Patch("conv1.2", subject.run(images.flip(0), capture="conv1"))])
    by_value = subject.run(images, edits=[assay.Set("conv1.2", run["conv1.2"].flip(0))])
    assert torch.allclose(patched.logits, by_value.logits)
    assert torch.allclose(subject.mean(images, "conv1", max_rows=2)["conv1"], run["conv1"].mean(0), atol=1e-6)


def test_an_lstm_by_row_and_position_and_its_cell() -> None:
    module = seeded(Lstm())
    sites = {
        "hidden": "module:lstm.out[0] | batch pos d",
        "cell": "lstm.out[1][1] | layer batch d",
        "x": "lstm.in | batch pos d",
    }
    subject = assay.load(module, sites=sites)
    x, v = raw(0, 4, 6, 3), raw(1, 8)
    run = subject.run(x, capture=["hidden", "cell", "x"])
    with torch.no_grad():
        hidden, (_, cell) = module.lstm(x)
    assert torch.equal(run["hidden"], hidden)
    assert torch.equal(run["cell"], cell)
    assert (run["cell"].dims, run["hidden"].dims) == (("layer", "batch", "d"), ("batch", "pos", "d"))
    assert torch.equal(run["x"], x)

    def last(_: Any, __: Any, out: Any) -> Any:
        y = out[0].clone()
        y[1, -1] = v
        return y, out[1]

    edit = assay.Set("hidden", v, positions="last", rows=1)
    assert torch.allclose(subject.run(x, edits=[edit]).logits, hooked(module, "lstm", last, [x]))

    def deep(_: Any, __: Any, out: Any) -> Any:
        c = out[1][1].clone()
        c[:, [0, 3]] = torch.stack([v, 2 * v])[None]
        return out[0], (out[1][0], c)

    values = torch.stack([v, 2 * v])[:, None]  # rows first, then layers: an entry for each row selected
    edit = assay.Set("cell", values, rows=[0, 3])
    assert torch.allclose(subject.run(x, edits=[edit]).logits, hooked(module, "lstm", deep, [x]))

    def fed(args: Any, kwargs: Any, _: Any) -> Any:
        return (torch.cat([args[0][:, :2], args[0][:, 2:4] * 3, args[0][:, 4:]], 1), *args[1:]), kwargs

    edit = assay.Scale("x", 3.0, positions=[2, 3])
    assert torch.allclose(subject.run(x, edits=[edit]).logits, hooked(module, "lstm", fed, [x], before=True))


def test_a_diffusion_block_with_keywords_mappings_and_heads() -> None:
    module = seeded(Wrapped())
    sites = {
        "z": "mixer.proj.in | batch pos (head=2 d_head)",
        "q": "mixer.qkv.out | batch pos (three=3 head=2 d_head)",
        "noise": "mixer.out[noise] | batch channel height width",
        "skip": "mixer.out[skip][0] | batch channel height width",
        "time": "mixer.in[time] | batch d",
        "joined": "join.in[skip]",
    }
    subject = assay.load(module, sites=sites)
    image, time = raw(0, 2, 2, 4, 4), raw(1, 2, 4)
    run = subject.run((image, time), capture=list(sites))
    with torch.no_grad():
        assert torch.equal(run.logits, module(image, time))
        inside = module.mixer(image, time=time)
    assert torch.equal(run["noise"], inside["noise"])
    assert torch.equal(run["skip"], inside["skip"][0])
    assert torch.equal(run["joined"], inside["skip"][0])
    assert torch.equal(run["time"], time)
    assert run["z"].shape == (2, 16, 2, 4)
    assert run["q"].dims == ("batch", "pos", "three", "head", "d_head")
    named = subject.run({"image": image, "time": time}, capture="z.1")
    assert torch.equal(named["z.1"], run["z"][:, :, 1])

    def head(args: Any, kwargs: Any, _: Any) -> Any:
        x = args[0].clone().unflatten(-1, (2, 4))
        x[1, 3, 1] = 0
        return (x.flatten(2),), kwargs

    edit = assay.Ablate("z.1", positions=3, rows=1)
    found = subject.run((image, time), edits=[edit]).logits
    assert torch.allclose(found, hooked(module, "mixer.proj", head, [image, time], before=True))

    def later(args: Any, kwargs: Any, _: Any) -> Any:
        return args, {**kwargs, "time": kwargs["time"] + 1}

    found = subject.run((image, time), edits=[assay.Add("time", 1.0)]).logits
    assert torch.allclose(found, hooked(module, "mixer", later, [image, time], before=True))

    def both(_: Any, __: Any, out: Any) -> Any:
        return {"noise": out["noise"] * 2, "skip": [out["skip"][0] * 3]}

    edits = [assay.Scale("noise", 2.0), assay.Scale("skip", 3.0)]
    found = subject.run((image, time), edits=edits).logits
    assert torch.allclose(found, hooked(module, "mixer", both, [image, time]))
    third = subject.run((image, time), edits=[assay.Scale("q", 0.0, heads=1)], capture="q")["q"]
    assert torch.equal(third[..., 1, :], torch.zeros(2, 16, 3, 4))


CASES: dict[str, Any] = {
    "cnn": (
        Cnn,
        {"a": "features.0.out | batch channel height width", "b": "classify.in | batch d"},
        (raw(0, 3, 1, 8, 8),),
    ),
    "lstm": (Lstm, {"a": "lstm.in | batch pos d", "b": "lstm.out[0] | batch pos d"}, (raw(0, 3, 6, 3),)),
    "diffusion": (
        Wrapped,
        {"a": "mixer.proj.in | batch pos (head=2 d_head)", "b": "mixer.in[time] | batch d"},
        (raw(0, 3, 2, 4, 4), raw(1, 3, 4)),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("trainable", [True, False])
def test_gradients_are_autograds(case: str, trainable: bool) -> None:
    build, sites, x = CASES[case]
    module = seeded(build()).requires_grad_(trainable)
    subject = assay.load(module, sites=sites)

    def metric(out: Tensor) -> Tensor:
        return (out * torch.arange(1.0, out.shape[1] + 1)).sum(1)

    run = subject.run(x, capture=["a", "b"], grad=metric)
    assert run.grad is not None
    for name in ("a", "b"):
        step = raw(7, *run[name].shape)
        values = [metric(subject.run(x, edits=[assay.Add(name, step, scale=s)]).logits).double() for s in (1e-2, -1e-2)]
        slope = (values[0] - values[1]) / 2e-2
        expected = (run.grad[name] * step).flatten(1).sum(1).double()
        assert torch.allclose(slope, expected, rtol=2e-2, atol=2e-2), name
    assert all(p.grad is None for p in module.parameters())
    assert not any(tensor.requires_grad for tensor in x)


@pytest.mark.parametrize("case", CASES)
def test_sweeps_are_single_runs(case: str) -> None:
    build, sites, x = CASES[case]
    subject = assay.load(seeded(build()), sites=sites)
    donor = subject.run(tuple(part.flip(0) for part in x), capture=["a", "b"])
    cells: list[Any] = [assay.Ablate(name, kind) for name in ("a", "b") for kind in ("zero", "mean", "resample")]
    cells += [assay.Patch(name, donor, rows=row) for name in ("a", "b") for row in range(3)]
    if "pos" in donor["a"].dims:
        cells += [assay.Patch("a", donor, positions=p) for p in (0, 2, -1)]
    if "head" in donor["a"].dims or "channel" in donor["a"].dims:
        cells += [assay.Patch(f"a.{head}", donor) for head in range(2)]
    cells += [[assay.Scale("a", 2.0), assay.Ablate("b")]]

    def metric(out: Tensor) -> Tensor:
        return out[:, 0] - out[:, 1]

    expected = [metric(subject.run(x, edits=c if isinstance(c, list) else [c]).logits) for c in cells]
    for max_rows in (None, 4):
        found = subject.sweep(x, cells, metric, reduce=None, max_rows=max_rows)
        assert torch.allclose(found, torch.stack(expected), atol=1e-5)
    assert len({round(float(row[0]), 4) for row in expected}) > 3


def test_what_does_not_fit_a_declared_site_is_said() -> None:
    images = raw(0, 3, 1, 8, 8)
    subject = assay.load(
        seeded(Cnn()),
        sites={
            "conv1": "features.0.out | batch channel height width",
            "flat": "features.2.out | batch d",
            "raw": "classify.in",
        },
    )
    edits: list[tuple[Any, type, str]] = [
        (assay.Add("conv1", 1.0, positions=1), InvalidEdit, "has no positions"),
        (assay.Add("conv1.4", 1.0), InvalidEdit, "there are 4 heads"),
        (assay.Add("conv1", 1.0, heads=4), InvalidEdit, "4 is outside 0 to 3"),
        (assay.Add("conv1", 1.0, rows=3), InvalidEdit, "rows=3"),
        (assay.Add("conv1", torch.ones(5, 6)), InvalidEdit, r"\(5, 6\) does not broadcast"),
        (assay.Add("flat", 1.0), SiteError, r"batch d was declared, and its tensor is \(3, 6, 4, 4\)"),
        (assay.Add("raw", 1.0, heads=1), InvalidEdit, "has no heads"),
        (assay.Add("conv2", 1.0), UnknownSite, "did you mean 'conv1'"),
    ]
    for edit, kind, message in edits:
        with pytest.raises(kind, match=message):
            subject.run(images, edits=[edit])
    for name, message in (("conv1.7", "there are 4"), ("raw.1", "without a head"), ("conv", "did you mean 'conv1'")):
        with pytest.raises(SiteError, match=message):
            subject.run(images, capture=name)
    with pytest.raises(SpecError, match=r"one number of rows, which come first; these have \[2, 3\]"):
        subject.run((images, raw(0, 2)))
    with pytest.raises(SiteError, match=r"lstm\.out\[1\]: a tuple is there.*\[0\] to \[1\]"):
        assay.load(seeded(Lstm()), sites={"h": "lstm.out[1]"}).run(raw(0, 1, 2, 3), capture="h")
    with pytest.raises(SiteError, match=r"lstm\.out\[2\] is not there"):
        assay.load(seeded(Lstm()), sites={"h": "lstm.out[2]"}).run(raw(0, 1, 2, 3), capture="h")
    with pytest.raises(SiteError, match="a dimension of 16 cannot be seen as"):
        sites = {"z": "out.in | batch (head=3 d)"}
        assay.load(seeded(Lstm()), sites=sites).run(raw(0, 1, 2, 3), capture="z")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("logits", "fc.in", "cannot be called 'logits'"),
        ("blocks.1", "fc.in", "cannot be called"),
        ("conv.1", "fc.in", "cannot be called"),
        ("a b", "fc.in", "cannot be called"),
        ("a", "fc", "'fc' is not a place"),
        ("a", "fc.out[0", "is not a place"),
        ("a", "fc.out | batch 2", "'2' is not a dimension"),
        ("a", "fc.out | batch d=3", "is not a dimension"),
        ("a", "fc.out | batch batch", "names that differ"),
        ("a", "fc.out | batch (head d)", "sizes of all its parts but one"),
        ("a", "fc.out | batch (head=2)", "sizes of all its parts but one"),
        ("a", "fc.out | batch head channel", "there can be one"),
        ("a", "fc.out |", "names that differ"),
    ],
)
def test_a_declaration_that_is_not_one_is_refused(name: str, text: str, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        read_declaration(name, text)


def test_a_declared_module_must_be_there_and_called_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.cell(self.cell(x))
            return out

    with pytest.raises(UnknownSite, match=r"no module 'sell'.*did you mean 'cell'"):
        assay.load(Twice().eval(), sites={"a": "sell.out"})
    subject = assay.load(seeded(Twice()), sites={"a": "cell.out | batch d"})
    for name in ("a", "module:cell.out"):
        with pytest.raises(SiteError, match="called more than once"):
            subject.run(raw(0, 2, 3), capture=name)
    assert not torch.equal(
        subject.run(raw(0, 2, 3), edits=[assay.Scale("a", 2.0)]).logits, subject.run(raw(0, 2, 3)).logits
    )


def test_declared_sites_stand_beside_the_standard_ones(tiny_module: Any) -> None:
    subject = assay.load(tiny_module("llama"), sites={"mlp1": "model.layers.1.mlp.out | batch pos d"})
    ids = torch.tensor([[5, 17, 33, 64, 9], [0, 0, 1, 2, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    run = subject.run(ids, mask=mask, capture=["mlp1", "blocks.1.mlp.out"])
    assert torch.equal(run["mlp1"], run["blocks.1.mlp.out"])
    cells = [assay.Ablate("mlp1", positions=p) for p in (0, "last")]
    same = [assay.Ablate("blocks.1.mlp.out", positions=p) for p in (0, "last")]
    batch = subject.tokens(ids, mask=mask)
    found, expected = (subject.sweep(batch, c, lambda x: x[:, -1, 5], reduce=None) for c in (cells, same))
    assert torch.allclose(found, expected, atol=1e-5)
    one, other = (subject.generate(batch, [assay.Add(name, 1.0)], name, apply_to="all", max_new_tokens=3)
                  for name in ("mlp1", "blocks.1.mlp.out"))  # fmt: skip
    assert torch.equal(one.generated, other.generated)
    assert torch.equal(one["mlp1"], other["blocks.1.mlp.out"])
    assert "mlp1" in subject.sites()
