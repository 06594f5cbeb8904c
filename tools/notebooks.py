"""Run the book's notebooks and store them with their outputs, so that the same run leaves the same bytes.

    python -m tools.notebooks            every notebook in the table of contents
    python -m tools.notebooks FILE ...   these

Kept are sources, cell ids, the metadata that the book reads, outputs and execution counts from 1. What Jupyter adds
(times, versions, the state of an editor) is dropped, and figures are stored in a third of the space. In each first cell
the lines that find the package are replaced by `LOADER`, with the address of the repository (`tools.repository`), from
which they fetch the package where a notebook is opened alone. A notebook that fails is left as it was.
"""

import argparse
import base64
import io
import re
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # noqa: F401  # the first import ever writes a cache and says so: not in a notebook's output
import nbformat
import yaml
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image
from sphinx_external_toc.parsing import parse_toc_yaml

from tools import repository

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}
CELL_METADATA = {"mystnb", "tags"}
# Drawings as vectors for the pages, and as pixels too, which tests compare.
FORMATS = ["--InlineBackend.figure_formats=png", "--InlineBackend.figure_formats=svg"]
FORMATS += [f"--IPKernelApp.exec_files={ROOT / 'tools' / 'laid_out_once.py'}"]
HEAVY = 60_000
"""Characters of a vector graphic from which on a page shows the pixels."""
LOADER = """\
# The package comes from the repository that this notebook lies in, from a clone
# of it in the current folder or, opened alone as in Colab, from a fresh clone.
REPOSITORY = ""  # make notebooks fills it in


def roots():
    here = Path.cwd()
    places = [here, *here.parents, *here.iterdir()]
    return [str(p) for p in places if (p / "dsv2_ref").is_dir()]


from importlib.metadata import version

if [int(n) for n in version("torch").split(".")[:2]] < [2, 11]:
    raise ImportError(f"torch {version('torch')} is here; wanted 2.11 or newer")
if REPOSITORY and not roots():
    subprocess.run(["git", "clone", "--depth=1", REPOSITORY], check=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "jaxtyping"]
    subprocess.run(install, check=True)
sys.path[:0] = roots()
"""
"""The part of each notebook's first cell that finds the package, and stops where PyTorch is too old for it."""


def in_book() -> list[Path]:
    """The notebooks named in the table of contents, in its order."""
    pages = parse_toc_yaml(ROOT / "_toc.yml")
    return [notebook for page in pages if (notebook := ROOT / f"{page}.ipynb").is_file()]


def compact(png: str) -> str:
    """The same picture in a palette of 256 colours, which no eye tells from the full set in a chart."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    packed = io.BytesIO()
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(packed, "PNG", optimize=True)
    return base64.b64encode(packed.getvalue()).decode()


KINDS_OF_ID = {"h": "hatch", "image": "image", "m": "marker", "p": "clip"}
"""What Matplotlib's names in an SVG begin with, and what is written for it."""


def vectors(svg: str) -> str:
    """The same drawing without the time at which it was made and without needless characters, its points in tenths.

    Matplotlib makes names from a random number and from places in memory: here what has one is counted.
    """
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r">\s+<", "><", re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL))

    def shorter(points: re.Match[str]) -> str:
        return re.sub(r"(\.\d)\d+", r"\1", " ".join(points[0].split())).replace(".0 ", " ")

    for kind, word in KINDS_OF_ID.items():
        for number, name in enumerate(dict.fromkeys(re.findall(rf'\bid="({kind}[0-9a-f]{{10}})"', svg))):
            svg = svg.replace(name, f"{word}{number}")
    return re.sub(r'(?<= d=")[^"]*', shorter, svg).strip()


def normalise(notebook: NotebookNode) -> None:
    """Drop whatever depends on when, where or in which editor the notebook was run, and what makes it heavy."""
    notebook.metadata = nbformat.from_dict(NOTEBOOK_METADATA)
    for cell in notebook.cells:
        cell.metadata = NotebookNode({key: cell.metadata[key] for key in sorted(CELL_METADATA & cell.metadata.keys())})
        cell.source = "\n".join(line.rstrip() for line in cell.source.strip().splitlines())
        for output in cell.get("outputs", []):
            if png := output.get("data", {}).get("image/png"):
                output.data["image/png"] = compact(png)
            if svg := output.get("data", {}).get("image/svg+xml"):
                output.data["image/svg+xml"] = vectors(svg)
                if len(output.data["image/svg+xml"]) > HEAVY:
                    del output.data["image/svg+xml"]


def address() -> str:
    """Where the repository is, as the book's buttons have it; empty where it has no address."""
    settings = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    return repository.find(ROOT, settings["repository"]["url"]) or ""


def with_loader(source: str) -> str:
    """A cell's source with today's `LOADER` in the place of the one that it has, if any, and with the address."""
    begin, end = (re.escape(LOADER.strip().splitlines()[place]) for place in (0, -1))
    source = re.sub(rf"^{begin}$.*?^{end}$", lambda _: LOADER.strip(), source, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r'^REPOSITORY = ".*?"', f'REPOSITORY = "{address()}"', source, flags=re.MULTILINE)


def execute(path: Path) -> None:
    """Run a notebook in its own folder, with this Python, and store it."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = with_loader(cell.source)
    settings: dict[str, Any] = {"kernel_name": "python3", "timeout": 600, "coalesce_streams": True}
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, record_timing=False, resources=folder, extra_arguments=FORMATS, **settings).execute()
    normalise(notebook)
    nbformat.write(notebook, path)


def main() -> None:
    """Run the notebooks named on the command line, or all of the book's."""
    parser = argparse.ArgumentParser(description="Run notebooks of the book and store their outputs.")
    parser.add_argument("files", nargs="*", type=Path, help="default: all in the table of contents")
    for path in parser.parse_args().files or in_book():
        execute(path.resolve())
        print(f"{path.name} run and stored")


if __name__ == "__main__":
    main()
