"""A finding: a claim, its estimate with an interval, the controls it was held against, and the verdict.

    Findings               what a method returns: findings, views, artifacts, headline lines, warnings
    └── Finding            refused by its own constructor when it has no control and does not say why
        ├── Interval       from `assay.base.stats`
        ├── Control        a null: the same pipeline where the claimed structure was destroyed
        ├── Cost           forwards, backwards, seconds, peak bytes
        └── Provenance     what was studied: hashes, seed, versions

All of it is JSON: `to_dict` and `from_dict` are inverse to each other, and `finding_schema()` is the published schema
(`docs/schemas/finding.schema.json`) of one line of `findings.jsonl`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import numpy as np

from assay.base.errors import AssayError, FindingError
from assay.base.hashing import plain
from assay.base.stats import Interval, Side
from assay.base.views import View, view_from_dict

Verdict = Literal["supported", "not distinguishable from control", "contradicted", "not testable"]
"""What the controls say about a claim."""

FINDING_FORMAT = "assay.finding/1"
"""The format of a finding written as JSON; readers refuse formats they do not know."""

FINDINGS_FORMAT = "assay.findings/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class NullSummary:
    """A null in six numbers: the number of draws, their mean, 2.5% and 97.5% quantiles, and extremes."""

    n: int
    mean: float
    low: float
    high: float
    min: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A null distribution of the estimate, and the estimate's place in it.

    `assay.controls.compare` builds one from an estimate and its null.

    Args:
        name: A short name, such as "random sets".
        description: What was destroyed and what was kept.
        null: The estimate in each draw of the control.
        p: `(1 + #{null at least as extreme}) / (n + 1)`; None when the control only describes.
        side: The direction of the claim that p is about.
        place: Percentage of the null below the estimate (ties count half), 0 to 100. A `Finding` fills it in.

    Raises:
        FindingError: A draw is not finite, or p does not lie in (0, 1].
    """

    name: str
    description: str
    null: tuple[float, ...]
    p: float | None = None
    side: Side = "greater"
    place: float | None = None

    def __post_init__(self) -> None:
        null = tuple(float(value) for value in self.null)
        object.__setattr__(self, "null", null)
        if not self.name.strip():
            raise FindingError("a control needs a name, got an empty one")
        if self.side not in get_args(Side):
            raise FindingError(f"control {self.name!r} has side {self.side!r}; valid: {_choices(Side)}")
        bad = sum(not math.isfinite(value) for value in null)
        if bad:
            raise FindingError(f"control {self.name!r}: {bad} of {len(null)} draws are NaN or infinite")
        if self.p is not None:
            object.__setattr__(self, "p", float(self.p))
            if not 0 < float(self.p) <= 1:
                raise FindingError(f"control {self.name!r} has p = {self.p!r}; a permutation p lies in (0, 1]")

    @property
    def min_p(self) -> float:
        """The smallest p these many draws can give: 1 / (n + 1), twice that for a two-sided p."""
        return min(1.0, (2 if self.side == "two" else 1) / (len(self.null) + 1))

    @property
    def summary(self) -> NullSummary | None:
        """The null in six numbers; None when there are no draws."""
        if not self.null:
            return None
        low, high = np.quantile(self.null, (0.025, 0.975))
        lowest, highest = min(self.null), max(self.null)
        mean = math.fsum(self.null) / len(self.null)
        return NullSummary(n=len(self.null), mean=mean, low=float(low), high=float(high), min=lowest, max=highest)

    def placed(self, estimate: float) -> Control:
        """Return this control with `place` filled in for an estimate; unchanged where there is no place."""
        if not self.null or not math.isfinite(estimate):
            return self
        null = np.asarray(self.null)
        below = np.sum(null < estimate) + 0.5 * np.sum(null == estimate)
        return dataclasses.replace(self, place=float(100 * below / null.size))

    def to_dict(self) -> dict[str, Any]:
        """Return the control as JSON-able data, with its summary."""
        data = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        summary = self.summary
        return {**data, "null": list(self.null), "summary": None if summary is None else dataclasses.asdict(summary)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Control:
        """Read back what `to_dict` wrote."""
        kept = {item.name: data[item.name] for item in dataclasses.fields(cls)}
        return cls(**{**kept, "null": tuple(data["null"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a result cost. Costs add: counts and seconds sum, the peak is the larger one.

    Args:
        forwards: Forward passes, counted in rows of a batch.
        backwards: Backward passes, counted in rows of a batch.
        seconds: Wall-clock seconds.
        peak_bytes: Largest memory in use, in bytes; 0 when it was not measured.

    Example:
        >>> Cost(forwards=2, peak_bytes=10) + Cost(forwards=3, seconds=0.5, peak_bytes=7)
        Cost(forwards=5, backwards=0, seconds=0.5, peak_bytes=10)
    """

    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            forwards=self.forwards + other.forwards,
            backwards=self.backwards + other.backwards,
            seconds=self.seconds + other.seconds,
            peak_bytes=max(self.peak_bytes, other.peak_bytes),
        )

    def __radd__(self, other: int) -> Cost:
        """Let `sum(costs)` start from 0."""
        return self if other == 0 else NotImplemented


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a number comes from: enough to tell whether another run should have given the same one.

    Args:
        model: The reference the subject was loaded from.
        weights_hash: SHA-256 of the weight file or the weights.
        tokenizer_hash: SHA-256 of the tokenizer.
        data_hash: Digest of the data the method read.
        spec_hash: Digest of the method's spec.
        seed: Seed of every random stream.
        versions: Package name to version.
    """

    model: str = ""
    weights_hash: str = ""
    tokenizer_hash: str = ""
    data_hash: str = ""
    spec_hash: str = ""
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", {str(name): str(version) for name, version in self.versions.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A claim with its evidence.

    Args:
        claim: One sentence that the estimate bears on.
        estimate: The number. NaN only with the verdict "not testable".
        unit: What the number counts: "logits", "fraction of the logit difference", ...
        n: How many independent observations it rests on.
        controls: The nulls it was held against.
        control_waived: Why there is no control; required when `controls` is empty.
        interval: Its uncertainty.
        interval_note: Why there is no interval; required when `interval` is None.
        verdict: What the controls say; `assay.controls.verdict` decides it.
        cost: What it cost, controls included.
        provenance: Where it comes from.
        tags: Words to find it by.
        detail: Anything else worth keeping, as JSON.

    Raises:
        FindingError: No control and no waiver; no interval and no note; an estimate that is not finite and yet
            judged; an empty claim; an unknown verdict; a negative n; a detail that is not JSON.

    Example:
        >>> finding = Finding(
        ...     claim="The model prefers the answer",
        ...     estimate=3.2,
        ...     unit="logits",
        ...     n=1,
        ...     control_waived="a statement of fact about one forward pass",
        ...     interval_note="deterministic",
        ...     verdict="not testable",
        ... )
        >>> finding.line()
        '[not testable] The model prefers the answer: 3.2 logits (n = 1; deterministic); no control: a statement of fact about one forward pass'
    """  # noqa: E501

    claim: str
    estimate: float
    unit: str
    n: int
    controls: tuple[Control, ...] = ()
    control_waived: str | None = None
    interval: Interval | None = None
    interval_note: str = ""
    verdict: Verdict
    cost: Cost = field(default_factory=Cost)
    provenance: Provenance = field(default_factory=Provenance)
    tags: tuple[str, ...] = ()
    detail: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        estimate = float(self.estimate)
        try:
            detail = plain(self.detail, "detail")
        except AssayError as error:
            raise FindingError(f"finding {self.claim!r}: {error}") from error
        placed = tuple(control.placed(estimate) for control in self.controls)
        names = {"estimate": estimate, "n": int(self.n), "controls": placed, "tags": tuple(self.tags), "detail": detail}
        for name, value in names.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        if not self.claim.strip():
            raise FindingError("a finding needs a claim, got an empty text")
        if not self.controls and not (self.control_waived or "").strip():
            raise FindingError(
                f"finding {self.claim!r} has no control; give controls=(...), or say why not: control_waived='...'"
            )
        if self.verdict not in get_args(Verdict):
            raise FindingError(f"finding {self.claim!r} has the verdict {self.verdict!r}; valid: {_choices(Verdict)}")
        if not math.isfinite(self.estimate) and self.verdict != "not testable":
            raise FindingError(f"finding {self.claim!r}: an estimate of {self.estimate} cannot be {self.verdict!r}")
        if self.interval is None and not self.interval_note.strip():
            raise FindingError(f"finding {self.claim!r} has no interval; say why there is none: interval_note='...'")
        if self.n < 0:
            raise FindingError(f"finding {self.claim!r} has n = {self.n}; n counts observations")

    def line(self) -> str:
        """Return the finding as one line of text: verdict, claim, estimate, interval, n and each control."""
        spread = f"n = {self.n}"
        if self.interval is not None:
            low, high = _short(self.interval.low), _short(self.interval.high)
            spread = f"{self.interval.level:.0%} interval {low} to {high}; {spread}"
        elif self.interval_note:
            spread += f"; {self.interval_note}"
        estimate = f"{_short(self.estimate)} {self.unit}".rstrip()
        held = "; ".join(_held(control) for control in self.controls) or f"no control: {self.control_waived}"
        return " ".join(f"[{self.verdict}] {self.claim}: {estimate} ({spread}); {held}".split())

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON-able data that `finding_schema()` describes."""
        data: dict[str, Any] = {"format": FINDING_FORMAT}
        data |= {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        data["estimate"] = self.estimate if math.isfinite(self.estimate) else None
        data["controls"] = [control.to_dict() for control in self.controls]
        data["interval"] = None if self.interval is None else self.interval.to_dict()
        data["cost"] = dataclasses.asdict(self.cost)
        data["provenance"] = dataclasses.asdict(self.provenance)
        data["tags"] = list(self.tags)
        data["detail"] = plain(self.detail)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Finding:
        """Read back what `to_dict` wrote.

        Raises:
            FindingError: The format is unknown, a field is missing, or the finding is malformed.
        """
        _check_format(data, FINDING_FORMAT)
        try:
            kept = {item.name: data[item.name] for item in dataclasses.fields(cls)}
            kept["estimate"] = math.nan if data["estimate"] is None else data["estimate"]
            kept["controls"] = tuple(Control.from_dict(control) for control in data["controls"])
            kept["interval"] = None if data["interval"] is None else Interval.from_dict(data["interval"])
            kept["cost"] = Cost(**data["cost"])
            kept["provenance"] = Provenance(**data["provenance"])
        except (KeyError, TypeError) as error:
            raise FindingError(f"this is no finding: {error!r}; see docs/schemas/finding.schema.json") from error
        return cls(**kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a method returns; iterating over it gives its findings.

    Args:
        findings: The claims with their evidence.
        views: The charts, as data.
        artifacts: Name to a description of the artifact as JSON (values with a `to_dict` are converted).
        summary: Headline lines, in reading order.
        warnings: What the reader should know before believing any of it.
    """

    findings: tuple[Finding, ...]
    views: tuple[View, ...] = ()
    artifacts: Mapping[str, Any] = field(default_factory=dict)
    summary: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("findings", "views", "summary", "warnings"):
            object.__setattr__(self, name, _tuple(name, getattr(self, name)))
        object.__setattr__(self, "artifacts", plain(self.artifacts, "artifacts"))

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def tagged(self, tag: str) -> tuple[Finding, ...]:
        """Return the findings that carry a tag."""
        return tuple(finding for finding in self.findings if tag in finding.tags)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able data."""
        return {
            "format": FINDINGS_FORMAT,
            "findings": [finding.to_dict() for finding in self.findings],
            "views": [view.to_dict() for view in self.views],
            "artifacts": plain(self.artifacts),
            "summary": list(self.summary),
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Findings:
        """Read back what `to_dict` wrote.

        Raises:
            FindingError: The format is unknown, or a finding or a view is malformed.
        """
        _check_format(data, FINDINGS_FORMAT)
        return cls(
            findings=tuple(Finding.from_dict(finding) for finding in data["findings"]),
            views=tuple(view_from_dict(view) for view in data["views"]),
            artifacts=data["artifacts"],
            summary=tuple(data["summary"]),
            warnings=tuple(data["warnings"]),
        )


def finding_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of `Finding.to_dict()`, which is also a line of `findings.jsonl`."""
    number, text = {"type": "number"}, {"type": "string"}
    count = {"type": "integer", "minimum": 0}
    interval = _object(
        low=number, high=number, level={**number, "exclusiveMinimum": 0, "exclusiveMaximum": 1}, method=text
    )
    summary = _object(n={**count, "minimum": 1}, mean=number, low=number, high=number, min=number, max=number)
    percent = {"type": ["number", "null"], "minimum": 0, "maximum": 100}
    control = _object(
        name={**text, "minLength": 1},
        description=text,
        null={"type": "array", "items": number},
        p={"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
        side={"enum": list(get_args(Side))},
        place={**percent, "description": "percentage of the null below the estimate, ties counting half"},
        summary={"anyOf": [summary, {"type": "null"}]},
    )
    hashes = {name: text for name in ("model", "weights_hash", "tokenizer_hash", "data_hash", "spec_hash")}
    versions = {"type": "object", "additionalProperties": text}
    finding = _object(
        format={"const": FINDING_FORMAT},
        claim={**text, "minLength": 1},
        estimate={"type": ["number", "null"], "description": "null when the number is not finite"},
        unit=text,
        n=count,
        controls={"type": "array", "items": control},
        control_waived={"type": ["string", "null"], "description": "why there is no control"},
        interval={"anyOf": [interval, {"type": "null"}]},
        interval_note={**text, "description": "why there is no interval"},
        verdict={"enum": list(get_args(Verdict))},
        cost=_object(forwards=count, backwards=count, seconds={**number, "minimum": 0}, peak_bytes=count),
        provenance=_object(**hashes, seed={"type": "integer"}, versions=versions),
        tags={"type": "array", "items": text},
        detail={"type": "object"},
    )
    said = {"type": "string", "minLength": 1}
    finding["allOf"] = [
        _if(controls={"maxItems": 0}) | {"then": {"properties": {"control_waived": said}}},
        _if(estimate={"type": "null"}) | {"then": {"properties": {"verdict": {"const": "not testable"}}}},
        _if(interval={"type": "null"}) | {"then": {"properties": {"interval_note": said}}},
    ]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "urn:assay:finding:1", "title": "Finding"}
    return {**head, "description": "A claim, its estimate, its controls and the verdict.", **finding}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _if(**properties: Any) -> dict[str, Any]:
    return {"if": {"properties": properties}}


def _check_format(data: Mapping[str, Any], expected: str) -> None:
    if data.get("format") != expected:
        raise FindingError(f"format is {data.get('format')!r}; this version of assay reads {expected!r}")


def _tuple(name: str, values: Iterable[Any]) -> tuple[Any, ...]:
    if isinstance(values, str):
        raise FindingError(f"{name} must be a sequence, not the one text {values!r}")
    return tuple(values)


def _choices(literal: Any) -> str:
    return ", ".join(repr(choice) for choice in cast("Sequence[str]", get_args(literal)))


def _short(value: float) -> str:
    """Three significant digits; all digits of a larger whole part."""
    if not math.isfinite(value):
        return "not measured"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _held(control: Control) -> str:
    draws = f"{control.name} (n = {len(control.null)}"
    if control.p is None or control.place is None:
        return f"{draws})"
    return f"{draws}, above {control.place:.0f}% of them, p = {_short(control.p)})"
