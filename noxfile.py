"""The project's tasks: `nox -l` lists them, `nox -s NAME` runs one in an environment of its own."""

import os

import nox

nox.needs_version = ">=2025.2.9"
# pip, never uv: PyTorch is to come from wherever pip is told to look.
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests", "lint", "types", "docs"]
# A Python that is not there is named and skipped; but not in CI, where nobody would notice.
nox.options.error_on_missing_interpreters = bool(os.environ.get("CI"))

PYPROJECT = nox.project.load_toml("pyproject.toml")
TORCH = "torch==2.13.0"

# Python: (what is installed beside the package, the backends that the tests run on)
TESTED = {
    "3.11": (
        ("jax==0.10.*", "flax==0.12.*", "tensorflow==2.21.*", TORCH),
        ("jax", "tensorflow", "torch", "numpy"),
    ),
    "3.12": (
        ("jax==0.12.*", "flax==0.12.*", "tensorflow==2.21.*"),
        ("jax", "tensorflow"),
    ),
}

# GPUs round differently: on them, backends agree to 1e-5 only with settings of their own.
ON_CPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}


def requirements_of(*groups):
    return nox.project.dependency_groups(PYPROJECT, *groups)


@nox.session(python=list(TESTED))
def tests(session):
    """Run the tests, once on each backend; arguments after `--` go to pytest."""
    requirements, backends = TESTED[session.python]
    session.install("--quiet", "--editable", ".", *requirements, *requirements_of("test"))
    passed = {backend: pytest_passes(session, backend, backends) for backend in backends}
    summary = "\n".join(
        f"  {name:<12}{'passed' if ok else 'FAILED'}" for name, ok in passed.items()
    )
    session.log(f"tests on Python {session.python}:\n{summary}")
    if not all(passed.values()):
        failed = ", ".join(name for name, ok in passed.items() if not ok)
        session.error(f"the tests failed on: {failed}")


def pytest_passes(session, backend, backends):
    """Runs the tests on one backend; a failure does not end the session, so that the others run too."""
    env = {
        **ON_CPU,
        "KERAS_BACKEND": backend,
        # What one backend has written, the others read.
        "JAXWRAP_BACKENDS": ",".join(backends),
        # The functions of the oracle are the same on every backend, and to compile them takes longest.
        "JAX_COMPILATION_CACHE_DIR": os.path.join(session.virtualenv.location, "jax-cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    try:
        session.run("pytest", "-n", "auto", "--dist", "loadgroup", *session.posargs, env=env)
    except nox.command.CommandFailed:
        return False
    return True


@nox.session
def lint(session):
    """Check the code's style and formatting with ruff."""
    session.install("--quiet", *requirements_of("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session):
    """Check the types with pyright."""
    # Without TensorFlow and PyTorch, whose tensors are `Any` to jaxwrap.
    session.install("--quiet", "--editable", ".[flax]", *requirements_of("types"))
    session.run("pyright", *session.posargs)


@nox.session
def docs(session):
    """Build the documentation; a warning is an error."""
    session.install("--quiet", "--editable", ".[flax]", *requirements_of("docs"))
    env = {**ON_CPU, "KERAS_BACKEND": "jax"}
    session.run("sphinx-build", "-W", "--keep-going", "docs", "docs/_build/html", env=env)


@nox.session(python="3.11")
def quickstart(session):
    """Run the main job; `-- --backend torch` to train on PyTorch, `-- --library nnx` for an NNX model."""
    requirements, _ = TESTED[session.python]
    session.install("--quiet", "--editable", ".", *requirements, *requirements_of("quickstart"))
    session.run("python", "examples/quickstart.py", *session.posargs, env=ON_CPU)


@nox.session(python="3.11", default=False)
def benchmarks(session):
    """Measure jaxwrap beside its rivals; `-- --backends jax --only eager` for some of it."""
    requirements, _ = TESTED[session.python]
    session.install("--quiet", "--editable", ".", *requirements, *requirements_of("benchmark"))
    # Without what they ask for: it must not change the torch and the JAX that all are measured with.
    session.install("--quiet", "--no-deps", "torchax", "jax2torch")
    session.run("python", "-m", "benchmarks", *session.posargs, env=ON_CPU)
