"""Every example in the README and the docs runs, and every example in a docstring."""

import ast
import doctest
import operator
import os
import pathlib
import re
import sys
import types

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from models import once_except

import jaxwrap
import jaxwrap.testing

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?P<trains><!-- trains -->\n+)?```python\n(?P<code>.*?)```", re.DOTALL)


@pytest.fixture(autouse=True)
def _compilation_cache(monkeypatch, tmp_path):
    """Undo what examples say of the cache, for the tests that come after them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TF_XLA_FLAGS", os.environ.get("TF_XLA_FLAGS", ""))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    if before != {name: getattr(jax.config, name) for name in names}:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_there_are_examples():
    assert sum(len(BLOCK.findall((ROOT / page).read_text())) for page in PAGES) >= 6


def pages_with_code():
    """Pages on what differs between backends run on each, the others on the first."""
    pages = [page for page in PAGES if BLOCK.search((ROOT / page).read_text())]
    everywhere = ["README.md", "docs/index.md", "docs/guide.md", "docs/backends.md"]
    return once_except(pages, [*everywhere, "docs/libraries.md", "docs/devices.md"])


@pytest.mark.parametrize("page", pages_with_code())
def test_page(page, backend, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A page may write modules, and import them, as a script does from its folder.
    monkeypatch.syspath_prepend(tmp_path)
    # Linen looks its classes up in their module.
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for block in BLOCK.finditer((ROOT / page).read_text()):
        if block["trains"] and not backend.trains:
            continue
        exec(compile(block["code"], page, "exec"), vars(module))


@pytest.mark.once
@pytest.mark.parametrize("page", PAGES)
def test_code_fits_a_phone(page):
    blocks = BLOCK.finditer((ROOT / page).read_text())
    assert [line for block in blocks for line in block["code"].split("\n") if len(line) > 72] == []


@pytest.mark.once
def test_the_gallery_has_an_order():
    """The docs build runs the tutorials, and needs a place for each."""
    order = re.search(r"ORDER = (\(.*?\))", (ROOT / "docs/_gallery.py").read_text(), re.DOTALL)[1]
    tutorials = [path.stem for path in (ROOT / "examples/gallery").glob("*.py")]
    assert sorted(ast.literal_eval(order)) == sorted(tutorials)


NAMES = [
    *jaxwrap.__all__,
    *(f"reparametrizations.{name}" for name in jaxwrap.reparametrizations.__all__),
    "checkpoints.save",
    "checkpoints.load",
    "checkpoints.save_model",
    "testing.check_adapter",
]


@pytest.mark.once
@pytest.mark.quick
def test_the_reference_has_every_name():
    """Each is in the table of the index, and on the page of its topic."""
    index, *pages = [
        page.read_text()
        for page in sorted(
            (ROOT / "docs/reference").glob("*.md"), key=lambda page: page.stem != "index"
        )
    ]
    listed = re.findall(r"^   ~?(\w+(?:\.\w+)?)$", index, re.MULTILINE)
    libraries = ["Linen", "NNX", "Haiku", "Equinox", "Transformers"]
    assert sorted(listed) == sorted([*NAMES, *(f"adapters.{name}" for name in libraries)])
    documented = re.findall(
        r"^\.\. auto(?:class|function):: jaxwrap\.(\S+)$", "\n".join(pages), re.MULTILINE
    )
    assert sorted(documented) == sorted(listed)


@pytest.mark.parametrize("name", NAMES)
def test_docstring(name):
    obj = operator.attrgetter(name)(jaxwrap)
    test = doctest.DocTestFinder().find(obj, name, globs={})[0]
    assert test.examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test).failed == 0
