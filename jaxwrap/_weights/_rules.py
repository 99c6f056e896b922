"""`Rule`, and the ordered list of rules by pattern."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import keras

from jaxwrap._dtypes import check_dtype
from jaxwrap._serialization import deserialize, serialize, serialize_callable
from jaxwrap._weights._axes import check_axes
from jaxwrap._weights._patterns import compile_pattern, match, pairs_of
from jaxwrap._weights._reparametrization import Reparametrization

AGGREGATIONS = ("mean", "sum", "only_first_replica", "none")


@keras.saving.register_keras_serializable(package="jaxwrap")
@dataclasses.dataclass(frozen=True)
class Rule:
    """Settings for the leaves whose paths match a pattern. A field that is None changes nothing.

    Attributes:
        trainable: Whether a float leaf of the parameters is trained. If not, no gradient is computed for it.
        dtype: The dtype of the variable. A float leaf takes any float dtype, an integer leaf any integer dtype.
        autocast: Whether a float leaf of the parameters is cast to the compute dtype for a call. State never is.
        regularizer: A Keras regularizer, its name or its config, whose loss `fit` adds.
        constraint: A Keras constraint, its name or its config, which optimizers apply after each update.
        reparametrize: A `Reparametrization`: the leaf is computed from parts. False for a leaf that is a plain
            variable, which `quantize` leaves alone.
        aggregation: What becomes of the values that the replicas of a `tf.distribute` strategy assign, as in
            `keras.Variable`: "mean", "sum", "only_first_replica" or "none". By default float state is the mean, all
            other state that of the first replica, and parameters are "none", since all replicas assign the same.
        layout: How `keras.distribution` divides a leaf on JAX: for each of its axes None, the name of an axis of the
            mesh, or a tuple of such names. It counts more than a `LayoutMap`, and `layout_map` returns it.

    Raises:
        TypeError: For a field of another type.
        ValueError: For a regularizer, a constraint or an aggregation that Keras does not know.

    Example:
        >>> import flax.linen as nn, numpy as np, jaxwrap
        >>> rules = {".*/bias": jaxwrap.Rule(trainable=False), ".*/kernel": jaxwrap.Rule(regularizer="l2")}
        >>> layer = jaxwrap.FlaxLayer(nn.Dense(2), name="dense", rules=rules)
        >>> _ = layer(np.ones((1, 3), "float32"))
        >>> [variable.path for variable in layer.trainable_variables], len(layer.losses)
        (['dense/params/kernel'], 1)
    """

    trainable: bool | None = None
    dtype: Any = None
    autocast: bool | None = None
    regularizer: Any = None
    constraint: Any = None
    reparametrize: Any = None
    aggregation: str | None = None
    layout: Any = None

    def __post_init__(self) -> None:
        for name in ("trainable", "autocast"):
            if not isinstance(value := getattr(self, name), (bool, type(None))):
                raise TypeError(f"Rule: `{name}` must be True, False or None; received {value!r}.")
        if self.dtype is not None:
            name = self.dtype if isinstance(self.dtype, str) else jnp.dtype(self.dtype).name
            check_dtype(name)
            object.__setattr__(self, "dtype", name)
        if self.reparametrize not in (None, False) and not isinstance(
            self.reparametrize, Reparametrization
        ):
            raise TypeError(
                "Rule: `reparametrize` must be a `jaxwrap.Reparametrization`, such as "
                f"`jaxwrap.reparametrizations.LoRA(8)`, or False; received {self.reparametrize!r}."
            )
        if self.aggregation not in (None, *AGGREGATIONS):
            raise ValueError(
                f"Rule: `aggregation` must be one of {', '.join(map(repr, AGGREGATIONS))}, or None; received "
                f"{self.aggregation!r}."
            )
        if self.layout is not None:
            object.__setattr__(self, "layout", check_axes(self.layout, "Rule: `layout`"))
        # Resolved now: a wrong name should fail here, and not when a layer is built.
        object.__setattr__(self, "regularizer", keras.regularizers.get(self.regularizer))
        object.__setattr__(self, "constraint", keras.constraints.get(self.constraint))

    def then(self, later: Rule) -> Rule:
        """Return this rule, overridden by the fields that `later` sets."""
        return dataclasses.replace(self, **later.set_fields())

    def set_fields(self) -> dict[str, Any]:
        """Return the fields that are not None."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def get_config(self) -> dict[str, Any]:
        """Return the fields that are not None, as JSON."""
        return {name: serialize_callable(value, name) for name, value in self.set_fields().items()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Rule:
        """Make a rule from the result of `get_config`."""
        return cls(**{name: deserialize(value, name) for name, value in config.items()})


class Rules:
    """Rules by pattern, in order. All that match a path apply, later ones over earlier ones.

    Args:
        rules: A dict from pattern to rule, or pairs of them.

    Raises:
        TypeError: If it is something else.
        ValueError: If a pattern is not a regular expression.
    """

    def __init__(self, rules: Mapping[str, Rule] | Iterable[tuple[str, Rule]] | None):
        self.pairs: list[tuple[str, Rule]] = []
        for pattern, rule in pairs_of(rules, "rules", "`jaxwrap.Rule`"):
            # Paths exist after building only, but a wrong expression can fail now.
            compile_pattern(pattern)
            if not isinstance(rule, Rule):
                raise TypeError(
                    f"`rules` must map patterns to `jaxwrap.Rule`; received {pattern!r}: {rule!r}."
                )
            self.pairs.append((pattern, rule))

    def resolve(self, paths: Sequence[str]) -> list[Rule]:
        """Return one rule for each path.

        Raises:
            ValueError: If a pattern does not match any path.
        """
        resolved = [Rule()] * len(paths)
        for pattern, rule in self.pairs:
            for index in match(pattern, paths):
                resolved[index] = resolved[index].then(rule)
        return resolved

    def get_config(self) -> list[list[Any]]:
        """Return the pairs as JSON."""
        return [[pattern, serialize(rule, f"rules[{pattern!r}]")] for pattern, rule in self.pairs]
