"""A small random model of any family that assay knows, for tests and for `assay families --check`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from assay.base.errors import UnknownModel, nearest
from assay.subjects.families import FAMILIES, family_of

SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "vocab_size": 67,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_model(model_type: str, seed: int = 0, **settings: Any) -> nn.Module:
    """Build a model of a few thousand parameters, with two blocks and every weight, gain and bias drawn at random.

    Args:
        model_type: A `config.model_type` that assay has a map for.
        seed: The seed of its weights; the caller's random state is left alone.
        settings: Fields of the config to set otherwise.

    Returns:
        The model, in evaluation mode.

    Raises:
        UnknownModel: If no map serves the type.

    Example:
        >>> type(tiny_model("gpt2")).__name__
        'GPT2LMHeadModel'
    """
    import transformers

    family = family_of(model_type)
    if family is None:
        known = [name for family in FAMILIES for name in family.model_types]
        raise UnknownModel(f"no map serves model type {model_type!r}{nearest(model_type, known)}")
    with _quiet(), torch.random.fork_rng(devices=[]):
        config = tiny_config(model_type, {**family.tiny, **settings})
        torch.manual_seed(seed)
        build: Any = getattr(transformers, family.auto)
        model: nn.Module = build.from_config(config) if family.auto.startswith("Auto") else build(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2 if parameter.ndim > 1 else 0.1)
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from warning that the configuration is unusually small."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def tiny_config(model_type: str, settings: Mapping[str, Any]) -> Any:
    """A small configuration: the usual sizes where the type has such fields, and the settings given."""
    from transformers import CONFIG_MAPPING

    return _shrunk(CONFIG_MAPPING[model_type], settings)


def _shrunk(cls: Any, settings: Mapping[str, Any]) -> Any:
    default = cls()
    given: dict[str, Any] = {}
    for name, value in {**SIZES, **settings}.items():
        absent = not hasattr(default, name) and name != "decoder_start_token_id"  # T5's has none unless it is given
        if absent or isinstance(getattr(cls, name, None), property):
            continue
        if isinstance(value, Mapping) and hasattr(getattr(default, name), "to_dict"):
            value = _shrunk(type(getattr(default, name)), value).to_dict()
        given[name] = value
    return cls(**given)
