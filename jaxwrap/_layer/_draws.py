"""Whether the results of a call depend on its keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxwrap._specs import used_inputs
from jaxwrap._typing import PyTree


class Draws(NamedTuple):
    """Whether the results of a call depend on its keys, for the arguments that the layer was built for.

    None stands for what is not known.
    """

    training: bool | None
    inference: bool | None


def call_and_look(
    fn: Callable[[PyTree, PyTree], PyTree], keys: PyTree, rest: PyTree
) -> tuple[PyTree, bool]:
    """Call a function of arrays, and looks in its jaxpr for a way from the keys to the result.

    Returns:
        The result of `fn(keys, rest)`, and whether it depends on any array in `keys`.
    """
    # Here, since it takes longer than most of jaxwrap.
    from jax.extend.core import jaxpr_as_fun

    count = len(jax.tree_util.tree_leaves(keys))
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(keys, rest)
    # The drawing of keys is in a jaxpr even if nothing uses them, until dead code is gone.
    # Not `fn` again, which would trace the model twice.
    used = used_inputs(closed)
    flat = jaxpr_as_fun(closed)(*jax.tree_util.tree_leaves((keys, rest)))
    return jax.tree_util.tree_structure(shapes).unflatten(flat), any(used[:count])
