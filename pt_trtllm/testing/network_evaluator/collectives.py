"""What collectives compute, and how their arguments become known.

TensorRT's bindings show nothing of a collective layer but its input, output and number of ranks. So the arguments are
noted when the layer is added: networks with collectives must be defined while a `CollectiveLog` is open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

import torch

from pt_trtllm.testing.network_evaluator.values import NotEvaluated


@dataclass(frozen=True)
class Collective:
    """The arguments of `add_dist_collective`; an empty group means all ranks."""

    op: str
    reduce_op: str
    root: int
    group: tuple[int, ...]


class CollectiveLog:
    """A context in which `add_dist_collective` of one TensorRT module also notes its arguments."""

    def __init__(self, trt: ModuleType) -> None:
        self._network_class: Any = trt.INetworkDefinition
        self._original: Callable[..., Any] | None = None
        self._noted: dict[int, Collective] = {}
        self._outputs: list[Any] = []
        """Kept alive: a tensor is recognised by the identity of its Python object."""

    def __enter__(self) -> CollectiveLog:
        original = self._original = self._network_class.add_dist_collective

        def add_dist_collective(
            network: Any, input: Any, dist_collective_op: Any, reduce_op: Any, root: Any, groups: Any
        ) -> Any:
            layer = original(network, input, dist_collective_op, reduce_op, root, groups)
            if layer is not None:
                output = layer.get_output(0)
                self._outputs.append(output)
                group = () if groups is None else tuple(int(rank) for rank in groups)
                self._noted[id(output)] = Collective(dist_collective_op.name, reduce_op.name, int(root), group)
            return layer

        self._network_class.add_dist_collective = add_dist_collective
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._network_class.add_dist_collective = self._original

    def arguments(self, layer: Any) -> Collective:
        found = self._noted.get(id(layer.get_output(0)))
        if found is None:
            raise NotEvaluated(f"{layer.name}: a collective added while no CollectiveLog was open")
        return found


def compute_collective(call: Collective, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The result on every member of the group, in its order."""
    if call.op == "ALL_REDUCE":
        return [_reduced(call, values)] * len(values)
    if call.op == "ALL_GATHER":  # ranks one after another: the first axis grows
        return [torch.cat(list(values))] * len(values)
    if call.op == "REDUCE_SCATTER":
        return list(_reduced(call, values).chunk(len(values)))
    if call.op == "BROADCAST":
        return [values[call.root]] * len(values)
    raise NotEvaluated(f"collective {call.op}")


def _reduced(call: Collective, values: Sequence[torch.Tensor]) -> torch.Tensor:
    stacked = torch.stack(list(values))
    reductions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "SUM": lambda x: x.sum(0),
        "AVG": lambda x: x.mean(0),
        "MAX": lambda x: x.amax(0),
        "MIN": lambda x: x.amin(0),
        "PROD": lambda x: x.prod(0),
    }
    if call.reduce_op not in reductions:
        raise NotEvaluated(f"collective with reduction {call.reduce_op}")
    return reductions[call.reduce_op](stacked)
