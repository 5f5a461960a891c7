"""The exception tree: every error assay raises on purpose is an `AssayError`.

    AssayError
    ├── LoadError                  a model or tokenizer could not be loaded
    │   ├── UnknownModel           the reference names nothing that exists
    │   ├── DamagedFile            a file is truncated, corrupt, or has the wrong hash
    │   ├── OfflineError           the network was needed and is absent or forbidden
    │   └── UnsupportedArchitecture  no architecture map fits, or its self-check failed
    ├── SiteError
    │   ├── UnknownSite            the name means nothing on this subject
    │   └── SiteNotFired           a capture or edit was asked for and its module never ran
    ├── InvalidEdit                an edit's value does not fit the site it names
    ├── NumericalError             NaN or infinite values where finite ones are required
    │   └── NothingFound           a fit found nothing: what it was given does not vary with what it looks for
    ├── SpecError                  a study's specification is wrong (names the field)
    │   └── TokenError             a text is not the single token it must be
    ├── FindingError               a finding without a control, or malformed
    ├── OutputError                results could not be written
    ├── MissingExtra               an optional package is not installed
    └── Cancelled                  the user stopped the run

A message quotes what was given and says what would be valid.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AssayError(Exception):
    """Base of every error that assay raises on purpose."""


class LoadError(AssayError):
    """A model or tokenizer could not be loaded."""


class UnknownModel(LoadError):
    """The reference names no file, folder, package or hub repository that can be read."""


class DamagedFile(LoadError):
    """A file is truncated, corrupt, or does not have the hash it should have."""


class OfflineError(LoadError):
    """The network was needed and is absent or forbidden."""


class UnsupportedArchitecture(LoadError):
    """No architecture map fits the module, or the map failed its self-check."""


class SiteError(AssayError):
    """Something is wrong with a site name or its use."""


class UnknownSite(SiteError):
    """The name means nothing on this subject; the message offers the nearest valid names."""


class SiteNotFired(SiteError):
    """A capture or an edit was requested and its module never ran."""


class InvalidEdit(AssayError):
    """An edit's value, positions, rows or heads do not fit the site it names."""


class NumericalError(AssayError):
    """NaN or infinite values where finite ones are required."""


class NothingFound(NumericalError):
    """A fit found nothing: what it was given does not vary with what it looks for."""


class SpecError(AssayError):
    """A study's specification is wrong.

    Args:
        message: What was given and what would be valid.
        field: The field of the spec at fault, if one is.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class TokenError(SpecError):
    """A text is not the single token it must be."""


class FindingError(AssayError):
    """A finding lacks a control and a stated waiver, or is malformed."""


class OutputError(AssayError):
    """Results could not be written."""


class MissingExtra(AssayError):
    """An optional package is not installed.

    Args:
        package: The package that could not be imported.
        extra: The extra of assay that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f'this needs the package {package!r}: pip install "assay[{extra}]"')
        self.package = package
        self.extra = extra


class Cancelled(AssayError):
    """The user stopped the run; what was finished is kept."""


def nearest(given: str, valid: Iterable[str], n: int = 3) -> str:
    """Return a phrase that offers the valid names nearest to the given one.

    Args:
        given: What the user wrote.
        valid: The names that would have been accepted.
        n: The largest number of names to offer.

    Returns:
        `"; did you mean 'a' or 'b'?"`, or an empty string when nothing is close.

    Example:
        >>> nearest("blocks.3.attn.zz", ["blocks.3.attn.z", "embed"])
        "; did you mean 'blocks.3.attn.z'?"
    """
    close = difflib.get_close_matches(given, list(valid), n=n, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
