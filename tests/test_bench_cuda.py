"""The benchmark for GPUs, on the CPU at toy sizes: what it says follows from what it measured, and nothing is invented."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import cuda, gpu, work
from dsv2_ref import DeepseekV2ForCausalLM, accounting
from dsv2_ref.quantize import KINDS
from dsv2_ref.records import Record
from tests.peers import SMALL

pytestmark = pytest.mark.usefixtures("as_shipped")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(work, "CONFIG", replace(SMALL, num_experts_per_tok=2))
    monkeypatch.setattr(work, "MODEL", replace(SMALL, num_experts_per_tok=2))
    with torch.no_grad():
        yield


def sizes(name: str) -> Any:
    """The works of the table, small enough for a test."""
    return {
        "attention-decode": lambda dtype: cuda._from_work(work.attention_decode(dtype, 20)),
        "attention-decode-batch": lambda dtype: cuda._from_work(work.attention_decode(dtype, 20, batch=3)),
        "attention-prefill": lambda dtype: cuda._from_work(work.attention_prefill(dtype, 12)),
        "experts-decode": lambda dtype: cuda._from_work(work.experts(dtype, 1)),
        "experts-prefill": lambda dtype: cuda._from_work(work.experts(dtype, 9)),
        "layer-decode": lambda dtype: cuda._from_work(work.layer(dtype, 1, 20)),
        "layer-prefill": lambda dtype: cuda._from_work(work.layer(dtype, 12, 12)),
        "add-rmsnorm": lambda dtype: cuda._add_rmsnorm(dtype, 5),
        "rotation": lambda dtype: cuda._rotation(dtype, 5),
        "attend-decode": lambda dtype: cuda._attend_decode(dtype, 3, 20),
        "sdpa-backends": lambda dtype: cuda._sdpa_backends(dtype, 9),
    }[name]


NAMES = [
    "add-rmsnorm",
    "rotation",
    "attention-decode",
    "attention-decode-batch",
    "attention-prefill",
    "experts-decode",
    "experts-prefill",
    "layer-decode",
    "layer-prefill",
]


def test_the_kernel_is_timed_by_batch_whether_or_not_the_layer_would_choose_it(small: None) -> None:
    assert {f"attend-decode-{batch}" for batch in (1, 8, 32, 64, 128)} <= cuda.CONTESTS.keys()
    row = cuda.measure(sizes("attend-decode")(torch.float32), torch.float32, gpu.from_python, rounds=1)
    names = ["ours, kernel", "without kernels, products", "tile, narrow blocks", "tile, wide blocks"]
    assert list(row["seconds"]) == names
    assert f"attend-decode-16-heads-{64}" in cuda.CONTESTS
    assert len(cuda.notes([row])) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_experts_in_fewer_bits_are_timed_against_the_same_weights(kind: str, small: None) -> None:
    assert f"experts-decode-{kind}" in cuda.CONTESTS
    contest = cuda._experts_in_fewer_bits(torch.float32, kind, 3)
    row = cuda.measure(contest, torch.float32, gpu.from_python, rounds=1)
    assert row["wrong"] == {}
    assert list(row["seconds"]) == [f"ours, {kind}", "without kernels, float32"]
    one = work.CONFIG.hidden_size * work.CONFIG.moe_intermediate_size * 3
    assert contest.flops == 2 * one * 3 * work.CONFIG.num_experts_per_tok
    bits = {"int4": 4, "int8": 8, "fp8": 8}[kind]
    least = work.CONFIG.num_experts_per_tok * one * bits / 8
    dense = 3 * work.CONFIG.num_experts_per_tok * one * 4  # of three tokens whose choices all differ
    assert least < contest.nbytes < dense


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_a_cache_in_fewer_bits_is_timed_against_its_tokens(format: str, small: None) -> None:
    assert f"attend-decode-{format}" in cuda.CONTESTS
    contest = cuda._attend_records(torch.float32, format, 3, 20)
    row = cuda.measure(contest, torch.float32, gpu.from_python, rounds=1)
    assert row["wrong"] == {}
    names = ["ours, kernel", "without kernels, float32 cache", "without kernels, tokens made anew"]
    assert list(row["seconds"]) == names
    assert contest.nbytes == 3 * 20 * sum(
        Record(format, SMALL.kv_lora_rank, SMALL.qk_rope_head_dim, torch.float32).parts
    )


@pytest.mark.parametrize("kind", [None, "int8"])
def test_a_token_of_a_whole_model_is_timed(kind: str | None, small: None) -> None:
    assert f"model-decode{'-' * bool(kind)}{kind or ''}" in cuda.CONTESTS
    contest = cuda._model_decode(torch.float32, kind)
    row = cuda.measure(contest, torch.float32, gpu.from_python, rounds=1)
    assert row["wrong"] == {}
    assert list(row["seconds"]) == ["ours, as a graph", "ours, from Python", "without kernels, as a graph"]
    model = DeepseekV2ForCausalLM.random(work.MODEL, kind, dtype=torch.float32)
    whole = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    assert 0 < contest.nbytes - accounting.cache_bytes(work.MODEL, 257, "float32") < whole


def test_backends_are_timed_and_one_that_cannot_is_left_out(small: None) -> None:
    """A CPU has flash alone, and that only for values as wide as keys."""
    row = cuda.measure(sizes("sdpa-backends")(torch.float32), torch.float32, gpu.from_python, rounds=1)
    assert row["wrong"] == {}
    assert list(row["seconds"]) == ["ours, sdpa", "backend, flash, padded"]
    assert len(row["not_measured"]) == 5
    assert not cuda.failed([row])
    assert any("backend, flash, padded: " in line and line.endswith(" ms") for line in cuda.notes([row]))


@pytest.mark.parametrize("name", NAMES)
def test_all_contestants_of_a_work_compute_the_same(name: str, small: None) -> None:
    contest = sizes(name)(torch.float32)
    row = cuda.measure(contest, torch.float32, gpu.from_python, rounds=1)
    assert row["wrong"] == {}
    for failed in row["not_measured"]:
        assert failed in ("flash-attn, flash_attention_2", "transformers, grouped_mm"), row["not_measured"]
    assert row["seconds"].keys() == row["seconds_from_python"].keys()
    tried = row["seconds"] | row["not_measured"]
    assert ("flash-attn, flash_attention_2" in tried) == (name == "attention-prefill")
    judged = cuda.judge(row, peak=1e9, bandwidth=1e9)
    assert {"ours", "without kernels"} <= judged["best"].keys()
    assert ("transformers" in judged["best"]) == (name not in ("add-rmsnorm", "rotation"))
    assert row["bytes"] > 0
    assert (row["flops"] > 0) == (name not in ("add-rmsnorm", "rotation"))


def contest(**contestants: dict[str, cuda.Step]) -> cuda.Contest:
    return cuda.Contest("sum", {name.replace("_", " "): steps for name, steps in contestants.items()}, 400, 100)


def missing() -> Tensor:
    raise ImportError("flash_attention_2 needs the flash-attn package\nand a GPU")


ONE = torch.ones(4)


def test_what_is_wrong_is_said_and_never_timed() -> None:
    made = contest(
        ours={"a": lambda: ONE},
        transformers={"b": lambda: ONE * 1.1, "c": lambda: ONE * float("nan")},
        flash_attn={"d": missing},
    )
    row = cuda.judge(cuda.measure(made, torch.bfloat16, lambda step: 1.0, rounds=1), 1.0, 1.0)
    assert list(row["seconds"]) == ["ours, a"]
    assert set(row["wrong"]) == {"transformers, b", "transformers, c"}
    assert row["not_measured"] == {"flash attn, d": "ImportError: flash_attention_2 needs the flash-attn package"}
    assert row["times_faster_than"] == {}
    said = "\n".join(cuda.notes([row]))
    assert "transformers, b is WRONG, by 0.1" in said
    assert "transformers, c is WRONG, not finite" in said
    assert "flash attn, d not measured: ImportError" in said


class OutOfResourcesError(Exception):
    """As Triton's, which is none of Python's own kinds."""


def test_results_that_are_not_finite_and_errors_of_any_kind_end_one_contestant_alone() -> None:
    def fails(error: Exception) -> cuda.Step:
        def step() -> Tensor:
            raise error

        return step

    made = contest(
        ours={
            "nan": lambda: ONE * float("nan"),
            "resources": fails(OutOfResourcesError("shared memory")),
            "a": lambda: ONE,
        },
        transformers={"b": fails(TypeError("an unexpected keyword argument")), "c": lambda: ONE},
    )
    row = cuda.judge(cuda.measure(made, torch.bfloat16, lambda step: 1.0, rounds=1), 1.0, 1.0)
    assert list(row["seconds"]) == ["ours, a", "transformers, c"]
    assert row["wrong"] == {"ours, nan": None}
    assert row["not_measured"] == {
        "ours, resources": "OutOfResourcesError: shared memory",
        "transformers, b": "TypeError: an unexpected keyword argument",
    }
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize(
    ("wrong", "missing", "failed"),
    [
        (
            {},
            {"transformers, a": "TypeError", "flash-attn, b": "ImportError", "ours, c": "OutOfMemoryError: 3 GiB"},
            False,
        ),
        ({}, {"without kernels, a": "TypeError"}, True),
        ({}, {"all": "ValueError: no such size"}, True),
        ({"transformers, a": None}, {}, True),
    ],
)
def test_the_command_fails_for_what_is_wrong_and_for_errors_of_ours(
    wrong: dict[str, Any], missing: dict[str, str], failed: bool
) -> None:
    fine: dict[str, Any] = {"wrong": {}, "not_measured": {}}
    assert cuda.failed([fine, {"wrong": wrong, "not_measured": missing}]) == failed


def test_rates_shares_and_ratios_follow_from_the_times() -> None:
    times = {
        "ours, a": 4.0,
        "ours, b": 2.0,
        "without kernels, a": 3.0,
        "transformers, sdpa": 8.0,
        "transformers, e": 9.0,
    }
    row = {"work": "w", "flops": 400, "bytes": 100, "seconds": times, "seconds_from_python": times}
    judged = cuda.judge(row | {"not_measured": {}, "wrong": {}}, peak=1000.0, bandwidth=100.0)
    assert judged["best"] == {
        "ours": "ours, b",
        "without kernels": "without kernels, a",
        "transformers": "transformers, sdpa",
    }
    assert (judged["flops_per_second"], judged["bytes_per_second"]) == (200, 50)
    assert judged["share_of_peak"] == 0.5  # a second for the bytes, 0.4 for the operations
    assert judged["times_faster_than"] == {"without kernels": 1.5, "transformers": 4.0}
    title, _, line = cuda.table([judged]).splitlines()
    assert title.count("|") == line.count("|")
    assert [cell.strip() for cell in line.split("|")][1:-1] == [
        "w", "2000.000", "2000.000", "0.0", "0", "50 %", "1.50", "4.00", "",
    ]  # fmt: skip


def test_a_work_without_memory_is_left_out_and_the_others_run(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(dtype: torch.dtype) -> cuda.Contest:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 300.00 GiB.")

    monkeypatch.setitem(cuda.CONTESTS, "layer-decode", full)
    monkeypatch.setitem(cuda.CONTESTS, "rotation", sizes("rotation"))
    figures = cuda.run(["layer-decode", "rotation"], "cpu", torch.float32, 1, gpu.from_python)
    assert json.loads(json.dumps(figures)) == figures
    cuda.print_figures(figures)
    said = capsys.readouterr().out
    assert "| layer-decode | not measured" in said
    assert "layer-decode: all not measured: OutOfMemoryError: CUDA out of memory. Tried to allocate 300.00 GiB." in said
    assert "| rotation of queries, 5 tokens | " in said
    assert figures["peak_flops"] > 0
    assert len({line.count("|") for line in said.splitlines() if line.startswith("|")}) == 1


def test_samples_leave_out_the_first_calls() -> None:
    times = iter([100.0, 50.0, 3.0, 1.0, 2.0])
    assert gpu.samples(lambda: None, lambda work: next(times), rounds=3) == 2.0


def test_without_a_gpu_it_says_so_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.main(["--json", str(tmp_path / "figures.json")]) == 1
    streams = capsys.readouterr()
    assert (streams.out, streams.err) == ("", "make bench-cuda: torch sees no CUDA GPU here\n")
    assert not (tmp_path / "figures.json").exists()
