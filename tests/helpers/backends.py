"""What the tests need of each Keras backend, one small class per framework.

The oracle of every test is unwrapped JAX; these classes only run the wrapped thing by the backend's own means.
"""

from __future__ import annotations

import os

if os.environ.get("KERAS_BACKEND") == "torch":
    import torch  # noqa: F401  (before TensorFlow: they crash in the other order)

import jax
import keras
import numpy as np


def to_numpy(tree):
    def convert(leaf):
        if not keras.ops.is_tensor(leaf):
            return leaf
        if keras.config.backend() == "torch":
            leaf = leaf.resolve_neg()  # NumPy knows no such views
        if keras.config.backend() == "tensorflow":
            return np.asarray(leaf.numpy())  # Keras fails for bfloat16 of rank 0
        return keras.ops.convert_to_numpy(leaf)

    return jax.tree.map(convert, tree)


class Backend:
    """Modes are ways of calling: eager, and under each compiler that the backend has.

    TensorFlow's "batch" is a graph for any batch size.
    """

    trains = True
    modes = ("eager",)

    def compile(self, fn, mode, arrays=None):
        return fn

    def tensors(self, tree):
        return jax.tree.map(keras.ops.convert_to_tensor, tree)


class Jax(Backend):
    name = "jax"
    modes = ("eager", "jit")

    def compile(self, fn, mode, arrays=None):
        return jax.jit(fn) if mode == "jit" else fn

    def vjp(self, fn, arrays, wrt, cotangents, mode="eager"):
        """Gradients of sum(cotangents * fn(*arrays)) with respect to the arguments `wrt`."""

        def scalar(chosen):
            merged = list(arrays)
            for index, value in zip(wrt, chosen, strict=True):
                merged[index] = value
            return sum(
                (output * cotangent).sum()
                for output, cotangent in zip(fn(*merged), cotangents, strict=True)
                if cotangent is not None
            )

        return self.compile(jax.grad(scalar), mode)([arrays[index] for index in wrt])

    def penalty(self, fn, arrays, mode="eager"):
        """Gradients, for all arguments, of the squared norm of the gradient of fn(*arrays) for the first."""

        def norm(arrays):
            return (jax.grad(fn)(*arrays) ** 2).sum()

        return self.compile(jax.grad(norm), mode)(list(arrays))

    def layer_penalty(self, layer, inputs):
        """Gradients, for the trainable variables, of the squared norm of the gradient for the inputs."""
        state = [v.value for v in layer.non_trainable_variables]

        def penalty(trainable):
            def call(inputs):
                return layer.stateless_call(trainable, state, inputs)[0]

            return (jax.grad(call)(inputs) ** 2).sum()

        return jax.grad(penalty)([v.value for v in layer.trainable_variables])

    def layer_vjp(self, layer, inputs, training, cotangents, mode="eager"):
        """Outputs and gradients for `(trainable variables, inputs)`; the new state is assigned."""

        def call(trainable, floats, rest):
            outputs, state = layer.stateless_call(
                trainable, rest["state"], rest["merge"](floats), training=training
            )
            leaves = jax.tree.leaves(outputs)
            total = sum(
                (leaf * cotangent).sum()
                for leaf, cotangent in zip(leaves, cotangents, strict=True)
                if cotangent is not None
            )
            return total, (outputs, state)

        floats, merge = split_floats(inputs)
        trainable = [v.value for v in layer.trainable_variables]
        state = [v.value for v in layer.non_trainable_variables]

        def run(trainable, floats, state):
            rest = {"state": state, "merge": merge}
            return jax.grad(call, (0, 1), has_aux=True)(trainable, floats, rest)

        gradients, (outputs, state) = self.compile(run, mode)(trainable, floats, state)
        for variable, value in zip(layer.non_trainable_variables, state, strict=True):
            variable.assign(value)
        return outputs, gradients


class Numpy(Backend):
    name = "numpy"
    trains = False

    def layer_vjp(self, layer, inputs, training, cotangents, mode="eager"):
        return layer(inputs, training=training), None


class TensorFlow(Backend):
    name = "tensorflow"
    modes = ("eager", "graph", "batch", "xla")

    def compile(self, fn, mode, arrays=None):
        import tensorflow as tf

        if mode == "eager":
            return fn
        if mode == "batch":
            signature = [
                tf.TensorSpec([None, *np.shape(array)[1:]], tf.as_dtype(array.dtype))
                for array in arrays
            ]
            return tf.function(fn, input_signature=signature)
        return tf.function(fn, jit_compile=mode == "xla")

    def vjp(self, fn, arrays, wrt, cotangents, mode="eager"):
        import tensorflow as tf

        def run(*arrays):
            with tf.GradientTape() as tape:
                chosen = [arrays[index] for index in wrt]
                tape.watch(chosen)
                outputs = fn(*arrays)
                floats = [
                    (output, tf.cast(cotangent, output.dtype))
                    for output, cotangent in zip(outputs, cotangents, strict=True)
                    if cotangent is not None
                ]
                total = tf.add_n(
                    [tf.reduce_sum(output * cotangent) for output, cotangent in floats]
                )
            return tape.gradient(total, chosen)

        arrays = [tf.convert_to_tensor(array) for array in arrays]
        return self.compile(run, mode, arrays)(*arrays)

    def penalty(self, fn, arrays, mode="eager"):
        import tensorflow as tf

        def run(*arrays):
            with tf.GradientTape() as outer:
                outer.watch(arrays)
                with tf.GradientTape() as inner:
                    inner.watch(arrays[0])
                    value = fn(*arrays)
                norm = tf.reduce_sum(inner.gradient(value, arrays[0]) ** 2)
            return outer.gradient(norm, arrays)

        arrays = [tf.convert_to_tensor(array) for array in arrays]
        return self.compile(run, mode, arrays)(*arrays)

    def layer_penalty(self, layer, inputs):
        import tensorflow as tf

        inputs = tf.convert_to_tensor(inputs)
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                outputs = layer(inputs)
            norm = tf.reduce_sum(inner.gradient(outputs, inputs) ** 2)
        return outer.gradient(norm, [v.value for v in layer.trainable_variables])

    def layer_vjp(self, layer, inputs, training, cotangents, mode="eager"):
        import tensorflow as tf

        arrays, nest = jax.tree.flatten(inputs)
        arrays = [tf.convert_to_tensor(array) for array in arrays]
        treedef = None

        def run(*arrays):
            nonlocal treedef
            floats = [array for array in arrays if array.dtype.is_floating]
            with tf.GradientTape() as tape:
                tape.watch(floats)
                outputs = layer(jax.tree.unflatten(nest, arrays), training=training)
                leaves, treedef = jax.tree.flatten(outputs)
                total = tf.add_n(
                    [
                        tf.reduce_sum(tf.cast(leaf * tf.cast(cotangent, leaf.dtype), "float32"))
                        for leaf, cotangent in zip(leaves, cotangents, strict=True)
                        if cotangent is not None
                    ]
                )
            variables = [v.value for v in layer.trainable_variables]
            return leaves, tape.gradient(total, (variables, floats))

        leaves, gradients = self.compile(run, mode, arrays)(*arrays)
        return jax.tree.unflatten(treedef, leaves), gradients


class Torch(Backend):
    name = "torch"

    def vjp(self, fn, arrays, wrt, cotangents, mode="eager"):
        import torch

        tensors = [keras.ops.convert_to_tensor(array) for array in arrays]
        chosen = [tensors[index].requires_grad_(True) for index in wrt]
        outputs = fn(*tensors)
        pairs = [
            (output, keras.ops.convert_to_tensor(cotangent).to(output.dtype))
            for output, cotangent in zip(outputs, cotangents, strict=True)
            if cotangent is not None
        ]
        return torch.autograd.grad(
            *map(list, [[p[0] for p in pairs], chosen, [p[1] for p in pairs]])
        )

    def penalty(self, fn, arrays, mode="eager"):
        import torch

        tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
        (gradient,) = torch.autograd.grad(fn(*tensors), tensors[0], create_graph=True)
        return torch.autograd.grad((gradient**2).sum(), tensors)

    def layer_penalty(self, layer, inputs):
        import torch

        inputs = torch.tensor(inputs, requires_grad=True)
        (gradient,) = torch.autograd.grad(layer(inputs), inputs, create_graph=True)
        variables = [v.value for v in layer.trainable_variables]
        return torch.autograd.grad((gradient**2).sum(), variables)

    def layer_vjp(self, layer, inputs, training, cotangents, mode="eager"):
        import torch

        floats, merge = split_floats(inputs)
        floats = [keras.ops.convert_to_tensor(array).requires_grad_(True) for array in floats]
        outputs = layer(merge(floats), training=training)
        variables = [v.value for v in layer.trainable_variables]
        pairs = [
            (leaf, keras.ops.convert_to_tensor(cotangent).to(leaf.dtype))
            for leaf, cotangent in zip(jax.tree.leaves(outputs), cotangents, strict=True)
            if cotangent is not None and leaf.requires_grad
        ]
        if not pairs:
            return outputs, ([None] * len(variables), [None] * len(floats))
        gradients = torch.autograd.grad(
            [leaf for leaf, _ in pairs],
            [*variables, *floats],
            [cotangent for _, cotangent in pairs],
            allow_unused=True,
        )
        count = len(variables)
        return outputs, (gradients[:count], gradients[count:])


def split_floats(inputs):
    """The float leaves of a nest of NumPy arrays, and a function that puts others in their place."""
    leaves, treedef = jax.tree.flatten(inputs)
    where = [
        index for index, leaf in enumerate(leaves) if jax.numpy.issubdtype(leaf.dtype, np.inexact)
    ]

    def merge(floats):
        merged = [keras.ops.convert_to_tensor(leaf) for leaf in leaves]
        for index, value in zip(where, floats, strict=True):
            merged[index] = value
        return jax.tree.unflatten(treedef, merged)

    return [leaves[index] for index in where], merge


BACKENDS = {cls.name: cls for cls in (Jax, Numpy, TensorFlow, Torch)}
