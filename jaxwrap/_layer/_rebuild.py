"""Other variables for a layer that is built: parts in the place of leaves, and back."""

from __future__ import annotations

import gc
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras

from jaxwrap._bridge import get_bridge
from jaxwrap._dtypes import kind
from jaxwrap._instances import instances, with_subclasses
from jaxwrap._weights import Reparametrization, Rule
from jaxwrap.reparametrizations import Int4, Int8

if TYPE_CHECKING:
    from jaxwrap._layer._engine import Engine


def reparametrize(engine: Engine, pattern: str, form: Reparametrization) -> None:
    """Put parts in the place of the leaves that a pattern matches."""
    _rebuild(engine, [(pattern, Rule(reparametrize=form))])


def merge(engine: Engine, pattern: str) -> None:
    """Put plain variables in the place of the leaves of parts that a pattern matches."""
    leaves = engine.built_weights().matching(pattern)
    paths = [leaf.path for leaf in leaves if leaf.layout is not None]
    if not paths:
        raise ValueError(
            f"none of the leaves that {pattern!r} matches has parts: {', '.join(leaf.path for leaf in leaves[:5])}."
        )
    _rebuild(engine, [(re.escape(path), Rule(reparametrize=False)) for path in paths])


def quantize(engine: Engine, mode: str | None) -> None:
    """Quantize the float leaves of two axes and more that no rule is about.

    Raises:
        NotImplementedError: For a mode other than "int8" and "int4".
    """
    forms = {"int8": Int8, "int4": Int4}
    if mode not in forms:
        raise NotImplementedError(
            f"`quantize` of a layer of jaxwrap takes 'int8' or 'int4'; received {mode!r}. Its weights are as they were."
        )
    rule = Rule(reparametrize=forms[mode]())
    paths = [
        leaf.path
        for leaf in engine.built_weights().params.leaves
        if leaf.rule.reparametrize is None and kind(leaf.dtype) == "float" and len(leaf.shape) > 1
    ]
    if paths:
        _rebuild(engine, [(re.escape(path), rule) for path in paths])


def _rebuild(engine: Engine, pairs: list[tuple[str, Rule]]) -> None:
    with engine.lock:
        layer = engine.layer
        was_locked, has_changed = layer._tracker.locked, False
        layer._tracker.unlock()
        try:
            for removed in engine.built_weights().rebuild(layer, pairs):
                if not has_changed:
                    has_changed = True
                    _drop_compiled(engine)
                _let_go(layer, removed)
                del removed
                engine.track()
        finally:
            if has_changed:
                # In the order of a layer that is built so, by which Keras numbers weights and states of optimizers.
                weights = engine.built_weights()
                weights.set_trainable(True)
                _let_go(layer, weights.variables)
                engine.track()
                weights.set_trainable(layer.trainable)
                if engine.specs is not None:
                    engine.renew_program()
                get_bridge().register(layer)
            if was_locked:
                layer._lock_state()


def _drop_compiled(engine: Engine) -> None:
    """Drop what has the old variables in it, so that memory need not hold them until all leaves are new ones."""
    for model in _models_with(engine.layer):
        # So has the optimizer. `fit` now asks for `compile`.
        model.train_function = model.test_function = model.predict_function = None
        model.compiled = False
    if engine.program is not None:
        engine.program.close()
        engine.program = None
        # Compiled functions are in cycles.
        gc.collect()


def _let_go(layer: Any, variables: Sequence[keras.Variable]) -> None:
    for variable in variables:
        layer._untrack_variable(variable)


def _models_with(layer: Any) -> list[keras.Model]:
    # Layers do not know the models that they are in.
    models = instances(*with_subclasses(keras.Model))
    return [model for model in models if any(one is layer for one in model._flatten_layers())]
