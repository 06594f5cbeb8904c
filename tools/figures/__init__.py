"""Sphinx extension: the interactive figures, each with a table of five states for readers without JavaScript.

``{interactive} cache`` on a page loads the figure's script there and nowhere else. A figure is a module of this package,
whose ``table`` gives the states, and a script in ``book/_static/figures``.
"""

from importlib import import_module
from typing import Any

from docutils import nodes  # type: ignore[import-untyped]
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

FIGURES = ("cache",)


class Interactive(SphinxDirective):
    """An interactive figure by name."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The figure's place, which holds its table until the script replaces it."""
        name = self.arguments[0]
        if name not in FIGURES:
            raise self.error(f"there is no interactive figure {name!r}")
        table = import_module(f"{__name__}.{name}").table()
        place = f'<div data-figure="{name}" class="interactive">{table}</div>'
        loads = '<link rel="stylesheet" href="../_static/figures/figures.css">'
        loads += "".join(f'<script src="../_static/figures/{file}.js" defer></script>' for file in ("core", name))
        return [nodes.raw("", loads + place, format="html")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("interactive", Interactive)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
