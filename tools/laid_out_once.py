"""Run by a notebook's kernel before the notebook (`tools.notebooks`): what is drawn in two formats looks the same in both.

A layout depends on the size of a letter in pixels, and a second one on the first. So it is made once, with the figure's own
pixels, before the first drawing in any format.
"""

from functools import wraps
from typing import Any

from matplotlib.backend_bases import FigureCanvasBase


def lay_out_once() -> None:
    """Let every figure be laid out before it is printed for the first time, and not again."""
    drawn = FigureCanvasBase.print_figure

    @wraps(drawn)
    def print_figure(canvas: FigureCanvasBase, *args: Any, **kwargs: Any) -> Any:
        canvas.figure.draw_without_rendering()
        canvas.figure.set_layout_engine("none")
        return drawn(canvas, *args, **kwargs)

    FigureCanvasBase.print_figure = print_figure  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    lay_out_once()
    del lay_out_once, wraps, Any, FigureCanvasBase
