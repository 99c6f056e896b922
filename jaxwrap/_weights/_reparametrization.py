"""A leaf that is computed from parts: the protocol, and the two kinds that the weights themselves know."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxwrap._serialization import register_serializable
from jaxwrap._specs import used_inputs
from jaxwrap._typing import Array


class Reparametrization(abc.ABC):
    """Computes a leaf of the parameters from parts. Subclass it to write your own.

    `Rule(reparametrize=...)` puts it in the place of the leaves that a pattern matches. Each part becomes a variable
    under the path of the leaf, `params/Dense_0/kernel/scale`. The model, `get_variables` and checkpoints see the leaf.

    A subclass is a registered frozen dataclass: its fields are what a file holds. A field that is a
    `Reparametrization` itself applies to the part of the same name, so that parts nest. Autocast applies to the
    leaf, never to its parts.

    Attributes:
        frozen: The names of parts that are never trained. Integer parts never are.

    Example:
        >>> import dataclasses, flax.linen as nn, jax.numpy as jnp, numpy as np, jaxwrap
        >>> @jaxwrap.register_serializable("mine")
        ... @dataclasses.dataclass(frozen=True)
        ... class Scaled(jaxwrap.Reparametrization):
        ...     frozen = ("direction",)
        ...     def init(self, leaf, key):
        ...         return {"direction": leaf, "scale": jnp.ones((), leaf.dtype)}
        ...     def apply(self, parts, shape):
        ...         return parts["direction"] * parts["scale"]
        >>> rules = {".*/kernel": jaxwrap.Rule(reparametrize=Scaled())}
        >>> layer = jaxwrap.FlaxLayer(nn.Dense(2), name="dense", rules=rules)
        >>> _ = layer(np.ones((1, 3), "float32"))
        >>> [variable.path for variable in layer.trainable_variables]
        ['dense/params/bias', 'dense/params/kernel/scale']
    """

    frozen: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def init(self, leaf: Array, key: Array) -> Mapping[str, Array]:
        """Return the parts of a leaf, by name.

        Args:
            leaf: The value, of any shape and a float or complex dtype.
            key: A JAX key, the same one for the same layer seed and path.

        Raises:
            ValueError: If the leaf cannot be computed from such parts. The error says why.
        """

    @abc.abstractmethod
    def apply(self, parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
        """Compute the leaf from its parts. Pure JAX, inside the traced call, differentiable to any order.

        Args:
            parts: The values of the parts.
            shape: The shape of the leaf.
        """

    def apply_training(
        self, parts: Mapping[str, Array], shape: tuple[int, ...], key: Array
    ) -> tuple[Array, Mapping[str, Array]]:
        """Compute the leaf in a training call. By default as `apply` does.

        Args:
            parts: The values of the parts.
            shape: The shape of the leaf.
            key: A JAX key, a new one for each call. A layer has a seed for it if the leaf depends on it.

        Returns:
            The leaf, and new values of frozen parts by name. They are assigned after the call, as state is.
        """
        return self.apply(parts, shape), {}

    def assign(self, leaf: Array, parts: Mapping[str, Array], key: Array) -> Mapping[str, Array]:
        """Return the parts for a new value of the leaf. By default those that `init` makes.

        Args:
            leaf: The new value.
            parts: The present parts.
            key: As `init` gets it.
        """
        return self.init(leaf, key)


@register_serializable("jaxwrap")
@dataclasses.dataclass(frozen=True)
class RealImaginary(Reparametrization):
    """A complex leaf as two real parts, `real` and `imaginary`.

    The gradient that JAX gives for a complex parameter is the conjugate of the direction of ascent, and optimizers
    with squares, such as Adam, have no one meaning for complex numbers. Two real parts are trained alike by every
    optimizer on every backend. Complex leaves of the parameters have it by default.

    Example:
        >>> import numpy as np, jaxwrap
        >>> layer = jaxwrap.JaxLayer(lambda params, x: abs(x * params), params=1 + 2j)
        >>> _ = layer(np.ones(3, "float32"))
        >>> [weight.name for weight in layer.trainable_weights], layer.get_variables()["params"].item()
        (['real', 'imaginary'], (1+2j))
    """

    def init(self, leaf: Array, key: Array) -> Mapping[str, Array]:
        """Split the numbers. ValueError for a leaf of real numbers."""
        if not jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(f"RealImaginary is for complex leaves; received {leaf.dtype}.")
        return {"real": leaf.real, "imaginary": leaf.imag}

    def apply(self, parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
        """Join the numbers."""
        return jax.lax.complex(parts["real"], parts["imaginary"])


@register_serializable("jaxwrap")
@dataclasses.dataclass(frozen=True)
class Tied(Reparametrization):
    """A leaf that has the value of another leaf of the same layer, and no variables of its own.

    Attributes:
        path: The path of the other leaf below the layer.
        transpose: Whether the axes are reversed.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp, numpy as np, jaxwrap
        >>> class LanguageModel(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, tokens):
        ...         return nn.Dense(11, use_bias=False, name="head")(nn.Embed(11, 4, name="embed")(tokens))
        >>> tied = jaxwrap.reparametrizations.Tied("params/embed/embedding", transpose=True)
        >>> layer = jaxwrap.FlaxLayer(LanguageModel(), rules={"params/head/kernel": jaxwrap.Rule(reparametrize=tied)})
        >>> _ = layer(np.ones((1, 3), "int32"))
        >>> layer.count_params()
        44
    """

    path: str
    transpose: bool = False

    def init(self, leaf: Array, key: Array) -> Mapping[str, Array]:
        """Return no parts."""
        return {}

    def apply(self, parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
        """Return the value of the other leaf, which comes as the part `source`."""
        return parts["source"].T if self.transpose else parts["source"]


class Layout:
    """The parts of one leaf in their order, those of nested reparametrizations included.

    Attributes:
        names: The names of the parts below the leaf: `base/values`.
        frozen: For each, whether it is never trained.
        differs: Whether a training call may compute the leaf in another way than `fold`.
        draws: Whether a training call needs a key.
        updated: The places of the parts that get new values in a training call.
    """

    def __init__(
        self, form: Reparametrization, shape: tuple[int, ...], parts: Mapping[str, Layout | None]
    ):
        self._form = form
        self._shape = shape
        self._parts = dict(parts)
        self.names: tuple[str, ...] = ()
        self.frozen: tuple[bool, ...] = ()
        for name, inner in self._parts.items():
            below = (name,) if inner is None else tuple(f"{name}/{part}" for part in inner.names)
            held = name in form.frozen
            self.names += below
            self.frozen += (held,) if inner is None else tuple(held or one for one in inner.frozen)
        self.differs = type(form).apply_training is not Reparametrization.apply_training or any(
            inner.differs for inner in self._parts.values() if inner is not None
        )
        self.draws = False
        self.updated: tuple[int, ...] = ()

    @classmethod
    def make(cls, form: Reparametrization, leaf: Array, key: Array) -> tuple[Layout, list[Array]]:
        """Split a leaf. Return the layout, and the parts in its order.

        Raises:
            TypeError: If `init` does not return a dict of arrays.
            ValueError: If `apply` does not give the shape of the leaf back, or `apply_training` returns values that
                are not those of frozen parts.
        """
        return cls._of(form, leaf, form.init(leaf, key), key)

    @classmethod
    def _of(
        cls, form: Reparametrization, leaf: Array, made: Any, key: Array
    ) -> tuple[Layout, list[Array]]:
        kind = type(form).__name__
        names = list(made) if isinstance(made, Mapping) else [None]
        if not all(isinstance(name, str) and name.isidentifier() for name in names):
            raise TypeError(
                f"{kind}.init must return a dict from names, which are Python identifiers, to arrays; it returned "
                f"{names if isinstance(made, Mapping) else f'a {type(made).__name__}'}."
            )
        layouts: dict[str, Layout | None] = {}
        arrays: list[Array] = []
        for place, (name, part) in enumerate(made.items()):
            part = jnp.asarray(part)
            inner = _nested(form, name)
            if inner is None:
                layouts[name] = None
                arrays.append(part)
            else:
                layouts[name], below = cls.make(inner, part, jax.random.fold_in(key, place))
                arrays += below
        layout = cls(form, tuple(leaf.shape), layouts)
        if arrays:
            folded = jax.eval_shape(layout.fold, arrays)
            if folded.shape != tuple(leaf.shape):
                raise ValueError(
                    f"{kind}.apply must return the leaf, of shape {tuple(leaf.shape)}; it returned {folded.shape}."
                )
        if layout.differs:
            layout._look_at_training(arrays, key)
        return layout, arrays

    def _look_at_training(self, arrays: list[Array], key: Array) -> None:
        """Find out what a training call needs and changes, without data."""
        closed, (folded, new) = jax.make_jaxpr(self.fold_training, return_shape=True)(arrays, key)
        fits = {
            place: self.frozen[place]
            and (value.shape, value.dtype) == (arrays[place].shape, arrays[place].dtype)
            for place, value in new.items()
        }
        if folded.shape != self._shape or not all(fits.values()):
            raise ValueError(
                f"{type(self._form).__name__}.apply_training must return the leaf, of shape {self._shape}, and new "
                f"values of frozen parts with their shapes and dtypes; it returned {folded.shape} and "
                f"{ ({self.names[place]: f'{value.dtype}{value.shape}' for place, value in new.items()}) }."
            )
        self.draws, self.updated = used_inputs(closed)[-1], tuple(sorted(new))

    def fold(self, arrays: Any) -> Array:
        """Compute the leaf from its parts in order."""
        return self._form.apply(self._by_name(arrays), self._shape)

    def fold_training(self, arrays: Any, key: Array) -> tuple[Array, dict[int, Array]]:
        """Compute the leaf in a training call, and new values of parts by their place."""
        parts, updates, start = {}, {}, 0
        for place, (name, inner) in enumerate(self._parts.items()):
            if inner is None:
                parts[name] = arrays[start]
                start += 1
                continue
            below = arrays[start : start + len(inner.names)]
            parts[name], new = inner.fold_training(below, jax.random.fold_in(key, place))
            updates |= {start + n: value for n, value in new.items()}
            start += len(inner.names)
        leaf, new = self._form.apply_training(parts, self._shape, key)
        if unknown := new.keys() - set(self.names):
            raise ValueError(
                f"{type(self._form).__name__}.apply_training returned new values of {sorted(unknown)}; the parts are "
                f"{self.names}."
            )
        updates |= {self.names.index(name): value for name, value in new.items()}
        return leaf, updates

    def _by_name(self, arrays: Any) -> dict[str, Array]:
        """Return the parts as the reparametrization takes them: nested ones are computed from theirs."""
        parts, rest = {}, list(arrays)
        for name, inner in self._parts.items():
            count = 1 if inner is None else len(inner.names)
            below, rest = rest[:count], rest[count:]
            parts[name] = below[0] if inner is None else inner.fold(below)
        return parts

    def assign(self, leaf: Array, arrays: Any, key: Array) -> list[Array]:
        """Return the parts for a new value of the leaf, in order.

        Raises:
            ValueError: If they have other shapes than the present ones.
        """
        new = self._form.assign(leaf, self._by_name(arrays), key)
        layout, made = self._of(self._form, leaf, new, key)
        before, after = ([a.shape for a in part] for part in (arrays, made))
        if layout.names != self.names or before != after:
            raise ValueError(
                f"{type(self._form).__name__} makes other parts of the new value: {layout.names}, of shapes {after}; "
                f"expected {self.names}, of shapes {before}."
            )
        return made


def _nested(form: Reparametrization, name: str) -> Reparametrization | None:
    inner = getattr(form, name, None)
    return inner if isinstance(inner, Reparametrization) else None
