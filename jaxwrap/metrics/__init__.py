"""JAX functions as Keras metrics."""

from jaxwrap.metrics._metric import JaxMetric

__all__ = ["JaxMetric"]
