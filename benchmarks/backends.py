"""What the benchmarks have to know of a Keras backend."""

import contextlib
import os

if os.environ["KERAS_BACKEND"] == "torch":
    import torch  # before TensorFlow, which Keras may import
import jax
import keras

BACKEND = keras.backend.backend()


def tensor(array):
    return keras.ops.convert_to_tensor(array)


def ready(outputs):
    """Waits for a tensor."""
    if BACKEND == "jax":
        return jax.block_until_ready(outputs)
    if BACKEND == "torch" and outputs.is_cuda:
        torch.cuda.synchronize()
    # Eager TensorFlow hands out what may still be computed; PyTorch and NumPy on the CPU do not.
    return outputs.numpy() if BACKEND == "tensorflow" else outputs


def no_gradients():
    return torch.no_grad() if BACKEND == "torch" else contextlib.nullcontext()


def threads():
    """The threads that the backend computes with; JAX on the CPU always takes all cores."""
    if BACKEND == "torch":
        return torch.get_num_threads()
    return os.cpu_count()
