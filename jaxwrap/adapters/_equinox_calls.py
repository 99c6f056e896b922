"""Equinox's conventions: keys, batches, axis names, factories."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jaxwrap._layer._seeds import init_seed, to_key
from jaxwrap._serialization import check_size


def takes_key(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether the argument `key` is a PRNG key, and not data such as the keys of an attention.

    By Equinox's convention a PRNG key comes last, or by keyword. Data is followed by other data.
    """
    if "key" not in parameters:
        return False
    after = list(parameters)[list(parameters).index("key") + 1 :]
    required = [
        name
        for name in after
        if parameters[name].default is inspect.Parameter.empty
        and parameters[name].kind
        in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ]
    return not [name for name in required if name not in ("state", "inference")]


@contextlib.contextmanager
def suggesting_batch() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"the module fails ({type(error).__name__}: {error}). Equinox modules are written for one example: did you "
            "mean `batch=True`?"
        ) from error


def axis_name_of(module: Any) -> Any:
    """Return the axis over which the module's normalizations take their means."""
    import equinox as eqx

    def is_norm(node: Any) -> bool:
        return isinstance(node, eqx.nn.BatchNorm)

    nodes = jax.tree_util.tree_leaves(module, is_leaf=is_norm)
    return next((node.axis_name for node in nodes if is_norm(node)), None)


def check_factory_size(factory: Callable[..., Any]) -> None:
    """Raise ValueError if the arrays of a module do not fit into memory: a file names the factory and its sizes."""
    import equinox as eqx

    try:
        made = eqx.filter_eval_shape(lambda: make_module(factory, 0, None))
    except Exception:
        return  # it may need values, and what is wrong with it shows when it is called
    check_size(leaf for leaf in jax.tree.leaves(made) if isinstance(leaf, jax.ShapeDtypeStruct))


def make_module(factory: Callable[..., Any], seed: int | None, impl: str | None) -> tuple[Any, Any]:
    """Return the module that a factory makes, and its state or None."""
    key = to_key(init_seed(random.randint(1, 10**9) if seed is None else seed, 0), impl)
    named = "key" in inspect.signature(factory).parameters
    made = factory(key=key) if named else factory(key)
    return made if isinstance(made, tuple) else (made, None)
