"""The registered `explain` method. Importing this module imports no torch."""

from __future__ import annotations

from typing import Any

from assay.base.findings import Findings
from assay.base.method import Context, method
from assay.explain.spec import ExplainSpec


@method(name="explain", spec=ExplainSpec, version="1", steps="assay.explain.steps:planned")
def explain(subject: Any, spec: ExplainSpec, ctx: Context) -> Findings:
    """Find which tokens, layers, heads and MLPs make the model prefer an answer over a foil, and whether to believe it.

    **What it computes.** The logit difference between answer and foil, clean and corrupt; the logit lens and direct
    logit attribution; exact activation patching of the residual stream, attention and MLP outputs by layer and
    position, and of every head, clean into corrupt (denoising) and corrupt into clean (noising); attribution patching
    beside it; and how much of the behaviour the top components keep alone, and how much is lost without them.

    **Controls.** The same measurements on the same architecture with Gaussian and with spectrum-matched weights; the
    top components against random sets with as many heads and MLPs; a permutation null for the agreement of fast and
    exact attribution; and, with `vary`, other prompts with a sign-flip null.

    **When it misleads.** One prompt is one prompt: without `vary` nothing is known about others. The corruption
    decides what can be found: what both prompts share is invisible. Backup components hide what is redundant from
    noising. The lens and direct attribution see only the direct path to the logits.

    **Source.** Wang et al. 2023 (arXiv 2211.00593) for the task; Meng et al. 2022 (arXiv 2202.05262, section 2.1) for
    causal tracing; Heimersheim and Nanda 2024 (arXiv 2404.15255) for patching; Kramar et al. 2024 (arXiv 2403.00745)
    for attribution patching.
    """
    from assay.explain.job import run

    return run(subject, spec, ctx)
