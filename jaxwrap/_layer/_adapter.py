"""`Adapter`: a model of some JAX library, as a layer needs it."""

from __future__ import annotations

import abc
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxwrap._pytree import is_leaf_array, path_str
from jaxwrap._serialization import deserialize, serialize_callable
from jaxwrap._tracing import explained
from jaxwrap._typing import Array, PyTree


@dataclasses.dataclass(frozen=True)
class CallResult:
    """The result of one call of a model: the outputs, and what else the layer passes on to Keras.

    A `call_fn` may return it instead of its outputs, or of `(outputs, new_state)`.

    Attributes:
        outputs: The outputs, a pytree of arrays.
        state: The new state, of the structure and shapes of the old one. None for a model without state.
        losses: A pytree of arrays. Their sum is added to the model's loss. The model also reports those of a dict, as
            `layer/name`.
        metrics: A dict of arrays. The model reports their means under these names, averaged over batches.

    Example:
        >>> import jax.numpy as jnp, numpy as np, jaxwrap
        >>> def call(params, inputs):
        ...     return jaxwrap.CallResult(inputs * params, losses=0.01 * jnp.abs(params))
        >>> layer = jaxwrap.JaxLayer(call, params=-2.0)
        >>> _ = layer(np.ones(3, "float32"))
        >>> len(layer.losses)
        1
    """

    outputs: PyTree
    state: PyTree = None
    losses: PyTree = None
    metrics: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    def finished(self) -> CallResult:
        """Check the outputs, and sum up losses and metrics, each to a float32 scalar.

        Raises:
            TypeError: If an output is not an array.
            ValueError: If a loss and a metric have the same name.
        """
        named = self.losses if isinstance(self.losses, Mapping) else {}
        if twice := [name for name in named if name in self.metrics]:
            raise ValueError(
                f"the model returns a loss and a metric of the name {twice[0]!r}. Give them different names."
            )
        totals = {str(name): _total(loss) for name, loss in named.items()}
        means = {name: jnp.mean(value).astype(jnp.float32) for name, value in self.metrics.items()}
        return CallResult(
            jax.tree_util.tree_map_with_path(_to_array, self.outputs),
            self.state,
            # In float32, whatever the compute dtype: sums in 16 bits lose digits, and overflow.
            _total(self.losses),
            means | {name: total for name, total in totals.items() if total is not None},
        )


class Adapter(abc.ABC):
    """A model of some JAX library, as a Keras layer needs it. Subclass it to support a library of your own.

    A subclass is a frozen dataclass. Its fields hold the model and its options. They are what a file holds, so they
    must be data, or objects that `register_serializable` knows. `init` and `call` are pure functions: JAX traces
    them, at any time and any number of times. All other methods have defaults.

    `jaxwrap.JaxLayer(adapter)` makes a layer, and `register_adapter` teaches `jaxwrap.wrap` to do so.
    `jaxwrap.testing.check_adapter` checks that an adapter keeps this contract.

    Attributes:
        draws: When `call` gets keys: "never", "in training" or "always". In inference a seed moves on only if the
            result depends on the keys. With "never" the layer does not have a seed.

    Example:
        >>> import dataclasses, jax, numpy as np, jaxwrap
        >>> from typing import Any
        >>> from jax.example_libraries import stax
        >>> @dataclasses.dataclass(frozen=True)
        ... class Stax(jaxwrap.Adapter):
        ...     model: Any
        ...
        ...     def init(self, keys, inputs):
        ...         init_fun, _ = self.model
        ...         return init_fun(keys, inputs.shape)[1], None
        ...
        ...     def call(self, params, state, keys, inputs, training):
        ...         _, apply_fun = self.model
        ...         return jaxwrap.CallResult(apply_fun(params, inputs, rng=keys))
        >>> layer = jaxwrap.JaxLayer(Stax(stax.serial(stax.Dense(3), stax.Relu)))
        >>> tuple(layer(np.ones((2, 4), "float32")).shape)
        (2, 3)
    """

    draws: ClassVar[Literal["never", "in training", "always"]] = "always"

    @abc.abstractmethod
    def init(self, keys: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
        """Make the initial values.

        Args:
            keys: A raw JAX key. If `streams` names streams, a dict with a key for each of them and for "params".
            inputs: The argument of the layer, an array or a nest of arrays of ones (zeros for integers and bools),
                with size 1 where a size is unknown. If `signature` names arguments, a dict of them.

        Returns:
            `(params, state)`, pytrees. None for a model that does not have one of them.
        """

    @abc.abstractmethod
    def call(
        self, params: PyTree, state: PyTree, keys: PyTree, inputs: PyTree, training: bool
    ) -> CallResult:
        """Compute the model.

        Args:
            params: The parameters, of the structure that `init` returned.
            state: The state, likewise.
            keys: As for `init`, without "params". None where `draws` says that there are no keys.
            inputs: As for `init`, with the values of the call.
            training: Whether this is a call in training.

        Returns:
            The outputs and the new state, in a `CallResult`.
        """

    def initial(self) -> tuple[PyTree, PyTree] | None:
        """Return `(params, state)` if the model has its values already, or None if `init` makes them."""
        return None

    def unbox(self, params: PyTree, state: PyTree) -> tuple[tuple[PyTree, PyTree], Any]:
        """Take the library's own boxes with metadata off the arrays, and return the names of their axes.

        Args:
            params: The parameters, as `init`, `initial` and `split` return them.
            state: The state, likewise.

        Returns:
            `(params, state)` without boxes, as `call` takes them, and the names: None, or two pytrees like those, each
            with a `jax.sharding.PartitionSpec` for every leaf, or for every leaf below it.
        """
        return (params, state), None

    def signature(self) -> inspect.Signature | None:
        """Return the arguments that the caller of the layer passes, without the train flag.

        None, the default, stands for one argument, `inputs`. Otherwise `init` and `call` get a dict of the arguments
        by name.
        """
        return None

    def streams(self) -> Mapping[str, int | None] | None:
        """Return the names of the RNG streams, each with a seed of its own, or None for the layer's seed.

        None, the default, stands for one stream, whose key is passed as it is.
        """
        return None

    def join(self, params: PyTree, state: PyTree) -> PyTree:
        """Make one pytree of both, as the library has it. It names the leaves and is what users read and write."""
        parts = {"params": params, "state": state}
        return {name: part for name, part in parts.items() if part is not None}

    def split(self, variables: Any) -> tuple[PyTree, PyTree]:
        """Split what `join` returns.

        Raises:
            ValueError: If the pytree has other parts than `params` and `state`.
        """
        if not isinstance(variables, Mapping):
            raise ValueError(
                f"expected a dict, as `get_variables` returns it; received a {type(variables).__name__}."
            )
        if unknown := set(variables) - {"params", "state"}:
            raise ValueError(
                f"expected a dict with `params` and `state`; received {sorted(map(str, unknown))} in it."
            )
        return variables.get("params"), variables.get("state")

    def checkpoint_tree(self, params: PyTree, state: PyTree) -> PyTree:
        """Return the pytree whose leaves a checkpoint of the library holds."""
        return self.join(params, state)

    def __str__(self) -> str:
        """Return the name of the function or the class that the first field holds."""
        first, *_ = dataclasses.fields(self)  # type: ignore[arg-type]
        model = getattr(self, first.name)
        return getattr(model, "__qualname__", type(model).__qualname__)

    def get_config(self) -> dict[str, Any]:
        """Return the fields as JSON.

        Raises:
            TypeError: If a field cannot be saved. The error names it and the fix.
        """
        return {
            field.name: serialize_callable(getattr(self, field.name), field.name)
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
        }

    @classmethod
    def fields_from_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of the fields from the result of `get_config`. The place to check what a file names."""
        return {name: deserialize(value, name) for name, value in config.items()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Adapter:
        """Make an adapter from the result of `get_config`."""
        return cls(**cls.fields_from_config(config))


def _to_array(path: Any, output: Any) -> Array:
    if not is_leaf_array(output):
        raise TypeError(
            f"the model returned {output!r}, a {type(output).__name__}, as output {path_str(path)}; expected arrays."
        )
    return jnp.asarray(output)


def _total(losses: PyTree) -> Array | None:
    leaves = jax.tree_util.tree_leaves(losses)
    if not leaves:
        return None
    return sum(jnp.sum(leaf).astype(jnp.float32) for leaf in leaves)


def call_adapter(
    adapter: Adapter, *arguments: Any, names: Mapping[str, str] | None = None
) -> CallResult:
    """Call the model, and check its result.

    Raises:
        TypeError: If it is not a `CallResult` of arrays.
    """
    with explained(names):
        result = adapter.call(*arguments)
    if not isinstance(result, CallResult):
        raise TypeError(
            f"`{type(adapter).__name__}.call` must return a `jaxwrap.CallResult`; it returned a "
            f"{type(result).__name__}."
        )
    return result.finished()
