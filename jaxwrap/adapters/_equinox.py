"""Equinox modules."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras

from jaxwrap._pytree import is_array
from jaxwrap._rng import init_seed, to_key
from jaxwrap._serialization import Weight, serialize
from jaxwrap._signature import AUTO, check_types
from jaxwrap._typing import PyTree
from jaxwrap.adapters._module import ModuleLayer, require


@keras.saving.register_keras_serializable(package="jaxwrap")
class EquinoxLayer(ModuleLayer):
    """A Keras layer that computes an Equinox module, on every Keras backend.

    Arrays in the module become the weights; the module itself never changes. Everything else in it stays what it is.
    Arrays that stand in several places are one weight. A call is in inference mode, `eqx.nn.inference_mode`, unless
    it is one of training. The layer takes the arguments that the module takes, tensors by position or by keyword,
    other values by keyword. If the module takes `key`, it gets a new one at each call.

    Args:
        module: An Equinox module, or any callable pytree.
        state: The state of a stateful module, from `eqx.nn.make_with_state`. The module is then called with `state`,
            and returns its outputs and the new state.
        filter_spec: Which arrays are trained: a function of a leaf, or a pytree of bools, as `eqx.filter` takes it. By
            default those of inexact dtype.
        batch: Whether the module is written for one example. It is then mapped over the first axis of all tensors
            by `jax.vmap`, with a key for each example, and one state, under the axis name of its `BatchNorm` layers.
        training_argument: The train flag of the module's `__call__`, if it has one: see `FlaxLayer`. With None the
            module stays in the mode it is in.
        factory: In the place of `module` and `state`, which are then None: see `from_factory`.
        **kwargs: What `JaxLayer` takes beside its functions and values: `seed`, `rules`, `name`, `dtype`, ...

    Attributes:
        module: The module.

    Raises:
        TypeError: If the module cannot be called.

    Example:
        >>> import equinox as eqx, jax, numpy as np, jaxwrap
        >>> mlp = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
        >>> layer = jaxwrap.EquinoxLayer(mlp, batch=True, name="mlp")
        >>> tuple(layer(np.ones((3, 4), "float32")).shape)
        (3, 2)
        >>> layer.trainable_variables[0].path
        'mlp/params/layers/0/weight'
    """

    _serialized = (*ModuleLayer._serialized, "module", "factory", "filter_spec")

    def __init__(
        self,
        module: Any,
        state: PyTree = None,
        *,
        filter_spec: Any = None,
        batch: bool = False,
        training_argument: str | None = AUTO,
        factory: Callable[..., Any] | None = None,
        **kwargs: Any,
    ):
        owner = self._describe(kwargs.get("name"))
        require("equinox", "0.11", "equinox", owner)
        import equinox as eqx

        check_types(owner, batch=(batch, "a bool"))
        if factory is not None:
            module, state = _make(factory, kwargs.get("seed"), kwargs.get("key_impl"))
        if not callable(module):
            raise TypeError(
                f"{owner}: expected an Equinox module that can be called; received {module!r}."
            )
        self._keep("module", module)
        self._keep("_factory", factory)
        self._keep("_filter_spec", filter_spec)
        self.batch = batch
        self._module_argument = training_argument
        parameters = inspect.signature(module).parameters
        if training_argument == AUTO and "inference" in parameters:
            training_argument = "!inference"  # beside which some modules have an old name for it
        own = [name for name in ("key", "state") if name in parameters]
        if state is None and "state" in own:
            own.remove("state")
        self._takes(parameters, training_argument, own)
        self._keep("_own", own)
        leaves, treedef = jax.tree_util.tree_flatten(module)
        spec = eqx.is_inexact_array if filter_spec is None else filter_spec
        chosen = treedef.flatten_up_to(eqx.filter(module, spec))
        self._keep("_treedef", treedef)
        self._keep("_static", [None if is_array(leaf) else leaf for leaf in leaves])
        self._keep("_first", _first_places(leaves))
        arrays = {self._first[place] for place, leaf in enumerate(leaves) if is_array(leaf)}
        trained = arrays & {
            self._first[place] for place, leaf in enumerate(chosen) if leaf is not None
        }
        params, rest = (
            treedef.unflatten(
                [leaf if place in kept else None for place, leaf in enumerate(leaves)]
            )
            for kept in (trained, arrays - trained)
        )
        super().__init__(
            self._call, params=params, state={"module": rest, "state": state}, **kwargs
        )

    @classmethod
    def from_factory(cls, factory: Callable[..., Any], **kwargs: Any) -> EquinoxLayer:
        """Makes a layer of the module that `factory(key)` returns, made at once with the layer's seed.

        A registered factory is how a layer is saved whose module is stateful, or of classes that are not registered.

        Args:
            factory: Takes a JAX key, as `key` if it has an argument of that name, and returns an Equinox module, or
                the module and its state.
            **kwargs: What the constructor takes beside the module and its state.

        Example:
            >>> import equinox as eqx, jaxwrap
            >>> def make(key):
            ...     return eqx.nn.MLP(4, 2, 8, 1, key=key)
            >>> layer = jaxwrap.EquinoxLayer.from_factory(make, batch=True, seed=0)
            >>> len(layer.trainable_variables)
            4
        """
        return cls(None, factory=factory, **kwargs)

    def module_with_weights(self) -> Any:
        """A new module that holds the present values of the weights; for a stateful one, the module and the state."""
        variables = jax.tree_util.tree_map(
            lambda leaf: jnp.asarray(leaf) if is_array(leaf) else leaf, self.get_variables()
        )
        module = self._join(variables["params"], variables["state"]["module"])
        state = variables["state"]["state"]
        return module if state is None else (module, state)

    def _join(self, params: PyTree, rest: PyTree) -> Any:
        """The module with these arrays in it."""
        parts = zip(
            self._treedef.flatten_up_to(params),
            self._treedef.flatten_up_to(rest),
            self._static,
            strict=True,
        )
        leaves = [next((leaf for leaf in part if leaf is not None), None) for part in parts]
        return self._treedef.unflatten([leaves[first] for first in self._first])

    def _call(
        self, params: PyTree, state: PyTree, rng: PyTree, inputs: dict[str, PyTree], training: bool
    ) -> tuple[PyTree, PyTree]:
        import equinox as eqx

        module = self._join(params, state["module"])
        if self._module_argument is not None:
            module = eqx.nn.inference_mode(module, value=not training)
        stateful = "state" in self._own

        def call(inputs: dict[str, PyTree], key: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
            own = {name: {"key": key, "state": state}[name] for name in self._own}
            outputs = self._call_with(module, inputs, training, **own)
            return outputs if stateful else (outputs, state)

        if not self.batch:
            outputs, new = call(inputs, rng, state["state"])
        else:
            arrays = filter(is_array, jax.tree_util.tree_leaves(inputs))
            mapped = eqx.filter_vmap(
                call,
                in_axes=(eqx.if_array(0), 0, None),
                out_axes=(0, None),
                axis_name=_axis_name(module),
            )
            keys = jax.random.split(rng, next(arrays).shape[0])
            outputs, new = mapped(inputs, keys, state["state"])
        return outputs, {**state, "state": new}

    def _checkpoint_tree(self) -> PyTree:
        params, state = self._leaf_paths()
        module = self._join(params, state["module"])
        return module if state["state"] is None else (module, state["state"])

    def _get_call_rng(self, training: bool) -> PyTree:
        return self._get_call_seed()

    def _function_config(self) -> dict[str, Any]:
        config = {
            "batch": self.batch,
            "training_argument": self._module_argument,
            "filter_spec": serialize(self._filter_spec, "filter_spec", self._owner),
        }
        if self._factory is not None:
            return {
                **config,
                "module": None,
                "factory": serialize(self._factory, "factory", self._owner),
            }
        if "state" in self._own:
            raise TypeError(
                f"{self._owner} cannot be saved: the state of a stateful module is no data. Make the layer with "
                "`EquinoxLayer.from_factory(make)`, where `make(key)` is a function that returns the module and the "
                'state, registered by `@jaxwrap.register_serializable("my_package")`.'
            )
        leaves, treedef = jax.tree_util.tree_flatten(self.module)
        stored = [
            _weight(leaf, first) if is_array(leaf) else leaf
            for leaf, first in zip(leaves, self._first, strict=True)
        ]
        return {
            **config,
            "module": serialize(treedef.unflatten(stored), "module", self._owner),
        }


def _weight(array: Any, index: int) -> Weight:
    """What a config holds of an array of a module."""
    impl = None
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        impl, array = str(jax.random.key_impl(array)), jax.random.key_data(array)
    return Weight(
        tuple(array.shape), array.dtype.name, impl, index, not isinstance(array, jax.Array)
    )


def _make(factory: Callable[..., Any], seed: int | None, impl: str | None) -> tuple[Any, Any]:
    """What a factory makes: the module, and its state or None."""
    key = to_key(init_seed(random.randint(1, 10**9) if seed is None else seed, 0), impl)
    named = "key" in inspect.signature(factory).parameters
    made = factory(key=key) if named else factory(key)
    return made if isinstance(made, tuple) else (made, None)


def _first_places(leaves: list[Any]) -> list[int]:
    """For each leaf, where the same array stands first."""
    seen: dict[int, int] = {}
    return [
        seen.setdefault(id(leaf), place) if is_array(leaf) else place
        for place, leaf in enumerate(leaves)
    ]


def _axis_name(module: Any) -> Any:
    """The axis over which the module's normalizations take their means."""
    import equinox as eqx

    def is_norm(node: Any) -> bool:
        return isinstance(node, eqx.nn.BatchNorm)

    nodes = jax.tree_util.tree_leaves(module, is_leaf=is_norm)
    return next((node.axis_name for node in nodes if is_norm(node)), None)
