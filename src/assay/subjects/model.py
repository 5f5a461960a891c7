"""A module with its anatomy: which parts it has, what its sites are called, and how text becomes tokens for it."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from assay.base.errors import AssayError, SiteError, SpecError, UnknownSite, UnsupportedArchitecture, nearest
from assay.base.sites import Site, expand_sites, parse_site, split_stack
from assay.subjects import inputs, tokens
from assay.subjects.architecture import ArchitectureMap
from assay.subjects.declared import HEAD_NAMES, Declared, no_such_site, read_declaration
from assay.subjects.norms import Norm, read_norm
from assay.subjects.parts import Parts
from assay.subjects.placement import place_of, true_weight
from assay.subjects.points import RESIDUAL, Point
from assay.subjects.tokens import Batch
from assay.subjects.upkeep import Tree


class Model:
    """A PyTorch module, its tokenizer and its architecture map. The module stays the user's: nothing in it is changed.

    Args:
        module: Any module; transformers causal language models have standard sites.
        tokenizer: A transformers tokenizer, needed for text.
        architecture: The map of its family, or None for `module:` sites alone.
        name: How the user referred to it.
        fingerprint: A hash of the files the weights came from; computed from the module when not given.
        own_tokenizer: The tokenizer did not come with those files, so the fingerprint has to cover it.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any = None,
        *,
        architecture: ArchitectureMap | None = None,
        name: str = "",
        fingerprint: str | None = None,
        own_tokenizer: bool = False,
    ) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.architecture = architecture
        self.declared: dict[str, Declared] = {}
        self.name = name or type(module).__name__
        self.sides: tuple[str, ...] = ("left", "right")
        self.overwritten: set[str] = set()
        self.own_positions = False
        self._refused = ""
        self._source_fingerprint = fingerprint
        self._own_tokenizer = own_tokenizer
        self._marks = _marks(module) if fingerprint is not None else ()
        self._tree: Tree | None = None

    @property
    def reference(self) -> str:
        """What `assay.load` takes to load it again; empty for a module that was handed over, which its owner has."""
        return "" if self.name == type(self.module).__name__ else self.name

    def adopt(self, architecture: ArchitectureMap) -> None:
        """Take an architecture map, before it has been proved."""
        self.architecture, self._refused = architecture, ""
        self.overwritten, self.own_positions, self.sides = set(), False, ("left", "right")
        self.__dict__.pop("stacks", None)

    def declare(self, sites: Mapping[str, str]) -> None:
        """Add sites of the user's own; see `assay.subjects.declared`.

        Args:
            sites: For each name, where it is and what its dimensions are: `"lstm.out[0] | batch pos d"`.

        Raises:
            SiteError: If a declaration is not understood.
            UnknownSite: If its module is not there.
        """
        if not isinstance(sites, Mapping):
            raise SiteError(f"sites= is a mapping such as {{'hidden': 'lstm.out[0] | batch pos d'}}, not {sites!r:.60}")
        for name, text in sites.items():
            if not isinstance(name, str) or not isinstance(text, str):
                raise SiteError(f"site {name!r:.60}: {text!r:.60} is not a place; 'lstm.out[0] | batch pos d' would be")
            declared = read_declaration(name, text)
            self._submodule(declared.path)
            self.declared[name] = declared

    def refuse(self, why: str) -> None:
        """Give up the standard sites, because the map failed on this module; `module:` sites stay."""
        self.architecture, self._refused = None, why
        self.__dict__.pop("stacks", None)

    def __repr__(self) -> str:
        """One line: class, name, family and size."""
        family = self.architecture.family if self.architecture is not None else "module: sites only"
        size = sum(p.numel() for p in self.module.parameters())
        return (
            f"<{type(self).__name__} {self.name}: {type(self.module).__name__}, {family}, {size / 1e6:.1f}M parameters>"
        )

    @property
    def refused(self) -> str:
        """Why it has no standard sites; "" when it has."""
        return self._refused

    @property
    def config(self) -> Any:
        """The transformers configuration, or None."""
        return getattr(self.module, "config", None)

    @property
    def device(self) -> torch.device:
        """Where the first parameter lives."""
        return place_of(self.module)[0]

    @cached_property
    def stacks(self) -> dict[str, Parts]:
        """The modules behind the standard sites, by stack: `{"": parts}`, or `encoder` and `decoder`.

        Raises:
            UnsupportedArchitecture: If the model has no architecture map.
        """
        if self.architecture is None:
            raise UnsupportedArchitecture(self._refusal)
        self._tree = Tree(self.module)
        return {name: Parts(self.module, self.architecture, name) for name in self.architecture.stacks}

    @property
    def _refusal(self) -> str:
        why = self._refused or "no architecture map knows it; give its raw sites as 'module:path.out'"
        return f"{type(self.module).__name__} has no standard sites: {why}"

    @property
    def parts(self) -> Parts:
        """The stack that leads to the logits: the only one, or the decoder."""
        return list(self.stacks.values())[-1]

    @property
    def compares_rows(self) -> bool:
        """Whether a row's output depends on the other rows: two towers score every image against every text."""
        return self.architecture is not None and "vision" in self.stacks and "text" in self.stacks

    def takes(self, name: str) -> bool:
        """Whether the module's forward has an argument of this name."""
        return name in self._arguments

    @cached_property
    def _arguments(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.module.forward).parameters)

    def require_eval(self) -> None:
        """Before a run: see the module as it is now, and refuse it in training mode, where every run is different.

        Where a module inside was replaced since the sites were found (by LoRA's layers, say), they are found again.

        Raises:
            SpecError: If the module has standard sites and is in training mode, or a part of it with dropout or a batch
                norm is.
            UnsupportedArchitecture: If modules were replaced, and the map does not fit any more.
        """
        if self._tree is None or self._tree.changed():
            self._find_again()
        assert self._tree is not None
        unsettled = self._tree.unsettled()
        if unsettled is not None or (self.architecture is not None and self.module.training):
            name = next((name for name, found in self.module.named_modules() if found is unsettled), "")
            what = self.name if self.module.training else f"{name!r} in {self.name}"
            why = f" ({name!r}, {type(unsettled).__name__})" if name and self.module.training else ""
            raise SpecError(
                f"{what} is in training mode, where dropout{why} makes every run different: call .eval()", "model"
            )

    def _find_again(self) -> None:
        """Find the parts of a module that is not made of the same modules any more."""
        found = self.__dict__.pop("stacks", None)
        self._tree = Tree(self.module)
        if found is None or self.architecture is None:
            return
        try:
            _ = self.stacks
        except Exception as error:  # of whatever kind: a path leads nowhere, or to what is no module of its kind
            self.__dict__["stacks"], self._tree = found, None  # and so it is refused again
            raise UnsupportedArchitecture(
                f"modules of {self.name} were replaced since it was loaded, and the map of {self.architecture.family} "
                f"does not fit them: {error}"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        """What is kept of a subject when it is pickled or copied: all but what is found anew from the module."""
        state = {key: value for key, value in self.__dict__.items() if key not in ("stacks", "_tree", "_arguments")}
        state["_marks"] = self._source_fingerprint is not None and self._marks == _marks(self.module)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take it up again; the weights are those of the source if they were when it was put down."""
        self.__dict__.update(state, _tree=None)
        self._marks = _marks(self.module) if state["_marks"] else ()

    @property
    def n_blocks(self) -> int:
        """The number of blocks (0 without an architecture map)."""
        return len(self.parts.blocks) if self.architecture is not None else 0

    @property
    def fingerprint(self) -> str:
        """The source's own hash while the weights are as loaded; otherwise a hash of the weights and configuration."""
        loaded = self._source_fingerprint is not None and self._marks == _marks(self.module)
        found = str(self._source_fingerprint) if loaded else weights_hash(self.module)
        backend = getattr(self.tokenizer, "backend_tokenizer", None) if self._own_tokenizer else None
        return found if backend is None else hashlib.sha256(f"{found}{backend.to_str()}".encode()).hexdigest()

    def norm(self, site: str) -> Norm:
        """What the norm at `final_norm` or `blocks.i.norm1` computes."""
        return read_norm(self.point(self.site(site)).module, self.parts.d_model)

    def site(self, name: str) -> Site:
        """Read a site name for this model, in assay's or TransformerLens's spelling.

        Raises:
            UnknownSite: If this model has no such site; the message offers the nearest that it has.
        """
        own = self._own(name)
        if own is not None:
            return own
        if not isinstance(name, str):
            raise UnknownSite(f"sites are named by text, such as 'blocks.5.attn.z', not {name!r:.60}")
        try:
            site = parse_site(name, gated=self._gated(name))
        except UnknownSite as error:
            raise self._unknown(name, error) from None
        self._check(site, name)
        return site

    def _unknown(self, name: str, error: AssayError) -> AssayError:
        """The error for a name that no model has, with names that this one does."""
        if self.architecture is None or "did you mean" not in str(error):
            return no_such_site(name, self.declared, error)
        number = re.match(r"(?:\w+\.)?blocks\.(\d+)\.", name)
        parts = self.stacks.get(split_stack(name)[0], self.parts)
        block = min(int(number[1]), len(parts.blocks) - 1) if number else 0
        return UnknownSite(f"no site {name!r}{nearest(name, [*self.declared, *self._names(parts, block)])}")

    @staticmethod
    def _names(parts: Parts, block: int) -> list[str]:
        """The sites of one block of a stack, and those outside the blocks."""
        prefix = f"{parts.name}." if parts.name else ""
        names = [f"{prefix}blocks.{block}.{point}" for point in parts.points(block)]
        return [*names, *(prefix + point for point in parts.points(None)), "logits"]

    def _own(self, name: str) -> Site | None:
        """A declared site, or one head of it."""
        if name in self.declared:
            return Site(name)
        stem, _, last = name.rpartition(".")
        if stem not in self.declared or not (last.isascii() and last.isdigit()):
            return None
        if not set(HEAD_NAMES) & set(self.declared[stem].dims):
            raise UnknownSite(f"no site {name!r}: {stem!r} was declared without a head or channel")
        return Site(stem, head=int(last))

    def _gated(self, name: str) -> bool:
        """Whether the MLPs of the stack that a name belongs to are gated."""
        if self.architecture is None or not name.endswith("hook_pre"):
            return False
        parts = self.stacks.get(split_stack(name)[0])
        return parts is not None and any(parts.has("mlp.gate", block) for block in range(len(parts.blocks)))

    def expand(self, names: str | Sequence[str]) -> list[Site]:
        """Read names and patterns (`blocks.*.resid_post`), in order and without repeats."""
        given = [names] if isinstance(names, str) else list(names) if isinstance(names, Sequence) else [names]
        for name in given:
            if not isinstance(name, str):
                raise UnknownSite(f"sites are named by text, such as 'blocks.5.attn.z', not {name!r}")
        for name in given if self.architecture is None else []:
            if not (name.startswith("module:") or name == "logits" or self._own(name)):
                raise no_such_site(name, self.declared, UnsupportedArchitecture(self._refusal))
        counts = {} if self.architecture is None else {name: len(parts.blocks) for name, parts in self.stacks.items()}
        sites: dict[str, Site] = {}
        for name in given:
            if (own := self._own(name)) is not None:
                sites[str(own)] = own
                continue
            stack, stem = split_stack(name)
            if stem.startswith("blocks."):
                self._check_stack(stack, stem, name)
            try:
                found_names = expand_sites(name, counts, gated=self._gated(name))
            except UnknownSite as error:
                raise (error if "*" in name or self.architecture is None else self._unknown(name, error)) from None
            for found in found_names:
                site = parse_site(found)
                if "*" in name and self._lacks(site):
                    continue
                self._check(site, found)
                sites[str(site)] = site
            if "*" in name and not any(str(parse_site(found)) in sites for found in found_names):
                raise UnknownSite(f"no block of this model has the site {name!r}{nearest(name, self.sites())}")
        return list(sites.values())

    def _lacks(self, site: Site) -> bool:
        """Whether a block that exists has no such point (the dense blocks of a mixture of experts have no router)."""
        parts = self.stacks.get(site.stack)
        return parts is not None and site.block is not None and not parts.has(site.point, site.block)

    def sites(self) -> list[str]:
        """Every site that has a name here: those declared, and the standard ones in forward order."""
        if self.architecture is None:
            return [*self.declared, "logits"]
        names: list[str] = list(self.declared)
        for stack, parts in self.stacks.items():
            outside = [point for point in parts.points(None) if not point.startswith("final_norm")]
            inside = [f"blocks.{block}.{point}" for block in range(len(parts.blocks)) for point in parts.points(block)]
            last = [point for point in parts.points(None) if point.startswith("final_norm")]
            names += [f"{stack}.{name}" if stack else name for name in (*outside, *inside, *last)]
        return [*names, "logits"]

    def point(self, site: Site) -> Point:
        """Where and how a site is read; heads are left to the caller."""
        if site.module is not None:
            module = self._submodule(site.point)
            return Point(module=module, path=site.point, side="in" if site.module == "in" else "out", dims=())
        if site.point in self.declared:
            declared = self.declared[site.point]
            return declared.point(self._submodule(declared.path))
        if site.point == "logits":
            dims = (*RESIDUAL[:2], "vocab") if self.architecture is not None else ()
            return Point(module=self.module, path="", side="out", dims=dims)
        return self.stacks[site.stack].point(site)

    def tokens(
        self,
        x: str | Sequence[str] | Tensor | Mapping[str, Any] | tuple[Any, ...],
        *,
        mask: Tensor | None = None,
        side: str | None = None,
    ) -> Batch:
        """Turn text, texts, token ids, or the module's own inputs into a batch.

        Args:
            x: A text, a list of texts, token ids `[batch, pos]`, pixels or audio features, a mapping of the module's
                keyword arguments, or a tuple of its positional ones. What an encoder-decoder is given as text or ids is
                its encoder's; its decoder starts with its start token.
            mask: With token ids: 1 at real tokens.
            side: On which side texts of different length are padded; the left where the model keeps to itself there.

        Returns:
            The batch, on the model's device.

        Raises:
            SpecError: If the input is empty, longer than the context, or text without a tokenizer.
        """
        if isinstance(x, Mapping) and self.architecture is not None:
            plain = set(x) <= {"input_ids", "attention_mask"} and "input_ids" in x and len(self.stacks) == 1
            if plain:  # what a tokenizer gives
                return self.tokens(x["input_ids"], mask=x.get("attention_mask"))
            batch = inputs.batch_from(self, x)
        elif inputs.is_own(x) and (self.architecture is None or isinstance(x, tuple)):
            batch = inputs.own_batch(x, self.device)
        elif isinstance(x, Tensor) and self.architecture is not None and self._not_tokens(x):
            batch = inputs.batch_from(self, {inputs.main_input(self, x): x})
        elif isinstance(x, Tensor):
            batch = replace(tokens.from_ids(x.to(self.device), mask), tokenizer=self.tokenizer)
        elif mask is not None:
            raise SpecError("a mask goes with token ids; texts are masked by their own length", "mask")
        elif not isinstance(x, str | Sequence):
            raise SpecError(f"a prompt is a text, a list of texts or token ids, not {type(x).__name__}", "x")
        elif self.architecture is not None and self.architecture.inputs != "tokens":
            kind = self.architecture.inputs
            raise SpecError(f"{self.name} reads {kind} and not text alone: give its inputs by name", "x")
        elif not isinstance(x, str) and not all(isinstance(text, str) for text in x):
            raise SpecError(
                f"prompts are texts, and token ids come as a tensor [batch, pos], torch.tensor(...), not as {x!r:.60}",
                "x",
            )
        elif not len(x):
            raise SpecError("no prompt was given" if not isinstance(x, str) else "the prompt '' has no tokens", "x")
        elif self.tokenizer is None:
            raise SpecError("this subject has no tokenizer: give token ids, or load it with tokenizer=")
        else:
            chosen = side or next(iter(self.sides), "right")
            batch = tokens.from_texts(self.tokenizer, [x] if isinstance(x, str) else x, side=chosen)
            batch = replace(batch, ids=batch.ids.to(self.device))
        if batch.inputs is None and self.architecture is not None and "decoder" in self.stacks:
            given = {"input_ids": batch.ids, **({"attention_mask": batch.mask} if batch.padded else {})}
            texts, batch = batch.texts, inputs.batch_from(self, given)
            encoder = replace(batch.stacks["encoder"], texts=texts, tokenizer=self.tokenizer)
            batch = replace(batch, stacks={**batch.stacks, "encoder": encoder}, tokenizer=self.tokenizer)
        for part in (batch, *batch.stacks.values()):
            self._check_batch(part)
        if batch.stacks:  # a row is made of the same in each of them
            stacks = {name: replace(part, inputs=batch.inputs) for name, part in batch.stacks.items()}
            batch = replace(batch, stacks=stacks)
        return batch

    def _not_tokens(self, x: Tensor) -> bool:
        """Whether a tensor goes to the module by name: floats, or anything that a model of images or audio is given."""
        return x.is_floating_point() or (self.architecture is not None and self.architecture.inputs != "tokens")

    def _check_batch(self, batch: Batch) -> None:
        """Refuse what the model cannot run: too long, outside its vocabulary, padded on a side it does not bear."""
        limit = getattr(self.config, "max_position_embeddings", None)
        if isinstance(limit, int) and self.own_positions:  # RoBERTa's begin after those of padding
            limit -= 1 + (getattr(self.config, "pad_token_id", None) or 0)
        if isinstance(limit, int) and max(batch.lengths) > limit:
            raise SpecError(f"the prompt has {max(batch.lengths)} tokens, and the model's context is {limit}")
        size = getattr(self.config, "vocab_size", None)
        if isinstance(size, int) and (int(batch.ids.max()) >= size or int(batch.ids.min()) < 0):
            raise SpecError(
                f"token ids must lie in 0..{size - 1}; these span {int(batch.ids.min())}..{int(batch.ids.max())}"
            )
        if batch.padded and self.architecture is not None:
            shifted = any(start for start in batch.starts)
            side = "left" if shifted else "right"
            if side not in self.sides:
                raise SpecError(
                    f"{self.name} gives a prompt other logits when it is padded on the {side}: "
                    + (f"pad on the {self.sides[0]}" if self.sides else "run prompts of one length"),
                    "padding",
                )

    def _check_stack(self, stack: str, stem: str, given: str) -> None:
        """Refuse a name that does not say which stack it means, or names one that is not there."""
        if self.architecture is not None and stack not in self.stacks:
            said = " or ".join(repr(f"{name}.{stem}" if name else stem) for name in self.stacks)
            raise UnknownSite(f"{type(self.module).__name__} has no site {given!r}; say {said}")

    def _check(self, site: Site, given: str) -> None:
        if site.module is not None:
            self._submodule(site.point)
            return
        if site.point == "logits":
            return
        self._check_stack(site.stack, str(replace(site, stack="")), given)
        parts = self.stacks[site.stack]
        if site.block is not None and site.block >= len(parts.blocks):
            raise UnknownSite(f"no site {given!r}: this model has blocks 0 to {len(parts.blocks) - 1}")
        if site.point not in parts.points(site.block):
            valid = nearest(given, self._names(parts, site.block or 0))
            raise UnknownSite(f"{type(self.module).__name__} has no site {given!r}{valid}")
        heads = parts.heads(site.point)
        if site.head is not None and site.head >= heads:
            raise UnknownSite(f"no site {given!r}: {site.whole} has heads 0 to {heads - 1}")

    def _submodule(self, path: str) -> nn.Module:
        try:
            return self.module.get_submodule(path)
        except AttributeError:
            valid = [name for name, _ in self.module.named_modules()]
            raise UnknownSite(f"no module {path!r} in {type(self.module).__name__}{nearest(path, valid)}") from None


def _marks(module: nn.Module) -> tuple[Any, ...]:
    """What changes when weights, buffers or configuration do: versions, places, and a sample of the values."""
    config: Any = getattr(module, "config", None)
    text = config.to_json_string(use_diff=False) if hasattr(config, "to_json_string") else ""
    tensors = [*module.parameters(), *module.buffers()]
    return (text, *((t.data_ptr(), t._version, _sample(t)) for t in tensors))


def _sample(tensor: Tensor) -> float:
    flat = tensor.detach().reshape(-1) if tensor.device.type != "meta" else torch.empty(0)
    return float(flat[:: max(1, flat.numel() // 16)].double().sum()) if flat.numel() else 0.0


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over a module's class, configuration, and the names, shapes, types and bytes of its weights."""
    state = hashlib.sha256(type(module).__name__.encode())
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_json_string"):
        state.update(config.to_json_string(use_diff=False).encode())
    for name, tensor in {**dict(module.named_buffers()), **module.state_dict()}.items():
        if not isinstance(tensor, Tensor):
            state.update(f"{name}:{tensor!r};".encode())
            continue
        if tensor.device.type == "meta":
            owner, _, leaf = name.rpartition(".")
            tensor = true_weight(module.get_submodule(owner), leaf) if leaf else tensor
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        state.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        state.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return state.hexdigest()
