"""The order of the tutorials, and a process for each."""

import joblib
from joblib.parallel import MultiprocessingBackend

# By what a reader starts from. `tests/test_docs.py` checks that no tutorial is missing.
ORDER = (
    "flax_cnn",
    "torch_loop",
    "tensorflow_pipeline",
    "deploy",
    "hugging_face",
    "checkpoints",
    "lora",
    "haiku_gpt",
    "vae",
    "karate_graph",
    "oscillator",
    "pinn",
    "quantiles",
    "muon",
    "sharded",
    "adapter",
    "tracing",
)


def order(name):
    """Return the place of a tutorial, by its file name."""
    return ORDER.index(name.removesuffix(".py"))


class OneProcessEach(MultiprocessingBackend):
    """Run each tutorial in a new process, since Keras chooses its backend once a process."""

    def configure(self, *args, **kwargs):
        return super().configure(*args, maxtasksperchild=1, **kwargs)


# sphinx-gallery asks for "loky", whose processes run several tutorials.
joblib.register_parallel_backend("loky", OneProcessEach)
