"""Imports, and the first train step of the transformer, each in a fresh process."""

import itertools
import tempfile
import time

from benchmarks import process, rows
from benchmarks.timing import orders


def _measure(targets, backend, rounds):
    """What each of the targets yields, by name, in rounds."""
    results = {name: [] for name in targets}
    for order in itertools.islice(orders(targets), rounds):
        for name in order:
            results[name].append(process.call(targets[name], backend)[0])
    return results


def imports(backend, rounds, seconds):
    target = {"jaxwrap": "startup:import_jaxwrap"}
    _measure(target, backend, 1)  # into the page cache
    times = _measure(target, backend, rounds)["jaxwrap"]
    yield rows.value("import", "import, after Keras and JAX", "jaxwrap", times, "s", 0.05)


def import_jaxwrap():
    import jax  # noqa: F401
    import keras  # noqa: F401

    begin = time.perf_counter()
    import jaxwrap  # noqa: F401

    yield time.perf_counter() - begin


def first_step(backend, rounds, seconds):
    rival = "jitted JAX"
    built_in = "keras.layers.FlaxLayer"
    targets = {"jaxwrap": "startup:first_step_of_ours", rival: "startup:first_step_of_jax"}
    if backend != "torch":
        targets[built_in] = "startup:first_step_of_keras"
    times = _measure(targets, backend, min(rounds, 5))  # each takes ten seconds
    whats = {
        "step": ("time to first train step, transformer", 1.3),
        "all": ("the same with making and building the model", None),
    }
    for key, (what, target) in whats.items():
        by_name = {name: [run[key] for run in times[name]] for name in targets}
        theirs = by_name.pop(rival)
        for name, ours in by_name.items():
            limit = target if name == "jaxwrap" else None
            yield rows.ratio("first-step", what, name, rival, ours, theirs, limit)
    yield _second_process(backend, rounds)


def _second_process(backend, rounds):
    """The first train step with what another process compiled, beside that process."""
    what = "time to first train step, transformer, with `cache_compilations`"
    times = {"the second process": [], "the first process": []}
    for _ in range(min(rounds, 3)):  # far from its target, so few will do
        with tempfile.TemporaryDirectory() as directory:
            for name in reversed(times):
                run = process.call("startup:first_step_of_ours", backend, directory=directory)[0]
                times[name].append(run["step"])
    return rows.ratio("first-step", what, *times, *times.values(), 0.5)


def first_step_of_ours(directory=None):
    import jax

    import jaxwrap

    if directory is not None:
        jax.config.update("jax_enable_compilation_cache", True)
        jaxwrap.cache_compilations(directory)
    yield _first_step(jaxwrap.FlaxLayer)


def first_step_of_keras():
    from keras.layers import FlaxLayer

    yield _first_step(FlaxLayer)


def _first_step(make):
    import keras

    from benchmarks.models import MODELS

    model = MODELS["transformer"]
    variables, x, y = model.variables(), model.inputs(), model.targets()
    begin = time.perf_counter()
    inputs = keras.Input(model.shape, dtype=model.dtype)
    layer = make(model.make(), variables=variables)
    made = keras.Model(inputs, layer(inputs))
    made.compile(keras.optimizers.SGD(0.1), "mse")
    built = time.perf_counter()
    made.train_on_batch(x, y)
    return {"all": time.perf_counter() - begin, "step": time.perf_counter() - built}


def first_step_of_jax():
    import jax
    import optax

    from benchmarks import backends  # noqa: F401  (the same libraries are loaded)
    from benchmarks.models import MODELS
    from benchmarks.training import parts, train_step

    model = MODELS["transformer"]
    variables, x, y = model.variables(), model.inputs(), model.targets()
    begin = time.perf_counter()
    params, state = parts(variables)
    optimizer = optax.sgd(0.1)
    moments = optimizer.init(params)
    step = jax.jit(train_step(model.make(), optimizer), donate_argnums=(0, 1, 2))
    built = time.perf_counter()
    *_, loss = step(params, state, moments, x, y)
    float(loss)
    yield {"all": time.perf_counter() - begin, "step": time.perf_counter() - built}
