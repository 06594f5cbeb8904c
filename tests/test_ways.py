"""The command that lists which way computes each call of a layer, and why."""

from types import SimpleNamespace

import pytest
import torch

from dsv2_ref.__main__ import main
from dsv2_ref.fast.cpu import has_bfloat16

SMALL = ["--preset", "tiny", "--layer", "1"]


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["ways", *SMALL, *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["--dtype", "float32", "--seq", "9"], ["attend sdpa", "RoutedExperts.forward grouped"]),
        (["--dtype", "float32", "--kv", "90"], ["attend products", "not triton decoding: for cuda, not cpu"]),
        (["--kv", "90"], ["attend cpu fused query", "apply_rotary cpu complex"]),
        (["--kv", "900"], ["attend cpu rounded keys" if has_bfloat16() else "attend cpu fused query"]),
        (["--attention", "eager", "--seq", "9"], ["attend definition", "implementation is 'eager', not 'sdpa'"]),
        (
            ["--device", "cuda", "--kv", "90"],
            [
                "apply_rotary triton rotation",
                "attend triton decoding",
                "RoutedExperts.forward triton experts",
                "Ampere generation or newer",
            ],
        ),
        (
            ["--device", "cuda", "--kv", "90", "--weights", "int8", "--cache", "fp8"],
            [
                "quantized_product x 7 triton codes",
                "RoutedExperts.forward triton grouped codes",
                "attend_records triton decoding of records",
            ],
        ),
        (
            ["--device", "cuda", "--seq", "9", "--training"],
            ["attend sdpa", "RoutedExperts.forward grouped", "not cudnn: ", "training"],
        ),
        (
            ["--dtype", "float32", "--kv", "90", "--weights", "int4", "--group", "16", "--cache", "int8"],
            [
                "attend_records cpu records",
                "RoutedExperts.forward chosen experts",
                "quantized_product x 11 cpu float32",  # 4 of attention, 3 of shared experts, 2 of each chosen one
            ],
        ),
        (
            ["--seq", "9", "--weights", "int8", "--cache", "fp8", "--form", "absorbed"],
            ["attend_records definition", "for one query at a time"],
        ),
        (["--seq", "9", "--weights", "int8", "--training"], ["quantized_product", "gives no gradients"]),
    ],
)
def test_the_way_of_each_call(arguments: list[str], lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = " ".join(listed(capsys, *arguments).split())
    for line in lines:
        assert line in found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "tpu"], "device is 'tpu'; wanted cpu or cuda"),
        (["--layer", "9"], "layer_idx is 9; wanted"),
        (["--weights", "int3"], "weights is 'int3'; wanted int8, int4, fp8"),
        (["--kv", "9", "--cache", "fp9"], "format is 'fp9'; wanted None or one of fp8"),
        (["--cache", "fp9"], "format is 'fp9'; wanted None or one of fp8"),
        (["--training", "--kv", "9"], "kv is 9; wanted the 1 new tokens: training has no cache"),
        (["--training", "--cache", "fp8"], "cache is 'fp8'; wanted None: training has no cache"),
        (["--weights", "int4", "--group", "3"], "group is 3; wanted an even number"),
        (["--weights", "int4"], "group is 64; wanted a divisor of 48, the inputs of q_b_proj, such as 16"),
        (["--dtype", "int8"], "dtype is 'int8'; wanted a floating-point dtype"),
        (["--seq", "9", "--kv", "3"], "kv is 3; wanted at least the 9 new tokens"),
    ],
)
def test_refusals_take_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ways", "--preset", "tiny", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == 1


def test_a_listing_for_cuda_asks_the_gpu_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are on the meta device then, which torch takes for no GPU."""
    from torch.cuda._utils import _get_device_index

    from dsv2_ref import DeepseekV2Config
    from dsv2_ref.fast import listing, triton
    from dsv2_ref.fast.triton import plan

    def of_device(found: object) -> object:
        return lambda device=None: (_get_device_index(device, optional=True), found)[1]

    hopper = SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=228 * 1024, major=9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", of_device((9, 0)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", of_device(hopper))
    monkeypatch.setattr(triton.available, "cannot_compile", lambda: "")
    monkeypatch.setattr("dsv2_ref.fast.cudnn._takes", lambda *_: True)
    plan.gpu_of.cache_clear()
    try:
        config = DeepseekV2Config.deepseek_v2()
        step = listing.choices(config, 1, "cuda", "bfloat16", seq=1, kv=8192)
        prompt = listing.choices(config, 1, "cuda", "bfloat16", seq=2048, kv=2048)
    finally:
        plan.gpu_of.cache_clear()
    assert {"triton decoding", "triton experts"} <= {choice.way for choice in step}
    assert "cudnn" in {choice.way for choice in prompt}
