"""One call of a layer as a flat function, which a bridge takes to its backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from jaxwrap._bridge import BridgedFunction, get_bridge
from jaxwrap._pure import CallResult, PureFunctions, call_and_tell
from jaxwrap._pytree import Structure, is_array, partition
from jaxwrap._rng import Generator, drawing
from jaxwrap._typing import Array, FlatFunction, FlatResult, PyTree, Role, Static, Tensor
from jaxwrap._variables import Leaves


class Told(NamedTuple):
    """What a call tells of its result, beside the arrays. It is known once the call has been traced.

    Attributes:
        outputs: The structure of the outputs.
        has_loss: Whether a loss comes after them.
        changed: Which of the state's variables are to change, by index: their new values are the first of `aux`.
        metrics: The names of the metrics, whose values come after these.
        draws: How often each generator has been drawn from.
    """

    outputs: Structure
    has_loss: bool
    changed: tuple[int, ...]
    metrics: tuple[str, ...]
    draws: tuple[int, ...]


class Calls:
    """A layer's `call_fn` on flat tensors: a bridged function for each structure of arguments, mode and frozen set.

    The arrays are those of the parameters, of the state and of the generators, in this order, and then the arguments.
    """

    def __init__(
        self,
        pure: PureFunctions,
        leaves: tuple[Leaves, Leaves],
        generators: Sequence[Generator],
        draw_keys: Callable[[bool], PyTree],
        platforms: tuple[str, ...] | None,
        problem: str,
    ):
        """Takes what the functions are made of.

        Args:
            pure: The functions.
            leaves: The variables of parameters and state.
            generators: What `draw_keys` draws from.
            draw_keys: Makes the keys of a call, given whether it is one of training.
            platforms: See `Bridge.wrap`.
            problem: What errors about a new state begin with.
        """
        self._pure = pure
        self._leaves = leaves
        self._generators = generators
        self._draw_keys = draw_keys
        self._platforms = platforms
        self._problem = problem
        self._bridged: dict[Any, BridgedFunction] = {}

    def __call__(
        self, tensors: Sequence[Tensor], arguments: Structure, training: bool
    ) -> tuple[PyTree, Tensor | None, Sequence[Tensor], Told]:
        """Calls the function.

        Args:
            tensors: The values of the variables, and the tensors of the arguments.
            arguments: The structure of the arguments.
            training: Whether it is a call of training.

        Returns:
            The outputs, the loss if there is one, the new state and metrics, and what these are.
        """
        trained = tuple([variable.trainable for variable in self._leaves[0].variables])
        key = (training, trained, arguments)
        bridged = self._bridged.get(key)
        if bridged is None:
            bridged = self._bridged[key] = self._bridge(*key)
        outputs, aux, static = bridged(*tensors)
        told: Told = static.value
        if told.has_loss:
            *outputs, loss = outputs
        else:
            loss = None
        return told.outputs.unflatten(outputs), loss, aux, told

    def _bridge(
        self, training: bool, trained: tuple[bool, ...], arguments: Structure
    ) -> BridgedFunction:
        roles = (
            *(Role.PARAMETER if is_trained else Role.FROZEN for is_trained in trained),
            *(Role.STATE for _ in (*self._leaves[1].variables, *self._generators)),
            *(Role.INPUT for _ in arguments.array_paths()),
        )
        flat = self._flat_function(training, arguments)
        return get_bridge().wrap(flat, roles, self._platforms)

    def _flat_function(self, training: bool, arguments: Structure) -> FlatFunction:
        params, state = self._leaves
        ends = (len(params.variables), len(state.variables), len(self._generators))

        def flat(*arrays: Array) -> FlatResult:
            parts, start = [], 0
            for size in ends:
                parts.append(arrays[start : start + size])
                start += size
            params, state, seeds = parts
            with drawing(self._generators, seeds) as draws:
                keys = self._draw_keys(training)
            rest = (params, state, arrays[start:])

            def call(keys: PyTree, rest: PyTree) -> PyTree:
                params, state, fed = rest
                return self._call(keys, params, state, fed, arguments, training)

            # In a symbolic scope only shapes are asked for, and to tell takes longer.
            if training or not jax.tree_util.tree_leaves(keys) or in_symbolic_scope():
                (outputs, loss, changed, metrics), drew = call(keys, rest), True
            else:
                (outputs, loss, changed, metrics), drew = call_and_tell(call, keys, rest)
            output_arrays, structure = partition(outputs, is_array)
            has_loss = loss is not None
            told = Told(
                structure,
                has_loss,
                tuple(changed),
                tuple(metrics),
                draws.counts() if drew else (0,) * len(seeds),
            )
            return FlatResult(
                (*output_arrays, *((loss,) if has_loss else ())),
                (*changed.values(), *metrics.values()),
                Static(told),
            )

        return flat

    def _call(
        self,
        keys: PyTree,
        params: Sequence[Array],
        state: Sequence[Array],
        fed: Sequence[Array],
        arguments: Structure,
        training: bool,
    ) -> tuple[PyTree, Array | None, dict[int, Array], dict[str, Array]]:
        old = self._leaves[1].decode(state)
        result: CallResult = self._pure.call(
            self._leaves[0].decode(params), old, keys, arguments.unflatten(fed), training
        )
        changed = self._leaves[1].encode(result.state, old, self._problem)
        return result.outputs, result.losses, changed, result.metrics
