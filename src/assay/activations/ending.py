"""The end of a replay: the last block and the unembedding, computed at the columns that a metric looks at.

A column of the last block's output needs the keys and values of every token of its row, and all else of its own token
alone. So the block is first called for its keys and values, and left as soon as it has made them; then it is called
with the tokens of the one column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from assay.activations.apply import Window
from assay.activations.blocks import Blocks, Cell, Enough
from assay.activations.context import RunState
from assay.activations.lazy import Known
from assay.activations.packing import suffix_mask, take
from assay.activations.recording import ReplayRefused


class Ending:
    """The stream after the last block, for some cells, computed where it is looked at.

    Args:
        blocks: The blocks.
        cells: The cells; an unedited one, if there, comes last and is no row of what is returned.
        stream: What enters the last block, `[tokens, d_model]`.
    """

    def __init__(self, blocks: Blocks, cells: Sequence[Cell], stream: Tensor) -> None:
        self.blocks, self.base, self.cells, self.stream = blocks, blocks.base, cells, stream
        self.checked = cells[-1].index < 0
        self.n_rows = (len(cells) - self.checked) * blocks.batch.size
        self.width = blocks.batch.width
        self.packing = blocks.packing(blocks.last, cells)
        self._keys: tuple[Tensor, Tensor] | None = None
        self._known: Known | None = None
        if not blocks.packed or any(blocks.last in cell.edits for cell in cells):
            self._known = self._all()

    def column(self, position: int) -> Tensor:
        """One column of each row, `[rows, d_model]`.

        Raises:
            ReplayRefused: If the unedited cell is not the base there.
        """
        if self._known is not None:
            return self._known.column(position)
        last, rows = self.blocks.last, self.packing.source
        key, value = self._keys = self._keys or self._make_keys()
        mask = suffix_mask(self.base.attended(last).mask, self.width, slice(position, position + 1), rows.device)
        if mask is not None and len(mask) > 1:
            mask = mask[self.packing.prompts.to(mask.device)]

        def attention(
            function: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, _: Any, more: dict[str, Any]
        ) -> tuple[Tensor, None]:
            query = q[0].transpose(0, 1)[:, :, None]
            return function(module, query, take(key, rows), take(value, rows), mask, **more)[0].transpose(0, 1), None

        base = self.base.streams[last].flatten(0, 1).to(self.stream.device)
        entering = torch.cat([base, self.stream])[rows[:, position].to(base.device)]
        columns = torch.full_like(self.packing.prompts, position)
        arguments = self.base.packed_arguments(last, self.packing.prompts, columns)
        left = self.blocks.call(last, self._run(attention), entering[None], arguments)[0]
        if self.checked:
            self.base.verify(last + 1, left[self.n_rows :], slice(position, position + 1))
        return left[: self.n_rows]

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Every column, as tokens and where each row has them; see `Known`."""
        self._known = self._known or self._all()
        return self._known.tokens()

    def _all(self) -> Known:
        """All columns after the last block."""
        last, stream = self.blocks.last, self.stream.clone()
        self.blocks.through(last, self.cells, stream)
        if self.checked:
            self.base.verify(last + 1, stream[self.packing.spans[-1]], slice(self.cells[-1].start, None))
        base = self.base.streams[-1].flatten(0, 1).to(stream.device)
        return Known(torch.cat([base, stream]), self.packing.source[: self.n_rows])

    def _make_keys(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the base, then of all tokens, `[tokens, heads, d]`."""
        last = self.blocks.last
        attended = self.base.attended(last)
        keys, values = [attended.key.flatten(0, 1)], [attended.value.flatten(0, 1)]

        def attention(function: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
            keys.append(k[0].transpose(0, 1))
            values.append(v[0].transpose(0, 1))
            raise Enough

        for _, packing, tokens in self.blocks.chunks(last, self.cells):
            entering = self.stream[None, tokens].clone()
            try:
                self.blocks.call(last, self._run(attention), entering, self.blocks.arguments(last, packing))
            except Enough:
                continue
            raise ReplayRefused("the last block did not call its attention function")
        return torch.cat(keys), torch.cat(values)

    def _run(self, attention: Any) -> RunState:
        return RunState({}, Window(self.blocks.batch), rows=1, attention=attention)
