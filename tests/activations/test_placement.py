"""Precision and placement: half precision, weights kept elsewhere by accelerate, quantised weights, and a GPU.

What is held to is the same model in float32 in memory; the tests of a GPU run the same work, and skip without one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import assay
from assay.base.errors import UnsupportedArchitecture
from assay.subjects.placement import place_of, true_weight

IDS = torch.tensor([[5, 17, 33, 64, 9, 101, 42], [0, 0, 11, 12, 13, 14, 15]])
MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")],
    ),
]
V = torch.randn(32, generator=torch.Generator().manual_seed(0))


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 7]


def work(subject: Any) -> dict[str, Tensor]:
    """What a user does with a subject, in all its parts; edits' tensors stay where they were made, on the CPU."""
    batch = subject.tokens(IDS, mask=MASK)
    edits = [
        assay.Add("blocks.0.resid_post", V, scale=0.5, positions=[0, -1]),
        assay.ProjectOut("blocks.1.resid_pre", V, rows=0),
        assay.Clamp("blocks.1.mlp.post", low=-1.0, high=1.0),
        assay.Ablate("blocks.1.attn.z.1", "mean"),
        assay.Ablate("blocks.2.attn.z", "noise", heads=[0, 3], positions="last"),
        assay.Scale("blocks.2.attn.pattern", 0.5, heads=2),
        assay.Set("blocks.2.mlp.out", V.double(), positions=[[1], [2, 3]]),
    ]
    capture = [
        "blocks.*.resid_post",
        "blocks.1.attn.pattern",
        "blocks.1.attn.result",
        "blocks.0.attn.k",
        "final_norm.scale",
    ]
    plain = subject.run(batch, capture=capture)
    edited = subject.run(batch, edits=edits, capture=["blocks.2.mlp.out", "blocks.2.attn.scores"])
    graded = subject.run(batch, capture=["blocks.1.resid_post", "blocks.1.attn.z"], grad=metric)
    donor = subject.run(subject.tokens((IDS + 20) % 128, mask=MASK), capture="blocks.*.resid_pre")
    cells = [assay.Patch(f"blocks.{b}.resid_pre", donor, positions=p) for b in range(3) for p in (0, 3, "last")]
    options = {"apply_to": "all", "max_new_tokens": 4, "eos_token_id": None}
    steered = subject.generate(batch, edits[:1], ["blocks.1.resid_post", "blocks.2.attn.pattern"], **options)
    sampled = subject.generate(batch, edits[:1], do_sample=True, seed=1, **options)
    mean = subject.mean(IDS[:1], "blocks.1.mlp.out")
    found = {f"plain {name}": real(plain[name]) for name in plain.captured}
    found |= {f"edited {name}": real(edited[name]) for name in edited.captured}
    found |= {f"gradient {name}": real(graded.grad[name]) for name in graded.grad}
    found |= {f"steered {name}": real(steered[name]) for name in steered.captured}
    found |= {
        "logits": real(plain.logits),
        "edited": real(edited.logits),
        "value": graded.value,
        "mean": mean["blocks.1.mlp.out"],
    }
    found |= {"sweep": subject.sweep(batch, cells, metric, reduce=None), "steered": steered.generated}
    found |= {"full sweep": subject.sweep(batch, cells, metric, reduce=None, exact="forward")}
    found |= {"sampled": sampled.generated, "new logits": steered.logits}
    return found


def real(x: Tensor) -> Tensor:
    """A captured tensor with zeros at the padding, which is of no interest, and at the keys closed to a query."""
    dims: tuple[str, ...] = x.dims  # type: ignore[attr-defined]
    along = dims.index("query") if "query" in dims else dims.index("pos")
    keep = torch.ones(2, x.shape[along], dtype=torch.bool, device=x.device)
    keep[1, :2] = False
    keep = keep.view([size if at in (0, along) else 1 for at, size in enumerate(x.shape)])
    return torch.where(keep & (x > torch.finfo(x.dtype).min / 2), x, 0)


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    """Equal, up to a fraction of each tensor's size; tokens exactly."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        here = found[name].cpu()
        if wanted.dtype == torch.long:
            assert torch.equal(here, wanted), name
        else:
            assert float((here.double() - wanted.double()).abs().max()) <= rtol * float(wanted.abs().max()), name


@pytest.fixture(scope="module")
def expected(tiny_module: Any) -> dict[str, Tensor]:
    return work(assay.load(tiny_module("llama")))


@pytest.mark.parametrize("device", DEVICES)
def test_everything_is_the_same_there(device: str, tiny_module: Any, expected: Any) -> None:
    subject = assay.load(tiny_module("llama").to(device))
    assert subject.device.type == device
    found = work(subject)
    assert all(tensor.device.type == device for tensor in found.values())
    compare(found, expected, 1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 0.12), (torch.float16, 0.02), (torch.float64, 1e-4)])
def test_other_precisions_do_the_same_work(
    device: str, dtype: torch.dtype, rtol: float, tiny_module: Any, expected: Any
) -> None:
    """Half precision is as near as its digits allow (8 and 11 bits over three layers); what is read has the type."""
    subject = assay.load(tiny_module("llama").to(device, dtype))
    assert not subject.refused
    found = work(subject)
    whole = {"new logits", "mean"}  # given in float32 whatever the model is
    assert all(t.dtype in (dtype, torch.long) for name, t in found.items() if name not in whole and "scale" not in name)
    tokens = {name: found.pop(name) for name in ("steered", "sampled", "new logits")}
    kept = {name: tensor for name, tensor in expected.items() if name not in tokens}
    if dtype != torch.float64:  # an edited direction near zero has no digits to compare
        kept = {
            n: t for n, t in kept.items() if not n.startswith(("steered", "edited", "gradient")) and "sweep" not in n
        }
        found = {n: t for n, t in found.items() if n in kept}
    compare(found, kept, rtol)
    once = subject.run(IDS[:1], capture="blocks.1.attn.pattern")
    with torch.no_grad():
        assert torch.equal(once.logits, subject.module(IDS[:1].to(device)).logits)
    assert torch.allclose(once["blocks.1.attn.pattern"].float().sum(-1), torch.ones(()).to(device), atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_half_precision_sweeps_and_generation_agree_with_single_runs(family: str, dtype: Any, tiny_module: Any) -> None:
    """Within the model's own precision: replay against one run a cell, and a cache against none."""
    subject = assay.load(tiny_module(family).to(dtype))
    assert not subject.refused
    donor = subject.run((IDS[:1] + 20) % 128, capture="blocks.*.resid_pre")
    cells = [assay.Patch(f"blocks.{b}.resid_pre", donor, positions=p) for b in range(3) for p in (1, 4, 6)]
    alone = torch.stack([metric(subject.run(IDS[:1], edits=[cell]).logits)[0] for cell in cells]).float()
    found = subject.sweep(IDS[:1], cells, metric).float()
    scale = float(subject.run(IDS[:1]).logits.float().abs().max())
    assert float((found - alone).abs().max()) <= 16 * torch.finfo(dtype).eps * scale
    options: dict[str, Any] = {"apply_to": "all", "max_new_tokens": 3, "eos_token_id": None}
    edits = [assay.Add("blocks.1.resid_post", V)]
    cached, plain = (subject.generate(IDS[:1], edits, **options, use_cache=use) for use in (True, False))
    assert float((cached.logits[:, 0] - plain.logits[:, 0]).abs().max()) <= 16 * torch.finfo(dtype).eps * scale


def offloaded(how: str, module: Any, folder: Path) -> Any:
    """The module with weights kept elsewhere by accelerate, brought in for each forward."""
    accelerate = pytest.importorskip("accelerate")
    if how == "memory":
        return accelerate.cpu_offload(module, execution_device="cpu")
    if how == "disk":
        return accelerate.disk_offload(module, str(folder), execution_device="cpu")
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    parts |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    return accelerate.dispatch_model(module, parts, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("how", ["memory", "disk", "in part"])
def test_offloaded_weights_change_nothing(how: str, tiny_module: Any, expected: Any, tmp_path: Path) -> None:
    """Sites, sweeps, generation and the fingerprint are those of the model in memory; a run's are bit-equal."""
    plain = assay.load(tiny_module("llama"))
    module = offloaded(how, tiny_module("llama"), tmp_path)
    assert any(parameter.device.type == "meta" for parameter in module.parameters())
    subject = assay.load(module)
    assert not subject.refused
    assert subject.fingerprint == plain.fingerprint
    whole, ours = (s.run(IDS, mask=MASK, capture=s.sites()) for s in (plain, subject))
    assert all(torch.equal(whole[name], ours[name]) for name in plain.sites())
    compare(work(subject), expected, 1e-5)
    assert any(parameter.device.type == "meta" for parameter in module.parameters()), "and it is offloaded still"


def test_weights_without_numbers_are_said_to_be_so(tiny_module: Any) -> None:
    empty = tiny_module("llama").to("meta")
    with pytest.raises(UnsupportedArchitecture, match="weight of Linear is on the 'meta' device"):
        true_weight(empty.lm_head)
    packed = nn.ParameterList()
    packed.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UnsupportedArchitecture, match="ParameterList is quantised, and no linear map"):
        true_weight(packed)
    assert true_weight(nn.Linear(2, 2, bias=False), "bias") is None
    assert place_of(nn.ReLU()) == (torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_read_as_what_they_stand_for(
    bits: int, device: str, tiny_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map is proved on the quantised model; each head's own write uses the numbers that it computes with."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_module("llama", hidden_size=64, head_dim=16).save_pretrained(tmp_path)
    how: dict[str, Any] = {"load_in_8bit": True} if bits == 8 else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32
    }  # fmt: skip
    module = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**how), device_map=device, dtype=torch.float32
    ).eval()
    weight = module.model.layers[1].self_attn.o_proj.weight
    assert not weight.is_floating_point()
    subject = assay.load(module)
    assert not subject.refused
    assert len(subject.fingerprint) == 64
    ids = IDS[:1].to(device)
    run = subject.run(ids, capture=subject.sites())
    with torch.no_grad():
        assert torch.equal(run.logits, module(ids).logits)
    heads, out = run["blocks.1.attn.result"].sum(2).float(), run["blocks.1.attn.out"].float()
    assert float((heads - out).abs().max()) <= 0.02 * float(out.abs().max()), "8 bits round inputs, 4 bits outputs too"
    one = subject.run(ids, edits=[assay.Ablate("blocks.1.attn.z.1")]).logits
    other = subject.run(ids, edits=[assay.Ablate("blocks.1.attn.result.1")]).logits
    assert float((one - other).abs().max()) <= 0.05 * float(one.abs().max())
    assert float((one - run.logits).abs().max()) > 0.2 * float(one.abs().max())
    assert (
        subject.generate(
            ids, [assay.Add("blocks.1.resid_post", 1.0)], apply_to="all", max_new_tokens=2
        ).generated.shape[1]
        == 9
    )


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs here")
def test_a_model_on_two_gpus_is_one_subject(tiny_module: Any, expected: Any) -> None:
    from accelerate import dispatch_model

    parts = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1}
    parts |= {"model.layers.2": 1, "model.norm": 1, "lm_head": 1}
    compare(work(assay.load(dispatch_model(tiny_module("llama"), parts))), expected, 1e-4)
