"""The grader: right work passes, each known mistake is named, and nothing a submission does spoils the report."""

import csv
import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from dsv2_ref import __main__ as command_line
from dsv2_ref.grading import PARTS, Report, grade, runner
from dsv2_ref.grading.formats import as_csv, as_gradescope, as_json, as_junit, as_text
from dsv2_ref.grading.report import CHAPTERS, ROUNDING, ROUNDING_OF_FLOAT32, cost_of, distance, expected
from tests.planted_in_solutions import BOTH_AT_ONCE, CAUSAL, LOOP, PLANTED, SORTED, planted

pytestmark = pytest.mark.slow

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


TWO = [
    ("mla", "temperature left out", "the norm on the query's latent left out"),
    ("decoding", "scores divided by the root of C + R, the absorbed width", "temperature left out"),
    ("decoding", "positions restart in each call", "theta is 10000, whatever rope_theta is"),
    ("gate", "softmax after top-k", "groups judged by the sum of all their experts"),
    ("gate", "group limit left out where topk_method is noaux_tc", "norm_topk_prob ignored"),
    (
        "experts",
        "routed_scaling_factor applied again: the gate has done so",
        "shared experts scaled by routed_scaling_factor",
    ),
    ("balance", "counts over T, not over k T", "P over the chosen experts alone"),
    ("balance", "summed over the sequences, not averaged", "alpha left out"),
    ("layer", "the first norm left out", "the second norm left out"),
    ("layer", "nothing added to what attention returns", "nothing added to what the feed-forward part returns"),
]


@pytest.mark.parametrize(("part", "one", "other"), TWO, ids=name_of)
def test_two_mistakes_at_once_are_both_named(part: str, one: str, other: str, submit: Submit) -> None:
    source = (SOLUTIONS / f"{part}.py").read_text()
    for mistake in (one, other):
        source = planted(source, PLANTED[part][mistake])
    assert {named.name for named in submit(part, source).mistakes} == {one, other}


def test_of_mistakes_that_look_alike_where_they_show_the_one_that_claims_least_is_named(submit: Submit) -> None:
    """The limit is left out in one of two ways to choose; what is wrong with the other is unknown."""
    mistake = "group limit left out where topk_method is group_limited_greedy"
    source = planted((SOLUTIONS / "gate.py").read_text(), PLANTED["gate"][mistake])
    report = submit(
        "gate", source.replace("scores if bias is None else scores + bias", "scores - (0 if bias is None else bias)")
    )
    assert [named.name for named in report.mistakes] == [mistake]


def test_a_cache_of_about_the_size_of_a_known_one_is_not_taken_for_it(submit: Submit) -> None:
    """The latent twice, 72 elements per token; a rope key for each head would make 64."""
    edits = [
        (
            "past = 0 if",
            "C, R = config.kv_lora_rank, self.rope\n        past_key_value = None if past_key_value is None else past_key_value[..., : C + R]\n        past = 0 if",
        ),
        (LAST, "return out, None, torch.cat((cache, cache[..., :C]), dim=-1)"),
    ]
    report = submit("decoding", planted((SOLUTIONS / "decoding.py").read_text(), edits))
    assert report.checks[2].message.startswith("72 elements per token; wanted at most")
    assert report.mistakes == []


ATTENTION = "def __init__(self, config, layer_idx):"
LAST = "return out, None, cache"
FORMS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "a norm of torch's": (
        "rmsnorm",
        [("class DeepseekV2RMSNorm", "class DeepseekV2RMSNorm(torch.nn.RMSNorm):\n    pass\n\nclass Other")],
    ),
    "a tuple": (
        "rmsnorm",
        [("return self.weight * (", "return (self.weight * ("), ("self.eps))", "self.eps)), None)")],
    ),
    "a list": ("rmsnorm", [("return self.weight * (", "return [self.weight * ("), ("self.eps))", "self.eps))]")]),
    "inference mode": ("rmsnorm", [("    def forward", "    @torch.inference_mode()\n    def forward")]),
    "no forward": ("rmsnorm", [("def forward", "def __call__")]),
    "arguments by name only": ("rmsnorm", [("(self, hidden_size, eps=1e-6)", "(self, *, hidden_size, eps)")]),
    "arguments in another order": ("mla", [(ATTENTION, "def __init__(self, layer_idx, config):")]),
    "arguments with other names": ("mla", [(ATTENTION, "def __init__(self, cfg, i):\n        config = cfg")]),
    "torch's attention": (
        "mla",
        [
            (
                "out = weights @ value",
                "out = torch.nn.functional.scaled_dot_product_attention("
                "query, key, value, is_causal=True, scale=self.scale)",
            )
        ],
    ),
    "einsum": (
        "mla",
        [("query @ key.transpose(-1, -2)", "torch.einsum('bhsd,bhtd->bhst', query, key)")],
    ),
    "a mask that is kept": (
        "mla",
        [
            (
                CAUSAL,
                "self.register_buffer('mask', torch.ones(S, S, dtype=torch.bool).tril())\n        causal = self.mask",
            )
        ],
    ),
    "functions with other names for what they take": (
        "rope",
        [
            (
                "def apply_rotary(q_pe, k_pe, cos, sin):",
                "def apply_rotary(q, k, c, s):\n    q_pe, k_pe, cos, sin = q, k, c, s",
            ),
            ("scaling.mscale_all_dim) ** 2", "scaling.mscale_all_dim) ** 2 * torch.ones(())"),
        ],
    ),
    "a temperature of NumPy's": (
        "rope",
        [
            ("import math\n", "import math\nfrom fractions import Fraction\n\nimport numpy\n"),
            ("return 1.0", "return Fraction(1)"),
            (
                "return mscale(scaling.factor, scaling.mscale_all_dim) ** 2",
                "m = mscale(scaling.factor, scaling.mscale_all_dim)\n    return numpy.float32(m**2)",
            ),
        ],
    ),
    "a module under two names": (
        "mla",
        [("        temperature = ", "        self.up = self.kv_b_proj\n        temperature = ")],
    ),
    "choices in another order": (
        "gate",
        [("return topk_idx, topk_weight, None", "return topk_idx.flip(-1), topk_weight.flip(-1)")],
    ),
    "choices by sequence": (
        "gate",
        [("return topk_idx, topk_weight, None", "return topk_idx[None].int(), topk_weight[None], None")],
    ),
    "a cache in a dict": (
        "decoding",
        [
            ("past_key_value.shape", "past_key_value['rows'].shape"),
            ("(past_key_value, cache)", "(past_key_value['rows'], cache)"),
            (LAST, "return out, {'rows': cache}"),
        ],
    ),
    "a cache of single rows": (
        "decoding",
        [
            ("past_key_value.shape[1]", "len(past_key_value)"),
            (
                "torch.cat((past_key_value, cache), dim=1)",
                "torch.cat((torch.stack(past_key_value, dim=1), cache), dim=1)",
            ),
            (LAST, "return out, None, list(cache.unbind(1))"),
        ],
    ),
    "room for all tokens made at once": (
        "decoding",
        [
            ("past_key_value.shape[1]", "past_key_value[1]"),
            (
                "cache = torch.cat((past_key_value, cache), dim=1)",
                "cache = torch.cat((past_key_value[0][:, :past], cache), dim=1)",
            ),
            (
                LAST,
                "room = cache.new_zeros(B, config.max_position_embeddings, C + R)\n"
                "        room[:, : past + S] = cache\n"
                "        return out, None, (room, past + S)",
            ),
        ],
    ),
    "features brought into half-split order before they turn": (
        "decoding",
        [
            (
                "class DeepseekV2Attention",
                "def turn(x, cos, sin):\n"
                "    x, half = x.unflatten(-1, (-1, 2)).mT.flatten(-2), x.shape[-1] // 2\n"
                "    other = torch.cat((-x[..., half:], x[..., :half]), dim=-1)\n"
                "    return x * torch.cat((cos, cos), dim=-1) + other * torch.cat((sin, sin), dim=-1)\n\n\n"
                "class DeepseekV2Attention",
            ),
            ("apply_rotary(q_pe, k_pe, cos, sin)", "turn(q_pe, cos[:, None], sin[:, None]), turn(k_pe, cos, sin)"),
        ],
    ),
    "choices sorted by expert": ("experts", [(LOOP, SORTED.format("made[order.argsort()]"))]),
    "a bias that is a parameter": (
        "gate",
        [
            (
                'self.register_buffer("e_score_correction_bias", bias)',
                "self.e_score_correction_bias = None if bias is None else nn.Parameter(bias)",
            )
        ],
    ),
    "a cache in the module": (
        "decoding",
        [
            ("past_key_value.shape", "self.cache.shape"),
            ("(past_key_value, cache)", "(self.cache, cache)"),
            (LAST, "self.cache = cache\n        return out, 'mine'"),
        ],
    ),
    "a cache that holds its module": (
        "decoding",
        [
            ("past_key_value.shape", "past_key_value[0].shape"),
            ("(past_key_value, cache)", "(past_key_value[0], cache)"),
            (LAST, "return out, None, (cache, self)"),
        ],
    ),
    "tables and masks that are kept": (
        "decoding",
        [(LAST, f"self.kept = torch.ones(512, 512)\n        {LAST}")],
    ),
    "the same place for every output": (
        "decoding",
        [
            (
                LAST,
                "self.out = getattr(self, 'out', out.new_zeros(out.shape))\n"
                "        out = self.out.resize_(out.shape).copy_(out)\n"
                f"        {LAST}",
            )
        ],
    ),
    "the published arguments": (
        "decoding",
        [
            (
                "hidden_states, past_key_value=None, use_cache=False",
                "hidden_states, attention_mask=None, position_ids=None, past_key_value=None, use_cache=False, **kwargs",
            )
        ],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_right_passes_whatever_its_form(form: str, submit: Submit) -> None:
    part, edits = FORMS[form]
    report = submit(part, planted((SOLUTIONS / f"{part}.py").read_text(), edits))
    assert report.passed, as_text(report)


def test_a_cache_that_the_module_keeps_is_counted(submit: Submit) -> None:
    edits = FORMS["a cache in the module"][1]
    source = planted((SOLUTIONS / "decoding.py").read_text(), edits)
    report = submit(
        "decoding", source.replace("self.cache = cache", "self.cache, self.more = cache, cache.repeat(1, 1, 4)")
    )
    assert [check.name for check in report.checks if not check.passed] == ["elements per token in the cache"]


HOLDERS = {
    "slots": "class Cache:\n    __slots__ = ('__rows', '__dict__')\n\n    def __init__(self, rows): self.__rows = rows\n\n    def __getitem__(self, _): return self.__rows[0]",
    "a dataclass with slots": "import dataclasses\n@dataclasses.dataclass(slots=True)\nclass Cache:\n    rows: tuple\n\n    def __getitem__(self, _): return self.rows[0]",
    "a deque": "from collections import deque as Cache",
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_cache_is_counted_whatever_holds_it(holder: str, submit: Submit) -> None:
    edits = [
        ("past_key_value.shape", "past_key_value[0].shape"),
        ("(past_key_value, cache)", "(past_key_value[0], cache)"),
        ("class DeepseekV2Attention", f"{HOLDERS[holder]}\n\n\nclass DeepseekV2Attention"),
    ]
    source = planted((SOLUTIONS / "decoding.py").read_text(), edits)
    right = submit("decoding", source.replace(LAST, "return out, None, Cache((cache,))"))
    assert right.passed, as_text(right)
    wrong = submit("decoding", source.replace(LAST, "return out, None, Cache((cache, cache.repeat(1, 1, 4)))"))
    assert [check.name for check in wrong.checks if not check.passed] == ["elements per token in the cache"]


def test_a_cache_of_numpys_arrays_is_counted(submit: Submit) -> None:
    edits = [
        ("import torch\n", "import numpy\nimport torch\n"),
        ("(past_key_value, cache)", "(torch.from_numpy(past_key_value[0]), cache)"),
    ]
    edits += [
        ("past_key_value.shape", "past_key_value[0].shape"),
        (LAST, "return out, None, [cache.numpy(), numpy.int64(past)]"),
    ]
    source = planted((SOLUTIONS / "decoding.py").read_text(), edits)
    assert submit("decoding", source).passed
    wrong = submit("decoding", source.replace("numpy.int64(past)", "cache.repeat(1, 1, 4).numpy()"))
    assert [check.name for check in wrong.checks if not check.passed] == ["elements per token in the cache"]


def test_the_median_is_not_the_mean(submit: Submit) -> None:
    source = (SOLUTIONS / "balance.py").read_text()
    report = submit("balance", source.replace("load.double().mean()", "load.double().median()"))
    assert [check.name for check in report.checks if not check.passed] == ["the bias after a step"]


def test_angles_in_float32_pass(submit: Submit) -> None:
    """As in published code."""
    source = (SOLUTIONS / "rope.py").read_text()
    old = "angles = position_ids[..., None].to(dtype) * frequencies"
    report = submit("rope", source.replace(old, "angles = (position_ids[..., None] * frequencies.float()).to(dtype)"))
    assert report.passed, as_text(report)
    assert report.notes == ["some step is computed in float32, though its input is float64"]


def test_a_row_that_sees_nothing_is_named_though_it_is_nan(submit: Submit) -> None:
    mistake = "a token does not see itself"
    for part in ("mla", "decoding"):
        source = planted((SOLUTIONS / f"{part}.py").read_text(), PLANTED[part][mistake])
        for hidden in (
            source.replace(".nan_to_num()", ""),
            source.replace("-torch.inf", "torch.finfo(scores.dtype).min"),
        ):
            report = submit(part, hidden)
            assert [named.name for named in report.mistakes] == [mistake]
            assert 0 < report.mistakes[0].effect < 10


def test_a_mistake_that_fails_on_some_sizes_is_named(submit: Submit) -> None:
    source = (SOLUTIONS / "mla.py").read_text()
    report = submit("mla", source.replace("k_nope, value = kv.split", "value, k_nope = kv.split"))
    assert [named.name for named in report.mistakes] == ["the up-projections of keys and values exchanged"]
    assert "RuntimeError" in report.checks[1].message


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
    "an encoding that is none": (b"# -*- coding: klingon -*-", "SyntaxError: unknown encoding: klingon"),
    "no class": ("def DeepseekV2RMSNorm(n, eps): pass", "DeepseekV2RMSNorm is a function; wanted a class"),
    "sys.exit": ("import sys; sys.exit(0)", "it calls sys.exit(0)"),
    "os._exit": ("import os; os._exit(0)", "its process ended with exit status 0 before it had answered"),
    "a crash": ("import ctypes; ctypes.string_at(0)", "it crashed: its process ended with SIGSEGV"),
    "a null byte": (b"x = 1\x00", "source code"),
    "a character that no text may hold": ("raise ValueError('\\ud800 mine')", "ValueError: ? mine"),
    "an error whose name looks like a report": (
        "raise type('E\\n  ok    8/8  all', (Exception,), {})('mine')",
        "E ok 8/8 all: mine",
    ),
    "its own file removed": ("import os; os.remove(__file__); raise ValueError('mine')", "ValueError: mine"),
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
    assert "line 0" not in as_text(report)
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
    "a sparse tensor": (
        "right = right.to_sparse()",
        "output is a tensor of layout torch.sparse_coo; wanted a dense one",
    ),
    "a nested tensor": (
        "right = torch.nested.nested_tensor([x[0], x[1, :2]] if x.shape[0] == 2 else [x[0]])",
        "output is a nested tensor; wanted a dense one",
    ),
    "a tensor of 8 bits": (
        "right = right.to(torch.float8_e4m3fn)",
        "output is torch.float8_e4m3fn; wanted the dtype of the input",
    ),
    "a complex tensor": ("right = right + 0j", "output is torch.complex128; wanted torch.float64, as the input"),
    "a tensor of no room": ("right = right.new_zeros(1).expand(2**40)", "output is (1099511627776,): far too large"),
    "a large tensor": ("right = torch.zeros(2**24)", "output is (16777216,): far too large"),
    "huge values": ("right = right * 1e200", "output 1e+302% off"),
    "a generator": ("yield right", "forward returned a generator; wanted a tensor"),
    "a dict": (
        "right = {'output': right}",
        "forward returned a dict; wanted a tensor, or a tuple that begins with one",
    ),
    "a tuple of nothing": ("right = ()", "forward returned a tuple of nothing; wanted"),
    "an assertion": ("assert right is None", "AssertionError"),
    "not written": ("raise NotImplementedError", "not written yet"),
    "a list without end": ("[0] * 10**12", "it takes more memory than it may (MemoryError"),
    "a signal without a name": ("os.kill(os.getpid(), 40)", "it crashed: its process ended with signal 40"),
    "torch spoilt": ("torch.is_grad_enabled = None", "TypeError: 'NoneType' object is not callable"),
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
    "the package's own loaded again": (
        "import importlib, dsv2_ref.rmsnorm as m; right = importlib.reload(m).DeepseekV2RMSNorm(48)(x)",
        BORROWED,
    ),
    "the package's own as a text": (
        "import dsv2_ref.rmsnorm as m; exec(open(m.__file__).read())",
        f"it reads dsv2_ref/rmsnorm.py; {BORROWED}",
    ),
    "the package's own as a source": (
        "import inspect, dsv2_ref; exec(inspect.getsource(dsv2_ref.DeepseekV2RMSNorm))",
        "OSError",
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
    for written in (as_json(report), as_junit([report]), as_gradescope(report)):
        assert "Infinity" not in written
    assert report.problem == ""
    assert not report.passed
    assert wanted in report.checks[0].message
    check_text(as_text(report), submit.folder)


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.use_deterministic_algorithms(True); torch.manual_seed(1)\n" + NORM.format(""),
        "import torch; torch.set_default_dtype(torch.float16)\n" + NORM.format(""),
        NORM.format("torch.set_default_dtype(torch.float16)"),
    ],
)
def test_what_is_right_passes_with_a_note_on_what_it_changes_for_others(source: str, submit: Submit) -> None:
    report = submit("rmsnorm", source)
    assert report.passed, as_text(report)
    (note,) = report.notes
    assert re.match(r"it changes torch's (default dtype|deterministic algorithms) to .+, for all code", note)


SPOILS = {
    "its folder": "[os.remove(name) for name in os.listdir('.')]",
    "torch": "torch.save = os._exit = os.replace = None",
    "what it prints to": "sys.stdout = sys.stderr = None; os.closerange(0, 3)",
    "processes": "os.fork()",
    "threads": "import threading; threading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()",
}


@pytest.mark.parametrize("what", SPOILS)
def test_what_a_submission_spoils_is_its_own(what: str, submit: Submit) -> None:
    for source in (NORM.format(SPOILS[what]), f"import os, sys, torch\n{SPOILS[what]}\n{NORM.format('')}"):
        report = submit("rmsnorm", source)
        assert report.passed, as_text(report)


WRITTEN = {
    "no texts": "torch.save({'error': ''}, f'{there}/import.pt'), [torch.save({'answers': {'output': 'right'}, "
    "'notes': [None, 1]}, f'{there}/{n}.pt') for n in range(4)]",
    "no tensors by name": "torch.save({'error': ''}, f'{there}/import.pt'), "
    "[torch.save({'answers': [1]}, f'{there}/{n}.pt') for n in range(4)]",
    "tensors that cannot be compared": "torch.save({'error': ''}, f'{there}/import.pt'), [torch.save({'answers': "
    "{'output': torch.zeros(2, 5, 48).to_sparse()}}, f'{there}/{n}.pt') for n in range(4)]",
    "an error that is a number": "torch.save({'error': 7}, f'{there}/import.pt')",
    "nothing of an import": "torch.save({'answers': {}}, f'{there}/import.pt')",
    "pipes": "os.mkfifo(f'{there}/import.pt'), os.remove(f'{there}/printed'), os.mkfifo(f'{there}/printed')",
    "a folder": "os.mkdir(f'{there}/import.pt'), os.remove(f'{there}/printed'), os.mkdir(f'{there}/printed')",
}


@pytest.mark.parametrize("what", WRITTEN)
def test_what_a_submission_writes_where_answers_belong_gives_no_points(what: str, submit: Submit) -> None:
    source = f"import os, torch\nthere = os.path.dirname(os.getcwd())\n{WRITTEN[what]}\nos._exit(0)\n"
    report = submit("rmsnorm", source)
    assert (report.points, report.passed) == (0, False)
    check_text(as_text(report), submit.folder)


def test_the_next_submission_is_graded_though_one_ends_the_grader(submit: Submit) -> None:
    submit("rmsnorm", NORM.format("os.kill(os.getppid(), 9)"))
    assert submit("rmsnorm", NORM.format("")).passed


def test_a_terminal_shows_the_report_and_not_what_was_printed_over_it(submit: Submit) -> None:
    report = submit("rmsnorm", NORM.format("print('\\x1b[2J\\rrmsnorm: 8 of 8 points, passed'); right = None"))
    text = as_text(report)
    assert not re.search(r"[^\n -~]", text)
    assert text.splitlines()[0].endswith("work.py: 0 of 8 points, not passed")


WATCHED = """
import sys
forward = DeepseekV2RMSNorm.forward

def watched(self, hidden_states):
    print("torch._dynamo" in sys.modules)
    return forward(self, hidden_states)

DeepseekV2RMSNorm.forward = watched
"""


def test_nobody_waits_for_the_compiler_of_torch(submit: Submit) -> None:
    """Which takes longer to import than most submissions take to run, and which few parts need."""
    runner.stop()  # an earlier submission may have needed it
    report = submit("rmsnorm", (SOLUTIONS / "rmsnorm.py").read_text() + WATCHED)
    assert report.passed
    assert set(report.printed.split()) == {"False"}


def test_what_is_set_as_it_always_is_changes_nothing(submit: Submit) -> None:
    report = submit("rmsnorm", "import torch\ntorch.set_default_dtype(torch.float32)\n" + NORM.format(""))
    assert report.passed
    assert report.notes == []


@pytest.mark.parametrize("what", ["right = right > 0", "right = right / 0", "right = right.float()"])
def test_no_mistake_is_named_for_what_resembles_it_by_accident(what: str, submit: Submit) -> None:
    """All mistakes agree on a token of zeros."""
    report = submit("rmsnorm", NORM.format(what))
    assert not report.passed
    assert report.mistakes == []


def test_a_hang_is_ended(submit: Submit) -> None:
    for what in ("while True: pass", "time.sleep(1000)"):
        report = submit("rmsnorm", NORM.format(what), seconds=8)
        assert report.checks[0].message == "it was ended after the limit of 8 seconds"
        assert report.points == 0


def test_what_a_submission_started_is_ended_too(submit: Submit) -> None:
    seconds = f"1234.{os.getpid()}"  # no other run of these tests waits for as long
    source = "import subprocess, sys\n" + NORM.format(f"subprocess.Popen(['sleep', '{seconds}'])")
    assert submit("rmsnorm", source).passed
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert seconds.encode() not in status.read_bytes()
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


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("topk_weight, topk_idx", "topk_idx holds torch.float64 values; wanted whole numbers from 0 to 15"),
        ("topk_idx * 0 - 1, topk_weight", "topk_idx holds -1 to -1; wanted 0 to 15"),
        ("topk_idx, topk_weight + 0j", "topk_weight holds torch.complex128 values; wanted torch.float64, as the input"),
        ("topk_idx, topk_weight.int()", "topk_weight holds torch.int32 values; wanted torch.float64, as the input"),
    ],
)
def test_choices_and_weights_of_other_kinds(returned: str, said: str, submit: Submit) -> None:
    source = (SOLUTIONS / "gate.py").read_text()
    report = submit("gate", source.replace("return topk_idx, topk_weight, None", f"return {returned}, None"))
    assert report.checks[0].message == said
    assert report.printed == ""
    assert report.points == 0


def test_a_class_that_is_no_module(submit: Submit) -> None:
    report = submit("rmsnorm", "class DeepseekV2RMSNorm:\n    def __init__(self, n, eps): pass")
    assert report.checks[0].message == "DeepseekV2RMSNorm makes no torch.nn.Module; wanted a subclass of that"


def test_tables_of_another_dtype(submit: Submit) -> None:
    source = (SOLUTIONS / "rope.py").read_text()
    report = submit("rope", source.replace("return angles.cos() * size", "return angles.cos().float() * size"))
    assert report.checks[0].message == "cosines are torch.float32; wanted the argument dtype, torch.float64"


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


def test_a_norm_of_torchs_without_its_epsilon_is_named(submit: Submit) -> None:
    """Its own epsilon is that of the dtype, which only keeps zeros from being divided by zero."""
    report = submit("rmsnorm", NORM.format("right = nn.functional.rms_norm(x, x.shape[-1:], self.weight)"))
    assert ["its rms_norm without eps" in named.name for named in report.mistakes] == [True]


def test_the_layer_in_numpy_is_not_accepted(submit: Submit) -> None:
    report = submit("rmsnorm", NORM.format("import tests.oracle"))
    assert report.checks[0].message == f"it reads tests/oracle.py; {BORROWED}"


@pytest.mark.parametrize("way", ["grouped_experts", "all_experts"])
def test_a_faster_way_to_compute_the_experts_is_not_accepted(way: str, submit: Submit) -> None:
    begin = STACKED.index("        order = "), STACKED.index("        s = self.shared_experts")
    call = f"        out = products.{way}(self.experts, tokens, topk_idx, topk_weight)\n"
    source = STACKED[: begin[0]] + call + STACKED[begin[1] :]
    report = submit(
        "experts", source.replace("import torch\n", "import torch\nfrom dsv2_ref.fast import products\n", 1)
    )
    assert report.checks[0].message == f"it calls dsv2_ref.fast.products.{way}; {BORROWED}"


@pytest.mark.parametrize("part", ["mla", "decoding"])
@pytest.mark.parametrize("way", ["products.attend_products", "cpu.attend_blocks", "cpu.attend_in_float32"])
def test_a_faster_way_to_compute_attention_is_not_accepted(part: str, way: str, submit: Submit) -> None:
    source = (
        (SOLUTIONS / f"{part}.py")
        .read_text()
        .replace("import torch\n", "import torch\nfrom dsv2_ref.fast import cpu, products\n", 1)
    )
    report = submit(
        part, source.replace("out = weights @", f"{way}(query, key, None, None, self.scale)\n        out = weights @")
    )
    assert report.checks[0].message == f"it calls dsv2_ref.fast.{way}; {BORROWED}"


@pytest.mark.parametrize("part", PLANTED)
def test_the_solution_is_not_accepted(part: str, submit: Submit) -> None:
    report = submit(part, f"from assignments.solutions.{part} import *")
    assert report.problem == f"it reads solutions/{part}.py; {BORROWED}"


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
    one, several = json.loads(as_json(reports[1])), json.loads(as_json(reports))
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
    for name in ("\t=evil()", "\r\n@evil", "＝evil()", "-1+evil\udcff"):
        text = as_csv([(name, reports[0])])
        (row,) = csv.DictReader(io.StringIO(text))
        assert row["student"].startswith("'")
        assert row["student"].isprintable()
        assert len(text.splitlines()) == 2


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
        (["--all", ""], "--all is ''; wanted a folder"),
        (["rmsnorm", "x.py", "--csv"], "--csv is True; wanted --all FOLDER beside it"),
        (["--all", "book", "--gradescope", "x"], "--gradescope is 'x'; wanted one FILE"),
        (["rmsnorm", "README.md", "--seconds", "0"], "seconds is 0; wanted 1 or more"),
        (["rmsnorm", "README.md", "--seconds", "99999999999"], "seconds is 99999999999; wanted 1 or more"),
        (["rmsnorm", "README.md", "--megabytes", "99999999999"], "megabytes is 99999999999; wanted 1 or more"),
        (["--all", "assignments", "--csv", "--json"], "--csv is True; wanted that or --json"),
        (["rmsnorm", "README.md", "--junit", "no_such/x.xml"], "No such file or directory: 'no_such/x.xml'"),
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


def test_a_file_whose_name_begins_with_a_dash_is_told_apart_from_an_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-x.py").write_text((SOLUTIONS / "rmsnorm.py").read_text())
    said = "unrecognized arguments: -x.py; the file is ./-x.py\n"
    assert run("rmsnorm", "-x.py", capsys=capsys) == (2, "", said)
    assert run("rmsnorm", "./-x.py", capsys=capsys)[0] == 0
    assert run("rmsnorm", "-y.py", capsys=capsys) == (2, "", "unrecognized arguments: -y.py\n")


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


def test_every_submission_has_its_line_whatever_lies_beside_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    right = (SOLUTIONS / "rmsnorm.py").read_text()
    folder = tmp_path / ".courses" / "submissions"
    for name in (
        "ann_12_rmsnorm-1.py",
        "Bob (late) RMSNorm (2).py",
        "eve/rmsnorm.py",
        os.fsdecode(b"z\xff/rmsnorm.py"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(right)
    (folder / "dan").mkdir()
    (folder / "dan" / "rmsnorm.py").symlink_to("nowhere")
    (folder / "rmsnorm.py").mkdir()
    (folder / "ivy_rmsnorm.py").symlink_to("eve")
    (folder / "jim").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "rmsnorm.py").write_text(right)
    for name in (".git/layer.py", "__MACOSX/._rmsnorm.py", "venv/lib/python3.11/site-packages/torch/layer.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(right)
    (folder / "gil_rmsnorm.PY").write_text(right)
    for name in (
        "fay/rmsnorm.ipynb",
        "fay/helper.py",
        "data.csv",
        "hal_rope.zip",
        "hal/rope.md",
        "__pycache__/rope.pyc",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    status, out, error = run("--all", str(folder), "--csv", capsys=capsys)
    rows = {row["student"]: row for row in csv.DictReader(io.StringIO(out))}
    assert (status, rows.keys()) == (1, {"ann_12", "Bob (late)", "eve", "z?", "dan", "gil"})
    assert {name for name, row in rows.items() if row["passed"] == "yes"} == rows.keys() - {"dan"}
    assert "wanted a Python file" in rows["dan"]["problem"]
    told = re.findall(r"not graded, as it is no Python file named after a part: (.+)", error)
    assert [Path(path).name for path in told] == ["helper.py", "rmsnorm.ipynb", "hal_rope.zip", "ivy_rmsnorm.py", "jim"]


def test_an_array_for_a_folder_and_an_object_for_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "rmsnorm.py").write_text("import torch")
    assert isinstance(json.loads(run("--all", str(tmp_path), "--json", capsys=capsys)[1]), list)
    assert isinstance(json.loads(run("rmsnorm", str(tmp_path / "rmsnorm.py"), "--json", capsys=capsys)[1]), dict)


def test_gradescope_gets_results_for_a_file_that_is_not_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    results = tmp_path / "results.json"
    status, _, _ = run("rmsnorm", str(tmp_path / "no.py"), "--gradescope", str(results), capsys=capsys)
    found = json.loads(results.read_text())
    assert (status, found["score"], found["tests"][0]["status"]) == (1, 0, "failed")
    assert "no.py'; wanted a Python file" in found["output"]


def test_letters_that_a_terminal_lacks_are_written_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "Łukasz.py"
    path.write_text((SOLUTIONS / "rmsnorm.py").read_text(), encoding="utf-8")
    command = [sys.executable, "-m", "dsv2_ref", "grade", "rmsnorm", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u0141ukasz.py: 8 of 8 points, passed" in done.stdout


def test_the_grader_works_from_the_command_line_alone(tmp_path: Path) -> None:
    """In a process of its own, in another folder, and it leaves no process behind."""
    command = [sys.executable, "-m", "dsv2_ref", "grade", "rmsnorm", str(SOLUTIONS / "rmsnorm.py")]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("rmsnorm: ")
    assert "8 of 8 points, passed" in done.stdout
