"""JaxLayer: pure JAX functions, or an adapter, as a Keras layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import keras

from jaxwrap._bridge import get_bridge
from jaxwrap._errors import describe, door, naming
from jaxwrap._layer import _config
from jaxwrap._layer._adapter import Adapter
from jaxwrap._layer._engine import Engine
from jaxwrap._layer._functions import Functions, as_adapter
from jaxwrap._layer._options import Options, check_flags
from jaxwrap._layer._parts import HasParts, Parts, SignedCall, parts_of
from jaxwrap._layer._shapes import masks_for
from jaxwrap._layer._signature import AUTO
from jaxwrap._layer._weighted import Weighted
from jaxwrap._typing import PyTree
from jaxwrap._weights import Rule, Rules


@keras.saving.register_keras_serializable(package="jaxwrap")
class JaxLayer(Weighted, keras.layers.Layer, HasParts):
    """A Keras layer that computes a pure JAX function, on every Keras backend.

    The contract is that of `keras.layers.JaxLayer`. `call_fn` takes any of these arguments, by name:

    - `params`: the trainable parameters, a pytree.
    - `state`: the non-trainable state, a pytree. `call_fn` then returns `(outputs, new_state)`.
    - `rng`, or `key`: as `jax.random.PRNGKey` makes it, new at every call in training; None in inference.
    - `inputs` (required): any nest of arrays. `call_arguments`, or its only other name, stand in its place.
    - `training`: a Python bool; or another usual name of the train flag, `deterministic` and the like included.
    - `mask`: the Keras mask of the inputs, a bool array, or None.

    `init_fn` takes `rng`, `inputs` (required: ones, or zeros for integers and bools, with 1 for an unknown size) and
    `training` (True). It returns `params`, or `(params, state)` if `call_fn` takes `state`. To add losses or to report
    metrics, `call_fn` returns a `CallResult`. Every leaf of `params` and `state` that is an array or a number becomes a
    Keras variable, named by its path. Other leaves reach `call_fn` as they are.

    Args:
        call_fn: The function to wrap; or an `Adapter`, which stands for both functions.
        init_fn: Makes the initial `params` (and `state`). May be left out if `params` or `state` is passed.
        params: Initial parameters, which are trained. They are copied.
        state: Initial state, which is copied.
        seed: An integer. None draws one, repeatably under `keras.utils.set_random_seed`.
        native_serialization_platforms: The platforms ("cpu", "cuda", "rocm", "tpu") of a TensorFlow graph of this
            layer. None for the present one. Other backends ignore it.
        call_arguments: The names of the arguments that the caller passes instead of `inputs`. Those with a default in
            `call_fn` may be left out. `init_fn` gets those that it names.
        training_argument: The train flag of `call_fn`. By default the first of the usual names that it has. "frozen"
            names another one, "!frozen" one that is True in inference. With None its own default holds.
        rules: A `Rule` by a regular expression for whole paths below the layer, `{".*/kernel": Rule(...)}`. All rules
            that match apply, later ones over earlier ones.
        rng_in_inference: Whether `call_fn` gets keys in inference too.
        update_state_in_inference: Whether the new state is kept in inference too, as Keras does.
        supports_masking: Whether the mask of the first argument goes on to outputs that have its axes.
        key_impl: The implementation of typed keys, such as "threefry2x32" or "rbg". With None keys are raw keys.
        keep_dtypes: Whether float leaves that are not float32 keep their dtype; if not, they take the layer's variable
            dtype. By default they keep it unless `dtype` is passed. State is never cast for mixed precision.
        distinct_masks: Whether replicas that train on parts of one batch draw random numbers of their own. By default
            those of a `tf.distribute` strategy do, and the processes of `torch.distributed` do not.
        **kwargs: What every `keras.layers.Layer` takes: `name`, `dtype`, `trainable`, ...

    Attributes:
        params: The parameters, with a `keras.Variable` for each array or number. None until built.
        state: Likewise, the state.
        adapter: The adapter of the model.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, jaxwrap
        >>> def init(rng, inputs):
        ...     return {"w": jax.random.normal(rng, (inputs.shape[-1], 2))}
        >>> layer = jaxwrap.JaxLayer(lambda params, inputs: inputs @ params["w"], init, name="linear")
        >>> tuple(layer(np.ones((5, 3), "float32")).shape), layer.params["w"].path
        ((5, 2), 'linear/params/w')
    """

    adapter_class: ClassVar[type[Adapter]] = Functions

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note the arguments of a constructor that a user's class has, for its config."""
        layer = super().__new__(cls, *args, **kwargs)
        _config.note_constructor(layer, args, kwargs)
        return layer

    def __init__(
        self,
        call_fn: Callable[..., Any] | Adapter,
        init_fn: Callable[..., Any] | None = None,
        params: PyTree = None,
        state: PyTree = None,
        seed: int | None = None,
        native_serialization_platforms: Sequence[str] | None = None,
        *,
        call_arguments: Sequence[str] = ("inputs",),
        training_argument: str | None = AUTO,
        rng_in_inference: bool = False,
        rules: Mapping[str, Rule] | Iterable[tuple[str, Rule]] | None = None,
        update_state_in_inference: bool = True,
        supports_masking: bool = False,
        key_impl: str | None = None,
        keep_dtypes: bool | None = None,
        distinct_masks: bool | None = None,
        **kwargs: Any,
    ):
        with naming(describe(self, kwargs.get("name"))):
            check_flags(update_state_in_inference, supports_masking)
            options = Options.checked(
                seed, native_serialization_platforms, key_impl, keep_dtypes, distinct_masks, kwargs
            )
            options_of_call = (call_arguments, training_argument, rng_in_inference)
            adapter = as_adapter(call_fn, init_fn, *options_of_call, params, state)
            engine = Engine(self, adapter, Rules(rules), options)
            # Before Keras's constructor, which reads the signature of `call`.
            Parts(self, engine, JaxLayer).attach()
            super().__init__(**kwargs)
            self.supports_masking = supports_masking
            self.update_state_in_inference = update_state_in_inference
            self.adapter = adapter
            self.call_fn = getattr(adapter, "call_fn", adapter.call)
            self.init_fn = getattr(adapter, "init_fn", adapter.init)
            engine.attach(params, state)

    @property
    def _engine(self) -> Engine:
        return parts_of(self).engine

    # Seeds, as in `keras.layers.JaxLayer`.

    def _get_init_seed(self) -> Any:
        """A new seed for initial values: integers of shape (2,)."""
        return self._engine.seeds.next_init()

    def _get_init_rng(self) -> PyTree:
        """What `init_fn` gets as `rng`: a pytree of seeds from `_get_init_seed`, which become keys."""
        return self._engine.seeds.for_init(self._get_init_seed)

    def _get_call_seed(self) -> Any:
        """A new seed for one call: an integer array of shape (2,)."""
        return self._engine.seeds.next_call()

    def _get_call_rng(self, training: bool) -> PyTree:
        """What `call_fn` gets as `rng`: a pytree of seeds from `_get_call_seed`, which become keys. JAX traces it."""
        return self._engine.seeds.for_call(training, self._get_call_seed)

    # Weights.

    @property
    def params(self) -> PyTree:
        """The trainable parameters as the user's pytree, with a `keras.Variable` for each array or number."""
        weights = self._engine.weights
        return None if weights is None else weights.params.tree

    @property
    def state(self) -> PyTree:
        """The non-trainable state as the user's pytree, with a `keras.Variable` for each array or number."""
        weights = self._engine.weights
        return None if weights is None else weights.state.tree

    @property
    def trainable(self) -> bool:
        """Whether the layer is trained. Setting it leaves frozen what a rule or `freeze` has frozen."""
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        # This sets all variables, so leaves that are frozen have to be set back after it.
        keras.layers.Layer.trainable.fset(self, value)  # pyright: ignore[reportOptionalCall]
        if self._engine.weights is not None:
            self._engine.weights.set_trainable(bool(value))

    @door
    def save_own_variables(self, store: Any) -> None:
        """Store the weights under their paths below the layer, and the seeds."""
        self._engine.save(store)

    @door
    def load_own_variables(self, store: Any) -> None:
        """Load weights and seeds by path; or weights by position, as Keras's own layers store them."""
        self._engine.load(store)

    @property
    def variables(self) -> list[keras.Variable]:
        """All variables, that is, the weights, the seeds, and the means of metrics."""
        self._engine.complete()
        return super().variables

    @property
    def weights(self) -> list[keras.Variable]:
        """The variables without the seeds."""
        self._engine.complete()
        return super().weights

    @property
    def metrics(self) -> list[keras.Metric]:
        """The metrics that the model reports in training."""
        self._engine.complete()
        return super().metrics

    def _track_variables(self) -> None:
        # Keras calls this on PyTorch alone, and makes parameters of seeds too.
        get_bridge().register(self)

    # Building and calling.

    @door
    def build(self, input_shape: Any) -> None:
        """Make the variables, for the shape of the first argument, or a nest of shapes."""
        self._engine.build(input_shape)

    @door
    def get_build_config(self) -> dict[str, Any] | None:
        """Return the shapes and dtypes of the arguments that the layer was built for."""
        return self._engine.build_config()

    @door
    def build_from_config(self, config: dict[str, Any]) -> None:
        """Build the layer from the result of `get_build_config`."""
        self._engine.build_from_config(config)

    def __call__(self, *args: Any, **kwargs: Any) -> PyTree:
        """Call the layer, as every Keras layer is called."""
        return parts_of(self).enter(args, kwargs)

    @SignedCall
    def call(self, *args: Any, **kwargs: Any) -> PyTree:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Call the model with its arguments and `training`. Assigns the new state, unless an error is raised."""
        return parts_of(self).calls.call(args, kwargs)

    @door
    def compute_output_spec(self, *args: Any, **kwargs: Any) -> PyTree:
        """Return a `keras.KerasTensor` for each output, by `jax.eval_shape`. No user code runs on data."""
        return parts_of(self).calls.symbolic(args, kwargs)

    @door
    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the shapes of the outputs, for a first argument of the variable dtype."""
        return self._engine.output_shape(input_shape)

    def compute_mask(self, inputs: PyTree, previous_mask: PyTree) -> PyTree:
        """Return for each output the mask of the inputs, if it has the mask's axes, or None."""
        return masks_for(parts_of(self).calls.last_shapes(), previous_mask)

    # Saving.

    @door
    def get_config(self) -> dict[str, Any]:
        """Return the configuration as JSON. TypeError if something cannot be saved; it names the fix."""
        return _config.get_config(self, super().get_config())

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> JaxLayer:
        """Make a layer from the result of `get_config`. ValueError for a name that is not registered."""
        return _config.from_config(cls, config, super().from_config)

    def __repr__(self) -> str:
        return f"<{describe(self)}: {self.adapter}>"
