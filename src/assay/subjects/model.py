"""A module with its anatomy: which parts it has, what its sites are called, and how text becomes tokens for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from assay.base.errors import SpecError, UnknownSite, UnsupportedArchitecture, nearest
from assay.base.sites import BLOCK_POINTS, Site, expand_sites, parse_site
from assay.subjects import tokens
from assay.subjects.architecture import ArchitectureMap
from assay.subjects.norms import Norm, read_norm
from assay.subjects.parts import Parts
from assay.subjects.points import RESIDUAL, Point


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
        self.name = name or type(module).__name__
        self._refused = ""
        self._source_fingerprint = fingerprint
        self._own_tokenizer = own_tokenizer
        self._marks = _marks(module) if fingerprint is not None else ()

    def refuse(self, why: str) -> None:
        """Give up the standard sites, because the map failed on this module; `module:` sites stay."""
        self.architecture, self._refused = None, why
        self.__dict__.pop("parts", None)

    def __repr__(self) -> str:
        """One line: class, name, family and size."""
        family = self.architecture.family if self.architecture is not None else "module: sites only"
        size = sum(p.numel() for p in self.module.parameters())
        return (
            f"<{type(self).__name__} {self.name}: {type(self.module).__name__}, {family}, {size / 1e6:.1f}M parameters>"
        )

    @property
    def config(self) -> Any:
        """The transformers configuration, or None."""
        return getattr(self.module, "config", None)

    @property
    def device(self) -> torch.device:
        """Where the first parameter lives."""
        parameter = next(self.module.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @cached_property
    def parts(self) -> Parts:
        """The modules behind the standard sites.

        Raises:
            UnsupportedArchitecture: If the model has no architecture map.
        """
        if self.architecture is None:
            why = self._refused or "no architecture map knows it; give its raw sites as 'module:path.out'"
            raise UnsupportedArchitecture(f"{type(self.module).__name__} has no standard sites: {why}")
        return Parts(self.module, self.architecture)

    def require_eval(self) -> None:
        """Refuse a module in training mode, where dropout makes every run different.

        Raises:
            SpecError: If the module has standard sites and is in training mode.
        """
        if self.architecture is not None and self.module.training:
            raise SpecError(
                f"{self.name} is in training mode, where dropout makes every run different: call .eval()", "model"
            )

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
        gated = self.architecture is not None and self.architecture.mlp_gate is not None
        site = parse_site(name, gated=gated)
        self._check(site, name)
        return site

    def expand(self, names: str | Sequence[str]) -> list[Site]:
        """Read names and patterns (`blocks.*.resid_post`), in order and without repeats."""
        gated = self.architecture is not None and self.architecture.mlp_gate is not None
        given = [names] if isinstance(names, str) else list(names) if isinstance(names, Sequence) else [names]
        for name in given:
            if not isinstance(name, str):
                raise UnknownSite(f"sites are named by text, such as 'blocks.5.attn.z', not {name!r}")
        if self.architecture is None and any(not name.startswith("module:") and name != "logits" for name in given):
            _ = self.parts  # raises with the reason
        return [self.site(name) for name in expand_sites(given, self.n_blocks, gated=gated)]

    def sites(self) -> list[str]:
        """Every standard site of this model, in forward order (`logits` alone without an architecture map)."""
        if self.architecture is None:
            return ["logits"]
        names = ["embed", *(["pos_embed"] if self.parts.has("pos_embed") else [])]
        for block in range(self.n_blocks):
            names += [f"blocks.{block}.{point}" for point in BLOCK_POINTS if self.parts.has(point)]
        return [*names, "final_norm", "final_norm.scale", "logits"]

    def point(self, site: Site) -> Point:
        """Where and how a site is read; heads are left to the caller."""
        if site.module is not None:
            module = self._submodule(site.point)
            return Point(module=module, path=site.point, side="in" if site.module == "in" else "out", dims=())
        if site.point == "logits":
            return Point(module=self.module, path="", side="out", dims=(*RESIDUAL[:2], "vocab"))
        return self.parts.point(site)

    def tokens(
        self, x: str | Sequence[str] | Tensor, *, mask: Tensor | None = None, side: str = "left"
    ) -> tokens.Batch:
        """Turn text, texts or token ids into a batch.

        Args:
            x: A text, a list of texts, or token ids `[batch, pos]`.
            mask: With token ids: 1 at real tokens.
            side: On which side texts of different length are padded.

        Returns:
            The batch, on the model's device.

        Raises:
            SpecError: If the input is empty, longer than the context, or text without a tokenizer.
        """
        if isinstance(x, Tensor):
            batch = tokens.from_ids(x.to(self.device), mask)
        elif mask is not None:
            raise SpecError("a mask goes with token ids; texts are masked by their own length", "mask")
        elif not isinstance(x, str | Sequence):
            raise SpecError(f"a prompt is a text, a list of texts or token ids, not {type(x).__name__}", "x")
        elif self.tokenizer is None:
            raise SpecError("this subject has no tokenizer: give token ids, or load it with tokenizer=")
        else:
            batch = tokens.from_texts(self.tokenizer, [x] if isinstance(x, str) else x, side=side)
            batch = tokens.Batch(ids=batch.ids.to(self.device), starts=batch.starts, lengths=batch.lengths)
        limit = getattr(self.config, "max_position_embeddings", None)
        if isinstance(limit, int) and max(batch.lengths) > limit:
            raise SpecError(f"the prompt has {max(batch.lengths)} tokens, and the model's context is {limit}")
        size = getattr(self.config, "vocab_size", None)
        if isinstance(size, int) and (int(batch.ids.max()) >= size or int(batch.ids.min()) < 0):
            raise SpecError(
                f"token ids must lie in 0..{size - 1}; these span {int(batch.ids.min())}..{int(batch.ids.max())}"
            )
        return batch

    def _check(self, site: Site, given: str) -> None:
        if site.module is not None:
            self._submodule(site.point)
            return
        if site.point == "logits":
            return
        parts = self.parts
        if site.block is not None and site.block >= len(parts.blocks):
            raise UnknownSite(f"no site {given!r}: this model has blocks 0 to {len(parts.blocks) - 1}")
        if not parts.has(site.point):
            valid = [
                s.replace("blocks.0.", f"blocks.{site.block}.") for s in self.sites() if ".0." in s or "." not in s
            ]
            raise UnknownSite(f"{type(self.module).__name__} has no site {given!r}{nearest(given, valid)}")
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
    flat = tensor.detach().reshape(-1)
    return float(flat[:: max(1, flat.numel() // 16)].double().sum()) if flat.numel() else 0.0


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over a module's class, configuration, and the names, shapes, types and bytes of its weights."""
    state = hashlib.sha256(type(module).__name__.encode())
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_json_string"):
        state.update(config.to_json_string(use_diff=False).encode())
    for name, tensor in {**dict(module.named_buffers()), **module.state_dict()}.items():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        state.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        state.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return state.hexdigest()
