"""A model of a JAX library as a Keras layer: the adapter says what the model is, the layer does the rest."""

from jaxwrap._layer._adapter import Adapter, CallResult
from jaxwrap._layer._layer import JaxLayer
from jaxwrap._layer._mode import follow_torch_mode

__all__ = ["Adapter", "CallResult", "JaxLayer", "follow_torch_mode"]
