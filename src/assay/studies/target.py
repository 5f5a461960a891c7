"""The model of a study, as far as it is needed: a fingerprint for the key, a card for a plan, the subject for a run."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from assay.base.errors import SpecError
from assay.studies.events import Event, Watcher
from assay.subjects.card import Card
from assay.subjects.sources import Source, resolve


class Target:
    """A model that is looked at no closer than has to be: nothing imports torch until `subject` is asked for.

    Args:
        reference: How the user named the model; may be empty when `subject` is given.
        subject: A loaded subject, if there is one.
        watcher: Is told when something slow begins.

    Raises:
        SpecError: There is neither a reference nor a subject.
    """

    def __init__(self, reference: str, subject: Any, watcher: Watcher) -> None:
        if subject is None and not reference.strip():
            wanted = "a hub id, a folder, a .gguf file, wheel:<package> or zoo:<name>"
            raise SpecError(f"model: is required: {wanted}", field="model")
        self._reference, self._given, self._watcher = reference, subject, watcher

    def _say(self, text: str) -> None:
        self._watcher(Event(kind="phase", message=text))

    @cached_property
    def _source(self) -> Source:
        return resolve(self._reference, notify=self._say)

    @property
    def name(self) -> str:
        """How the model is called in results."""
        return self._reference or str(getattr(self._given, "name", "") or type(self._given).__name__)

    @cached_property
    def fingerprint(self) -> str:
        """The hash of the model's weights and configuration."""
        return str(self._source.fingerprint if self._given is None else self._given.fingerprint)

    @cached_property
    def card(self) -> Card:
        """The model's shape and tokenizer; a GGUF file that was never converted is loaded for it, once."""
        if self._given is not None:
            return LoadedCard(self._given)
        if not self._source.converted:
            _ = self.subject
        return self._source.card()

    @cached_property
    def tokenizer_hash(self) -> str:
        """The SHA-256 of the loaded tokenizer, without how it was last asked to pad; empty where there is none."""
        backend = getattr(self.subject.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return ""
        state = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode("utf-8")).hexdigest()

    @cached_property
    def subject(self) -> Any:
        """The loaded subject."""
        if self._given is not None:
            return self._given
        from assay.activations.subject import load

        return load(self._source, notify=self._say)


class LoadedCard(Card):
    """The card of a subject that is in memory.

    Args:
        subject: The loaded subject.
    """

    def __init__(self, subject: Any) -> None:
        super().__init__(Path(str(getattr(subject, "name", "") or "a loaded subject")))
        self._subject = subject

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration of the module; empty for one that transformers does not know."""
        config = self._subject.config
        return dict(config.to_dict()) if hasattr(config, "to_dict") else {}

    @cached_property
    def weight_bytes(self) -> int:
        """The memory of the parameters."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self._subject.module.parameters())

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(parameter.numel() for parameter in self._subject.module.parameters())

    @cached_property
    def tokenizer(self) -> Any:
        """The subject's own tokenizer, as the `tokenizers` library has it."""
        backend = getattr(self._subject.tokenizer, "backend_tokenizer", None)
        return backend if backend is not None else super().tokenizer
