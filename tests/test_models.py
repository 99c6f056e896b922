"""Every model of the table, on the backend under test, against the unwrapped JAX function and its vjp."""

import inspect

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from backends import BACKENDS, to_numpy
from models import MODELS, QUICK, rows

from jaxwrap import FlaxLayer

pytestmark = [pytest.mark.each_jax, pytest.mark.lowered]

HALF = {"float16": 4e-3, "bfloat16": 3e-2}


def assert_close(actual, expected, what, tolerance):
    actual, expected = jax.tree.flatten(to_numpy(actual)), jax.tree.flatten(expected)
    assert actual[1] == expected[1], what
    for one, two in zip(actual[0], expected[0], strict=True):
        one, two = np.asarray(one), np.asarray(two)
        assert one.dtype == two.dtype, what
        assert one.shape == two.shape, what
        if jnp.issubdtype(one.dtype, np.inexact):
            allowed = HALF.get(str(one.dtype), tolerance)
            np.testing.assert_allclose(
                one.astype("float32"), two.astype("float32"), allowed, allowed, err_msg=what
            )
        else:
            np.testing.assert_array_equal(one, two, err_msg=what)


class Oracle:
    """The unwrapped `call_fn` of a layer, at the values that its variables have now."""

    def __init__(self, layer, inputs, training):
        values = jax.tree.map(self._value, (layer.params, layer.state))
        self._params, self._state = values
        self._layer, self._training = layer, training
        self._inputs = inputs = jax.tree.map(jnp.asarray, inputs)
        self._key = None
        if layer.seed_generator is not None:
            key = jnp.asarray(to_numpy(layer.seed_generator.state.value).astype("uint32"))
            self._key = key
        self._floats = [
            leaf
            for leaf in jax.tree.leaves((self._params, inputs))
            if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, np.inexact)
        ]

    @staticmethod
    def _value(leaf):
        if not isinstance(leaf, keras.Variable):
            return leaf
        return jnp.asarray(to_numpy(leaf.value), leaf.dtype)

    def _call(self, floats):
        remaining = iter(floats)
        params, inputs = jax.tree.map(
            lambda leaf: (
                next(remaining)
                if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, np.inexact)
                else leaf
            ),
            (self._params, self._inputs),
        )
        if isinstance(self._layer, FlaxLayer):
            return self._apply(params, inputs)
        values = {
            "params": params,
            "state": self._state,
            "rng": self._key if self._training else None,
            "inputs": inputs,
            "training": self._training,
        }
        names = inspect.signature(self._layer.call_fn).parameters
        result = self._layer.call_fn(**{name: values[name] for name in names})
        return result if "state" in names else (result, None)

    def _apply(self, params, inputs):
        """Native Flax."""
        module, method = self._layer.module, self._layer.method
        bound = getattr(module, method) if isinstance(method, str) else method or module.__call__
        values = {
            "training": self._training,
            "deterministic": not self._training,
            "use_running_average": not self._training,
        }
        names = inspect.signature(bound).parameters
        flag = {name: value for name, value in values.items() if name in names}
        streams = {}
        if self._key is not None:
            streams = {"dropout": self._key, "params": jax.random.fold_in(self._key, 1)}
        outputs, state = module.apply(
            {**params, **self._state},
            inputs,
            rngs=streams,
            method=method,
            mutable=list(self._state),
            **flag,
        )
        return outputs, dict(state)

    def __call__(self):
        """Outputs, new state, one cotangent for each output (None for ints), and the gradients."""
        rng = np.random.default_rng(7)
        outputs, new_state = self._call(self._floats)
        cotangents = [
            rng.standard_normal(leaf.shape).astype(leaf.dtype)
            if jnp.issubdtype(leaf.dtype, np.inexact)
            else None
            for leaf in jax.tree.leaves(outputs)
        ]

        def floats_of(floats):
            leaves = jax.tree.leaves(self._call(floats)[0])
            return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, np.inexact)]

        _, pullback = jax.vjp(floats_of, self._floats)
        (gradients,) = pullback([jnp.asarray(c) for c in cotangents if c is not None])
        return outputs, new_state, cotangents, gradients


# Where the batch size is known, all graphs get the same function.
CASES = [
    pytest.param(name, mode, marks=[pytest.mark.quick] * (name in QUICK))
    for name in MODELS
    for mode in BACKENDS[keras.config.backend()].modes
    if name in QUICK or mode not in ("graph", "xla")
]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_values_gradients_and_state(name, training, mode, backend):
    model = MODELS[name]
    inputs = model.inputs(np.random.default_rng(1), 3)
    layer = model.make(seed=11)
    layer(inputs)  # builds it
    for step in range(2):  # the second from a state, and a seed, that the first has left
        outputs, new_state, cotangents, gradients = Oracle(layer, inputs, training)()
        actual, actual_gradients = backend.layer_vjp(layer, inputs, training, cotangents, mode)
        assert_close(actual, outputs, f"outputs of step {step}", model.tolerance)
        state = jax.tree.map(lambda v: v.value, layer.state)
        assert_close(state, new_state, f"state after step {step}", model.tolerance)
        if backend.trains:
            variables, floats = actual_gradients
            for index, (one, two) in enumerate(zip([*variables, *floats], gradients, strict=True)):
                if one is None:  # what the backend says of an argument that nothing depends on
                    one = np.zeros(two.shape, two.dtype)
                assert_close(one, two, f"gradient {index} of step {step}", model.tolerance)


@pytest.mark.parametrize("name", rows(MODELS, QUICK))
def test_symbolic_outputs_are_those_of_a_call(name):
    model = MODELS[name]
    inputs = model.inputs(np.random.default_rng(1), 3)
    layer = model.make()
    symbols = jax.tree.map(lambda x: keras.KerasTensor((None, *x.shape[1:]), str(x.dtype)), inputs)
    expected = layer(symbols)
    outputs = layer(inputs)
    assert jax.tree.structure(expected) == jax.tree.structure(outputs)
    for symbol, output in zip(jax.tree.leaves(expected), jax.tree.leaves(outputs), strict=True):
        assert symbol.dtype == keras.backend.standardize_dtype(output.dtype)
        sizes = [b if a is None else a for a, b in zip(symbol.shape, output.shape, strict=True)]
        assert sizes == list(output.shape)
        if 3 in output.shape[:1] and len(output.shape) > 1:
            assert symbol.shape[0] is None
