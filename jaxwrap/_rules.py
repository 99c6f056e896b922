"""What is said of leaves, by patterns of their paths."""

from __future__ import annotations

import dataclasses
import difflib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import keras

from jaxwrap._bridge._base import check_dtype
from jaxwrap._serialization import deserialize, serialize_callable

if TYPE_CHECKING:
    import regex

# Patterns come from files too, and some take forever to match.
SECONDS = 5


@keras.saving.register_keras_serializable(package="jaxwrap")
@dataclasses.dataclass(frozen=True)
class Rule:
    """What is to hold for the leaves whose paths a pattern matches; None leaves a thing as it is.

    Attributes:
        trainable: Whether a float leaf of the parameters is trained. One that is not has no gradient computed for it.
        dtype: The dtype of the variable. A float leaf takes any float dtype, an integer leaf any integer dtype.
        autocast: Whether a float leaf of the parameters is cast to the compute dtype for a call. State never is.
        regularizer: A Keras regularizer, its name or its config, whose loss `fit` adds.
        constraint: A Keras constraint, its name or its config, which optimizers apply after each update.

    Raises:
        TypeError: For a field of another type.
        ValueError: For a regularizer or a constraint that Keras does not know.

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

    def __post_init__(self) -> None:
        for name in ("trainable", "autocast"):
            if not isinstance(value := getattr(self, name), (bool, type(None))):
                raise TypeError(f"Rule: `{name}` must be True, False or None; received {value!r}.")
        if self.dtype is not None:
            name = self.dtype if isinstance(self.dtype, str) else jnp.dtype(self.dtype).name
            check_dtype(name)
            object.__setattr__(self, "dtype", name)
        object.__setattr__(self, "regularizer", keras.regularizers.get(self.regularizer))
        object.__setattr__(self, "constraint", keras.constraints.get(self.constraint))

    def then(self, later: Rule) -> Rule:
        """This rule, with what `later` says put over it."""
        return dataclasses.replace(self, **later.said())

    def said(self) -> dict[str, Any]:
        """The fields that are not None."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def get_config(self) -> dict[str, Any]:
        """The fields that are not None, as a file holds them."""
        return {
            name: serialize_callable(value, name, "Rule") for name, value in self.said().items()
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Rule:
        """Makes a rule from what `get_config` gave."""
        return cls(**{name: deserialize(value, name, "Rule") for name, value in config.items()})


class Rules:
    """An ordered list of patterns with their rules; all that match a path apply, later ones over earlier ones."""

    def __init__(self, rules: Mapping[str, Rule] | Iterable[tuple[str, Rule]] | None, owner: str):
        """Checks what the user gave.

        Args:
            rules: A dict from pattern to rule, or pairs of them.
            owner: What errors begin with.

        Raises:
            TypeError: If it is something else.
            ValueError: If a pattern is no regular expression.
        """
        self.pairs: list[tuple[str, Rule]] = []
        given = rules.items() if isinstance(rules, Mapping) else rules or ()
        for pair in given:
            pattern, rule = pair
            if not isinstance(pattern, str) or not isinstance(rule, Rule):
                raise TypeError(
                    f"{owner}: `rules` must map patterns to `jaxwrap.Rule`; received {pattern!r}: {rule!r}."
                )
            compile_pattern(pattern, f"{owner}: the pattern {pattern!r}")
            self.pairs.append((pattern, rule))

    def resolve(self, paths: Sequence[str], owner: str) -> list[Rule]:
        """What the rules say of each path.

        Raises:
            ValueError: If a pattern matches none of the paths.
        """
        resolved = [Rule()] * len(paths)
        for pattern, rule in self.pairs:
            for index in match(pattern, paths, owner):
                resolved[index] = resolved[index].then(rule)
        return resolved


def compile_pattern(pattern: str, what: str) -> regex.Pattern[str]:
    """A regular expression, of which each search can be given a time limit.

    Args:
        pattern: The expression.
        what: What an error begins with.

    Raises:
        ValueError: If it is none.
    """
    import regex  # takes long to load; the standard library's searches cannot be stopped

    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"{what} is no regular expression: {error}.") from error


def match(pattern: str, paths: Sequence[str], owner: str) -> list[int]:
    """The indices of the paths that a pattern matches as a whole.

    Raises:
        ValueError: If there are none, or if it takes seconds to find out.
    """
    compiled = compile_pattern(pattern, f"{owner}: the pattern {pattern!r}")
    end = time.monotonic() + SECONDS
    try:
        found = [
            index
            for index, path in enumerate(paths)
            if compiled.fullmatch(path, timeout=max(end - time.monotonic(), 1e-3))
        ]
    except TimeoutError:
        raise ValueError(
            f"{owner}: it takes longer than {SECONDS} s to match the pattern {pattern!r} with {len(paths)} paths. "
            "Write it without repetitions inside of repetitions."
        ) from None
    if not found:
        raise ValueError(
            f"{owner}: the pattern {pattern!r} matches none of the {len(paths)} paths below the layer. A pattern is a "
            "regular expression for the whole path, such as '.*/kernel'. "
            f"Near it: {', '.join(_near(pattern, paths)) or 'nothing'}."
        )
    return found


def _near(pattern: str, paths: Sequence[str]) -> list[str]:
    literal = re.sub(r"\.\*|[\\^$()\[\]?+*|]", "", pattern)
    last = literal.rpartition("/")[2]
    containing = [path for path in paths if last and last in path]
    alike = difflib.get_close_matches(literal, paths, n=5, cutoff=0.3)
    by_name = [
        path
        for path in paths
        if difflib.SequenceMatcher(None, last, path.rpartition("/")[2]).ratio() > 0.6
    ]
    return (list(dict.fromkeys([*containing, *by_name, *alike])) or list(paths))[:5]
