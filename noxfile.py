"""The project's tasks: `nox -l` lists them, `nox -s NAME` runs one."""

import os
import pathlib
import shutil
import sys
from typing import NamedTuple

import nox

nox.needs_version = ">=2025.2.9"
# uv, where it is, takes an eighth of pip's time.
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "tests", "docs"]
# A missing Python is skipped by name; but not in CI, where nobody would notice.
nox.options.error_on_missing_interpreters = bool(os.environ.get("CI"))

PYPROJECT = nox.project.load_toml("pyproject.toml")
BACKENDS = ("jax", "tensorflow", "torch", "numpy")
GALLERY = pathlib.Path("examples", "gallery")
# What the benchmarks compare on PyTorch.
RIVALS = ("torchax", "jax2torch", "torch-jax-interop")
# What a backend needs besides JAX.
FRAMEWORKS = {"tensorflow": "tensorflow==2.21.*", "torch": "torch==2.13.0"}
# GPUs round differently: on them, backends agree to 1e-5 only with settings of their own.
ON_CPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}


class Python(NamedTuple):
    """What a version of Python is tested with: its JAX, and for each backend the marker of the tests, "" for all."""

    jax: str
    backends: dict[str, str]


PYTHONS = {
    "3.11": Python("0.10.*", dict.fromkeys(BACKENDS, "")),
    "3.12": Python(
        "0.12.*", {"jax": "each_jax and not once", "tensorflow": "lowered and not once"}
    ),
    "3.13": Python("0.12.*", {"jax": "quick"}),
}

# Python: the folder with the programs of its environment, which its sessions share.
programs = {}


def requirements_of(*groups):
    return nox.project.dependency_groups(PYPROJECT, *groups)


def install(session, python, backends):
    """Installs jaxwrap, the libraries of these backends, and what the tests need."""
    frameworks = [FRAMEWORKS[backend] for backend in backends if backend in FRAMEWORKS]
    if "torch" in backends:
        # By the pip that installed nox, even where uv does the rest: pip's configuration says where PyTorch comes
        # from, and uv would load gigabytes for GPUs.
        here = str(pathlib.Path(session.bin, "python"))
        pip = (sys.executable, "-m", "pip", "--quiet", "--python", here)
        session.run(*pip, "install", FRAMEWORKS["torch"], external=True)
    jax = f"jax=={PYTHONS[python].jax}"
    libraries = [jax, "flax==0.12.*", *frameworks, *requirements_of("test")]
    session.install("--quiet", "--editable", ".", *libraries)


def compiled_once(session):
    """What makes JAX keep what it compiles, which takes longest and is much the same on every backend."""
    # Absolute, since tests change the working directory.
    cache = str((session.cache_dir / "jax").absolute())
    return {
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def run_pytest(session, folder, backend, backends, *arguments):
    env = {
        **ON_CPU,
        **compiled_once(session),
        "KERAS_BACKEND": backend,
        # What one backend has written, the others read.
        "JAXWRAP_BACKENDS": ",".join(backends),
    }
    python = str(pathlib.Path(folder, "python"))
    # By stealing, since some tests take a hundred times as long as others.
    parallel = ("-n", "auto", "--dist", "worksteal")
    session.run(python, "-m", "pytest", *parallel, *arguments, env=env, external=True)


@nox.session(python=list(PYTHONS), default=False)
def env(session):
    """Make the environment that the tests on one Python share."""
    install(session, session.python, PYTHONS[session.python].backends)
    programs[session.python] = session.bin


def add_tests(python):
    """Adds the session `tests-3.11(torch)` and its like; returns their names."""
    backends = PYTHONS[python].backends
    name = f"tests-{python}"

    @nox.session(name=name, venv_backend="none", requires=[f"env-{python}"], default=False)
    @nox.parametrize("backend", [*backends], ids=[*backends])
    def tests_on(session, backend):
        """Run the tests on one backend; arguments after `--` go to pytest."""
        if python not in programs:
            session.skip(f"there is no Python {python}")
        marker = ["-m", backends[backend]] if backends[backend] else []
        run_pytest(session, programs[python], backend, backends, *marker, *session.posargs)

    return [f"{name}({backend})" for backend in backends]


@nox.session(python=False, requires=[name for python in PYTHONS for name in add_tests(python)])
def tests(session):
    """Run the tests on every Python and backend."""


def install_here(session, backends):
    """Installs what the tests need on the Python that runs nox."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if python not in PYTHONS:
        session.error(f"run nox with Python {', '.join(PYTHONS)}, not {python}")
    install(session, python, backends)


def run_quick(session, *changes):
    """Runs the quick tests in an environment with one backend."""
    backend, *arguments = session.posargs or ["jax"]
    if backend not in BACKENDS:
        session.error(f"expected one of {', '.join(BACKENDS)} after `--`, not {backend!r}")
    install_here(session, [backend])
    for command in changes:
        session.run(*command)
    run_pytest(session, session.bin, backend, [backend], "-m", "quick", *arguments)


@nox.session(default=False)
def quick(session):
    """Run the quick tests on JAX; `-- torch` for another backend, then pytest's arguments."""
    run_quick(session)


@nox.session(venv_backend="virtualenv", default=False)
def canary(session):
    """Run the quick tests with the nightly build of Keras."""
    pip = ("python", "-m", "pip", "--quiet")
    # Both own the folder `keras`.
    remove = (*pip, "uninstall", "--yes", "keras", "keras-nightly")
    run_quick(session, remove, (*pip, "install", "--pre", "keras-nightly"))


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


def install_gallery(session):
    """Installs what the tutorials need. They take what one backend has saved to the others."""
    install_here(session, BACKENDS)
    session.install("--quiet", *requirements_of("gallery"))


@nox.session
def docs(session):
    """Build the documentation, which runs the gallery; a warning is an error."""
    install_gallery(session)
    session.install("--quiet", *requirements_of("docs"))
    env = {**ON_CPU, **compiled_once(session), "KERAS_BACKEND": "jax"}
    session.run("sphinx-build", "-W", "--keep-going", "docs", "docs/_build/html", env=env)
    if chromium := shutil.which("chromium") or shutil.which("chromium-browser"):
        session.run("python", "docs/_check_pages.py", "docs/_build/html", chromium)
    else:
        session.warn("SKIPPED: the check of the pages in Chromium, which is not installed")


@nox.session(default=False)
def gallery(session):
    """Run the tutorials as scripts; `-- flax_cnn` for one. `KERAS_BACKEND` chooses the backend."""
    tutorials = sorted(path.stem for path in GALLERY.glob("*.py"))
    names = session.posargs or tutorials
    if unknown := set(names).difference(tutorials):
        session.error(f"there is no tutorial {unknown}; expected some of {', '.join(tutorials)}")
    install_gallery(session)
    # Some tutorials choose a backend of their own.
    backend = os.environ.get("KERAS_BACKEND", "jax")
    env = {**ON_CPU, **compiled_once(session), "KERAS_BACKEND": backend, "MPLBACKEND": "Agg"}
    for name in names:
        session.run("python", str(GALLERY / f"{name}.py"), env=env)


@nox.session(python="3.11", default=False)
def quickstart(session):
    """Run the main job; `-- --backend torch` to train on PyTorch, `-- --library nnx` for an NNX model."""
    install(session, session.python, BACKENDS)
    session.install("--quiet", *requirements_of("quickstart"))
    session.run("python", "examples/quickstart.py", *session.posargs, env=ON_CPU)


@nox.session(python="3.11", default=False)
def scale(session):
    """Train a Flax transformer on two processes with four virtual devices each, and resume on one."""
    install(session, session.python, ["jax"])
    session.run("python", "examples/scale.py", env=ON_CPU)


@nox.session(python="3.11", default=False)
def benchmarks(session):
    """Compare jaxwrap with its rivals; `-- --only eager` for some of it, `-- --device gpu` for PyTorch on a GPU."""
    install(session, session.python, BACKENDS)
    on_gpu = "gpu" in session.posargs
    if on_gpu:
        session.install("--quiet", f"jax[cuda12]=={PYTHONS[session.python].jax}")
    session.install("--quiet", *requirements_of("benchmark"))
    # Without their dependencies, which would change the torch and the JAX that all are measured with.
    session.install("--quiet", "--no-deps", *RIVALS)
    env = {} if on_gpu else ON_CPU
    session.run("python", "-m", "benchmarks", *session.posargs, env=env)
