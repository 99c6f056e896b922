"""What users do with the weights of a layer: freeze, read, write, and put other parts underneath."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from jaxwrap._errors import door
from jaxwrap._layer import _rebuild, _sharding
from jaxwrap._layer._summary import Modules
from jaxwrap._layer._sync import sync
from jaxwrap._typing import PyTree
from jaxwrap._weights import Reparametrization
from jaxwrap._weights._table import ModuleTable, WeightTable

if TYPE_CHECKING:
    from jaxwrap._layer._shard_report import ShardReport

# What the names of axes mean by default.
AXES = (("mlp", "model"), ("batch", "batch"))


class Weighted:
    """The methods of a layer for its weights."""

    # The layer defines it.
    _engine: Any
    layers = Modules()

    @door
    def freeze(self, pattern: str) -> None:
        """Stop training the parameters whose paths a regular expression matches. Compile a compiled model again."""
        self._engine.built_weights().freeze(pattern)

    @door
    def unfreeze(self, pattern: str) -> None:
        """Train parameters again. The opposite of `freeze`. Parts that are never trained stay frozen."""
        self._engine.built_weights().freeze(pattern, trainable=True)

    @door
    def reparametrize(self, pattern: str, reparametrization: Reparametrization) -> None:
        """Compute the parameters that a pattern matches from parts, which start with the present values.

        The layer has other variables then. Compile a compiled model again.

        Args:
            pattern: A regular expression for whole paths below the layer: `".*/kernel"`.
            reparametrization: Such as `jaxwrap.reparametrizations.LoRA(8)`. A leaf that has parts already is merged
                before.

        Raises:
            ValueError: If the layer is not built, the pattern matches no parameter, or a leaf cannot be computed from
                such parts. Nothing has changed then.

        Example:
            >>> import flax.linen as nn, numpy as np, jaxwrap
            >>> layer = jaxwrap.FlaxLayer(nn.Dense(4), name="dense")
            >>> before = layer(np.ones((1, 3), "float32"))
            >>> layer.reparametrize(".*/kernel", jaxwrap.reparametrizations.LoRA(rank=2))
            >>> after = layer(np.ones((1, 3), "float32"))
            >>> [weight.name for weight in layer.trainable_weights], bool((before == after).all())
            (['bias', 'a', 'b'], True)
        """
        _rebuild.reparametrize(self._engine, pattern, reparametrization)

    @door
    def merge(self, pattern: str = ".*") -> None:
        """Make plain variables of the parameters that a pattern matches, with their present values.

        The layer has other variables then. Compile a compiled model again.

        Raises:
            ValueError: If the layer is not built, or none of the parameters that match has parts.
        """
        _rebuild.merge(self._engine, pattern)

    @door
    def quantize(
        self, mode: str | None = None, type_check: bool = True, config: Any = None
    ) -> None:
        """Make integers of the float parameters with two axes or more: what `keras.Model.quantize` calls.

        Only weights become integers, not activations. A leaf that a rule reparametrizes, or for which a rule says
        `reparametrize=False`, stays as it is.

        Args:
            mode: "int8" or "int4": see `jaxwrap.reparametrizations`.
            type_check: Ignored.
            config: Must be the mode's default.

        Raises:
            NotImplementedError: For another mode. Keras makes a warning of it.
        """
        _rebuild.quantize(self._engine, mode)

    @door
    def weight_table(self, depth: int | None = None) -> WeightTable | ModuleTable:
        """Return path, shape, dtype, `trainable` and size of each weight, as a tuple that prints as a table.

        Args:
            depth: Sums up the weights of each module instead: those whose paths below the layer begin with the same
                `depth` names. With 2, `params/Dense_0` is a row of `path`, `weights`, `size`, `bytes` and `trained`.

        Example:
            >>> import flax.linen as nn, numpy as np, jaxwrap
            >>> layer = jaxwrap.FlaxLayer(nn.Sequential([nn.Dense(4), nn.Dense(2)]), name="mlp")
            >>> _ = layer(np.ones((1, 3), "float32"))
            >>> print(layer.weight_table(depth=2))
            path                 weights  size  bytes  trained
            mlp/params/layers_0        2    16     64       16
            mlp/params/layers_1        2    10     40       10
            total                      4    26    104       26
        """
        weights, trained = self._engine.built_weights(), self.trainable_variables  # type: ignore[attr-defined]
        if depth is None:
            return weights.table(trained)
        if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
            raise ValueError(
                f"`depth` must be a positive number of names in a path, or None; received {depth!r}."
            )
        return weights.sums(trained, depth)

    @door
    def sync_state(self, how: str = "mean") -> None:
        """Give all replicas the same state: processes of `torch.distributed`, or copies of a `tf.distribute` strategy.

        All processes have to call it. On JAX and NumPy there is one state, and nothing to do. In `fit`, the callback
        `jaxwrap.SyncState` does the same.

        Args:
            how: "mean" for the mean of float state, and the first replica's state of other dtypes. "first" for all of
                the first replica's state.

        Raises:
            ValueError: If the layer is not built, or for another word.
            RuntimeError: If there are several processes that do not know each other.

        Example:
            >>> import flax.linen as nn, numpy as np, jaxwrap
            >>> layer = jaxwrap.FlaxLayer(nn.BatchNorm(use_running_average=False), name="norm")
            >>> _ = layer(np.ones((2, 3), "float32"))
            >>> layer.sync_state("mean")
        """
        sync(self._engine.built_weights().state.variables, how)

    @door
    def layout_map(
        self,
        device_mesh: keras.distribution.DeviceMesh,
        input_shape: Any = None,
        axes: Any = AXES,
    ) -> keras.distribution.LayoutMap:
        """Return how the weights are divided over a mesh, for `keras.distribution.ModelParallel`.

        Nothing is allocated. Each weight that is divided has an entry under its exact path. `Rule(layout=...)` counts
        first, then the names that Flax modules have for the axes of their parameters.

        Args:
            device_mesh: The mesh.
            input_shape: The shape of the first argument, or a nest of shapes, for a layer that is not built. A
                `keras.KerasTensor` has a dtype too, for inputs that are not floats.
            axes: What names of axes mean, as pairs in Flax's form: a name, and None, an axis of the mesh or several.
                The first meaning whose axes are free counts. Names without a meaning are axes of the mesh.

        Raises:
            ValueError: If the layer is not built and `input_shape` is None, or a layout does not fit its weight or
                the mesh.

        Example:
            >>> import flax.linen as nn, keras, jaxwrap
            >>> mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "model"), devices=["cpu:0"])
            >>> rules = {".*/kernel": jaxwrap.Rule(layout=(None, "model"))}
            >>> layer = jaxwrap.FlaxLayer(nn.Dense(4), rules=rules, name="dense")
            >>> [(path, layout.axes) for path, layout in layer.layout_map(mesh, (None, 3)).items()]
            [('dense/params/kernel', (None, 'model'))]
        """
        return _sharding.layout_map(self._engine, device_mesh, input_shape, axes)

    @door
    def shard_report(
        self, device_mesh: Any, input_shape: Any = None, axes: Any = AXES
    ) -> ShardReport:
        """Return what the layer costs on a mesh: bytes, operations, and what devices send. Nothing is allocated.

        Layouts are those of `layout_map`. The axes of the mesh that "batch" means in `axes` divide the batch, or else
        its first axis. With `n` devices along the axes in question, a device

        - holds the bytes of a weight, divided by the sizes of all axes of its layout.
        - computes `2 * outputs * inputs` operations for each product of matrices or convolution of a forward pass,
          divided by the sizes of the axes that divide its factors. A loop counts as often as it runs. Operations
          other than products do not count.
        - sends `2 (n - 1) / n` of the bytes of a gradient to add it up over the data axes. Where a data axis divides
          the weight itself, `(n - 1) / n` of the bytes of the gathered weight for its gradient, and twice for the
          weight, in the forward pass and the backward pass.
        - sends `2 (n - 1) / n` of the bytes of a result, or of the gradient of a factor, that is a sum over an axis
          which other axes divide.

        These are estimates: a compiler may join or avoid some of it. Optimizers, activations and the parts of
        reparametrized leaves, which are computed from them, do not count as operations or memory.

        Args:
            device_mesh: A mesh of Keras or JAX, abstract ones too, or a dict of the sizes of its axes.
            input_shape: See `layout_map`. An unknown batch is one example for each of its parts, another unknown
                size is 1.
            axes: See `layout_map`.

        Raises:
            ValueError: See `layout_map`.

        Example:
            >>> import flax.linen as nn, jaxwrap
            >>> rules = {".*/kernel": jaxwrap.Rule(layout=(None, "model"))}
            >>> layer = jaxwrap.FlaxLayer(nn.Dense(1024), rules=rules, name="dense")
            >>> report = layer.shard_report({"batch": 2, "model": 4}, (64, 512))
            >>> report.bytes_per_device, report.flops_per_device
            (528384, 8388608.0)
        """
        # Here, since few programs use it.
        from jaxwrap._layer._shard_report import shard_report

        return shard_report(self._engine, device_mesh, input_shape, axes)

    @door
    def get_variables(self, merged: bool = True) -> PyTree:
        """Return the weights as the library has them, with NumPy arrays. PRNG keys are JAX arrays.

        Args:
            merged: Whether a reparametrized leaf is one array. Otherwise it is a dict of its parts.
        """
        weights = self._engine.built_weights()
        params = weights.params.read(merged)
        return self._engine.adapter.join(params, weights.state.read())

    @door
    def set_variables(self, variables: PyTree) -> None:
        """Assign a pytree as `get_variables` returns it, of any arrays. ValueError if it does not fit the weights."""
        engine = self._engine
        values, _ = engine.adapter.unbox(*engine.adapter.split(variables))
        engine.built_weights().write(*values)
