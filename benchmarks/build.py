"""Building a layer of 2,000 leaves from given params."""

import jax
import keras

import jaxwrap
from benchmarks import rows
from benchmarks.backends import BACKEND
from benchmarks.models import tree
from benchmarks.timing import race

BUILT_IN = "keras.layers.JaxLayer"
BARE = "2,000 keras.Variable"


def build(rounds, seconds):
    params, call = tree(2000)
    leaves = jax.tree_util.tree_leaves(params)

    def make(layer):
        made = layer(call, params=params)
        made.build((None, 4))

    makers = {
        BUILT_IN: lambda: lambda: make(keras.layers.JaxLayer),
        "jaxwrap": lambda: lambda: make(jaxwrap.JaxLayer),
        # What any layer has to do on this backend.
        BARE: lambda: lambda: [keras.Variable(leaf) for leaf in leaves],
    }
    done = race(makers, rounds, seconds)
    target = 1.0 if BACKEND in ("jax", "tensorflow") else None
    targets = {("jaxwrap", BUILT_IN): target}
    # Where Keras has no such layer, there is still what the variables alone take.
    against = [BUILT_IN] if target else [BARE]
    yield from rows.compare("build", "build of 2,000 leaves", done, against, targets)
