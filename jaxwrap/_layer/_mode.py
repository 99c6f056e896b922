"""Layers that follow the train flag of PyTorch's modules."""

from __future__ import annotations

from typing import Any

from jaxwrap._layer._parts import HasParts, parts_of


def follow_torch_mode(module: Any) -> Any:
    """Let the layers of a PyTorch module follow its `train()` and `eval()`.

    Keras's layers ignore both, and compute as in inference when no `training` is passed. After this, jaxwrap's layers
    below the module take PyTorch's flag in its place. A `training` that is passed to the layer, or to a Keras model
    around it, still wins. Files and copies do not hold this setting, and layers that are added later do not have it.

    Args:
        module: A `torch.nn.Module`. A Keras layer or model is one on the backend "torch".

    Returns:
        The module.

    Raises:
        TypeError: If it is no module.

    Example:
        >>> import flax.linen as nn, keras, jaxwrap
        >>> layer = jaxwrap.FlaxLayer(nn.Dropout(0.5, deterministic=False))
        >>> if keras.backend.backend() == "torch":
        ...     _ = jaxwrap.follow_torch_mode(layer).train()
    """
    if not callable(getattr(module, "modules", None)):
        raise TypeError(
            f"`follow_torch_mode` takes a `torch.nn.Module`; received a {type(module).__name__}. On other Keras "
            'backends than "torch", where a layer is none, pass `training=` to the layer.'
        )
    parts = list(module.modules())
    seen = {id(part) for part in parts}
    for part in parts:
        flatten: Any = getattr(part, "_flatten_layers", tuple)
        for layer in flatten():
            if isinstance(layer, HasParts):
                # PyTorch does not see a layer in a list of Keras's. It sets the flag of what holds the list.
                parts_of(layer).calls.followed = layer if id(layer) in seen else part
    return module
