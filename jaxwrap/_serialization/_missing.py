"""What has no registered name and needs one before it goes into a file: collected over a config, raised once."""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras

_MAX_PLACES = 3


class Missing(NamedTuple):
    """Something without a registered name.

    Attributes:
        where: The expression for it, and whose field it is.
        problem: What it is, as the rest of a sentence.
        advice: What to do instead of registering, or else how.
        key: What to register. None if that does not help.
        warning: The whole text of a warning, where a file can be written all the same.
        owner: The layer, optimizer, loss or metric.
    """

    where: str
    problem: str
    advice: str
    key: Any = None
    warning: str | None = None
    owner: str = ""


class Config:
    """A config that is being made.

    Attributes:
        is_for_file: Whether another process may read it.
        model: The model that Keras is writing to a file, or None.
        owner: Whose config it is: "FlaxLayer 'dense'", for example.
        expression: What its places begin with: "layer.", for example.
        missing: What has no registered name.
    """

    def __init__(self, is_for_file: bool, model: Any = None):
        self.is_for_file = is_for_file
        self.model = model
        self.owner = ""
        self.expression = ""
        self.missing: list[Missing] = []

    def lacks(
        self, where: Any, problem: str, advice: str, key: Any = None, warning: str | None = None
    ) -> None:
        """Note that something has no registered name."""
        self.missing.append(Missing(str(where), problem, advice, key, warning, self.owner))

    @contextlib.contextmanager
    def inside(self, path: str, owner: str | None = None) -> Iterator[None]:
        """Write a config inside this one, of an object at `path`, or of an owner."""
        before = self.expression, self.owner
        if owner is not None:
            self.expression, self.owner = path, owner
        else:
            self.expression += f"{path}."
        try:
            yield
        finally:
            self.expression, self.owner = before

    def check(self) -> None:
        """Warn of what loads under conditions only.

        Raises:
            TypeError: If something cannot be in a file. The error lists all that is missing in the whole model.
        """
        if not any(one.warning is None for one in self.missing):
            for one in self.missing:
                warnings.warn(str(one.warning), stacklevel=4)
            return
        every = self.missing
        if self.model is not None:
            with dry_config() as whole, contextlib.suppress(Exception):
                keras.saving.serialize_keras_object(self.model)
            every = whole.missing if len(whole.missing) > len(every) else every
        failures = [one for one in every if one.warning is None]
        raise TypeError(f"cannot be saved:\n{listed(failures)}{self._remedy(failures)}".rstrip())

    def _remedy(self, missing: list[Missing]) -> str:
        keys = {id(one.key): one.key for one in missing if one.key is not None}
        if not keys:
            return ""
        calls = [
            f'  jaxwrap.register_serializable("my_package")({k.__name__})' for k in keys.values()
        ]
        whole = "model" if len({one.owner for one in missing}) > 1 else self.expression.rstrip(".")
        in_one = f'Or all in one call: `jaxwrap.register_serializable("my_package")({whole})`.'
        return "\n".join(
            [
                "A file holds names. Register these before saving, and under the same names before loading:",
                *calls,
                *([in_one] if whole and all(one.key is not None for one in missing) else []),
            ]
        )


_CONFIG: contextvars.ContextVar[Config | None] = contextvars.ContextVar("config", default=None)


@contextlib.contextmanager
def one_config(expression: str = "", owner: str = "") -> Iterator[Config]:
    """Make one config in this scope. An inner scope belongs to the outer one.

    Args:
        expression: The object whose config it is, as an expression: "layer", for example.
        owner: The same object, by its class and its name.

    Raises:
        TypeError: At the end, if the config is for a file and something has no registered name.
    """
    config = _CONFIG.get()
    if config is not None:
        with config.inside(f"{expression}.", owner) if owner else contextlib.nullcontext():
            yield config
        return
    config = Config(*_being_saved())
    with _scope(config), config.inside(f"{expression}." if expression else "", owner):
        yield config
        if config.is_for_file:
            config.check()


@contextlib.contextmanager
def dry_config() -> Iterator[Config]:
    """Make a config in this scope to see what is missing in it."""
    with _scope(Config(is_for_file=True)) as config:
        yield config


@contextlib.contextmanager
def _scope(config: Config) -> Iterator[Config]:
    token = _CONFIG.set(config)
    try:
        yield config
    finally:
        _CONFIG.reset(token)


def listed(missing: list[Missing]) -> str:
    """Return a line for each thing, with the places where it is."""
    owners = {one.owner for one in missing}
    places: dict[tuple[str, str], list[str]] = {}
    for one in missing:
        of = f" of {one.owner}" if len(owners) > 1 and one.owner else ""
        places.setdefault((one.problem, one.advice), []).append(f"{one.where}{of}")
    lines = []
    for (problem, advice), (first, *others) in places.items():
        more = f" and {len(others) - _MAX_PLACES} more" if len(others) > _MAX_PLACES else ""
        also = f" (also {', '.join(others[:_MAX_PLACES])}{more})" if others else ""
        lines.append(f"  {first}{also} {problem}. {advice}".rstrip(" .") + ".\n")
    return "".join(lines)


def _being_saved() -> tuple[bool, Any]:
    """Return whether Keras is writing a file, and the model. Its `get_config` has no argument that says so."""
    orbax = getattr(keras.callbacks, "OrbaxCheckpoint", object)
    functions = [keras.saving.save_model, *filter(inspect.isfunction, vars(orbax).values())]
    writers = {inspect.unwrap(function).__code__ for function in functions}
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code in writers:
            return True, frame.f_locals.get("model")
        frame = frame.f_back
    return False, None
