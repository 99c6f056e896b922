"""How Sphinx builds the documentation."""

import os
import sys
from importlib.metadata import version as installed_version

# autodoc imports jaxwrap, and with it Keras and one backend.
os.environ.setdefault("KERAS_BACKEND", "jax")
sys.path.insert(0, os.path.dirname(__file__))

project = "jaxwrap"
author = "The jaxwrap authors"
copyright = author  # noqa: A001 (the name that Sphinx reads)
version = release = installed_version("jaxwrap")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "_site",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"jaxwrap {version}"
html_favicon = "_static/favicon.svg"

autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Otherwise attributes that are properties too appear twice.
napoleon_use_ivar = True

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3


# The reference: see `_reference.py`.
extensions += [
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "_reference",
]
autosummary_generate = False
# `name` in a docstring is code, as in Markdown, and a link where the reference has the name.
default_role = "name"
# Signatures show the types.
napoleon_attr_annotations = False
autodoc_type_aliases = {
    name: name for name in ("Array", "PyTree", "Tensor")
}
# An argument a line, if they do not fit on one.
python_maximum_signature_line_length = 68

sphinx_gallery_conf = {
    "examples_dirs": "../examples/gallery",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "_gallery.order",
    # As a script does: what is printed is shown, and no value of a last line.
    "capture_repr": (),
    # At most this many at a time, each in a process of its own.
    "parallel": 2,
    "image_srcset": ["2x"],
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "doc_module": ("jaxwrap",),
    # Where `minigallery` keeps what it has found.
    "backreferences_dir": "gallery/backreferences",
}
