"""Files of dictionaries: assay's own and everyone else's, read by what is in them and written by name.

A format is one module with a `FORMAT`; `load` asks each whether a path is its own. What a file says by convention
(whether the decoder bias is subtracted, what a threshold means, which way a matrix lies, what a site is called) becomes
an explicit field of the `Card` or a weight; a name or a shape that the format does not have is refused.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.base.artifacts import user_path
from assay.base.errors import DamagedFile, SpecError, UnknownModel, nearest

if TYPE_CHECKING:
    from assay.dictionaries.crosslayer import CrossLayer
    from assay.dictionaries.dictionary import Dictionary
    from assay.dictionaries.formats.format import Format

_MODULES = {
    "assay": "own",
    "saelens": "saelens",
    "sparsify": "sparsify",
    "gemma-scope": "gemma_scope",
    "gemma-scope-2": "gemma_scope_2",
    "llama-scope": "llama_scope",
    "circuit-tracer": "circuit_tracer",
    "dictionary-learning": "dictionary_learning",
    "openai": "openai",
    "goodfire": "goodfire",
    "qwen-scope": "qwen_scope",
}
"""Formats by name, and the modules that hold them; `load` asks them in this order."""

_LAYERED = ("crosslayer.json", "W_enc_0.safetensors", "params_layer_0.safetensors")
"""What a folder of a cross-layer transcoder has, in the formats that have one."""


def names() -> tuple[str, ...]:
    """The formats, by name."""
    return tuple(_MODULES)


def get(name: str) -> Format:
    """The format of that name.

    Raises:
        SpecError: There is none.
    """
    if name not in _MODULES:
        raise SpecError(f"no format {name!r}{nearest(name, _MODULES)} (formats: {', '.join(_MODULES)})", "format")
    found: Format = importlib.import_module(f"assay.dictionaries.formats.{_MODULES[name]}").FORMAT
    return found


def load(path: str | Path, format: str | None = None, **options: Any) -> Dictionary | CrossLayer:
    """Read a dictionary of any known format.

    Args:
        path: A folder or a file.
        format: Its format, where what is in it does not say.
        options: What the format takes, such as `site=` where its files do not name one.

    Raises:
        UnknownModel: Nothing is there.
        SpecError: No format knows it, or it has a name or a shape that its format does not have.
        DamagedFile: A file is truncated, or tries to run code.

    Example:
        >>> import tempfile, torch
        >>> from assay.dictionaries import Card, Dictionary, Site, load
        >>> d = Dictionary(
        ...     W_enc=torch.eye(2),
        ...     b_enc=torch.zeros(2),
        ...     W_dec=torch.eye(2),
        ...     b_dec=torch.zeros(2),
        ...     card=Card(reads=(Site("blocks.0.resid_post", 2),)),
        ... )
        >>> load(d.save(tempfile.mkdtemp() + "/mine"))
        Dictionary(sae relu, 2 latents, blocks.0.resid_post)
    """
    where = user_path(path)
    if not where.exists():
        raise UnknownModel(f"there is no file or folder {str(path)!r} to read a dictionary from")
    for name in [format] if format is not None else _MODULES:
        if format is not None or get(name).recognises(where):
            found = get(name)
            _check_options(found.read, name, options)
            try:
                read: Dictionary | CrossLayer = found.read(where, **options)
            except (KeyError, TypeError, ValueError, AttributeError) as error:  # a value of another kind, far inside
                raise DamagedFile(
                    f"{str(path)!r} cannot be read as {name!r}: {type(error).__name__} {error}"
                ) from error
            return read
    if where.is_file() and where.suffix in {".pt", ".pth", ".bin"}:
        from assay.dictionaries.formats.format import read_pickle

        read_pickle(where)  # one that would run code, or is cut short, is refused as that
    if (where / "dictionary").is_dir():
        raise SpecError(
            f"{str(path)!r} is the folder of a training run; its dictionary is {str(where / 'dictionary')!r}", "path"
        )
    inside = ", ".join(sorted(p.name for p in where.iterdir())[:8]) if where.is_dir() else "a file"
    raise SpecError(
        f"{str(path)!r} is in no format known here (it holds: {inside or 'nothing'}); formats: {', '.join(_MODULES)}. "
        "Give the folder that holds the weights and their configuration, or format=..."
    )


def save(dictionary: Dictionary | CrossLayer, path: str | Path, format: str = "assay", **options: Any) -> Path:
    """Write a dictionary, whole or not at all; see `Dictionary.save`."""
    found = get(format)
    if found.write is None:
        writable = ", ".join(name for name in _MODULES if get(name).write is not None)
        raise SpecError(f"{format} is read here and not written: {found.about}. Written: {writable}", "format")
    _check_options(found.write, format, options)
    where = user_path(path)
    _check_card(dictionary)
    _check_place(where, format, dictionary)
    return found.write(dictionary, where, **options)


def _check_card(dictionary: Dictionary | CrossLayer) -> None:
    """Refuse a card with what JSON cannot say, before anything is written."""
    parts: tuple[Any, ...] = getattr(dictionary, "layers", (dictionary,))
    for part in parts:
        try:
            json.dumps([dict(part.card.training), dict(part.card.source)], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise SpecError(f"the card's training or source holds what JSON cannot say: {error}", "card") from error


def _check_place(path: Path, name: str, dictionary: Dictionary | CrossLayer) -> None:
    """Refuse a place whose files would stay beside the new ones and be read instead of them, or as part of them."""
    held = next((other for other in _MODULES if get(other).recognises(path)), None) if path.exists() else None
    layered = any((path / file).exists() for file in _LAYERED)
    if held is not None and (held != name or layered or hasattr(dictionary, "layers")):
        what = f"a cross-layer transcoder ({held})" if layered else f"a dictionary of format {held!r}"
        raise SpecError(f"{str(path)!r} holds {what}, which would stay beside this one; choose another path", "path")


def _check_options(function: Callable[..., Any], name: str, options: Mapping[str, Any]) -> None:
    taken = [option for option in inspect.signature(function).parameters if option not in {"path", "dictionary"}]
    for option in options:
        if option not in taken:
            said = f"takes {', '.join(taken)}" if taken else "takes no options"
            raise SpecError(f"format {name!r} has no option {option!r}{nearest(option, taken)}; it {said}", option)
