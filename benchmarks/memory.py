"""How much memory a layer takes that is built from 500 MB of given variables. Linux only: /proc tells."""

import ctypes
import gc
from pathlib import Path

from benchmarks import process, rows

MEGABYTES = 500
WIDTH = 1024


def memory(backend, rounds, seconds):
    """In fresh processes, one for each layer: what is measured is a peak, which time does not change."""
    for subject in ("jaxwrap", "keras.layers.FlaxLayer"):
        ours = subject == "jaxwrap"
        whats = {
            "peak": ("peak memory while building from 500 MB", 2.1),
            "kept": ("memory kept once the user's own copy is dropped", 1.05),
            "called": ("the same after a call", None),
        }
        try:
            runs = [
                process.call("memory:measure", backend, subject=subject)[0]
                for _ in range(min(rounds, 3))
            ]
        except process.ProcessFailedError as error:
            for what, _ in whats.values():
                yield rows.failure("memory", what, subject, "the params", error)
            continue
        for key, (what, target) in whats.items():
            values = [run[key] for run in runs]
            size = [run["size"] for run in runs]
            target = target if ours else None
            yield rows.ratio("memory", what, subject, "the params", values, size, target)


def status(name):
    """A line of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def settled():
    """What the process holds, in MB, without what the allocator keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def measure(subject):
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import keras

    import jaxwrap
    from benchmarks.backends import no_gradients, ready, tensor

    class Stack(nn.Module):
        depth: int

        @nn.compact
        def __call__(self, inputs, training=False):
            for _ in range(self.depth):
                inputs = nn.Dense(WIDTH, use_bias=False)(inputs)
            return inputs

    def given(depth):
        # Not zeros, whose pages may never be touched.
        kernel = lambda: jnp.full((WIDTH, WIDTH), 1e-3)  # noqa: E731
        return {"params": {f"Dense_{i}": {"kernel": kernel()} for i in range(depth)}}

    def built(depth, variables):
        library = jaxwrap if subject == "jaxwrap" else keras.layers
        layer = library.FlaxLayer(Stack(depth), variables=variables)
        layer.build((None, WIDTH))
        return layer

    inputs = tensor(jnp.ones((1, WIDTH)))

    def call(layer):
        with no_gradients():
            ready(layer(inputs))

    # What is loaded on first use is not the layer's.
    variables = given(1)
    call(built(1, variables))
    del variables
    before = settled()
    variables = jax.block_until_ready(given(MEGABYTES * 2**20 // 4 // WIDTH**2))
    size = sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(variables)) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    layer = built(len(variables["params"]), variables)
    peak = status("VmHWM") - before
    del variables
    kept = settled() - before
    call(layer)
    yield {"size": size, "peak": peak, "kept": kept, "called": settled() - before}
