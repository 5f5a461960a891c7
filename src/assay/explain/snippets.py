"""Python that recomputes each chart: what "copy as Python" copies."""

from __future__ import annotations

from assay.explain.results import Results
from assay.explain.spec import ExplainSpec


class Snippets:
    """Code for one study's charts, each complete in itself.

    Args:
        results: What was measured.
        spec: The spec.
        model: How the user referred to the model.
        seed: The study's seed.
    """

    def __init__(self, results: Results, spec: ExplainSpec, model: str, seed: int) -> None:
        question = results.inputs.question
        clean, answer, foil = list(question.clean), results.answer, results.foil
        if question.corrupt is None:
            make = (
                f"contrast = circuits.Contrast.of_noise(\n    subject, {clean}, {list(question.noised)}, "
                f"{answer}, {foil},\n"
                f"    sigmas={spec.sigmas}, draws={spec.draws}, seed={seed},\n)"
            )
        else:
            make = (
                f"contrast = circuits.Contrast.of_tokens(\n    clean={clean},\n    corrupt={list(question.corrupt)},\n"
                f"    answer={answer},  # {results.words[0]!r}\n    foil={foil},  # {results.words[1]!r}\n)"
            )
        self._head = (
            "import assay\nfrom assay import circuits, controls, directions\n\n"
            f"subject = assay.load({model!r})\n{make}\n"
        )
        self._top = [part.name for part in results.top]
        self._seed = seed

    def contrast(self) -> str:
        """The two runs and the metric."""
        return self._head

    def baseline(self, side: str) -> str:
        """The next-token distribution."""
        return (
            self._head
            + f'probabilities = contrast.run(subject, "{side}").logits[0, -1].softmax(-1)\n'
            + "print(probabilities.topk(10))\n"
        )

    def lens(self, index: str) -> str:
        """The logit lens."""
        return self._head + (
            "lens = directions.logit_lens(subject, contrast.clean, contrast.answer, contrast.foil)\n"
            f"print(lens.difference{index})\n"
        )

    def direct(self) -> str:
        """Direct logit attribution."""
        return self._head + (
            "parts = directions.decompose(subject, contrast.clean.ids[:1], contrast.answer, contrast.foil)\n"
            "print(dict(zip(parts.names, parts.parts.tolist())))\n"
        )

    def grid(self, point: str, direction: str) -> str:
        """Patching by layer and position."""
        return self._head + f'print(circuits.patch_grid(subject, contrast, "{point}", "{direction}").normalised)\n'

    def components(self, direction: str) -> str:
        """Patching of every head and MLP."""
        return self._head + (
            "parts = circuits.components(subject)\n"
            f'effects = circuits.patch_components(subject, contrast, parts, "{direction}").normalised\n'
            "print(sorted(zip(effects.tolist(), [p.name for p in parts]), key=lambda pair: -abs(pair[0]))[:10])\n"
        )

    def attribution(self, direction: str) -> str:
        """The fast estimate beside the exact effect."""
        return self._head + (
            "parts = circuits.components(subject)\n"
            f'exact = circuits.patch_components(subject, contrast, parts, "{direction}").effects\n'
            f'fast = circuits.attribute(subject, contrast, parts, "{direction}").components\n'
            "for part, e, f in zip(parts, exact.tolist(), fast.tolist()):\n    print(part.name, e, f)\n"
        )

    def sets(self) -> str:
        """The top components against random sets."""
        return self._head + (
            "parts = circuits.components(subject)\n"
            f"names = {self._top}\n"
            "top = [part for part in parts if part.name in names]\n"
            f"random = controls.matched_sets(top, parts, strata=lambda part: part.kind, n=100, seed={self._seed})\n"
            "found = circuits.ablate_sets(subject, contrast, parts, [top, *random])\n"
            "print(found.kept, found.lost)\n"
        )

    def untrained(self, kind: str = "gaussian") -> str:
        """The residual stream patched on untrained weights."""
        return self._head + (
            f'module = controls.reinitialised_module(subject.module, "{kind}", seed={self._seed})\n'
            "untrained = assay.load(module, subject.tokenizer)\n"
            "print(contrast.metric(contrast.run(untrained, 'clean').logits) - "
            "contrast.metric(contrast.run(untrained, 'corrupt').logits))\n"
            'print(circuits.patch_grid(untrained, contrast, "resid_pre", "denoising").effects)\n'
        )

    def variations(self) -> str:
        """The study on other prompts."""
        return self._head + "# assay explain ... --vary FILE: each line of FILE is a contrast of its own\n"
