"""JAX functions as Keras losses."""

from jaxwrap.losses._loss import JaxLoss

__all__ = ["JaxLoss"]
