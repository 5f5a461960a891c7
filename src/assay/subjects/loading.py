"""Load a module and its tokenizer from a source; GGUF files are converted once and kept in the cache."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from assay.base.artifacts import home
from assay.base.errors import DamagedFile, LoadError, MissingExtra, UnsupportedArchitecture
from assay.subjects.sources import Notify, Source

_HARMLESS = re.compile(r"(^|\.)(inv_freq|position_ids|(attn|attention|self_attn)\.(masked_)?bias)$")
"""Buffers that older checkpoints carry and that a model makes for itself."""


def load_source(source: Source, notify: Notify | None = None) -> tuple[nn.Module, Any]:
    """Load a causal language model and its tokenizer, in evaluation mode.

    Args:
        source: A resolved source.
        notify: Called with a line of text when something slow begins.

    Returns:
        The module and its tokenizer (None when the folder has none).

    Raises:
        LoadError: If transformers cannot read the files.
    """
    say = notify or (lambda text: None)
    if source.kind == "gguf" and source.converted:
        say(f"loading {source.ref}")
        try:
            return _load_folder(source.folder, source.ref)
        except DamagedFile as error:
            say(f"the converted copy is damaged and is made again ({error})")
            shutil.rmtree(source.folder)
    if source.kind == "gguf":
        say(f"converting {source.path.name} (once; about 4 bytes a parameter go into the cache)")
        convert_gguf(source)
    say(f"loading {source.ref}")
    return _load_folder(source.folder, source.ref)


def _load_folder(folder: Path, ref: str) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM

    with _quiet():
        try:
            module, found = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except Exception as error:
            if isinstance(error, ValueError | KeyError) and not _is_language_model(folder):
                raise UnsupportedArchitecture(
                    f"transformers does not load {ref!r} as a language model: {error}"
                ) from None
            raise DamagedFile(f"the weights of {ref!r} could not be read: {type(error).__name__}: {error}") from None
        _check_complete(found, ref)
        return module.eval(), _tokenizer(folder, ref)


def _is_language_model(folder: Path) -> bool:
    """Whether transformers has a causal language model for the folder's configuration."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        return type(AutoConfig.from_pretrained(folder, local_files_only=True)) in MODEL_FOR_CAUSAL_LM_MAPPING
    except Exception:
        return False


def _check_complete(found: Mapping[str, Any], ref: str) -> None:
    """Refuse weights that transformers made up, and weights in the files that it has no place for."""
    absent = sorted(found["missing_keys"])
    other = sorted(str(key[0] if isinstance(key, tuple) else key) for key in found["mismatched_keys"])
    for names, what in ((absent, "are not in the files"), (other, "have another shape in the files")):
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise DamagedFile(f"{len(names)} of the weights of {ref!r} {what}, and would be random: {shown}")
    if extra := sorted(key for key in found["unexpected_keys"] if not _HARMLESS.search(key)):
        shown = ", ".join(extra[:3]) + (", ..." if len(extra) > 3 else "")
        raise DamagedFile(
            f"{len(extra)} of the weights in the files of {ref!r} have no place in the model that its configuration "
            f"describes, and would be left out: {shown}"
        )


def _tokenizer(folder: Path, ref: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare exceptions
        if (folder / "tokenizer.json").is_file():
            raise DamagedFile(f"the tokenizer of {ref!r} could not be read: {type(error).__name__}: {error}") from None
        return None


def convert_gguf(source: Source) -> Path:
    """Dequantise a GGUF file into a transformers folder in the cache.

    The weights are the quantised file's values as float32: they are not the original checkpoint's.

    Args:
        source: A GGUF source.

    Returns:
        The folder.

    Raises:
        MissingExtra: If `gguf` or `accelerate` is not installed.
        DamagedFile: If the file cannot be read.
    """
    for package in ("gguf", "accelerate"):
        try:
            __import__(package)
        except ImportError:
            raise MissingExtra(package, "gguf") from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(source.path.parent), "gguf_file": source.path.name}
    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(**where)
            loaded, found = AutoModelForCausalLM.from_pretrained(**where, output_loading_info=True)
        except Exception as error:
            raise DamagedFile(f"{source.path.name} could not be read: {type(error).__name__}: {error}") from None
        _check_complete(found, source.path.name)
        config = loaded.config
        for name in ("quantization_config", "_name_or_path"):
            with contextlib.suppress(AttributeError):
                delattr(config, name)
        module = type(loaded)(config)
        module.load_state_dict(loaded.state_dict())
        del loaded
        return _keep(source, module, tokenizer)


def _keep(source: Source, module: nn.Module, tokenizer: Any) -> Path:
    """Write the converted folder beside its place and move it there whole."""
    models = home() / "models"
    stage = None
    try:
        models.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=models, prefix=".convert-"))
        tokenizer.save_pretrained(stage)
        module.save_pretrained(stage)  # type: ignore[operator]
        try:
            stage.rename(source.folder)
        except OSError:
            if not source.converted:
                raise
    except OSError as error:
        raise LoadError(f"the converted model could not be kept in {models}: {error}") from None
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
    return source.folder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and notes off the user's terminal, and put its settings back."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
