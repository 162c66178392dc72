"""How Sphinx builds these pages: ``make docs``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.autodoc.mock import mock
from sphinx.util.inspect import signature, stringify_signature

import ckptdiff

project = "ckptdiff"
author = "the ckptdiff authors"
copyright = author
version = release = ckptdiff.__version__

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"ckptdiff {release}"
# Pages of GitHub's kind: a heading is a target of links.
myst_heading_anchors = 3

# Names are documented where users import them from, with one page for all; numpydoc would want a page for each.
numpydoc_show_class_members = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
# Only named as base classes and types here; torch alone takes more to install than everything else.
autodoc_mock_imports = ["torch", "transformers"]

# Some packages import a name when it is first asked for; autodoc sees what is there.
with mock(autodoc_mock_imports):
    for package in ("claims", "exports", "lora", "overlap", "retrain", "spectra", "track"):
        module = import_module(f"ckptdiff.{package}")
        for name in getattr(module, "__all__", ()):
            setattr(module, name, getattr(module, name))


def own_signature(
    app: Sphinx, what: str, name: str, documented: Any, options: Any, arguments: str | None, returns: str | None
) -> tuple[str, None] | None:
    """The signature of a class from its own ``__init__``, where that of a mocked base has hidden it."""
    if what != "class" or arguments != "(*args, **kwargs)" or "__init__" not in vars(documented):
        return None
    found = signature(documented.__init__, bound_method=True)
    return stringify_signature(found, show_annotation=False, show_return_annotation=False), None


def setup(app: Sphinx) -> None:
    """Connect the above."""
    app.connect("autodoc-process-signature", own_signature)
