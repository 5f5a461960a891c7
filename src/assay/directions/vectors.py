"""Reading and writing are different: a `Probe` reads a number off a site, a `Direction` changes it.

    readout   r(x) = weight . x + bias                     a probe
    writing   x <- x + alpha * size * vector / |vector|    a direction, with `size` the typical norm at its site

The best vector to read a feature is not the best to write it: adding a probe's weight moves every readout that it
correlates with. So a probe becomes a direction only by `Direction.from_probe`, which says how.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from assay.activations.edits import Add, Clamp, Positions, ProjectOut
from assay.base.artifacts import user_path, write_safetensors
from assay.base.errors import DamagedFile, NumericalError, SpecError
from assay.base.hashing import plain
from assay.directions.basis import dual, on_distribution_dual
from assay.subjects.model import Model

Conversion = Literal["as is", "dual", "on-distribution dual"]
"""How a probe's weight becomes something to write."""

FORMAT = "assay.vector/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a vector comes from.

    Args:
        method: How it was fitted, such as "difference of means".
        subject: The fingerprint of the weights it was fitted on; empty where it is not known.
        data: Digest of the data it was fitted on.
        train: The rows it was fitted on, and `test` those that were held out, as numbers of the data's rows.
        test: See `train`.
        seed: Seed of its random streams.
        detail: Anything else, as JSON.
    """

    method: str
    subject: str = ""
    data: str = ""
    train: tuple[int, ...] = ()
    test: tuple[int, ...] = ()
    seed: int = 0
    detail: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The origin as JSON values."""
        names = ("method", "subject", "data", "train", "test", "seed", "detail")
        return {name: plain(getattr(self, name), name) for name in names}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Origin:
        """Read back what `to_dict` wrote."""
        return cls(**{**data, "train": tuple(data["train"]), "test": tuple(data["test"])})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """A read vector: `r(x) = weight . x + bias`, positive for the class that `reads` names.

    Args:
        site: The site it reads.
        weight: In the units of the site's activations, `[d]`; standardisation is folded in.
        bias: The readout at zero.
        reads: What a positive readout says.
        positions: Which token of a prompt it was fitted on.
        origin: Where it comes from.

    Raises:
        SpecError: The weight is no vector.
        NumericalError: It is zero or not finite.

    Example:
        >>> probe = Probe(site="blocks.3.resid_post", weight=torch.tensor([1.0, -1.0]), bias=0.5)
        >>> probe(torch.tensor([[2.0, 1.0], [0.0, 1.0]])).tolist()
        [1.5, -0.5]
    """

    site: str
    weight: Float[Tensor, " d"]
    bias: float = 0.0
    reads: str = ""
    positions: Any = "last"
    origin: Origin = field(default_factory=lambda: Origin(method="given"))

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", _vector(self.weight, "weight"))

    def __call__(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows"]:
        """The readout of activations at the site."""
        x = torch.as_tensor(x)
        if x.shape[-1:] != self.weight.shape:
            raise SpecError(f"the probe reads {len(self.weight)} numbers at {self.site}; got {tuple(x.shape)}", "x")
        if not x.is_floating_point():
            raise SpecError(f"activations are floating point; got {x.dtype}", "x")
        wide = x if x.dtype == torch.float64 else x.float()  # half precision would round the weight
        readout: Tensor = (wide @ self.weight.to(wide) + self.bias).to(x.dtype)
        return readout

    def check(self, subject: Model) -> None:
        """See that a subject is the one that the probe was fitted on.

        Raises:
            SpecError: It has other weights, or another width at the site.
            UnknownSite: It has no such site.
        """
        _check(self, subject, len(self.weight))

    def save(self, path: str | Path) -> None:
        """Write the probe as one safetensors file."""
        about = {"bias": self.bias, "reads": self.reads, "positions": self.positions}
        _save(self, "probe", self.weight, about, path)

    @classmethod
    def load(cls, path: str | Path) -> Probe:
        """Read back what `save` wrote.

        Raises:
            DamagedFile: It is no such file.
        """
        vector, about = _load(path, "probe")
        return cls(weight=vector, **about)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Direction:
    """A write vector, with the scale that its doses are measured in.

    Args:
        site: The site it writes to.
        vector: As it was fitted, `[d]`.
        size: The mean norm of the activations at the site, the unit of a dose; NaN where it is not known.
        writes: What adding it does: the sign convention.
        level: The mean of `vector / |vector| . x` over the class it points away from, for setting it: affine ablation.
        origin: Where it comes from.

    Raises:
        SpecError: The vector is no vector.
        NumericalError: It is zero or not finite.
    """

    site: str
    vector: Float[Tensor, " d"]
    size: float = math.nan
    writes: str = ""
    level: float = 0.0
    origin: Origin = field(default_factory=lambda: Origin(method="given"))

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", _vector(self.vector, "vector"))

    @property
    def unit(self) -> Float[Tensor, " d"]:
        """The vector with norm 1."""
        wide = self.vector.double()  # the square of a small or large float32 is no float32
        unit: Tensor = (wide / wide.norm()).float()
        return unit

    @classmethod
    def from_probe(
        cls,
        probe: Probe,
        how: Conversion,
        *,
        others: Sequence[Probe] = (),
        activations: Float[Tensor, "rows d"] | None = None,
        size: float = math.nan,
        ridge: float = 0.0,
        limit: float = 30.0,
    ) -> Direction:
        """What to write so that a probe's readout rises.

        - "as is": the weight itself. Moves every readout that it correlates with.
        - "dual": the least vector that moves this readout by 1 and none of the `others`; see `dual`.
        - "on-distribution dual": of those vectors the one that activations come by most easily; see
          `on_distribution_dual`.

        Args:
            probe: The probe.
            how: The conversion; there is no default, because the three are different claims.
            others: Probes at the same site that must not move.
            activations: Activations at the site, for the covariance and for `size`.
            size: The mean norm at the site; taken from the activations where they are given.
            ridge: See `dual`.
            limit: See `dual`.

        Raises:
            SpecError: Something is missing, or probes of different sites, widths or models are given.
            NumericalError: The probes are too nearly dependent.
        """
        if how not in get_args(Conversion):
            raise SpecError(f"how is {how!r}; valid: {', '.join(map(repr, get_args(Conversion)))}", "how")
        elsewhere = sorted({other.site for other in others} - {probe.site})
        if elsewhere:
            raise SpecError(
                f"the probe reads {probe.site}, others read {', '.join(elsewhere)}; give one site", "others"
            )
        if how == "on-distribution dual" and activations is None:
            raise SpecError("the on-distribution dual needs activations at the site", "activations")
        _alike(probe, others)
        rows = torch.stack([probe.weight, *(other.weight for other in others)])
        if how == "as is":
            vector = probe.weight
        elif how == "dual":
            vector = dual(rows, ridge=ridge, limit=limit)[0]
        else:
            assert activations is not None
            vector = on_distribution_dual(rows, activations, ridge=ridge, limit=limit)[0]
        if activations is not None and math.isnan(size):
            size = float(activations.double().norm(dim=-1).mean())
        detail = {
            "how": how,
            "others": [other.reads for other in others],
            "ridge": ridge,
            "probe": probe.origin.to_dict(),
        }
        origin = Origin(
            method=f"{how} of a {probe.origin.method} probe",
            subject=probe.origin.subject,
            data=probe.origin.data,
            train=probe.origin.train,
            test=probe.origin.test,
            seed=probe.origin.seed,
            detail=detail,
        )
        return cls(site=probe.site, vector=vector, size=size, writes=f"raises: {probe.reads}", origin=origin)

    def add(self, dose: float, *, positions: Positions = None, site: str | None = None) -> Add:
        """The edit `x + dose * size * unit`: a dose of 1 adds as much as the site typically holds.

        Raises:
            SpecError: The size is not known, or the dose is not finite.
        """
        if not math.isfinite(dose):
            raise SpecError(f"the dose is {dose}; it must be finite", "dose")
        if not math.isfinite(self.size) or self.size <= 0:
            raise SpecError(
                f"the direction at {self.site} does not know the typical norm there (size is {self.size}), which is "
                "what doses are measured in; give size=, or use assay.Add with a vector of your own scale",
                "size",
            )
        return Add(site or self.site, self.unit, scale=float(dose) * self.size, positions=positions)

    def add_raw(self, coefficient: float = 1.0, *, positions: Positions = None, site: str | None = None) -> Add:
        """The edit `x + coefficient * vector`, in the units that the vector was fitted in."""
        return Add(site or self.site, self.vector, scale=float(coefficient), positions=positions)

    def ablate(self, sites: Sequence[str] | None = None, *, positions: Positions = None) -> list[ProjectOut]:
        """The edits `x - (x . unit) unit` at each of the sites; at its own by default."""
        return [ProjectOut(site, self.unit, positions=positions) for site in (sites or [self.site])]

    def clamp(
        self, to: float | None = None, sites: Sequence[str] | None = None, *, positions: Positions = None
    ) -> list[Clamp]:
        """The edits `x + (to - x . unit) unit` at each of the sites; `to` is `level` by default: affine ablation."""
        value = self.level if to is None else float(to)
        return [Clamp(site, self.unit, low=value, high=value, positions=positions) for site in (sites or [self.site])]

    def check(self, subject: Model) -> None:
        """See that a subject is the one that the direction was fitted on.

        Raises:
            SpecError: It has other weights, or another width at the site.
            UnknownSite: It has no such site.
        """
        _check(self, subject, len(self.vector))

    def save(self, path: str | Path) -> None:
        """Write the direction as one safetensors file."""
        about = {"size": None if math.isnan(self.size) else self.size, "writes": self.writes, "level": self.level}
        _save(self, "direction", self.vector, about, path)

    @classmethod
    def load(cls, path: str | Path) -> Direction:
        """Read back what `save` wrote.

        Raises:
            DamagedFile: It is no such file.
        """
        vector, about = _load(path, "direction")
        size = about.pop("size")
        return cls(vector=vector, size=math.nan if size is None else size, **about)


def _vector(value: Any, name: str) -> Tensor:
    try:
        vector = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SpecError(f"{name} must be numbers [d]: {error}", name) from error
    if vector.ndim != 1 or not len(vector):
        raise SpecError(f"{name} has the shape {tuple(vector.shape)}; it must be one vector [d]", name)
    vector = vector.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(vector).all()) or not bool(vector.any()):
        raise NumericalError(f"the {name} is zero or not finite")
    return vector


def _alike(probe: Probe, others: Sequence[Probe]) -> None:
    """See that probes read as many numbers, and were fitted on one model where that is known."""
    for other in others:
        if len(other.weight) != len(probe.weight):
            raise SpecError(f"the probe reads {len(probe.weight)} numbers, another {len(other.weight)}", "others")
        mine, its = probe.origin.subject, other.origin.subject
        if mine and its and mine != its:
            raise SpecError(
                f"the probe was fitted on the weights {mine[:12]}, another on {its[:12]}; give probes of one model",
                "others",
            )


def _check(vector: Probe | Direction, subject: Model, d: int) -> None:
    kind = type(vector).__name__.lower()
    fitted = vector.origin.subject
    if fitted and fitted != subject.fingerprint:
        raise SpecError(
            f"this {kind} was fitted on the weights {fitted[:12]}, and {subject.name} has {subject.fingerprint[:12]}: "
            "fit it again, or set origin=Origin(method=...) if you mean to carry it over",
            "subject",
        )
    point = subject.site(vector.site).point
    width = subject.parts.d_model if point == "embed" or point.startswith("resid") or point.endswith(".out") else d
    if width != d:
        raise SpecError(f"this {kind} has {d} numbers, and {vector.site} of {subject.name} has {width}", "subject")


def _save(vector: Probe | Direction, kind: str, values: Tensor, about: Mapping[str, Any], path: str | Path) -> None:
    fields = {"format": FORMAT, "kind": kind, "site": vector.site, "origin": vector.origin.to_dict(), **plain(about)}
    write_safetensors(user_path(path), {"vector": values.numpy()}, {"assay": json.dumps(fields)})


def _load(path: str | Path, kind: str) -> tuple[Tensor, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    file = user_path(path)
    try:
        with safe_open(file, framework="pt") as opened:
            about = dict(json.loads((opened.metadata() or {}).get("assay", "{}")))
            if about.pop("format", None) != FORMAT or about.pop("kind", None) != kind:
                raise DamagedFile(f"{file} holds no {kind} that assay wrote")
            about["origin"] = Origin.from_dict(about["origin"])
            vector = opened.get_tensor("vector")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{file} is no {kind}: {error}") from error
    missing = {"probe": {"site", "bias", "reads", "positions"}, "direction": {"site", "size", "writes", "level"}}[kind]
    if missing - set(about):
        raise DamagedFile(f"{file} is no {kind}: it lacks {', '.join(sorted(missing - set(about)))}")
    return vector, about
