"""A model's card: its shape and its tokenizer, from configuration files alone."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from assay.base.errors import DamagedFile, LoadError, UnsupportedArchitecture


class Card:
    """What can be known of a model without loading its weights.

    Args:
        folder: A transformers model folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration, as written."""
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return config

    def _number(self, *names: str) -> int:
        for name in names:
            if isinstance(self.config.get(name), int):
                return int(self.config[name])
        raise UnsupportedArchitecture(
            f"the configuration of {self.folder.name} has none of {', '.join(names)}: no architecture map knows it"
        )

    @property
    def n_layers(self) -> int:
        """The number of blocks."""
        return self._number("num_hidden_layers", "n_layer")

    @property
    def n_heads(self) -> int:
        """The number of query heads."""
        return self._number("num_attention_heads", "n_head")

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self._number("hidden_size", "n_embd")

    @property
    def vocab(self) -> int:
        """The size of the vocabulary."""
        return self._number("vocab_size")

    @cached_property
    def weight_bytes(self) -> int:
        """The size of the weight files."""
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))

    @property
    def parameters(self) -> int:
        """About how many parameters there are, from the size of the files and their type."""
        width = 2 if str(self.config.get("dtype") or self.config.get("torch_dtype")) in ("bfloat16", "float16") else 4
        return self.weight_bytes // width

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, by the `tokenizers` library alone: `encode(text).ids`.

        Raises:
            LoadError: If the folder has no tokenizer.json.
            DamagedFile: If that file cannot be read.
        """
        from tokenizers import Tokenizer

        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise LoadError(f"{self.folder.name} has no tokenizer.json")
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises bare exceptions
            raise DamagedFile(f"the tokenizer of {self.folder.name} could not be read: {error}") from None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text, with or without the special tokens the tokenizer adds."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        return ids
