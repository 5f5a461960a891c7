"""The Python that runs a study again, complete in itself, for whoever copies it from a chart."""

from __future__ import annotations

from pydantic import BaseModel


def snippet(reference: str, method: str, spec: BaseModel, seed: int) -> str:
    """Return the Python of a study.

    Files are named as they were given, so it runs where the study ran. A module that was handed over has no reference:
    the snippet then begins from `module` and `tokenizer`, and says so.

    Args:
        reference: What the model was loaded from, or an empty string.
        method: The method's name.
        spec: The spec.
        seed: The study's seed.
    """
    given = f"spec={spec.model_dump(mode='json')!r}, seed={seed}"
    if reference:
        begin = "from assay.studies import Study\n\n"
        study = f"study = Study(method={method!r}, model={reference!r}, {given})\nfindings = study.run()\n"
    else:
        begin = (
            "import assay\nfrom assay.studies import Study\n\n"
            "subject = assay.load(module, tokenizer)  # the module that was studied\n"
        )
        study = f"study = Study(method={method!r}, {given})\nfindings = study.run(subject=subject)\n"
    return begin + study + 'print(*findings.summary, sep="\\n")\n'
