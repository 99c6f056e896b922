"""One leaf of a pytree: where it is, what it is, and the variables that hold it."""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from jaxwrap._bridge._memory import host_copies
from jaxwrap._dtypes import can_hold, inexact, kind
from jaxwrap._serialization import Weight
from jaxwrap._typing import Array
from jaxwrap._weights._axes import Axes, is_spread, of_part
from jaxwrap._weights._devices import axes_of, layout_like
from jaxwrap._weights._reparametrization import Layout, RealImaginary, Reparametrization
from jaxwrap._weights._rules import Rule
from jaxwrap._weights._variables import (
    Initial,
    array_of,
    assign,
    dtype_of,
    gathered,
    key_impl,
    to_host,
)


@dataclasses.dataclass(frozen=True)
class LeafPath:
    """Stands for a weight in a pytree: its path below the layer."""

    path: str


@dataclasses.dataclass
class Leaf:
    """One array or number of a pytree, and the Keras variables that hold it: one, or its parts.

    Attributes:
        path: Its path below the owner: `params/Dense_0/kernel`.
        dtype: The dtype that the user passed. For a PRNG key, that of its data.
        impl: The implementation of its PRNG key, if it is one.
        is_params: Whether it belongs to the parameters.
        shape: Its shape. For a PRNG key, that of its data.
        stored: The dtype of the variable. For a leaf of parts, that of the leaf.
        cast: The dtype that JAX functions see, if it is another one.
        rule: The settings of all rules for it.
        seed: The seed of the key of its parts.
        axes: The names of its axes, as the library has them, if it has any.
        held: The layout of the variables that it had before it was made again.
        layout: Its parts, once they have been made. None for one variable.
        variables: The variables, once they have been made.
    """

    path: str
    dtype: str
    impl: Any
    is_params: bool
    shape: tuple[int, ...]
    stored: str = ""
    cast: str | None = None
    rule: Rule = dataclasses.field(default_factory=Rule)
    seed: int = 0
    axes: Axes | None = None
    held: Any = None
    layout: Layout | None = None
    variables: tuple[keras.Variable, ...] = ()

    @classmethod
    def of(cls, path: str, value: Any, is_params: bool) -> Leaf:
        """Describe a value, without variables."""
        dtype, impl = dtype_of(value), key_impl(value)
        # Not of `array_of`, which brings the tensors of a backend to the host.
        shape = tuple(np.shape(value if impl is None else array_of(value)))
        return cls(path, dtype, impl, is_params, shape, stored=dtype)

    @property
    def can_train(self) -> bool:
        """Whether it can have a gradient."""
        return self.is_params and inexact(self.dtype)

    @property
    def form(self) -> Reparametrization | None:
        """What computes it from parts. A complex leaf is two real ones, unless a rule says otherwise."""
        if self.rule.reparametrize is None and self.can_train and kind(self.dtype) == "complex":
            return RealImaginary()
        return (self.rule.reparametrize or None) if self.can_train else None

    @property
    def aggregation(self) -> str:
        """What becomes of the values that replicas on several devices assign: see `Rule`."""
        if self.rule.aggregation is not None:
            return self.rule.aggregation
        # An optimizer assigns the same value to the parameters of all replicas.
        if self.is_params:
            return "none"
        # The mean of two counters or of two keys is neither, and TensorFlow has none of complex numbers.
        return "mean" if kind(self.dtype) == "float" else "only_first_replica"

    @property
    def names(self) -> list[str]:
        """The path of each variable below the owner."""
        if self.layout is None:
            return [self.path]
        return [f"{self.path}/{name}" for name in self.layout.names]

    def accepts(self, field: str, value: Any) -> bool:
        """Whether a field of a `Rule` can apply to it."""
        if field == "dtype":
            return kind(value) == kind(self.dtype)
        if field == "aggregation":
            return value not in ("mean", "sum") or kind(self.dtype) == "float"
        if field == "layout":
            return True
        return value is False or self.can_train

    def initials(self, value: Any) -> list[Initial]:
        """Describe the variables to make.

        Raises:
            ValueError: If the leaf cannot be computed from parts as its rule says.
        """
        if self.form is None:
            path = tuple(self.path.split("/"))
            held = layout_like(self.held, self.shape, self.shape)
            return [
                Initial(
                    path,
                    value,
                    self.stored,
                    self.can_train,
                    self.aggregation,
                    self.rule.layout,
                    held,
                )
            ]
        for field in ("regularizer", "constraint"):
            if getattr(self.rule, field) is not None:
                raise ValueError(
                    f"the rules for {self.path} set a {field} and {type(self.form).__name__}, and its parts are not "
                    f"what a {field} is for. Add a loss of the leaf inside the model (`CallResult(losses=...)`), or "
                    "set `reparametrize=False`."
                )
        with self._explained():
            array = jnp.asarray(array_of(value), self.stored)
            self.layout, arrays = Layout.make(self.form, array, self._key())
        parts = zip(self.names, arrays, self._trains(arrays), strict=True)
        return [
            Initial(
                tuple(name.split("/")),
                array,
                str(array.dtype),
                trains,
                self.aggregation,
                self._divided(array),
                layout_like(self.held, self.shape, tuple(array.shape)),
            )
            for name, array, trains in parts
        ]

    def _divided(self, part: Any) -> Axes | None:
        """Return the layout of a part, if a rule sets one for the leaf."""
        return self.rule.layout and of_part(self.rule.layout, self.shape, tuple(part.shape))

    def place(self) -> Any:
        """Return the layout of its variable, or of the part that is as large as the leaf. None without one."""
        layouts = [getattr(v, "_layout", None) for v in self.variables if v.shape == self.shape]
        return next(iter(layouts), None)

    def divided(self, variable: keras.Variable) -> Axes | None:
        """Return what each axis of one of the variables is divided by: see `WeightRow`."""
        names = self.rule.layout or self.axes
        of_leaf = names and of_part(names, self.shape, tuple(variable.shape))
        found = axes_of(getattr(variable, "_layout", None)) or of_leaf
        return found if is_spread(found) else None

    def _trains(self, arrays: Sequence[Any]) -> list[bool]:
        """For each variable, whether it can be trained."""
        if self.layout is None:
            return [self.can_train]
        frozen = zip(self.layout.frozen, arrays, strict=True)
        return [not held and inexact(str(array.dtype)) for held, array in frozen]

    def _key(self) -> Array:
        return jax.random.fold_in(jax.random.key(self.seed), self._number())

    def _number(self) -> int:
        # So that the numbers of a leaf do not depend on other leaves.
        return zlib.crc32(self.path.encode())

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.path}, of shape {self.shape}: {error}") from error

    def obey(self, rule: Rule) -> None:
        """Apply to the variables what a rule sets that can still be changed."""
        self.rule = self.rule.then(rule)
        if not self.can_train:
            return
        for variable, trains in zip(self.variables, self._trains(self.variables), strict=True):
            if rule.trainable is not None:
                variable.trainable = rule.trainable and trains
            if rule.regularizer is not None:
                variable.regularizer = rule.regularizer
            if rule.constraint is not None:
                variable.constraint = rule.constraint

    def set_trainable(self, trainable: bool) -> None:
        """Set `trainable`, unless a rule freezes the leaf."""
        if self.can_train:
            trainable = trainable and self.rule.trainable is not False
            for variable, trains in zip(self.variables, self._trains(self.variables), strict=True):
                variable.trainable = trainable and trains

    def decode(self, arrays: Sequence[Array]) -> Array:
        """Compute the leaf, as JAX functions take it, from the values of its variables."""
        if self.layout is None:
            (array,) = arrays
            # A backend may hold a dtype that it does not have as another one.
            array = jnp.asarray(array, self.stored)
        else:
            array = self._fold(arrays)
        if self.impl is not None:
            return jax.random.wrap_key_data(array, impl=self.impl)
        return self._cast(array)

    def decode_training(
        self, arrays: Sequence[Array], key: Array | None
    ) -> tuple[Array, dict[int, Array]]:
        """Compute the leaf in a training call, and new values of parts by their place.

        Args:
            arrays: The values of the variables.
            key: The key of the call for all leaves. None if no leaf draws.
        """
        if self.layout is None or not self.layout.differs:
            return self.decode(arrays), {}
        own = jax.random.key(0)
        if self.layout.draws:
            assert key is not None
            own = jax.random.fold_in(key, self._number())
        array, new = self.layout.fold_training(self._typed(arrays), own)
        return self._cast(array.astype(self.stored)), new

    def _cast(self, array: Array) -> Array:
        # In the compiled function, where it costs nothing, and gradients come back in the dtype of the variable.
        return array if self.cast is None else array.astype(self.cast)

    def _fold(self, arrays: Sequence[Array]) -> Array:
        return self.layout.fold(self._typed(arrays)).astype(self.stored)  # type: ignore[union-attr]

    def _typed(self, arrays: Sequence[Array]) -> list[Array]:
        return [jnp.asarray(a, v.dtype) for a, v in zip(arrays, self.variables, strict=True)]

    def encode(self, value: Any) -> list[Array]:
        """Compute the value of its one variable from a new leaf, as state has them."""
        # A Keras variable has no dtype for keys. It holds their data, which `decode` makes a key again.
        data = value if self.impl is None else jax.random.key_data(value)
        return [jnp.asarray(data, self.stored)]

    def read(self) -> Any:
        """Return the value as a NumPy array. A PRNG key is a JAX array."""
        if self.layout is not None:
            return np.asarray(self._fold([to_host(variable) for variable in self.variables]))
        (variable,) = self.variables
        value = to_host(variable)
        if self.impl is None:
            return value
        return jax.random.wrap_key_data(jnp.asarray(value), impl=self.impl)

    def read_parts(self) -> Any:
        """Return the value, or a dict of the parts, nested as they are."""
        if self.layout is None:
            return self.read()
        return _nested(self.layout.names, map(to_host, self.variables))

    def tree(self) -> Any:
        """Return the variable, or a dict of the variables of the parts."""
        if self.layout is None:
            return self.variables[0]
        return _nested(self.layout.names, self.variables)

    def placeholder(self, place: int) -> Weight:
        """Describe the leaf for a config, which holds no values."""
        return Weight(self.shape, self.dtype, self.impl and str(self.impl), place)

    def check(self, value: Any) -> tuple[list[np.ndarray], list[str]]:
        """Prepare a value to be assigned.

        Returns:
            An array for each variable, and a line for each reason not to assign them.
        """
        if (impl := key_impl(value)) != self.impl:
            expected, received = (
                f"a PRNG key, {impl}" if impl else "no PRNG key" for impl in (self.impl, impl)
            )
            return [], [f"  key: {self.path} is {expected}; received {received}"]
        # A copy: the caller may write to the array later.
        array = next(host_copies([gathered(array_of(value))]))
        problems = []
        if array.shape != self.shape:
            problems.append(f"  shape: {self.path} is {self.shape}; received {array.shape}")
        # Python numbers do not have a dtype of their own.
        numbers = (bool, int, float, complex)
        if isinstance(value, numbers) and can_hold(self.stored, array.dtype):
            array = array.astype(self.stored)
        if str(array.dtype) != self.stored:
            problems.append(f"  dtype: {self.path} is {self.stored}; received {array.dtype}")
        if problems or self.layout is None:
            return [array], problems
        return self.split(array), []

    def split(self, array: np.ndarray) -> list[np.ndarray]:
        """Return the values of the parts for a new value of the leaf."""
        present = [jnp.asarray(to_host(variable)) for variable in self.variables]
        with self._explained():
            new = jnp.asarray(array, self.stored)
            made = self.layout.assign(new, present, self._key())  # type: ignore[union-attr]
        return [np.asarray(part) for part in made]

    def write(self, array: np.ndarray) -> None:
        """Assign a new value to the parts."""
        for variable, part in zip(self.variables, self.split(array), strict=True):
            assign(variable, part)


def _nested(names: Sequence[str], values: Iterable[Any]) -> dict[str, Any]:
    """Return a nested dict for paths with slashes."""
    tree: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        *above, last = name.split("/")
        node = tree
        for step in above:
            node = node.setdefault(step, {})
        node[last] = value
    return tree
