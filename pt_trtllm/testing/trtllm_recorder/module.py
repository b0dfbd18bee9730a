"""`tensorrt_llm.module` and `tensorrt_llm.parameter`"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from pt_trtllm.testing.trtllm_recorder.network import Tensor, default_net, record


class Parameter:
    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = tuple(shape), dtype
        self.raw_value: torch.Tensor | None = None

    def is_inited(self) -> bool:
        return self.raw_value is not None

    @property
    def value(self) -> Tensor:
        """A constant of the network under construction."""
        return record("parameter", (), self.dtype, len(self.shape), parameter=self)

    @value.setter
    def value(self, new: torch.Tensor) -> None:
        if tuple(new.shape) != self.shape:
            raise ValueError(f"shape {tuple(new.shape)}, expected {self.shape}")
        if str(new.dtype).removeprefix("torch.") != self.dtype:
            raise ValueError(f"type {new.dtype}, expected {self.dtype}")
        self.raw_value = new


class Module:
    _modules: dict[str, Any]
    _parameters: dict[str, Any]

    def __init__(self) -> None:
        object.__setattr__(self, "_modules", {})
        object.__setattr__(self, "_parameters", {})

    def __setattr__(self, name: str, value: Any) -> None:
        for kind, table in ((Module, "_modules"), (Parameter, "_parameters")):
            if isinstance(value, kind):
                getattr(self, table)[name] = value
        object.__setattr__(self, name, value)

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        setattr(self, name, param)

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        for name, parameter in self._parameters.items():
            yield prefix + name, parameter
        for name, module in self._modules.items():
            yield from module.named_parameters(f"{prefix}{name}.")

    def name_scopes(self, path: str = "") -> None:
        """Tells every module its path, as a network's nodes are then labelled."""
        object.__setattr__(self, "_path", path)
        for name, module in self._modules.items():
            module.name_scopes(f"{path}.{name}" if path else name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        scope = default_net().scope
        scope.append(getattr(self, "_path", type(self).__name__))
        saved, scope[:] = scope[:-1], scope[-1:]
        try:
            return self.forward(*args, **kwargs)  # type: ignore[attr-defined]
        finally:
            scope[:] = saved


class ModuleList(Module):
    def __init__(self, modules: list[Module]) -> None:
        super().__init__()
        for index, module in enumerate(modules):
            self._modules[str(index)] = module

    def __iter__(self) -> Iterator[Module]:
        return iter(self._modules.values())
