"""Functions that make NNX modules."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import jax

from jaxwrap._pytree import path_str
from jaxwrap._serialization import serialize_by_name
from jaxwrap._typing import PyTree


def make_module(factory: Callable[..., Any], rngs: Any) -> Any:
    """Call a factory with an `nnx.Rngs`."""
    # A class, or a `functools.partial` of it, is a factory too. Modules take their rngs by keyword, and hide it.
    parameters = inspect.signature(factory).parameters
    named = "rngs" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    with unsharded():
        return factory(rngs=rngs) if named else factory(rngs)


def unsharded() -> contextlib.AbstractContextManager[Any]:
    """Enter a scope in which NNX keeps the names of axes, and does not need a mesh that has them."""
    from flax import nnx

    return nnx.use_eager_sharding(False)


def abstract_module(factory: Callable[..., Any]) -> Any:
    """Return the module that a factory makes, without values."""
    from flax import nnx

    return nnx.eval_shape(lambda: make_module(factory, nnx.Rngs(0)))


def rngs_of(key: Any) -> Any:
    """Return the `nnx.Rngs` of a key of the layer."""
    from flax import nnx

    # `nnx.Rngs` takes typed keys, and the keys of a layer are raw by default.
    is_typed = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    return nnx.Rngs(key if is_typed else jax.random.wrap_key_data(key))


def module_for_config(module: Any) -> Any:
    """Return the name of a registered module as JSON. Nothing says how others were made, so a factory must."""
    return serialize_by_name(
        module,
        "module",
        "is an instance, and nothing says how it was made",
        "Name a function that makes such a module: `NNXLayer(module, factory=make)` keeps the values, and "
        "`NNXLayer.from_factory(make)` makes new ones. `make(rngs)` returns the module, and is registered by "
        '`@jaxwrap.register_serializable("my_package")`',
    )


def check_factory(given: PyTree, made: PyTree) -> None:
    """Compare the values of a module with those that a factory makes, whose shapes a file needs.

    Raises:
        ValueError: If names, shapes or dtypes differ.
    """
    one, two = (
        {
            path_str(path): f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(values)
        }
        for values in (given, made)
    )
    if differences := [
        f"  {path}: the module has {one.get(path)}, the factory makes {two.get(path)}"
        for path in dict.fromkeys([*one, *two])
        if one.get(path) != two.get(path)
    ]:
        raise ValueError(
            "`factory` must make a module with the same variables as `module`, since a file holds their values only:\n"
            + "\n".join(differences)
        )
