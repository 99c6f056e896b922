"""The parts of a layer behind Keras's protocol: built once, called many times."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import keras

from jaxwrap._bridge import get_bridge
from jaxwrap._errors import describe
from jaxwrap._layer._adapter import Adapter
from jaxwrap._layer._building import init_weights, seen_by_init
from jaxwrap._layer._containers import restored
from jaxwrap._layer._draws import Draws
from jaxwrap._layer._inputs import Inputs
from jaxwrap._layer._options import Options
from jaxwrap._layer._program import Program
from jaxwrap._layer._reports import Reports
from jaxwrap._layer._seeds import Seeds
from jaxwrap._layer._shapes import Survey, abstract_result, survey
from jaxwrap._specs import partition_specs
from jaxwrap._tracing import explained
from jaxwrap._typing import PyTree
from jaxwrap._weights import Dtypes, Plan, Rules, Weights
from jaxwrap._weights._files import load, save
from jaxwrap._weights._variables import Initial, Source, as_copies


class Engine:
    """The parts of a layer, in a plain object that Keras's tracker does not look into.

    Attributes:
        adapter: The model.
        inputs: Its arguments.
        seeds: Its seeds.
        rules: Its rules for leaves.
        options: The other options that the config holds.
        weights: The variables, or None before building.
        specs: The arguments that the layer has been built for, or None before.
        program: The calls, or None before building.
        reports: The metrics from inside.
        has_values: Whether the user passed `params` or `state`.
        is_from_file: Whether the layer has been made from a config, whose shapes may not fit into memory.
        layer: The layer.
        lock: Held while the layer is built or traced without data.
    """

    def __init__(self, layer: Any, adapter: Adapter, rules: Rules, options: Options):
        self.adapter = adapter
        self.rules = rules
        self.options = options
        self.inputs = Inputs(adapter.signature(), _model_name(adapter))
        self.seeds = Seeds(options.seed, adapter.streams(), adapter.draws, options.key_impl)
        self.weights: Weights | None = None
        self.specs: dict[str, PyTree] | None = None
        self.program: Program | None = None
        self.reports = Reports(layer, lambda: self._survey(True).metrics)
        self._surveys: dict[bool, Survey] = {}
        self.has_values = False
        self.is_from_file = False
        # Reentrant, since a first call builds inside of it.
        self.lock = threading.RLock()
        self.layer = layer
        self._pending: dict[str, PyTree] | None = None

    def copied_to(self, layer: Any, find: Callable[[keras.Variable], keras.Variable]) -> Engine:
        """Return the engine of another layer object with the same model.

        Args:
            layer: The layer.
            find: Returns its variable for one of this layer.
        """
        other = copy.copy(self)
        other.layer = layer
        other.seeds = self.seeds.copied(find)
        other.reports = self.reports.copied_to(layer, find)
        if self.weights is not None:
            other.weights = self.weights.copied(find)
        if self.program is not None:
            generators = tuple(other.seeds.all().values())
            other.program = self.program.copied(other.built_weights(), generators)
        return other

    def attach(self, params: PyTree, state: PyTree) -> None:
        """Make what a layer has before it is built: its generators, and variables of values that exist.

        Args:
            params: The parameters that the user passes, or None.
            state: Likewise, the state.
        """
        layer = self.layer
        self.seeds.create(layer)
        # Set on the layer, because Keras does not look into the engine.
        layer.seed_generator, layer.stream_generators = None, []
        self.seeds.note(layer)
        if self.adapter.draws == "in training":
            self.seeds.attach(layer)
        self.has_values = params is not None or state is not None
        values = (params, state) if self.has_values else self.adapter.initial()
        if values is not None:
            self.create_weights(*values)
            get_bridge().register(layer)

    # Building.

    def plan(self, params: PyTree, state: PyTree) -> tuple[Plan, list[Any]]:
        """Describe the variables for initial values, which may be in boxes. Return the values, too."""
        layer = self.layer
        mixed = layer.autocast and layer.compute_dtype != layer.variable_dtype
        compute = layer.compute_dtype if mixed else None
        dtypes = Dtypes(layer.variable_dtype, compute, self.options.keep_dtypes)
        trees, specs = self.adapter.unbox(params, state)
        return Plan.of(trees, specs, self.adapter.join, self.rules, dtypes, self.seeds.base)

    def create_weights(self, params: PyTree, state: PyTree) -> None:
        """Make the variables, with copies of these values, which may be in boxes."""
        plan, values = self.plan(params, state)
        # All of them first, so that an error leaves nothing behind.
        initials = [leaf.initials(value) for leaf, value in zip(plan.leaves, values, strict=True)]
        self.fill(plan, initials)

    def fill(self, plan: Plan, initials: list[list[Initial]], source: Source = as_copies) -> None:
        """Make the variables: see `Weights`."""
        self.weights = Weights(self.layer, plan, initials, source)
        self.track()

    def track(self) -> None:
        """Let Keras know the variables."""
        weights = self.built_weights()
        self.layer.tracked_params = weights.params.variables
        self.layer.tracked_state = weights.state.variables

    def build(self, input_shape: Any) -> None:
        """Make the variables, unless they exist."""
        with self.lock:
            # Keras passes shapes without dtypes. The first call, or a file, knows more.
            specs = self._pending or self.specs
            if specs is None:
                specs = self.inputs.from_shapes(input_shape, self.layer.variable_dtype)
            if self.weights is None:
                init_weights(self, specs)
            self.specs = specs
            if self.program is None:
                self._make_program(specs)

    def _make_program(self, specs: dict[str, PyTree]) -> None:
        draws = self._find_draws()
        if self.adapter.draws == "always":
            if not any(flag is not False for flag in draws):
                self.seeds.generators = {}
            self.seeds.attach(self.layer)
        self.seeds.attach_parts(self.layer, self.built_weights().params.draws)
        _, structure = partition_specs(specs)
        self.program = Program(
            self.adapter,
            self.inputs,
            self.built_weights(),
            self.seeds,
            self.draw_keys,
            draws,
            structure,
            self.options.platforms,
            self.options.distinct_masks,
        )

    def renew_program(self) -> None:
        """Drop what was compiled for other variables."""
        assert self.specs is not None
        self._surveys.clear()
        self._make_program(self.specs)

    def _find_draws(self) -> Draws:
        """Find out in which mode the model draws. If its trace fails, calls look for draws themselves."""
        if not self.layer._get_call_rng.__func__.__module__.startswith("jaxwrap."):
            return Draws(None, None)  # a user's class may make keys for any call
        if self.adapter.draws != "always":
            return Draws(None if self.seeds.generators else False, False)
        found = []
        for training in (True, False):
            try:
                found.append(self._survey(training).draws)
            except Exception:
                found.append(None)  # the call raises what is wrong
        return Draws(*found)

    def _survey(self, training: bool) -> Survey:
        if training not in self._surveys:
            with self.lock, get_bridge().on_mesh():
                self._surveys[training] = survey(self, training)
        return self._surveys[training]

    @contextlib.contextmanager
    def first_call(self, specs: dict[str, PyTree]) -> Iterator[None]:
        """Build in this scope for arguments with dtypes, which Keras does not pass to `build`.

        A call that fails leaves the layer as it was, without variables.
        """
        with self.lock:
            had_weights = self.weights is not None
            self._pending = None if self.layer.built else seen_by_init(self.layer, specs)
            try:
                yield
            # An interrupt, too, must not leave half of a layer.
            except BaseException:
                if self.weights is not None and not had_weights:
                    self._unbuild(self.weights)
                raise
            finally:
                self._pending = None
            if not had_weights and get_bridge().misses_optimizer(self.layer):
                warnings.warn(
                    f"{describe(self.layer)}: this call made the layer's variables. An optimizer of PyTorch that was "
                    "made before does not train them. Build the layer first: `layer.build(input_shape)`.",
                    stacklevel=4,
                )

    def _unbuild(self, weights: Weights) -> None:
        layer = self.layer
        for variable in weights.variables:
            layer._untrack_variable(variable)
        # Keras locks it after `build`, which has to run again.
        layer._tracker.unlock()
        layer.tracked_params, layer.tracked_state = [], []
        self.weights = self.program = self.specs = None
        self._surveys.clear()
        layer.built = False

    def init(self, arguments: dict[str, PyTree]) -> tuple[PyTree, PyTree]:
        """Call the adapter's `init`, always with the same keys."""
        # Keras may trace `init` for shapes before. The values must not depend on how often.
        self.seeds.restart()
        keys = self.seeds.to_keys(self.layer._get_init_rng())
        with get_bridge().on_mesh(), explained():
            made = self.adapter.init(keys, self.inputs.for_adapter(arguments))
        if not isinstance(made, tuple) or len(made) != 2:
            raise TypeError(
                f"`{type(self.adapter).__name__}.init` must return `(params, state)`; it returned a "
                f"{type(made).__name__}."
            )
        return made

    def bind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, PyTree], bool | None]:
        """Bind the arguments of a call, in the containers that the layer was built for."""
        arguments, training = self.inputs.bind(args, kwargs)
        if self.specs is not None:
            arguments = {
                name: restored(tree, self.specs[name]) if name in self.specs else tree
                for name, tree in arguments.items()
            }
        return arguments, training

    def read_specs(self, arguments: dict[str, PyTree]) -> dict[str, PyTree]:
        """Describe arguments by their shapes and dtypes."""
        return self.inputs.specs(arguments, _read_spec)

    def built_weights(self) -> Weights:
        """Return the variables. ValueError before building."""
        if self.weights is None:
            raise ValueError(
                "the layer has no weights yet. Call it, or build it: `layer.build(input_shape)`."
            )
        return self.weights

    def built_program(self) -> Program:
        """Return the calls. ValueError before building."""
        self.built_weights()
        assert self.program is not None
        return self.program

    def complete(self) -> None:
        """Make the variables of reported metrics, if the layer is built."""
        if self.layer.built:
            self.reports.means()

    def save(self, store: Any) -> None:
        """Write weights and seeds to the store that Keras passes to `save_own_variables`."""
        weights = {} if self.weights is None else self.weights.by_path()
        save(store, weights, self.seeds.states())

    def load(self, store: Any) -> None:
        """Read weights and seeds from the store that Keras passes to `load_own_variables`."""
        if self.weights is not None or store.keys():
            weights = self.built_weights()
            load(store, weights.targets, weights.in_order(), self.seeds.states())

    def checkpoint_tree(self) -> PyTree:
        """Return the pytree that a checkpoint of the library holds, with a `LeafPath` for each weight."""
        weights = self.built_weights()
        return self.adapter.checkpoint_tree(weights.params.paths(), weights.state.paths())

    def build_config(self) -> dict[str, Any] | None:
        """Return the arguments that the layer was built for as JSON, or None if they cannot be represented."""
        return None if self.specs is None else self.inputs.to_config(self.specs)

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Build the layer from the result of `build_config`."""
        self.specs = self.inputs.from_config(config, self.layer.variable_dtype)
        self.layer.build(config.get("input_shape"))

    # Without data.

    def output_shape(self, input_shape: Any) -> Any:
        """Return the shapes of the outputs, for a nest of shapes of the first argument."""
        specs = self.inputs.from_shapes(input_shape, self.layer.variable_dtype)
        outputs = self.trace(specs, False)["outputs"]
        return jax.tree_util.tree_map(lambda spec: spec.shape, outputs)

    def draw_keys(self, training: bool) -> PyTree:
        """Make the keys of a call. Inside `drawing`, generators draw from the states that the call was passed."""
        if not self.seeds.generators:
            return None
        return self.seeds.to_keys(self.layer._get_call_rng(training))

    def trace(self, specs: dict[str, PyTree], training: bool) -> dict[str, PyTree]:
        """Trace the model without data: see `abstract_result`."""
        with self.lock, get_bridge().on_mesh():  # draws initial seeds
            return abstract_result(self, specs, training)


def _model_name(adapter: Adapter) -> str:
    """Return the name of the model, the first field of an adapter, in errors."""
    fields = dataclasses.fields(adapter) if dataclasses.is_dataclass(adapter) else ()
    model = getattr(adapter, fields[0].name) if fields else adapter
    return f"`{getattr(model, '__qualname__', type(model).__name__)}`"


def _read_spec(tensor: Any) -> tuple[Any, str]:
    if isinstance(tensor, keras.KerasTensor):
        return tensor.shape, tensor.dtype
    return get_bridge().spec(tensor)
