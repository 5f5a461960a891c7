"""What is written is read back as it was, in each format that can hold it; what it cannot hold leaves no file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from dictionary_files import activations, cross_layer, made
from hypothesis import given
from hypothesis import strategies as st

from assay.base.errors import OutputError, SpecError
from assay.dictionaries import Card, Dictionary, JumpReLU, ReLU, Site, TopK, formats, load

PLACES = {
    "openai": "resid_post_mlp/autoencoders/3.pt",
    "goodfire": "Llama-SAE-l3.pt",
    "qwen-scope": "SAE-Res-gpt2-W1K-L0_3/layer3.sae.pt",
    "gemma-scope": "gemma-scope-2b-pt-res/layer_3",
}
HOLDS = {
    "assay": {"relu", "topk", "jumprelu", "one threshold", "gated", "groupmax"},
    "saelens": {"relu", "topk", "jumprelu", "one threshold", "gated"},
    "sparsify": {"topk", "groupmax"},
    "gemma-scope": {"relu", "jumprelu", "one threshold"},
    "gemma-scope-2": {"relu", "jumprelu", "one threshold"},
    "llama-scope": {"relu", "one threshold"},
    "circuit-tracer": {"relu", "topk", "jumprelu", "one threshold"},
    "dictionary-learning": {"relu", "topk", "jumprelu", "one threshold", "gated"},
    "openai": {"relu"},
    "goodfire": {"relu"},
    "qwen-scope": {"topk"},
}
TRANSCODERS = {"assay", "saelens", "sparsify", "gemma-scope", "gemma-scope-2", "llama-scope", "circuit-tracer"}
SKIPS = {"assay", "saelens", "sparsify", "gemma-scope-2", "circuit-tracer"}


@given(
    format=st.sampled_from(formats.names()),
    kind=st.sampled_from(["relu", "topk", "jumprelu", "one threshold", "gated", "groupmax"]),
    shape=st.tuples(st.integers(2, 6), st.integers(1, 5).map(lambda n: 4 * n)),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    normalisation=st.sampled_from(["none", "none", "layer_norm", "constant_norm"]),
    seed=st.integers(0, 999),
)
def test_what_is_written_is_read_back(format, kind, shape, flags, normalisation, seed) -> None:
    torch.manual_seed(seed)
    (d, latents), (transcodes, skip, centred) = shape, flags
    normalisation = "none" if skip else normalisation  # no dictionary has both
    shared = {"transcodes": transcodes, "skip": skip, "centred": centred, "normalisation": normalisation}
    dictionary = made(activations(latents)[kind], d=d, latents=latents, **shared)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / PLACES.get(format, "it")
        try:
            where = dictionary.save(place, format)
        except SpecError:
            assert not any(Path(folder).rglob("*"))
            return
        sites = {}
        if format == "gemma-scope" and transcodes:  # the path says res
            sites = {"site": dictionary.site, "writes": dictionary.card.writes[0].name}
        again = load(where, **sites)
    x = torch.randn(9, d)
    assert again.card.reads == dictionary.card.reads
    assert again.card.writes == dictionary.card.writes
    assert again.card.normalisation == normalisation
    torch.testing.assert_close(again.encode(x), dictionary.encode(x), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(again(x), dictionary(x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("format", formats.names())
def test_each_format_holds_what_it_says(format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    transcodes = format == "circuit-tracer"
    for kind, activation in activations().items():
        place = tmp_path / kind.replace(" ", "") / PLACES.get(format, "it")
        dictionary = made(activation, transcodes=transcodes)
        if kind in HOLDS[format]:
            dictionary.save(place, format)
        else:
            with pytest.raises(SpecError, match=r"hold|has no|rows|run from|are ReLU"):
                dictionary.save(place, format)
    for skip, holding in ((False, TRANSCODERS), (True, SKIPS)):
        kind = "relu" if "relu" in HOLDS[format] else "topk"
        place = tmp_path / f"transcoder{skip}" / PLACES.get(format, "it")
        if format in holding:
            made(activations()[kind], transcodes=True, skip=skip).save(place, format)
        else:
            with pytest.raises(SpecError):
                made(activations()[kind], transcodes=True, skip=skip).save(place, format)


@pytest.mark.parametrize("format", formats.names())
def test_a_crosscoder_is_only_our_own(format: str, tmp_path: Path) -> None:
    sites = (Site("blocks.1.resid_post", 4), Site("blocks.2.resid_post", 4))
    weights = {"W_enc": torch.randn(5, 8), "b_enc": torch.zeros(5), "W_dec": torch.randn(5, 8), "b_dec": torch.zeros(8)}
    crosscoder = Dictionary(**weights, activation=TopK(k=2), card=Card(reads=sites))
    if format == "assay":
        assert load(crosscoder.save(tmp_path / "it")).card.reads == sites
        return
    with pytest.raises(SpecError, match=r"blocks\.1\.resid_post"):
        crosscoder.save(tmp_path / PLACES.get(format, "it"), format)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("format", formats.names())
def test_a_cross_layer_transcoder_goes_through_the_formats_that_have_them(format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    clt = cross_layer(skip=format != "circuit-tracer")
    if format not in {"assay", "circuit-tracer", "gemma-scope-2"}:
        with pytest.raises(SpecError, match="cross-layer"):
            clt.save(tmp_path / PLACES.get(format, "it"), format)
        assert not any(tmp_path.iterdir())
        return
    again = load(clt.save(tmp_path / "it", format))
    x = torch.randn(5, 3, 4)
    assert again.site == clt.site
    torch.testing.assert_close(again(x), clt(x))


def test_a_cross_layer_skip_is_refused_where_it_would_be_lost(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="skip"):
        cross_layer(skip=True).save(tmp_path / "it", "circuit-tracer")
    assert not any(tmp_path.iterdir())


def test_a_half_precision_dictionary_is_written_in_fp32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    half = made(JumpReLU(threshold=torch.rand(16))).to(torch.bfloat16)
    again = load(half.save(tmp_path / "it", "saelens"))
    assert again.W_enc.dtype == torch.float32
    assert torch.equal(again.W_enc, half.W_enc.float())


def test_writing_again_replaces_every_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = made(TopK(k=2)), made(ReLU())
    first.save(tmp_path / "it", "saelens")
    second.save(tmp_path / "it", "saelens")
    assert torch.equal(load(tmp_path / "it").W_enc, second.W_enc)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["cfg.json", "it", "sae_weights.safetensors"]


def test_what_would_stay_beside_the_new_files_is_not_written_over(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, clt = made(ReLU()), cross_layer(skip=False)
    first.save(tmp_path / "one")
    clt.save(tmp_path / "layers")
    clt.save(tmp_path / "theirs", "circuit-tracer")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for dictionary, folder, format in (
        (first, "one", "saelens"),
        (clt, "one", "assay"),
        (first, "layers", "assay"),
        (cross_layer(layers=2), "layers", "assay"),
        (cross_layer(layers=2, skip=False), "theirs", "circuit-tracer"),
        (made(ReLU(), transcodes=True), "theirs", "circuit-tracer"),
    ):
        with pytest.raises(SpecError, match="choose another path"):
            dictionary.save(tmp_path / folder, format)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "it").write_text("mine")
    with pytest.raises(OutputError, match="in the way"):
        made(TopK(k=2)).save(tmp_path / "it", "saelens")
    assert [p.name for p in tmp_path.iterdir()] == ["it"]
    assert (tmp_path / "it").read_text() == "mine"


def test_a_folder_in_the_way_of_a_file_is_noticed_before_another_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "it" / "cfg.json").mkdir(parents=True)
    with pytest.raises(OutputError, match="in the way"):
        made(TopK(k=2)).save(tmp_path / "it", "saelens")
    assert [p.name for p in tmp_path.rglob("*")] == ["it", "cfg.json"]
