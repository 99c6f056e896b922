"""`PaddedBatches`."""

from __future__ import annotations

import math
import random
from typing import Any

import jax
import keras
import numpy as np

from jaxwrap._dense import check_dense
from jaxwrap._errors import naming
from jaxwrap._pytree import path_str
from jaxwrap._typing import PyTree


class PaddedBatches(keras.utils.PyDataset):
    """Batches of one size, so that `fit` on JAX compiles one step.

    The last batch is filled with copies of its own rows, whose sample weights are 0. In `fit`, the weights of its rows
    are larger in exchange: the loss, Keras's mean over a batch, and the gradients are those of the smaller batch. What
    does not know sample weights sees the copies: `metrics=` (pass `weighted_metrics=`), losses of layers, batch norm.
    The page on performance has the whole list, under "The last batch".

    Args:
        x: Inputs, as `fit` takes them: an array, or a dict, list or tuple of arrays.
        y: Labels, likewise. Without labels there are no weights, for `predict`. Take the copies off its result:
            `model.predict(batches)[:len(x)]`.
        sample_weight: Weights of the rows: an array for all labels, or one for each array in `y`. The default is 1 for
            losses of shape `y.shape` or `y.shape[:-1]`. For losses with fewer axes, pass weights of their rank: for
            one loss per row, `np.ones(len(x))`.
        batch_size: The rows of a batch.
        shuffle: Whether to put the rows into another order for each epoch. For `fit` alone.
        seed: An integer for the same orders again. By default they follow `keras.utils.set_random_seed`.
        training: Whether the batches are for `fit`. If not, for `evaluate` and `validation_data`, every row counts the
            same: the loss and the weighted means are those of all rows.

    Raises:
        TypeError: For a ragged or sparse tensor.
        ValueError: If the arrays differ in their number of rows or have no rows, or for a batch size below 1.

    Example:
        >>> import numpy as np, jaxwrap
        >>> x = np.arange(6.0).reshape(6, 1)
        >>> batches = jaxwrap.PaddedBatches(x, x[:, 0], batch_size=4)
        >>> inputs, labels, weights = batches[1]  # model.fit(batches)
        >>> labels.tolist(), weights.tolist()
        ([4.0, 5.0, 4.0, 5.0], [2.0, 2.0, 0.0, 0.0])
    """

    def __init__(
        self,
        x: PyTree,
        y: PyTree = None,
        sample_weight: PyTree = None,
        *,
        batch_size: int = 32,
        shuffle: bool = False,
        seed: int | None = None,
        training: bool = True,
    ):
        super().__init__()
        with naming("PaddedBatches"):
            if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
                raise ValueError(
                    f"`batch_size` must be an integer of at least 1; received {batch_size!r}."
                )
            if sample_weight is not None and y is None:
                raise ValueError("received `sample_weight` without `y`. Weights belong to labels.")
            nests = {"x": x, "y": y, "sample_weight": sample_weight}
            self._count = _count({name: nest for name, nest in nests.items() if nest is not None})
            _check_weights(sample_weight, y)
        arrays = jax.tree.map(_on_host, (x, y, sample_weight))
        self._x, self._y, self._weights = _without_lists(arrays)
        if y is not None and sample_weight is None:
            self._weights = _ones(self._y)
        self._batch_size = int(batch_size)
        self._training = training
        self._order = np.arange(self._count)
        self._rng = None
        if shuffle:
            # As Keras makes its seeds.
            self._rng = np.random.default_rng(random.getrandbits(32) if seed is None else seed)
            self.on_epoch_end()

    def __len__(self) -> int:
        return math.ceil(self._count / self._batch_size)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        rows = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        if not len(rows):
            raise IndexError(f"PaddedBatches has {len(self)} batches; received index {index}.")
        padded = np.resize(rows, self._batch_size)  # repeats them
        x, y = jax.tree.map(lambda array: _floatx(array[padded]), (self._x, self._y))
        if self._y is None:
            return (x,)
        # Keras divides the loss of a batch by all of its rows, and the mean of an epoch by all batches.
        real = len(rows) if self._training else self._count / len(self)
        factors = np.zeros(self._batch_size, "float32")
        factors[: len(rows)] = self._batch_size / real

        def weigh(weights: np.ndarray) -> np.ndarray:
            return _floatx(weights[padded] * factors.reshape(-1, *[1] * (weights.ndim - 1)))

        return x, y, jax.tree.map(weigh, self._weights)

    def on_epoch_end(self) -> None:
        """Put the rows into the order of the next epoch."""
        if self._rng is not None:
            self._order = self._rng.permutation(self._count)


def _count(nests: dict[str, PyTree]) -> int:
    """Return the number of rows that all arrays have."""
    first = None
    for name, nest in nests.items():
        leaves = jax.tree_util.tree_leaves_with_path(nest)
        if not leaves:
            raise ValueError(f"`{name}` has no arrays; received {nest!r}.")
        for path, leaf in leaves:
            where = f"{name}/{path_str(path)}" if path else name
            check_dense(leaf)
            shape = getattr(leaf, "shape", ())
            if not shape:
                raise ValueError(
                    f"`{where}` is {leaf!r}, which has no rows. Expected arrays, or tensors, with a row for each "
                    "example. Make an array of a list of numbers."
                )
            if first is None:
                first = (where, shape[0])
            elif shape[0] != first[1]:
                raise ValueError(
                    f"`{where}` has {shape[0]} rows, its shape is {tuple(shape)}; expected {first[1]}, as "
                    f"`{first[0]}` has."
                )
    assert first is not None
    if not first[1]:
        raise ValueError(f"`{first[0]}` has no rows; expected at least one.")
    return int(first[1])


def _check_weights(weights: PyTree, y: PyTree) -> None:
    """Raise ValueError unless all labels have weights: copies without weights would count."""
    received, expected = len(jax.tree.leaves(weights)), len(jax.tree.leaves(y))
    single = jax.tree_util.all_leaves([weights])
    if weights is not None and not single and received != expected:
        raise ValueError(
            f"`sample_weight` has {received} arrays, `y` has {expected}. Pass an array for each, or one for all."
        )


def _on_host(leaf: Any) -> np.ndarray:
    return leaf if isinstance(leaf, np.ndarray) else np.asarray(keras.ops.convert_to_numpy(leaf))


def _without_lists(nest: PyTree) -> PyTree:
    """Return a nest with tuples for lists, of which `tf.data` makes tensors."""

    def is_list(nest: PyTree) -> bool:
        return isinstance(nest, list)

    return jax.tree.map(
        lambda leaf: tuple(map(_without_lists, leaf)) if is_list(leaf) else leaf,
        nest,
        is_leaf=is_list,
    )


def _ones(y: PyTree) -> PyTree:
    """Return weights that Keras can multiply with a loss for each row, or for each label."""
    ones = jax.tree.map(lambda array: np.ones((len(array), *[1] * (array.ndim - 1)), "float32"), y)
    ranks = {array.ndim for array in jax.tree.leaves(y)}
    # Keras takes one array for any structure of outputs.
    return jax.tree.leaves(ones)[0] if len(ranks) == 1 else ones


def _floatx(array: np.ndarray) -> np.ndarray:
    """Return floats in the dtype of Keras, as `fit` makes them of arrays."""
    if keras.backend.is_float_dtype(str(array.dtype)):
        return array.astype(keras.config.floatx(), copy=False)
    return array
