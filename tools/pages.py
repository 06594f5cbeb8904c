"""Sphinx extension: what a page says of itself to search engines, and what the first page shows of the others.

A page is described by the line in italics below its title (a chapter's question), else by its first sentence. Two
directives keep the first page current: ``stored-figure`` shows a figure as a notebook stores it, ``chapters`` lists the
chapters of a part of the table of contents with their questions. The calculator gets a script with all that the package
knows of published configurations, so that both read the same files. A number stays in one line with its sign or unit.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes  # type: ignore[import-untyped]
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective, SphinxRole

from dsv2_ref import checks, config_checks, published
from dsv2_ref.config import DeepseekV2Config, RopeScaling
from experiments.cast import SYMBOLS, sizes_of
from tools.budget import budget_of, chapters


def description(doctree: nodes.document) -> str:
    """One or two sentences that say what the page is about; empty for a page without text."""
    for paragraph in doctree.findall(nodes.paragraph):
        if not isinstance(paragraph.parent, nodes.section):
            continue  # in a box, a list or a table
        text = " ".join(paragraph.astext().split())
        if len(paragraph) == 1 and isinstance(paragraph[0], nodes.emphasis):
            return text
        sentence = re.match(r".+?[.?!](?= |$)", text)
        return sentence[0] if sentence else text
    return ""


def describe(app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: nodes.document) -> None:
    """Description and depth of the contents of a page, before sphinxext.opengraph writes its tags."""
    if doctree is None:
        # Whoever opens the folder sees the first page's description.
        context["description"] = description(app.env.get_doctree(app.config.root_doc))
        return
    meta = context["meta"] or {}
    if told := description(doctree):
        context["metatags"] += f'<meta name="description" content="{html.escape(told)}" />\n'
        meta |= {"og:description": html.escape(told, quote=False)}
    if "show_toc_level" in meta:
        context["theme_show_toc_level"] = meta["show_toc_level"]
    context["meta"] = meta


def withdraw(app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: nodes.document) -> None:
    """No address of the page where the book has none: sphinxext.opengraph would write a part of one."""
    if doctree is not None and not app.config.html_baseurl:
        context["metatags"] = re.sub(r'<meta property="og:url"[^>]*>\n', "", context["metatags"])


def question(source: str) -> str:
    """The line in italics below the title of a chapter, from the Markdown of its first cell."""
    found = re.match(r"# .+\n\n\*(.+?)\*\n", source, flags=re.DOTALL)
    if found is None:
        raise ValueError(f"no question below the title in {source[:80]!r}")
    return " ".join(found[1].split())


def cells(env: BuildEnvironment, name: str) -> list[dict[str, Any]]:
    """The cells of a notebook beside the page that is being read, which is made anew when the notebook changes."""
    path = Path(env.doc2path(env.docname)).with_name(name)
    env.note_dependency(str(path))
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return found


class StoredFigure(SphinxDirective):
    """``stored-figure`` with a notebook and the id of a cell: the figure it stores, with its description as there."""

    required_arguments = 2
    has_content = True

    def run(self) -> list[nodes.Node]:
        """The figure, with the content below it."""
        name, wanted = self.arguments
        cell = next(cell for cell in cells(self.env, name) if cell["id"] == wanted)
        data = next(output["data"] for output in cell["outputs"] if "image/png" in output.get("data", {}))
        picture = base64.b64decode(data["image/png"])  # pixels: it is also what other sites show of the page
        folder = Path(self.env.app.outdir).parent / "jupyter_execute"  # where MyST-NB leaves its own
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{hashlib.sha256(picture).hexdigest()}.png"
        path.write_bytes(picture)
        address = path.relative_to(Path(self.env.srcdir)).as_posix()
        image = nodes.image(uri=f"/{address}", alt=cell["metadata"]["mystnb"]["image"]["alt"])
        shown = nodes.container("", image, classes=["stored-figure"])  # no figure, which would have a number
        self.state.nested_parse(self.content, self.content_offset, shown)
        return [shown]


class Chapters(SphinxDirective):
    """``chapters`` with the number of a part of the table of contents, from 0: its chapters and their questions."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """A numbered list that goes on where the part before it ended."""
        parts = yaml.safe_load((Path(self.env.srcdir) / "_toc.yml").read_text(encoding="utf-8"))["parts"]
        part = int(self.arguments[0])
        number = 1 + sum(len(before["chapters"]) for before in parts[:part])
        lines = []
        for chapter in parts[part]["chapters"]:
            name = f"{Path(chapter['file']).name}.ipynb"
            asked = question("".join(cells(self.env, name)[0]["source"]))
            lines += [f"{number}. []({name})\n\n    {asked}\n"]
            number += 1
        found = nodes.container(classes=["chapters"])
        self.state.nested_parse("\n".join(lines).splitlines(), 0, found)
        return [found]


class ReadingTime(SphinxRole):
    """``{reading}`time```: how long the chapter takes, as `tools.budget` counts it."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """The text in place of the role."""
        minutes = budget_of(Path(self.env.doc2path(self.env.docname))).minutes
        return [nodes.Text(f"{minutes} minutes")], []


def open_with_a_picture(app: Sphinx, doctree: nodes.document) -> None:
    """Show a chapter's first figure below its question; the code stays where the notebook has it."""
    figure = next(doctree.findall(nodes.figure), None)
    if figure is None or not is_chapter(app):  # a notebook may have been stored without outputs
        return
    output = figure.parent
    output.remove(figure)
    if not output.children:
        output.parent.remove(output)
    title = next(doctree.findall(nodes.title))
    title.parent.insert(2, figure)  # after title and question


def is_chapter(app: Sphinx) -> bool:
    """Whether the page that is being read is a chapter."""
    return app.env.docname.removeprefix("book/") in {path.stem for path in chapters()}


def size_symbols(app: Sphinx, doctree: nodes.document) -> None:
    """Let the first mention of a letter in each section show its sizes, on hover and on focus."""
    if not is_chapter(app):
        return
    for section in doctree.findall(nodes.section):
        met: set[str] = set()
        for math in list(section.findall(nodes.math)):
            symbol, parent = math.astext(), math.parent
            own = next(node for node in _above(math) if isinstance(node, nodes.section))
            in_text = isinstance(parent, nodes.paragraph) and not isinstance(parent.parent, nodes.entry)
            if own is not section or not in_text or symbol in met or symbol not in SYMBOLS:
                continue
            met.add(symbol)
            sizes = ", ".join(f"{name} {size}" for name, size in sizes_of(symbol).items())
            told = f'<span class="sizes">{html.escape(SYMBOLS[symbol][0])}: {sizes}</span></span>'
            place = parent.index(math)
            parent.insert(place + 1, nodes.raw("", told, format="html"))
            parent.insert(place, nodes.raw("", '<span class="sized" tabindex="0">', format="html"))


def _above(node: nodes.Node) -> Iterator[nodes.Node]:
    while node := node.parent:
        yield node


TORN = re.compile(r"(?<=\d) (?=[%×]|(?:[kMGTP]i?B|[kMGTP]|ms|µs)\b)|(?<=×) (?=\d)")
"""A space at which a number would lose its sign or its unit to the next line."""


def keep_numbers_whole(app: Sphinx, doctree: nodes.document) -> None:
    """Let no line end between a number and its sign or unit; code stays as it is."""
    code = nodes.literal | nodes.math | nodes.FixedTextElement
    for text in list(doctree.findall(nodes.Text)):
        if TORN.search(text) and not any(isinstance(node, code) for node in _above(text)):
            text.parent.replace(text, nodes.Text(TORN.sub("\u00a0", text)))


def known_configurations() -> str:
    """A script that gives published-reader.js what `dsv2_ref.published` and the checks know, as the text of JSON:
    read there as any file, it keeps 1 and 1.0 apart."""
    defaults = {field.name: field.default for field in fields(RopeScaling) if field.name not in ("type", "factor")}
    known = {
        **published.known(),
        "fields": asdict(DeepseekV2Config()),
        "stretch": defaults,
        "keys of a latent": published.LATENT_KEYS,
        "keys of a size": published.SIZE_KEYS,
        "keys of routing": published.ROUTING_KEYS,
        "largest size": checks.LARGEST_SIZE,
        "longest value": checks.LONGEST_VALUE,
        "smallest eps": checks.SMALLEST_EPS,
        "implementations": checks.IMPLEMENTATIONS,
        "forms": checks.MLA_FORMS,
        "scores": config_checks.SCORES,
        "methods": config_checks.TOPK_METHODS,
    }
    text = json.dumps(json.dumps(known, separators=(",", ":")))
    return f"// Written by tools/pages.py when the book is built.\nconst PUBLISHED = {text};\n"


def write_known_configurations(app: Sphinx, exception: Exception | None) -> None:
    """Put `known_configurations` beside the book's own scripts, where only the calculator's page loads it."""
    if exception is None and app.builder.format == "html":
        (Path(app.outdir) / "_static" / "published.js").write_text(known_configurations(), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("stored-figure", StoredFigure)
    app.add_directive("chapters", Chapters)
    app.add_role("reading", ReadingTime())
    app.connect("doctree-read", open_with_a_picture)
    app.connect("doctree-read", size_symbols)
    app.connect("doctree-read", keep_numbers_whole)
    app.connect("html-page-context", describe, priority=400)
    app.connect("html-page-context", withdraw, priority=600)
    app.connect("build-finished", write_known_configurations)
    # MathJax comes with the first page, with formulas or without, so that no later one has to wait for it.
    app.set_html_assets_policy("always")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
