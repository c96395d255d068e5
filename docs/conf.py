"""How Sphinx builds the site: ``ci/docs.sh PYTHON``, or ``sphinx-build -W -n docs FOLDER``."""

import os
import re
from importlib.metadata import version as installed_version

project = "joblib_backends"
author = "The joblib_backends developers"
copyright = "the joblib_backends developers"
release = installed_version("joblib-backends")
# What comes after a + or .dev says which commit it was, which a reader has no use for.
version = re.split(r"\.dev|\+", release)[0]

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = True
# What is between single backticks in docstrings is the name of a parameter.
default_role = "code"
suppress_warnings = [
    # Pages include files from elsewhere, whose sections begin below the page's own heading.
    "myst.header",
]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4

autodoc_typehints = "none"  # the docstrings say it, in words
autodoc_member_order = "bysource"
autosummary_generate = False
numpydoc_show_class_members = False

# Other projects' pages are linked where the network is there: a build without it must not warn.
intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "joblib": ("https://joblib.readthedocs.io/en/stable", None),
    }
    if os.environ.get("READTHEDOCS") or os.environ.get("DOCS_ONLINE")
    else {}
)
# Names of other projects resolve online only; ours must resolve always.
nitpick_ignore_regex = [(r"py:.*", r"(?!joblib_backends).*")]

html_theme = "furo"
html_title = f"joblib_backends {version}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_theme_options = {"navigation_with_keys": True}
html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

#: Where files that are read in the repository, too, stand on the site.
_MOVED = (
    (re.compile(r"\]\((?:\.\./)*(?:benchmarks/)?results/([\w-]+)\.md\)"), r"](results.md#results-\1)"),
    (re.compile(r"\]\((?:\.\./)*benchmarks/(?:README\.md)?(#[\w-]+)?\)"), r"](benchmarks.md\1)"),
    (re.compile(r"\]\((?:\.\./)*docs/([\w-]+\.md)"), r"](\1"),
    (re.compile(r"\]\((?:\.\./)*CONTRIBUTING\.md"), r"](contributing.md"),
    (re.compile(r"\]\((?:\.\./)*CHANGELOG\.md"), r"](changes.md"),
    (re.compile(r"\]\((?:\.\./)*README\.md(#[\w-]+)?\)"), r"](index.md)"),
)


def _moved(text):
    for pattern, there in _MOVED:
        text = pattern.sub(there, text)
    return text


def _move_links(app, name, content):
    content[0] = _moved(content[0])


def _move_links_of_included(app, path, parent, content):
    content[0] = _moved(content[0])


def setup(app):
    """Have links between files of the repository lead to the pages of the site that show them."""
    app.connect("source-read", _move_links)
    app.connect("include-read", _move_links_of_included)
