"""An eraser: an affine map that takes a few directions out of activations, as a value that can be applied and saved.

    x' = x - W' R (x - mu),    R W' = I

with R `[k, d]` what is read and W `[k, d]` what is taken out. `P = I - W' R` is idempotent. Where R = W the projection
is orthogonal (INLP, mean projection); LEACE's is oblique: it moves activations least on the data it was fitted on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from assay.activations.edits import Add, Apply, Edit, Positions, ProjectOut
from assay.base.artifacts import user_path, write_safetensors
from assay.base.errors import DamagedFile, NumericalError, SpecError
from assay.controls.labels import label_array
from assay.directions.vectors import Origin
from assay.subjects.model import Model

FORMAT = "assay.eraser/1"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Eraser:
    """An affine eraser `x' = x - W' R (x - mu)`.

    Args:
        site: The site it was fitted at.
        read: R, `[k, d]`; k may be 0, and then nothing is erased.
        write: W, `[k, d]`, with `R W' = I`.
        mean: mu, `[d]`: what keeps its place; zero for a linear eraser.
        origin: Where it comes from.

    Raises:
        SpecError: The shapes do not fit.
        NumericalError: Something is not finite, or `R W'` is not the identity (so that erasing twice is not erasing
            once).

    Example:
        >>> axis = np.array([[1.0, 0.0]])
        >>> eraser = Eraser(site="blocks.0.resid_post", read=axis, write=axis, mean=np.array([3.0, 0.0]))
        >>> eraser(np.array([[5.0, 7.0]])).tolist(), eraser.rank, eraser.orthogonal
        ([[3.0, 7.0]], 1, True)
    """

    site: str
    read: Float[np.ndarray, "k d"]
    write: Float[np.ndarray, "k d"]
    mean: Float[np.ndarray, " d"]
    origin: Origin = field(default_factory=lambda: Origin(method="given"))

    def __post_init__(self) -> None:
        for name in ("read", "write", "mean"):
            object.__setattr__(self, name, np.array(getattr(self, name), dtype=np.float64))
        shapes = {"read": self.read.shape, "write": self.write.shape, "mean": self.mean.shape}
        if self.read.ndim != 2 or self.read.shape != self.write.shape or self.mean.shape != self.read.shape[1:]:
            raise SpecError(f"an eraser needs read [k, d], write [k, d] and mean [d]; got {shapes}", "eraser")
        if not all(np.isfinite(values).all() for values in (self.read, self.write, self.mean)):
            raise NumericalError("the eraser is not finite")
        off = np.abs(self.read @ self.write.T - np.eye(self.rank)).max(initial=0.0)
        if off > 1e-6:
            raise NumericalError(f"read @ write.T is off the identity by {off:.2g}: erasing twice would not be once")

    @property
    def rank(self) -> int:
        """How many dimensions it takes out."""
        return len(self.read)

    @property
    def orthogonal(self) -> bool:
        """Whether it is an orthogonal projection about its mean."""
        return bool(np.allclose(self.read, self.write, rtol=0, atol=1e-12))

    @property
    def matrix(self) -> Float[np.ndarray, "d d"]:
        """`P = I - W' R`."""
        projection: np.ndarray = np.eye(len(self.mean)) - self.write.T @ self.read
        return projection

    def __call__(self, x: Shaped[np.ndarray, "*rows d"]) -> Float[np.ndarray, "*rows d"]:
        """Erase rows of activations, in float64.

        Raises:
            SpecError: They have another width.
        """
        rows = np.asarray(x, dtype=np.float64)
        if rows.shape[-1:] != self.mean.shape:
            raise SpecError(f"the eraser was fitted on {len(self.mean)} numbers a row; got {rows.shape}", "x")
        erased: np.ndarray = rows - ((rows - self.mean) @ self.read.T) @ self.write
        return erased

    def edits(self, *, positions: Positions = None, site: str | None = None) -> list[Edit]:
        """The edits that erase at a site: data where the projection is orthogonal, else an `Apply`.

        Args:
            positions: Which tokens.
            site: Another site than the eraser's own.
        """
        at = site or self.site
        if not self.rank:
            return []
        if self.orthogonal:
            kept = self.mean @ self.read.T @ self.write
            projected = ProjectOut(at, torch.from_numpy(self.read), positions=positions)
            return [projected, Add(at, torch.from_numpy(kept), positions=positions)] if kept.any() else [projected]
        read, write, mean = (torch.from_numpy(values) for values in (self.read, self.write, self.mean))

        def erase(x: Tensor) -> Tensor:
            wide = x.double() if x.device.type != "mps" else x.float()
            taken = ((wide - mean.to(wide)) @ read.to(wide).T) @ write.to(wide)
            return (wide - taken).to(x.dtype)

        return [Apply(at, erase, positions=positions)]

    def check(self, subject: Model) -> None:
        """See that a subject is the one that the eraser was fitted on.

        Raises:
            SpecError: It has other weights, or another width at the site.
            UnknownSite: It has no such site.
        """
        fitted = self.origin.subject
        if fitted and fitted != subject.fingerprint:
            raise SpecError(
                f"this eraser was fitted on the weights {fitted[:12]}, and {subject.name} has "
                f"{subject.fingerprint[:12]}: fit it again",
                "subject",
            )
        site = subject.site(self.site)
        if site.point.startswith("resid") and subject.parts.d_model != len(self.mean):
            raise SpecError(
                f"this eraser has {len(self.mean)} numbers, and {self.site} of {subject.name} has "
                f"{subject.parts.d_model}",
                "subject",
            )

    def save(self, path: str | Path) -> None:
        """Write the eraser as one safetensors file."""
        arrays = {"read": self.read, "write": self.write, "mean": self.mean}
        about = {"format": FORMAT, "site": self.site, "origin": self.origin.to_dict()}
        write_safetensors(user_path(path), arrays, {"assay": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Eraser:
        """Read back what `save` wrote.

        Raises:
            DamagedFile: It is no such file.
        """
        from safetensors import SafetensorError, safe_open

        file = user_path(path)
        try:
            with safe_open(file, framework="np") as opened:
                about: dict[str, Any] = json.loads((opened.metadata() or {}).get("assay", "{}"))
                if about.get("format") != FORMAT:
                    raise DamagedFile(f"{file} holds no eraser that assay wrote")
                arrays = {name: opened.get_tensor(name) for name in ("read", "write", "mean")}
        except (SafetensorError, OSError, ValueError) as error:
            raise DamagedFile(f"{file} is no eraser: {error}") from error
        return cls(site=about["site"], origin=Origin.from_dict(about["origin"]), **arrays)


def activation_rows(X: Any, name: str = "X") -> Float[np.ndarray, "rows d"]:
    """Activations as float64 `[rows, d]`.

    Raises:
        SpecError: They are no matrix with two rows or more.
        NumericalError: A row is not finite.
    """
    if hasattr(X, "detach"):
        X = X.detach().to("cpu").double().numpy()
    rows = np.asarray(X, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 2 or not rows.shape[1]:
        raise SpecError(f"{name} has the shape {rows.shape}; it must be [rows, d] with two rows or more", name)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise NumericalError(f"{len(bad)} of {len(rows)} rows of {name} are not finite, row {bad[0]} first")
    return rows


def class_columns(y: Any, rows: int) -> tuple[Shaped[np.ndarray, " classes"], Float[np.ndarray, "rows classes"]]:
    """The classes of labels, and a column of zeros and ones for each.

    Raises:
        SpecError: There is not one label a row, one is missing, or there is one class only.
    """
    labels = label_array(y)
    if labels.shape != (rows,):
        raise SpecError(f"y has the shape {labels.shape}; it must have one label for each of {rows} rows", "y")
    classes = np.unique(labels)
    if len(classes) < 2:
        raise SpecError(f"all {rows} labels are {classes[0]!r}; erasing needs two classes or more", "y")
    return classes, (labels[:, None] == classes).astype(np.float64)
