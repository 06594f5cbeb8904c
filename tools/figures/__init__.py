"""Sphinx extension: the interactive figures, each with a table of five states for readers without JavaScript.

``{interactive} cache`` on a page loads the figure's script there and nowhere else. A figure is a module of this package,
whose ``table`` gives the states, and a script in ``book/_static/figures``. ``SCRIPTS`` of the module, if there are any,
are loaded before it. ``:start: mode=the+line&k=2`` sets controls of the figure on that page.
"""

import html
from importlib import import_module
from typing import Any, ClassVar

from docutils import nodes  # type: ignore[import-untyped]
from docutils.parsers.rst import directives  # type: ignore[import-untyped]
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

FIGURES = ("cache", "clocks", "line", "roofline", "rounding", "router")


class Interactive(SphinxDirective):
    """An interactive figure by name."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {"start": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """The figure's place, which holds its table until the script replaces it."""
        name = self.arguments[0]
        if name not in FIGURES:
            raise self.error(f"there is no interactive figure {name!r}")
        module = import_module(f"{__name__}.{name}")
        start = f' data-start="{html.escape(self.options["start"])}"' if "start" in self.options else ""
        place = f'<div data-figure="{name}" class="interactive"{start}>{module.table()}</div>'
        files = ("core", *getattr(module, "SCRIPTS", ()), name)
        loads = '<link rel="stylesheet" href="../_static/figures/figures.css">'
        loads += "".join(f'<script src="../_static/figures/{file}.js" defer></script>' for file in files)
        return [nodes.raw("", loads + place, format="html")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("interactive", Interactive)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
