"""A tiny model, its subject and an input of every family, built once and shared by the tests that go over families."""

from __future__ import annotations

from functools import cache
from typing import Any

from family_facts import ROWS, Row, inputs
from plain_hooks import traces
from torch import Tensor, nn

import assay
from assay.subjects.tiny import tiny_model


class Built:
    """A family's tiny model, its subject and an input; shared by all tests, because none may leave a trace on it."""

    def __init__(self, name: str) -> None:
        self.row: Row = ROWS[name]
        self.module: Any = tiny_model(self.row.model_type, **self.row.settings)
        self.before = traces(self.module)
        self.subject: Any = assay.load(self.module)
        self.called = inputs(self.row.inputs)
        self.x: Any = self.called["input_ids"] if self.row.inputs == "tokens" else self.called

    def attentions(self, module: nn.Module) -> dict[str, nn.Module]:
        """Attention modules by the name of their sites: what holds the map that makes the queries."""
        return {
            site.removesuffix(".q"): module.get_submodule(at.path.rpartition(".")[0])
            for site, at in self.row.facts.items()
            if site.endswith("attn.q")
        }


@cache
def built(name: str) -> Built:
    return Built(name)


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())))
