"""What goes into `compile`: optimizers, losses and metrics made of JAX functions."""

from jaxwrap._training._losses import JaxLoss
from jaxwrap._training._metrics import JaxMetric
from jaxwrap._training._optimizer import OptaxOptimizer

__all__ = ["JaxLoss", "JaxMetric", "OptaxOptimizer"]
