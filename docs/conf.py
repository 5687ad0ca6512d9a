"""How Sphinx makes the documentation: `make docs` runs it on the repository, into build/docs.

The source folder is the repository's root, so a link between README.md, docs/ and the other books
is the same relative path on a page, in an editor and on a code host.
"""

import inspect
import sys
from pydoc import locate

from docutils import nodes
from sphinx.addnodes import desc, desc_signature, pending_xref

from skiparse._version import __version__

project = "skiparse"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "bench/NOTES.md",
    "csrc/README.md",
    "tests/data/README.md",
    "tests/ptx/README.md",
]
exclude_patterns = [".*", "build", "dist", "demo_out", "gpu_out", "**/__pycache__"]

html_theme = "furo"
html_title = f"skiparse {__version__}"
html_copy_source = False

myst_heading_anchors = 3  # `#add-a-model`, as code hosts name it

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
autodoc_use_type_comments = False
napoleon_use_ivar = True

nitpicky = True  # a reference that leads nowhere is a warning, and `make docs` fails at warnings


def scopes(node):
    """Where a name may be from: the class it stands in, its module, and the file of what it is of.

    `skiparse.attention` is on the page of `skiparse`, and was written in `skiparse.functional`.
    """
    module = node.get("py:module")
    yield from (f"{module}.{node.get('py:class')}", module)
    while node := node.parent:
        if isinstance(node, desc):
            (signature, *_) = node.findall(desc_signature)
            of = locate(f"{signature.get('module')}.{signature.get('fullname')}")
            yield getattr(of, "__module__", None)


def meant(node):
    """What a reference says: a name in one of its scopes, or else a full path."""
    paths = [*(f"{scope}.{node['reftarget']}" for scope in scopes(node)), node["reftarget"]]
    return next((found for path in paths if (found := locate(path)) is not None), None)


def with_full_names(app, doctree):
    """Names get their modules: `Clip` is one thing in `train.config`, another in `data.dataset`."""
    for node in doctree.findall(pending_xref):
        if node.get("refdomain") != "py":
            continue
        node.attributes.pop("refspecific", None)  # no guess by the last part of a name
        found = meant(node)
        node["exists"] = found is not None
        if inspect.ismodule(found):
            node["reftarget"] = found.__name__
        elif hasattr(found, "__qualname__") and found.__module__ in sys.modules:
            node["reftarget"] = f"{found.__module__}.{found.__qualname__}"


def not_on_a_page(app, env, node, text):
    """Plain text for what is on no page but in Python, and for types, which mypy has checked.

    A role that somebody wrote (a literal) and that means nothing stays missing: a warning.
    """
    if node.get("refdomain") == "py" and (node["exists"] or not isinstance(text, nodes.literal)):
        return text
    return None


def setup(app):
    """Called by Sphinx."""
    app.connect("doctree-read", with_full_names)
    app.connect("missing-reference", not_on_a_page)
