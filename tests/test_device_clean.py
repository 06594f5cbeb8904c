"""The layer on CUDA tensors that have shapes and no memory: nothing is made on the CPU, and the host never waits.

A fake tensor has no values, so whatever would read one (``.item()``, ``if tensor``, a boolean index) raises. Tensors made
without a device would lie on the CPU; a mode that sees every operation names the line that made one.
"""

import os
import shutil
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, MoEGate
from dsv2_ref.rmsnorm import DeepseekV2RMSNorm

ROOT = Path(__file__).resolve().parent.parent
TINY = DeepseekV2Config.tiny()
CONFIGS = {
    "mla": TINY,
    "mla without q_lora": replace(TINY, q_lora_rank=None),
    "mla with bias": replace(TINY, attention_bias=True),
    "mha": replace(TINY, use_mla=False),
    "grouped heads": replace(TINY, use_mla=False, num_key_value_heads=2),
    "limited groups": replace(TINY, topk_method="group_limited_greedy", n_group=4, topk_group=2),
}


@pytest.fixture(scope="module")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fake CUDA tensors, also where torch was built without CUDA."""
    if torch.version.cuda is not None:
        return
    compiler = shutil.which("g++")
    if compiler is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no g++ is installed to build the device guard with")
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    torch_dir = Path(torch.__file__).parent
    source = ROOT / "tests" / "cuda_guard.cpp"
    paths = [f"-I{torch_dir / 'include'}", f"-L{torch_dir / 'lib'}"]
    command = [compiler, "-std=c++20", "-shared", "-fPIC", *paths, str(source), "-lc10", "-o", str(library)]
    subprocess.run(command, check=True)
    torch.ops.load_library(library)


def here(frames: list[traceback.FrameSummary]) -> str:
    """The innermost line of the package among the frames."""
    ours = [f for f in frames if f"{os.sep}dsv2_ref{os.sep}" in f.filename or f.filename == __file__]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"


class OnCudaOnly(TorchDispatchMode):
    """Refuses every operation that gives a tensor on another device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "cuda":
                raise AssertionError(f"a tensor on {tensor.device} from {func} at {here(traceback.extract_stack())}")
        return out


def run(config: DeepseekV2Config, layer_idx: int, train: bool, padded: bool, steps: tuple[int, ...] = (5, 1)) -> Tensor:
    """A prompt and a step through a fake layer; an AssertionError names the line that waits for the host or leaves CUDA."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            with torch.device("cuda"):
                layer = DeepseekV2DecoderLayer(config, layer_idx).train(train)
                x = torch.randn(2, sum(steps), config.hidden_size)
                keep = torch.ones(2, sum(steps), dtype=torch.bool)
            cache, seen = None, 0
            with torch.set_grad_enabled(train), OnCudaOnly():
                for step in steps:
                    mask = keep[:, : seen + step] if padded else None
                    part = x[:, seen : seen + step]
                    hidden, cache = layer(part, attention_mask=mask, past_key_value=cache, use_cache=True)
                    seen += step
            assert cache is not None
            assert (hidden.shape, hidden.dtype) == ((2, steps[-1], config.hidden_size), torch.bfloat16)
            assert cache.tokens.device.type == "cuda"
            return hidden
    except (RuntimeError, TypeError) as error:
        where = here(traceback.extract_tb(sys.exc_info()[2]))
        raise AssertionError(f"the host waits, or devices mix, at {where}: {error}") from error
    finally:
        torch.set_default_dtype(default)


FORMS = [(name, form) for name in CONFIGS for form in ("expanded", "absorbed")[: 1 + CONFIGS[name].use_mla]]


@pytest.mark.parametrize(("train", "padded"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("layer_idx", [0, 1], ids=["dense", "experts"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_nothing_leaves_the_device(
    name: str, form: str, implementation: str, layer_idx: int, train: bool, padded: bool, fake_cuda: None
) -> None:
    config = CONFIGS[name]
    run(replace(config, _attn_implementation=implementation, mla_form=form), layer_idx, train, padded)


def test_a_wait_for_the_host_is_named_by_its_line(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = MoEGate._choose

    def waits(self: MoEGate, scores: Tensor) -> Tensor:
        return right(self, scores) * scores.max().item()

    monkeypatch.setattr(MoEGate, "_choose", waits)
    with pytest.raises(AssertionError, match=r"the host waits, or devices mix, at test_device_clean\.py:\d+"):
        run(TINY, 1, train=False, padded=False)


def test_a_tensor_on_the_cpu_is_named_by_its_line(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = DeepseekV2RMSNorm.forward

    def strays(self: DeepseekV2RMSNorm, hidden_states: Tensor) -> Tensor:
        torch.arange(3)
        return right(self, hidden_states)

    monkeypatch.setattr(DeepseekV2RMSNorm, "forward", strays)
    with pytest.raises(AssertionError, match=r"a tensor on cpu from aten\.arange.* at test_device_clean\.py:\d+"):
        run(TINY, 0, train=False, padded=False)
