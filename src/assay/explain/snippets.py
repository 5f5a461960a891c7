"""Python that recomputes each chart: what "copy as Python" copies."""

from __future__ import annotations

from assay.explain.inputs import Question
from assay.explain.results import Results
from assay.explain.spec import ExplainSpec
from assay.explain.steps import KINDS, curve_sizes

_SPREAD = "spread = change.std() * 2**0.5  # of the change over random pairs of tokens\n"


class Snippets:
    """Code for one study's charts, each complete in itself: it prints the numbers that the chart shows.

    Args:
        results: What was measured.
        spec: The spec.
        model: How the user referred to the model; empty for a module that was handed over.
        seed: The study's seed.
    """

    def __init__(self, results: Results, spec: ExplainSpec, model: str, seed: int) -> None:
        self._results, self._spec, self._seed = results, spec, seed
        loaded = f"assay.load({model!r})" if model else "assay.load(module, tokenizer)  # the module that was studied"
        self._pair = f"{results.answer}, {results.foil}"
        self._begin = f"import assay\nfrom assay import circuits, controls, directions\n\nsubject = {loaded}\n"
        self._make = "task = " + self._task(results.inputs.question, results.answer, results.foil)
        self._head = f"{self._begin}{self._make}  # {results.words[0]!r} against {results.words[1]!r}\n"
        self._top = f"top = [part for part in parts if part.name in {[part.name for part in results.top]}]\n"

    def _task(self, question: Question, answer: int, foil: int, subject: str = "subject") -> str:
        if question.corrupt is None:
            return (
                f"circuits.Task.from_noise({subject}, {list(question.clean)}, {list(question.noised)}, {answer}, "
                f"{foil}, sigmas={self._spec.sigmas}, draws={self._spec.draws}, seed={self._seed})"
            )
        return f"circuits.Task.from_tokens({list(question.clean)}, {list(question.corrupt)}, {answer}, {foil})"

    def task(self) -> str:
        """The two runs and the metric."""
        return self._head

    def baseline(self, side: str) -> str:
        """The next-token distribution."""
        return self._head + (
            f'probabilities = task.run(subject, "{side}").logits[:, -1].softmax(-1).mean(0)\n'
            "print(probabilities.topk(10))\n"
        )

    def lens(self) -> str:
        """The logit lens, clean and corrupt."""
        return self._head + (
            'for side in ("clean", "corrupt"):\n'
            "    batch, edits = task.base(side)\n"
            f"    lens = directions.logit_lens(subject, batch, {self._pair}, edits)\n"
            "    print(side, lens.difference[1:, -1])  # after each block\n"
        )

    def lens_grid(self) -> str:
        """The logit lens at every position."""
        return self._head + (
            f"lens = directions.logit_lens(subject, task.clean, {self._pair})\nprint(lens.difference)\n"
        )

    def lens_tokens(self) -> str:
        """What the lens says at the last position."""
        return self._head + (
            f"lens = directions.logit_lens(subject, task.clean, {self._pair})\n"
            "print(subject.text(lens.top[:, None]), lens.probability, lens.rank)\n"
        )

    def direct(self) -> str:
        """Direct logit attribution."""
        return self._head + (
            f"parts = directions.decompose(subject, task.clean.ids[:1], {self._pair})\n"
            "print(dict(zip(parts.names, parts.parts.tolist())))\n"
        )

    def grid(self, point: str, direction: str) -> str:
        """Patching by layer and position."""
        return self._head + f'print(circuits.patch_grid(subject, task, "{point}", "{direction}").normalised)\n'

    def components(self, direction: str) -> str:
        """Patching of every head and MLP."""
        return self._head + (
            "parts = circuits.components(subject)\n"
            f'effects = circuits.patch_components(subject, task, parts, "{direction}").normalised\n'
            "print(sorted(zip(effects.tolist(), [p.name for p in parts]), key=lambda pair: -abs(pair[0])))\n"
        )

    def attribution(self, direction: str) -> str:
        """The fast estimate beside the exact effect."""
        return self._head + (
            "parts = circuits.components(subject)\n"
            f'exact = circuits.patch_components(subject, task, parts, "{direction}").effects\n'
            f'fast = circuits.attribute(subject, task, parts, "{direction}").components\n'
            "for part, e, f in zip(parts, exact.tolist(), fast.tolist()):\n    print(part.name, e, f)\n"
        )

    def curve(self) -> str:
        """How much the top components keep, and how much is lost without them."""
        return self._head + (
            "parts = circuits.components(subject)\n"
            'effects = circuits.patch_components(subject, task, parts, "noising").effects\n'
            "ranked = [parts[i] for i in effects.argsort(stable=True).tolist()]\n"
            f"sizes = {curve_sizes(len(self._results.parts))}\n"
            "found = circuits.ablate_sets(subject, task, parts, [ranked[:k] for k in sizes])\n"
            "print(sizes, found.kept, found.lost)\n"
        )

    def sets(self) -> str:
        """The top components against random sets."""
        n = len(self._results.random["kept"])
        return self._head + (
            f"parts = circuits.components(subject)\n{self._top}"
            f"random = controls.matched_sets(top, parts, strata=lambda part: part.kind, n={n}, seed={self._seed})\n"
            "found = circuits.ablate_sets(subject, task, parts, [top, *random])\n"
            "print(found.kept, found.lost)\n"
        )

    def untrained(self, kind: str) -> str:
        """The residual stream patched on untrained weights."""
        return (
            f'{self._begin}module = controls.reinitialised_module(subject.module, "{kind}", seed={self._seed})\n'
            f"untrained = assay.load(module, subject.tokenizer)\n{self._make_untrained()}"
            'print(circuits.patch_grid(untrained, task, "resid_pre", "denoising").effects)\n'
        )

    def draws(self) -> str:
        """The preference and the largest component effect on every draw of untrained weights."""
        inside = (
            f"untrained = assay.load(null.draw({self._seed}, number), subject.tokenizer)\n{self._make_untrained()}"
            'last = [task.run(untrained, side).logits[:, -1].mean(0) for side in ("clean", "corrupt")]\n'
            f"change = last[0] - last[1]\n{_SPREAD}"
            'effects = circuits.patch_components(untrained, task, parts, "noising").effects\n'
            f"preference = (change[{self._results.answer}] - change[{self._results.foil}]) / spread\n"
            "print(kind, number, preference, -effects.min() / spread)\n"
        )
        return (
            f"{self._begin}parts = circuits.components(subject)\nfor kind in {list(KINDS)}:\n"
            f"    null = controls.WeightNull(subject.module, kind)\n    for number in range({self._spec.untrained}):\n"
            + "".join(f"        {line}\n" for line in inside.splitlines())
        )

    def _make_untrained(self) -> str:
        results = self._results
        return f"task = {self._task(results.inputs.question, results.answer, results.foil, 'untrained')}\n"

    def variations(self) -> str:
        """The effect, and the top components, on other prompts."""
        made = [
            self._task(question, question.answer, question.foil)
            for question in self._results.inputs.variations
            if question.answer is not None and question.foil is not None
        ]
        return (
            f"{self._begin}parts = circuits.components(subject)\n{self._top}tasks = [\n"
            + "".join(f"    {task},\n" for task in made)
            + "]\nfor task in tasks:\n"
            '    clean, corrupt = (task.metric(task.run(subject, s).logits) for s in ("clean", "corrupt"))\n'
            "    found = circuits.ablate_sets(subject, task, parts, [top])\n"
            "    print((clean - corrupt).mean(), found.kept, found.lost)\n"
        )
