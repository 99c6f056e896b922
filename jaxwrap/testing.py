"""The contract of adapters, as a check that a library's own tests can run."""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from jaxwrap import checkpoints
from jaxwrap._dtypes import inexact
from jaxwrap._layer import Adapter, CallResult, JaxLayer
from jaxwrap._layer._adapter import call_adapter
from jaxwrap._layer._seeds import drawing
from jaxwrap._pytree import is_array
from jaxwrap._typing import Array, PyTree
from jaxwrap._weights._variables import to_host

__all__ = ["check_adapter"]


def check_adapter(
    make: Callable[[], Adapter | JaxLayer],
    inputs: Any,
    *,
    native: Callable[..., PyTree] | None = None,
    tolerance: float = 1e-5,
) -> None:
    """Check that an adapter keeps its contract, on the current Keras backend.

    A layer of the adapter builds. It computes the same as the adapter in plain JAX, in inference and in training, with
    the same new state. It trains by JAX's gradients (not on NumPy), draws the same numbers from the same seed, and
    comes back from a config, a `.keras` file, a clone, a deep copy and a checkpoint. The adapter does not change
    meanwhile.

    Args:
        make: Makes the adapter, or a layer of it. Each call must make an equal one.
        inputs: The argument of the layer, a NumPy array, or a tuple of all its arguments, each a nest of arrays. The
            first axis of each array is the batch.
        native: Computes the outputs in inference by the library's own means, from the result of
            `layer.get_variables()` and the inputs.
        tolerance: The relative and absolute error of float32 values.

    Raises:
        AssertionError: If the adapter breaks the contract. The message names the part.

    Example:
        >>> import flax.linen as nn, numpy as np, jaxwrap
        >>> from jaxwrap.adapters import Linen
        >>> from jaxwrap.testing import check_adapter
        >>> def native(variables, x):
        ...     return nn.Dense(2).apply(variables, x)
        >>> check_adapter(lambda: Linen(nn.Dense(2)), np.ones((4, 3), "float32"), native=native)
    """
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    check = _Check(make, arguments, tolerance)
    check.fields()
    check.building()
    if native is not None:
        check.native(native)
    for training in (False, True):
        check.values_and_state(training)
    check.seeds()
    if keras.config.backend() != "numpy":
        check.gradients()
    check.variables()
    check.saving()


class _Check:
    """The parts of the check. Each makes layers of its own."""

    def __init__(self, make: Callable[[], Any], inputs: tuple[Any, ...], tolerance: float):
        self._make = make
        self._inputs = inputs
        self._tolerance = tolerance

    def _layer(self, **kwargs: Any) -> JaxLayer:
        made = self._make()
        return made if isinstance(made, JaxLayer) else JaxLayer(made, seed=7, **kwargs)

    def _built(self) -> JaxLayer:
        layer = self._layer()
        layer(*self._inputs)
        return layer

    def _equal(self, part: str, actual: PyTree, expected: PyTree) -> None:
        actual, expected = _numpy(actual), _numpy(expected)
        one, two = jax.tree.structure(actual), jax.tree.structure(expected)
        assert one == two, f"{part}: the structure is {one}, expected {two}"
        for (path, left), right in zip(
            jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
        ):
            where = f"{part}{jax.tree_util.keystr(path)}"
            if not inexact(left.dtype):
                np.testing.assert_array_equal(left, right, err_msg=where)
            else:
                tolerance = self._tolerance if left.dtype.itemsize >= 4 else 2e-2
                pair = (array.astype("complex128") for array in (left, right))
                np.testing.assert_allclose(*pair, rtol=tolerance, atol=tolerance, err_msg=where)

    def fields(self) -> None:
        """Check that the adapter is a frozen dataclass, and that a config holds it."""
        adapter = self._layer().adapter
        parameters = getattr(type(adapter), "__dataclass_params__", None)
        assert parameters is not None, f"{type(adapter).__name__} is not a dataclass"
        assert parameters.frozen, f"{type(adapter).__name__} is not frozen"
        layer = self._layer()
        config = json.loads(json.dumps(layer.get_config()))
        again = type(layer).from_config(config)
        assert type(again.adapter) is type(adapter), "from_config makes another adapter"

    def building(self) -> None:
        """Check that layers of one seed have the same values, and that shapes without data are those of a call."""
        one, two = self._built(), self._built()
        self._equal("initial values", one.get_variables(), two.get_variables())
        before = _snapshot(one.adapter)
        symbols = jax.tree.map(
            lambda array: keras.KerasTensor((None, *array.shape[1:]), str(array.dtype)),
            self._inputs,
        )
        shapes = [tensor.shape for tensor in jax.tree.leaves(one.compute_output_spec(*symbols))]
        outputs = jax.tree.leaves(one(*self._inputs))
        assert len(shapes) == len(outputs), "compute_output_spec returns another number of outputs"
        for shape, output in zip(shapes, outputs, strict=True):
            known = [a if b is None else b for a, b in zip(output.shape, shape, strict=True)]
            assert known == list(output.shape), f"shape {output.shape}, expected {shape}"
        assert _snapshot(one.adapter) == before, "the adapter changes when it is called"

    def native(self, native: Callable[..., PyTree]) -> None:
        """Check that outputs in inference are those of the library."""
        layer = self._built()
        expected = native(layer.get_variables(), *self._inputs)
        self._equal("the native outputs", layer(*self._inputs), expected)

    def values_and_state(self, training: bool) -> None:
        """Check that outputs and new state are those of the adapter in plain JAX."""
        layer = self._built()
        for _ in range(3):
            expected = _plain(layer, self._inputs, training)
            outputs = layer(*self._inputs, training=training)
            mode = "training" if training else "inference"
            self._equal(f"outputs in {mode}", outputs, expected.outputs)
            state = layer._engine.built_weights().state.read()
            self._equal(f"the state after a call in {mode}", state, expected.state)

    def seeds(self) -> None:
        """Check that layers of one seed draw the same numbers, and that the generators are those of the streams."""
        one, two = self._built(), self._built()
        first, same = (layer(*self._inputs, training=True) for layer in (one, two))
        self._equal("outputs in training from one seed", first, same)
        streams = one.adapter.streams()
        named = set() if streams is None else {n for n, seed in streams.items() if seed is not None}
        if one.adapter.draws != "never":
            found = set(one._engine.seeds.generators)
            allowed = {"seed", *(f"rngs_{name}" for name in named)}
            assert found in (set(), allowed), f"the generators are {found}, expected {allowed}"

    def gradients(self) -> None:
        """Check that one step of SGD moves each trained variable by JAX's gradient."""
        layer = self._built()
        model = _Scalar(layer)
        # Not Adam, which turns the rounding noise of a zero gradient into a whole step.
        model.compile(keras.optimizers.SGD(1.0))
        before = [to_host(variable) for variable in layer.trainable_variables]
        trained = {id(variable) for variable in layer.trainable_variables}
        gradients = _plain_gradients(layer, self._inputs)
        model.train_on_batch(self._inputs)
        variables = layer._engine.built_weights().params.variables
        expected = [
            gradient
            for variable, gradient in zip(variables, gradients, strict=True)
            if id(variable) in trained
        ]
        for variable, old, gradient in zip(
            layer.trainable_variables, before, expected, strict=True
        ):
            moved = old.astype("float64") - to_host(variable).astype("float64")
            # The difference of two float32 weights has the rounding error of the larger numbers.
            scale = max(1.0, float(np.abs(gradient).max(initial=0.0)))
            self._equal(
                f"the gradient of {variable.path}",
                (moved / scale).astype("float32"),
                (np.asarray(gradient, "float64") / scale).astype("float32"),
            )

    def variables(self) -> None:
        """Check that weights can be read, written and stored in a checkpoint."""
        layer = self._built()
        layer(*self._inputs, training=True)
        values = layer.get_variables()
        other = self._built()
        other.set_variables(values)
        self._equal("variables that were set", other.get_variables(), values)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "weights.safetensors"
            if not _has_safetensors():
                path = path.with_suffix(".npz")
            checkpoints.save(layer, path)
            loaded = self._built()
            checkpoints.load(loaded, path)
        self._equal("variables from a checkpoint", loaded.get_variables(), values)

    def saving(self) -> None:
        """Check that a model comes back from a file, a clone and a copy."""
        layer = self._layer()
        symbols = jax.tree.map(
            lambda array: keras.Input(array.shape[1:], dtype=str(array.dtype)), self._inputs
        )
        model = keras.Model(symbols, layer(*symbols))
        clone = keras.models.clone_model(model)
        clone.set_weights(model.get_weights())
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "model.keras"
            model.save(path)
            loaded: Any = keras.saving.load_model(path)
        copies = {"a file": loaded, "a clone": clone, "a deep copy": copy.deepcopy(model)}
        expected = model.predict_on_batch(self._inputs)
        for name, other in copies.items():
            outputs = other.predict_on_batch(self._inputs)
            self._equal(f"outputs of {name}", outputs, expected)


class _Scalar(keras.Model):
    """A model whose loss is the sum of all float outputs, each times a fixed cotangent, and of the layer's losses."""

    def __init__(self, layer: JaxLayer):
        super().__init__(name="scalar")  # TensorFlow refuses names that begin with `_`
        self.layer = layer

    def call(self, inputs: Any, training: bool = False) -> Any:
        outputs = self.layer(*inputs, training=training)
        floats = [leaf for leaf in jax.tree.leaves(outputs) if _is_float(leaf)]
        products: list[Any] = [keras.ops.multiply(leaf, _cotangent(leaf)) for leaf in floats]
        sums: list[Any] = [keras.ops.sum(product) for product in products]
        self.add_loss(sum(sums))
        return outputs


def _is_float(leaf: Any) -> bool:
    return inexact(keras.backend.standardize_dtype(leaf.dtype))


def _cotangent(leaf: Any) -> Any:
    """Return a different weight for each feature of an output, the same for each example."""
    return np.linspace(0.5, 1.5, leaf.shape[-1] if leaf.shape else 1, dtype="float32")


def _plain(
    layer: JaxLayer, inputs: tuple[Any, ...], training: bool, params: PyTree = None
) -> CallResult:
    """Call the adapter in plain JAX, with the values and the seeds that the layer has now."""
    engine = layer._engine
    weights = engine.built_weights()
    values = [
        leaves.decode([jnp.asarray(to_host(variable)) for variable in leaves.variables])
        for leaves in (weights.params, weights.state)
    ]
    generators = list(engine.seeds.generators.values())
    seeds = [jnp.asarray(to_host(generator.state).astype("uint32")) for generator in generators]
    with drawing(generators, seeds):
        keys = engine.draw_keys(training)
    arguments, _ = engine.inputs.bind(jax.tree.map(jnp.asarray, inputs), {})
    own = values[0] if params is None else params
    return call_adapter(
        engine.adapter, own, values[1], keys, engine.inputs.for_adapter(arguments), training
    )


def _plain_gradients(layer: JaxLayer, inputs: tuple[Any, ...]) -> list[Array]:
    """Return the gradients of the loss of `_Scalar` for all parameters, those that are not floats included."""
    leaves = layer._engine.built_weights().params

    def loss(floats: list[Array]) -> Array:
        remaining = iter(floats)
        arrays = [next(remaining) if f else a for a, f in zip(all_arrays, is_float, strict=True)]
        result = _plain(layer, inputs, True, leaves.decode(arrays))
        outputs = [leaf for leaf in jax.tree.leaves(result.outputs) if inexact(leaf.dtype)]
        total = sum(jnp.sum(leaf * _cotangent(leaf)) for leaf in outputs)
        return total + (0.0 if result.losses is None else result.losses)

    all_arrays = [jnp.asarray(to_host(variable)) for variable in leaves.variables]
    is_float = [inexact(variable.dtype) for variable in leaves.variables]
    floats = [array for array, f in zip(all_arrays, is_float, strict=True) if f]
    gradients = iter(jax.grad(loss)(floats))
    return [next(gradients) if f else jnp.zeros(0) for f in is_float]


def _snapshot(adapter: Any) -> dict[str, int]:
    return {field.name: id(getattr(adapter, field.name)) for field in dataclasses.fields(adapter)}


def _numpy(tree: PyTree) -> PyTree:
    def convert(leaf: Any) -> Any:
        if is_array(leaf) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return np.asarray(jax.random.key_data(leaf))
        return np.asarray(keras.ops.convert_to_numpy(leaf))

    return jax.tree.map(convert, tree)


def _has_safetensors() -> bool:
    import importlib.util

    return importlib.util.find_spec("safetensors") is not None
