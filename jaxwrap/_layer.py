"""JaxLayer: a pure `init_fn` / `call_fn` pair as a Keras layer."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import random
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.core import Tracer

from jaxwrap._arguments import Arguments, placeholders
from jaxwrap._bridge import get_bridge
from jaxwrap._bridge._base import check_dtype
from jaxwrap._call import Calls
from jaxwrap._metrics import RunningMean
from jaxwrap._pure import PureFunctions
from jaxwrap._pytree import Structure, describe_difference, is_array, partition, path_str
from jaxwrap._rng import Generator, check_impl, drawing, init_seed, to_key
from jaxwrap._rules import Rule
from jaxwrap._serialization import check_size, deserialize, serialize, serialize_callable
from jaxwrap._shortcut import Shortcut, enter
from jaxwrap._signature import AUTO, check_types
from jaxwrap._specs import Spec, abstract_call, fillings, partition_specs
from jaxwrap._typing import PyTree
from jaxwrap._variables import assign_all, current_values
from jaxwrap._weights import Stored, WeightedLayer


@keras.saving.register_keras_serializable(package="jaxwrap")
class JaxLayer(WeightedLayer):
    """A Keras layer that computes a pure JAX function, on every Keras backend.

    The contract is that of `keras.layers.JaxLayer`. `call_fn` takes any of these arguments, by these names, in any
    order:

    - `params`: the trainable parameters, a pytree.
    - `state`: the non-trainable state, a pytree. `call_fn` then returns `(outputs, new_state)`, the new state of the
      structure of the old one.
    - `rng`: a key as `jax.random.PRNGKey` makes it, new at every call in training; None in inference.
    - `inputs` (required): one array, or any nest of arrays. `call_arguments` names others in its place.
    - `training`: a Python bool; or `train`, `is_training`, or the opposite, `deterministic`, `inference`,
      `use_running_average`.
    - `mask`: the Keras mask of the inputs, a bool array, or None.

    `init_fn`, which makes the initial values when the layer is built, takes `rng`, `inputs` (required; ones, or zeros
    for integers and bools, of the shape and dtype of the inputs, with 1 for an unknown size) and `training` (True). It
    returns `params`, or `(params, state)` if `call_fn` takes `state`. To add losses or to report metrics, `call_fn`
    returns a `CallResult`.

    Every leaf of `params` and `state` that is an array or a number becomes a Keras variable, named by its path. Other
    leaves reach `call_fn` as they are. Float32 leaves take the layer's variable dtype; other leaves keep their dtype,
    unless `dtype=` is given, which rules all float leaves. State is never cast for mixed precision.

    Args:
        call_fn: The function to wrap.
        init_fn: Makes the initial `params` (and `state`). May be left out if `params` or `state` is given.
        params: Initial trainable parameters. They are copied.
        state: Initial non-trainable state. It is copied.
        seed: An integer from which initial values and the keys of `rng` are made; None draws one, repeatably under
            `keras.utils.set_random_seed`.
        native_serialization_platforms: The platforms ("cpu", "cuda", "rocm", "tpu") that a TensorFlow graph of this
            layer is to run on; None for the present one. Other backends ignore it.
        call_arguments: The names of what the caller feeds, by position or by keyword, instead of `inputs`. Those that
            have a default in `call_fn` may be left out. `init_fn` gets those of them that it names.
        training_argument: The train flag of `call_fn`. By default the first of the usual names that it has; "frozen"
            names another one, "!frozen" one that is True in inference. With None its own default holds.
        rules: What is to hold for leaves, a `Rule` by the pattern of their paths: `{".*/kernel": Rule(...)}`. A pattern
            is a regular expression that matches the whole path below the layer. All rules that match apply, later
            ones over earlier ones.
        update_state_in_inference: Whether the new state is kept in inference too, as Keras does.
        supports_masking: Whether the mask of the first argument goes on to outputs that have its axes.
        key_impl: The implementation of the keys, "threefry2x32" or "rbg" say, which are then typed keys. With None they
            are raw keys of JAX's default one.
        **kwargs: What every `keras.layers.Layer` takes: `name`, `dtype`, `trainable`, ...

    Attributes:
        params: The pytree given or made, with a `keras.Variable` for each array or number. None until built.
        state: Likewise.

    Raises:
        ValueError: If a function lacks a required argument or has an unknown one, or if `call_fn` takes `params` or
            `state` and there is no way to make them.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, jaxwrap
        >>> def init(rng, inputs):
        ...     return {"w": jax.random.normal(rng, (inputs.shape[-1], 2))}
        >>> def call(params, inputs):
        ...     return inputs @ params["w"]
        >>> layer = jaxwrap.JaxLayer(call, init, name="linear")
        >>> outputs = layer(np.ones((5, 3), "float32"))
        >>> tuple(outputs.shape), layer.params["w"].path
        ((5, 2), 'linear/params/w')
    """

    # The arguments of which the config holds what `serialize` makes.
    _serialized: tuple[str, ...] = ("rules", "call_fn", "init_fn", "params", "state")

    def __init__(
        self,
        call_fn: Callable[..., Any],
        init_fn: Callable[..., Any] | None = None,
        params: PyTree = None,
        state: PyTree = None,
        seed: int | None = None,
        native_serialization_platforms: Sequence[str] | None = None,
        *,
        call_arguments: Sequence[str] = ("inputs",),
        training_argument: str | None = AUTO,
        rules: Mapping[str, Rule] | None = None,
        update_state_in_inference: bool = True,
        supports_masking: bool = False,
        key_impl: str | None = None,
        _stored: Stored | None = None,
        **kwargs: Any,
    ):
        owner = self._describe(kwargs.get("name"))
        check_types(
            owner,
            seed=(seed, "an integer or None"),
            native_serialization_platforms=(
                native_serialization_platforms,
                "a tuple of names or None",
            ),
            call_arguments=(call_arguments, "a tuple of names"),
            training_argument=(training_argument, "a name or None"),
            update_state_in_inference=(update_state_in_inference, "a bool"),
            supports_masking=(supports_masking, "a bool"),
            key_impl=(key_impl, "a name or None"),
            trainable=(kwargs.get("trainable", True), "a bool"),
        )
        packed = self._module_parameters()
        pure = PureFunctions(
            call_fn,
            init_fn,
            call_arguments,
            training_argument,
            None if packed is None else Arguments(packed, owner),
            owner,
        )
        if pure.variables and init_fn is None and params is None and state is None:
            wanted = " and ".join(f"`{name}`" for name in pure.variables)
            raise ValueError(
                f"{owner}: `call_fn` takes {wanted}, but `init_fn`, `params` and `state` are all None. Give `init_fn` "
                "to make them when the layer is built, or give their values."
            )
        check_impl(key_impl, owner)
        if type(self).call is JaxLayer.call:
            # Keras learns from its signature what a layer takes.
            super_call = functools.partial(type(self).call, self)
            self._keep("call", _with_signature(super_call, pure.arguments.signature))
        super().__init__(rules, owner, _stored, **kwargs)
        self._values_given = params is not None or state is not None
        self.call_fn = call_fn
        self.init_fn = init_fn
        self.supports_masking = supports_masking
        self.update_state_in_inference = update_state_in_inference
        self._pure = pure
        self._call_arguments = tuple(call_arguments)
        self._training_argument = training_argument
        self._key_impl = key_impl
        self._seed = seed
        self._platforms = tuple(native_serialization_platforms or ()) or None
        self._base_seed = random.randint(1, 10**9) if seed is None else seed
        self._init_draws = 0
        self.seed_generator = (
            self._make_generator(self._base_seed, "seed_generator") if pure.has_rng else None
        )
        self._opaque_call = get_bridge().opaque(self._checked_call)
        self._keep("_specs", None)
        self._keep("_from_file", False)
        self._calls: Calls | None
        self._keep("_calls", None)
        self._keep("_nests", set())
        self._keep("_checked", set())
        self._keep("_shortcut", Shortcut())
        self._keep("_abstract", {})
        self._means: dict[str, RunningMean] | None
        self._keep("_means", None)
        self._last_call: Any
        self._keep("_last_call", threading.local())
        if params is not None or state is not None or not pure.variables:
            self._create_leaves(params, state)

    # What subclasses may override.

    def _module_parameters(self) -> Iterable[inspect.Parameter] | None:
        """What the caller feeds, if a module says that and not `call_fn`, whose `inputs` is then a dict of it all."""
        return None

    def _get_init_seed(self) -> Any:
        """A new seed for initial values: integers of shape (2,)."""
        self._init_draws += 1
        return init_seed(self._base_seed, self._init_draws - 1)

    def _get_init_rng(self) -> PyTree:
        """What `init_fn` gets as `rng`: a pytree of seeds from `_get_init_seed`, which become keys."""
        return self._get_init_seed()

    def _get_call_seed(self) -> Any:
        """A new seed for one call: an integer array of shape (2,)."""
        assert self.seed_generator is not None, "`call_fn` takes no `rng`"
        return self.seed_generator.next()

    def _get_call_rng(self, training: bool) -> PyTree:
        """What `call_fn` gets as `rng`: a pytree of seeds from `_get_call_seed`, which become keys.

        It is called while JAX traces `call_fn`, and draws from what the generators hold when the layer is called. Seeds
        drawn in inference count as drawn only if the outputs or the new state depend on them.
        """
        return self._get_call_seed() if training else None

    def _generators(self) -> dict[str, Generator]:
        """The generators that `_get_call_rng` draws from, by the names under which their seeds are saved."""
        return {} if self.seed_generator is None else {"seed": self.seed_generator}

    def _seeds(self) -> dict[str, keras.Variable]:
        return {name: generator.state for name, generator in self._generators().items()}

    # Building.

    def __call__(self, *args: Any, **kwargs: Any) -> PyTree:
        """Calls the layer, as every Keras layer is called."""
        return self._opaque_call(*args, **kwargs)

    def _checked_call(self, *args: Any, **kwargs: Any) -> PyTree:
        # Keras hands `build` shapes only, and its own errors come after it has changed things.
        kwargs = self._pure.arguments.rename(args, kwargs)
        leaves, treedef = jax.tree_util.tree_flatten((args, kwargs))
        kind = (treedef, *map(_kind, leaves))
        if self._shortcut.is_open(self, kind, leaves):
            training = enter(self, kwargs.get("training"))
            try:
                return JaxLayer.call(self, *args, training=training)
            except Exception:
                pass  # raised before anything was changed; it is to be raised with what Keras has to say of the call
        if kind not in self._checked or not self.built:
            given, _ = self._pure.arguments.bind(args, kwargs)
            specs = self._read_specs(given)
            if not self.built:
                self._keep("_specs", self._seen_by_init(specs))
            self._checked.add(kind)
        outputs = super().__call__(*args, **kwargs)
        if type(self).call is JaxLayer.call:
            self._shortcut.learn(self, kind, args, kwargs, leaves)
        return outputs

    def build(self, input_shape: Any) -> None:
        """Creates the variables, if they were not given.

        Args:
            input_shape: The shape of the first argument, or a nest of shapes.
        """
        arguments = self._pure.arguments
        if self._specs is None:
            specs = arguments.from_shapes(input_shape, self.variable_dtype, self._owner)
            self._keep("_specs", specs)
        if self._leaves is None:
            if self._from_file:
                self._check_sizes()
            with jax.ensure_compile_time_eval():
                params, state = self._init(placeholders(self._specs))
            traced = [
                path_str(path)
                for path, leaf in jax.tree_util.tree_leaves_with_path((params, state))
                if isinstance(leaf, Tracer)
            ]
            if traced:
                raise ValueError(
                    f"{self._owner} is being built inside a JAX trace, and `init_fn` makes values that exist only in "
                    f"that trace ({', '.join(traced)}). Build it before: `layer.build(input_shape)`, or call it once "
                    "outside of `jax.jit`."
                )
            with jax.ensure_compile_time_eval():
                self._create_leaves(params, state)

    def get_build_config(self) -> dict[str, Any] | None:
        """The shapes and dtypes of the arguments that the layer was built for."""
        return None if self._specs is None else self._pure.arguments.to_config(self._specs)

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds the layer for the shapes and dtypes that `get_build_config` gave."""
        specs = self._pure.arguments.from_config(config, self.variable_dtype, self._owner)
        self._keep("_specs", specs)
        self.build(config.get("input_shape"))

    def _check_sizes(self) -> None:
        """Raises ValueError if inputs or weights do not fit into memory: their shapes come from a file."""
        specs, structure = partition_specs(self._specs)
        inputs = [jax.ShapeDtypeStruct(spec.fill(1), spec.dtype) for spec in specs]

        def arrays_of(inputs: list[Any]) -> list[Any]:
            return partition(self._init(structure.unflatten(inputs)), is_array)[0]

        arrays = (*inputs, *jax.eval_shape(arrays_of, inputs))
        check_size(sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays), self._owner)

    def _read_specs(self, given: dict[str, PyTree]) -> dict[str, PyTree]:
        return self._pure.arguments.specs(given, self._read_spec, self._owner)

    def _read_spec(self, tensor: Any) -> tuple[Any, str]:
        if isinstance(tensor, keras.KerasTensor):
            return tensor.shape, tensor.dtype
        return get_bridge().spec(tensor)

    def _seen_by_init(self, specs: PyTree) -> PyTree:
        """What Keras casts for each call, `init_fn` sees at the precision of the variables."""

        def cast(leaf: Any) -> Any:
            floats = isinstance(leaf, Spec) and jnp.issubdtype(leaf.dtype, jnp.floating)
            return Spec(leaf.shape, self.variable_dtype) if floats and self.autocast else leaf

        return jax.tree_util.tree_map(cast, specs)

    def _init(self, arguments: dict[str, PyTree]) -> tuple[PyTree, PyTree]:
        rng = jax.tree_util.tree_map(self._to_key, self._get_init_rng())
        return self._pure.init(rng, arguments)

    def _to_key(self, seed: Any) -> Any:
        return to_key(seed, self._key_impl)

    def _reported(self) -> dict[str, RunningMean]:
        """The means of the metrics that `call_fn` reports in training, by name; they are made when first asked for.

        To know the names is to trace `call_fn`, which may take longer than all else of building.
        """
        if self._means is not None:
            return self._means
        names = ()
        for specs in fillings(self._specs):
            # A layer may be built for other inputs than it is called with; what is wrong, the call will say.
            with contextlib.suppress(Exception):
                names = self._abstract_result(specs, True)["metrics"]
                break
        means = {name: RunningMean(self, name) for name in names}
        self._keep("_means", means)
        if means:
            self._tracker.unlock()
            self.tracked_means = [
                variable for mean in means.values() for variable in mean.variables
            ]
            self.tracked_metrics = [mean.metric for mean in means.values()]
            self._lock_state()
        return means

    def _mean(self, name: str) -> RunningMean:
        means = self._reported()
        if name not in means:
            raise ValueError(
                f"{self._owner}: `call_fn` reports the metric {name!r}, which it did not report in training for the "
                "arguments that the layer was built for. Report the same metrics in every call."
            )
        return means[name]

    @property
    def variables(self) -> list[keras.Variable]:
        """All variables: the weights, the states of seed generators, and what the means of metrics are kept in."""
        self._complete()
        return super().variables

    @property
    def weights(self) -> list[keras.Variable]:
        """The variables without the states of seed generators."""
        self._complete()
        return super().weights

    @property
    def metrics(self) -> list[keras.Metric]:
        """The metrics that `call_fn` reports in training."""
        self._complete()
        return super().metrics

    def _complete(self) -> None:
        if getattr(self, "built", False):  # Keras asks before the constructor has come that far
            self._reported()

    def _make_generator(self, seed: int, name: str) -> Generator:
        with keras.name_scope(self.name, caller=self):
            return Generator(seed, name=name)

    # Calling.

    def call(self, *args: Any, **kwargs: Any) -> PyTree:
        """Calls `call_fn`, and assigns the new state.

        Args:
            *args: What `call_fn` gets as its `call_arguments`.
            **kwargs: Likewise, and `training`, a bool.

        Returns:
            The outputs of `call_fn`, with tensors of the backend for arrays.

        Raises:
            ValueError: If the new state differs from the old in structure or shapes. No state is assigned then.
        """
        given, training = self._pure.arguments.bind(args, kwargs)
        fed, structure = partition(given, get_bridge().is_tensor)
        if structure not in self._nests:
            self._check_nest(given, structure, training)
        calls = self._calls
        if calls is None:
            self._keep("_calls", calls := self._make_calls())
        params, state = self._leaves
        generators = self._generators().values()
        held = [*params.variables, *state.variables, *(g.state for g in generators)]
        outputs, loss, aux, told = calls([*current_values(held), *fed], structure, training)
        changed, values = [], []
        if training or self.update_state_in_inference:
            changed += [state.variables[index] for index in told.changed]
            values += aux[: len(changed)]
        for generator, count in zip(generators, told.draws, strict=True):
            if count:
                changed.append(generator.state)
                values.append(generator.after(count))
        assign_all(changed, values)
        if loss is not None:
            self.add_loss(loss)
        for name, value in zip(told.metrics, aux[len(told.changed) :], strict=True):
            self._mean(name).update(value)
        self._note_shapes(outputs)
        return outputs

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> PyTree:
        """The shapes and dtypes of the outputs, by `jax.eval_shape`: on no backend does user code run on data.

        Args:
            *args: As for `call`, with a `keras.KerasTensor` for each tensor.
            **kwargs: Likewise.

        Returns:
            The nest of the outputs, with a `keras.KerasTensor` for each.
        """
        given, training = self._pure.arguments.bind(args, kwargs)
        self._complete()
        result = self._abstract_result(self._read_specs(given), training)
        self._note_shapes(result["outputs"])
        return jax.tree_util.tree_map(
            lambda spec: keras.KerasTensor(spec.shape, spec.dtype), result["outputs"]
        )

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape of the outputs, or the nest of them, for a first argument of the variable dtype."""
        specs = self._pure.arguments.from_shapes(input_shape, self.variable_dtype, self._owner)
        outputs = self._abstract_result(specs, False)["outputs"]
        return jax.tree_util.tree_map(lambda spec: spec.shape, outputs)

    def compute_mask(self, inputs: PyTree, previous_mask: PyTree) -> PyTree:
        """The mask of the inputs for each output that has the mask's axes; None for others.

        Args:
            inputs: The first argument.
            previous_mask: Its mask.

        Returns:
            A list with a mask or None for each output.
        """
        masks = [mask for mask in jax.tree_util.tree_leaves(previous_mask) if mask is not None]

        def mask_of(shape: tuple[int | None, ...]) -> Any:
            return next((mask for mask in masks if _begins_with(shape, tuple(mask.shape))), None)

        return [mask_of(shape) for shape in getattr(self._last_call, "output_shapes", ())]

    def _abstract_result(self, specs: dict[str, PyTree], training: bool) -> dict[str, PyTree]:
        """What `call_fn` returns, with specs for arrays: `outputs` and `metrics`."""
        arrays, structure = partition_specs(specs)
        key = (tuple(arrays), structure, training, self._leaves is None)
        if key not in self._abstract:
            weights = [leaves.structs() for leaves in self._leaves or ()]

            def result_of(arguments: dict[str, PyTree], weights: list[list[Any]]) -> PyTree:
                if self._leaves is None:
                    params, state = self._init(arguments)
                else:
                    pairs = zip(self._leaves, weights, strict=True)
                    params, state = (leaves.decode(values) for leaves, values in pairs)
                generators = list(self._generators().values())
                with drawing(generators, [jnp.zeros(2, jnp.uint32) for _ in generators]):
                    keys = self._draw_keys(training)
                result = self._pure.call(params, state, keys, arguments, training)
                return {"outputs": result.outputs, "metrics": result.metrics}

            self._abstract[key] = abstract_call(result_of, specs, weights)
        return self._abstract[key]

    def _note_shapes(self, outputs: PyTree) -> None:
        """Notes the shapes of the outputs for `compute_mask`, which Keras calls next and gives the inputs only."""
        if self.supports_masking:
            leaves = jax.tree_util.tree_leaves(outputs)
            self._last_call.output_shapes = [tuple(leaf.shape) for leaf in leaves]

    def _check_nest(self, given: dict[str, PyTree], received: Structure, training: bool) -> None:
        """Tries arguments of another structure than the layer was built for, before anything is drawn or assigned."""
        _, built = partition_specs(self._specs)
        if received != built:
            try:
                self._abstract_result(self._read_specs(given), training)
            except Exception as error:
                difference = describe_difference(built, received) or "  other containers"
                raise ValueError(
                    f"{self._owner}: `call_fn` fails for these inputs, whose structure is not the one that the layer "
                    f"was built for:\n{difference}\nIt raised {type(error).__name__}: {error}"
                ) from error
        self._nests.add(received)

    def _draw_keys(self, training: bool) -> PyTree:
        """The keys of a call, made of the seeds that are drawn for it."""
        if not self._generators():
            return None
        return jax.tree_util.tree_map(self._to_key, self._get_call_rng(training))

    def _make_calls(self) -> Calls:
        return Calls(
            self._pure,
            self._built_leaves(),
            list(self._generators().values()),
            self._draw_keys,
            self._platforms,
            f"{self._owner}: the new state that `call_fn` returned differs from the state it was given. No state has "
            "been changed. Return a state with the same paths and shapes.",
        )

    # Saving.

    def get_config(self) -> dict[str, Any]:
        """The configuration, of data and registered names.

        Raises:
            TypeError: If something cannot be saved. The error says what, and what to do.
        """
        return {
            **super().get_config(),
            **self._function_config(),
            "seed": self._seed,
            "native_serialization_platforms": self._platforms,
            "rules": [
                [pattern, serialize(rule, f"rules[{pattern!r}]", self._owner)]
                for pattern, rule in self._rules.pairs
            ],
            "update_state_in_inference": self.update_state_in_inference,
            "supports_masking": self.supports_masking,
            "key_impl": self._key_impl,
            "stored": self._to_store(self._values_given and self.init_fn is not None)._asdict(),
        }

    def _function_config(self) -> dict[str, Any]:
        """The part of the configuration from which the functions are made again."""
        config = {
            "call_fn": serialize_callable(self.call_fn, "call_fn", self._owner),
            "init_fn": serialize_callable(self.init_fn, "init_fn", self._owner),
            "call_arguments": self._call_arguments,
            "training_argument": self._training_argument,
        }
        if self.init_fn is None and self._leaves:
            # Their values are saved with the weights.
            names = zip(("params", "state"), self._leaves, strict=True)
            for name, leaves in names:
                config[name] = serialize(leaves.to_store(), name, self._owner)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> JaxLayer:
        """Makes a layer from what `get_config` gave.

        Raises:
            ValueError: If the config holds a name that is not registered, or is none that `get_config` can have given.
            TypeError: Likewise.
        """
        layer = super().from_config(cls._arguments_from_config(config))
        layer._keep("_from_file", True)
        return layer

    @classmethod
    def _arguments_from_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the constructor, from the configuration."""
        owner = f"{cls.__name__} {config.get('name')!r}"
        arguments = dict(config)
        if "stored" in config:
            arguments["_stored"] = _read_stored(arguments.pop("stored"), owner)
        for name in cls._serialized:
            if name in config:
                arguments[name] = deserialize(config[name], name, owner)
        return arguments


def _kind(leaf: Any) -> Any:
    """What it depends on whether an argument can be one."""
    return type(leaf), getattr(leaf, "dtype", None), getattr(leaf, "ndim", None)


def _read_stored(config: Any, owner: str) -> Stored:
    stored = Stored(**config)
    check_types(owner, keep_dtypes=(stored.keep_dtypes, "a bool"))
    for dtype in stored.dtypes.values():
        check_dtype(dtype)
    return stored


def _with_signature(method: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _begins_with(shape: tuple[int | None, ...], start: tuple[int | None, ...]) -> bool:
    return len(shape) >= len(start) and all(
        None in pair or pair[0] == pair[1] for pair in zip(shape, start, strict=False)
    )
