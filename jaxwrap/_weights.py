"""What every layer of ours does with its weights: names, rules, freezing, reading and writing them as a pytree."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import keras

from jaxwrap._rules import Rule, Rules, match
from jaxwrap._storage import load, save
from jaxwrap._tables import format_table
from jaxwrap._typing import PyTree
from jaxwrap._variables import Leaves, assign, check_rules, create_leaves


class WeightRow(NamedTuple):
    """One weight.

    Attributes:
        path: The path of the variable, with the name of the layer.
        shape: Its shape.
        dtype: The name of its dtype.
        trainable: Whether it is trained.
        size: How many numbers it holds.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    size: int


class WeightTable(tuple[WeightRow, ...]):
    """The weights of a layer, a tuple of `WeightRow` that prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [
            (row.path, str(row.shape), row.dtype, "yes" if row.trainable else "no", f"{row.size:,}")
            for row in self
        ]
        total = ("total", "", "", "", f"{sum(row.size for row in self):,}")
        return format_table([WeightRow._fields, *rows, total], numbers=True)


@dataclasses.dataclass(frozen=True)
class LeafPath:
    """Stands for a weight in a pytree: its path below the layer."""

    path: str


class Stored(NamedTuple):
    """What a layer that is made from its config knows of its weights, beside what its arguments say.

    Attributes:
        keep_dtypes: Whether float leaves keep their widths.
        dtypes: The dtypes of leaves, by path, where they were given and not made by `init_fn`.
    """

    keep_dtypes: bool
    dtypes: dict[str, str]


class WeightedLayer(keras.layers.Layer):
    """A layer whose weights are the leaves of two pytrees, `params` and `state`."""

    def __init__(
        self,
        rules: Mapping[str, Rule] | Iterable[tuple[str, Rule]] | None,
        owner: str,
        stored: Stored | None,
        **kwargs: Any,
    ):
        checked = Rules(rules, owner)
        super().__init__(**kwargs)
        self._keep("_rules", checked)
        self._keep("_leaves", None)
        self._keep("_stored", stored)
        # Without a dtype of its own, a layer leaves the widths of leaves to the user.
        self._keep_dtypes = kwargs.get("dtype") is None if stored is None else stored.keep_dtypes

    @property
    def params(self) -> PyTree:
        """The trainable parameters as the user's pytree, with a `keras.Variable` for each array or number."""
        return self._leaves[0].tree if self._leaves else None

    @property
    def state(self) -> PyTree:
        """The non-trainable state as the user's pytree, with a `keras.Variable` for each array or number."""
        return self._leaves[1].tree if self._leaves else None

    @property
    def trainable(self) -> bool:
        """Whether the layer is trained. Setting it leaves frozen what a rule or `freeze` has frozen."""
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.layers.Layer.trainable.fset(self, value)  # pyright: ignore[reportOptionalCall]
        # Keras sets this before the constructor has come that far.
        for leaves in getattr(self, "_leaves", None) or ():
            leaves.set_trainable(bool(value))

    def freeze(self, pattern: str) -> None:
        """Excepts parameters from training: no gradient is computed for them any more.

        As always in Keras, a model that has been compiled must be compiled again.

        Args:
            pattern: A regular expression for whole paths below the layer, `params/Dense_0/.*` say.

        Raises:
            ValueError: If the layer has not been built, or the pattern matches no float leaf of the parameters.
        """
        self._set_trainable(pattern, False)

    def unfreeze(self, pattern: str) -> None:
        """Takes parameters back into training: the opposite of `freeze`, with the same arguments and errors."""
        self._set_trainable(pattern, True)

    def weight_table(self) -> WeightTable:
        """The weights, in the order of their leaves, with path, shape, dtype, whether they are trained, and size.

        Raises:
            ValueError: If the layer has not been built.

        Example:
            >>> import flax.linen as nn, numpy as np, jaxwrap
            >>> layer = jaxwrap.FlaxLayer(nn.Dense(2), name="dense")
            >>> _ = layer(np.ones((1, 3), "float32"))
            >>> print(layer.weight_table())
            path                 shape   dtype    trainable  size
            dense/params/bias    (2,)    float32  yes           2
            dense/params/kernel  (3, 2)  float32  yes           6
            total                                               8
        """
        trained = {id(variable) for variable in self.trainable_variables}
        return WeightTable(
            WeightRow(v.path, tuple(v.shape), v.dtype, id(v) in trained, math.prod(v.shape))
            for leaves in self._built_leaves()
            for v in leaves.variables
        )

    def get_variables(self) -> PyTree:
        """The values of the weights, in the user's own structure.

        Returns:
            A dict with the pytrees `params` and `state`, those of them that the layer has, with NumPy arrays for
            leaves, in the dtypes of the variables; PRNG keys are JAX arrays. Leaves that are no arrays are in place.

        Raises:
            ValueError: If the layer has not been built.
        """
        params, state = self._built_leaves()
        return self._join_variables(params.read(), state.read())

    def set_variables(self, variables: PyTree) -> None:
        """Assigns values to all weights, or to none.

        Args:
            variables: A pytree as `get_variables` returns it, of any arrays.

        Raises:
            ValueError: If structure, shapes or dtypes differ from those of the weights. All differences are listed,
                and nothing has been assigned.
        """
        if not isinstance(variables, Mapping):
            raise ValueError(
                f"{self._owner}: expected a dict, as `get_variables` returns it; received a {type(variables).__name__}."
            )
        parts = self._split_variables(variables)
        checked = [
            leaves.check(tree) for leaves, tree in zip(self._built_leaves(), parts, strict=True)
        ]
        problems = [line for _, lines in checked for line in lines]
        if problems:
            raise ValueError(
                f"{self._owner}: these variables do not fit the weights, of which none has been changed. Cast or "
                "reshape what differs.\n" + "\n".join(problems)
            )
        for leaves, (values, _) in zip(self._built_leaves(), checked, strict=True):
            for variable, value in zip(leaves.variables, values, strict=True):
                assign(variable, value)

    def save_own_variables(self, store: Any) -> None:
        """Stores the weights under their paths below the layer, and the seeds."""
        save(store, self._variables_by_path(), self._seeds())

    def load_own_variables(self, store: Any) -> None:
        """Loads weights, by path, and seeds; or, by position, what Keras's own `JaxLayer` or `FlaxLayer` stored.

        Raises:
            ValueError: If weights are missing, not expected, or of another shape. All of them are listed, and nothing
                has been assigned.
        """
        if self._leaves is None and not store.keys():
            return
        leaves = [leaf for part in self._built_leaves() for leaf in part.leaves]
        in_order = [
            leaf.path for trains in (True, False) for leaf in leaves if leaf.can_train is trains
        ]
        load(store, self._variables_by_path(), in_order, self._seeds(), self._owner)

    # What adapters may override.

    def _variable_roots(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names that go before the paths of the leaves of `params`, and of `state`."""
        return ("params",), ("state",)

    def _join_variables(self, params: PyTree, state: PyTree) -> PyTree:
        """What `get_variables` returns."""
        parts = {"params": params, "state": state}
        return {name: part for name, part in parts.items() if part is not None}

    def _split_variables(self, variables: PyTree) -> tuple[PyTree, PyTree]:
        """The inverse of `_join_variables`."""
        if unknown := set(variables) - {"params", "state"}:
            raise ValueError(
                f"{self._owner}: expected a dict with `params` and `state`; received {sorted(unknown)} in it."
            )
        return variables.get("params"), variables.get("state")

    def _checkpoint_tree(self) -> PyTree:
        """What a checkpoint of the module holds, with a `LeafPath` for each weight."""
        return self._join_variables(*self._leaf_paths())

    # For the layer itself.

    def _leaf_paths(self) -> tuple[PyTree, PyTree]:
        params, state = (
            part.structure.unflatten([LeafPath(leaf.path) for leaf in part.leaves])
            for part in self._built_leaves()
        )
        return params, state

    @property
    def _owner(self) -> str:
        return self._describe(self.name)

    def _describe(self, name: str | None) -> str:
        """What errors begin with; before the layer has been made, it may have no name yet."""
        return f"{type(self).__name__} {name!r}" if name else type(self).__name__

    def _keep(self, name: str, value: Any) -> None:
        """Sets an attribute as it is: Keras would wrap containers, and JAX not know them any more."""
        object.__setattr__(self, name, value)

    def _to_store(self, given: bool) -> Stored:
        """What the layer's config says of the weights; `given` if they were given and `init_fn` would make others."""
        if self._stored is not None:
            return self._stored
        leaves = [leaf for part in self._leaves or () for leaf in part.leaves]
        return Stored(self._keep_dtypes, {leaf.path: leaf.dtype for leaf in leaves if given})

    def _create_leaves(self, params: PyTree, state: PyTree) -> None:
        leaves = create_leaves(
            self,
            (params, state),
            self._variable_roots(),
            self._rules,
            self._keep_dtypes,
            self._stored.dtypes if self._stored else {},
            self._owner,
        )
        self._keep("_leaves", leaves)
        self.tracked_params, self.tracked_state = (part.variables for part in leaves)

    def _variables_by_path(self) -> dict[str, keras.Variable]:
        return {
            leaf.path: variable
            for leaves in self._leaves or ()
            for leaf, variable in zip(leaves.leaves, leaves.variables, strict=True)
        }

    def _seeds(self) -> dict[str, keras.Variable]:
        """What else is stored: the states of seed generators, by name."""
        return {}

    def _built_leaves(self) -> tuple[Leaves, Leaves]:
        if self._leaves is None:
            raise ValueError(
                f"{self._owner} has no weights yet. Call it, or build it: `layer.build(input_shape)`."
            )
        return self._leaves

    def _set_trainable(self, pattern: str, trainable: bool) -> None:
        rule = Rule(trainable=trainable)
        rules = Rules([(pattern, rule)], self._owner)
        parts = self._built_leaves()
        check_rules(rules, [leaf for leaves in parts for leaf in leaves.leaves], self._owner)
        params, _ = parts
        for index in match(pattern, [leaf.path for leaf in params.leaves], self._owner):
            params.apply(index, rule)
        self._rules.pairs.append((pattern, rule))
