"""Forwards that end at the last site: the values of a whole run, bit for bit, and not one module more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import assay
from assay.activations.corpora import Texts
from assay.activations.passes import Filter, Pass
from assay.activations.rows import Row, TokenRows
from assay.base.errors import NumericalError, SiteNotFired, SpecError, UnknownSite
from assay.subjects.tiny import tiny_model

IDS = [[5, 6, 7, 8], [9, 8, 3], [4, 11, 4, 12, 4]]
FLAT = [token for ids in IDS for token in ids]
SITES = {
    "llama": ["blocks.0.attn.z", "blocks.0.mlp.in", "blocks.0.mlp.out", "module:model.layers.0.mlp.out"],
    "gpt2": ["embed", "blocks.0.resid_mid", "blocks.0.attn.q", "module:transformer.h.0.mlp.out"],
    "gemma2": ["blocks.0.resid_post", "blocks.0.attn.z.1"],
    "mamba": ["blocks.0.resid_post", "blocks.0.ssm.x"],
    "t5": ["encoder.blocks.0.attn.z", "encoder.blocks.0.resid_post"],
}


def rows_of(ids: Sequence[Sequence[int]], context: int = 8) -> list[Row]:
    return list(TokenRows(Texts(ids), context=context, layout="split"))


@pytest.fixture(params=sorted(SITES), scope="module")
def subject(request: pytest.FixtureRequest) -> Any:
    return assay.load(tiny_model(request.param))


def sites_of(subject: Any) -> list[str]:
    return SITES[subject.config.model_type]


def test_the_values_are_those_of_a_whole_run(subject: Any) -> None:
    rows, sites = rows_of(IDS), sites_of(subject)
    stopped, whole = Pass(subject, sites), Pass(subject, sites, stop=False)
    found, expected = stopped.read(rows), whole.read(rows)
    for site in stopped.sites:
        assert torch.equal(found.values[site], expected.values[site])
        assert found.values[site].shape[0] == sum(map(len, IDS)) and found.values[site].ndim == 2


def test_they_are_those_of_each_prompt_alone(subject: Any) -> None:
    rows = rows_of(IDS)
    reader = Pass(subject, sites_of(subject))
    found = reader.read(rows)
    for site in reader.sites:
        runs = [subject.run(torch.tensor([ids]), capture=site) for ids in IDS]
        alone = torch.cat([run[site][0].flatten(1) for run in runs])
        torch.testing.assert_close(found.values[site], alone, atol=1e-5, rtol=1e-5)
    tokens = found.tokens()
    assert tokens["token"].tolist() == FLAT
    assert tokens["row"].tolist() == tokens["document"].tolist() == [0] * 4 + [1] * 3 + [2] * 5
    assert tokens["pos"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]


def test_nothing_after_the_last_site_runs(subject: Any) -> None:
    reader = Pass(subject, sites_of(subject))
    called: list[str] = []
    names = {module: name for name, module in subject.module.named_modules()}
    handles = [module.register_forward_pre_hook(lambda m, _: called.append(names[m])) for module in names]
    reader.read(rows_of(IDS))
    for handle in handles:
        handle.remove()
    blocks = next(iter(subject.stacks.values())).blocks
    assert names[blocks[0]] in called
    assert not [name for name in called if name.startswith(f"{names[blocks[1]]}.") or name == names[blocks[1]]]
    assert not any("lm_head" in name for name in called)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in names)


def test_heads_are_laid_side_by_side() -> None:
    subject = assay.load(tiny_model("llama"))
    reader = Pass(subject, ["blocks.1.attn.z", "blocks.1.attn.z.2", "blocks.*.attn.k"])
    reader.probe(rows_of(IDS)[0])
    assert reader.widths == {
        "blocks.1.attn.z": 32, "blocks.1.attn.z.2": 8, "blocks.0.attn.k": 16, "blocks.1.attn.k": 16,
    }  # fmt: skip
    found = reader.read(rows_of(IDS)).values
    assert torch.equal(found["blocks.1.attn.z"][:, 16:24], found["blocks.1.attn.z.2"])
    run = subject.run(torch.tensor([IDS[0]]), capture="blocks.1.attn.z")
    assert torch.equal(found["blocks.1.attn.z"][:4].view(4, 4, 8)[:, 3], found["blocks.1.attn.z"][:4, 24:])
    torch.testing.assert_close(found["blocks.1.attn.z"][:4], run["blocks.1.attn.z"][0].flatten(1), atol=1e-5, rtol=1e-5)


def test_how_much_of_the_model_runs_is_known() -> None:
    subject = assay.load(tiny_model("llama", num_hidden_layers=4))
    for site, share in (("blocks.0.resid_post", 0.25), ("blocks.2.mlp.in", 0.75), ("embed", 0.0), ("logits", 1.0)):
        assert Pass(subject, site).share == share
    assert Pass(subject, "blocks.0.resid_post", stop=False).share == 1.0


def test_any_module_is_read_without_a_map() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Embedding(20, 6), nn.Linear(6, 4)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            hidden = self.mix(self.embed(input_ids).flatten(0, 1))  # rows and positions in one dimension
            return hidden.view(*input_ids.shape, -1)

    subject = assay.load(Net().eval())
    reader = Pass(subject, ["module:mix.out", "module:embed.out"])
    reader.probe(rows_of(IDS)[0])
    assert reader.widths == {"module:mix.out": 4, "module:embed.out": 6}
    found = reader.read(rows_of(IDS))
    with torch.no_grad():
        assert torch.equal(found.values["module:embed.out"], subject.module.embed(torch.tensor(FLAT)))


def test_filters_leave_tokens_out_at_every_site(tiny_subject: Any) -> None:
    ids = [[1, 6, 7, 8], [1, 1, 9]]
    reader = Pass(tiny_subject, ["embed", "blocks.0.resid_post"], Filter(skip_bos=True))
    block = reader.read(rows_of(ids))
    assert block.tokens()["token"].tolist() == [6, 7, 8, 9]
    assert block.dropped == {"bos": 3}
    first = Pass(tiny_subject, "embed", Filter(skip_first=2, skip_bos=True)).read(rows_of(ids))
    assert first.tokens()["pos"].tolist() == [2, 3, 2]
    assert first.dropped == {"bos": 3, "first": 1}


def test_the_norm_filter_takes_out_what_is_long() -> None:
    subject = assay.load(tiny_model("gpt2"))
    with torch.no_grad():
        subject.module.transformer.wte.weight[9] *= 100
    rows = rows_of([[5, 6, 7, 8, 4, 3, 5, 6], [5, 9, 6]])
    reader = Pass(subject, ["embed", "blocks.0.attn.z"], Filter(max_norm=10.0))
    assert len(reader.read(rows)) == 11  # no thresholds yet
    seen = reader.calibrate(rows)
    medians = {site: values["median_norm"] for site, values in seen["sites"].items()}
    assert reader.thresholds == {site: 10 * median for site, median in medians.items()}
    norms = subject.run(torch.tensor([[5, 9, 6]]), capture="embed")["embed"][0].norm(dim=-1)
    assert seen["sites"]["embed"]["largest_norm"] == pytest.approx(float(norms.max()), rel=1e-5)
    block = reader.read(rows)
    assert block.dropped["norm"] >= 1 and 9 not in block.tokens()["token"]
    assert seen["kept"] == len(block) and seen["tokens"] == 11


def test_what_is_not_finite_is_refused(tiny_module: Any, tiny_tokenizer: Any) -> None:
    subject = assay.load(tiny_module("gpt2"), tokenizer=tiny_tokenizer)
    with torch.no_grad():
        subject.module.transformer.wte.weight[9] = torch.nan
    reader = Pass(subject, "embed")
    with pytest.raises(NumericalError, match=r"'embed' are not finite, first at row 1, position 2"):
        reader.read(rows_of([[5, 6, 7], [5, 6, 9]]))


@pytest.mark.parametrize("site", ["blocks.0.attn.pattern", "blocks.0.attn.scores", "blocks.0.norm1.scale"])
def test_a_site_needs_a_row_for_each_token(site: str, tiny_subject: Any) -> None:
    reader = Pass(tiny_subject, site)
    if "norm" in site:
        reader.probe(rows_of(IDS)[0])
        assert reader.widths == {site: 1}
        return
    with pytest.raises(SpecError, match=rf"'{site}' has no row for each token: it is \["):
        reader.probe(rows_of(IDS)[0])


def test_bad_sites_are_told_before_anything_runs(tiny_subject: Any) -> None:
    with pytest.raises(UnknownSite, match="did you mean"):
        Pass(tiny_subject, "blocks.0.resid_pots")
    with pytest.raises(SpecError, match="no site was named"):
        Pass(tiny_subject, [])
    decoder = Pass(assay.load(tiny_model("t5")), "decoder.blocks.0.resid_post")
    with pytest.raises(SpecError, match="of the decoder, which has other positions"):
        decoder.probe(rows_of(IDS)[0])

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Embedding(20, 6), nn.Linear(6, 4)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.used(input_ids)

    with pytest.raises(SiteNotFired, match=r"module:idle.out"):
        Pass(assay.load(Idle().eval()), "module:idle.out").probe(rows_of(IDS)[0])


def test_limits_hold(tiny_subject: Any) -> None:
    reader = Pass(tiny_subject, "blocks.0.resid_post")
    with assay.limits(cancel=lambda: True), pytest.raises(assay.AssayError):
        reader.read(rows_of(IDS))


@pytest.mark.parametrize("options", [{"max_norm": 0.5}, {"skip_first": -1}])
def test_filters_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        Filter(**options)


def test_the_head_of_a_block_is_its_first_tokens(tiny_subject: Any) -> None:
    block = Pass(tiny_subject, "embed").read(rows_of(IDS))
    head = block.head(5)
    assert len(head) == 5 and torch.equal(head.values["embed"], block.values["embed"][:5])
    for name, values in head.tokens().items():
        assert np.array_equal(values, block.tokens()[name][:5])
