"""Keras seeds → JAX keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import keras
import numpy as np

from jaxwrap._typing import Array, PyTree, Tensor

Update = tuple[keras.Variable, Tensor]

# Initial values are drawn from counters that calls do not reach.
_INIT_COUNTER = 1 << 31


def to_key(seed: Tensor, impl: str | None = None) -> Array:
    """Makes a JAX key of a Keras seed.

    Keras keeps `[seed, counter]`, in a dtype that depends on the backend; as two 32-bit words it is the data of a
    threefry key, new for each count. The same seed thus gives the same numbers on every backend. Implementations with
    longer keys get the two words again and again, as JAX does for `rbg`.

    Args:
        seed: An integer array of shape (2,).
        impl: The implementation, such as "threefry2x32" or "rbg".

    Returns:
        A typed key of that implementation; for None, a raw key of JAX's default one, as `jax.random.PRNGKey` makes it.
    """
    words = jnp.asarray(seed).astype(jnp.uint32)
    (size,) = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl))).shape
    data = jnp.tile(words, -(-size // 2))[:size]
    return data if impl is None else jax.random.wrap_key_data(data, impl=impl)


def check_impl(impl: str | None, owner: str) -> None:
    """Raises ValueError for the name of a key implementation that JAX does not have."""
    try:
        jax.eval_shape(lambda: jax.random.key(0, impl=impl))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{owner}: `key_impl` must be one of JAX's key implementations, such as 'threefry2x32' or 'rbg', or None; "
            f"received {impl!r}."
        ) from error


def init_seed(seed: int, count: int) -> np.ndarray:
    """The seed, of shape (2,), of the `count`-th draw of initial values."""
    return np.array([seed % (1 << 32), _INIT_COUNTER + count], "uint32")


def draw(
    generators: Sequence[keras.random.SeedGenerator], make: Callable[[], PyTree]
) -> tuple[PyTree, list[Update]]:
    """Draws seeds without changing the generators.

    Args:
        generators: The generators that `make` may draw from.
        make: Draws the seeds.

    Returns:
        What `make` returns, and the pairs of variable and value to assign once the seeds have served.
    """
    states = [generator.state for generator in generators]
    with keras.StatelessScope(state_mapping=[(state, state.value) for state in states]) as scope:
        before = [scope.get_current_value(state) for state in states]
        seeds = make()
        after = [scope.get_current_value(state) for state in states]
    changes = zip(states, before, after, strict=True)
    return seeds, [(state, new) for state, old, new in changes if new is not old]
