"""Custom gradients in TensorFlow graphs that go with their graphs."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.framework.func_graph import FuncGraph
from tensorflow.python.framework.ops import gradient_registry

from jaxwrap._typing import Tensor

# Where a graph keeps its gradients.
_KEPT = "_jaxwrap_gradients"


def custom_gradient(fn: Callable[..., tuple[Any, Any]]) -> Callable[..., Any]:
    """Do what `tf.custom_gradient` does, but keep what `fn` and its gradient hold no longer than the graph.

    TensorFlow keeps the gradient of each such call in a graph in a table of the process, for ever. Through it, that is
    the graph, the functions in it and the model that they belong to.

    Args:
        fn: Takes tensors, and returns tensors and the function of their cotangents.
    """
    recorded = tf.custom_gradient(fn)

    @functools.wraps(fn)
    def call(*tensors: Tensor) -> Any:
        outputs = recorded(*tensors)
        flat = tf.nest.flatten(outputs)
        if flat and not tf.executing_eagerly():
            _release(flat[0].op)
        return outputs

    return call


def _release(operation: tf.Operation) -> None:
    name = operation.get_attr("_gradient_op_type").decode()
    table = gradient_registry._registry
    gradient = table[name]["type"]
    # The operation may be copied into the graphs around, and differentiated there.
    graph: Any = operation.graph
    while isinstance(graph, FuncGraph):
        setattr(graph, _KEPT, [*getattr(graph, _KEPT, ()), gradient])
        graph = graph.outer_graph
    kept = weakref.ref(gradient, lambda _: table.pop(name, None))
    table[name]["type"] = functools.partial(_differentiate, kept)


def _differentiate(kept: weakref.ref[Any], operation: Any, *cotangents: Tensor) -> Any:
    gradient = kept()
    assert gradient is not None, "the graph is gone"
    return gradient(operation, *cotangents)
