"""Which inferred maps are worth a self-check: their first block is held to what passed through it in one forward.

A module that no declaration knows has some ten to a hundred possible maps. Each self-check takes several forwards, and
most maps are wrong about the first block. What enters and leaves every module is recorded once; a map's identities
there are then computed from the record.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from assay.activations.identities import Identities
from assay.subjects.architecture import ArchitectureMap
from assay.subjects.inputs import example_inputs
from assay.subjects.model import Model
from assay.subjects.points import Traffic


class Record:
    """What entered and left every module in one forward of a few tokens (or one image).

    Args:
        module: A transformers model.
        kind: `tokens`, `image` or `audio`.
    """

    def __init__(self, module: nn.Module, kind: str) -> None:
        self.seen: dict[nn.Module, Traffic] = {}
        handles: list[Any] = []

        def watch(part: nn.Module) -> None:
            def hook(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                self.seen[part] = Traffic(part, args, kwargs, _copied(output))

            handles.append(part.register_forward_hook(hook, with_kwargs=True))

        for part in module.modules():
            watch(part)
        try:
            with torch.no_grad():
                module(**example_inputs(module, kind), **_no_cache(module))
        finally:
            for handle in handles:
                handle.remove()


class Recorded:
    """A record read by site names, as a run is.

    Args:
        record: The record.
        model: The model, with the map that says where sites are.
    """

    def __init__(self, record: Record, model: Model) -> None:
        self.record, self.model = record, model

    def __getitem__(self, name: str) -> Tensor:
        """What passed at a site.

        Raises:
            KeyError: If its module was not called, or only attention sees it.
        """
        point = self.model.point(self.model.site(name))
        if point.side not in ("in", "out"):
            raise KeyError(name)
        return point.read(self.record.seen[point.module])


def plausible(model: Model, architecture: ArchitectureMap, records: dict[str, Record | None]) -> bool:
    """Whether a map's first blocks add up, by a record of one forward.

    Args:
        model: The model, which has adopted the map.
        architecture: The map.
        records: Records already made, by kind of input; one is added when it is needed.
    """
    kind = architecture.inputs
    if kind not in records:
        try:
            records[kind] = Record(model.module, kind)
        except Exception:  # a module that does not take such inputs has no such map
            records[kind] = None
    record = records[kind]
    if record is None:
        return False
    try:
        for parts in model.stacks.values():
            known = Identities(parts, Recorded(record, model), 5e-2)
            if not all(check.passed for check in (*known.norms(0), *known.adds_up(0, known.run))):
                return False
    except Exception:  # a path that leads to something else
        return False
    return True


def _copied(output: Any) -> Any:
    """An output whose tensors are kept as they are now, because the module may write over them."""
    if isinstance(output, Tensor):
        return output.clone()
    return tuple(map(_copied, output)) if type(output) is tuple else output


def _no_cache(module: nn.Module) -> dict[str, bool]:
    config: Any = getattr(module, "config", None)
    return {"use_cache": False} if hasattr(config, "use_cache") else {}
