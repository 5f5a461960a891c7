"""Components: every head and every MLP, once, in forward order."""

from __future__ import annotations

from typing import Any

from assay.circuits import Component, components


def test_every_head_and_every_mlp_in_forward_order(case: Any) -> None:
    parts = components(case.subject)
    names = [[*(f"L{block}H{head}" for head in range(4)), f"MLP{block}"] for block in range(3)]
    assert [part.name for part in parts] == [name for block in names for name in block]
    assert [part.kind for part in parts] == ["head", "head", "head", "head", "mlp"] * 3


def test_a_components_site_is_where_it_writes(case: Any) -> None:
    for part in components(case.subject):
        run = case.subject.run(case.clean, capture=part.site)
        assert run[part.site].shape == ((1, 7, 32) if part.kind == "mlp" else (1, 7, 8))


def test_components_sort_with_mlps_among_heads() -> None:
    """Components of both kinds compare, so that sets of them have one order."""
    parts = [Component(1, "mlp"), Component(0, "head", 3), Component(0, "mlp"), Component(1, "head", 0)]
    assert [part.name for part in sorted(parts)] == ["L0H3", "MLP0", "L1H0", "MLP1"]
