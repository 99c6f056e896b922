"""Leaves of a pytree ⇄ Keras variables named by their paths."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras.src.backend.common.stateless_scope import in_stateless_scope

from jaxwrap._bridge import get_bridge, inexact
from jaxwrap._bridge._base import host_copies
from jaxwrap._pytree import (
    ARRAY,
    Structure,
    check_shapes,
    describe_difference,
    is_leaf_array,
    key_name,
    partition,
)
from jaxwrap._rules import Rule, Rules, match
from jaxwrap._serialization import Weight
from jaxwrap._typing import Array, PyTree

# Each holds the numbers of those before it.
_KINDS = ("bool", "integer", "float", "complex")


class Leaf(NamedTuple):
    """What is known of one leaf.

    Attributes:
        path: Its path below the layer: `params/Dense_0/kernel`.
        dtype: The dtype that the user gave it.
        impl: The implementation of its PRNG key, if it is one.
        is_params: Whether it belongs to the parameters.
    """

    path: str
    dtype: str
    impl: Any
    is_params: bool

    @property
    def can_train(self) -> bool:
        """Whether there are gradients for it."""
        return self.is_params and inexact(self.dtype)

    def takes(self, field: str, value: Any) -> bool:
        """Whether that can be said of it, in that field of a `Rule`."""
        if field == "dtype":
            return _kind(value) == _kind(self.dtype)
        return value is False or self.can_train


class Leaves:
    """The Keras variables of one pytree of a layer, and how to turn their values back into that pytree.

    Attributes:
        structure: The structure of the user's pytree.
        leaves: What is known of each array or number in it, in leaf order.
        variables: A variable for each of them.
        tree: The user's pytree with the variables in place.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        structure: Structure,
        values: Sequence[Any],
        leaves: Sequence[Leaf],
        rules: Sequence[Rule],
        keep_dtypes: bool,
    ):
        """Creates the variables of `layer`, which must still track them."""
        self.structure = structure
        self.leaves = tuple(leaves)
        self._rules = list(rules)
        mixed = layer.autocast and layer.compute_dtype != layer.variable_dtype
        self._casts = tuple(
            layer.compute_dtype
            if mixed
            and leaf.is_params
            and _kind(leaf.dtype) == "float"
            and rule.autocast is not False
            else None
            for leaf, rule in zip(leaves, rules, strict=True)
        )
        initials = []
        for value, leaf, rule in zip(values, leaves, rules, strict=True):
            dtype = leaf.dtype
            if _kind(dtype) == "float" and (dtype == "float32" or not keep_dtypes):
                dtype = layer.variable_dtype
            if rule.dtype is not None and leaf.takes("dtype", rule.dtype):
                dtype = rule.dtype
            initials.append(Initial(tuple(leaf.path.split("/")), value, dtype, leaf.can_train))
        self.variables = create_variables(layer, initials)
        self.tree = self.structure.unflatten(self.variables)
        for index, rule in enumerate(rules):
            self._obey(index, rule)

    def apply(self, index: int, rule: Rule) -> None:
        """Applies to a variable what a rule says that can still be said of it."""
        self._rules[index] = self._rules[index].then(rule)
        self._obey(index, rule)

    def _obey(self, index: int, rule: Rule) -> None:
        if not self.leaves[index].can_train:
            return
        variable = self.variables[index]
        if rule.trainable is not None:
            variable.trainable = rule.trainable
        if rule.regularizer is not None:
            variable.regularizer = rule.regularizer
        if rule.constraint is not None:
            variable.constraint = rule.constraint

    def set_trainable(self, trainable: bool) -> None:
        """Makes those trainable that no rule excepts, or none."""
        for variable, leaf, rule in zip(self.variables, self.leaves, self._rules, strict=True):
            if leaf.can_train:
                variable.trainable = trainable and rule.trainable is not False

    def decode(self, arrays: Sequence[Array]) -> PyTree:
        """The user's pytree with `arrays`, of the dtypes of the variables, for leaves: as JAX functions take it."""
        decoded = []
        parts = zip(arrays, self.variables, self.leaves, self._casts, strict=True)
        for array, variable, leaf, cast in parts:
            # A backend may hold a dtype that it has not in another one.
            array = jnp.asarray(array, variable.dtype)
            if leaf.impl is not None:
                array = jax.random.wrap_key_data(array, impl=leaf.impl)
            elif cast is not None:
                array = array.astype(cast)
            decoded.append(array)
        return self.structure.unflatten(decoded)

    def structs(self) -> list[jax.ShapeDtypeStruct]:
        """Shape and dtype of what `decode` takes."""
        return [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in self.variables]

    def encode(self, tree: PyTree, old: PyTree, problem: str) -> dict[int, Array]:
        """The inverse of `decode`, for a new state: checks it against the old; returns arrays for the variables.

        Args:
            tree: The new state.
            old: What `decode` returned. Leaves that are the same objects in both have not changed.
            problem: What an error begins with.

        Returns:
            The arrays for those variables that are to change, by index.

        Raises:
            ValueError: If structure or shapes differ, with a line for each path where they do.
        """
        values, received = partition(tree, is_leaf_array)
        difference = describe_difference(self.structure, received)
        if difference:
            raise ValueError(f"{problem}\n{difference}")
        before, _ = partition(old, is_leaf_array)
        arrays = {
            index: jnp.asarray(
                value if self.leaves[index].impl is None else jax.random.key_data(value),
                self.variables[index].dtype,
            )
            for index, value in enumerate(values)
            if value is not before[index]
        }
        paths = self.structure.array_paths()
        expected = [(paths[index], tuple(self.variables[index].shape)) for index in arrays]
        check_shapes(expected, arrays.values(), problem)
        return arrays

    def read(self) -> PyTree:
        """The user's pytree with the values of the variables as NumPy arrays; PRNG keys are JAX arrays."""
        return self.structure.unflatten(
            value
            if leaf.impl is None
            else jax.random.wrap_key_data(jnp.asarray(value), impl=leaf.impl)
            for value, leaf in zip(map(to_host, self.variables), self.leaves, strict=True)
        )

    def to_store(self) -> PyTree:
        """The user's pytree with a `Weight` for each array or number."""
        return self.structure.unflatten(
            Weight(tuple(variable.shape), leaf.dtype, leaf.impl and str(leaf.impl), index)
            for index, (variable, leaf) in enumerate(zip(self.variables, self.leaves, strict=True))
        )

    def check(self, tree: PyTree) -> tuple[list[np.ndarray], list[str]]:
        """The values in `tree` for the variables, and a line for each difference that forbids to assign them."""
        values, received = partition(tree, is_leaf_array)
        difference = describe_difference(self.structure, received)
        if difference:
            return [], [difference]
        problems, arrays = [], []
        for value, leaf, variable in zip(values, self.leaves, self.variables, strict=True):
            if key_impl(value) != leaf.impl:
                kinds = [
                    f"a PRNG key, {impl}" if impl else "no PRNG key"
                    for impl in (leaf.impl, key_impl(value))
                ]
                problems.append(f"  key: {leaf.path} is {kinds[0]}; received {kinds[1]}")
                continue
            array = next(host_copies([_array(value)]))
            if array.shape != tuple(variable.shape):
                problems.append(
                    f"  shape: {leaf.path} is {tuple(variable.shape)}; received {array.shape}"
                )
            # Python numbers have no dtype of their own.
            numbers = (bool, int, float, complex)
            if isinstance(value, numbers) and can_hold(variable.dtype, array.dtype):
                array = array.astype(variable.dtype)
            if str(array.dtype) != variable.dtype:
                problems.append(f"  dtype: {leaf.path} is {variable.dtype}; received {array.dtype}")
            arrays.append(array)
        return arrays, problems


def create_leaves(
    layer: keras.layers.Layer,
    trees: tuple[PyTree, PyTree],
    roots: tuple[tuple[str, ...], tuple[str, ...]],
    rules: Rules,
    keep_dtypes: bool,
    dtypes: Mapping[str, str],
    owner: str,
) -> tuple[Leaves, Leaves]:
    """Creates the variables of a layer, once it is sure that all of them can be.

    Args:
        layer: The layer that is to own the variables; it must still track them.
        trees: `params` and `state`, with the initial values, which are copied.
        roots: Names that go before each leaf's path, for each of the two.
        rules: What the user says of leaves.
        keep_dtypes: Whether float leaves of other widths than 32 bits keep theirs; if not, the layer's variable dtype
            is for all.
        dtypes: The dtypes of leaves, by path, that are to have another one than their values.
        owner: What errors begin with.

    Raises:
        ValueError: If a rule's pattern matches nothing, or nothing that the rule could apply to.
    """
    parts = [partition(tree, is_leaf_array) for tree in trees]
    names = unique_names(
        [
            (*root, *map(key_name, path)) or ("value",)
            for (_, structure), root in zip(parts, roots, strict=True)
            for path, leaf in zip(structure.key_paths(), structure.leaves, strict=True)
            if leaf is ARRAY
        ]
    )
    parameters = [
        is_params
        for (values, _), is_params in zip(parts, (True, False), strict=True)
        for _ in values
    ]
    values = [value for part, _ in parts for value in part]
    leaves = [
        Leaf(path := "/".join(name), dtypes.get(path, _dtype(value)), key_impl(value), is_params)
        for name, value, is_params in zip(names, values, parameters, strict=True)
    ]
    resolved = rules.resolve([leaf.path for leaf in leaves], owner)
    check_rules(rules, leaves, owner)
    made, start = [], 0
    for part, structure in parts:
        own = slice(start, start := start + len(part))
        made.append(Leaves(layer, structure, part, leaves[own], resolved[own], keep_dtypes))
    params, state = made
    return params, state


def check_rules(rules: Rules, leaves: Sequence[Leaf], owner: str) -> None:
    """Raises ValueError for a rule that matches no leaf, or none of which it could say what it says."""
    for pattern, rule in rules.pairs:
        matched = [leaves[index] for index in match(pattern, [leaf.path for leaf in leaves], owner)]
        for field, value in rule.said().items():
            if not any(leaf.takes(field, value) for leaf in matched):
                raise ValueError(
                    f"{owner}: the rule for {pattern!r} says {field}={value!r}, but can say so of none of the leaves "
                    f"that it matches: {', '.join(f'{leaf.path} ({leaf.dtype})' for leaf in matched[:5])}. "
                    "`trainable`, `autocast`, `regularizer` and `constraint` are for float leaves of the parameters, "
                    "`dtype` for leaves of its own kind: a float dtype for float leaves."
                )


def can_hold(dtype: str, other: Any) -> bool:
    """Whether a variable of `dtype` holds numbers of the dtype `other`, rounded perhaps."""
    try:
        other = jnp.dtype(other)
    except TypeError:
        return False
    known = other.kind in "biufc" or jnp.issubdtype(other, jnp.floating)
    return known and _KINDS.index(_kind(other)) <= _KINDS.index(_kind(dtype))


@functools.cache
def _kind(dtype: Any) -> str:
    kinds = (jnp.integer, jnp.floating, jnp.complexfloating)
    for name, kind in zip(_KINDS[1:], kinds, strict=True):
        if jnp.issubdtype(dtype, kind):
            return name
    return "bool"


@functools.cache
def _clean(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", name) or "_"


def unique_names(paths: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Makes key paths into paths of variable names that every backend takes, one name for each, in order.

    Characters other than letters, digits, `_` and `-` become `_`. Where two paths collide thereby, or one is the
    beginning of another, the later one gets a number.
    """
    taken: set[tuple[str, ...]] = set()
    groups: set[tuple[str, ...]] = set()
    result = []
    for path in paths:
        clean = tuple(map(_clean, path))
        above = [clean[:end] for end in range(1, len(clean))]
        blocked = not taken.isdisjoint(above)
        candidate, count = clean, 0
        while candidate in taken or candidate in groups or blocked:
            count += 1
            if not taken.isdisjoint(above):
                candidate = (f"{clean[0]}_{count}", *clean[1:])
                blocked = any(candidate[:end] in taken for end in range(1, len(candidate)))
            else:
                candidate = (*clean[:-1], f"{clean[-1]}_{count}")
        taken.add(candidate)
        groups.update(candidate[:end] for end in range(1, len(candidate)))
        result.append(candidate)
    return result


class Initial(NamedTuple):
    """What a variable is made of.

    Attributes:
        path: The names below its owner.
        value: The first value, which is copied.
        dtype: The dtype.
        trainable: Whether it can be trained.
    """

    path: tuple[str, ...]
    value: Any
    dtype: str
    trainable: bool


def create_variables(owner: Any, initials: Sequence[Initial]) -> list[keras.Variable]:
    """Creates variables that are named by paths below their owner, with copies of values."""
    copies = get_bridge().copies([_array(initial.value) for initial in initials])
    variables = []
    # `add_weight` would put the name right under the layer; the leaf's path becomes nested scopes instead.
    with keras.name_scope(owner.name, caller=owner):
        for scopes, together in itertools.groupby(initials, lambda initial: initial.path[:-1]):
            with contextlib.ExitStack() as stack:
                for scope in scopes:
                    stack.enter_context(keras.name_scope(scope))
                # One after the other, so that on no backend a second copy of the whole is ever held.
                variables += [_create(initial, next(copies)) for initial in together]
    return variables


def _create(initial: Initial, copy: Any) -> keras.Variable:
    dtype = initial.dtype
    variable = keras.Variable(
        lambda shape, dtype: _to_tensor(copy, dtype),
        shape=tuple(copy.shape),
        dtype=dtype,
        trainable=initial.trainable,
        autocast=False,  # what casts is the function that JAX compiles
        name=initial.path[-1],
    )
    # On NumPy Keras initializes all floats as it does by default, and keeps other dtypes for assignment.
    if dtype == "float64" and keras.backend.standardize_dtype(variable.value.dtype) != dtype:
        assign(variable, copy)
    return variable


def _array(value: Any) -> Array | np.ndarray:
    if key_impl(value) is not None:
        return jax.random.key_data(value)
    if isinstance(value, jax.Array):
        return value
    if not isinstance(value, (np.ndarray, np.generic, bool, int, float, complex)):
        value = keras.ops.convert_to_numpy(value)
    return np.asarray(value)


def _dtype(value: Any) -> str:
    if key_impl(value) is not None:
        return "uint32"
    if isinstance(value, (bool, int, float, complex)):
        value = np.asarray(value)
    return _canonical(value.dtype, jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def _canonical(dtype: Any, x64: bool) -> str:
    """The name of the dtype that JAX has for one of any backend."""
    return str(jax.dtypes.canonicalize_dtype(keras.backend.standardize_dtype(dtype)))


def key_impl(value: Any) -> Any:
    """The implementation of a PRNG key; None for other values."""
    if not isinstance(value, jax.Array) or isinstance(value.dtype, np.dtype):
        return None
    return jax.random.key_impl(value)


def current_values(variables: Iterable[keras.Variable]) -> list[Any]:
    """What the variables hold, which never is cast for a call: `variable.value` for each, in less time."""
    if in_stateless_scope():
        return [variable.value for variable in variables]
    return [
        # Made while TensorFlow builds a graph, a variable may have no value yet.
        variable.value if (value := variable._value) is None else value
        for variable in variables
    ]


def to_host(variable: keras.Variable) -> np.ndarray:
    """The value of a variable as a NumPy array of its own, in the variable's dtype."""
    value = variable.value
    if _is_float8(variable.dtype):  # PyTorch cannot convert it
        value = keras.ops.cast(value, "float32")
    return np.array(keras.ops.convert_to_numpy(value)).astype(variable.dtype, copy=False)


def assign(variable: keras.Variable, value: np.ndarray) -> None:
    """Assigns a NumPy array to a variable."""
    variable.assign(_to_tensor(value, variable.dtype))


def assign_all(variables: Sequence[keras.Variable], values: Sequence[Any]) -> None:
    """Assigns to each variable a tensor of its shape and dtype."""
    if not variables:
        return
    if not in_stateless_scope() and get_bridge().write(current_values(variables), values):
        return
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _to_tensor(value: Any, dtype: str) -> Any:
    if isinstance(value, jax.Array) and value.dtype == dtype:
        return value
    if not _is_float8(dtype):
        return keras.ops.convert_to_tensor(value, dtype)
    # Keras converts no arrays of 8-bit floats, but casts to them; on NumPy it converts the result again.
    wide = keras.ops.convert_to_tensor(value.astype("float32"))
    narrow = keras.ops.cast(wide, dtype)
    return wide if isinstance(narrow, np.ndarray) else narrow


def _is_float8(dtype: str) -> bool:
    return dtype.startswith("float8")
