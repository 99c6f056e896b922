"""What grows with the number of leaves, of calls, and of shapes."""

import time

import jax
import jax.numpy as jnp
import keras
import numpy as np

import jaxwrap
from benchmarks import rows
from benchmarks.backends import BACKEND, no_gradients, ready, tensor
from benchmarks.memory import settled
from benchmarks.models import MODELS, tree
from benchmarks.timing import race

LEAVES = (100, 200, 500, 1000, 2000, 4000)
CALLS = (1, 10, 100, 1000, 2000, 4000, 6000, 8000, 10000)
SHAPES = 200
COMPILED = "/jax/core/compile/backend_compile_duration"


def leaves(rounds, seconds):
    """What a call takes beyond the native one, by the number of leaves: a line, whose slope is reported."""
    extra, lines = {}, {"jaxwrap": [], "jitted JAX": []}
    inputs = np.ones((1, 4), "float32")
    for count in LEAVES:
        params, call = tree(count)

        def native(call=call, params=params):
            jitted, x = jax.jit(call), jnp.asarray(inputs)
            return lambda: jax.block_until_ready(jitted(params, x))

        def ours(call=call, params=params):
            layer, x = jaxwrap.JaxLayer(call, params=params), tensor(inputs)
            return lambda: ready(layer(x, training=False))

        with no_gradients():
            times, failures = race({"jitted JAX": native, "jaxwrap": ours}, rounds, seconds)
        if failures:
            raise RuntimeError(failures)
        pairs = zip(times["jaxwrap"], times["jitted JAX"], strict=True)
        extra[count] = [1e6 * (one - other) for one, other in pairs]
        for name, line in lines.items():
            line.append(1e6 * float(np.median(times[name])))
    slopes = [np.polyfit(LEAVES, values, 1)[0] for values in zip(*extra.values(), strict=True)]
    what = "overhead of a call, by leaves"
    yield rows.value("leaves", what, "jaxwrap", list(map(float, slopes)), "µs per leaf")
    # Of a line, one more leaf costs as much at the end as before. Caches that overflow may add half of it.
    between = zip(extra[4000], extra[2000], extra[1000], extra[100], strict=True)
    bends = [((d - c) / 2000) / ((b - a) / 900) for d, c, b, a in between]
    what = "cost of one more leaf, at 4,000 beside at 1,000 leaves"
    yield rows.value("leaves", what, "jaxwrap", bends, "x", 1.5)
    yield rows.curve("leaves", "one call", LEAVES, lines, "leaves", "µs per call")


def calls(rounds, seconds):
    """Memory after up to 10,000 calls, in a process in which nothing else runs."""
    model = MODELS["mlp"]
    layer = jaxwrap.FlaxLayer(model.make(), variables=model.variables())
    x, y = tensor(model.inputs()), model.targets()

    def infer():
        with no_gradients():
            ready(layer(x, training=False))

    kinds = {"inference": infer}
    if BACKEND != "numpy":
        trained = keras.Sequential([keras.Input(model.shape), layer])
        trained.compile(keras.optimizers.SGD(1e-3), "mse")
        kinds["train_on_batch"] = lambda: trained.train_on_batch(x, y)
    lines = {}
    for kind, call in kinds.items():
        done, sizes = 0, []
        for count in CALLS:
            for _ in range(count - done):
                call()
            done = count
            sizes.append(settled())
        lines[kind] = sizes
        # What the first calls load is no growth. 2 MB is what an allocator may move by itself.
        grown = sizes[-1] - sizes[CALLS.index(1000)]
        what = f"growth of memory from 1,000 to 10,000 calls, {kind}"
        yield rows.value("calls", what, "jaxwrap", [grown], "MB", 2)
    yield rows.curve("calls", "memory of the process", CALLS, lines, "calls", "MB")


def shapes(rounds, seconds):
    """Compilations for 200 batch sizes: one each, and none when they come again."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiled.append(duration) if event == COMPILED else None
    )
    params, call = tree(10)
    layer = jaxwrap.JaxLayer(call, params=params)
    batches = [tensor(np.ones((size, 4), "float32")) for size in range(1, SHAPES + 1)]
    with no_gradients():
        layer.build((None, 4))
        compiled.clear()
        counts, times = [], []
        for batch in batches:
            begin = time.perf_counter()
            ready(layer(batch, training=False))
            times.append(1e3 * (time.perf_counter() - begin))
            counts.append(len(compiled))
        again = len(compiled)
        for batch in batches:
            ready(layer(batch, training=False))
        again = len(compiled) - again
    per_shape = [counts[-1] / SHAPES]
    yield rows.value("shapes", "compilations per new shape", "jaxwrap", per_shape, "", (1, 1))
    what = "compilations when 200 shapes come again"
    yield rows.value("shapes", what, "jaxwrap", [again], "", 0)
    sizes = list(range(1, SHAPES + 1))
    lines = {"compilations": counts}
    yield rows.curve("shapes", "compilations", sizes, lines, "shapes", "compilations")
    yield rows.curve("shapes", "first call", sizes, {"jaxwrap": times}, "shapes", "ms")
