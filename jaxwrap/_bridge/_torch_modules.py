"""What PyTorch's modules and optimizers see of a Keras layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from jaxwrap._instances import instances, with_instances, with_subclasses


class _Linked(dict[str, Any]):
    """Tensors by name. One that is put in the place of another becomes the value of the variable.

    So `torch.func.functional_call`, which puts tensors there for a call, reaches Keras's variables, which layers read.
    """

    def __init__(self, tensors: Mapping[str, Any], variables: dict[str, Any]):
        super().__init__(tensors)
        self._variables = variables

    def __setitem__(self, name: str, tensor: Any) -> None:
        super().__setitem__(name, tensor)
        if isinstance(tensor, torch.Tensor) and name in self._variables:
            self._variables[name]._value = tensor

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._variables.pop(name, None)


class Variables(torch.nn.ParameterDict):
    """Tensors of variables, by path. Those that no gradient reaches, such as seeds, are buffers."""

    def __init__(self, variables: dict[str, Any]):
        super().__init__({path: variable.value for path, variable in variables.items()})
        self._parameters = _Linked(self._parameters, variables)
        self._buffers = _Linked(self._buffers, variables)

    def __setitem__(self, key: str, value: Any) -> None:
        """Register a tensor as a parameter, or an integer tensor as a buffer."""
        if value.is_floating_point() or value.is_complex():
            super().__setitem__(key, value)
        else:
            self._keys[key] = None
            self.register_buffer(key, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Torch moves a parameter in place, but puts another tensor where a buffer was, which Keras would not see.
        buffers = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in buffers.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved is not buffer:
                buffer.data = moved
                self._buffers[name] = buffer
        return self


def register(layer: Any) -> None:
    """Register the variables of a layer with its torch module, under the names that Keras gives them."""
    layer._torch_params = Variables({variable.path: variable for variable in layer.variables})


def misses_optimizer(layer: Any) -> bool:
    """Return whether an optimizer of torch trains the module around a layer, and cannot have its new parameters."""
    if not torch.is_grad_enabled() or not layer.trainable_variables:
        return False
    # Torch keeps no list of its optimizers. So look for them, once for a layer that is built in a call, and not where
    # there has never been one: the first of a class puts hooks around its `step`.
    classes = with_subclasses(torch.optim.Optimizer)
    optimizers = instances(*[cls for cls in classes if hasattr(cls.step, "hooked")])
    trained = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    return bool(trained) and any(
        id(parameter) in trained for around in _around(layer) for parameter in _parameters(around)
    )


def _around(layer: Any) -> Iterator[torch.nn.Module]:
    # A module does not know what it is part of. Of the many classes of modules, a process uses a few.
    for module in instances(*with_instances(with_subclasses(torch.nn.Module))):
        if module is not layer and any(_holds(part, layer) for part in module.modules()):
            yield module


def _holds(part: torch.nn.Module, layer: Any) -> bool:
    # Torch does not see layers in Keras's own lists, such as those of a `keras.Sequential`.
    flatten: Any = getattr(part, "_flatten_layers", None)
    return part is layer or (flatten is not None and any(one is layer for one in flatten()))


def _parameters(module: torch.nn.Module) -> Iterator[Any]:
    # Not `parameters()`, with which Keras registers the variables of a layer.
    for part in module.modules():
        yield from part._parameters.values()
