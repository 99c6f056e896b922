"""What the pages of the reference need of Sphinx: short types that link, and links to other libraries.

Keras is imported late: a tutorial, which runs in a fork of this process, chooses its own backend.
"""

import importlib
import inspect
import operator
import pathlib
import re
import textwrap
import tomllib
import types
import zlib

from docutils import nodes
from docutils.utils import unescape
from sphinx.domains.python import PyObject
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import stringify_signature
from sphinx.util.typing import stringify_annotation

INVENTORIES = pathlib.Path(__file__).parent / "inventories.toml"
NAME = re.compile(r"([A-Za-z]\w*(?:\.\w+)*)(?:\(\))?")
BASES = (
    "keras.Layer",
    "keras.callbacks.Callback",
    "keras.losses.Loss",
    "keras.metrics.Metric",
    "keras.optimizers.Optimizer",
    "keras.utils.PyDataset",
)
WORD = re.compile(r"\b[A-Za-z_]\w*\b")


def add_inventories(app, config):
    """Make the inventories of other libraries, in the format that intersphinx reads."""
    folder = pathlib.Path(app.doctreedir)
    folder.mkdir(parents=True, exist_ok=True)
    for library, entry in tomllib.loads(
        INVENTORIES.read_text()
    ).items():
        lines = []
        for name, page in entry["names"].items():
            # One role for all: annotations look for classes, text for anything.
            lines.append(
                f"{name} py:class 1 {page + name if page.endswith('#') else page} -\n"
            )
        path = folder / f"{library.replace(' ', '-')}.inv"
        head = f"# Sphinx inventory version 2\n# Project: {library}\n# Version: \n# zlib\n"
        path.write_bytes(
            head.encode() + zlib.compress("".join(lines).encode())
        )
        config.intersphinx_mapping[path.stem] = (
            entry["url"],
            str(path),
        )


def name_role(
    role, rawtext, text, lineno, inliner, options=None, content=()
):
    """Show `text` as code, and link it if it is a name that the reference has."""
    if match := NAME.fullmatch(text):
        reference = inliner.document.settings.env.domains["py"].role(
            "obj"
        )
        return reference(
            "py:obj", rawtext, f"{text} <{match[1]}>", lineno, inliner
        )
    # Backslashes are part of the code.
    return [nodes.literal(rawtext, unescape(text, True))], []


def show_signature(
    app, what, name, obj, options, signature, return_annotation
):
    """Show arguments with the types that the source has: short names, where autodoc shows private paths.

    For a class these are the arguments of `__init__`. Autodoc shows those of Keras's `Layer.__new__`.
    """
    if what not in ("class", "function", "method"):
        return None
    if what == "class" and obj.__init__ is object.__init__:
        return None
    function = obj.__init__ if what == "class" else obj
    shown = inspect.signature(function)
    parameters = list(shown.parameters.values())
    if what != "function" and not inspect.ismethod(function):
        parameters = parameters[1:]
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    parameters = [
        parameter.replace(
            annotation=short(parameter.annotation, scope),
            default=plain(parameter.default),
        )
        for parameter in parameters
    ]
    returned = (
        None
        if what == "class"
        else short(shown.return_annotation, scope)
    )
    shown = shown.replace(
        parameters=parameters, return_annotation=inspect.Signature.empty
    )
    return stringify_signature(
        shown
    ), None if returned is inspect.Signature.empty else returned


def short(annotation, scope):
    """Return the text of an annotation, in which types that have names in their modules alone are spelled out."""

    def spelled(word):
        value = scope.get(word[0])
        if not isinstance(value, types.UnionType | types.GenericAlias):
            return word[0]
        text = stringify_annotation(value, "smart")
        return text.replace("~collections.abc.", "").replace(
            "[[...], ", "[..., "
        )

    if not isinstance(annotation, str):
        return annotation
    return WORD.sub(spelled, re.sub(r"\b_[a-z_]+\.", "", annotation))


class _Empty:
    def __repr__(self):
        return "{}"


def plain(default):
    """Return a default that prints as Python: dataclasses mark those that a function makes."""
    return _Empty() if repr(default) == "<factory>" else default


def show_bases(app, name, obj, options, bases):
    """Show the nearest public class alone."""
    import keras

    import jaxwrap

    public = {
        getattr(jaxwrap, name): f"jaxwrap.{name}"
        for name in jaxwrap.__all__
    }
    public |= {
        operator.attrgetter(name.removeprefix("keras."))(keras): name
        for name in BASES
    }
    bases[:] = [
        f":py:class:`{public[cls]}`"
        for cls in obj.__mro__[1:]
        if cls in public
    ][:1]


def source_of_methods(app, module):
    """Let viewcode find the methods that `JaxLayer` has of a class in another file."""
    from jaxwrap._layer._weighted import Weighted

    if module != Weighted.__module__:
        return None
    analyzer = ModuleAnalyzer.for_module(module)
    analyzer.find_tags()
    moved = {
        name.replace(Weighted.__name__, "JaxLayer", 1): tag
        for name, tag in analyzer.tags.items()
    }
    return analyzer.code, analyzer.tags | moved


def resolve_own(app, env, node, contnode):
    """Find `Adapter` in a signature of `jaxwrap.testing`, as Python does, by its import."""
    if node.get("refdomain") != "py":
        return None
    python = env.domains["py"]
    name = f"jaxwrap.{node['reftarget']}"
    if name in python.objects:
        return python.resolve_xref(
            env,
            node["refdoc"],
            app.builder,
            "obj",
            name,
            node,
            contnode,
        )
    return None


def leave_as_code(app, env, node, contnode):
    """Leave what is no name of the reference as it is."""
    return contnode if node["reftype"] == "obj" else None


class Results(SphinxDirective):
    """Document classes that users get, but never import, by their docstrings."""

    has_content = True

    def run(self):
        lines = []
        for path in self.content:
            module, _, name = path.rpartition(".")
            scope = vars(importlib.import_module(module))
            cls = scope[name]
            text = str(
                GoogleDocstring(
                    inspect.getdoc(cls), self.config, what="class"
                )
            )
            fields = ", ".join(
                f"{field}: {short(cls.__annotations__[field].__forward_arg__, scope)}"
                for field in getattr(cls, "_fields", ())
            )
            head = (
                f".. py:class:: {name}({fields})"
                if fields
                else f".. py:class:: {name}"
            )
            lines += [
                head,
                "",
                *textwrap.indent(text, "   ").splitlines(),
                "",
            ]
            for part, value in vars(cls).items():
                if isinstance(value, property) and not part.startswith(
                    "_"
                ):
                    lines += [
                        f"   .. py:property:: {part}",
                        "",
                        f"      {value.__doc__}",
                        "",
                    ]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app):
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.add_role("name", name_role)
    app.add_directive("results", Results)
    app.connect("config-inited", add_inventories)
    app.connect("autodoc-process-signature", show_signature)
    app.connect("autodoc-process-bases", show_bases)
    app.connect("viewcode-find-source", source_of_methods)
    app.connect("missing-reference", resolve_own)
    app.connect("missing-reference", leave_as_code, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
