"""Equinox modules."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import keras

from jaxwrap._pytree import is_array
from jaxwrap._signature import AUTO
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

    def __init__(
        self,
        module: Any,
        state: PyTree = None,
        *,
        filter_spec: Any = None,
        batch: bool = False,
        training_argument: str | None = AUTO,
        **kwargs: Any,
    ):
        owner = self._describe(kwargs.get("name"))
        require("equinox", "0.11", "equinox", owner)
        import equinox as eqx

        if not callable(module):
            raise TypeError(
                f"{owner}: expected an Equinox module that can be called; received {module!r}."
            )
        self._keep("module", module)
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

    def _get_call_rng(self, training: bool) -> PyTree:
        return self._get_call_seed()

    def _function_config(self) -> dict[str, Any]:
        return {
            "module": keras.saving.serialize_keras_object(self.module),
            "batch": self.batch,
            "training_argument": self._module_argument,
        }

    @classmethod
    def _arguments_from_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        module = keras.saving.deserialize_keras_object(config["module"])
        return {**super()._arguments_from_config(config), "module": module}


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
