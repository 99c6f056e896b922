"""JaxLayer: a pure `init_fn` / `call_fn` pair as a Keras layer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras

from jaxwrap._bridge import get_bridge
from jaxwrap._function import PytreeFunction
from jaxwrap._pytree import describe_difference, partition, path_str
from jaxwrap._rng import init_seed, to_key
from jaxwrap._signature import Signature
from jaxwrap._specs import Spec, abstract_call, placeholders, read_specs, specs_from_shapes
from jaxwrap._typing import PyTree
from jaxwrap._variables import Leaves, is_leaf_array

_CALL_ARGUMENTS = ("params", "state", "rng", "inputs", "training")
_INIT_ARGUMENTS = ("rng", "inputs", "training")


@keras.saving.register_keras_serializable(package="jaxwrap")
class JaxLayer(keras.layers.Layer):
    """A Keras layer that computes a pure JAX function, on every Keras backend.

    The contract is that of `keras.layers.JaxLayer`. `call_fn` takes any of these arguments, by these names, in any
    order:

    - `params`: the trainable parameters, a pytree.
    - `state`: the non-trainable state, a pytree. `call_fn` then returns `(outputs, new_state)`, the new state of the
      structure of the old one.
    - `rng`: a key as `jax.random.PRNGKey` makes it, new at every call in training; None in inference.
    - `inputs` (required): one array, or any nest of arrays.
    - `training`: a Python bool.

    `init_fn`, which makes the initial values when the layer is built, takes `rng`, `inputs` (required; ones, or zeros
    for integers and bools, of the shape and dtype of the inputs, with 1 for an unknown size) and `training` (True). It
    returns `params`, or `(params, state)` if `call_fn` takes `state`.

    Every leaf of `params` and `state` that is an array or a number becomes a Keras variable, named by its path. Other
    leaves reach `call_fn` as they are. Float32 leaves take the layer's variable dtype; other leaves keep their dtype,
    unless `dtype=` is given, which rules all float leaves. State is never cast for mixed precision.

    Args:
        call_fn: The function to wrap.
        init_fn: Makes the initial `params` (and `state`). May be left out if `params` or `state` is given.
        params: Initial trainable parameters. They are copied.
        state: Initial non-trainable state. It is copied.
        seed: An integer from which initial values and the keys of `rng` are made; None draws one, repeatably under
            `keras.utils.set_random_seed`.
        native_serialization_platforms: The platforms ("cpu", "cuda", "rocm", "tpu") that a TensorFlow graph of this
            layer is to run on; None for the present one. Other backends ignore it.
        **kwargs: What every `keras.layers.Layer` takes: `name`, `dtype`, `trainable`, ...

    Attributes:
        params: The pytree given or made, with a `keras.Variable` for each array or number. None until built.
        state: Likewise.

    Raises:
        ValueError: If a function lacks a required argument or has an unknown one, or if `call_fn` takes `params` or
            `state` and there is no way to make them.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, jaxwrap
        >>> def init(rng, inputs):
        ...     return {"w": jax.random.normal(rng, (inputs.shape[-1], 2))}
        >>> def call(params, inputs):
        ...     return inputs @ params["w"]
        >>> layer = jaxwrap.JaxLayer(call, init, name="linear")
        >>> outputs = layer(np.ones((5, 3), "float32"))
        >>> tuple(outputs.shape), layer.params["w"].path
        ((5, 2), 'linear/params/w')
    """

    def __init__(
        self,
        call_fn: Callable[..., Any],
        init_fn: Callable[..., Any] | None = None,
        params: PyTree = None,
        state: PyTree = None,
        seed: int | None = None,
        native_serialization_platforms: Sequence[str] | None = None,
        **kwargs: Any,
    ):
        owner = f"{type(self).__name__} {kwargs.get('name') or getattr(call_fn, '__name__', '')!r}"
        call_signature = Signature(call_fn, "call_fn", _CALL_ARGUMENTS, ("inputs",), owner)
        init_signature = (
            Signature(init_fn, "init_fn", _INIT_ARGUMENTS, ("inputs",), owner) if init_fn else None
        )
        wants = [name for name in ("params", "state") if name in call_signature]
        if wants and init_fn is None and params is None and state is None:
            raise ValueError(
                f"{owner}: `call_fn` takes {' and '.join(f'`{name}`' for name in wants)}, but `init_fn`, `params` and "
                f"`state` are all None. Give `init_fn` to make them when the layer is built, or give their values."
            )
        if seed is not None and not isinstance(seed, int):
            raise ValueError(f"{owner}: `seed` must be an integer or None; received {seed!r}.")
        super().__init__(**kwargs)
        self.call_fn = call_fn
        self.init_fn = init_fn
        self._call_fn_signature = call_signature
        self._init_fn_signature = init_signature
        self._seed = seed
        self._platforms = tuple(native_serialization_platforms or ()) or None
        self._keep_dtypes = kwargs.get("dtype") is None
        self._base_seed = random.randint(1, 10**9) if seed is None else seed
        self._init_draws = 0
        self.seed_generator = (
            keras.random.SeedGenerator(self._base_seed) if "rng" in call_signature else None
        )
        self._function = PytreeFunction(self._call_flat, self._owner, self._platforms)
        self._keep("_input_specs", None)
        self._keep("_leaves", (None, None))
        if params is not None or state is not None:
            self._create_leaves(params, state)

    @property
    def params(self) -> PyTree:
        """The trainable parameters: the user's pytree, with a `keras.Variable` for each array or number."""
        return self._leaves[0].tree if self._leaves[0] else None

    @property
    def state(self) -> PyTree:
        """The non-trainable state: the user's pytree, with a `keras.Variable` for each array or number."""
        return self._leaves[1].tree if self._leaves[1] else None

    # What subclasses may override.

    def _get_init_seed(self) -> Any:
        """A new seed for initial values: integers of shape (2,)."""
        self._init_draws += 1
        return init_seed(self._base_seed, self._init_draws - 1)

    def _get_init_rng(self) -> PyTree:
        """What `init_fn` gets as `rng`: a pytree of seeds from `_get_init_seed`, which become keys."""
        return self._get_init_seed()

    def _get_call_seed(self) -> Any:
        """A new seed for one call: an integer tensor of shape (2,)."""
        return self.seed_generator.next()

    def _get_call_rng(self, training: bool) -> PyTree:
        """What `call_fn` gets as `rng`: a pytree of seeds from `_get_call_seed`, which become keys."""
        return self._get_call_seed() if training else None

    def _variable_roots(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names that go before the paths of the leaves of `params`, and of `state`."""
        return ("params",), ("state",)

    # Building.

    def __call__(self, inputs: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        # Keras hands `build` shapes only, and its own errors come after it has changed things.
        specs = read_specs(inputs, self._read_spec, self._owner)
        if not self.built:
            self._keep("_input_specs", specs)
        return super().__call__(inputs, *args, **kwargs)

    def build(self, input_shape: Any) -> None:
        """Creates the variables, if they were not given.

        Args:
            input_shape: The shape of the inputs, or a nest of shapes.
        """
        if self._input_specs is None:
            specs = specs_from_shapes(input_shape, self.variable_dtype, self._owner)
            self._keep("_input_specs", specs)
        if self._needs_init:
            with jax.ensure_compile_time_eval():
                params, state = self._init(placeholders(self._input_specs))
            traced = [
                path_str(path)
                for path, leaf in jax.tree_util.tree_leaves_with_path((params, state))
                if isinstance(leaf, jax.core.Tracer)
            ]
            if traced:
                raise ValueError(
                    f"{self._owner} is being built inside a JAX trace, and `init_fn` makes values that exist only in "
                    f"that trace ({', '.join(traced)}). Build it before: `layer.build(input_shape)`, or call it once "
                    "outside of `jax.jit`."
                )
            with jax.ensure_compile_time_eval():
                self._create_leaves(params, state)

    def get_build_config(self) -> dict[str, Any] | None:
        """The shapes and dtypes of the inputs that the layer was built for."""
        if self._input_specs is None or not _is_plain(self._input_specs):
            return None
        return {
            "input_shape": jax.tree_util.tree_map(lambda spec: spec.shape, self._input_specs),
            "input_dtype": jax.tree_util.tree_map(lambda spec: spec.dtype, self._input_specs),
        }

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds the layer for the shapes and dtypes that `get_build_config` gave."""
        shapes = config["input_shape"]
        dtypes = config.get("input_dtype", self.variable_dtype)
        self._keep("_input_specs", specs_from_shapes(shapes, dtypes, self._owner))
        self.build(shapes)

    @property
    def _owner(self) -> str:
        return f"{type(self).__name__} {self.name!r}"

    @property
    def _needs_init(self) -> bool:
        takes_variables = "params" in self._call_fn_signature or "state" in self._call_fn_signature
        return takes_variables and self._leaves == (None, None)

    def _keep(self, name: str, tree: PyTree) -> None:
        """Sets an attribute to a pytree as it is: Keras would wrap containers, and JAX not know them any more."""
        object.__setattr__(self, name, tree)

    def _read_spec(self, tensor: Any) -> tuple[Any, str]:
        if isinstance(tensor, keras.KerasTensor):
            shape, dtype = tensor.shape, tensor.dtype
        else:
            shape, dtype = get_bridge().spec(tensor)
        if self.autocast and keras.backend.is_float_dtype(dtype):
            # Keras casts it for each call; `init_fn` sees it at the precision of the variables.
            dtype = self.variable_dtype
        return shape, dtype

    def _init(self, inputs: PyTree) -> tuple[PyTree, PyTree]:
        """Calls `init_fn`, and returns `(params, state)`."""
        rng = jax.tree_util.tree_map(to_key, self._get_init_rng())
        values = {"rng": rng, "inputs": inputs, "training": True}
        made = self._init_fn_signature.call(self.init_fn, values)
        if "state" not in self._call_fn_signature:
            return made, None
        return self._pair(made, "init_fn", "(params, state)")

    def _create_leaves(self, params: PyTree, state: PyTree) -> None:
        roots = self._variable_roots()
        leaves = tuple(
            None
            if tree is None
            else Leaves(self, tree, root=root, trainable=trainable, keep_dtypes=self._keep_dtypes)
            for tree, root, trainable in zip((params, state), roots, (True, False), strict=True)
        )
        self._keep("_leaves", leaves)
        self.tracked_params, self.tracked_state = map(_variables, leaves)

    # Calling.

    def call(self, inputs: PyTree, training: bool = False) -> PyTree:
        """Calls `call_fn` and assigns the new state.

        Args:
            inputs: What `call_fn` gets as `inputs`.
            training: What `call_fn` gets as `training`.

        Returns:
            The outputs of `call_fn`, with tensors of the backend for arrays.

        Raises:
            ValueError: If the new state differs from the old in structure or shapes. No state is assigned then.
        """
        params, state = map(_variables, self._leaves)
        trained = [variable.trainable for variable in params]
        rng, updates = self._draw(bool(training))
        outputs, new_state = self._function(
            {
                "params": [variable.value for variable in params if variable.trainable],
                "inputs": inputs,
            },
            {
                "frozen": [variable.value for variable in params if not variable.trainable],
                "rng": rng,
                "training": bool(training),
                "trained": bytes(trained),
            },
            [variable.value for variable in state],
        )
        for variable, value in zip(state, new_state, strict=True):
            variable.assign(value)
        for variable, value in updates:
            variable.assign(value)
        return outputs

    def compute_output_spec(self, inputs: PyTree, training: bool = False) -> PyTree:
        """The shapes and dtypes of the outputs, by `jax.eval_shape`: on no backend does user code run on data.

        Args:
            inputs: A nest of `keras.KerasTensor`.
            training: As in `call`.

        Returns:
            The nest of the outputs, with a `keras.KerasTensor` for each.
        """
        rng, _ = self._draw(bool(training))

        def outputs_of(inputs: PyTree) -> PyTree:
            keys = jax.tree_util.tree_map(lambda _: jnp.zeros(2, jnp.uint32), rng)
            params, state = (
                self._init(inputs) if self._needs_init else map(self._zeros, self._leaves)
            )
            return self._compute(params, state, keys, inputs, bool(training))[0]

        specs = read_specs(inputs, lambda tensor: (tensor.shape, tensor.dtype), self._owner)
        return jax.tree_util.tree_map(
            lambda spec: keras.KerasTensor(spec.shape, spec.dtype), abstract_call(outputs_of, specs)
        )

    def _draw(self, training: bool) -> tuple[PyTree, list[tuple[keras.Variable, Any]]]:
        """Draws the seeds of one call, and returns them with the updates to assign once the call has succeeded."""
        if self.seed_generator is None:
            return None, []
        state = self.seed_generator.state
        with keras.StatelessScope(state_mapping=[(state, state.value)]) as scope:
            before = scope.get_current_value(state)
            rng = self._get_call_rng(training)
            after = scope.get_current_value(state)
        return rng, [] if after is before else [(state, after)]

    def _call_flat(
        self, differentiable: PyTree, constant: PyTree, state_values: PyTree
    ) -> tuple[PyTree, PyTree]:
        """`call_fn` on lists of arrays, as it is bridged to the backend."""
        trained, frozen = iter(differentiable["params"]), iter(constant["frozen"])
        arrays = (
            [next(trained) if is_trained else next(frozen) for is_trained in constant["trained"]],
            state_values,
        )
        params, state = (
            leaves and leaves.decode(values)
            for leaves, values in zip(self._leaves, arrays, strict=True)
        )
        rng = jax.tree_util.tree_map(to_key, constant["rng"])
        outputs, new_state = self._compute(
            params, state, rng, differentiable["inputs"], constant["training"]
        )
        return outputs, self._encode_state(new_state)

    def _compute(
        self, params: PyTree, state: PyTree, rng: PyTree, inputs: PyTree, training: bool
    ) -> tuple[PyTree, PyTree]:
        """Calls `call_fn` while JAX traces; returns `(outputs, new_state)`."""
        values = {
            "params": params,
            "state": state,
            "rng": rng,
            "inputs": inputs,
            "training": training,
        }
        result = self._call_fn_signature.call(self.call_fn, values)
        if "state" in self._call_fn_signature:
            outputs, new_state = self._pair(result, "call_fn", "(outputs, new_state)")
        else:
            outputs, new_state = result, None
        return jax.tree_util.tree_map_with_path(self._check_output, outputs), new_state

    def _encode_state(self, new_state: PyTree) -> list[Any]:
        """Checks a new state against the old; returns its arrays in the order of the variables."""
        old = self._leaves[1]
        values, received = partition(new_state, is_leaf_array)
        expected = old.structure if old else partition(None, is_leaf_array)[1]
        difference = describe_difference(expected, received)
        if difference is None and old:
            difference = "\n".join(
                f"  shape: {path} was {tuple(variable.shape)}, is {jnp.shape(value)}"
                for path, variable, value in zip(
                    expected.array_paths(), old.variables, old.raw(values), strict=True
                )
                if tuple(variable.shape) != jnp.shape(value)
            )
        if difference:
            raise ValueError(
                f"{self._owner}: the new state that `call_fn` returned differs from the state it was given. No state "
                f"has been changed. Return a state with the same paths and shapes.\n{difference}"
            )
        return old.encode(values) if old else []

    def _check_output(self, path: Any, output: Any) -> Any:
        if not is_leaf_array(output):
            raise TypeError(
                f"{self._owner}: `call_fn` returned {output!r}, a {type(output).__name__}, as output "
                f"{path_str(path)}; expected arrays."
            )
        return jnp.asarray(output)

    def _pair(self, result: Any, role: str, form: str) -> tuple[PyTree, PyTree]:
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise ValueError(
                f"{self._owner}: `call_fn` takes `state`, so `{role}` must return {form}; it returned a "
                f"{type(result).__name__}"
                + (f" of length {len(result)}." if isinstance(result, (tuple, list)) else ".")
            )
        return result[0], result[1]

    def _zeros(self, leaves: Leaves | None) -> PyTree:
        """The pytree as `call_fn` gets it, with zeros: for tracing."""
        if leaves is None:
            return None
        return leaves.decode([jnp.zeros(v.shape, self._value_dtype(v)) for v in leaves.variables])

    def _value_dtype(self, variable: keras.Variable) -> str:
        mixed = self.compute_dtype != self.variable_dtype
        if mixed and variable.autocast and keras.backend.is_float_dtype(variable.dtype):
            return self.compute_dtype
        return variable.dtype

    # Saving.

    def get_config(self) -> dict[str, Any]:
        """The configuration, with the functions serialized as Keras does: register them."""
        return {
            **super().get_config(),
            "call_fn": keras.saving.serialize_keras_object(self.call_fn),
            "init_fn": keras.saving.serialize_keras_object(self.init_fn),
            "seed": self._seed,
            "native_serialization_platforms": self._platforms,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> JaxLayer:
        """Makes a layer from what `get_config` gave."""
        functions = {
            name: keras.saving.deserialize_keras_object(config[name])
            for name in ("call_fn", "init_fn")
        }
        return super().from_config({**config, **functions})


def _variables(leaves: Leaves | None) -> list[keras.Variable]:
    return leaves.variables if leaves else []


def _is_plain(tree: PyTree) -> bool:
    """Whether a nest is of dicts, lists and tuples only, which a file can hold."""
    if type(tree) is dict:
        return all(isinstance(key, str) and _is_plain(value) for key, value in tree.items())
    return isinstance(tree, Spec) or (type(tree) in (list, tuple) and all(map(_is_plain, tree)))
