"""Keras variables: made, read and written here and nowhere else."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import keras
import numpy as np
from jax.core import Tracer
from keras.src.backend.common.name_scope import current_path
from keras.src.backend.common.stateless_scope import in_stateless_scope

from jaxwrap._bridge import get_bridge
from jaxwrap._typing import Array
from jaxwrap._weights._axes import Axes
from jaxwrap._weights._devices import layout_of, sharding_of


class Initial(NamedTuple):
    """The description of a variable to make.

    Attributes:
        path: The names below its owner.
        value: The first value.
        dtype: The dtype.
        trainable: Whether it can be trained.
        aggregation: What Keras makes of the values that replicas on several devices assign.
        axes: Its layout, if a rule sets one.
        held: See `layout_of`.
    """

    path: tuple[str, ...]
    value: Any
    dtype: str
    trainable: bool
    aggregation: str = "none"
    axes: Axes | None = None
    held: Any = None


# Returns a layout or None for each variable of an owner, and arrays in these layouts that nobody else holds.
Source = Callable[[Any, Sequence[Initial]], tuple[Sequence[Any], Iterable[Any]]]


def as_copies(owner: Any, initials: Sequence[Initial]) -> tuple[Sequence[Any], Iterable[Any]]:
    """Copy the values."""
    values = [array_of(one.value) for one in initials]
    layouts = _layouts(owner, initials, values)
    return layouts, get_bridge().copies(values, list(map(sharding_of, layouts)))


def as_they_are(owner: Any, initials: Sequence[Initial]) -> tuple[Sequence[Any], Iterable[Any]]:
    """Take the values as they are: arrays on a mesh that nobody else holds."""
    values = [array_of(one.value) for one in initials]
    return list(map(mesh_sharding, values)), values


def made_by(make: Callable[[Sequence[Any]], Iterable[Array]]) -> Source:
    """Let `make` return arrays with the shardings of JAX that it gets. `initials` have structs for values."""

    def source(owner: Any, initials: Sequence[Initial]) -> tuple[Sequence[Any], Iterable[Any]]:
        layouts = _layouts(owner, initials, [one.value for one in initials])
        return layouts, make(list(map(sharding_of, layouts)))

    return source


def create_variables(
    owner: Any,
    initials: Sequence[Initial],
    outer: Sequence[str] | None = None,
    source: Source = as_copies,
) -> list[keras.Variable]:
    """Create variables that are named by paths below their owner.

    Args:
        owner: Its name begins the paths.
        initials: The variables.
        outer: The names above the owner in the paths of its first variables. None for the first ones.
        source: Where their values come from: `as_copies`, `as_they_are` or `made_by(...)`.
    """
    variables = []
    # `add_weight` would put the name right under the layer. The path of a leaf becomes nested scopes instead.
    # Keras knows the model around the owner by now, which the first variables may have been older than.
    parent = None if outer is None else "/".join(outer)
    with keras.name_scope(owner.name, caller=owner, override_parent=parent):
        layouts, arrays = source(owner, initials)
        remaining = iter(arrays)
        pairs = zip(initials, layouts, strict=True)
        for scopes, together in itertools.groupby(pairs, lambda pair: pair[0].path[:-1]):
            with contextlib.ExitStack() as stack:
                for scope in scopes:
                    stack.enter_context(keras.name_scope(scope))
                # One after the other, so that no backend ever holds a second copy of the whole.
                variables += [
                    _create(initial, next(remaining), layout) for initial, layout in together
                ]
    return variables


def _layouts(owner: Any, initials: Sequence[Initial], values: Sequence[Any]) -> list[Any]:
    """Return the layout of each variable to make: see `layout_of`. Call it in the scope of the owner."""
    if not get_bridge().shards:
        return [None] * len(initials)
    above = current_path()
    return [
        layout_of(
            f"{above}/{'/'.join(one.path)}",
            f"{owner.name}/{'/'.join(one.path)}",
            tuple(value.shape),
            one.dtype,
            one.axes,
            value,
            one.held,
        )
        for one, value in zip(initials, values, strict=True)
    ]


def _create(initial: Initial, copy: Any, layout: Any) -> keras.Variable:
    dtype = initial.dtype

    def make(shape: Any, dtype: str) -> Any:
        return _to_tensor(copy, initial.dtype)

    # As an initializer, since Keras would copy a value once more. But a large one with a layout it would compile, with
    # the value as a constant.
    divided = layout is not None and not in_stateless_scope()
    variable = keras.Variable(
        _to_tensor(copy, dtype) if divided else make,
        shape=tuple(copy.shape),
        dtype=dtype,
        trainable=initial.trainable,
        autocast=False,  # the function that JAX compiles casts
        aggregation=initial.aggregation,
        name=initial.path[-1],
        layout=layout,
    )
    # On NumPy Keras initializes all floats as it does by default, and keeps other dtypes for assignment.
    if dtype == "float64" and keras.backend.standardize_dtype(variable.value.dtype) != dtype:
        assign(variable, copy)
    return variable


def array_of(value: Any) -> Array | np.ndarray:
    """Return a leaf as an array of JAX or NumPy. A PRNG key gives its data."""
    if key_impl(value) is not None:
        return jax.random.key_data(value)
    if isinstance(value, jax.Array):
        return value
    if not isinstance(value, (np.ndarray, np.generic, bool, int, float, complex)):
        value = keras.ops.convert_to_numpy(value)
    return np.asarray(value)


def dtype_of(value: Any) -> str:
    """Return the name of the dtype that JAX has for a leaf of any backend."""
    if key_impl(value) is not None:
        return "uint32"
    if isinstance(value, (bool, int, float, complex)):
        value = np.asarray(value)
    return _canonical(value.dtype, jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]


# `x64` is an argument for the sake of the cache: users may switch it.
@functools.cache
def _canonical(dtype: Any, x64: bool) -> str:
    return str(jax.dtypes.canonicalize_dtype(keras.backend.standardize_dtype(dtype)))


def key_impl(value: Any) -> Any:
    """Return the implementation of a PRNG key, or None for other values."""
    if not isinstance(value, jax.Array) or isinstance(value.dtype, np.dtype):
        return None
    return jax.random.key_impl(value)


def mesh_sharding(value: Any) -> jax.sharding.NamedSharding | None:
    """Return how an array lies on a mesh. None for a tensor that is on one device."""
    if not isinstance(value, jax.Array) or isinstance(value, Tracer):
        return None
    return value.sharding if isinstance(value.sharding, jax.sharding.NamedSharding) else None


def current_values(variables: Iterable[keras.Variable]) -> list[Any]:
    """Return `variable.value` for each, in less time. Our variables are never cast for a call."""
    # In such a scope, Keras keeps the values elsewhere, and `_value` is out of date.
    if in_stateless_scope():
        return [variable.value for variable in variables]
    return [
        # A variable that TensorFlow makes while it builds a graph may not have a value yet.
        variable.value if (value := variable._value) is None else value
        for variable in variables
    ]


def to_host(variable: keras.Variable) -> np.ndarray:
    """Return the value of a variable as a NumPy array of its own, in the variable's dtype.

    If parts of it are on devices of other processes, all processes must call this, in the same order.
    """
    value = gathered(variable.value)
    if _is_float8(variable.dtype):  # PyTorch cannot convert it
        value = keras.ops.cast(value, "float32")
    return np.array(read(value)).astype(variable.dtype, copy=False)


def read(value: Any) -> np.ndarray:
    """Return a number or the value of a variable as a NumPy array, which may share its memory."""
    # TensorFlow makes no array of a scalar variable that has a copy on each device.
    if hasattr(value, "distribute_strategy"):
        value = value.numpy()
    return np.asarray(keras.ops.convert_to_numpy(value))


def gathered(value: Any) -> Any:
    """Return an array that has parts on devices of other processes as a whole, and any other value as it is."""
    return _gather(value.sharding.mesh)(value) if is_elsewhere(value) else value


@contextlib.contextmanager
def gathered_on_host(variables: Iterable[keras.Variable], is_kept: bool) -> Iterator[None]:
    """Gather what has parts on devices of other processes, one variable after the other. All processes enter.

    Args:
        variables: The variables.
        is_kept: Whether this process reads NumPy arrays from them in this scope. It must not train then.
    """
    held: list[tuple[keras.Variable, Any]] = []
    try:
        for variable in variables:
            if is_elsewhere(value := variable.value):
                whole = to_host(variable)
                if is_kept:
                    held.append((variable, value))
                    # Not `assign`, which would put it on the devices again.
                    variable._value = whole
        yield
    finally:
        for variable, value in held:
            variable._value = value


def is_elsewhere(value: Any) -> bool:
    """Whether this process cannot read all of an array, as parts are on devices of other processes."""
    on_mesh = mesh_sharding(value) is not None
    return on_mesh and not value.is_fully_addressable and not value.is_fully_replicated


@functools.cache
def _gather(mesh: jax.sharding.Mesh) -> Callable[[Array], Array]:
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(lambda array: array, out_shardings=everywhere)


def assign(variable: keras.Variable, value: Any) -> None:
    """Assign an array to a variable: of NumPy, or of JAX that lies as the variable does."""
    sharding = mesh_sharding(variable.value)
    if sharding is not None and not isinstance(value, jax.Array):
        host = np.asarray(value).astype(variable.dtype, copy=False)
        # Each process puts its own parts in their places. No device holds the whole.
        value = jax.make_array_from_callback(host.shape, sharding, host.__getitem__)
    variable.assign(_to_tensor(value, variable.dtype))


def assign_all(variables: Sequence[keras.Variable], values: Sequence[Any]) -> None:
    """Assign to each variable a tensor of its shape and dtype."""
    if not variables:
        return
    # In a stateless scope Keras collects what is assigned, and memory must stay as it is.
    if not in_stateless_scope() and get_bridge().write(current_values(variables), values):
        return
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _to_tensor(value: Any, dtype: str) -> Any:
    if isinstance(value, jax.Array) and value.dtype == dtype:
        return value
    if not _is_float8(dtype):
        return keras.ops.convert_to_tensor(value, dtype)
    # Keras does not convert arrays of 8-bit floats, but casts to them. On NumPy it converts the result again.
    wide = keras.ops.convert_to_tensor(value.astype("float32"))
    narrow = keras.ops.cast(wide, dtype)
    return wide if isinstance(narrow, np.ndarray) else narrow


def _is_float8(dtype: str) -> bool:
    return dtype.startswith("float8")
