"""Callbacks for `fit`."""

from __future__ import annotations

from typing import Any

import keras

from jaxwrap._errors import naming
from jaxwrap._layer._layer import JaxLayer
from jaxwrap._layer._sync import check_how, sync


class SyncState(keras.callbacks.Callback):
    """Give all replicas the same state after each batch of `fit`.

    For processes of `torch.distributed`, which agree on gradients alone. It reaches all layers of a model, those of
    Keras too: running means, for example. On JAX and NumPy there is one state, and nothing to do.

    Args:
        how: "mean" for the mean of float state, and the first replica's state of other dtypes. "first" for all of the
            first replica's state.

    Raises:
        ValueError: For another word.

    Example:
        >>> import jaxwrap
        >>> callback = jaxwrap.SyncState("mean")  # model.fit(x, y, callbacks=[callback])
        >>> callback.how
        'mean'
    """

    def __init__(self, how: str = "mean"):
        super().__init__()
        with naming("SyncState"):
            check_how(how)
        self.how = how

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Sync the state of the model."""
        model: Any = self.model
        with naming("SyncState"):
            sync([v for layer in model._flatten_layers() for v in _state(layer)], self.how)


def _state(layer: Any) -> list[keras.Variable]:
    """Return what a layer assigns in its calls, without seeds."""
    # Not `non_trainable_variables`, which holds frozen parameters too.
    if not isinstance(layer, JaxLayer):
        return layer._non_trainable_variables
    weights = layer._engine.weights
    state = [] if weights is None else weights.state.variables
    return [*state, *getattr(layer, "tracked_means", ())]
