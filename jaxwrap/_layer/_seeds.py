"""Keras seeds → JAX keys."""

from __future__ import annotations

import contextlib
import copy
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from jaxwrap._bridge import get_bridge
from jaxwrap._typing import Array, PyTree, Tensor

# Initial values are drawn from counters that calls do not reach.
_INIT_COUNTER = 1 << 31
# The name of the generator for leaves of parts.
PARTS = "parts"


def to_key(seed: Tensor, impl: str | None = None) -> Array:
    """Turn a Keras seed into a JAX key.

    Keras keeps `[seed, counter]`, in a dtype that depends on the backend. As two 32-bit words it is the data of a
    threefry key, new for each count, so that the same seed gives the same numbers on every backend. Implementations
    with longer keys repeat the two words, as JAX does for `rbg`.

    Args:
        seed: An integer array of shape (2,).
        impl: The implementation, such as "threefry2x32" or "rbg".

    Returns:
        A typed key of that implementation. For None, a raw key of JAX's default one, as `jax.random.PRNGKey` makes it.
    """
    # int64 on TensorFlow, int32 on PyTorch, uint32 on JAX and NumPy.
    words = jnp.asarray(seed).astype(jnp.uint32)
    (size,) = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl))).shape
    data = jnp.tile(words, -(-size // 2))[:size]
    return data if impl is None else jax.random.wrap_key_data(data, impl=impl)


def _fold(seed: Array, replica: Array) -> Array:
    """Return the seed of one replica: other words, of which `to_key` makes an independent key."""
    # Of this implementation whatever the layer's is, since the words of a seed are the data of such a key.
    key = jax.random.fold_in(to_key(seed, "threefry2x32"), replica)
    return jax.random.key_data(key)


def check_impl(impl: str | None) -> None:
    """Raise ValueError for the name of a key implementation that JAX does not have."""
    try:
        jax.eval_shape(lambda: jax.random.key(0, impl=impl))
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`key_impl` must be one of JAX's key implementations, such as 'threefry2x32' or 'rbg', or None; received "
            f"{impl!r}."
        ) from error


def init_seed(seed: int, count: int) -> np.ndarray:
    """Return the seed, of shape (2,), of the `count`-th draw of initial values."""
    return np.array([seed % (1 << 32), _INIT_COUNTER + count], "uint32")


class Seeds:
    """The seeds of a layer: those of its initial values, and a generator for each stream of its calls.

    Attributes:
        streams: The names of the streams, with seeds of their own. None for one stream without a name.
        generators: The generators of the model, by the names under which files hold their states.
        parts: The generator for leaves of parts, if one of them draws.
    """

    def __init__(
        self,
        seed: int | None,
        streams: Mapping[str, int | None] | None,
        draws: str,
        impl: str | None,
    ):
        # Of the generator that `keras.utils.set_random_seed` seeds.
        self.base = random.randint(1, 10**9) if seed is None else seed
        self.streams = streams
        self.generators: dict[str, Generator] = {}
        self.parts: Generator | None = None
        self._draws = draws
        self._impl = impl
        self._init_draws = 0

    def create(self, owner: Any) -> None:
        """Make the generators, with the owner's name in their paths. The owner must still track them."""
        if self._draws == "never":
            return
        own = {name: seed for name, seed in (self.streams or {}).items() if seed is not None}
        seeds = {"seed": self.base, **{f"rngs_{name}": seed for name, seed in own.items()}}
        with keras.name_scope(owner.name, caller=owner):
            self.generators = {
                name: Generator(seed, name="seed_generator" if name == "seed" else name)
                for name, seed in seeds.items()
            }

    def attach(self, owner: Any) -> None:
        """Let Keras track the generators."""
        owner.seed_generator = self.generators.get("seed")
        owner.stream_generators = [g for name, g in self.all().items() if name != "seed"]

    def note(self, owner: Any) -> None:
        """Let NNX, which looks into lists of variables only, find the states of the generators."""
        # Past Keras, which finds them in the generators.
        object.__setattr__(owner, "_seed_states", list(self.states().values()))

    def attach_parts(self, owner: Any, draws: bool) -> None:
        """Make the generator for leaves of parts if they draw, or remove it."""
        if draws is (self.parts is not None):
            return
        if not draws:
            owner._tracker.untrack(self.parts)
            self.parts = None
        else:
            with keras.name_scope(owner.name, caller=owner):
                self.parts = Generator(self.base, name=PARTS)
        self.note(owner)
        self.attach(owner)

    def all(self) -> dict[str, Generator]:
        """Return all generators, that for leaves of parts last."""
        return self.generators if self.parts is None else {**self.generators, PARTS: self.parts}

    def states(self) -> dict[str, keras.Variable]:
        """Return the variable of each generator."""
        return {name: generator.state for name, generator in self.all().items()}

    def copied(self, find: Callable[[keras.Variable], keras.Variable]) -> Seeds:
        """Return the same seeds, with generators whose states are the variables that `find` returns."""
        other = copy.copy(self)
        other.generators = {
            name: generator.copied(find) for name, generator in self.generators.items()
        }
        other.parts = self.parts and self.parts.copied(find)
        return other

    def restart(self) -> None:
        """Begin the draws of initial values. All traces of `init` draw the same ones."""
        self._init_draws = 0

    def next_init(self) -> np.ndarray:
        """Return a new seed for initial values."""
        self._init_draws += 1
        return init_seed(self.base, self._init_draws - 1)

    def next_call(self) -> Any:
        """Return a new seed for a call."""
        return self.generators["seed"].next()

    def key_of_parts(self) -> Array:
        """Return a new key for the leaves of parts."""
        assert self.parts is not None
        return to_key(self.parts.next(), "threefry2x32")

    def for_init(self, next_seed: Callable[[], Any]) -> PyTree:
        """Return a seed, or one for each stream and for "params"."""
        if self.streams is None:
            return next_seed()
        return {name: next_seed() for name in dict.fromkeys(["params", *self.streams])}

    def for_call(self, training: bool, next_seed: Callable[[], Any]) -> PyTree:
        """Return a seed, or one for each stream. None for a call that does not draw."""
        if self._draws == "in training" and not training:
            return None
        if self.streams is None:
            return next_seed()
        return {
            name: next_seed() if seed is None else self.generators[f"rngs_{name}"].next()
            for name, seed in self.streams.items()
        }

    def to_keys(self, seeds: PyTree) -> PyTree:
        """Make a key of each seed in a pytree."""
        return jax.tree_util.tree_map(lambda seed: to_key(seed, self._impl), seeds)


class Generator(keras.random.SeedGenerator):
    """A Keras seed generator that can be drawn from while JAX traces: see `drawing`."""

    def __init__(self, seed: int, name: str):
        super().__init__(seed, name=name)
        # In the place of Keras's. The replicas of a `tf.distribute` strategy count alike, and the first one's is saved.
        # Written by each for itself, since TensorFlow cannot aggregate inside a loop.
        with keras.name_scope(name, caller=self):
            self.state = keras.Variable(
                lambda shape, dtype: keras.ops.convert_to_tensor([seed, 0], dtype),
                shape=(2,),
                dtype=self.state.dtype,
                trainable=False,
                aggregation="only_first_replica",
                synchronization="on_read",
                name="seed_generator_state",
            )
        self._steps: dict[int, Tensor] = {}

    def copied(self, find: Callable[[keras.Variable], keras.Variable]) -> Generator:
        """Return a generator whose state is the variable that `find` returns."""
        # Keras copies by a config.
        other = object.__new__(Generator)
        other.__dict__.update(vars(self), _steps={})
        other.state = find(self.state)
        return other

    def next(self, ordered: bool = True) -> Tensor:
        """Return a new seed, of shape (2,)."""
        draws = getattr(_drawing, "draws", {})
        if self not in draws:
            return super().next(ordered)
        state, count = draws[self]
        draws[self] = state, count + 1
        step = jnp.array([0, count], state.dtype)
        if state.shape == (2,):
            return state + step
        # A third number says which of several replicas draws: see `Bridge.for_replica`.
        return _fold(state[:2] + step, state[2])

    def after(self, count: int) -> Tensor:
        """Return the state after that many draws."""
        state = self.state.value
        # Kept, since to make a small tensor takes longer than to add it. A symbolic one belongs to its graph.
        step = self._steps.get(count)
        if step is None or step.device != getattr(state, "device", None):
            step = keras.ops.convert_to_tensor(np.array([0, count]), self.state.dtype)
            if get_bridge().is_concrete(step):
                self._steps[count] = step
        return state + step


# By thread, since two threads may trace at the same time.
_drawing = threading.local()


class Draws(dict[Generator, tuple[Array, int]]):
    """The state from which each generator draws, and the number of its draws."""

    def counts(self) -> tuple[int, ...]:
        """Return the number of draws of each generator."""
        return tuple(count for _, count in self.values())


@contextlib.contextmanager
def drawing(generators: Sequence[Generator], states: Sequence[Array]) -> Iterator[Draws]:
    """Let generators draw from these states, JAX arrays, in this scope. They change only the counts that it yields."""
    before = getattr(_drawing, "draws", {})
    draws = Draws((g, (state, 0)) for g, state in zip(generators, states, strict=True))
    _drawing.draws = draws
    try:
        yield draws
    finally:
        _drawing.draws = before
