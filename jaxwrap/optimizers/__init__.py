"""Optax transformations as Keras optimizers."""

from jaxwrap.optimizers._optax import OptaxOptimizer

__all__ = ["OptaxOptimizer"]
