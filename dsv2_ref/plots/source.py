"""Code on a page: the one way in which a notebook prints the package's own source."""

import inspect
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.display import Markdown


def show(*objects: Any) -> "Markdown":
    """The whole source of functions, methods or classes, one below the other, as a page prints code.

    It is read from the files when the page is made, so that a page cannot show anything else than what runs.
    """
    from IPython.display import Markdown

    sources = (textwrap.dedent(inspect.getsource(shown)).strip() for shown in objects)
    return Markdown("```python\n" + "\n\n\n".join(sources) + "\n```")
