"""What PyTorch's modules and optimizers see of a Keras layer."""

from __future__ import annotations

from typing import Any

import torch


class Variables(torch.nn.ParameterDict):
    """Tensors of variables, by path. Those that no gradient reaches, such as seeds, are buffers."""

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
    layer._torch_params = Variables({variable.path: variable.value for variable in layer.variables})
