"""Input shapes and dtypes, without data. An unknown size is None."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr

from jaxwrap._bridge import get_bridge
from jaxwrap._dense import check_dense
from jaxwrap._dtypes import check_dtype
from jaxwrap._pytree import Structure, partition, path_str
from jaxwrap._typing import Array, PyTree

# Pairs of sizes to try for unknown dimensions: primes first, which equal no known size by accident, then sizes that
# functions can divide. With a distribution, `_unit` times these.
_SIZES = ((83, 89), (96, 192), (64, 128), (1, 2))


@dataclasses.dataclass(frozen=True)
class Spec:
    """One input: a pytree leaf, whatever its shape.

    Attributes:
        shape: The sizes, with None for an unknown one.
        dtype: The name of the dtype.
    """

    shape: tuple[int | None, ...]
    dtype: str

    def fill(self, size: int) -> tuple[int, ...]:
        """Return the shape with `size` for each unknown size."""
        return tuple(size if known is None else known for known in self.shape)


def read_spec(
    leaf: Any, path: Any, read: Callable[[Any], tuple[Any, str]], what: str, static: bool
) -> Any:
    """Describe one leaf of a nest of tensors.

    Args:
        leaf: The leaf.
        path: Its key path.
        read: Returns the shape and the name of the dtype of a tensor, or raises TypeError or ValueError.
        what: The name of the nest in errors.
        static: Whether to keep a leaf that is not a tensor.

    Raises:
        TypeError: For a leaf that is not a tensor, or of a dtype that JAX does not have.
        ValueError: For a tensor of unknown rank.
    """
    try:
        check_dense(leaf)
    except TypeError as error:
        raise TypeError(f"{what} {path_str(path)}: {error}") from None
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        if static:
            return leaf
        raise TypeError(
            f"{what} {path_str(path)} is {leaf!r}, a {type(leaf).__name__}; expected a tensor or an array."
        )
    try:
        shape, dtype = read(leaf)
        check_dtype(dtype)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what} {path_str(path)}: {error}") from None
    return Spec(tuple(shape), dtype)


def specs_from_shapes(shapes: PyTree, dtypes: PyTree) -> PyTree:
    """Turn a nest of shapes, as Keras passes it to `build`, into specs.

    Args:
        shapes: A shape, or a nest of them.
        dtypes: One dtype for all, or a nest of the same form.

    Raises:
        ValueError: If a shape is None.
    """
    leaves, treedef = jax.tree_util.tree_flatten(
        shapes, is_leaf=lambda node: node is None or is_shape(node)
    )
    if not leaves or not all(map(is_shape, leaves)):
        raise ValueError(
            f"cannot be built for the input shape {shapes!r}: JAX needs to know how many dimensions each "
            "input has. Pass a tuple with None for each unknown size, such as (None, 8)."
        )
    names = [dtypes] * len(leaves) if isinstance(dtypes, str) else treedef.flatten_up_to(dtypes)
    return treedef.unflatten(
        Spec(tuple(shape), name) for shape, name in zip(leaves, names, strict=True)
    )


def is_shape(node: Any) -> bool:
    """Whether a node of a nest of shapes is one shape."""
    return isinstance(node, (tuple, list)) and all(
        size is None or isinstance(size, int) for size in node
    )


def partition_specs(nest: PyTree) -> tuple[list[Spec], Structure]:
    """Split a nest into its specs and its structure, which holds all other leaves."""
    return partition(nest, lambda leaf: isinstance(leaf, Spec))


def placeholder(spec: Spec) -> Array:
    """Make an input for `init`: ones, or zeros for integers and bools, of the smallest shape."""
    make = jnp.ones if jnp.issubdtype(spec.dtype, jnp.inexact) else jnp.zeros
    return make(smallest(spec), jax.dtypes.canonicalize_dtype(spec.dtype))


def smallest(spec: Spec) -> tuple[int, ...]:
    """Return the shape with size 1 for each unknown size. With a distribution, its number of devices."""
    return spec.fill(_unit())


def _unit() -> int:
    """Return what unknown sizes are multiples of, so that the devices of a distribution can divide them."""
    mesh = get_bridge().mesh()
    return 1 if mesh is None else mesh.size


def fillings(specs: PyTree) -> Iterator[PyTree]:
    """Yield the nest with one size for all unknown ones, for each size that `abstract_call` tries."""
    known, structure = partition_specs(specs)
    unknown = any(None in spec.shape for spec in known)
    unit = _unit()
    for size, _ in _SIZES if unknown else _SIZES[:1]:
        yield structure.unflatten([Spec(spec.fill(unit * size), spec.dtype) for spec in known])


def abstract_call(fn: Callable[..., PyTree], specs: PyTree, *more: PyTree) -> PyTree:
    """Compute the specs of the result of a JAX function, without data.

    A size of the outputs is unknown if it changes with the unknown sizes of the inputs. All of them are set to the same
    value, since a function may need them to be equal.

    Args:
        fn: A function of a nest of arrays, and of the arrays in `more`.
        specs: The nest with a `Spec` for each array. Other leaves reach `fn` as they are.
        *more: Pytrees of `jax.ShapeDtypeStruct`.

    Returns:
        The pytree that `fn` returns, with a `Spec` for each array.
    """
    known, structure = partition_specs(specs)
    if all(None not in spec.shape for spec in known):
        return jax.tree_util.tree_map(
            lambda output: Spec(output.shape, output.dtype.name),
            _eval_shape(fn, known, structure, 1, *more),
        )
    error, unit = None, _unit()
    for sizes in _SIZES:
        try:
            # Two sizes tell a size of the output that follows them from one that only equals the first.
            first, second = (
                _eval_shape(fn, known, structure, unit * size, *more) for size in sizes
            )
        except Exception as raised:
            error = error or raised
        else:
            merged = jax.tree_util.tree_map(_merge, first, second)
            if _may_be_cropped(known, merged):
                with contextlib.suppress(Exception):  # the function may need larger sizes
                    small = _eval_shape(fn, known, structure, unit * 2, *more)
                    merged = jax.tree_util.tree_map(_merge, merged, small)
            return merged
    assert error is not None
    raise error


def used_inputs(closed: Any) -> list[bool]:
    """Return which inputs of a closed jaxpr its outputs depend on."""
    return dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))[1]


def _may_be_cropped(inputs: Sequence[Spec], outputs: PyTree) -> bool:
    """Whether a known size of the outputs may be an unknown one, cut off at a number below those that were tried."""
    if any(None in spec.shape[1:] for spec in inputs):
        return True
    return any(None not in spec.shape[:1] for spec in jax.tree_util.tree_leaves(outputs))


def _eval_shape(
    fn: Callable[..., PyTree], specs: list[Spec], structure: Structure, size: int, *more: PyTree
) -> PyTree:
    structs = [
        jax.ShapeDtypeStruct(spec.fill(size), jax.dtypes.canonicalize_dtype(spec.dtype))
        for spec in specs
    ]
    # On every backend: `meta` tensors and symbolic graphs would run the code of the user, or guess.
    return jax.eval_shape(
        lambda arrays, *more: fn(structure.unflatten(arrays), *more), structs, *more
    )


def _merge(first: Spec | jax.ShapeDtypeStruct, second: jax.ShapeDtypeStruct) -> Spec:
    shape = tuple(
        one if one == two else None for one, two in zip(first.shape, second.shape, strict=True)
    )
    return Spec(shape, str(first.dtype))
