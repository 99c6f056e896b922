"""One leaf of a pytree: where it is, what it is, and the variables that hold it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from jaxwrap._bridge._memory import host_copies
from jaxwrap._dtypes import can_hold, inexact, kind
from jaxwrap._serialization import Weight
from jaxwrap._typing import Array
from jaxwrap._weights._rules import Rule
from jaxwrap._weights._variables import Initial, array_of, dtype_of, key_impl, to_host


@dataclasses.dataclass(frozen=True)
class LeafPath:
    """Stands for a weight in a pytree: its path below the layer."""

    path: str


@dataclasses.dataclass
class Leaf:
    """One array or number of a pytree, and the Keras variables that hold it.

    Today each leaf is one variable. Whoever holds leaves counts `variables` all the same, since a leaf that is
    computed from parts has several.

    Attributes:
        path: Its path below the owner: `params/Dense_0/kernel`.
        dtype: The dtype that the user passed. For a PRNG key, that of its data.
        impl: The implementation of its PRNG key, if it is one.
        is_params: Whether it belongs to the parameters.
        stored: The dtype of the variable.
        cast: The dtype that JAX functions see, if it is another one.
        rule: The settings of all rules for it.
        variables: The variables, once they have been made.
    """

    path: str
    dtype: str
    impl: Any
    is_params: bool
    stored: str = ""
    cast: str | None = None
    rule: Rule = dataclasses.field(default_factory=Rule)
    variables: tuple[keras.Variable, ...] = ()

    @classmethod
    def of(cls, path: str, value: Any, is_params: bool) -> Leaf:
        """Describe a value, without variables."""
        dtype = dtype_of(value)
        return cls(path, dtype, key_impl(value), is_params, stored=dtype)

    @property
    def can_train(self) -> bool:
        """Whether it can have a gradient."""
        return self.is_params and inexact(self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape. For a PRNG key, that of its data."""
        (variable,) = self.variables
        return tuple(variable.shape)

    def accepts(self, field: str, value: Any) -> bool:
        """Whether a field of a `Rule` can apply to it."""
        if field == "dtype":
            return kind(value) == kind(self.dtype)
        return value is False or self.can_train

    def initials(self, value: Any) -> list[Initial]:
        """Describe the variables to make."""
        return [Initial(tuple(self.path.split("/")), value, self.stored, self.can_train)]

    def obey(self, rule: Rule) -> None:
        """Apply to the variables what a rule sets that can still be changed."""
        self.rule = self.rule.then(rule)
        if not self.can_train:
            return
        for variable in self.variables:
            if rule.trainable is not None:
                variable.trainable = rule.trainable
            if rule.regularizer is not None:
                variable.regularizer = rule.regularizer
            if rule.constraint is not None:
                variable.constraint = rule.constraint

    def set_trainable(self, trainable: bool) -> None:
        """Set `trainable`, unless a rule freezes the leaf."""
        if self.can_train:
            for variable in self.variables:
                variable.trainable = trainable and self.rule.trainable is not False

    def decode(self, arrays: Sequence[Array]) -> Array:
        """Compute the leaf, as JAX functions take it, from the values of its variables."""
        (array,) = arrays
        # A backend may hold a dtype that it does not have as another one.
        array = jnp.asarray(array, self.stored)
        if self.impl is not None:
            return jax.random.wrap_key_data(array, impl=self.impl)
        # Cast in the compiled function, where it costs nothing, and gradients come back in the dtype of the variable.
        return array if self.cast is None else array.astype(self.cast)

    def encode(self, value: Any) -> list[Array]:
        """Compute the values of its variables from a new leaf."""
        # A Keras variable has no dtype for keys. It holds their data, which `decode` makes a key again.
        data = value if self.impl is None else jax.random.key_data(value)
        return [jnp.asarray(data, self.stored)]

    def read(self) -> Any:
        """Return the value as a NumPy array. A PRNG key is a JAX array."""
        (variable,) = self.variables
        value = to_host(variable)
        if self.impl is None:
            return value
        return jax.random.wrap_key_data(jnp.asarray(value), impl=self.impl)

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
        array = next(host_copies([array_of(value)]))
        problems = []
        if array.shape != self.shape:
            problems.append(f"  shape: {self.path} is {self.shape}; received {array.shape}")
        # Python numbers do not have a dtype of their own.
        numbers = (bool, int, float, complex)
        if isinstance(value, numbers) and can_hold(self.stored, array.dtype):
            array = array.astype(self.stored)
        if str(array.dtype) != self.stored:
            problems.append(f"  dtype: {self.path} is {self.stored}; received {array.dtype}")
        return [array], problems
