"""Models of the zoo by name, for `zoo:<name>`: trained once, then kept as a folder that transformers loads."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.base.artifacts import home, write_safetensors
from assay.base.errors import LoadError, UnknownModel, nearest

if TYPE_CHECKING:
    from assay.zoo.organisms import Codeword

NAMES = ("codeword",)
"""The models that can be asked for."""

RECIPE = "1"
"""Part of the folder's name: raised whenever training gives another model, so that an older one is not taken for it."""

_REPORTS = 8


def folder_of(name: str, say: Callable[[str], None] | None = None) -> Path:
    """The folder of a zoo model; it is trained and kept when it is first asked for.

    Args:
        name: One of `NAMES`.
        say: Told how training goes, as lines of text.

    Returns:
        A folder with a configuration, weights and a tokenizer, in the cache (`ASSAY_HOME`).

    Raises:
        UnknownModel: There is no such model.
        LoadError: It cannot be kept.
        NumericalError: Training did not reach what is promised.

    Example:
        >>> folder_of("codewords")
        Traceback (most recent call last):
        ...
        assay.base.errors.UnknownModel: the zoo has no 'codewords'; valid: zoo:codeword; did you mean 'codeword'?
    """
    if name not in NAMES:
        valid = ", ".join(f"zoo:{known}" for known in NAMES)
        raise UnknownModel(f"the zoo has no {name!r}; valid: {valid}{nearest(name, NAMES)}")
    folder = home() / "models" / f"zoo-{name}-{RECIPE}"
    if not (folder / "config.json").is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".train-") as temporary:
                _keep(_train(name, Path(temporary) / "model", say or (lambda text: None)), folder)
        except OSError as error:
            raise LoadError(f"zoo:{name} could not be kept in {folder.parent}: {error}") from None
    return folder


def _train(name: str, stage: Path, say: Callable[[str], None]) -> Path:
    from assay.zoo.organisms import codeword

    say(f"training zoo:{name} (once; under a minute of CPU)")

    def told(done: int, total: int) -> None:
        if done * _REPORTS // total > (done - 1) * _REPORTS // total:
            say(f"training zoo:{name}, step {done} of {total}")

    write(codeword(progress=told), stage)
    return stage


def write(made: Codeword, folder: Path) -> None:
    """Write a model of the zoo as a folder that transformers loads.

    Args:
        made: The model.
        folder: Where; it is made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().numpy() for key, value in made.module.state_dict().items()}
    config: Any = made.module.config
    config.save_pretrained(folder)
    write_safetensors(folder / "model.safetensors", weights, {"format": "pt"})  # the module's own prints a bar
    made.tokenizer.save_pretrained(folder)


def _keep(stage: Path, folder: Path) -> None:
    """Put the finished folder in its place, unless another process was first."""
    if folder.is_dir() and not (folder / "config.json").is_file():  # something else than a model is in the way
        shutil.rmtree(folder)
    try:
        stage.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise
