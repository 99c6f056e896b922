"""What goes into `compile` and `fit`."""

from jaxwrap._training._batches import PaddedBatches
from jaxwrap._training._callbacks import SyncState
from jaxwrap._training._losses import JaxLoss
from jaxwrap._training._metrics import JaxMetric
from jaxwrap._training._optimizer import OptaxOptimizer

__all__ = ["JaxLoss", "JaxMetric", "OptaxOptimizer", "PaddedBatches", "SyncState"]
