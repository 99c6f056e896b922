"""`OptaxOptimizer`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import keras
from jax.core import Tracer

from jaxwrap._bridge import get_bridge
from jaxwrap._serialization import deserialize, serialize
from jaxwrap._storage import load, save, stored_paths
from jaxwrap._typing import PyTree, Tensor
from jaxwrap._variables import assign, to_host, unique_names
from jaxwrap.optimizers._rate import EXAMPLE, RatedOptimizer, value_of
from jaxwrap.optimizers._recipe import Recipe
from jaxwrap.optimizers._step import Step, tap

_KERAS_ARGUMENTS = (
    "name",
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
)


@keras.saving.register_keras_serializable(package="jaxwrap")
class OptaxOptimizer(RatedOptimizer):
    """An Optax transformation as a Keras optimizer, on the JAX, TensorFlow and PyTorch backends.

    It is used as any optimizer of Keras is, in `compile` or in a loop of your own, with all that those have: clipping,
    weight decay, moving averages, gradient accumulation, loss scaling. These come before the transformation,
    which sees the gradients that Keras hands on.

    The transformation sees the whole model at once: parameters and gradients are nested dicts by the paths of the
    variables, `{"dense": {"kernel": ..., "bias": ...}}`. So masks and labels by path work. Its state is kept in Keras
    variables, `optax_optimizer/opt_state/0/mu/dense/kernel` say, which are saved and loaded with the model.

    Args:
        transformation: An `optax.GradientTransformation`; or, with `learning_rate`, a function that takes an argument
            of that name and returns one, such as `optax.adamw` or a `functools.partial` of it; or one without
            arguments. A function can be saved, if it is one of Optax's or has been registered with
            `register_serializable`; a transformation cannot.
        learning_rate: A number, a Keras `LearningRateSchedule`, or an Optax schedule, a function of the step. With it,
            the learning rate can be read and set, by Keras's callbacks too. Without it this is so if the transformation
            holds one `learning_rate` in an `optax.inject_hyperparams`.
        **kwargs: As of `keras.optimizers.Optimizer`: `name`, `weight_decay`, `clipnorm`, `clipvalue`,
            `global_clipnorm`, `use_ema`, `ema_momentum`, `ema_overwrite_frequency`, `loss_scale_factor`,
            `gradient_accumulation_steps`.

    Attributes:
        params: The trained variables in the nested dict; None before `build`.
        state: The state of the transformation, with a `keras.Variable` for each array; None before `build`.

    Raises:
        TypeError: If `transformation` is none, and makes none.
        ValueError: If it cannot be called with the learning rate, or does not go with it.

    Example:
        >>> import keras, numpy as np, optax, jaxwrap
        >>> variable = keras.Variable([1.0, 2.0], name="weights")
        >>> optimizer = jaxwrap.OptaxOptimizer(optax.sgd, learning_rate=0.5)
        >>> optimizer.apply([keras.ops.convert_to_tensor([1.0, 1.0])], [variable])
        >>> print(keras.ops.convert_to_numpy(variable.value))
        [0.5 1.5]
    """

    def __init__(self, transformation: Any, learning_rate: Any = None, **kwargs: Any):
        self._keep("_recipe", Recipe(transformation, learning_rate))
        super().__init__(learning_rate, **kwargs)
        self._keep("_step", None)
        self._keep("_extra", {})
        self._keep("_loss", None)

    @property
    def params(self) -> PyTree:
        """The trained variables, in the nested dict that the transformation sees."""
        return self._step and self._step.params.tree(self._step.params.variables)

    @property
    def state(self) -> PyTree:
        """The state of the transformation, with a `keras.Variable` for each array or number."""
        return self._step and self._step.state.tree

    # Building.

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates the state for these variables.

        If it is called again, with more variables or with fewer, what is there of those that stay is kept. That is to
        be done when variables have been frozen, or taken back into training.

        Args:
            variables: The variables to train.

        Raises:
            ValueError: If the transformation needs what a Keras optimizer cannot give; or under a `tf.distribute`
                strategy of several replicas.
        """
        if (count := get_bridge().replicas()) > 1:
            raise ValueError(
                f"{self._owner}: a `tf.distribute` strategy with {count} replicas is not supported, as their gradients "
                "would not be summed. Train on one device, or use an optimizer of Keras."
            )
        # Keras may build an optimizer when it compiles the first training step.
        with get_bridge().lifted():
            step = self._make_step(variables)
        kept = {}
        if self.built:
            kept = {variable.path: to_host(variable) for variable in self.variables}
            for variable in self.variables:
                if variable is not self._iterations and variable is not self._learning_rate:
                    self._untrack_variable(variable)
            self._trainable_variables_indices.clear()
        super().build(variables)
        for variable in step.state.variables:
            self._track_variable(variable)
        places = {self._var_key(v): place for place, v in enumerate(step.params.variables)}
        self._keep("_places", places)
        self._keep("_step", step)
        for variable in self.variables if kept else ():
            value = kept.get(variable.path)
            if value is not None and value.shape == tuple(variable.shape):
                assign(variable, value)
        if kept and self.use_ema:
            averages = self._model_variables_moving_average
            for variable, average in zip(variables, averages, strict=True):
                if average is not None and average.path not in kept:
                    average.assign(variable.value)

    def _make_step(self, variables: Sequence[keras.Variable]) -> Step:
        # Those that are overwritten by their gradients are none of the transformation's.
        trained = [v for v in variables if not self._overwrite_variable_with_gradient(v)]
        try:
            rate = self._get_current_learning_rate() if self._recipe.takes_rate else None
            rate = None if rate is None else keras.ops.convert_to_numpy(value_of(rate))
            step = Step(self, self._owner, trained, self._recipe, rate)
        except jax.errors.TracerArrayConversionError as error:
            raise ValueError(
                f"{self._owner}: it cannot be built while JAX compiles a function, since the state begins with the "
                "values of the variables. Call `optimizer.build(model.trainable_variables)` before."
            ) from error
        if self.weight_decay is not None and self._rate_in(step.state.tree) is None:
            raise self._unknown_rate("cannot decay weights, which takes the learning rate")
        return step

    # Updating.

    def apply(
        self,
        grads: Sequence[Tensor],
        trainable_variables: Sequence[keras.Variable] | None = None,
        **extra_args: Any,
    ) -> None:
        """Updates variables by their gradients.

        Args:
            grads: A gradient for each variable. A variable whose gradient is None is left as it is; the transformation
                sees zeros.
            trainable_variables: The variables; by default those that the optimizer was built with.
            **extra_args: What else the transformation takes: `value=loss` for `optax.contrib.reduce_on_plateau`.

        Raises:
            ValueError: If the transformation needs an argument that has not been given. Nothing has changed.
        """
        if extra_args:
            self._keep("_extra", extra_args)
        try:
            super().apply(grads, trainable_variables)
        finally:
            self._keep("_extra", {})
            self._keep("_loss", None)

    def apply_gradients(self, grads_and_vars: Any, **extra_args: Any) -> Any:
        """Like `apply`, of pairs of a gradient and a variable; returns the number of steps."""
        grads, trainable_variables = zip(*grads_and_vars, strict=True)
        self.apply(grads, trainable_variables, **extra_args)
        return self._iterations

    def stateless_apply(
        self,
        optimizer_variables: Sequence[Tensor],
        grads: Sequence[Tensor],
        trainable_variables: Sequence[Tensor],
        **extra_args: Any,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Like `apply`, of values: takes and returns those of `trainable_variables` and of `variables`, on JAX."""
        if self.built and len(trainable_variables) != len(self._trainable_variables):
            raise ValueError(
                f"{self._owner} has been built for {len(self._trainable_variables)} variables; received "
                f"{len(trainable_variables)}. If variables have been frozen or taken back into training, call "
                "`optimizer.build(model.trainable_variables)` again: it keeps the state of those that stay."
            )
        self._keep("_extra", extra_args)
        try:
            return super().stateless_apply(optimizer_variables, grads, trainable_variables)
        finally:
            self._keep("_extra", {})
            self._keep("_loss", None)

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Scales the loss, as Keras's training steps have it done; keeps it for a transformation that needs it."""
        # Keras may build the optimizer after this.
        needed = self._step.needed if self._step else ("value",)
        if "value" in needed and isinstance(loss, Tracer):
            loss = tap(loss, functools.partial(self._keep, "_loss"))
        elif "value" in needed:
            self._keep("_loss", keras.ops.stop_gradient(loss))
        return super().scale_loss(loss)

    def _check_variables_are_known(self, variables: Sequence[keras.Variable]) -> None:
        unknown = [
            v for v in variables if self._var_key(v) not in self._trainable_variables_indices
        ]
        if unknown:
            names = ", ".join(getattr(v, "path", v.name) for v in unknown)
            raise ValueError(
                f"{self._owner} has not been built for {names}. If variables have been taken back into training, call "
                "`optimizer.build(model.trainable_variables)` again: it keeps the state of the others."
            )

    def _backend_apply_gradients(
        self, grads: Sequence[Tensor], trainable_variables: Sequence[keras.Variable]
    ) -> None:
        # Before Keras decays weights: an error leaves everything as it is.
        self._keep("_extra", self._extra_arguments())
        self._keep("_applying", True)
        try:
            super()._backend_apply_gradients(grads, trainable_variables)
        finally:
            self._keep("_applying", False)

    def _backend_update_step(
        self,
        grads: Sequence[Tensor],
        trainable_variables: Sequence[keras.Variable],
        learning_rate: Any,
    ) -> None:
        """The place where Keras has clipped, accumulated and unscaled the gradients, on each backend."""
        bridge = get_bridge()
        gradients: list[Any] = [None] * len(self._places)
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            if not bridge.is_tensor(gradient):
                gradient = keras.ops.convert_to_tensor(bridge.dense(gradient), sparse=False)
            gradients[self._places[self._var_key(variable)]] = gradient
        rate = None
        if self._recipe.takes_rate:
            rate = keras.ops.convert_to_tensor(value_of(learning_rate))
        self._step(gradients, rate, self._extra)

    def _extra_arguments(self) -> dict[str, Any]:
        given, needed = dict(self._extra), self._step.needed
        if "value" in needed and self._loss is not None:
            given.setdefault("value", self._loss)
        if missing := [name for name in needed if name not in given]:
            raise ValueError(
                f"{self._owner}: this transformation needs {', '.join(f'`{name}`' for name in missing)}. Pass it in a "
                f"loop or a `train_step` of your own: `optimizer.apply(grads, variables, {missing[0]}=...)`. In `fit` "
                "the loss, `value`, is at hand, unless there is a LossScaleOptimizer, which does not hand it on."
            )
        numbers = (bool, int, float)
        return jax.tree.map(
            # As it is, a number would be compiled in.
            lambda leaf: keras.ops.convert_to_tensor(leaf) if isinstance(leaf, numbers) else leaf,
            given,
        )

    # Saving.

    def get_config(self) -> dict[str, Any]:
        """The configuration, of data and registered names.

        Raises:
            TypeError: If the transformation, or a schedule, cannot be saved. The error says what to do.
        """
        if self._recipe.is_ready:
            raise TypeError(
                f"{self._owner} cannot be saved: it was given a transformation, which is made of functions that do not "
                f"say how they were made. Pass the function that makes it: {EXAMPLE}, or one of your own that is "
                'registered: `@jaxwrap.register_serializable("my_package")`. `model.save_weights` works as it is.'
            )
        return {
            "transformation": serialize(self._recipe.source, "transformation", self._owner),
            "learning_rate": self._rate_config(),
            **{name: getattr(self, name) for name in _KERAS_ARGUMENTS},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> OptaxOptimizer:
        """The inverse of `get_config`. Resolves only names that are registered, or listed.

        Raises:
            ValueError: For a config that `get_config` cannot have made, or a name that is not known.
        """
        config = dict(config)
        owner = f"{cls.__name__} {config.get('name')!r}"
        source = deserialize(config.pop("transformation", None), "transformation", owner)
        rate = cls._rate_from_config(config.pop("learning_rate", None), custom_objects, owner)
        return cls(source, rate, **config)

    def save_own_variables(self, store: Any) -> None:
        """Stores the variables under their paths."""
        save(store, self._by_path(), {})

    def load_own_variables(self, store: Any) -> None:
        """Loads the variables by their paths; or in order, if the layers have other names.

        Warns:
            UserWarning: If the file has other variables, so that nothing is loaded and training starts anew.

        Raises:
            ValueError: If shapes differ, or the file is damaged. Nothing has been assigned.
        """
        own = self._by_path()
        saved = stored_paths(store)
        if len(saved) != len(own):
            built = (
                "" if self.built else " It has not been built yet: `optimizer.build(variables)`."
            )
            warnings.warn(
                f"{self._owner} has {len(own)} variables, and the file {len(saved)} for it, so none is loaded and the "
                f"optimizer starts anew.{built}",
                stacklevel=2,
            )
            return
        if set(saved) != set(own):
            own = dict(zip(saved, own.values(), strict=True))
        load(store, own, list(own), {}, self._owner)

    def _by_path(self) -> dict[str, keras.Variable]:
        paths = [tuple(v.path.removeprefix(f"{self.name}/").split("/")) for v in self.variables]
        return dict(zip(map("/".join, unique_names(paths)), self.variables, strict=True))
