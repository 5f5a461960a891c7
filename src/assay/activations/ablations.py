"""What an ablation puts in place of a value: the run's mean, noise of the site's own spread, another prompt's value.

What is random is drawn from named streams keyed by the seed, the site and the prompt's own tokens. So a prompt gets the
same noise and the same donor wherever its row is, however a data set is split into batches, and on every device.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from assay.base.errors import InvalidEdit
from assay.base.rng import numpy_stream, torch_stream
from assay.subjects.tokens import Batch

Key = tuple[str, int]


def contents(batch: Batch) -> list[str]:
    """A hash of what each row is made of: its prompt's tokens, or the module's own inputs.

    The same for every stack of a model, and with any padding: masked tokens and the masks themselves do not count.
    """
    given = [*(batch.inputs or {}).items(), *((str(at), x) for at, x in enumerate(batch.args))]
    rows = [(name, x) for name, x in given if isinstance(x, Tensor) and x.ndim and x.shape[0] == batch.size]
    masks = {name: x for name, x in rows if name.endswith(_MASK)}
    parts = [(name, x, masks.get(_mask_of(name))) for name, x in rows if not name.endswith((_MASK, _POSITIONS))]
    found = []
    for row in range(batch.size):
        content = hashlib.sha256(b"" if parts else repr(batch.prompt(row)).encode())
        for name, x, mask in parts:
            value = x[row].detach()
            if mask is not None and mask.ndim == 2 and value.shape[:1] == mask.shape[1:]:
                value = value[mask[row].to(value.device).bool()]
            content.update(f"{name}:{tuple(value.shape)};".encode())
            content.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        found.append(content.hexdigest()[:32])
    return found


_MASK, _POSITIONS = "attention_mask", "position_ids"


def _mask_of(name: str) -> str:
    """The mask that goes with an input: `decoder_input_ids` has `decoder_attention_mask`."""
    side, found, _ = name.partition("input")
    return f"{side}{_MASK}" if found else ""


def row_keys(batch: Batch) -> list[Key]:
    """What each row is known by to a random stream: a hash of its contents, and how often those came before.

    Args:
        batch: The prompts.

    Returns:
        One key a row. Copies of one prompt differ in the second part, so their draws differ.
    """
    seen: Counter[str] = Counter()
    keys = []
    for name in contents(batch):
        keys.append((name, seen[name]))
        seen[name] += 1
    return keys


def moments(x: Tensor, real: Tensor | None, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation over the real tokens of a run, in float32 or better.

    Args:
        x: `[rows, positions, ...]`, or `[rows, ...]` at a site without positions.
        real: 1 at real tokens, 0 at padding, of as many dimensions as `over`; None where all are real.
        over: The dimensions to average over.

    Returns:
        Both with those dimensions kept, of length 1.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if real is None:
        mean = x.mean(over, keepdim=True)
        return mean, ((x - mean) ** 2).mean(over, keepdim=True).sqrt()
    weight = real.to(device=x.device, dtype=x.dtype).reshape(*real.shape, *[1] * (x.ndim - real.ndim))
    total = weight.sum()
    mean = (x * weight).sum(over, keepdim=True) / total
    return mean, (((x - mean) ** 2 * weight).sum(over, keepdim=True) / total).sqrt()


def standard_noise(
    batch: Batch,
    rows: Sequence[int],
    columns: Sequence[int] | None,
    features: Sequence[int],
    seed: int,
    site: str,
    *,
    whole: Batch | None = None,
) -> Tensor:
    """Standard normal noise, the same for a prompt wherever it is.

    Args:
        batch: The prompts.
        rows: The rows it is for.
        columns: The columns it is for, the same in each row; None at a site without positions.
        features: The shape of what one position has (heads first).
        seed: The seed.
        site: The site's canonical name.
        whole: The prompts as they were given, where the batch has other positions than they.

    Returns:
        `[rows, columns, *features]` (without columns where there are none), float32, on the CPU.

    Raises:
        InvalidEdit: If a column lies outside a prompt.
    """
    keys = row_keys(whole or batch)
    drawn = []
    for row in rows:
        generator = torch_stream(seed, "noise", site, *keys[row])
        if columns is None:
            drawn.append(torch.randn(*features, generator=generator))
            continue
        start, length = batch.starts[row], batch.lengths[row]
        if any(not 0 <= column - start < length for column in columns):
            raise InvalidEdit(
                f"noise at {site!r}: row {row} has {length} tokens, and positions beyond them were asked for"
            )
        noise = torch.randn(length, *features, generator=generator)
        drawn.append(noise[[column - start for column in columns]])
    return torch.stack(drawn)


def choose_donors(
    batch: Batch,
    rows: Sequence[int],
    donors: Batch,
    columns: Sequence[int] | None,
    seed: int,
    site: str,
    *,
    whole: Batch | None = None,
    made_of: Sequence[str] | None = None,
) -> list[tuple[int, list[int] | None]]:
    """Choose whose values each row gets: another prompt, long enough, at the same positions.

    Args:
        batch: The prompts that are edited.
        rows: The rows that need a donor.
        donors: The prompts to choose from; those made of the same as the row are left out.
        columns: The rows' columns, or None at a site without positions.
        seed: The seed.
        site: The site's canonical name.
        whole: The prompts as they were given, where the batch has other positions than they.
        made_of: What each donor is made of (`contents`), where the donors have other positions than their prompts.

    Returns:
        The donor's row and its columns, for each row.

    Raises:
        InvalidEdit: If no other prompt reaches those positions.
    """
    keys = row_keys(whole or batch)
    made_of = contents(donors) if made_of is None else made_of
    order = sorted(range(donors.size), key=lambda row: (made_of[row], row))  # so the donors' own order is no matter
    chosen = []
    for row in rows:
        relative = None if columns is None else [column - batch.starts[row] for column in columns]
        reach = 1 + max(relative) if relative else 0
        picks = [order[pick] for pick in numpy_stream(seed, "resample", site, *keys[row]).permutation(len(order))]
        at = next((pick for pick in picks if donors.lengths[pick] >= reach and made_of[pick] != keys[row][0]), None)
        if at is None:
            raise InvalidEdit(
                f"Ablate({site!r}, 'resample'): row {row} needs another prompt of at least {reach} tokens to take "
                f"values from"
            )
        chosen.append((at, None if relative is None else [donors.starts[at] + position for position in relative]))
    return chosen
