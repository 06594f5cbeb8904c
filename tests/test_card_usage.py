"""The usage snippet of the layer's card, as it is written there but for the import line and for its two mistakes.

The first mistake is the mask: ones and zeros in floating point, which are added to the scores and so hide nothing. The layer
refuses it. The second is three names for two outputs: the weights are returned only where ``output_attentions=True`` asks
for them. Python says so.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer
from dsv2_ref.fast.processor import has_bfloat16

BUILD = """
config = DeepseekV2Config(
    hidden_size=1280,
    num_attention_heads=128,
    use_mla=True,
    n_routed_experts=160,
    first_k_dense_replace=1,
    moe_layer_freq=1,
)

# Dense layer (first layer)
layer_0 = DeepseekV2DecoderLayer(config, layer_idx=0)
# Will use DeepseekV2MLP (dense)

# MoE layer (subsequent layers)
layer_1 = DeepseekV2DecoderLayer(config, layer_idx=1)
# Will use DeepseekV2MoE (sparse)
"""
PREFILL = """
# Prefill (first forward pass)
hidden_states = torch.randn(1, 8192, 1280, dtype=torch.bfloat16)
position_ids = torch.arange(8192).unsqueeze(0)
attention_mask = torch.tril(torch.ones(8192, 8192)).unsqueeze(0).unsqueeze(0)

outputs = layer_0(
    hidden_states=hidden_states,
    attention_mask=attention_mask,
    position_ids=position_ids,
    use_cache=True,
)
"""
UNPACKING = """
hidden_states, attn_weights, past_key_value = outputs
"""
DECODE = """
# Decode (subsequent tokens)
next_token = torch.randn(1, 1, 1280, dtype=torch.bfloat16)
next_position = torch.tensor([[8192]])

outputs = layer_0(
    hidden_states=next_token,
    position_ids=next_position,
    past_key_value=past_key_value,  # Reuse cached K, V
    use_cache=True,
)
"""

FLOATING_MASK = "torch.tril(torch.ones(8192, 8192)).unsqueeze(0).unsqueeze(0)"
GOOD_MASKS = ["None", "torch.tril(torch.ones(8192, 8192)).bool().unsqueeze(0).unsqueeze(0)"]
GOOD_UNPACKING = "hidden_states, past_key_value = outputs\n"
SMALL = {"1280": "64", "128": "4", "160": "8", "8192": "48"}


def small(code: str) -> str:
    """The same code with 64 features, 4 heads, 8 experts and 48 tokens."""
    return re.sub(r"\b(1280|128|160|8192)\b", lambda size: SMALL[size[0]], code)


def run(*code: str) -> dict[str, Any]:
    torch.manual_seed(0)
    names: dict[str, Any] = {
        "torch": torch, "DeepseekV2Config": DeepseekV2Config, "DeepseekV2DecoderLayer": DeepseekV2DecoderLayer,
    }  # fmt: skip
    exec("".join(map(small, code)), names)
    return names


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def weights(request: pytest.FixtureRequest) -> Any:
    """The dtype that layers are built in: float32 as the snippet has it, which widens its tokens, or theirs."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("layer", ["layer_0", "layer_1"])
@pytest.mark.parametrize("mask", GOOD_MASKS, ids=["None", "bool"])
def test_with_its_mistakes_mended(mask: str, layer: str, weights: torch.dtype) -> None:
    usage = (PREFILL.replace(FLOATING_MASK, mask) + GOOD_UNPACKING + DECODE).replace("layer_0", layer)
    names = run(BUILD, usage)
    step, cache = names["outputs"]
    assert names["hidden_states"].shape == (1, 48, 64)
    assert step.shape == (1, 1, 64)
    assert step.dtype == names["hidden_states"].dtype == weights
    assert step.isfinite().all()
    assert len(cache) == 49
    assert cache.nbytes == 49 * (512 + 64) * weights.itemsize


def test_both_mended_masks_mean_the_same() -> None:
    outputs = [run(BUILD, PREFILL.replace(FLOATING_MASK, mask))["outputs"][0] for mask in GOOD_MASKS]
    # The same scores in float32, whose sums are taken in another order.
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


def test_its_mask_is_refused_with_what_to_write_instead() -> None:
    with pytest.raises(
        ValueError, match=r"attention_mask is a floating-point mask .*masks nothing.*\.tril\(\)\.bool\(\)"
    ):
        run(BUILD, PREFILL)


def test_its_three_names_are_for_a_call_that_asks_for_the_weights() -> None:
    prefill = PREFILL.replace(FLOATING_MASK, "None")
    with pytest.raises(ValueError, match=r"not enough values to unpack \(expected 3, got 2\)"):
        run(BUILD, prefill, UNPACKING)
    eager = BUILD.replace("use_mla=True", "use_mla=True, _attn_implementation='eager'")
    names = run(eager, prefill.replace("use_cache=True", "use_cache=True, output_attentions=True"), UNPACKING)
    assert names["attn_weights"].shape == (1, 4, 48, 48)
    assert len(names["past_key_value"]) == 48


AT_FULL_SIZE = f"""
import json, resource, sys, torch
from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer
torch.set_num_threads(1)
torch.set_default_dtype(torch.bfloat16)
torch.manual_seed(0)
{BUILD}
report = {{}}
with torch.no_grad():
    for name, layer_0 in {{"dense": layer_0, "experts": layer_1}}.items():
        {PREFILL.replace(FLOATING_MASK, "None").strip().replace(chr(10), chr(10) + " " * 8)}
        {GOOD_UNPACKING.strip()}
        {DECODE.strip().replace(chr(10), chr(10) + " " * 8)}
        step, cache = outputs
        finite = bool(hidden_states.isfinite().all() and step.isfinite().all())
        shapes = [*hidden_states.shape], [*step.shape]
        report[name] = finite, *shapes, str(step.dtype), cache.nbytes, len(layer_0.state_dict())
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps(report | {{"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}}))
"""


@pytest.mark.thorough
def test_at_full_size() -> None:
    """In bfloat16, 8192 tokens and one more through both layers; in a process of its own, whose memory is measured.

    Fewer where torch multiplies bfloat16 one number at a time: there 8192 take a quarter of an hour.
    """
    tokens = 8192 if has_bfloat16() else 1024
    done = subprocess.run(
        [sys.executable, "-c", AT_FULL_SIZE.replace("8192", str(tokens))],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.pop("peak") < 14e9
    remembered = (tokens + 1) * (512 + 64) * 2
    prefill, step = [1, tokens, 1280], [1, 1, 1280]
    attention_and_norms, mlp, experts = 9, 3, 160 * 3 + 3 + 1
    assert report == {
        "dense": [True, prefill, step, "torch.bfloat16", remembered, attention_and_norms + mlp],
        "experts": [True, prefill, step, "torch.bfloat16", remembered, attention_and_norms + experts],
    }
