"""What the layers of all libraries' modules share."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxwrap._layer import JaxLayer
from jaxwrap._pure import CallResult
from jaxwrap._pytree import key_name
from jaxwrap._serialization import serialize_callable
from jaxwrap._signature import TrainFlag, call_by_name, find_train_flag
from jaxwrap._typing import Array, PyTree

# What may be said of a collection of a module's variables.
TRAINABLE, STATE, LOSS, METRIC, OUTPUT, DROP = ROLES = (
    "trainable",
    "state",
    "loss",
    "metric",
    "output",
    "drop",
)


class ModuleLayer(JaxLayer):
    """A layer of a module: it is called with what the module takes, except the train flag.

    A subclass calls `_takes` before the constructor of `JaxLayer`, and `_call_with` in its `call_fn`, whose `inputs`
    are a dict of all that the caller has fed.
    """

    module: Any
    method: Any
    _given: Mapping[str, inspect.Parameter]
    _fed: tuple[inspect.Parameter, ...]
    _flag: TrainFlag | None

    def _takes(
        self,
        parameters: Mapping[str, inspect.Parameter],
        training_argument: str | None,
        own: Iterable[str] = (),
    ) -> None:
        """Says what the module takes.

        Args:
            parameters: The parameters of what is called.
            training_argument: See `FlaxLayer`.
            own: Names that the adapter feeds, not the caller.
        """
        flag = find_train_flag(parameters, training_argument, self._describe(None))
        skipped = {"training", *own, *([flag.name] if flag else [])}
        fed = tuple(
            parameter
            for name, parameter in parameters.items()
            if name not in skipped
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        )
        by_position = [p for p in fed if p.kind is not p.KEYWORD_ONLY]
        if not by_position and any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
            fed = (inspect.Parameter("inputs", inspect.Parameter.POSITIONAL_ONLY), *fed)
        self._keep("_flag", flag)
        self._keep("_given", parameters)
        self._keep("_fed", fed)

    def _method_config(self, library_base: type) -> Any:
        """What the config holds of `method`.

        Raises:
            ValueError: If it is the name of what is no public function of the module's class.
        """
        method = self.method
        if inspect.ismethod(method) and method.__self__ is self.module:
            method = method.__name__
        check_method(self.module, method, library_base, self._owner)
        return serialize_callable(method, "method", self._owner)

    def _module_parameters(self) -> Iterable[inspect.Parameter]:
        return self._fed

    def _call_with(
        self, fn: Callable[..., Any], inputs: dict[str, PyTree], training: bool, **own: Any
    ) -> Any:
        """Calls what the caller's arguments are for, with the train flag and what the adapter feeds itself."""
        if self._flag:
            own[self._flag.name] = self._flag.value(training)
        if "inputs" in inputs and "inputs" not in self._given:  # a function of any arguments
            inputs = dict(inputs)
            return fn(inputs.pop("inputs"), **inputs, **own)
        return call_by_name(fn, self._given, {**inputs, **own})


class Collections:
    """What the collections of a module are, by name.

    Attributes:
        given: What the user said.
    """

    def __init__(self, given: Mapping[str, str] | None, defaults: Mapping[str, str], owner: str):
        """Checks what the user said.

        Raises:
            ValueError: If a collection is said to be something that there is not.
        """
        if not isinstance(given, (Mapping, type(None))):
            raise ValueError(f"{owner}: `collections` must be a dict or None; received {given!r}.")
        for name, role in (given or {}).items():
            if role not in ROLES:
                raise ValueError(
                    f"{owner}: `collections` says {role!r} of {name!r}; expected one of {', '.join(map(repr, ROLES))}."
                )
        self.given = dict(given or {})
        self._roles = {**defaults, **self.given}

    def named(self, *roles: str) -> list[str]:
        """The names of which one of these roles has been said."""
        return [name for name, role in self._roles.items() if role in roles]

    def role(self, name: str, default: str = STATE) -> str:
        """What a collection is."""
        return self._roles.get(name, default)

    def select(self, collections: Mapping[str, PyTree], role: str) -> dict[str, PyTree]:
        """Those of the collections that are that."""
        return {name: tree for name, tree in collections.items() if self.role(name) == role}

    def result(self, outputs: PyTree, state: PyTree, sown: Mapping[str, PyTree]) -> CallResult:
        """What a `call_fn` returns whose module has sown these collections."""
        if self.named(OUTPUT):
            outputs = (outputs, self.select(sown, OUTPUT))
        metrics = _flat_metrics(self.select(sown, METRIC))
        return CallResult(outputs, state, self.select(sown, LOSS), metrics)


def method_parameters(
    module: Any, method: str | Callable[..., Any] | None
) -> dict[str, inspect.Parameter]:
    """What a method takes, beside the module: None for `__call__`, a bound method, a name, or a free function."""
    bound = getattr(module, method) if isinstance(method, str) else method or module.__call__
    parameters = dict(inspect.signature(bound).parameters)
    if method is not None and not isinstance(method, str) and not inspect.ismethod(method):
        del parameters[next(iter(parameters))]  # the module
    return parameters


def check_method(module: Any, method: Any, library_base: type, owner: str) -> None:
    """Raises ValueError unless a method that is named in a config is a public function of the module's own class.

    Args:
        module: The module.
        method: The name; what is none is no matter of this function.
        library_base: The class of the library that all modules are of; its own functions are not the module's.
        owner: What errors begin with.
    """
    if not isinstance(method, str):
        return
    own = [cls for cls in type(module).__mro__ if not issubclass(library_base, cls)]
    found = next((vars(cls)[method] for cls in own if method in vars(cls)), None)
    if (method.startswith("_") and method != "__call__") or not inspect.isfunction(found):
        public = [
            name
            for name in dict.fromkeys(name for cls in own for name in vars(cls))
            if not name.startswith("_") and inspect.isfunction(vars(type(module)).get(name))
        ]
        raise ValueError(
            f"{owner}: a config may name as `method` a public function that the class of the module defines; "
            f"{type(module).__name__} has {', '.join([*public, '__call__'])}. Received {method!r}."
        )


def bind_method(module: Any, method: str | Callable[..., Any] | None) -> Callable[..., Any]:
    """The same method of another instance of the module."""
    if inspect.ismethod(method):
        method = method.__name__
    if isinstance(method, str):
        return getattr(module, method)
    return module if method is None else functools.partial(method, module)


def require(
    library: str, minimum: str, extra: str, owner: str, distribution: str | None = None
) -> None:
    """Makes sure that a library is there, and not older than what we support.

    Args:
        library: What is imported.
        minimum: The oldest version.
        extra: The name of our extra that installs it.
        owner: What errors begin with.
        distribution: The name under which it is installed, if that is another one.

    Raises:
        ImportError: If not.
    """
    install = f"Install it with `pip install jaxwrap[{extra}]`."
    if importlib.util.find_spec(library) is None:
        raise ImportError(f"{owner} needs {library!r}, which is not installed. {install}")
    distribution = distribution or library
    found = importlib.metadata.version(distribution)
    if _numbers(found) < _numbers(minimum):
        raise ImportError(
            f"{owner} needs {distribution} {minimum} or newer; {found} is installed. {install}"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _flat_metrics(collections: PyTree) -> dict[str, Array]:
    """Metrics by their paths; what has been sown once is no tuple."""
    metrics = {}
    for collection in collections.values():
        leaves = jax.tree_util.tree_leaves_with_path(
            collection, is_leaf=lambda node: isinstance(node, tuple) and len(node) == 1
        )
        for path, leaf in leaves:
            metrics["/".join(map(key_name, path))] = leaf[0] if isinstance(leaf, tuple) else leaf
    return metrics
