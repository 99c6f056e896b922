"""JaxLayer: a pure `init_fn` / `call_fn` pair as a Keras layer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from jaxwrap._bridge import get_bridge
from jaxwrap._function import PytreeFunction
from jaxwrap._pure import PureFunctions
from jaxwrap._pytree import describe_difference, is_leaf_array, partition, path_str
from jaxwrap._rng import draw, init_seed, to_key
from jaxwrap._specs import (
    Spec,
    abstract_call,
    is_plain,
    placeholders,
    read_specs,
    specs_from_shapes,
)
from jaxwrap._typing import PyTree
from jaxwrap._variables import Leaves

# The name of the seed in a weights file.
_SEED = "seed"


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
        pure = PureFunctions(call_fn, init_fn, owner)
        if pure.variables and init_fn is None and params is None and state is None:
            wanted = " and ".join(f"`{name}`" for name in pure.variables)
            raise ValueError(
                f"{owner}: `call_fn` takes {wanted}, but `init_fn`, `params` and `state` are all None. Give `init_fn` "
                "to make them when the layer is built, or give their values."
            )
        if seed is not None and not isinstance(seed, int):
            raise ValueError(f"{owner}: `seed` must be an integer or None; received {seed!r}.")
        super().__init__(**kwargs)
        self.call_fn = call_fn
        self.init_fn = init_fn
        self._pure = pure
        self._seed = seed
        self._platforms = tuple(native_serialization_platforms or ()) or None
        self._keep_dtypes = kwargs.get("dtype") is None
        self._base_seed = random.randint(1, 10**9) if seed is None else seed
        self._init_draws = 0
        with keras.name_scope(self.name, caller=self):
            self.seed_generator = (
                keras.random.SeedGenerator(self._base_seed, name="seed_generator")
                if pure.has_rng
                else None
            )
        self._opaque_call = get_bridge().opaque(self._checked_call)
        self._function = PytreeFunction(self._call_flat, self._owner, self._platforms)
        self._keep("_input_specs", None)
        self._keep("_nests", set())
        self._keep("_leaves", None)
        if params is not None or state is not None or not pure.variables:
            self._create_leaves(params, state)

    @property
    def params(self) -> PyTree:
        """The trainable parameters as the user's pytree, with a `keras.Variable` for each array or number."""
        return self._leaves[0].tree if self._leaves else None

    @property
    def state(self) -> PyTree:
        """The non-trainable state as the user's pytree, with a `keras.Variable` for each array or number."""
        return self._leaves[1].tree if self._leaves else None

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
        assert self.seed_generator is not None, "`call_fn` takes no `rng`"
        return self.seed_generator.next()

    def _get_call_rng(self, training: bool) -> PyTree:
        """What `call_fn` gets as `rng`: a pytree of seeds from `_get_call_seed`, which become keys."""
        return self._get_call_seed() if training else None

    def _variable_roots(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names that go before the paths of the leaves of `params`, and of `state`."""
        return ("params",), ("state",)

    # Building.

    def __call__(self, inputs: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        """Calls the layer, as every Keras layer is called."""
        return self._opaque_call(inputs, *args, **kwargs)

    def _checked_call(self, inputs: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        # Keras hands `build` shapes only, and its own errors come after it has changed things.
        specs = read_specs(inputs, self._read_spec, self._owner)
        if not self.built:
            self._keep("_input_specs", jax.tree_util.tree_map(self._seen_by_init, specs))
        return super().__call__(inputs, *args, **kwargs)

    def build(self, input_shape: Any) -> None:
        """Creates the variables, if they were not given.

        Args:
            input_shape: The shape of the inputs, or a nest of shapes.
        """
        if self._input_specs is None:
            specs = specs_from_shapes(input_shape, self.variable_dtype, self._owner)
            self._keep("_input_specs", specs)
        if self._leaves is None:
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
        if self._input_specs is None or not is_plain(self._input_specs):
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

    def _keep(self, name: str, tree: PyTree) -> None:
        """Sets an attribute to a pytree as it is: Keras would wrap containers, and JAX not know them any more."""
        object.__setattr__(self, name, tree)

    def _read_spec(self, tensor: Any) -> tuple[Any, str]:
        if isinstance(tensor, keras.KerasTensor):
            return tensor.shape, tensor.dtype
        return get_bridge().spec(tensor)

    def _seen_by_init(self, spec: Spec) -> Spec:
        """What Keras casts for each call, `init_fn` sees at the precision of the variables."""
        if self.autocast and jnp.issubdtype(spec.dtype, jnp.floating):
            return Spec(spec.shape, self.variable_dtype)
        return spec

    def _init(self, inputs: PyTree) -> tuple[PyTree, PyTree]:
        rng = jax.tree_util.tree_map(to_key, self._get_init_rng())
        return self._pure.init(rng, inputs)

    def _create_leaves(self, params: PyTree, state: PyTree) -> None:
        roots = self._variable_roots()
        leaves = tuple(
            Leaves(self, tree, root=root, trainable=trainable, keep_dtypes=self._keep_dtypes)
            for tree, root, trainable in zip((params, state), roots, (True, False), strict=True)
        )
        self._keep("_leaves", leaves)
        self.tracked_params, self.tracked_state = (part.variables for part in leaves)

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
        self._check_nest(inputs, bool(training))
        params, state = (leaves.variables for leaves in self._leaves)
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
        specs = read_specs(inputs, self._read_spec, self._owner)
        return jax.tree_util.tree_map(
            lambda spec: keras.KerasTensor(spec.shape, spec.dtype),
            self._output_specs(specs, bool(training)),
        )

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape of the outputs, or the nest of them, for inputs of the variable dtype."""
        specs = specs_from_shapes(input_shape, self.variable_dtype, self._owner)
        return jax.tree_util.tree_map(lambda spec: spec.shape, self._output_specs(specs, False))

    def _output_specs(self, specs: PyTree, training: bool) -> PyTree:
        rng, _ = self._draw(training)

        def outputs_of(inputs: PyTree) -> PyTree:
            keys = jax.tree_util.tree_map(lambda _: jnp.zeros(2, jnp.uint32), rng)
            if self._leaves is None:
                params, state = self._init(inputs)
            else:
                params, state = (leaves.zeros(self.compute_dtype) for leaves in self._leaves)
            return self._pure.call(params, state, keys, inputs, training)[0]

        return abstract_call(outputs_of, specs)

    def _check_nest(self, inputs: PyTree, training: bool) -> None:
        """Tries inputs of another structure than the layer was built for, before anything is drawn or assigned."""
        _, received = partition(inputs, is_leaf_array)
        if received in self._nests:
            return
        _, built = partition(self._input_specs, lambda leaf: isinstance(leaf, Spec))
        if received != built:
            try:
                self._output_specs(read_specs(inputs, self._read_spec, self._owner), training)
            except Exception as error:
                difference = describe_difference(built, received) or "  other containers"
                raise ValueError(
                    f"{self._owner}: `call_fn` fails for these inputs, whose structure is not the one that the layer "
                    f"was built for:\n{difference}\nIt raised {type(error).__name__}: {error}"
                ) from error
        self._nests.add(received)

    def _draw(self, training: bool) -> tuple[PyTree, list[tuple[keras.Variable, Any]]]:
        """Draws the seeds of one call, and returns them with the updates to assign once the call has succeeded."""
        if self.seed_generator is None:
            return None, []
        return draw(self.seed_generator.state, lambda: self._get_call_rng(training))

    def _call_flat(
        self, differentiable: PyTree, constant: PyTree, state: PyTree
    ) -> tuple[PyTree, PyTree]:
        """`call_fn` on lists of arrays, as it is bridged to the backend."""
        trained, frozen = iter(differentiable["params"]), iter(constant["frozen"])
        params = [
            next(trained) if is_trained else next(frozen) for is_trained in constant["trained"]
        ]
        outputs, new_state = self._pure.call(
            self._leaves[0].decode(params),
            self._leaves[1].decode(state),
            jax.tree_util.tree_map(to_key, constant["rng"]),
            differentiable["inputs"],
            constant["training"],
        )
        return outputs, self._leaves[1].encode(new_state, self._owner)

    # Saving.

    def get_config(self) -> dict[str, Any]:
        """The configuration; Keras has to be able to serialize the functions, so register them."""
        return {
            **super().get_config(),
            **self._function_config(),
            "seed": self._seed,
            "native_serialization_platforms": self._platforms,
        }

    def _function_config(self) -> dict[str, Any]:
        """The part of the configuration from which the functions are made again."""
        return {
            "call_fn": keras.saving.serialize_keras_object(self.call_fn),
            "init_fn": keras.saving.serialize_keras_object(self.init_fn),
        }

    def save_own_variables(self, store: Any) -> None:
        """Stores the values of the variables, and the seed with its counter, which Keras leaves out."""
        super().save_own_variables(store)
        if self.seed_generator is not None:
            store[_SEED] = keras.ops.convert_to_numpy(self.seed_generator.state.value).astype(
                "int64"
            )

    def load_own_variables(self, store: Any) -> None:
        """Loads what `save_own_variables` stored. A file without a seed leaves the layer's own."""
        super().load_own_variables({name: store[name] for name in store.keys() if name != _SEED})  # noqa: SIM118
        if self.seed_generator is not None and _SEED in store.keys():  # noqa: SIM118
            self.seed_generator.state.assign(np.asarray(store[_SEED]).astype("uint32"))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> JaxLayer:
        """Makes a layer from what `get_config` gave."""
        functions = {
            name: keras.saving.deserialize_keras_object(config[name])
            for name in ("call_fn", "init_fn")
        }
        return super().from_config({**config, **functions})
