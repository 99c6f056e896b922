"""`OptaxOptimizer`: an Optax transformation behind Keras's optimizer protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from jax.core import Tracer

from jaxwrap._bridge import get_bridge
from jaxwrap._errors import describe, door, naming
from jaxwrap._training import _building, _saving
from jaxwrap._training._internals import Internals
from jaxwrap._training._printing import name_of, number_in
from jaxwrap._training._rate import RatedOptimizer, value_of
from jaxwrap._training._transformation import Recipe, with_arguments
from jaxwrap._training._update import extra_arguments, summed_arguments, tap
from jaxwrap._typing import PyTree, Tensor


@keras.saving.register_keras_serializable(package="jaxwrap")
class OptaxOptimizer(RatedOptimizer):
    """An Optax transformation as a Keras optimizer, on the JAX, TensorFlow and PyTorch backends.

    Use it as any optimizer of Keras, in `compile` or in a loop of your own, with clipping, weight decay, moving
    averages, gradient accumulation and loss scaling. These come before the transformation, which sees the gradients
    that Keras passes on.

    The transformation sees the whole model at once: parameters and gradients are nested dicts by the paths of the
    variables, `{"dense": {"kernel": ..., "bias": ...}}`. So masks and labels by path work. Its state is kept in Keras
    variables, such as `optax_optimizer/opt_state/0/mu/dense/kernel`, which are saved and loaded with the model.

    Args:
        transformation: An `optax.GradientTransformation`. Or, with `learning_rate`, a function that takes an argument
            of that name and returns one, such as `optax.adamw` or a `functools.partial` of it. Or a function without
            arguments. A function can be saved if it is one of Optax's, or registered with `register_serializable`. A
            transformation cannot.
        learning_rate: A number, a Keras `LearningRateSchedule`, or an Optax schedule, a function of the step. With it,
            the learning rate can be read and set, by Keras's callbacks too. Without it, only if the transformation
            holds one `learning_rate` in an `optax.inject_hyperparams`.
        **kwargs: Those of `keras.optimizers.Optimizer`: `name`, `weight_decay`, `clipnorm`, `clipvalue`,
            `global_clipnorm`, `use_ema`, `ema_momentum`, `ema_overwrite_frequency`, `loss_scale_factor`,
            `gradient_accumulation_steps`. Others go to the function: `OptaxOptimizer(optax.adam, 1e-3, b1=0.8)`.

    Attributes:
        params: The trained variables in the nested dict. None before `build`.
        state: The state of the transformation, with a `keras.Variable` for each array. None before `build`.

    Raises:
        TypeError: If `transformation` is not a transformation, and does not make one.
        ValueError: If it cannot be called with the learning rate, or was made with one already.

    Example:
        >>> import keras, numpy as np, optax, jaxwrap
        >>> variable = keras.Variable([1.0, 2.0], name="weights")
        >>> optimizer = jaxwrap.OptaxOptimizer(optax.sgd, learning_rate=0.5)
        >>> optimizer.apply([keras.ops.convert_to_tensor([1.0, 1.0])], [variable])
        >>> print(keras.ops.convert_to_numpy(variable.value))
        [0.5 1.5]
    """

    def __init__(self, transformation: Any, learning_rate: Any = None, **kwargs: Any):
        with naming(describe(self, kwargs.get("name"))):
            transformation, kwargs = with_arguments(transformation, kwargs, _saving.KERAS_ARGUMENTS)
            recipe = Recipe(transformation, learning_rate)
        # Past Keras and TensorFlow, which would wrap what is in it.
        object.__setattr__(self, "_own", Internals(recipe))
        super().__init__(learning_rate, **kwargs)

    @property
    def params(self) -> PyTree:
        """The trained variables, in the nested dict that the transformation sees."""
        step = self._own.step
        return step and step.params.tree(step.params.variables)

    @property
    def state(self) -> PyTree:
        """The state of the transformation, with a `keras.Variable` for each array or number."""
        return self._own.step and self._own.step.state.tree

    def __repr__(self) -> str:
        rate, step = self._rate_for_repr(), number_in(self._iterations, "d")
        return f"<{describe(self)}: {name_of(self._own.recipe.source)}, learning_rate={rate}, step {step}>"

    # Building.

    @door
    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Create the state for these variables.

        Call it again when variables have been frozen, or are trained again. It keeps the state of those that stay.

        Args:
            variables: The variables to train.

        Raises:
            ValueError: If the transformation needs what a Keras optimizer cannot pass, or in a step of one of the
                replicas of a `tf.distribute` strategy.
        """
        step = _building.make_step(self, variables)
        before = _building.untrack(self) if self.built else {}
        super().build(variables)
        for variable in step.state.variables:
            self._track_variable(variable)
        places = {self._var_key(v): place for place, v in enumerate(step.params.variables)}
        self._own.places, self._own.step = places, step
        _building.restore(self, before, variables)

    # Updating.

    @door
    def apply(
        self,
        grads: Sequence[Tensor],
        trainable_variables: Sequence[keras.Variable] | None = None,
        **extra_args: Any,
    ) -> None:
        """Update variables by their gradients.

        Args:
            grads: A gradient for each variable. A variable whose gradient is None does not change. The transformation
                sees zeros for it.
            trainable_variables: The variables. By default those that the optimizer was built with.
            **extra_args: Other arguments of the transformation: `value=loss` for `optax.contrib.reduce_on_plateau`.

        Raises:
            ValueError: If the transformation needs an argument that is missing. Nothing changes then.
        """
        with self._own.call.arguments(extra_args):
            super().apply(grads, trainable_variables)

    def apply_gradients(self, grads_and_vars: Any, **extra_args: Any) -> Any:
        """Update variables like `apply`, from pairs of a gradient and a variable. Return the number of steps."""
        grads, trainable_variables = zip(*grads_and_vars, strict=True)
        self.apply(grads, trainable_variables, **extra_args)
        return self._iterations

    @door
    def stateless_apply(
        self,
        optimizer_variables: Sequence[Tensor],
        grads: Sequence[Tensor],
        trainable_variables: Sequence[Tensor],
        **extra_args: Any,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Update like `apply`, on values: take and return those of `trainable_variables` and `variables`, on JAX."""
        if self.built and len(trainable_variables) != len(self._trainable_variables):
            raise ValueError(
                f"the optimizer has been built for {len(self._trainable_variables)} variables; received "
                f"{len(trainable_variables)}. If variables have been frozen or are trained again, call "
                "`optimizer.build(model.trainable_variables)` again. It keeps the state of those that stay."
            )
        with self._own.call.arguments(extra_args):
            return super().stateless_apply(optimizer_variables, grads, trainable_variables)

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Scale the loss for Keras's training steps, and keep it for a transformation that needs it."""
        own = self._own
        # Keras may build the optimizer after this.
        needed = own.step.needed if own.step else ("value",)
        if "value" in needed and isinstance(loss, Tracer):
            loss = tap(loss, own.call.keep_loss)
        elif "value" in needed:
            own.call.keep_loss(keras.ops.stop_gradient(loss))
        return super().scale_loss(loss)

    def _check_variables_are_known(self, variables: Sequence[keras.Variable]) -> None:
        unknown = [
            v for v in variables if self._var_key(v) not in self._trainable_variables_indices
        ]
        if unknown:
            names = ", ".join(getattr(v, "path", v.name) for v in unknown)
            raise ValueError(
                f"the optimizer has not been built for {names}. If variables are trained again, call "
                "`optimizer.build(model.trainable_variables)` again. It keeps the state of the others."
            )

    def _backend_apply_gradients(
        self, grads: Sequence[Tensor], trainable_variables: Sequence[keras.Variable]
    ) -> None:
        call = self._own.call
        # Before Keras decays weights, so that an error leaves everything as it is.
        call.extra = extra_arguments(call.extra, call.loss, self._own.step.needed)
        call.is_applying = True
        try:
            # Keras reads the learning rate in there, for its weight decay.
            super()._backend_apply_gradients(grads, trainable_variables)
        finally:
            call.is_applying = False

    def _backend_update_step(
        self,
        grads: Sequence[Tensor],
        trainable_variables: Sequence[keras.Variable],
        learning_rate: Any,
    ) -> None:
        """Update by gradients that Keras has clipped, accumulated and unscaled, on each backend."""
        bridge, own = get_bridge(), self._own
        gradients: list[Any] = [None] * len(own.places)
        dense = []
        for gradient in grads:
            # The gradient of an embedding may be sparse, which no transformation takes.
            if not bridge.is_tensor(gradient):
                gradient = keras.ops.convert_to_tensor(bridge.dense(gradient), sparse=False)
            dense.append(gradient)
        # From here on all replicas compute the same.
        places = [own.places[self._var_key(variable)] for variable in trainable_variables]
        for place, gradient in zip(places, bridge.summed(dense), strict=True):
            gradients[place] = gradient
        rate = None
        if own.recipe.takes_rate:
            # A number would be compiled in, and each new one would compile the update again.
            rate = keras.ops.convert_to_tensor(value_of(learning_rate))
        own.step(gradients, rate, summed_arguments(own.call.extra))

    # Saving.

    @door
    def get_config(self) -> dict[str, Any]:
        """Return the configuration as JSON, with registered names.

        Raises:
            TypeError: If the transformation, or a schedule, cannot be saved. The error names the fix.
        """
        return _saving.get_config(self)

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> OptaxOptimizer:
        """Make an optimizer from the result of `get_config`.

        Raises:
            ValueError: If the config has a name that is not registered, or `get_config` cannot have returned it.
        """
        optimizer = cls(**_saving.read_config(cls, config, custom_objects))
        optimizer._own.is_from_file = True
        return optimizer

    def save_own_variables(self, store: Any) -> None:
        """Store the variables under their paths."""
        _saving.save_variables(self, store)

    @door
    def load_own_variables(self, store: Any) -> None:
        """Load the variables by their paths, or in order if the layers have other names.

        Warns:
            UserWarning: If the file has other variables. Then nothing is loaded.

        Raises:
            ValueError: If shapes differ, or the file is damaged. Nothing is assigned then.
        """
        _saving.load_variables(self, store)
