"""Replicas of a `tf.distribute` strategy: which one is running, and what all of them have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from jaxwrap._typing import Tensor


def context() -> Any:
    """Return the context of the replica that is running, if it is one of several."""
    # Asked first, since it takes the least time.
    if not tf.distribute.has_strategy():
        return None
    replica = tf.distribute.get_replica_context()
    return None if replica is None or replica.num_replicas_in_sync == 1 else replica


def numbered(seeds: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return seeds with the number of the replica at the end. See `Bridge.for_replica`."""
    if (replica := context()) is None:
        return seeds
    number = replica.replica_id_in_sync_group
    return [tf.concat([seed, [tf.cast(number, seed.dtype)]], 0) for seed in seeds]


def summed(gradients: list[Tensor]) -> list[Tensor]:
    """Return the sums over all replicas."""
    if not gradients or (replica := context()) is None:
        return gradients
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, gradients)


def gathered(tensor: Tensor) -> Tensor:
    """Return the batches of all replicas, one after the other."""
    replica = context()
    return tensor if replica is None else replica.all_gather(tensor, axis=0)


def agreed(tensors: Sequence[Tensor], mean: bool) -> Sequence[Tensor] | None:
    """Return the mean of the copies of each variable, or the first copy. See `Bridge.agreed`."""
    if not any(isinstance(tensor, tf.distribute.DistributedValues) for tensor in tensors):
        return None
    if context() is not None:
        raise RuntimeError(
            "one of the replicas of a `tf.distribute` strategy cannot assign the state of the others. Call it "
            "between steps, outside of `strategy.run`."
        )
    return [_agreed(tensor, mean) for tensor in tensors]


def _agreed(tensor: Tensor, mean: bool) -> Tensor:
    copies = [copy.read_value() for copy in getattr(tensor, "values", [tensor])]
    return tf.add_n(copies) / len(copies) if mean else copies[0]
