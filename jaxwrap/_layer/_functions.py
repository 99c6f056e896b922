"""The adapter of pure functions: `call_fn`, and the `init_fn` that makes its values."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jaxwrap._errors import check_types
from jaxwrap._layer._adapter import Adapter, CallResult
from jaxwrap._layer._signature import (
    AUTO,
    Signature,
    TrainFlag,
    find_train_flag,
    parameters_of,
)
from jaxwrap._typing import PyTree

_OWN_ARGUMENTS = ("params", "state", "rng")


@dataclasses.dataclass(frozen=True, eq=False)
class Functions(Adapter):
    """A pair of pure functions, called by the names of their arguments. `JaxLayer` documents the fields.

    Raises:
        TypeError: If one of them cannot be called.
        ValueError: If an argument is missing, unknown or variadic.
    """

    call_fn: Callable[..., Any]
    init_fn: Callable[..., Any] | None = None
    call_arguments: Sequence[str] = ("inputs",)
    training_argument: str | None = AUTO
    rng_in_inference: bool = False

    def __post_init__(self) -> None:
        # A config makes a list of it.
        object.__setattr__(self, "call_arguments", tuple(self.call_arguments))
        _ = self._parsed  # raises early

    # Cached past the frozen dataclass, and not a field: a file holds all fields.
    @functools.cached_property
    def _parsed(self) -> _Parsed:
        parameters = parameters_of(self.call_fn, "call_fn")
        # Keras finds `mask` in the signature of `call`, and passes the mask of the first argument.
        flag = find_train_flag(parameters, self.training_argument)
        flag_name = flag.name if flag else "training"
        fed = self._fed_names(parameters, {flag_name, "training"})
        by_keras = "mask" in parameters and "mask" not in fed
        names = (*fed, "mask") if by_keras else fed
        own = tuple(name for name in _OWN_ARGUMENTS if name not in names)
        rng = _rng_name(parameters, names)
        allowed = dict.fromkeys((*own, rng, *names, flag_name, "training"))
        call = Signature(self.call_fn, "call_fn", allowed, names)
        training = parameters.get("training")
        has_default = training is None or training.default is not training.empty
        if not has_default and (flag is None or flag.name != "training"):
            raise ValueError(
                f"`training_argument` is {self.training_argument!r}, so `training` of `call_fn` needs a default."
            )
        taken = [
            parameters[name].replace(default=None)
            if by_keras and name == "mask"
            else parameters[name]
            for name in names
        ]
        variables = tuple(n for n in ("params", "state") if n in parameters and n not in names)
        init, init_flag, renamed = self._parse_init(flag, names)
        signature = _signature(taken)
        return _Parsed(call, flag, signature, variables, rng, init, init_flag, renamed, by_keras)

    def _fed_names(
        self, parameters: Mapping[str, inspect.Parameter], flags: Collection[str]
    ) -> tuple[str, ...]:
        """The names of what the caller passes: `call_arguments`, or the only other argument that is required."""
        fed = tuple(self.call_arguments)
        if fed != ("inputs",) or "inputs" in parameters:
            return fed
        known = {*_OWN_ARGUMENTS, "key", "mask", *flags}
        unknown = [name for name, p in parameters.items() if name not in known and _is_required(p)]
        return tuple(unknown) if len(unknown) == 1 else fed

    def _parse_init(
        self, call_flag: TrainFlag | None, names: Sequence[str]
    ) -> tuple[Signature | None, TrainFlag | None, dict[str, str]]:
        """The signature of `init_fn`, its train flag, and what it calls arguments that `call_fn` calls otherwise."""
        if self.init_fn is None:
            return None, None, {}
        parameters = parameters_of(self.init_fn, "init_fn")
        # A flag that is named by hand is that of `call_fn`. `init_fn` need not have it.
        flag = None if self.training_argument == AUTO else call_flag
        own = None
        if flag is None or flag.name in parameters:
            own = find_train_flag(parameters, self.training_argument)
        rng = _rng_name(parameters, names)
        known = (rng, *names, own.name if own else "training")
        unknown = [n for n, p in parameters.items() if n not in known and _is_required(p)]
        renamed = {rng: "rng"}
        if len(unknown) == len(names) == 1 and names[0] not in parameters:
            renamed[unknown[0]] = names[0]
        required = [name for name in names if name == "inputs" and name not in renamed.values()]
        return Signature(self.init_fn, "init_fn", (*known, *renamed), required), own, renamed

    @property
    def draws(self) -> str:  # type: ignore[override]
        """For a `call_fn` that takes `rng`: in training, as in Keras, unless `rng_in_inference` is set."""
        if self._parsed.rng not in self._parsed.call:
            return "never"
        return "always" if self.rng_in_inference else "in training"

    @property
    def variables(self) -> tuple[str, ...]:
        """Those of "params" and "state" that `call_fn` takes."""
        return self._parsed.variables

    def check_values(self, params: PyTree, state: PyTree) -> None:
        """Raise ValueError if nothing makes the params or the state that `call_fn` takes."""
        if self.variables and self.init_fn is None and params is None and state is None:
            wanted = " and ".join(f"`{name}`" for name in self.variables)
            raise ValueError(
                f"`call_fn` takes {wanted}, but `init_fn`, `params` and `state` are all None. Pass `init_fn` to make "
                "them when the layer is built, or pass their values."
            )

    def signature(self) -> inspect.Signature:
        """The `call_arguments`, and `mask` if `call_fn` takes it."""
        return self._parsed.signature

    def initial(self) -> tuple[PyTree, PyTree] | None:
        """A `call_fn` without params and state has nothing to make."""
        return None if self.variables else (None, None)

    def init(self, keys: PyTree, inputs: Mapping[str, PyTree]) -> tuple[PyTree, PyTree]:
        """Call `init_fn`."""
        parsed = self._parsed
        assert self.init_fn is not None
        assert parsed.init is not None
        values = {"rng": keys, **self._with_mask(inputs)}
        values |= {own: values[name] for own, name in parsed.renamed.items()}
        if parsed.init_flag:
            values[parsed.init_flag.name] = parsed.init_flag.value(True)
        made = parsed.init.call(self.init_fn, values)
        if "state" in self.variables:
            return _pair(made, "init_fn", "(params, state)")
        return made, None

    def call(
        self,
        params: PyTree,
        state: PyTree,
        keys: PyTree,
        inputs: Mapping[str, PyTree],
        training: bool,
    ) -> CallResult:
        """Call `call_fn`."""
        parsed = self._parsed
        values = {"params": params, "state": state, parsed.rng: keys, **self._with_mask(inputs)}
        if parsed.flag:
            values[parsed.flag.name] = parsed.flag.value(training)
        try:
            result = parsed.call.call(self.call_fn, values)
        except TypeError as error:
            if keys is None and self.draws == "in training" and "NoneType" in str(error):
                raise TypeError(
                    f"`{parsed.rng}` is None in inference, as in Keras, and `call_fn` needs it ({error}). Pass "
                    "`rng_in_inference=True` for a key in every call, or do not draw unless `training`."
                ) from error
            raise
        if isinstance(result, CallResult):
            return result
        if "state" in self.variables:
            return CallResult(*_pair(result, "call_fn", "(outputs, new_state)"))
        return CallResult(result)

    def _with_mask(self, inputs: Mapping[str, PyTree]) -> dict[str, PyTree]:
        return {**({"mask": None} if self._parsed.mask_by_keras else {}), **inputs}


def as_adapter(
    call_fn: Callable[..., Any] | Adapter,
    init_fn: Callable[..., Any] | None,
    call_arguments: Sequence[str],
    training_argument: str | None,
    rng_in_inference: bool,
    params: PyTree,
    state: PyTree,
) -> Adapter:
    """Return the adapter that is passed as `call_fn`, or that of the functions."""
    if isinstance(call_fn, Adapter):
        return call_fn
    check_types(
        call_arguments=(call_arguments, "a tuple of names"),
        training_argument=(training_argument, "a name or None"),
        rng_in_inference=(rng_in_inference, "a bool"),
    )
    functions = Functions(call_fn, init_fn, call_arguments, training_argument, rng_in_inference)
    functions.check_values(params, state)
    return functions


@dataclasses.dataclass(frozen=True)
class _Parsed:
    """What the signatures of both functions say."""

    call: Signature
    flag: TrainFlag | None
    signature: inspect.Signature
    variables: tuple[str, ...]
    rng: str
    init: Signature | None
    init_flag: TrainFlag | None
    renamed: Mapping[str, str]
    mask_by_keras: bool


def _is_required(parameter: inspect.Parameter) -> bool:
    variadic = (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and parameter.kind not in variadic


def _rng_name(parameters: Mapping[str, inspect.Parameter], names: Collection[str]) -> str:
    """The name of the key: `rng`, or `key` for a function that takes that instead. Empty if the caller passes `rng`."""
    if "rng" in names:
        return ""
    is_key = "key" in parameters and "rng" not in parameters and "key" not in names
    return "key" if is_key else "rng"


def _signature(parameters: Sequence[inspect.Parameter]) -> inspect.Signature:
    by_kind = sorted(parameters, key=lambda parameter: parameter.kind)
    try:
        return inspect.Signature(by_kind)
    except ValueError as error:
        raise ValueError(
            "in `call_arguments`, those without a default must come first; received "
            f"{', '.join(map(str, by_kind))}."
        ) from error


def _pair(result: Any, role: str, form: str) -> tuple[PyTree, PyTree]:
    is_sequence = isinstance(result, (tuple, list))
    if not is_sequence or len(result) != 2:
        length = f" of length {len(result)}" if is_sequence else ""
        raise ValueError(
            f"`call_fn` takes `state`, so `{role}` must return {form}; it returned a {type(result).__name__}{length}."
        )
    return result[0], result[1]
