"""The grader: right work passes, each known mistake is named, and nothing a submission does spoils the report."""

import csv
import io
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from dsv2_ref import __main__ as command_line
from dsv2_ref.grading import PARTS, Report, grade
from dsv2_ref.grading.formats import as_csv, as_gradescope, as_json, as_junit, as_text
from dsv2_ref.grading.report import CHAPTERS, ROUNDING, ROUNDING_OF_FLOAT32, cost_of, distance, expected
from tests.planted_in_solutions import BOTH_AT_ONCE, PLANTED, planted

ROOT = Path(__file__).parent.parent
SOLUTIONS = ROOT / "assignments" / "solutions"
EVERY = [(part, number) for part in PARTS.values() for number in range(len(part.mistakes))]


def name_of(found: object) -> str:
    return re.sub(r"\W+", "-", str(found))[:60] if isinstance(found, str) else ""


@pytest.fixture
def submit(tmp_path: Path) -> "Submit":
    return Submit(tmp_path)


class Submit:
    """Grade a source text."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, part: str, source: str | bytes, name: str = "work.py", **limits: int) -> Report:
        path = self.folder / name
        path.write_bytes(source.encode() if isinstance(source, str) else source)
        return grade(part, path, **limits)


# The parts themselves


def effect(part_name: str, case: int, one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """How much two mistakes differ in a case: relative to what is right."""
    a, b = expected(part_name, case, one), expected(part_name, case, other)
    if a is None or b is None:
        return 0.0 if a is b else torch.inf
    return distance(a, b)


def test_every_mistake_shows_in_some_case() -> None:
    """More than 100 times the tolerance; a cost beyond what is allowed."""
    for part, number in EVERY:
        shown = (shows(part.name, case, number) for case in range(len(part.cases)))
        assert any(shown), part.mistakes[number].name


def shows(part_name: str, case: int, number: int) -> bool:
    at_most, wrong = PARTS[part_name].cases[case].at_most, expected(part_name, case, (number,))
    if at_most and wrong is not None:
        return cost_of(wrong)[1] > at_most * cost_of(expected(part_name, case) or {})[1]
    return effect(part_name, case, (number,), ()) > 100 * ROUNDING_OF_FLOAT32


def test_no_two_mistakes_look_alike() -> None:
    for part in PARTS.values():
        for one, other in itertools.combinations(range(len(part.mistakes)), 2):
            apart = (effect(part.name, case, (one,), (other,)) for case in range(len(part.cases)))
            names = part.mistakes[one].name, part.mistakes[other].name
            assert any(found > 100 * ROUNDING_OF_FLOAT32 for found in apart), names


def test_planting_leaves_nothing_behind() -> None:
    """After all mistakes have been planted, the reference still gives what it gave."""
    for part in PARTS.values():
        before = [expected(part.name, case) for case in range(len(part.cases))]
        for number in range(len(part.mistakes)):
            expected(part.name, 0, (number,))
        for case, answers in enumerate(before):
            assert answers is not None
            assert distance(part.reference_answers(part.cases[case]), answers) == 0


def test_the_gate_has_no_ties_that_rounding_could_turn() -> None:
    """The k-th and the next score differ by more than float32 can be wrong, so that float32 chooses alike."""
    part = PARTS["gate"]
    for case in part.cases:
        module = part.subject(part.reference, case, part.state(case))
        hidden_states = case.inputs()["hidden_states"]
        logits = torch.nn.functional.linear(hidden_states.flatten(0, 1), module.weight)
        sigmoid = module.scoring_func == "sigmoid"
        scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
        bias = module.e_score_correction_bias
        ranked = (scores if bias is None else scores + bias).sort(-1, descending=True).values
        assert (ranked[:, :-1] - ranked[:, 1:])[:, : module.top_k + 3].min() > 1e-6


def test_points_and_names() -> None:
    assert {"rmsnorm", "rope", "mla", "decoding", "gate", "experts", "balance", "layer"} < PARTS.keys()
    assert sum(PARTS[name].points for name in PLANTED) == 100
    for part in PARTS.values():
        assert all(case.points > 0 for case in part.cases)
        assert len({mistake.name for mistake in part.mistakes}) == len(part.mistakes)


def headings(chapter: str) -> list[str]:
    cells = json.loads((ROOT / "book" / f"{chapter}.ipynb").read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return [line.replace("`", "") for line in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)]


def test_the_chapters_that_explain_mistakes_exist() -> None:
    for part in PARTS.values():
        for mistake in part.mistakes:
            titles = headings(mistake.chapter)
            assert titles[0] == CHAPTERS[mistake.chapter]
            assert mistake.section in titles, (mistake.name, titles)


# Right and wrong submissions


@pytest.mark.parametrize("part", PLANTED)
def test_a_solution_passes(part: str) -> None:
    report = grade(part, SOLUTIONS / f"{part}.py")
    costs = {case.name for case in PARTS[part].cases if case.at_most}
    assert report.passed, as_text(report)
    assert report.mistakes == report.notes == []
    assert all((check.error or 0) <= ROUNDING for check in report.checks if check.name not in costs)


def test_all_mistakes_are_planted() -> None:
    for part, edits in PLANTED.items():
        assert edits.keys() == {mistake.name for mistake in PARTS[part].mistakes}


@pytest.mark.parametrize(
    ("part", "mistake"), [(part, mistake) for part, edits in PLANTED.items() for mistake in edits], ids=name_of
)
def test_a_planted_mistake_is_named(part: str, mistake: str, submit: Submit) -> None:
    source = (SOLUTIONS / f"{part}.py").read_text()
    report = submit(part, planted(source, PLANTED[part][mistake]))
    wanted = {mistake, BOTH_AT_ONCE.get(mistake, mistake)}
    assert {named.name for named in report.mistakes} == wanted, as_text(report)
    named = next(named for named in report.mistakes if named.name == mistake)
    assert named.effect > 100 * ROUNDING_OF_FLOAT32
    text = as_text(report)
    assert f"Known mistake: {mistake}." in text
    assert named.page in text
    assert named.section in text
    assert "Its effect here: " in text


LATER = {
    "quantize": """
import torch

def to_codes(x, kind, group, scale_dtype=torch.float32):
    top = 2.0 ** (int(kind[3:]) - 1) - 1
    groups = x.unflatten(-1, (-1, group))
    scales = groups.abs().amax(-1) / top
    codes = (groups / scales.where(scales > 0, 1)[..., None]).round()
    return codes.flatten(-2).to(torch.int8), scales.to(scale_dtype)
""",
    "window": """
import torch

def window_mask(seq, kv_seq, sinks, last):
    mask = torch.zeros(1, 1, seq, kv_seq, dtype=torch.bool)
    for i in range(seq):
        own = kv_seq - seq + i
        mask[..., i, : own + 1] = True
        mask[..., i, sinks : max(sinks, own - last + 1)] = False
    return mask
""",
}


@pytest.mark.parametrize("part", LATER)
def test_parts_of_later_chapters(part: str, submit: Submit) -> None:
    assert submit(part, LATER[part]).passed
    old, new, mistake = {
        "quantize": (".round()", ".trunc()", "rounded towards zero"),
        "window": ("own - last + 1", "own - last", "the window one token too wide"),
    }[part]
    report = submit(part, LATER[part].replace(old, new))
    assert [named.name for named in report.mistakes] == [mistake]


def test_two_mistakes_at_once_are_both_named(submit: Submit) -> None:
    source = (SOLUTIONS / "mla.py").read_text()
    two = ("temperature left out", "the norm on the query's latent left out")
    for mistake in two:
        source = planted(source, PLANTED["mla"][mistake])
    assert {named.name for named in submit("mla", source).mistakes} == set(two)


FORMS = {
    "a norm of torch's": (
        "rmsnorm",
        "class DeepseekV2RMSNorm",
        "class DeepseekV2RMSNorm(torch.nn.RMSNorm):\n    pass\n\nclass Other",
    ),
    "a tuple": ("rmsnorm", "return self.weight * (", "return (self.weight * ("),
    "torch's attention": (
        "mla",
        "out = weights @ value",
        "out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)",
    ),
    "choices in another order": (
        "gate",
        "return topk_idx, topk_weight, None",
        "return topk_idx.flip(-1), topk_weight.flip(-1)",
    ),
    "a cache in a dict": ("decoding", "return out, None, cache", "return out, {'rows': cache}"),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_right_passes_whatever_its_form(form: str, submit: Submit) -> None:
    part, old, new = FORMS[form]
    source = (SOLUTIONS / f"{part}.py").read_text()
    if form == "a tuple":
        source = source.replace("self.eps))", "self.eps)), None)")
    if form == "a cache in a dict":
        source = source.replace("past_key_value.shape", "past_key_value['rows'].shape")
        source = source.replace("(past_key_value, cache)", "(past_key_value['rows'], cache)")
    assert old in source
    report = submit(part, source.replace(old, new))
    assert report.passed, as_text(report)


STACKED = """
import torch
from torch import nn
from torch.nn import functional as F
from dsv2_ref import MoEGate

class Experts(nn.Module):
    def __init__(self, E, D, I):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, I))

class MLP(nn.Module):
    def __init__(self, D, I):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, I, bias=False), nn.Linear(D, I, bias=False)
        self.down_proj = nn.Linear(I, D, bias=False)

class DeepseekV2MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, I = config.hidden_size, config.moe_intermediate_size
        self.gate, self.experts = MoEGate(config), Experts(config.n_routed_experts, D, I)
        self.shared_experts = MLP(D, I * config.n_shared_experts)

    def forward(self, x):
        topk_idx, topk_weight, _ = self.gate(x)
        tokens, k = x.flatten(0, 1), topk_idx.shape[1]
        order = topk_idx.flatten().argsort(stable=True)
        expert = topk_idx.flatten()[order]
        counts = expert.bincount(minlength=len(self.experts.down_proj))
        slot = torch.arange(len(order)) - (counts.cumsum(0) - counts)[expert]
        padded = tokens.new_zeros(len(counts), int(counts.max()), tokens.shape[1])
        padded[expert, slot] = tokens[order // k]
        gate, up = (padded @ self.experts.gate_up_proj.mT).chunk(2, dim=-1)
        out = ((F.silu(gate) * up) @ self.experts.down_proj.mT)[expert, slot]
        out = (out[order.argsort()].view(*topk_idx.shape, -1) * topk_weight[..., None]).sum(1)
        s = self.shared_experts
        return out.view_as(x) + s.down_proj(F.silu(s.gate_proj(x)) * s.up_proj(x))
"""


def test_stacked_experts_and_a_padded_dispatch_pass(submit: Submit) -> None:
    report = submit("experts", STACKED)
    assert report.passed, as_text(report)
    assert report.notes == []


def test_float32_inside_passes_with_a_note(submit: Submit) -> None:
    source = (SOLUTIONS / "rmsnorm.py").read_text()
    source = source.replace("hidden_states.square()", "hidden_states.float().square()")
    report = submit("rmsnorm", source)
    assert report.passed
    assert report.notes == ["some step is computed in float32, though its input is float64"]


# Hostile and broken submissions

NORM = """
import os, sys, time
import torch
from torch import nn

class DeepseekV2RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden_size)), eps

    def forward(self, x):
        right = self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        {}
        return right
"""
BORROWED = "wanted code of your own"
AT_IMPORT = {
    "a module that is not there": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "no Python": ("class class", "SyntaxError"),
    "another name": ("class RMSNorm: pass", "it defines no DeepseekV2RMSNorm"),
    "no class": ("def DeepseekV2RMSNorm(n, eps): pass", "DeepseekV2RMSNorm is a function; wanted a class"),
    "sys.exit": ("import sys; sys.exit(0)", "it calls sys.exit(0)"),
    "os._exit": ("import os; os._exit(0)", "its process ended with exit status 0 before it had answered"),
    "a crash": ("import ctypes; ctypes.string_at(0)", "it crashed: its process ended with SIGSEGV"),
    "the default dtype": (
        "import torch; torch.set_default_dtype(torch.float16)\nclass DeepseekV2RMSNorm: pass",
        "it changes torch's default dtype",
    ),
    "the package's own": ("from dsv2_ref import DeepseekV2RMSNorm", BORROWED),
    "an error without a message": (
        "class E(Exception):\n    def __str__(self): raise E\nraise E",
        "E: (its message cannot be printed)",
    ),
    "no text": (b"\xff\xfe\x00x", "SyntaxError"),
    "a recursion": ("def f(): return f()\nf()", "RecursionError"),
    "an interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
}


@pytest.mark.parametrize("kind", AT_IMPORT)
def test_a_file_that_cannot_be_imported(kind: str, submit: Submit) -> None:
    source, wanted = AT_IMPORT[kind]
    report = submit("rmsnorm", source)
    assert wanted in report.problem
    assert (report.points, report.passed) == (0, False)
    check_text(as_text(report), submit.folder)


def check_text(text: str, folder: Path) -> None:
    """No traceback of ours: no file of the package is named, and the report is short."""
    assert "Traceback" not in text
    assert "dsv2_ref/grading" not in text
    assert str(ROOT / "dsv2_ref") not in text
    assert len(text) < 6000


IN_FORWARD = {
    "NaN": ("right = right * float('nan')", "elements of output are NaN or infinite"),
    "another shape": ("right = right[..., 1:]", "output is (2, 5, 47); wanted (2, 5, 48)"),
    "another dtype": ("right = right.half()", "output is torch.float16; wanted torch.float64, as the input"),
    "nothing": ("right = None", "forward returned a NoneType; wanted a tensor, or a tuple that begins with one"),
    "an input changed": ("x.mul_(2)", "it changes hidden_states in place"),
    "gradients switched on": ("torch.set_grad_enabled(True)", ""),
    "the default dtype": (
        "torch.set_default_dtype(torch.float32)",
        "it changes torch's default dtype from torch.float64 to torch.float32",
    ),
    "an error": ("raise ValueError('mine\\n' * 1000)", "ValueError: mine mine"),
    "sys.exit": ("sys.exit('done')", "it calls sys.exit(done)"),
    "os._exit": ("os._exit(7)", "its process ended with exit status 7"),
    "a signal": ("os.kill(os.getpid(), 11)", "it crashed: its process ended with SIGSEGV"),
    "memory": ("torch.ones(2**29)", "allocate"),  # 4 GB in float64
    "a print flood": ("print('x' * 2**27)", "it prints or writes more than 64 MB"),
    "a big file": ("open('big', 'wb').write(b'0' * 2**27)", "it prints or writes more than 64 MB"),
    "the package's own inside": ("import dsv2_ref; right = dsv2_ref.DeepseekV2RMSNorm(48)(x)", BORROWED),
    "the package's own by inheritance": (
        "import dsv2_ref.rmsnorm as m; right = m.DeepseekV2RMSNorm.forward(self, x)",
        BORROWED,
    ),
    "a meta tensor": ("right = right.to('meta')", "meta"),
}


@pytest.mark.parametrize("kind", IN_FORWARD)
def test_a_forward_that_goes_wrong(kind: str, submit: Submit) -> None:
    source, wanted = IN_FORWARD[kind]
    report = submit("rmsnorm", NORM.format(source))
    if not wanted:  # torch.no_grad around it undoes that
        assert report.passed
        return
    assert report.problem == ""
    assert not report.passed
    assert wanted in report.checks[0].message
    check_text(as_text(report), submit.folder)


def test_a_hang_is_ended(submit: Submit) -> None:
    for what in ("while True: pass", "time.sleep(1000)"):
        report = submit("rmsnorm", NORM.format(what), seconds=2)
        assert report.checks[0].message == "it was ended after the limit of 2 seconds"
        assert report.points == 0


def test_what_a_submission_started_is_ended_too(submit: Submit) -> None:
    source = "import subprocess, sys\n" + NORM.format("subprocess.Popen(['sleep', '1234.5'])")
    assert submit("rmsnorm", source).passed
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert b"1234.5" not in status.read_bytes()
        except OSError:
            continue


def test_output_is_kept_and_cut(submit: Submit) -> None:
    report = submit("rmsnorm", NORM.format("print('hello', x.shape); print('y' * 5000)"))
    assert report.passed
    assert report.printed.startswith("hello torch.Size([2, 5, 48])")
    assert re.search(r"\n\.\.\. and [\d,]+ bytes more$", report.printed)
    assert len(report.printed) < 2100


def test_a_crash_late_keeps_the_earlier_points(submit: Submit) -> None:
    report = submit("rmsnorm", NORM.format("if x.shape[0] == 7: os.kill(os.getpid(), 11)"))
    assert [check.passed for check in report.checks] == [True, True, False, False]
    assert "SIGSEGV" in report.checks[2].message


def test_an_error_is_shown_where_the_student_made_it(submit: Submit) -> None:
    report = submit("rmsnorm", NORM.format("self.nothing"))
    assert report.checks[0].message == "AttributeError: 'DeepseekV2RMSNorm' object has no attribute 'nothing'"
    assert report.checks[0].where == "line 13, in forward: self.nothing"


def test_weights_that_have_no_published_name(submit: Submit) -> None:
    source = NORM.format("").replace("self.weight", "self.scale")
    report = submit("rmsnorm", source)
    assert report.checks[0].message == "no published weight has the name scale; not used: weight"
    source = NORM.format("").replace("torch.ones(hidden_size)", "torch.ones(2 * hidden_size)")
    assert submit("rmsnorm", source).checks[0].message == "weight is (96,); wanted (48,)"


def test_a_weight_that_is_missing_is_noted(submit: Submit) -> None:
    mistake = "the norm on the latent left out"
    report = submit("mla", planted((SOLUTIONS / "mla.py").read_text(), PLANTED["mla"][mistake]))
    assert report.notes == ["it has no weights with the names kv_a_layernorm.weight"]


@pytest.mark.parametrize("name", ["my work (final).py", "no-suffix", "a'b\"c.py", "ünïcode.py", "-x.py"])
def test_any_name_of_a_file_will_do(name: str, submit: Submit) -> None:
    assert submit("rmsnorm", NORM.format(""), name).passed


def test_other_encodings_and_line_ends(submit: Submit) -> None:
    source = "# -*- coding: latin-1 -*-\n# é\n" + NORM.format("")
    assert submit("rmsnorm", source.encode("latin-1")).passed
    assert submit("rmsnorm", b"\xef\xbb\xbf" + NORM.format("").replace("\n", "\r\n").encode()).passed


def test_files_beside_a_submission_do_not_hide_modules(submit: Submit) -> None:
    for name in ("torch.py", "math.py", "json.py", "dsv2_ref.py"):
        (submit.folder / name).write_text("raise RuntimeError('hidden')")
    (submit.folder / "helper.py").write_text("value = 1")
    assert submit("rmsnorm", "import helper\n" + NORM.format("")).passed


@pytest.mark.parametrize("part", PLANTED)
def test_the_packages_own_is_not_accepted(part: str, submit: Submit) -> None:
    known = PARTS[part]
    names = ", ".join(known.defines)
    report = submit(part, f"from dsv2_ref.{known.module} import {names}")
    assert BORROWED in report.problem
    if known.is_class:
        source = f"from dsv2_ref.{known.module} import {names} as Own\n\nclass {names}(Own):\n    pass\n"
        report = submit(part, source)
        assert all(BORROWED in check.message for check in report.checks)


# Reports


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    submit = Submit(tmp_path_factory.mktemp("reports"))
    wrong = planted((SOLUTIONS / "rmsnorm.py").read_text(), PLANTED["rmsnorm"]["epsilon outside the root"])
    return [
        grade("rmsnorm", SOLUTIONS / "rmsnorm.py"),
        submit("rmsnorm", wrong, "wrong.py"),
        submit("rmsnorm", "import no_such_module", "broken.py"),
        submit("rmsnorm", NORM.format("raise ValueError('<\\x07&>')"), "control.py"),
    ]


def test_json(reports: list[Report]) -> None:
    one, several = json.loads(as_json(reports[1:2])), json.loads(as_json(reports))
    assert several[1] == one
    assert (one["points"], one["of"], one["passed"]) == (3, 8, False)
    assert one["mistakes"][0]["name"] == "epsilon outside the root"
    assert one["mistakes"][0]["effect"] == pytest.approx(one["checks"][1]["error"])


def test_junit(reports: list[Report]) -> None:
    root = ElementTree.fromstring(as_junit(reports))
    assert root.tag == "testsuites"
    suites = root.findall("testsuite")
    counts = [tuple(int(suite.attrib[name]) for name in ("tests", "failures", "errors")) for suite in suites]
    assert counts == [(4, 0, 0), (4, 2, 0), (1, 0, 1), (4, 4, 0)]
    for suite in suites:
        cases = suite.findall("testcase")
        assert len(cases) == int(suite.attrib["tests"])
        assert len(suite.findall("testcase/failure")) == int(suite.attrib["failures"])
        assert len(suite.findall("testcase/error")) == int(suite.attrib["errors"])
    assert "epsilon outside the root" in suites[1].findall("testcase/failure")[0].text


def test_gradescope(reports: list[Report]) -> None:
    """Fields and their types as Gradescope's page of specifications lists them."""
    for report in reports:
        found = json.loads(as_gradescope(report))
        assert found.keys() == {"score", "output", "output_format", "visibility", "tests"}
        assert found["score"] == report.points == sum(test["score"] for test in found["tests"])
        assert sum(test["max_score"] for test in found["tests"]) == report.of
        for test in found["tests"]:
            assert test.keys() == {"name", "score", "max_score", "status", "output", "output_format"}
            assert test["status"] == ("passed" if test["score"] == test["max_score"] else "failed")


def test_csv(reports: list[Report]) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv([("=evil()", report) for report in reports]))))
    assert [row["points"] for row in rows] == ["8", "3", "0", "0"]
    assert [row["passed"] for row in rows] == ["yes", "no", "no", "no"]
    assert rows[1]["mistakes"] == "epsilon outside the root"
    assert "no_such_module" in rows[2]["problem"]
    assert rows[0]["student"] == "'=evil()"


def test_the_address_of_the_book_is_given_where_it_is_known(
    reports: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "(book/rmsnorm.ipynb)" in as_text(reports[1])
    monkeypatch.setenv("BOOK_URL", "https://example.org/book-site/")
    again = grade("rmsnorm", reports[1].file)
    assert "(https://example.org/book-site/book/rmsnorm.html)" in as_text(again)


# The command


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = command_line.main(["grade", *arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_exit_status_and_files(reports: list[Report], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    junit, results = tmp_path / "junit.xml", tmp_path / "results.json"
    right, wrong = str(SOLUTIONS / "rmsnorm.py"), reports[1].file
    assert run("rmsnorm", right, "--junit", str(junit), "--gradescope", str(results), capsys=capsys)[0] == 0
    assert ElementTree.parse(junit).getroot().tag == "testsuites"
    assert json.loads(results.read_text())["score"] == 8
    status, out, _ = run("rmsnorm", wrong, "--json", capsys=capsys)
    assert (status, json.loads(out)["points"]) == (1, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["norm", "x.py"], "PART is 'norm'; wanted one of rmsnorm, rope, mla, decoding"),
        (["rmsnorm"], "the command is 'without PART and FILE'; wanted both, or --all FOLDER"),
        (["rmsnorm", "no_such.py"], "file is 'no_such.py'; wanted a Python file"),
        (["rmsnorm", "book/rmsnorm.ipynb"], "file is 'book/rmsnorm.ipynb'; wanted a Python file"),
        (["--all", "no_such"], "--all is 'no_such'; wanted a folder"),
        (["rmsnorm", "x.py", "--csv"], "--csv is True; wanted --all FOLDER beside it"),
        (["--all", "book", "--gradescope", "x"], "--gradescope is 'x'; wanted one FILE"),
        (["rmsnorm", "README.md", "--seconds", "0"], "seconds is 0; wanted 1 or more"),
    ],
)
def test_bad_usage_is_said_in_a_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    status, out, error = run(*arguments, capsys=capsys)
    assert (status, out) == (2, "")
    assert error.count("\n") == 1
    assert said in error


def test_a_folder_of_submissions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """In folders of students, or with their names in front, as course systems pack them."""
    right = (SOLUTIONS / "rmsnorm.py").read_text()
    wrong = planted(right, PLANTED["rmsnorm"]["epsilon left out"])
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "rmsnorm.py").write_text(right)
    (tmp_path / "ann" / "balance.py").write_text("import torch")
    (tmp_path / "ann" / "notes.py").write_text("import torch")
    (tmp_path / "bob_4711_rmsnorm.py").write_text(wrong)
    status, out, _ = run("--all", str(tmp_path), "--csv", capsys=capsys)
    rows = list(csv.DictReader(io.StringIO(out)))
    found = [(row["student"], row["part"], row["points"], row["mistakes"]) for row in rows]
    assert status == 1
    assert found == [
        ("ann", "balance", "0", ""),
        ("ann", "rmsnorm", "8", ""),
        ("bob_4711", "rmsnorm", "2", "epsilon left out"),
    ]
    status, out, _ = run("rmsnorm", "--all", str(tmp_path / "ann"), capsys=capsys)
    assert out.count("rmsnorm: ") == 3


def test_the_grader_works_from_the_command_line_alone(tmp_path: Path) -> None:
    """In a process of its own, in another folder, and it leaves no process behind."""
    command = [sys.executable, "-m", "dsv2_ref", "grade", "rmsnorm", str(SOLUTIONS / "rmsnorm.py")]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("rmsnorm: ")
    assert "8 of 8 points, passed" in done.stdout
