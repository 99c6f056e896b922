"""Optax transformations: ready ones, or factories that make one from a learning rate."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax

from jaxwrap._typing import PyTree

_MISSING = re.compile(r"missing \d+ required keyword-only argument")
EXAMPLE = "`OptaxOptimizer(optax.adamw, learning_rate=1e-3)`"


class Recipe:
    """A way to get an Optax transformation.

    Args:
        transformation: The transformation, or its factory.
        learning_rate: The learning rate, or None if the factory takes none.

    Attributes:
        source: The transformation or the factory.
        is_ready: Whether it is a transformation, not a factory.
        takes_rate: Whether the factory takes a learning rate.

    Raises:
        TypeError: If it is neither.
        ValueError: If it cannot be called with the learning rate, or was made with one already.
    """

    def __init__(self, transformation: Any, learning_rate: Any):
        self.source = transformation
        self.is_ready = _is_transformation(transformation)
        self.takes_rate = learning_rate is not None
        if self.is_ready:
            if self.takes_rate:
                raise ValueError(
                    f"received learning_rate={learning_rate!r} and a transformation that has been made "
                    f"with one already. Pass its factory: {EXAMPLE}; or no `learning_rate`."
                )
            return
        if isinstance(transformation, type) or not callable(transformation):
            raise TypeError(
                "expected an Optax transformation, or a function that makes one; received "
                f"{transformation!r}. Pass `optax.adamw(1e-3)`, or {EXAMPLE}."
            )
        try:
            arguments = {"learning_rate": learning_rate} if self.takes_rate else {}
            inspect.signature(transformation).bind(**arguments)
        except TypeError as error:
            what = "with `learning_rate=` alone" if self.takes_rate else "without arguments"
            advice = (
                "Fix its other arguments with `functools.partial`, and leave `learning_rate` to OptaxOptimizer"
                if self.takes_rate
                else f"Pass `learning_rate`: {EXAMPLE}"
            )
            raise ValueError(
                f"{transformation!r} cannot be called {what}: {error}. {advice}."
            ) from None

    def make(self, learning_rate: Any) -> Any:
        """Make the transformation, for a learning rate that may be traced."""
        import optax

        made = self.source
        if not self.is_ready:
            made = made(learning_rate=learning_rate) if self.takes_rate else made()
            if not _is_transformation(made):
                raise TypeError(
                    f"expected an Optax transformation from {self.source!r}; it returned {made!r}."
                )
        if isinstance(made, optax.MultiSteps):
            made = made.gradient_transformation()
        # Then `update` takes extra arguments, whether it needs them or not.
        return optax.with_extra_args_support(made)


def with_arguments(
    transformation: Any, kwargs: Mapping[str, Any], keras_arguments: Collection[str]
) -> tuple[Any, dict[str, Any]]:
    """Fix those arguments of a factory that Keras's optimizers do not have.

    Returns:
        The factory, and the arguments that are left.

    Raises:
        TypeError: For an argument that neither has.
    """
    extra = {name: value for name, value in kwargs.items() if name not in keras_arguments}
    if not extra:
        return transformation, dict(kwargs)
    is_factory = callable(transformation) and not _is_transformation(transformation)
    parameters = inspect.signature(transformation).parameters if is_factory else {}
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if unknown := [name for name in extra if name not in parameters and not is_open]:
        listed = ", ".join(parameters) or "no arguments, since it is a transformation already"
        raise TypeError(
            f"received {', '.join(unknown)}, which neither a Keras optimizer nor the transformation takes. The "
            f"transformation takes {listed}; a Keras optimizer {', '.join(keras_arguments)}."
        )
    kept = {name: value for name, value in kwargs.items() if name not in extra}
    return functools.partial(transformation, **extra), kept


class SlowParams(NamedTuple):
    """The state of a transformation that has `optax.lookahead` in it.

    Attributes:
        slow: The slow parameters, for inference.
        inner: The state of the transformation.
    """

    slow: PyTree
    inner: PyTree


def init(transformation: Any, params: PyTree) -> PyTree:
    """Make the first state. Lookahead needs a second set of parameters, which becomes a part of it."""
    import optax

    # It takes one set as well, but complains in the log.
    if getattr(transformation.init, "__qualname__", "").startswith("lookahead."):
        both = optax.LookaheadParams.init_synced(params)
        return SlowParams(params, transformation.init(both))
    state = transformation.init(params)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, optax.LookaheadState))
    if any(isinstance(node, optax.LookaheadState) for node in nodes):
        return SlowParams(params, state)
    return state


def update(
    transformation: Any, gradients: PyTree, state: PyTree, params: PyTree, extra: dict[str, Any]
) -> tuple[PyTree, PyTree]:
    """Return the updates of the parameters, and the next state."""
    import optax

    if not isinstance(state, SlowParams):
        return transformation.update(gradients, state, params, **extra)
    both = optax.LookaheadParams(fast=params, slow=state.slow)
    updates, inner = transformation.update(gradients, state.inner, both, **extra)
    return updates.fast, SlowParams(optax.apply_updates(state.slow, updates.slow), inner)


def needed_arguments(transformation: Any, params: PyTree, top: str) -> tuple[str, ...]:
    """Return the names of the extra arguments without which the transformation cannot update.

    Args:
        transformation: The transformation.
        params: The parameters.
        top: Their first levels, for errors.

    Raises:
        ValueError: If it needs the function that computes the loss, as line searches do, or does not fit `params`.
    """

    def attempt(params: PyTree) -> PyTree:
        return update(transformation, params, init(transformation, params), params, {})

    try:
        jax.eval_shape(attempt, params)
    except (TypeError, ValueError, KeyError) as error:
        message = str(error)
        if not isinstance(error, TypeError) or not _MISSING.search(message):
            _explain(error, top)
            raise
        # Optax has no list of them. Only Python's error names them.
        names = tuple(re.findall(r"'(\w+)'", message))
        if "value_fn" in names:
            raise ValueError(
                "this transformation needs `value_fn`, the loss as a function of the parameters, as line "
                "searches do. That is not supported: a Keras optimizer gets gradients, and cannot compute the loss "
                "again. Use one without a line search, such as `optax.lbfgs(1e-2, linesearch=None)`."
            ) from None
        return names
    return ()


def _explain(error: Exception, top: str) -> None:
    """Add the names of the parameters to the error of a transformation, or raise it as one about labels."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    about = f"gets parameters and gradients as nested dicts, at the top {top}"
    if isinstance(error, TypeError) or module.partition(".")[0] not in ("jax", "optax"):
        # Of the user's own function, or not about structure.
        error.add_note(f"The transformation {about}.")
        return
    raise ValueError(
        f"the transformation does not fit the parameters. It {about}. Labels and masks need the same keys. Pass a "
        "function of the parameters, such as `lambda params: jax.tree_util.tree_map_with_path(label_of, params)`.\n"
        f"{type(error).__name__}: {error}"
    ) from error


def injected(state: PyTree, find: Callable[[Any], Any]) -> list[Any]:
    """Return what `find` returns for each `optax.inject_hyperparams` in a state, without None."""

    def is_injected(node: Any) -> bool:
        return isinstance(node, tuple) and hasattr(node, "hyperparams")

    found = []
    remaining = [state]
    while remaining:
        nodes = jax.tree.leaves(remaining.pop(), is_leaf=is_injected)
        for node in filter(is_injected, nodes):
            found.append(find(node))
            remaining.append(node.inner_state)
    return [value for value in found if value is not None]


def _is_transformation(obj: Any) -> bool:
    return not isinstance(obj, type) and all(
        callable(getattr(obj, name, None)) for name in ("init", "update")
    )
