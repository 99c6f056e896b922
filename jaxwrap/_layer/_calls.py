"""From Keras's call of a layer to the model and back: the plan of the call, the checks before it, state after it."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import keras

from jaxwrap._bridge import get_bridge
from jaxwrap._dense import check_dense
from jaxwrap._dtypes import warn_if_narrowed
from jaxwrap._errors import describe, naming, raise_named
from jaxwrap._layer import _fast
from jaxwrap._layer._containers import register_containers
from jaxwrap._layer._engine import Engine
from jaxwrap._layer._program import Plan, kind_of
from jaxwrap._layer._results import Result
from jaxwrap._pytree import Structure, describe_difference, partition
from jaxwrap._specs import partition_specs
from jaxwrap._typing import PyTree
from jaxwrap._weights._variables import assign_all

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Calls:
    """The calls of one layer.

    Args:
        layer: The layer.
        engine: Its parts.
        base: The class whose `call` a subclass may override. Then Keras must call it.

    Attributes:
        followed: The PyTorch module whose train flag counts when no `training` is passed, or None.
        signed: The method `call` with the signature of the model, unless a subclass overrides it.
    """

    def __init__(self, layer: Any, engine: Engine, base: type):
        self._layer = layer
        self._engine = engine
        self._is_direct = type(layer).call is base.call
        # By thread: `compute_mask` comes right after a call, and two threads may call one layer.
        self._last = threading.local()
        self.followed: Any = None
        self._check_whole = get_bridge().check_whole
        self.signed: Callable[..., Any] | None = None
        if self._is_direct:
            call = functools.partial(base.call, layer)
            self.signed = _with_signature(call, engine.inputs.signature)

    def enter(self, keras_call: Callable[..., Any], args: Args, kwargs: Kwargs) -> PyTree:
        """Pass a call on to Keras, or take the short way around it.

        Args:
            keras_call: Keras's `__call__` of the layer.
            args: The arguments of the call.
            kwargs: Likewise.
        """
        engine, layer = self._engine, self._layer
        kwargs = engine.inputs.rename(args, kwargs)
        if self.followed is not None:
            kwargs = self._with_flag(args, kwargs)
        leaves, treedef = jax.tree_util.tree_flatten((args, kwargs))
        kind = kind_of(treedef, leaves)
        plan = engine.program.plans.get(kind) if engine.program else None
        if plan is not None and plan.route and _fast.is_open(plan.route, layer, leaves):
            training = _fast.enter(layer, plan.training)
            try:
                return self._run(plan, leaves, training)
            except Exception as error:
                _fast.raise_as_keras(error, layer, engine.inputs.signature, args, training)
        if plan is None or not layer.built:
            # Keras passes only shapes to `build`, and its own errors come after it has changed things.
            with naming(describe(layer)):
                register_containers((args, kwargs))
                arguments, _ = engine.bind(args, kwargs)
                specs = engine.read_specs(arguments)
            # Of two threads that call first, one builds. The other waits for the lock, and finds the layer built.
            if not layer.built:
                with engine.first_call(specs):
                    return keras_call(*args, **kwargs)
        try:
            outputs = keras_call(*args, **kwargs)
        except Exception:
            # A plan knows dtypes and ranks, and a backend may fail in its own way before a layer looks.
            self._check_dense(leaves)
            raise
        if self._is_direct and (plan is None or plan.route is None):
            route = _fast.learn(layer, args, kwargs, leaves)
            if route is not None:
                (plan or self._plan(kind, treedef, leaves)).route = route
        return outputs

    def _with_flag(self, args: Args, kwargs: Kwargs) -> Kwargs:
        """Add the flag of the followed module to the arguments, unless this call or one around it has its own."""
        passed = kwargs.get("training") is not None or len(args) > len(self._engine.inputs.names)
        if passed or _fast.training_around() is not None:
            return kwargs
        # A functional model would keep the flag of the moment in which it is made.
        if any(isinstance(leaf, keras.KerasTensor) for leaf in jax.tree.leaves((args, kwargs))):
            return kwargs
        return {**kwargs, "training": self.followed.training}

    def call(self, args: Args, kwargs: Kwargs) -> PyTree:
        """Call the model on what Keras has prepared."""
        leaves, treedef = jax.tree_util.tree_flatten((args, kwargs))
        kind = kind_of(treedef, leaves)
        plans = self._engine.built_program().plans
        plan = plans.get(kind)
        if plan is not None:
            return self._run(plan, leaves, bool(plan.training))
        plan = self._plan(kind, treedef, leaves)
        try:
            return self._run(plan, leaves, bool(plan.training), is_new=True)
        except Exception:
            plans.pop(kind, None)
            raise

    def symbolic(self, args: Args, kwargs: Kwargs) -> PyTree:
        """Compute a `keras.KerasTensor` for each output."""
        engine = self._engine
        arguments, training = engine.bind(args, kwargs)
        engine.complete()
        outputs = engine.trace(engine.read_specs(arguments), bool(training))["outputs"]
        self.note_shapes(outputs)
        return _symbols(outputs)

    def _plan(self, kind: Any, treedef: Any, leaves: Sequence[Any]) -> Plan:
        """Make the plan for a kind of call."""
        engine, is_tensor = self._engine, get_bridge().is_tensor
        arguments, training = engine.bind(*treedef.unflatten(leaves))
        tensors, structure = partition(arguments, is_tensor)
        warn_if_narrowed(get_bridge().spec(tensor)[1] for tensor in tensors)
        # Bound in their place, the numbers of the leaves come out in the order of the structure.
        # Once for each kind of call. Later calls take their tensors by these places, without binding arguments.
        numbers, _ = engine.bind(*treedef.unflatten(range(len(leaves))))
        places = [n for n in jax.tree_util.tree_leaves(numbers) if is_tensor(leaves[n])]
        return engine.built_program().add(kind, structure, places, training)

    def _explain(self, error: Exception, received: Structure) -> None:
        """Raise an error that names how the structure of a failed first call differs from the one built for, if so."""
        _, built = partition_specs(self._engine.specs)
        if received == built:
            return
        difference = describe_difference(built, received) or "  other containers"
        with naming(describe(self._layer)):
            raise ValueError(
                "the model fails for these inputs, whose structure is not the one that the layer was built for:\n"
                f"{difference}\nIt raised {type(error).__name__}: {error}"
            ) from error

    def _check_dense(self, leaves: Sequence[Any]) -> None:
        with naming(describe(self._layer)):
            for leaf in leaves:
                check_dense(leaf)

    def _run(
        self, plan: Plan, leaves: Sequence[Any], training: bool, *, is_new: bool = False
    ) -> PyTree:
        """Call the model. If it raises, nothing has been assigned."""
        engine = self._engine
        # Not `with naming(...)`: at each call, a context manager would cost more than `try`.
        try:
            self._check_whole(self._layer, engine.weights.params.variables)  # type: ignore[union-attr]
            result = engine.built_program().run(plan, leaves, training)
            if result.metrics:
                engine.reports.check(result.metrics)
        except Exception as error:
            self._check_dense(leaves)
            if is_new:
                self._explain(error, plan.structure)
            raise_named(error, describe(self._layer))
        self._assign(result, training)
        return result.outputs

    def _assign(self, result: Result, training: bool) -> None:
        layer, engine = self._layer, self._engine
        changed: list[keras.Variable] = []
        values: list[Any] = []
        if result.state and (training or layer.update_state_in_inference):
            variables = engine.weights.variables  # type: ignore[union-attr]
            changed += [variables[index] for index in result.state]
            values += result.state.values()
        has_drawn = any(result.draws)
        if has_drawn:
            # JAX cannot assign a seed while it traces. So calls count their draws, and seeds move here, after the call.
            for generator, count in zip(engine.seeds.all().values(), result.draws, strict=True):
                if count:
                    changed.append(generator.state)
                    values.append(generator.after(count))
        if changed:
            try:
                if has_drawn:
                    get_bridge().check_draws()
                assign_all(changed, values)
            except Exception as error:
                raise_named(error, describe(layer))
        if result.loss is not None:
            layer.add_loss(result.loss)
        for name, value in result.metrics.items():
            engine.reports.means()[name].update(value)
        self.note_shapes(result.outputs)

    # Masks.

    def note_shapes(self, outputs: PyTree) -> None:
        """Note the shapes of the outputs for `compute_mask`, which Keras calls next with the inputs only."""
        if self._layer.supports_masking:
            leaves = jax.tree_util.tree_leaves(outputs)
            self._last.shapes = [tuple(leaf.shape) for leaf in leaves]

    def last_shapes(self) -> list[tuple[int | None, ...]]:
        """Return the shapes of the outputs of the last call."""
        return getattr(self._last, "shapes", [])


def _symbols(outputs: PyTree) -> PyTree:
    """Put a symbolic tensor in the place of each spec.

    Raises:
        TypeError: If a container refuses them.
    """
    try:
        symbols = jax.tree_util.tree_map(
            lambda spec: keras.KerasTensor(spec.shape, spec.dtype), outputs
        )
    except Exception as error:
        raise TypeError(
            f"the model returns a {type(outputs).__name__}, which cannot hold symbolic tensors "
            f"({type(error).__name__}: {error}). Return a tuple or a dict, or pick one output by `output=` of the "
            "layer of a module."
        ) from error
    register_containers(symbols)
    return symbols


def _with_signature(method: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call
