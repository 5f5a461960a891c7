"""Hold a family's declaration to its identities on a small random model of it, and keep the record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from assay.activations.subject import load
from assay.base.errors import AssayError, UnknownModel, nearest
from assay.subjects.families import FAMILIES
from assay.subjects.tiny import tiny_model

INFERRED = "inferred"
VERIFIED = "verified"
RECORD = "verified.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was checked of one model type.

    Args:
        model_type: The value of `config.model_type`.
        family: The declaration that serves it.
        status: `verified` if every identity of its declaration held, `inferred` if that was so of a map found in the
            module's names, or `failed`.
        sites: How many standard sites the small model has.
        identities: How many identities were checked.
        error: The largest difference, relative to the largest value.
        padding: The sides on which prompts can be padded.
        stacks: The first parts of its site names, where there are several.
        notes: What is particular: experts, state space, parallel blocks, how patterns are reached.
        why: Why it failed.
    """

    model_type: str
    family: str
    status: str
    sites: int = 0
    identities: int = 0
    error: float = 0.0
    padding: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    why: str = ""


def model_types() -> list[str]:
    """Every model type with a declaration, in the order of the declarations."""
    return [model_type for family in FAMILIES for model_type in family.model_types]


def verify(model_type: str, seed: int = 0) -> Verified:
    """Build a small random model of a type and hold its map to every identity.

    Args:
        model_type: A type that has a declaration.
        seed: The seed of the model's weights.

    Returns:
        What held; `status` is `failed` with the reason where something did not.

    Raises:
        UnknownModel: If no declaration serves the type.

    Example:
        >>> verify("gpt2").status
        'verified'
    """
    if model_type not in model_types():
        raise UnknownModel(f"no map serves model type {model_type!r}{nearest(model_type, model_types())}")
    family = next(family for family in FAMILIES if model_type in family.model_types)
    try:
        subject = load(tiny_model(model_type, seed))
    except AssayError as error:
        return Verified(model_type=model_type, family=family.family, status="failed", why=str(error))
    if subject.architecture is None:
        return Verified(model_type=model_type, family=family.family, status="failed", why=subject.refused)
    return Verified(
        model_type=model_type,
        family=family.family,
        status=INFERRED if subject.architecture.inferred else VERIFIED,
        sites=len(subject.sites()),
        identities=len(subject.checks),
        error=max(check.error for check in subject.checks),
        padding=subject.sides,
        stacks=tuple(name for name in subject.stacks if name),
        notes=tuple(_notes(subject)),
    )


def _notes(subject: Any) -> Iterator[str]:
    sites = subject.sites()
    main = subject.parts
    if any(name.endswith("mlp.router") for name in sites):
        yield "experts"
    if any(name.endswith("ssm.out") for name in sites):
        yield "state space"
    if any(name.endswith("cross_attn.out") for name in sites):
        yield "cross-attention"
    if main.parallel:
        yield "parallel blocks"
    if main.post_norm:
        yield "norms after the sum"
    if main.n_kv_heads != main.n_heads:
        yield "grouped queries"
    if main.softcap is not None or main.logit_scale != 1.0:
        yield "scaled or capped logits"
    if main.stack.attn is not None and main.stack.attn.inside == "function":
        yield "attention of its own"


def record() -> dict[str, Any]:
    """The record that ships with assay: the versions it was made with, and a row for each model type."""
    found: dict[str, Any] = json.loads(resources.files("assay.subjects").joinpath(RECORD).read_text("utf-8"))
    return found


def make_record(rows: list[Verified]) -> dict[str, Any]:
    """A record of these rows, made now."""
    import torch
    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    return {"versions": versions, "types": [{**asdict(row), "error": float(f"{row.error:.1g}")} for row in rows]}
