"""The book's notebooks are stored as they should be: run from top to bottom, described, and free of this machine."""

import base64
import inspect
import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from dsv2_ref import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV2RMSNorm, plots
from tools import notebooks

pytestmark = pytest.mark.slow

IN_BOOK = notebooks.in_book()
PRIVATE = re.compile(
    r"(?<![\w.:/])/(?:home|Users|root|work|tmp|opt|usr|content)/|[A-Z]:\\|site-packages|\b0x[0-9a-f]{6,}"
)


@pytest.fixture(params=IN_BOOK, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> NotebookNode:
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_notebook_of_the_folder_is_in_the_table_of_contents() -> None:
    assert sorted(IN_BOOK) == sorted((notebooks.ROOT / "book").rglob("*.ipynb"))


def test_was_run_from_top_to_bottom(notebook: NotebookNode) -> None:
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


def test_runs_without_error_or_warning(notebook: NotebookNode) -> None:
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.get("name") != "stderr", cell.id
            assert output.output_type != "error" or "raises-exception" in cell.metadata.get("tags", []), cell.id


CHAPTERS = [path for path in IN_BOOK if path.stem not in ("notation", "symptoms", "gpu", "cast")]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_has_goals_source_exercises_with_run_solutions_and_takeaways(chapter: Path) -> None:
    cells = nbformat.read(chapter, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    title = cells[0].source
    assert re.search(r"^# .+\n\n\*[^*]+\?\*", title), "a question below the title"
    for part in ("You need", "Reading takes"):
        assert part in title.replace("\n", " "), part
    exercises, solutions = (re.findall(rf"\{{{kind}-start\}}.*", text) for kind in ("exercise", "solution"))
    assert len(exercises) == len(solutions) >= 4
    assert any(re.search("Find the (error|bug)", exercise) for exercise in exercises)
    assert any(re.match(r"(plots\.)?show\(", cell.source) for cell in cells), "shows the package's code"
    assert "## Takeaways" in text
    assert "Read next" in text
    for place, cell in enumerate(cells):
        if "{solution-start}" in cell.source and not cell.source.rstrip().endswith("{solution-end}\n```"):
            assert cells[place + 1].cell_type == "code", f"{cell.id}: a solution is run"


WIDEST_LISTING = 88  # columns of code that a page prints without scrolling


def test_code_is_shown_whole_and_fits_the_page(notebook: NotebookNode) -> None:
    """Functions are printed by `plots.show`: none is cut, searched or rewritten on its way to the page."""
    for cell in code_cells(notebook):
        assert not re.search(
            r"\binspect\b|getsource|\b[Ss]ource\.(index|find|split|replace)|^import re$", cell.source, re.M
        )
        for output in cell.outputs:
            shown = output.get("data", {}).get("text/markdown", "")
            for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", shown, re.M | re.S):
                assert language == "python", cell.id
                assert "show(" in cell.source, f"{cell.id}: code is printed by show"
                assert max(map(len, code.splitlines())) <= WIDEST_LISTING, cell.id


def test_show_prints_whole_functions_methods_and_classes() -> None:
    shown = plots.show(DeepseekV2RMSNorm, DeepseekV2RMSNorm.forward, notebooks.in_book).data
    assert shown.startswith("```python\nclass DeepseekV2RMSNorm(nn.Module):\n")
    assert "\n\n\n@ops.defines(checks.norm_input)\ndef forward(\n" in shown
    assert shown.endswith(f"\n\n\n{inspect.getsource(notebooks.in_book)}```")


def test_figures_are_described(notebook: NotebookNode) -> None:
    for cell in code_cells(notebook):
        if any(key.startswith("image/") for output in cell.outputs for key in output.get("data", {})):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt.split()) >= 10, f"{cell.id}: say in the cell's mystnb.image.alt what the figure shows"


def test_figures_are_stored_by_make_notebooks(notebook: NotebookNode) -> None:
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if png := output.get("data", {}).get("image/png"):
                assert Image.open(io.BytesIO(base64.b64decode(png))).mode == "P", f"{cell.id}: run make notebooks"


def test_drawings_are_stored_as_vectors_too(notebook: NotebookNode) -> None:
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if svg := output.get("data", {}).get("image/svg+xml"):
                assert len(svg) <= notebooks.HEAVY
                assert "<metadata>" not in svg, f"{cell.id}: run make notebooks"
                width, height = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).size
                box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
                assert float(box[1]) / float(box[2]) == pytest.approx(width / height, rel=0.01)


def test_pictures_in_text_are_described(notebook: NotebookNode) -> None:
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            assert not re.search(r"!\[\s*\]\(", cell.source), cell.id
            assert not re.search(r"<img(?![^>]*\balt=\"[^\"]+\")", cell.source), cell.id


def test_holds_only_the_metadata_that_the_book_reads(notebook: NotebookNode) -> None:
    assert notebook.metadata == notebooks.NOTEBOOK_METADATA
    for cell in notebook.cells:
        assert cell.metadata.keys() <= notebooks.CELL_METADATA, cell.id
        assert not any(output.get("metadata") for output in cell.get("outputs", [])), cell.id


def test_names_no_path_or_address_of_a_machine(notebook: NotebookNode) -> None:
    for cell in notebook.cells:
        shown = [cell.source]
        for output in cell.get("outputs", []):
            texts = {kind: text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")}
            shown += [output.get("text", ""), *map(str, texts.values())]
        assert not PRIVATE.search("\n".join(shown)), cell.id


def finding(notebook: NotebookNode) -> str:
    """The first cell as far as the package is found."""
    first = code_cells(notebook)[0].source
    return first[: first.index("\n\n", first.index("sys.path"))]


FOUND = "\nimport importlib.util\nassert importlib.util.find_spec('dsv2_ref') and importlib.util.find_spec('tools')"


def test_first_cell_finds_the_package_beside_the_notebook_and_in_a_clone(
    notebook: NotebookNode, tmp_path: Path
) -> None:
    address = re.search('REPOSITORY = (".*?")', finding(notebook)).group(1)
    assert notebooks.LOADER.replace('""', address).strip() in finding(notebook)
    (tmp_path / "clone").symlink_to(notebooks.ROOT, target_is_directory=True)
    for folder in (notebooks.ROOT / "book", notebooks.ROOT, tmp_path):
        subprocess.run([sys.executable, "-I", "-c", finding(notebook) + FOUND], cwd=folder, check=True)


@pytest.mark.parametrize(
    ("torch", "enough"),
    [
        ("2.9.1", False),
        ("2.10.0+cu128", False),
        ("2.11.0", True),
        ("2.11.0a0+nv26.2", True),
        ("2.13.0+cpu", True),
        ("3.0", True),
    ],
)
def test_first_cell_says_which_torch_is_wanted(torch: str, enough: bool, tmp_path: Path) -> None:
    installed = tmp_path / f"torch-{torch}.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}\n")
    program = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{finding(nbformat.read(IN_BOOK[0], as_version=4))}"
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=notebooks.ROOT, capture_output=True, text=True)
    assert (done.returncode == 0) == enough, done.stderr
    said = done.stderr.splitlines()[-1:]
    assert said == ([] if enough else [f"ImportError: torch {torch} is here; wanted 2.11 or newer"])


def test_opened_alone_a_notebook_fetches_the_repository(tmp_path: Path) -> None:
    """As in Colab; here from a small repository on this machine."""
    origin, alone = tmp_path / "origin", tmp_path / "content"
    for package in ("dsv2_ref", "tools"):
        (origin / package).mkdir(parents=True)
        (origin / package / "__init__.py").touch()
    git = ["git", "-C", str(origin), "-c", "user.name=name", "-c", "user.email=name@example.org"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "Both packages"]):
        subprocess.run(git + command, check=True)
    alone.mkdir()
    program = finding(nbformat.read(IN_BOOK[0], as_version=4)).replace(
        'REPOSITORY = ""', f"REPOSITORY = {str(origin)!r}"
    )
    subprocess.run([sys.executable, "-I", "-c", program + FOUND], cwd=alone, check=True)
    assert (alone / "origin" / "dsv2_ref").is_dir()


def test_notebooks_are_given_the_address_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOOK_REPOSITORY", "git@github.com:someone/fork.git")
    path = tmp_path / "one.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell('REPOSITORY = ""  # a remark\nprint(REPOSITORY)')]), path)
    notebooks.execute(path)
    (cell,) = nbformat.read(path, as_version=4).cells
    assert cell.source.startswith('REPOSITORY = "https://github.com/someone/fork"  # a remark')
    assert cell.outputs[0].text == "https://github.com/someone/fork\n"


def test_make_notebooks_brings_the_first_cell_up_to_date() -> None:
    begin, *_, end = notebooks.LOADER.strip().splitlines()
    stored = f"import sys\n\n{begin}\nREPOSITORY = 'as it was found'\n\n{end}\n\nimport torch"
    new = notebooks.with_loader(stored)
    address = re.search('REPOSITORY = (".*?")', new).group(1)
    assert new == f"import sys\n\n{notebooks.LOADER.replace(chr(34) * 2, address).strip()}\n\nimport torch"
    assert notebooks.with_loader(new) == new
    assert notebooks.with_loader("sys.path[:0] = roots()") == "sys.path[:0] = roots()"


def test_the_chapter_on_weights_reads_the_model_that_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with DeepSeek-V2-Lite's weights: in bfloat16, stretched by YaRN, of other sizes."""
    lite = DeepseekV2Config.deepseek_v2_lite()
    config = replace(
        lite, vocab_size=512, hidden_size=96, intermediate_size=80, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, kv_lora_rank=40, qk_rope_head_dim=16, qk_nope_head_dim=24, v_head_dim=20,
    )  # fmt: skip
    DeepseekV2ForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model", 200_000)
    monkeypatch.setenv("DSV2_WEIGHTS", str(tmp_path / "model"))
    path = tmp_path / "book" / "weights.ipynb"
    path.parent.mkdir()
    shutil.copy(notebooks.ROOT / "book" / path.name, path)
    for package in ("dsv2_ref", "experiments", "tools"):
        (tmp_path / package).symlink_to(notebooks.ROOT / package, target_is_directory=True)
    notebooks.execute(path)
    told = {
        cell.id: cell.outputs[0].text
        for cell in code_cells(nbformat.read(path, as_version=4))
        if cell.outputs and "text" in cell.outputs[0]
    }
    assert told["weights-source"].startswith(f"read: {tmp_path / 'model'}\n")
    assert told["weights-rows"] == "17 rows of 192 bytes\n"
    assert told["weights-follow"].count("weight 0.") == config.num_experts_per_tok


def test_running_twice_leaves_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "twice.ipynb"
    cell = new_code_cell("print(1)   \n2\n", metadata={"tags": ["keep"], "collapsed": True}, execution_count=7)
    nbformat.write(new_notebook(cells=[cell], metadata={"kernelspec": {"name": "other", "display_name": "?"}}), path)

    notebooks.execute(path)
    once = path.read_bytes()
    notebooks.execute(path)

    assert path.read_bytes() == once
    stored = nbformat.read(path, as_version=4)
    assert stored.metadata == notebooks.NOTEBOOK_METADATA
    assert stored.cells[0].metadata == {"tags": ["keep"]}
    assert (stored.cells[0].id, stored.cells[0].source) == (cell.id, "print(1)\n2")
    assert [output.output_type for output in stored.cells[0].outputs] == ["stream", "execute_result"]


def test_a_notebook_that_fails_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "fails.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        notebooks.execute(path)
    assert path.read_bytes() == before


def test_figures_are_stored_small_and_look_the_same() -> None:
    figure = plots.new_axes("features added", "running sum").figure
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    plt.close(figure)
    stored = base64.b64decode(notebooks.compact(base64.b64encode(drawn.getvalue()).decode()))

    before, after = (np.asarray(Image.open(png).convert("RGB"), dtype=int) for png in (drawn, io.BytesIO(stored)))
    assert len(stored) < len(drawn.getvalue()) / 2
    assert abs(before - after).max() <= 16  # of 255 steps: below what an eye sees in the border of a letter


def test_vectors_depend_on_nothing_but_the_drawing() -> None:
    drawn = []
    for _ in range(2):
        axes = plots.add_curves(plots.new_axes("features added", "running sum"), {"here": [1.0, 1 / 3, 2.0]})
        axes.bar([1], [1], hatch="/")
        axes.imshow([[0, 1]], extent=(0, 1, 0, 1))
        text = io.StringIO()
        axes.figure.savefig(text, format="svg")
        plt.close(axes.figure)
        drawn.append(notebooks.vectors(text.getvalue()))
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) < len(text.getvalue())
    assert not re.search(r' d="[^"]*\.\d{2}', drawn[0])
    assert notebooks.vectors(drawn[0]) == drawn[0]
    assert "scale(0.015625)" in drawn[0]  # of letters: not a point


DRAW = """import matplotlib.pyplot as plt

def draw(label="size", values=(1, 2, 4)):
    figure, axes = plt.subplots(figsize=(4, 3))
    axes.plot(values)
    axes.set_ylabel(label)
    plt.show()
"""


def test_a_stale_figure_turns_the_notebook_tests_red(tmp_path: Path) -> None:
    # What the notebook drew when it was stored, and what the same cell says now.
    changes = [
        ("draw()", "draw()"),
        ("draw('sise')", "draw('size')"),
        ("draw(values=(1, 2.05, 4))", "draw(values=(1, 2, 4))"),
        ("draw(); draw()", "draw()"),
    ]
    path = tmp_path / "stale.ipynb"
    cells = [new_code_cell(source) for source in (DRAW, *(stored for stored, _ in changes))]
    nbformat.write(new_notebook(cells=cells), path)
    notebooks.execute(path)
    stored = nbformat.read(path, as_version=4)
    for cell, (_, source) in zip(stored.cells[1:], changes, strict=True):
        cell.source = source
    nbformat.write(stored, path)
    shutil.copy(notebooks.ROOT / "book" / "conftest.py", tmp_path)

    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--nbval", "--nbval-current-env", path]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    report = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True).stdout

    results = {cell: result for result, cell in re.findall(r"^(\w+) stale\.ipynb::Cell (\d)", report, re.M)}
    assert results == {"0": "PASSED", "1": "PASSED", "2": "FAILED", "3": "FAILED", "4": "FAILED"}, report
    assert "pixels of a stored figure differ clearly" in report
