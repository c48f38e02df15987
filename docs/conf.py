# SPDX-License-Identifier: Apache-2.0
"""Settings of the documentation site, which docs/make_site.py builds."""

import mim_jax

project, author = "mim_jax", "the authors of mim_jax"
version = release = mim_jax.__version__
html_title = "mim_jax"
html_theme = "furo"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 4  # the names that GitHub gives sections
html_copy_source = False
html_show_sphinx = False
autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "show-inheritance": True,
}
autodoc_typehints = "none"
napoleon_custom_sections = [("Source", "notes_style")]
napoleon_use_ivar = True
# Several classes have an attribute of one name, such as `width`: no fault of a page.
suppress_warnings = ["ref.python"]


# The index of the search is a script, which browsers load from disk, too. The excerpts
# below the hits are read from pages, which they do not allow there: each is an error.
_FROM_DISK = """
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
"""


def setup(app):
    """Leaves out what says nothing: "Alias for field number 0"."""
    app.add_js_file(None, body=_FROM_DISK)

    def skipped(app, what, name, obj, skip, options):
        del app, what, name, options
        return True if type(obj).__name__ == "_tuplegetter" else skip

    app.connect("autodoc-skip-member", skipped)
