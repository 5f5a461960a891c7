"""A finding carries its evidence, or it cannot be built; and JSON loses nothing of it.

Run this file (`python tests/base/test_findings.py`) to write the published schema again after a change of format.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.base.errors import FindingError
from assay.base.findings import Control, Cost, Finding, Findings, Provenance, finding_schema
from assay.base.stats import Interval
from assay.base.views import Bars, Text

SCHEMA = Path(__file__).parents[2] / "docs" / "schemas" / "finding.schema.json"

CONTROL = Control(name="random sets", description="as many heads", null=(0.0, 1.0, 2.0, 3.0), p=0.2)
GOOD = {
    "claim": "The top 10 components carry the behaviour",
    "estimate": 3.25,
    "unit": "logits",
    "n": 16,
    "controls": (CONTROL,),
    "interval": Interval(low=3.0, high=3.5, method="BCa bootstrap"),
    "verdict": "supported",
}
FULL = GOOD | {
    "cost": Cost(forwards=10, backwards=2, seconds=1.5, peak_bytes=1 << 30),
    "provenance": Provenance(
        model="m",
        weights_hash="w",
        tokenizer_hash="t",
        data_hash="d",
        spec_hash="s",
        seed=3,
        versions={"torch": "2.13"},
    ),
    "tags": ("sufficiency", "main"),
    "detail": {"curve": (1, 2.5, None), "names": {"best": "blocks.9.attn.z.6"}},
}
WAIVED = {
    "claim": "A fact",
    "estimate": math.nan,
    "unit": "",
    "n": 0,
    "control_waived": "one forward pass",
    "interval_note": "deterministic",
    "verdict": "not testable",
}

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
WORDS = st.text("abc é\n", min_size=1).filter(str.strip)


CONTROLS = st.builds(
    Control,
    name=WORDS,
    description=st.text(max_size=3),
    null=st.lists(FINITE, max_size=4).map(tuple),
    p=st.none() | st.floats(0.01, 1),
    side=st.sampled_from(["greater", "less", "two"]),
)


@st.composite
def findings(draw):
    controls = draw(st.lists(CONTROLS, max_size=2))
    interval = draw(st.none() | st.tuples(FINITE, FINITE).map(sorted).map(lambda e: Interval(low=e[0], high=e[1])))
    estimate = draw(FINITE | st.just(math.nan))
    verdicts = ["supported", "not distinguishable from control", "contradicted", "not testable"]
    return Finding(
        claim=draw(WORDS),
        estimate=estimate,
        unit=draw(st.text(max_size=3)),
        n=draw(st.integers(0, 100)),
        controls=tuple(controls),
        control_waived=None if controls else draw(WORDS),
        interval=interval,
        interval_note="" if interval else draw(WORDS),
        verdict=draw(st.sampled_from(verdicts)) if math.isfinite(estimate) else "not testable",
        cost=draw(st.builds(Cost, forwards=st.integers(0, 9), seconds=st.floats(0, 9), peak_bytes=st.integers(0, 9))),
        tags=tuple(draw(st.lists(WORDS, max_size=2))),
        detail=draw(
            st.dictionaries(st.text(max_size=2), FINITE | st.lists(st.text(max_size=2), max_size=2), max_size=2)
        ),
    )


def without(values, *names, **changes):
    return {name: value for name, value in values.items() if name not in names} | changes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (without(GOOD, "controls"), "has no control; give controls=(...), or say why not: control_waived='...'"),
        (without(GOOD, "controls", control_waived="  "), "has no control"),
        (without(GOOD, "controls", control_waived=""), "has no control"),
        (without(GOOD, "interval"), "has no interval; say why there is none"),
        (GOOD | {"estimate": math.nan}, "an estimate of nan cannot be 'supported'"),
        (GOOD | {"estimate": math.inf}, "an estimate of inf cannot be 'supported'"),
        (GOOD | {"verdict": "proved"}, "the verdict 'proved'; valid: 'supported', 'not distinguishable from control'"),
        (GOOD | {"claim": " "}, "needs a claim"),
        (GOOD | {"n": -1}, "n = -1"),
        (GOOD | {"detail": {"curve": [0.0, math.nan]}}, "detail.curve[1] is nan"),
        (GOOD | {"detail": {"x": object()}}, "detail.x has type object"),
    ],
)
def test_a_finding_without_its_evidence_is_refused(values, message):
    with pytest.raises(FindingError) as caught:
        Finding(**values)
    assert message in str(caught.value)


def test_a_waiver_a_note_or_a_control_is_enough():
    assert Finding(**GOOD).controls[0].name == "random sets"
    assert Finding(**without(GOOD, "controls", control_waived="a fact")).controls == ()
    assert Finding(**without(GOOD, "interval", interval_note="deterministic")).interval is None
    assert math.isnan(Finding(**WAIVED).estimate)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"null": (1.0, math.nan)}, "1 of 2 draws are NaN or infinite"),
        ({"p": 0.0}, "p = 0.0"),
        ({"p": 1.5}, "p = 1.5"),
        ({"side": "up"}, "side 'up'; valid: 'greater', 'less', 'two'"),
        ({"name": ""}, "needs a name"),
    ],
)
def test_a_malformed_control_is_refused(values, message):
    with pytest.raises(FindingError, match=re.escape(message)):
        Control(**({"name": "c", "description": "", "null": (0.0, 1.0)} | values))


def test_findings_and_controls_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Finding(**GOOD).estimate = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONTROL.p = 0.001


def test_a_control_knows_its_smallest_p_and_its_summary():
    null = tuple(np.arange(99.0))
    control = Control(name="c", description="", null=null)
    assert control.min_p == 0.01
    assert Control(name="c", description="", null=null, side="two").min_p == 0.02
    assert Control(name="c", description="", null=()).min_p == 1.0
    summary = control.summary
    assert (summary.n, summary.mean, summary.min, summary.max) == (99, 49.0, 0.0, 98.0)
    assert (summary.low, summary.high) == pytest.approx((0.025 * 98, 0.975 * 98))
    assert Control(name="c", description="", null=()).summary is None


@pytest.mark.parametrize(("estimate", "place"), [(-1, 0.0), (1.5, 50.0), (1.0, 37.5), (3.0, 87.5), (9, 100.0)])
def test_a_finding_places_its_estimate_among_the_draws(estimate, place):
    assert Finding(**GOOD | {"estimate": estimate}).controls[0].place == place


def test_an_estimate_that_is_not_finite_has_no_place():
    finding = Finding(**without(WAIVED, "control_waived", controls=(CONTROL,)))
    assert finding.controls[0].place is None


def test_costs_add_and_their_peak_is_the_largest():
    costs = [Cost(forwards=1, backwards=2, seconds=0.5, peak_bytes=10), Cost(forwards=3, seconds=1.0, peak_bytes=7)]
    assert sum(costs) == costs[0] + costs[1] == Cost(forwards=4, backwards=2, seconds=1.5, peak_bytes=10)
    with pytest.raises(TypeError):
        sum(costs, 1.0)


def test_a_line_says_it_all():
    assert Finding(**GOOD).line() == (
        "[supported] The top 10 components carry the behaviour: 3.25 logits (95% interval 3 to 3.5; n = 16); "
        "random sets (n = 4, above 100% of them, p = 0.2)"
    )
    assert Finding(**WAIVED).line() == (
        "[not testable] A fact: not measured (n = 0; deterministic); no control: one forward pass"
    )
    many = GOOD | {"claim": "two\nlines", "estimate": 123456.7, "controls": (dataclasses.replace(CONTROL, p=None),)}
    assert Finding(**many).line() == (
        "[supported] two lines: 123457 logits (95% interval 3 to 3.5; n = 16); random sets (n = 4)"
    )


@given(findings())
def test_json_loses_nothing(finding):
    text = json.dumps(finding.to_dict(), allow_nan=False)
    back = Finding.from_dict(json.loads(text))
    assert json.dumps(back.to_dict()) == text
    if math.isfinite(finding.estimate):
        assert back == finding


@given(findings())
def test_every_finding_fits_the_schema(finding):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(finding_schema())
    validator.validate(json.loads(json.dumps(finding.to_dict())))


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "proved"},
        {"estimate": "3"},
        {"estimate": None},
        {"controls": []},
        {"interval": None},
        {"claim": ""},
        {"n": -1},
        {"extra": 1},
        {"cost": {"forwards": 1}},
        {"format": "assay.finding/2"},
    ],
)
def test_the_schema_refuses_what_the_constructor_refuses(change):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(finding_schema())
    good = Finding(**FULL).to_dict()
    validator.validate(good)
    assert not validator.is_valid(good | change)


def test_the_schema_is_a_schema():
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(finding_schema())


def test_the_published_schema_is_in_step():
    published = SCHEMA.read_text(encoding="utf-8")
    assert published == schema_text(), f"{SCHEMA} is out of step; run: python {Path(__file__).name} (see its docstring)"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": "assay.finding/9"}, "'assay.finding/9'"), ({"cost": {"hours": 1}}, "hours"), ({"controls": 3}, "int")],
)
def test_reading_something_else_is_an_error_that_says_what(change, message):
    with pytest.raises(FindingError, match=message):
        Finding.from_dict(Finding(**FULL).to_dict() | change)
    with pytest.raises(FindingError, match="format is None"):
        Finding.from_dict({})


def test_reading_a_finding_without_a_control_is_refused_too():
    with pytest.raises(FindingError, match="has no control"):
        Finding.from_dict(Finding(**FULL).to_dict() | {"controls": []})


def test_findings_survive_json_with_their_views_and_artifacts():
    @dataclasses.dataclass
    class Artifact:
        path: str

        def to_dict(self):
            return {"path": self.path, "bytes": np.int64(12)}

    views = (
        Text(id="t", section="Summary", title="What was found", paragraphs=["one"]),
        Bars(id="b", section="Heads", title="Effects", labels=["L9H6"], values=[1.5]),
    )
    found = Findings(
        findings=[Finding(**FULL), Finding(**GOOD)],
        views=views,
        artifacts={"effects": Artifact("effects.safetensors")},
        summary=["first", "second"],
        warnings=["one prompt only"],
    )
    back = Findings.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert back == found
    assert back.artifacts == {"effects": {"path": "effects.safetensors", "bytes": 12}}
    assert [view.id for view in back.views] == ["t", "b"]
    assert list(found) == list(found.findings)
    assert len(found) == 2
    assert found.tagged("main") == (found.findings[0],)
    with pytest.raises(FindingError, match="format is None"):
        Findings.from_dict({})
    with pytest.raises(FindingError, match="not the one text 'oops'"):
        Findings(findings=(), summary="oops")


def schema_text() -> str:
    return json.dumps(finding_schema(), indent=2) + "\n"


if __name__ == "__main__":
    SCHEMA.parent.mkdir(parents=True, exist_ok=True)
    SCHEMA.write_text(schema_text(), encoding="utf-8")
