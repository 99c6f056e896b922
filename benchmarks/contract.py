"""What `keras.layers.FlaxLayer` / `JaxLayer` and jaxwrap's make of the same models: works, wrong or raises.

    python benchmarks/contract.py            # prints the table, and writes docs/comparison.md
    python benchmarks/contract.py --backend jax   # one backend, as JSON; what the line above runs for each

Each case builds a model with the layers of one library and checks the result against unwrapped JAX. "Raises" is any
exception, "wrong" a result that differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

BACKENDS = ("jax", "tensorflow", "torch", "numpy")
PAGE = Path(__file__).parent.parent / "docs" / "comparison.md"
HEAD = """# Compared with Keras's own layers

`python benchmarks/contract.py` runs the same models in `keras.layers.JaxLayer` and `FlaxLayer`, in the layers of
jaxwrap, and in unwrapped JAX. It compares outputs, state and gradients, and prints this table:

- works: the result is that of JAX.
- wrong: the result is another one.
- raises: an exception, also for an argument or a method that the layer does not have.
- a dash: the case has no meaning there. NumPy does not train.

These are the results with {versions}. Keras's layers exist on JAX and TensorFlow only.

"""


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__" and (BACKEND := parse_args().backend):
    os.environ["KERAS_BACKEND"] = BACKEND
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if BACKEND == "torch":
        import torch  # noqa: F401  (before TensorFlow)

    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import keras
    import numpy as np

    def ones(*shape):
        return np.ones(shape, "float32")

    def host(tensor):
        return np.asarray(keras.ops.convert_to_numpy(tensor))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, inputs, training=False):
            x = nn.relu(nn.Dense(4)(inputs))
            x = nn.BatchNorm(use_running_average=not training)(x)
            return nn.Dense(2)(nn.Dropout(0.5, deterministic=not training)(x))

    class Sampler(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            return inputs + jax.random.normal(self.make_rng("sample"), inputs.shape)

    class Sowing(nn.Module):
        collection: str

        @nn.compact
        def __call__(self, inputs):
            hidden = nn.Dense(2)(inputs)
            self.sow(self.collection, "size", (hidden**2).mean())
            return hidden

    @keras.saving.register_keras_serializable(package="contract")
    class Saved(nn.Module):
        @nn.compact
        def __call__(self, inputs, training=False):
            return nn.Dropout(0.5, deterministic=not training)(nn.Dense(3)(inputs))

        def get_config(self):
            return {}

        @classmethod
        def from_config(cls, config):
            return cls()

    def built(layer, *inputs):
        layer(*inputs)
        return layer

    def fitted(layer, inputs, targets):
        model = keras.Sequential([keras.Input(inputs.shape[1:]), layer])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model.fit(inputs, targets, batch_size=len(inputs), verbose=0).history

    CASES = {}

    def case(title, trains=False):
        def add(fn):
            CASES[title] = (fn, trains)
            return fn

        return add

    # Weights.

    @case("a variable's path is the leaf's path")
    def _(lib):
        layer = built(lib.FlaxLayer(Net(), name="net"), ones(2, 3))
        return "net/params/Dense_0/kernel" in [v.path for v in layer.variables]

    @case("`weight_table()`")
    def _(lib):
        return len(built(lib.FlaxLayer(Net()), ones(2, 3)).weight_table()) == 8

    @case("rules for leaves: trainable, regularizer, constraint, dtype")
    def _(lib):
        import jaxwrap

        rules = {
            ".*/kernel": jaxwrap.Rule(regularizer="l2"),
            ".*/bias": jaxwrap.Rule(trainable=False),
        }
        layer = built(lib.FlaxLayer(Net(), rules=rules), ones(2, 3))
        return len(layer.losses) == 2 and len(layer.trainable_variables) == 3

    @case("`freeze` and `unfreeze` by pattern")
    def _(lib):
        layer = built(lib.FlaxLayer(Net()), ones(2, 3))
        layer.freeze("params/Dense_0/.*")
        return len(layer.trainable_variables) == 4

    @case("`get_variables` and `set_variables` in the user's own structure")
    def _(lib):
        layer = built(lib.FlaxLayer(Net()), ones(2, 3))
        variables = layer.get_variables()
        layer.set_variables(variables)
        return np.allclose(Net().apply(variables, ones(2, 3)), host(layer(ones(2, 3))), atol=1e-5)

    # dtypes.

    @case("a bfloat16 leaf stays bfloat16")
    def _(lib):
        layer = lib.JaxLayer(lambda params, inputs: inputs, params=jnp.ones(2, jnp.bfloat16))
        return layer.variables[0].dtype == "bfloat16"

    @case("an int32 leaf of the state stays an int32")
    def _(lib):
        layer = lib.JaxLayer(lambda state, inputs: (inputs, state + 1), state=jnp.int32(3))
        layer(ones(2))
        return layer.variables[0].dtype == "int32" and int(layer.variables[0]) == 4

    @case("state is not cast under mixed precision")
    def _(lib):
        seen = []

        def call(state, inputs):
            seen.append(str(state.dtype))
            return inputs, state

        layer = lib.JaxLayer(call, state=np.float32(1), dtype="mixed_bfloat16")
        layer(ones(2))
        return set(seen) == {"float32"}

    @case("a typed PRNG key as a leaf of the state")
    def _(lib):
        def call(state, inputs):
            new, sub = jax.random.split(state)
            return inputs + jax.random.normal(sub, inputs.shape), new

        layer = lib.JaxLayer(call, state=jax.random.key(0))
        expected, _ = call(jax.random.key(0), jnp.ones(3))
        return np.allclose(host(layer(ones(3))), expected, atol=1e-5)

    @case("None, strings and callables as leaves reach the function as they are")
    def _(lib):
        params = {"w": 2.0, "none": None, "name": "n", "fn": jnp.tanh}
        layer = lib.JaxLayer(
            lambda params, inputs: params["fn"](inputs * params["w"]), params=params
        )
        return np.allclose(host(layer(ones(3))), np.tanh(2 * ones(3)), atol=1e-5)

    # Inputs.

    @case("`nn.Embed` on int tokens")
    def _(lib):
        inputs = keras.Input((5,), dtype="int32")
        model = keras.Model(inputs, lib.FlaxLayer(nn.Embed(7, 4))(inputs))
        return model(np.zeros((2, 5), "int32")).shape == (2, 5, 4)

    @case("several tensor arguments, and static keywords")
    def _(lib):
        module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4)
        layer = lib.FlaxLayer(module)
        mask = np.ones((2, 1, 3, 3), bool)
        return layer(ones(2, 3, 4), ones(2, 3, 4), mask=mask).shape == (2, 3, 4)

    @case("a `mask` argument receives the mask of the inputs")
    def _(lib):
        def call(inputs, mask):
            return jnp.where(mask[..., None], inputs, 0).sum(1)

        inputs = keras.Input((3,), dtype="int32")
        embedding = keras.layers.Embedding(5, 2, embeddings_initializer="ones", mask_zero=True)
        model = keras.Model(inputs, lib.JaxLayer(call)(embedding(inputs)))
        return np.allclose(host(model(np.array([[1, 0, 0]]))), ones(1, 2))

    @case("masks pass through a layer that keeps the time axis")
    def _(lib):
        inputs = keras.Input((3,), dtype="int32")
        embedded = keras.layers.Embedding(5, 2, mask_zero=True)(inputs)
        layer = lib.JaxLayer(lambda inputs: inputs * 2, supports_masking=True)
        return getattr(layer(embedded), "_keras_mask", None) is not None

    @case("Dropout and BatchNorm as they are, by `deterministic` and `use_running_average`")
    def _(lib):
        dropout, norm = lib.FlaxLayer(nn.Dropout(0.5)), lib.FlaxLayer(nn.BatchNorm())
        dropped = host(dropout(ones(99), training=True))
        norm(ones(4, 2), training=True)
        mean = next(v for v in norm.non_trainable_variables if tuple(v.shape) == (2,))
        return (dropped == 0).any() and host(mean.value).max() > 0

    # State.

    @case("a module that sows intermediates")
    def _(lib):
        layer = lib.FlaxLayer(Sowing("intermediates"))
        return layer(ones(2, 3)).shape == (2, 2) and layer(ones(2, 3)).shape == (2, 2)

    @case("sown losses change the gradients in `fit`", trains=True)
    def _(lib):
        module = Sowing("losses")
        params = module.init(jax.random.key(0), ones(4, 3))["params"]
        layer = lib.FlaxLayer(module, variables={"params": params})

        def loss(params):
            outputs, sown = module.apply({"params": params}, ones(4, 3), mutable="losses")
            return (outputs**2).mean() + sown["losses"]["size"][0]

        value = float(loss(params))
        return np.allclose(fitted(layer, ones(4, 3), 0 * ones(4, 2))["loss"], value, atol=1e-5)

    @case("sown metrics are shown by `fit`", trains=True)
    def _(lib):
        layer = lib.FlaxLayer(Sowing("metrics"), name="net")
        return "net/size" in fitted(layer, ones(4, 3), ones(4, 2))

    @case("intermediates as outputs")
    def _(lib):
        layer = lib.FlaxLayer(Sowing("intermediates"), collections={"intermediates": "output"})
        _, extra = layer(ones(2, 3))
        return "size" in extra["intermediates"]

    @case("`update_state_in_inference=False` keeps state as it is")
    def _(lib):
        def call(state, inputs):
            return inputs, state + 1

        layer = lib.JaxLayer(call, state=0.0, update_state_in_inference=False)
        layer(ones(1))
        return float(layer.variables[0]) == 0

    @case("a layer used twice threads its state in order")
    def _(lib):
        layer = lib.JaxLayer(lambda state, inputs: (inputs + state, 2 * state + 1), state=1.0)
        inputs = keras.Input((2,))
        model = keras.Model(inputs, layer(layer(inputs)))
        return np.allclose(model.predict(0 * ones(1, 2), verbose=0), 4)

    @case("a decode cache, step by step")
    def _(lib):
        module = nn.MultiHeadDotProductAttention(num_heads=1, qkv_features=4, decode=True)
        variables = module.init(jax.random.key(0), ones(2, 5, 4))
        layer = lib.FlaxLayer(module, variables=variables)
        for _ in range(3):
            outputs = layer(ones(2, 1, 4))
            expected, changed = module.apply(variables, ones(2, 1, 4), mutable="cache")
            variables = {**variables, **changed}
        return np.allclose(host(outputs), expected, atol=1e-4)

    # RNG.

    @case("two calls in training draw different numbers, in a graph too", trains=True)
    def _(lib):
        layer = lib.JaxLayer(
            lambda inputs, rng, training: (
                jax.random.normal(rng, inputs.shape) if training else inputs
            )
        )
        call = lambda x: layer(x, training=True)  # noqa: E731
        if BACKEND == "tensorflow":
            import tensorflow as tf

            call = tf.function(call)
        inputs = keras.ops.convert_to_tensor(ones(9))
        layer(inputs)
        return (host(call(inputs)) != host(call(inputs))).any()

    @case("a stream of its own name, in training")
    def _(lib):
        layer = lib.FlaxLayer(
            Sampler(), method=lambda m, inputs, training: m(inputs) if training else inputs
        )
        return (host(layer(ones(9), training=True)) != host(layer(ones(9), training=True))).any()

    @case("a stream in inference, for a variational autoencoder")
    def _(lib):
        layer = lib.FlaxLayer(Sampler())
        return (host(layer(ones(9))) != host(layer(ones(9)))).any()

    @case("the implementation of keys can be chosen")
    def _(lib):
        layer = lib.FlaxLayer(nn.Dropout(0.5), key_impl="rbg")
        return (host(layer(ones(99), training=True)) == 0).any()

    @case("training resumed from a file draws what an uninterrupted run draws", trains=True)
    def _(lib):
        def make():
            keras.utils.set_random_seed(3)
            model = keras.Sequential([keras.Input((5,)), lib.FlaxLayer(Saved())])
            model.compile(keras.optimizers.SGD(0.1), "mse")
            return model

        def train(model):
            model.fit(ones(8, 5), ones(8, 3), batch_size=4, shuffle=False, verbose=0)
            return model

        straight = train(train(make()))
        with tempfile.TemporaryDirectory() as folder:
            train(make()).save(f"{folder}/m.keras")
            resumed = train(keras.models.load_model(f"{folder}/m.keras"))
        pairs = zip(straight.trainable_variables, resumed.trainable_variables, strict=True)
        return all((host(one.value) == host(two.value)).all() for one, two in pairs)

    @case("the user's arrays survive `fit`", trains=True)
    def _(lib):
        params = {"w": jnp.ones((3, 2))}
        fitted(
            lib.JaxLayer(lambda params, inputs: inputs @ params["w"], params=params),
            ones(4, 3),
            ones(4, 2),
        )
        return bool((params["w"] == 1).all())


def verdict(fn, trains, lib, backend):
    if trains and backend == "numpy":
        return "-"
    try:
        return "works" if fn(lib) else "wrong"
    except Exception:
        return "raises"


def run_backend(backend):
    import jaxwrap

    libraries = {"jaxwrap": jaxwrap}
    if backend in ("jax", "tensorflow"):
        libraries["keras"] = keras.layers
    rows = {
        title: {name: verdict(fn, trains, lib, backend) for name, lib in libraries.items()}
        for title, (fn, trains) in CASES.items()
    }
    versions = f"Keras {keras.__version__} and JAX {jax.__version__}"
    print(json.dumps({"rows": rows, "versions": versions}))


def run_all():
    results = {}
    for backend in BACKENDS:
        command = [sys.executable, __file__, "--backend", backend]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results[backend] = json.loads(done.stdout.splitlines()[-1])
    columns = [("keras", b) for b in ("jax", "tensorflow")] + [("jaxwrap", b) for b in BACKENDS]
    names = {"keras": "`keras.layers`"}
    header = ["", *(f"{names.get(lib, lib)}, {backend}" for lib, backend in columns)]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for title in results["jax"]["rows"]:
        cells = [results[backend]["rows"][title][lib] for lib, backend in columns]
        lines.append(f"| {' | '.join([title, *cells])} |")
    table = "\n".join(lines)
    print(table)
    PAGE.write_text(HEAD.format(versions=results["jax"]["versions"]) + table + "\n")


if __name__ == "__main__":
    run_backend(BACKEND) if BACKEND else run_all()
