"""Settings of the documentation site: ``make docs``.

Nothing is fetched while it is built or read. Formulas are plain text, so no script sets them.
"""

import re
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.transforms.post_transforms import SphinxPostTransform

import bilevel

project = "bilevel"
author = "The bilevel developers"
version = release = bilevel.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["images"]
default_role = "py:obj"
myst_heading_anchors = 4
# A fence without a language is what a program prints.
highlight_language = "text"
pygments_style = "friendly"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
add_module_names = False
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = "bilevel"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}

_NAME = re.compile(r"(bilevel(?:\.\w+)+)(?:\(.*\))?")


class LinksToFiles(SphinxPostTransform):
    """A link of a page to a file of the repository outside of docs/ keeps its text and is no link.

    One to a file that is not there stays, and is a warning.
    """

    default_priority = 1

    def run(self, **kwargs):
        del kwargs
        here = Path(self.env.srcdir, self.env.docname).parent
        for node in [*self.document.findall(pending_xref)]:
            path = node.get("reftarget", "").partition("#")[0]
            if node.get("reftype") == "myst" and path.startswith("..") and (here / path).exists():
                node.replace_self(node.children)


class LinksToReference(SphinxPostTransform):
    """``bilevel.name`` in the text of a page leads to its entry in the reference."""

    default_priority = 2

    def run(self, **kwargs):
        del kwargs
        for node in [*self.document.findall(nodes.literal)]:
            name = _NAME.fullmatch(node.astext())
            if not name or isinstance(node.parent, (nodes.title, nodes.reference, pending_xref)):
                continue
            reference = pending_xref(
                "", refdomain="py", reftype="obj", reftarget=name[1], refexplicit=True, refwarn=False
            )
            reference["refdoc"] = self.env.docname
            node.replace_self(reference)
            reference += node


def docstrings(app, what, name, obj, options, lines):
    """In prose an asterisk before a word is no emphasis; each reference is a paragraph."""
    del app, what, name, obj, options

    def escaped(found):
        return r"\*" if found[0] == "*" else found[0]

    made, references = [], False
    for line in lines:
        if line[:1].strip():
            references = line == "References:"
            line = re.sub(r"``.*?``|(?<=[ (])\*(?=\w)", escaped, line)
        made += [line, ""] if references and line.endswith(".") else [line]
    lines[:] = made


def skipped(app, what, name, obj, skip, options):
    """Fields of named tuples are told in the docstring of the class."""
    del app, what, name, options
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else skip


def setup(app):
    app.connect("autodoc-skip-member", skipped)
    app.connect("autodoc-process-docstring", docstrings, priority=400)  # before napoleon
    app.add_post_transform(LinksToFiles)
    app.add_post_transform(LinksToReference)
