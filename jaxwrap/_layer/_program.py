"""One call of a layer as a flat function, which a bridge takes to its backend."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from jaxwrap._bridge import BridgedFunction, get_bridge
from jaxwrap._layer._adapter import Adapter, call_adapter
from jaxwrap._layer._draws import Draws, call_and_look
from jaxwrap._layer._fast import Route
from jaxwrap._layer._inputs import Inputs
from jaxwrap._layer._results import Flowing, Kept, Outcome, Result
from jaxwrap._layer._seeds import Generator, Seeds, drawing
from jaxwrap._pytree import Structure, is_array, partition, static_key
from jaxwrap._typing import Array, FlatFunction, FlatResult, PyTree, Role, Static, Tensor
from jaxwrap._weights import Weights
from jaxwrap._weights._variables import current_values

_STATE_DIFFERS = (
    "the new state that the model returned differs from the old one. No state has been changed. Return a state with "
    "the same paths and shapes."
)
# A layer that is called with ever new static values must not keep all that was compiled for them.
_MAX_PLANS = 512


# One call, from top to bottom:
#
#   layer(x, training=True)                              tensors
#   │  kind of the call ─▶ Plan: where the tensors are, and the structure of all else
#   ▼
#   [params..., state..., seeds..., inputs...]           the one order: `_Order`
#   │  bridge
#   ▼
#   flat(*arrays):  seeds ─▶ keys;  decode params and state;  rebuild the inputs
#   adapter.call(...) ─▶ CallResult;  encode the state that has changed
#   ▼
#   outputs = leaves of Flowing(outputs, loss)           gradients flow
#   aux     = leaves of Kept(state, metrics)             no gradient flows
#   static  = Outcome: both structures, and the draws    known once it has been traced
#
# JAX traces `flat`, so it may touch nothing outside but its arguments: variables, seeds and inputs all come in there.


@dataclasses.dataclass
class Plan:
    """What is known of one kind of call.

    Attributes:
        structure: The structure of the arguments by name.
        places: Where the tensors of that structure are among the leaves of the call.
        training: The train flag that the caller passes, if any.
        functions: The functions, by train flag and by which parameters are trained. Plans of one structure share them.
        route: The short way for calls of this kind, once there is one.
    """

    structure: Structure
    places: Sequence[int]
    training: bool | None
    functions: dict[tuple[bool, tuple[bool, ...]], _Function]
    route: Route | None = None


class _Order:
    """The order of the tensors of a call: parameters, state, seeds, inputs."""

    def __init__(self, weights: Weights, generators: Sequence[Generator]):
        self._params = list(weights.params.variables)
        self.held: list[keras.Variable] = [
            *weights.variables,
            *(generator.state for generator in generators),
        ]
        paths = [name for leaf in weights.leaves for name in leaf.names]
        self._names = [*paths, *("rng" for _ in generators)]
        seeds = len(self.held) - len(generators)
        self.ends = (len(self._params), seeds, len(self.held))

    def trained(self) -> tuple[bool, ...]:
        """Which parameters are trained now."""
        # The property takes three times as long.
        return tuple([variable._trainable for variable in self._params])

    def values(self) -> list[Tensor]:
        """The values of all variables now."""
        return current_values(self.held)

    def roles(
        self, trained: Sequence[bool], updated: Collection[int], inputs: int
    ) -> tuple[Role, ...]:
        """The role of each tensor. The parameters in `updated` get new values, as state does."""
        params, _, held = self.ends
        own = [Role.PARAMETER if is_trained else Role.FROZEN for is_trained in trained]
        return (
            *(Role.STATE if n in updated else role for n, role in enumerate(own)),
            *(Role.STATE for _ in range(held - params)),
            *(Role.INPUT for _ in range(inputs)),
        )

    def named(self, inputs: Sequence[str]) -> dict[str, str]:
        """Return the names of the tensors, by what JAX calls them in the function of `_flat_function`."""
        names = [*self._names, *inputs]
        flat = {f"arrays[{place}]": name for place, name in enumerate(names)}
        params, state, _, fed = _split(self.ends, names)
        groups = enumerate((params, state, fed))
        return flat | {
            f"rest[{group}][{place}]": name
            for group, part in groups
            for place, name in enumerate(part)
        }


def _split(ends: tuple[int, int, int], arrays: Sequence[Any]) -> tuple[Sequence[Any], ...]:
    """Split the tensors of a call into parameters, state, seeds and inputs."""
    one, two, three = ends
    return arrays[:one], arrays[one:two], arrays[two:three], arrays[three:]


class _Function(NamedTuple):
    """A bridged function, and whether it takes the seeds."""

    bridged: BridgedFunction
    has_seeds: bool


class Program:
    """The calls of a built layer: a plan for each kind of call."""

    def __init__(
        self,
        adapter: Adapter,
        inputs: Inputs,
        weights: Weights,
        seeds: Seeds,
        draw_keys: Callable[[bool], PyTree],
        draws: Draws,
        built_for: Structure,
        platforms: tuple[str, ...] | None,
        distinct: bool | None,
    ):
        """Take what the flat functions are made of.

        Args:
            adapter: The model.
            inputs: What it is called with.
            weights: The variables.
            seeds: What `draw_keys` draws from.
            draw_keys: Makes the keys of a call, for its train flag.
            draws: Whether calls draw.
            built_for: The structure of the arguments that `draws` is about.
            platforms: See `Bridge.wrap`.
            distinct: See `Bridge.for_replica`.
        """
        self.plans: dict[Any, Plan] = {}
        self._adapter = adapter
        self._inputs = inputs
        self._weights = weights
        self._seeds = seeds
        self._generators = generators = tuple(seeds.all().values())
        self._draw_keys = draw_keys
        self._draws = draws
        self._built_for = built_for
        self._platforms = platforms
        self._distinct = distinct
        self._orders = {True: _Order(weights, generators), False: _Order(weights, ())}

    def copied(self, weights: Weights, generators: Sequence[Generator]) -> Program:
        """Return the same calls with other variables. Both share their plans, and so what is compiled."""
        # Functions ask `_weights` for structures, and `_draw_keys` draws from `_generators`: those of the first stay.
        other = copy.copy(self)
        other._orders = {True: _Order(weights, generators), False: _Order(weights, ())}
        return other

    def close(self) -> None:
        """Let go of the variables, as JAX's caches may keep functions that hold this object."""
        self.plans.clear()
        self._orders.clear()

    def add(
        self, kind: Any, structure: Structure, places: Sequence[int], training: bool | None
    ) -> Plan:
        """Make the plan for a kind of call."""
        # JAX itself tells the dtypes and shapes of one structure apart. To share saves a second compilation.
        # Of lists, since other threads may add plans meanwhile.
        plans = list(self.plans.values())
        alike = (plan.functions for plan in plans if plan.structure == structure)
        plan = Plan(structure, places, training, next(alike, {}))
        # Several, since threads that add at once may have dropped the same one.
        while len(self.plans) >= _MAX_PLANS:
            self.plans.pop(next(iter(list(self.plans))), None)
        self.plans[kind] = plan
        return plan

    def run(self, plan: Plan, leaves: Sequence[Any], training: bool) -> Result:
        """Call the model on the leaves of a call of the plan's kind."""
        fed = [leaves[place] for place in plan.places]
        # Roles depend on what is trained, and users freeze and thaw parameters between calls.
        key = (training, self._orders[True].trained())
        function = plan.functions.get(key)
        if function is None:
            function = plan.functions[key] = self._bridge(plan.structure, *key)
        values = self._orders[function.has_seeds].values()
        if function.has_seeds and (count := len(self._generators)):
            values[-count:] = get_bridge().for_replica(values[-count:], self._distinct)
        flowing, kept, static = function.bridged(*values, *fed)
        outcome: Outcome = static.value
        outputs, loss = outcome.flowing.unflatten(flowing)
        state, metrics = outcome.kept.unflatten(kept)
        return Result(outputs, loss, state, metrics, outcome.draws)

    def pure(self, arguments: Structure) -> tuple[FlatFunction, list[keras.Variable]]:
        """Return a call in inference as a flat JAX function, and the variables whose values it takes first."""
        order = self._orders[True]
        return self._flat_function(arguments, False, order, None), order.held

    def _bridge(self, arguments: Structure, training: bool, trained: tuple[bool, ...]) -> _Function:
        draws = None
        if arguments == self._built_for:
            draws = self._draws.training if training else self._draws.inference
        # A call that does not draw takes no seeds, so that no graph of TensorFlow captures them.
        params = self._weights.params
        has_seeds = draws is not False or (training and params.draws)
        order = self._orders[has_seeds]
        updated = params.updated if training else ()
        roles = order.roles(trained, updated, arguments.array_count())
        flat = self._flat_function(arguments, training, order, draws)
        return _Function(get_bridge().wrap(flat, roles, self._platforms), has_seeds)

    def _flat_function(
        self, arguments: Structure, training: bool, order: _Order, draws: bool | None
    ) -> FlatFunction:
        # Not the order, which holds the variables. JAX's caches may keep this function.
        names, ends = order.named(arguments.array_paths()), order.ends

        def flat(*arrays: Array) -> FlatResult:
            # The states are arguments. Read from the variables, JAX would compile them in as constants.
            params, state, seeds, fed = _split(ends, arrays)
            # Keys that nothing depends on may be any keys.
            states = seeds or [jnp.zeros(2, jnp.uint32) for _ in self._generators]
            with drawing(self._generators, states) as counted:
                keys = self._draw_keys(training)
                own = (
                    self._seeds.key_of_parts() if training and self._weights.params.draws else None
                )

            def call(keys: PyTree, rest: PyTree) -> tuple[Flowing, Kept]:
                params, state, fed, own = rest
                fed = arguments.unflatten(fed)
                return self._call(params, state, (keys, own), fed, training, names)

            rest = (params, state, fed, own)
            # In a symbolic scope Keras asks for shapes only, and to look for draws takes longer.
            if draws is not None or not jax.tree_util.tree_leaves(keys) or in_symbolic_scope():
                results, drew = call(keys, rest), draws is not False
            else:
                results, drew = call_and_look(call, keys, rest)
            (flowing, structure), (kept, kept_structure) = (
                partition(part, is_array) for part in results
            )
            # A key that nothing uses does not count: inference without randomness leaves the seeds as they are.
            # Small values only: what `Static` holds lives as long as JAX's caches.
            counts = tuple(
                count if drew or generator is self._seeds.parts else 0
                for generator, count in zip(self._generators, counted.counts(), strict=True)
            )
            static = Static(Outcome(structure, kept_structure, counts))
            return FlatResult(tuple(flowing), tuple(kept), static)

        return flat

    def _call(
        self,
        params: Sequence[Array],
        state: Sequence[Array],
        keys: tuple[PyTree, Array | None],
        arguments: dict[str, PyTree],
        training: bool,
        names: Mapping[str, str],
    ) -> tuple[Flowing, Kept]:
        # A list, since a model may change the containers that it gets in place.
        old = self._weights.state.decode_leaves(state)
        leaves = self._weights.params
        decoded, new = (
            leaves.decode_training(params, keys[1]) if training else (leaves.decode(params), {})
        )
        result = call_adapter(
            self._adapter,
            decoded,
            self._weights.state.structure.unflatten(old),
            keys[0],
            self._inputs.for_adapter(arguments),
            training,
            names=names,
        )
        # Only what has changed comes back. Each array costs time on its way to the backend.
        changed = self._weights.state.encode(result.state, _STATE_DIFFERS, old)
        new |= {len(params) + index: value for index, value in changed.items()}
        return Flowing(result.outputs, result.losses), Kept(new, dict(result.metrics))


def kind_of(treedef: Any, leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Return what is the same for calls that have one plan: structure, types, dtypes and ranks, and static values."""
    return (treedef, *map(_leaf_kind, leaves))


def _leaf_kind(leaf: Any) -> Any:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return static_key(leaf)
    return type(leaf), dtype, getattr(leaf, "ndim", None)
