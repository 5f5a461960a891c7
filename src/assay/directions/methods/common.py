"""What the methods of this package share besides their files: expected times, positions, and the Python of a chart.

Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

RATE = 8e10
"""Parameters times tokens that a forward does in a second on two cores, for the seconds of a plan."""

Position = Literal["last", "first", "mean"]

POSITIONS: dict[Position, Any] = {"last": "last", "first": 0, "mean": None}
"""What `read_sites` calls the token of a text that a spec names."""


def mean_tokens(card: Any, texts: Sequence[str]) -> int:
    """The mean length of texts in tokens, at least 1, from the first fifty of them.

    Args:
        card: The model's card.
        texts: The texts.
    """
    some = texts[:50]
    return max(1, sum(len(card.encode(text)) for text in some) // max(1, len(some)))


def snippet(subject: Any, method: str, spec: BaseModel, seed: int) -> str:
    """The Python that runs a study again, complete in itself.

    Files are named as they were given, so it runs where the study ran. A module that was handed over has no name: the
    snippet then begins from `module` and `tokenizer`, and says so.

    Args:
        subject: The subject.
        method: The method's name.
        spec: The spec.
        seed: The study's seed.
    """
    given = f"spec={spec.model_dump(mode='json')!r}, seed={seed}"
    if subject.reference:
        begin = "from assay.studies import Study\n\n"
        study = f"study = Study(method={method!r}, model={subject.reference!r}, {given})\nfindings = study.run()\n"
    else:
        begin = (
            "import assay\nfrom assay.studies import Study\n\n"
            "subject = assay.load(module, tokenizer)  # the module that was studied\n"
        )
        study = f"study = Study(method={method!r}, {given})\nfindings = study.run(subject=subject)\n"
    return begin + study + 'print(*findings.summary, sep="\\n")\n'
