"""Layers and models from checkpoints: what is loaded is what was saved, from a folder and from afar, or nothing is."""

import gc
import json
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, DeepseekV2ForCausalLM, MoEGate, files, loading
from dsv2_ref.published import encode
from dsv2_ref.quantize import KINDS, quantize
from dsv2_ref.quantized import QuantizedWeight
from dsv2_ref.quantized_modules import quantized_places
from dsv2_ref.tensors import dequantize, read_header
from tests.examples import thorough
from tests.peers import SMALL, V3_GATE, YARN, native_config, native_of, native_weights, randomised

CONFIGS = {
    "v2": SMALL,
    "v2_groups": replace(SMALL, topk_method="group_limited_greedy", n_group=4, topk_group=2, num_experts_per_tok=4),
    "v3": V3_GATE,
    "v3_yarn": replace(V3_GATE, rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, q_lora_rank=None),
    "tied": replace(SMALL, tie_word_embeddings=True),
}
IDS = torch.arange(9)[None] * 5


def saved(folder: Path, config: DeepseekV2Config = SMALL, shard: int = 30_000) -> DeepseekV2ForCausalLM:
    model = randomised(DeepseekV2ForCausalLM(config), torch.float32)
    model.save_pretrained(folder, shard)
    return model


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    expected = theirs.state_dict()
    return all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())


# What is loaded


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_in_shards_comes_back(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path, CONFIGS[name])
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = DeepseekV2ForCausalLM.from_pretrained(tmp_path)
    assert same(loaded, model)
    assert not loaded.training
    assert loaded.config == replace(model.config, num_key_value_heads=model.config.num_attention_heads)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (name == "tied")
    for index, expected in enumerate(model.model.layers):
        assert same(DeepseekV2DecoderLayer.from_pretrained(tmp_path, index), expected)


def test_saving_again_leaves_nothing_of_the_last_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model-of-mine.safetensors").write_bytes(b"")
    for shard in (30_000, 60_000, 10**9, 30_000):
        model = saved(tmp_path, shard=shard)
        names = {path.name for path in tmp_path.iterdir()} - {"model-of-mine.safetensors", "config.json"}
        if shard == 10**9:
            assert names == {"model.safetensors"}
        else:
            index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
            assert names == {"model.safetensors.index.json", *index["weight_map"].values()}
        assert same(DeepseekV2ForCausalLM.from_pretrained(str(tmp_path)), model)


def test_what_saving_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = DeepseekV2ForCausalLM(SMALL)
    for size in ("5GB", 0, -1, 1e9, True, None):
        with pytest.raises(ValueError, match=f"^max_shard_size is {size!r}; wanted a number of bytes$"):
            model.save_pretrained(tmp_path / "new", size)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"^a checkpoint is written by safetensors; wanted pip install safetensors$"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_writes_gives_the_same_logits_and_layers(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    kind = native_of(config).causal_lm
    torch.manual_seed(3)
    settings = native_config(config)
    settings.tie_word_embeddings = config.tie_word_embeddings
    theirs = kind(settings).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    ours = DeepseekV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS)[0], theirs(IDS).logits, rtol=1e-5, atol=1e-6)
    layer = DeepseekV2DecoderLayer.from_pretrained(tmp_path, 1, dtype=torch.float32)
    expected = theirs.model.layers[1].state_dict()
    for part, weight in native_weights(layer.state_dict()).items():
        assert torch.equal(weight, expected[part]), part


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_what_we_write(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = saved(tmp_path, CONFIGS[name])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(theirs) is native_of(CONFIGS[name]).causal_lm
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS)[0], theirs(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaling", [None, {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}])
def test_transformers_reads_a_model_without_experts(scaling: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = saved(tmp_path, replace(SMALL, n_routed_experts=None, rope_scaling=scaling))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(theirs).__name__ == "YoutuForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS)[0], theirs(IDS).logits, rtol=1e-4, atol=1e-5)
    assert same(DeepseekV2ForCausalLM.from_pretrained(tmp_path), ours)


def test_every_preset_can_be_written_and_read_as_a_configuration() -> None:
    for name in ("card", "tiny", "deepseek_v2", "deepseek_v2_lite", "deepseek_ocr", "deepseek_v3", "moonlight"):
        config = getattr(DeepseekV2Config, name)()
        read = DeepseekV2Config.from_published(json.loads(json.dumps(encode(config))))
        assert read == replace(config, num_key_value_heads=config.num_attention_heads)


def test_dtypes(tmp_path: Path) -> None:
    model = saved(tmp_path, V3_GATE)
    for dtype in (torch.bfloat16, torch.float64):
        layer = DeepseekV2DecoderLayer.from_pretrained(tmp_path, 1, dtype=dtype)
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert torch.equal(layer.mlp.gate.weight, model.model.layers[1].mlp.gate.weight.to(dtype))
        # What chooses keeps its bits.
        assert layer.mlp.gate.e_score_correction_bias.dtype == torch.promote_types(dtype, torch.float32)
    assert DeepseekV2DecoderLayer.from_pretrained(tmp_path, 1).mlp.gate.weight.dtype == torch.float32
    change_config(tmp_path, torch_dtype="bfloat16")
    assert DeepseekV2DecoderLayer.from_pretrained(tmp_path, 1).mlp.gate.weight.dtype == torch.bfloat16
    change_config(tmp_path, torch_dtype=None)
    assert DeepseekV2DecoderLayer.from_pretrained(tmp_path, 1).mlp.gate.weight.dtype == torch.float32


def test_dtypes_that_config_json_names(tmp_path: Path) -> None:
    saved(tmp_path)  # in float32
    for told, dtype in (
        ({"dtype": None, "torch_dtype": "float16"}, torch.float16),
        ({"dtype": "torch.float16"}, torch.float16),
        ({"dtype": "half"}, torch.float16),
        ({"dtype": "float8_e4m3fn"}, torch.bfloat16),
        ({"dtype": "auto"}, torch.float32),
        ({"dtype": "cuda"}, torch.float32),
        ({"dtype": 3}, torch.float32),
    ):
        change_config(tmp_path, **{"torch_dtype": None} | told)
        assert DeepseekV2DecoderLayer.from_pretrained(tmp_path, 0).self_attn.o_proj.weight.dtype == dtype


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.complex64, torch.float8_e4m3fn, float, 16])
def test_dtypes_in_which_no_layer_computes(dtype: Any, tmp_path: Path) -> None:
    saved(tmp_path)
    shown = re.escape(repr(dtype))
    for load in (
        partial(DeepseekV2ForCausalLM.from_pretrained, tmp_path),
        partial(DeepseekV2DecoderLayer.from_pretrained, tmp_path, 0),
        partial(DeepseekV2ForCausalLM.random, SMALL),
        partial(DeepseekV2DecoderLayer.random, SMALL, 0),
    ):
        with pytest.raises(ValueError, match=f"^dtype is {shown}; wanted None or torch's float64, .*bfloat16$"):
            load(dtype=dtype)


def test_settings_that_no_checkpoint_has(tmp_path: Path) -> None:
    saved(tmp_path)
    layer = DeepseekV2DecoderLayer.from_pretrained(tmp_path, 0, attn_implementation="eager", mla_form="absorbed")
    assert (layer.self_attn.config._attn_implementation, layer.self_attn.config.mla_form) == ("eager", "absorbed")
    meta = DeepseekV2DecoderLayer.from_pretrained(tmp_path, 0, device="meta")
    assert all(parameter.is_meta for parameter in meta.parameters())
    with pytest.raises(ValueError, match=r"^attn_implementation is 'flash'; wanted eager, sdpa, flash_attention_2$"):
        DeepseekV2DecoderLayer.from_pretrained(tmp_path, 0, attn_implementation="flash")


@pytest.mark.parametrize("device", ["gpu", "", "fpga", -1, 3.5, True, "cuda:99"], ids=repr)
@pytest.mark.usefixtures("as_shipped")
def test_a_device_that_is_not_here_is_rejected_before_anything_is_read(device: Any, tmp_path: Path) -> None:
    makers: list[Callable[[], object]] = [
        lambda: DeepseekV2ForCausalLM.from_pretrained(tmp_path, device=device),
        lambda: DeepseekV2DecoderLayer.from_pretrained(tmp_path, 0, device=device),
        lambda: DeepseekV2ForCausalLM.random(NARROW, device=device),
    ]
    for make in makers:
        with pytest.raises(ValueError, match=f"^device is {device!r}; wanted None or a device that is here"):
            make()


# Eight bits


def quantised(weight: Tensor, block: tuple[int, int] = (128, 128)) -> tuple[Tensor, Tensor]:
    """By the loop over blocks that the definition is."""
    rows, columns = weight.shape
    scales = torch.zeros(-(-rows // block[0]), -(-columns // block[1]))
    stored = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = weight[place].abs().max() / 448
            stored[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
    return stored, scales


@pytest.mark.parametrize("shape", [(256, 128), (300, 130), (1, 1), (128, 129), (5, 700)])
def test_blocks_of_eight_bits_edges_included(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored, scales = quantised(weight)
    out = torch.empty(shape, dtype=torch.float64)
    dequantize(stored, scales, (128, 128), out)
    spread = scales.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    torch.testing.assert_close(out, (stored.float() * spread).double(), rtol=0, atol=0)
    assert float((out - weight).norm() / weight.norm()) < 2**-4  # three bits after the leading one


def eight_bits(folder: Path, model: DeepseekV2ForCausalLM, block: list[int]) -> dict[str, Tensor]:
    """Rewrite a checkpoint with its matrices of layers in float8, as DeepSeek-V3 is published; what they then are."""
    weights, expected = {}, {}
    for name, weight in model.state_dict().items():
        weights[name] = expected[name] = weight.detach().clone()
        if weight.ndim == 2 and "layers" in name and "mlp.gate." not in name:
            weights[name], weights[f"{name}_scale_inv"] = quantised(weight.detach(), (block[0], block[1]))
            expected[name] = torch.empty_like(weight)
            dequantize(weights[name], weights[f"{name}_scale_inv"], (block[0], block[1]), expected[name])
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(weights, folder / "model.safetensors")
    change_config(folder, quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block})
    return expected


def test_a_checkpoint_in_eight_bits(tmp_path: Path) -> None:
    model = saved(tmp_path, V3_GATE)
    expected = eight_bits(tmp_path, model, [16, 16])
    loaded = DeepseekV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())
    change_config(tmp_path, torch_dtype=None)
    layer = DeepseekV2DecoderLayer.from_pretrained(tmp_path, 0)
    assert layer.self_attn.o_proj.weight.dtype in (torch.bfloat16, torch.float32)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(
        layer.self_attn.o_proj.weight.float(), expected[name].to(layer.self_attn.o_proj.weight.dtype).float()
    )


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            "quantization_config.quant_method is 'gptq'; wanted fp8, or weights that",
        ),
        ({"quant_method": "fp8"}, "quantization_config.weight_block_size is None; wanted rows and columns"),
        ({"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [1, 1]}, "quantization_config.fmt is 'e5m2'"),
        ("fp8", "quantization_config is 'fp8'; wanted a JSON object"),
    ],
)
def test_other_quantisations_are_rejected_by_name(told: Any, message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    change_config(tmp_path, quantization_config=told)
    assert_rejected(tmp_path, f"/config.json: {message}")


def test_eight_bits_without_their_scales(tmp_path: Path) -> None:
    model = saved(tmp_path, V3_GATE)
    eight_bits(tmp_path, model, [16, 16])
    change_config(tmp_path, quantization_config=None)
    assert_rejected(
        tmp_path, r"model.safetensors: tensor model.layers.1.\S+ is 'F8_E4M3'; wanted floating point, or a matrix in F8"
    )
    eight_bits(tmp_path, model, [16, 16])
    change_weights(tmp_path, lambda weights: weights.pop("model.layers.1.self_attn.o_proj.weight_scale_inv"))
    scale = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    wanted = r"wanted \(3, 3\) in floating point, a scale for each block"
    assert_rejected(tmp_path, f"tensor {scale} is missing; {wanted}")
    for strange, shown in (
        (torch.ones(3, 2), r"\(3, 2\) F32"),
        (torch.ones(3, 3).int(), r"\(3, 3\) I32"),
        (torch.ones(3, 3).to(torch.uint8), r"\(3, 3\) U8"),
        (torch.ones(3, 3).to(torch.float8_e8m0fnu), r"\(3, 3\) F8_E8M0"),
        (torch.ones(3, 3).to(torch.float8_e4m3fn), r"\(3, 3\) F8_E4M3"),
    ):
        change_weights(tmp_path, lambda weights, strange=strange: weights.update({scale: strange}))
        assert_rejected(tmp_path, f"tensor {scale} is {shown}; {wanted}")


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("part", ["", "_scale_inv"])
def test_eight_bits_that_are_no_numbers_are_not_kept(part: str, weights: str, tmp_path: Path) -> None:
    eight_bits(tmp_path, saved(tmp_path, NARROW_CONFIGS["v3"]), [128, 128])
    DeepseekV2DecoderLayer.from_pretrained(tmp_path, 1, weights=weights, group=4)
    change_weights(tmp_path, lambda stored: stored[NAME + part].view(torch.uint8)[-1, -2:].fill_(255))
    with pytest.raises(ValueError, match=rf"tensor {NAME} is infinite or NaN .*somewhere.*; wanted finite numbers$"):
        DeepseekV2DecoderLayer.from_pretrained(tmp_path, 1, weights=weights, group=4)


@pytest.mark.parametrize("side", [10**12, 10**30])
def test_a_block_may_be_larger_than_any_matrix(side: int, tmp_path: Path) -> None:
    expected = eight_bits(tmp_path, saved(tmp_path, V3_GATE), [128, 128])
    change_config(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [side, side]})
    layer = DeepseekV2DecoderLayer.from_pretrained(tmp_path, 1, torch.float32)
    assert torch.equal(layer.self_attn.o_proj.weight, expected[NAME])


def test_what_lies_in_no_blocks_of_a_checkpoint_in_eight_bits(tmp_path: Path) -> None:
    norm = "model.layers.1.input_layernorm.weight"
    eight_bits(tmp_path, saved(tmp_path, V3_GATE), [16, 16])
    change_weights(tmp_path, lambda weights: weights.update({norm: weights[norm].to(torch.float8_e4m3fn)}))
    assert_rejected(tmp_path, f"tensor {norm} is 'F8_E4M3'; wanted floating point, or a matrix in F8_E4M3")
    eight_bits(tmp_path, saved(tmp_path, V3_GATE), [16, 16])
    change_weights(tmp_path, lambda weights: weights.update({NAME: weights[NAME].bfloat16()}))
    assert_rejected(tmp_path, f"tensor {NAME}_scale_inv has no place; wanted only")
    change_weights(tmp_path, lambda weights: weights.pop(f"{NAME}_scale_inv"))
    layer = DeepseekV2DecoderLayer.from_pretrained(tmp_path, 1)
    assert torch.equal(layer.self_attn.o_proj.weight, load_file(tmp_path / "model.safetensors")[NAME].float())


# What is wrong


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def assert_rejected(source: Any, message: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message) as caught:
        DeepseekV2DecoderLayer.from_pretrained(source, 1)
    assert "\n" not in str(caught.value)


NAME = "model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(NAME), f"^/.*: the checkpoint has no tensor {NAME}; wanted every weight"),
        (
            lambda w: [w.pop(n) for n in list(w) if ".1.mlp." in n],
            "no tensor model.layers.1.mlp.gate.weight and 39 more",
        ),
        (
            lambda w: w.update({NAME: w[NAME].T.contiguous()}),
            rf"model.safetensors: tensor {NAME} is \(40, 48\); wanted",
        ),
        (
            lambda w: w.update({f"{NAME}x": w[NAME].clone()}),
            f"model.safetensors: tensor {NAME}x has no place; wanted only",
        ),
        (
            lambda w: w.update({NAME: w[NAME].int()}),
            f"model.safetensors: tensor {NAME} is 'I32'; wanted floating point",
        ),
    ],
)
def test_tensors_that_are_not_the_layers(change: Any, message: str, tmp_path: Path) -> None:
    saved(tmp_path, shard=10**9)
    change_weights(tmp_path, change)
    assert_rejected(tmp_path, message)


def test_tensors_of_other_parts_and_of_further_prediction_do_not_matter(tmp_path: Path) -> None:
    model = saved(tmp_path, V3_GATE, shard=10**9)
    change_config(tmp_path, num_nextn_predict_layers=1)
    extra = {
        "model.layers.2.eh_proj.weight": torch.ones(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    change_weights(tmp_path, lambda weights: weights.update(extra | {"model.vision.x": torch.ones(1)}))
    assert same(DeepseekV2ForCausalLM.from_pretrained(tmp_path), model)
    change_config(tmp_path, num_nextn_predict_layers=10**12)
    assert same(DeepseekV2ForCausalLM.from_pretrained(tmp_path), model)
    for number in ("1", -1, 1.0, True, [1]):
        change_config(tmp_path, num_nextn_predict_layers=number)
        assert_rejected(tmp_path, "config.json: num_nextn_predict_layers is .*; wanted an integer of at least 0$")
    for number in (0, None):
        change_config(tmp_path, num_nextn_predict_layers=number)
        with pytest.raises(ValueError, match=r"tensor model.layers.2.eh_proj.weight has no place"):
            DeepseekV2ForCausalLM.from_pretrained(tmp_path)


def test_a_decoder_inside_a_model_with_vision(tmp_path: Path) -> None:
    model = saved(tmp_path, shard=10**9)
    inner = json.loads((tmp_path / "config.json").read_text())
    outer = {"model_type": "deepseek_vl_v2", "vision_config": {}, "language_config": inner}
    (tmp_path / "config.json").write_text(json.dumps(outer))

    def nest(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            weights[f"language.{name}"] = weights.pop(name)
        weights["vision.blocks.0.weight"] = torch.ones(3)

    change_weights(tmp_path, nest)
    assert same(DeepseekV2ForCausalLM.from_pretrained(tmp_path), model)
    assert same(DeepseekV2DecoderLayer.from_pretrained(tmp_path, 1), model.model.layers[1])


def test_tied_weights_that_differ(tmp_path: Path) -> None:
    saved(tmp_path, CONFIGS["tied"], shard=10**9)
    head = {"lm_head.weight": load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].clone()}
    change_weights(tmp_path, lambda weights: weights.update(head))
    DeepseekV2ForCausalLM.from_pretrained(tmp_path)
    assert DeepseekV2ForCausalLM.from_pretrained(tmp_path, device="meta").lm_head.weight.is_meta
    head["lm_head.weight"][3, 3] += 1
    change_weights(tmp_path, lambda weights: weights.update(head))
    with pytest.raises(ValueError, match=r"tensor lm_head.weight has other values; wanted the embedding"):
        DeepseekV2ForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-1], "can be read: it has [0-9]+ bytes, and its tensors end at"),
        (lambda b: b + b"\0", "can be read: it has [0-9]+ bytes, and its tensors end at"),
        (lambda b: b[:100], "can be read: its header would have"),
        (lambda b: b[:7], "can be read: it has 7 bytes"),
        (lambda b: b"\xff" * 8 + b[8:], "can be read: its header would have"),
        (lambda b: b[:8] + b"[" + b[9:], "can be read: its header is not JSON: "),
        (lambda b: b.replace(b'"F32"', b'"F16"', 1), r"can be read: tensor \S+ has [0-9]+ bytes for"),
        (lambda b: b.replace(b'"shape"', b'"shapo"', 1), r"can be read: tensor \S+ has no dtype, shape and place"),
        (lambda b: b"<html>" + b[6:], "can be read: its header would have"),
        (
            lambda b: b.replace(b'norm.weight"', b'nor\\n.weigh"', 1),
            r"can be read: a tensor has the name '\S+nor\\n.weigh'",
        ),
    ],
)
def test_damaged_files(damage: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    saved(tmp_path, shard=10**9)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert_rejected(tmp_path, f"model.safetensors is not a safetensors file that {message}")


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([[0, 8], [0, 8]], "tensor b begins at [0-9]+, not at"),
        ([[0, 8], [4, 12]], "tensor b begins at [0-9]+, not at"),
        ([[0, 8], [12, 20]], "tensor b begins at [0-9]+, not at"),
        ([[4, 12], [12, 20]], "tensor a begins at [0-9]+, not at"),
        ([[8, 16], [0, 8]], ""),
    ],
)
def test_tensors_lie_one_after_the_other(offsets: list[list[int]], message: str, tmp_path: Path) -> None:
    """As the format wants it, which its own library holds to as well."""
    told = [{"dtype": "F32", "shape": [2], "data_offsets": place} for place in offsets]
    header = json.dumps(dict(zip("ab", told, strict=True))).encode()
    size = max(end for _, end in offsets)
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    if not message:
        assert read_header(files.LocalFile(path)).keys() == load_file(path).keys()
        return
    with pytest.raises(ValueError, match=f"x.safetensors is not a safetensors file that can be read: {message}"):
        read_header(files.LocalFile(path))
    with pytest.raises(SafetensorError):
        load_file(path)


FIELDS = {"dtype": '"F32"', "shape": "[2]", "data_offsets": "[0, 8]"}
ONE = "{" + ", ".join(f'"{name}": {value}' for name, value in FIELDS.items()) + "}"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (f'{{"a": {ONE}, "a": {ONE}}}', "its header says 'a' twice"),
        (f'{{"a": {ONE}, "\\u0061": {ONE}}}', "its header says 'a' twice"),
        (f'{{"a": {ONE.replace("[2]", "[4]")}, "a": {ONE}}}', "its header says 'a' twice"),
        (f'{{"a": {{"dtype": "F16", {ONE[1:]}}}', "its header says 'dtype' twice"),
        (f'{{"__metadata__": null, "__metadata__": null, "a": {ONE}}}', "its header says '__metadata__' twice"),
        (f'{{"a": {ONE.replace("F32", "F64").replace("[2]", "[true]")}}}', "tensor a has no dtype, shape and place"),
        (f'{{"a": {ONE.replace("[0,", "[false,")}}}', "tensor a has no dtype, shape and place"),
        (f'{{"__metadata__": {{"loss": NaN}}, "a": {ONE}}}', "its header is not JSON: NaN is no number in JSON"),
        (f'\ufeff{{"a": {ONE}}}', "its header is not JSON: Unexpected UTF-8 BOM.*"),
        (f'{{"a": {ONE}}}'.encode("utf-16-le"), "its header is not JSON: .*"),
        (f"[{ONE}]", "its header is not a JSON object"),
    ],
)  # fmt: skip
def test_headers_that_say_two_things_or_are_no_json(header: str | bytes, message: str, tmp_path: Path) -> None:
    """The format forbids names that are there twice. Its own library takes the last of two tensors, and rejects the
    rest."""
    text = header.encode() if isinstance(header, str) else header
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=f"x.safetensors is not a safetensors file that can be read: {message}$"):
        read_header(files.LocalFile(path))
    if "'a' twice" not in message:
        with pytest.raises(SafetensorError):
            load_file(path)


def test_shards_that_are_missing_cut_or_strange(tmp_path: Path) -> None:
    saved(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    shard = tmp_path / told["weight_map"][NAME]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4])
    assert_rejected(tmp_path, f"{shard.name} is not a safetensors file that can be read: it has")
    shard.unlink()
    assert_rejected(tmp_path, f"{shard.name} does not exist; model.safetensors.index.json names it", FileNotFoundError)
    shard.write_bytes(whole)
    for other, shown in (
        ("../x", "'../x'"),
        ([shard.name], "a list of 1"),
        (3, "3"),
        (None, "None"),
        ({}, "an object of 0"),
    ):
        index.write_text(json.dumps({"weight_map": told["weight_map"] | {NAME: other}}))
        assert_rejected(tmp_path, f"the file of {NAME} is {shown}; wanted the name of a file beside it")
    index.write_text(json.dumps({"weight_map": {**told["weight_map"], "model.layers.1.lost": shard.name}}))
    assert_rejected(tmp_path, f"{shard.name} has no tensor model.layers.1.lost; wanted what model.safetensors.index")
    for text, said in (
        ("{}", "weight_map is None"),
        ("[]", "it is a list of 0; wanted a JSON object"),
        ("{", "is not JSON"),
        ("[" * 10**5, "is not JSON that can be read: nested too deeply"),
        (f'{{"weight_map": {{"{NAME}": "a", "{NAME}": "b"}}}}', f"says '{NAME}' twice"),
    ):
        index.write_text(text)
        assert_rejected(tmp_path, f"model.safetensors.index.json is not the index of a checkpoint: {said}")


def test_the_index_says_which_of_two_tensors_counts(tmp_path: Path) -> None:
    """A shard may have one of the same name left over from another checkpoint."""
    model = saved(tmp_path)
    told = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    others = sorted({told[name] for name in told if name.startswith("model.layers.1.")} - {told[NAME]})
    assert others
    for other in others:
        weights = load_file(tmp_path / other)
        save_file(weights | {NAME: torch.zeros(48, 40)}, tmp_path / other)
    assert same(DeepseekV2DecoderLayer.from_pretrained(tmp_path, 1), model.model.layers[1])


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert_rejected(
        tmp_path / "nowhere", r"source is .*nowhere'; wanted a folder, an http or https address", FileNotFoundError
    )
    for source in (None, 3, b"folder", ["folder"], tmp_path / "config.json"):
        assert_rejected(source, r"^source is .*; wanted a folder, an http or https address", FileNotFoundError)
    assert_rejected(tmp_path, "config.json does not exist", FileNotFoundError)
    (tmp_path / "config.json").write_text("{")
    assert_rejected(tmp_path, "config.json: is not JSON")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert_rejected(tmp_path, "config.json: model_type is 'llama'; wanted")
    (tmp_path / "config.json").write_text(json.dumps(encode(SMALL)))
    assert_rejected(tmp_path, "model.safetensors does not exist", FileNotFoundError)
    saved(tmp_path, V3_GATE)
    (tmp_path / "config.json").write_text(json.dumps(encode(SMALL)))
    assert_rejected(tmp_path, "tensor model.layers.1.mlp.gate.e_score_correction_bias has no place")
    with pytest.raises(ValueError, match=r"layer_idx is 7; wanted"):
        DeepseekV2DecoderLayer.from_pretrained(tmp_path, 7)


@pytest.mark.parametrize("shown", [True, False])
def test_a_long_load_shows_a_bar(shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Bar:
        def __init__(self, total: int, **settings: Any) -> None:
            seen.append(total)

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def update(self, count: int) -> None:
            seen.append(count)

    saved(tmp_path)
    layer = DeepseekV2DecoderLayer.from_pretrained(tmp_path, 1)
    size = sum(weight.nbytes for weight in layer.state_dict().values())
    monkeypatch.setitem(sys.modules, "tqdm", SimpleNamespace(tqdm=Bar) if shown else None)
    monkeypatch.setattr(loading, "LONG", size + 1)
    DeepseekV2DecoderLayer.from_pretrained(tmp_path, 1)
    assert not seen
    monkeypatch.setattr(loading, "LONG", size)
    assert same(DeepseekV2DecoderLayer.from_pretrained(tmp_path, 1), layer)
    assert (seen[:1], sum(seen[1:])) == (([size], size) if shown else ([], 0))


# Memory


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process its peak")
def test_the_peak_is_the_layer_and_its_largest_tensor(tmp_path: Path) -> None:
    """In a process of its own. Layer 0 is dense and small."""
    config = replace(
        SMALL, hidden_size=1024, moe_intermediate_size=512, n_routed_experts=32, num_attention_heads=8,
        intermediate_size=2048, vocab_size=128, num_hidden_layers=2, n_shared_experts=1,
    )  # fmt: skip
    model = DeepseekV2ForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path)
    size = sum(weight.nbytes for weight in model.model.layers[1].state_dict().values())
    largest = max(weight.nbytes for weight in model.model.layers[1].state_dict().values())
    code = """
import re, sys, torch
from pathlib import Path
from dsv2_ref import DeepseekV2DecoderLayer

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

DeepseekV2DecoderLayer.from_pretrained(sys.argv[1], 0)  # what is imported on the way, and what the allocator keeps
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
layer = DeepseekV2DecoderLayer.from_pretrained(sys.argv[1], 1)
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    taken = int(run.stdout)
    slack = 12_000_000  # what layer 0 left to be used again; a second copy of the layer would be 100 MB
    assert size < taken + slack
    assert taken <= size + largest + slack, f"{taken:,} for {size:,}"


# Fewer bits

# Widths that 4 divides; for float8, a block of 128 may not hold gates and ups.
NARROW = replace(SMALL, moe_intermediate_size=128, n_routed_experts=4)
NARROW_CONFIGS = {
    "v2": NARROW,
    "v3": replace(V3_GATE, moe_intermediate_size=128, n_routed_experts=8),
    "tied": replace(NARROW, tie_word_embeddings=True),
    "mha": replace(NARROW, use_mla=False, num_key_value_heads=2, q_lora_rank=None),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def same_bits(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    expected, found = theirs.state_dict(), ours.state_dict()
    assert found.keys() == expected.keys()
    assert all(value.dtype == expected[name].dtype for name, value in found.items())
    return all(torch.equal(value.view(torch.uint8), expected[name].view(torch.uint8)) for name, value in found.items())


def bfloat16_and_at_length(*others: torch.dtype | None) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", [torch.bfloat16, *thorough(*others)], ids=str)


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("name", ["v2", "v3", "tied"])
@bfloat16_and_at_length(torch.float16, None)
def test_quantised_while_loading_is_loaded_then_quantised(dtype: Any, name: str, kind: str, tmp_path: Path) -> None:
    saved(tmp_path, NARROW_CONFIGS[name])
    loaded = DeepseekV2ForCausalLM.from_pretrained(tmp_path, dtype, weights=kind, group=4)
    expected = quantize(DeepseekV2ForCausalLM.from_pretrained(tmp_path, dtype), kind, 4)
    assert same_bits(loaded, expected)
    assert not loaded.training
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (name == "tied")
    with torch.no_grad():
        assert torch.equal(loaded(IDS)[0], expected(IDS)[0])
    for index in (0, 1):
        layer = DeepseekV2DecoderLayer.from_pretrained(tmp_path, index, dtype, weights=kind, group=4)
        assert same_bits(layer, expected.model.layers[index])
    meta = DeepseekV2DecoderLayer.from_pretrained(tmp_path, 1, device="meta", weights=kind, group=4)
    assert all(value.is_meta for value in meta.state_dict().values())


@every_kind
@pytest.mark.parametrize("block", [[128, 128], [16, 16]])
def test_a_checkpoint_in_eight_bits_quantised(block: list[int], kind: str, tmp_path: Path) -> None:
    """Kept as it is where it is wanted in the same blocks, else by way of its floating-point values."""
    config = NARROW_CONFIGS["v3"]
    eight_bits(tmp_path, saved(tmp_path, config), block)
    loaded = DeepseekV2ForCausalLM.from_pretrained(tmp_path, torch.bfloat16, weights=kind, group=4)
    if kind != "fp8" or block == [16, 16]:
        plain = DeepseekV2ForCausalLM.from_pretrained(tmp_path, torch.bfloat16)
        assert same_bits(loaded, quantize(plain, kind, 4))
        return
    stored = load_file(tmp_path / "model.safetensors")
    kept = 0
    for name, (held, place) in quantized_places(loaded).items():
        expert, rows = place if isinstance(place, tuple) else (place, slice(None))
        codes = held.codes[expert][rows]
        first = (rows.start or 0) // 128
        scales = held.scales[expert][first : first + -(-len(codes) // 128)]
        assert torch.equal(codes.view(torch.uint8), stored[name].view(torch.uint8)), name
        assert torch.equal(scales, stored[name + "_scale_inv"]), name
        kept += 1
    assert kept == sum(name.endswith("_scale_inv") for name in stored)
    for index in (0, 1):
        layer = DeepseekV2DecoderLayer.from_pretrained(tmp_path, index, torch.bfloat16, weights="fp8")
        assert same_bits(layer, loaded.model.layers[index])
    folder = tmp_path / "again"
    loaded.save_pretrained(folder)
    assert same_bits(DeepseekV2ForCausalLM.from_pretrained(folder), loaded)


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("name", NARROW_CONFIGS)
@bfloat16_and_at_length(torch.float16, torch.float32)
@pytest.mark.parametrize("shard", [30_000, 10**9])
def test_a_quantised_model_is_saved_and_comes_back(
    shard: int, dtype: torch.dtype, name: str, kind: str, tmp_path: Path
) -> None:
    model = quantize(randomised(DeepseekV2ForCausalLM(NARROW_CONFIGS[name]), dtype), kind, 4)
    for part in model.modules():
        if isinstance(part, QuantizedWeight):
            part.scales.mul_(1 + 2**-9)  # what float16 could not hold
        elif isinstance(part, MoEGate) and part.e_score_correction_bias is not None:
            part.e_score_correction_bias = part.e_score_correction_bias.float()  # as it is always loaded
    model.save_pretrained(tmp_path, shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shard < 10**9)
    if name == "mha":
        return  # no published configuration has it
    loaded = DeepseekV2ForCausalLM.from_pretrained(tmp_path)
    assert same_bits(loaded, model)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (name == "tied")
    with torch.no_grad():
        assert torch.equal(loaded(IDS)[0], model(IDS)[0])
    for index, expected in enumerate(model.model.layers):
        assert same_bits(DeepseekV2DecoderLayer.from_pretrained(tmp_path, index), expected)
    files = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    held = {value.data_ptr(): value.nbytes for value in model.state_dict().values()}
    assert sum(held.values()) < files < sum(held.values()) + 30_000  # headers


@every_kind
@pytest.mark.parametrize("way", ["eager", "sdpa"])
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_codes_read_back_give_the_same_logits_by_the_same_attention(
    form: str, way: str, kind: str, tmp_path: Path
) -> None:
    """A checkpoint does not say which: another one sums in another order, and is equal but for rounding."""
    config = replace(NARROW, _attn_implementation=way, mla_form=form)
    model = quantize(randomised(DeepseekV2ForCausalLM(config), torch.float32), kind, 4)
    model.save_pretrained(tmp_path, 30_000)
    twin = quantize(DeepseekV2ForCausalLM(config).eval(), kind, 4)
    twin.load_state_dict(model.state_dict())
    other = {"eager": "sdpa", "sdpa": "eager"}[way]
    back, others = (
        DeepseekV2ForCausalLM.from_pretrained(tmp_path, attn_implementation=name, mla_form=form)
        for name in (way, other)
    )
    with torch.no_grad():
        expected = model(IDS)[0]
        assert torch.equal(back(IDS)[0], expected)
        assert torch.equal(twin(IDS)[0], expected)
        torch.testing.assert_close(others(IDS)[0], expected, rtol=1e-5, atol=1e-5)


def test_parts_are_saved_and_come_back(tmp_path: Path) -> None:
    model = quantize(randomised(DeepseekV2ForCausalLM(NARROW), torch.float32), "int4", 4, ["experts"])
    model.save_pretrained(tmp_path)
    assert same_bits(DeepseekV2ForCausalLM.from_pretrained(tmp_path), model)
    for index in (0, 1):  # the first is dense, and has nothing quantised
        assert same_bits(DeepseekV2DecoderLayer.from_pretrained(tmp_path, index), model.model.layers[index])
    wider = DeepseekV2ForCausalLM.from_pretrained(tmp_path, torch.float64)
    assert same_bits(wider, model.double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: quantize(model.model.layers[0], "int8"),
            "q_a_proj is a Linear; wanted codes, as others of its part: quantise the whole model, or whole parts",
        ),
        (
            lambda model: [quantize(model.model.layers[i], kind, 4) for i, kind in enumerate(("int8", "int4"))],
            "the weights is 'int8, int4'; wanted codes of one kind",
        ),
        (
            lambda model: [quantize(model.model.layers[i], "int4", group) for i, group in enumerate((4, 2))],
            "group is '2 and 4'; wanted one for all weights",
        ),
    ],
)
def test_what_one_configuration_cannot_say_is_not_saved(change: Any, message: str, tmp_path: Path) -> None:
    model = DeepseekV2ForCausalLM(NARROW)
    change(model)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "new")
    assert not list(tmp_path.glob("new/*"))


OWN = {"quant_method": "dsv2_ref", "weights": "int8", "group": 64, "parts": ["attention", "experts", "mlp"]}
CODES = "model.layers.1.self_attn.o_proj.codes"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"weights": "int3"}, "quantization_config.weights is 'int3'; wanted int8, int4, fp8"),
        ({"weights": None}, "quantization_config.weights is None; wanted int8, int4, fp8"),
        ({"group": 7}, "quantization_config.group is 7; wanted an even number"),
        ({"group": "64"}, "quantization_config.group is '64'; wanted an even number"),
        ({"parts": ["head"]}, "quantization_config.parts is 'head'; wanted one or more of attention, experts, mlp"),
        ({"parts": "experts"}, "quantization_config.parts is 'experts'; wanted one or more of"),
        ({"parts": []}, "quantization_config.parts is a list of 0; wanted one or more of"),
        ({"parts": None}, "quantization_config.parts is None; wanted one or more of"),
        ({"zero_point": True}, "quantization_config is 'weights, group, parts, zero_point'; wanted weights, group and pa"),
        ({"weights": "int4", "group": 4}, r"q_a_proj.codes is \(28, 48\); wanted \(28, 24\)"),
        ({"weights": "fp8"}, r"q_a_proj.codes is 'I8'; wanted torch.float8_e4m3fn codes"),
        ({"parts": ["attention", "mlp"]}, r"the checkpoint has no tensor model.layers.1.mlp.experts.0.gate_proj.weight"),
        ({"quant_method": "gptq"}, "quantization_config.quant_method is 'gptq'; wanted fp8, or weights that"),
    ],
)  # fmt: skip
def test_what_config_json_says_of_codes(told: dict[str, Any], message: str, tmp_path: Path) -> None:
    quantize(randomised(DeepseekV2ForCausalLM(NARROW), torch.float32), "int8").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == OWN
    change_config(tmp_path, quantization_config=OWN | told)
    assert_rejected(tmp_path, message)


@pytest.mark.parametrize("missing", ["weights", "group", "parts"])
def test_what_config_json_does_not_say_of_codes(missing: str, tmp_path: Path) -> None:
    quantize(DeepseekV2ForCausalLM(NARROW), "int8").save_pretrained(tmp_path)
    change_config(tmp_path, quantization_config={key: value for key, value in OWN.items() if key != missing})
    assert_rejected(tmp_path, "quantization_config is '.*'; wanted weights, group and parts beside quant_method")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(CODES), f"the checkpoint has no tensor {CODES}; wanted every weight"),
        (lambda w: w.pop(CODES[:-5] + "scales"), "no tensor model.layers.1.self_attn.o_proj.scales; wanted every"),
        (lambda w: w.update({CODES: w[CODES][1:].clone()}), rf"tensor {CODES} is \(47, 40\); wanted \(48, 40\)"),
        (lambda w: w.update({CODES: w[CODES].float()}), rf"tensor {CODES} is 'F32'; wanted torch.int8 codes"),
        (lambda w: w.update({CODES: w[CODES].int()}), rf"tensor {CODES} is 'I32'; wanted torch.int8 codes"),
        (lambda w: w.update({CODES: w[CODES].bool()}), rf"tensor {CODES} is 'BOOL'; wanted torch.int8 codes"),
        (lambda w: w.update({CODES: w[CODES].view(torch.uint8)}), rf"tensor {CODES} is 'U8'; wanted torch.int8 codes"),
        (
            lambda w: w.update({CODES[:-5] + "scales": torch.zeros(48, 1).int()}),
            r"o_proj.scales is 'I32'; wanted floating point",
        ),
        (lambda w: w.update({CODES[:-5] + "weight": torch.zeros(48, 40)}), "o_proj.weight has no place; wanted only"),
    ],
)
def test_damaged_codes(change: Any, message: str, tmp_path: Path) -> None:
    quantize(randomised(DeepseekV2ForCausalLM(NARROW), torch.float32), "int8").save_pretrained(tmp_path)
    change_weights(tmp_path, change)
    assert_rejected(tmp_path, message)


def test_bytes_of_another_dtype_are_no_codes_of_four_bits(tmp_path: Path) -> None:
    """Each of four bytes would be read as two codes."""
    quantize(randomised(DeepseekV2ForCausalLM(NARROW), torch.float32), "int4", 4).save_pretrained(tmp_path)
    for change, code in ((Tensor.int, "I32"), (Tensor.bool, "BOOL"), (lambda x: x.view(torch.int8), "I8")):
        whole = load_file(tmp_path / "model.safetensors")
        change_weights(tmp_path, lambda w, change=change: w.update({CODES: change(w[CODES])}))
        assert_rejected(tmp_path, rf"tensor {CODES} is '{code}'; wanted torch.uint8 codes")
        save_file(whole, tmp_path / "model.safetensors")


def test_how_a_checkpoint_cannot_be_quantised(tmp_path: Path) -> None:
    def rejected(message: str, **how: Any) -> None:
        for load in (
            DeepseekV2ForCausalLM.from_pretrained,
            partial(DeepseekV2DecoderLayer.from_pretrained, layer_idx=1),
        ):
            with pytest.raises(ValueError, match=message) as caught:
                load(tmp_path, **how)
            assert "\n" not in str(caught.value)

    model = saved(tmp_path, shard=10**9)
    rejected("weights is 'int3'; wanted int8, int4, fp8", weights="int3")
    rejected("group is 3; wanted an even number", weights="int4", group=3)
    rejected("group is 7; wanted an even number", group=7)  # though nothing is quantised
    with pytest.raises(ValueError, match="group is 7; wanted an even number"):
        DeepseekV2ForCausalLM.random(NARROW, group=7)
    with pytest.raises(ValueError, match="weights is 'int3'; wanted int8, int4, fp8"):
        DeepseekV2ForCausalLM.from_pretrained("nowhere/at-all", weights="int3")  # before anything is fetched
    rejected("group is 16; wanted a divisor of 28, the inputs of q_b_proj, such as 4", weights="int4", group=16)
    rejected("weights is 'fp8'; wanted int8 or int4: 128 does not divide the experts' width 20", weights="fp8")
    change_weights(tmp_path, lambda weights: weights[NAME].mul_(float("nan")))
    rejected(f"tensor {NAME} is infinite or NaN in torch.float32 somewhere; wanted finite", weights="int8")
    change_weights(tmp_path, lambda weights: weights[NAME].fill_(1e5))
    DeepseekV2ForCausalLM.from_pretrained(tmp_path, weights="int8")
    rejected(f"tensor {NAME} is infinite or NaN in torch.float16", weights="int8", dtype=torch.float16)
    quantize(model, "int8").save_pretrained(tmp_path)
    rejected("weights is 'int8'; wanted None: the checkpoint holds int8 codes", weights="int8")


@pytest.mark.parametrize("weights", [None, *KINDS])
@pytest.mark.parametrize("name", NARROW_CONFIGS)
def test_random_weights(name: str, weights: str | None) -> None:
    config = replace(NARROW_CONFIGS[name], initializer_range=0.03)
    torch.manual_seed(0)
    model = DeepseekV2ForCausalLM.random(config, weights, 4, dtype=torch.float32)
    expected = DeepseekV2ForCausalLM(config)
    if weights:
        quantize(expected, weights, 4)
    told = {key: (value.shape, value.dtype) for key, value in expected.state_dict().items()}
    assert {key: (value.shape, value.dtype) for key, value in model.state_dict().items()} == told
    assert not model.training
    for key, (held, _) in quantized_places(model).items():
        dense = held.dense()
        # The error of a standard deviation from n draws is about 1 / sqrt(2 n) of it; at least 384 here. Six of those.
        assert dense.std() == pytest.approx(0.03, rel=6 / (2 * dense.numel()) ** 0.5), key
        assert abs(float(dense.mean())) < 6 * 0.03 / dense.numel() ** 0.5
        assert len(dense.unique()) >= 8
    for key, value in model.state_dict().items():
        if key.endswith("norm.weight"):
            assert (value == 1).all(), key
        elif key.endswith("bias"):
            assert (value == 0).all(), key
    with torch.no_grad():
        assert model(IDS)[0].isfinite().all()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "tied")
    layer = DeepseekV2DecoderLayer.random(config, 1, weights, 4, torch.bfloat16)
    assert layer(torch.zeros(1, 2, 48, dtype=torch.bfloat16))[0].dtype == torch.bfloat16
    meta = DeepseekV2ForCausalLM.random(config, weights, 4, torch.bfloat16, "meta")
    assert all(value.is_meta for value in meta.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "float32"], ids=str)
@pytest.mark.usefixtures("as_shipped")
def test_a_dtype_in_which_no_layer_runs_is_rejected(dtype: Any, tmp_path: Path) -> None:
    said = r"^dtype is .*; wanted None or torch's float64, float32, float16 or bfloat16$"
    makers: list[Callable[[], object]] = [
        lambda: DeepseekV2ForCausalLM.random(NARROW, "int8", dtype=dtype),
        lambda: DeepseekV2DecoderLayer.random(NARROW, 0, dtype=dtype),
        lambda: DeepseekV2ForCausalLM.from_pretrained(tmp_path, dtype),
    ]
    for make in makers:
        with pytest.raises(ValueError, match=said):
            make()
    others: list[Callable[[], object]] = [
        lambda: DeepseekV2ForCausalLM.random({}),  # type: ignore[arg-type]
        lambda: DeepseekV2DecoderLayer.random(None, 0),  # type: ignore[arg-type]
    ]
    for make in others:
        with pytest.raises(ValueError, match=r"^config is a \w+; wanted a DeepseekV2Config"):
            make()


def test_every_code_is_drawn() -> None:
    torch.manual_seed(0)
    for kind, codes in (("int8", range(-127, 128)), ("int4", range(-7, 8, 2))):
        layer = DeepseekV2DecoderLayer.random(NARROW, 1, kind, 4)
        drawn = layer.mlp.experts.gate_up_proj.dense() / layer.mlp.experts.gate_up_proj.scales[0, 0, 0]
        values, counts = drawn.round().long().unique(return_counts=True)
        assert values.tolist() == list(codes)
        # Equally often, but for the least of 256 bytes, which is cut to the next: of n draws of one in k, n / k each,
        # give or take six times its root.
        each = torch.full((len(codes),), drawn.numel() / (256 if kind == "int8" else 8))
        each[0] *= 2 if kind == "int8" else 1
        assert ((counts - each).abs() < 6 * each**0.5).all()


BIG = replace(
    SMALL, hidden_size=1024, moe_intermediate_size=512, n_routed_experts=32, num_attention_heads=8, q_lora_rank=64,
    kv_lora_rank=64, qk_nope_head_dim=64, v_head_dim=64, qk_rope_head_dim=64, intermediate_size=1024, vocab_size=128,
    num_hidden_layers=2, n_shared_experts=1,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process its peak")
@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("from_pretrained", "int4"),
        ("random", "fp8"),
        *thorough(("from_pretrained", "int8"), ("random", "int4")),
    ],
)
def test_the_peak_of_a_quantised_layer(kind: str, how: str, tmp_path: Path) -> None:
    """In a process of its own. Beside the layer there is one of its matrices in float32, four times over: it, its
    sizes, its quotients and their rounding."""
    with torch.device("meta"):
        layer = quantize(DeepseekV2DecoderLayer(BIG, 1).bfloat16(), kind)
    size = sum(value.nbytes for value in layer.state_dict().values())
    if how == "from_pretrained":
        DeepseekV2ForCausalLM(BIG).bfloat16().save_pretrained(tmp_path)
    else:
        (tmp_path / "config.json").write_text(json.dumps(encode(BIG)))
    largest = 4 * 1024 * 512
    code = f"""
import json, re, sys, torch
from pathlib import Path
from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def load(index):
    if {how == "random"}:
        config = DeepseekV2Config.from_published(json.loads((Path(sys.argv[1]) / "config.json").read_text()))
        return DeepseekV2DecoderLayer.random(config, index, "{kind}", dtype=torch.bfloat16)
    return DeepseekV2DecoderLayer.from_pretrained(sys.argv[1], index, weights="{kind}")

load(0)  # what is imported on the way, and what the allocator keeps
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
layer = load(1)
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    taken = int(run.stdout)
    slack = 16_000_000  # what layer 0 left to be used again, and back; the layer in bfloat16 would be 100 MB
    assert size < taken + slack, f"{taken:,} for {size:,}"
    kept = 8_000_000  # by the allocator, of what it had to give: 3 MB in one run of forty
    assert taken <= size + 4 * largest + slack + kept, f"{taken:,} for {size:,}"


# From afar


class Quiet(SimpleHTTPRequestHandler):
    """A server without ranges."""

    def log_message(self, *args: Any) -> None:
        pass


@dataclass
class Behaviour:
    """What a server does, and what it was asked."""

    break_after: int = 0  # bytes of a body, of every other request
    lie: int = 0  # added to lengths
    status: int = 0  # of files in safetensors
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    sent: int = 0


class Ranges(BaseHTTPRequestHandler):
    """A server with ranges, which misbehaves as it is told."""

    def __init__(self, folder: Path, behaviour: Behaviour, *args: Any) -> None:
        self.folder, self.behaviour = folder, behaviour
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        told = self.behaviour
        told.asked.append((self.path, self.headers["Range"], self.headers["Authorization"]))
        if self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/moved"))
            self.end_headers()
            return
        path = self.folder / self.path.lstrip("/")
        if told.status and path.suffix == ".safetensors":
            self.send_error(told.status)
            return
        if not path.is_file():
            self.send_error(404)
            return
        body = path.read_bytes()
        start, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())  # type: ignore[union-attr]
        part = body[start : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(body) + told.lie}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if told.break_after and len(told.asked) % 2:
            part = part[: told.break_after]
        try:
            for at in range(0, len(part), 4096):
                self.wfile.write(part[at : at + 4096])
                told.sent += min(4096, len(part) - at)
        except (BrokenPipeError, ConnectionResetError):
            pass


@pytest.fixture
def serve() -> Iterator[Callable[[Any], str]]:
    servers = []

    def start(handler: Any) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("gap", [0, 5000])
def test_a_layer_from_afar_reads_its_own_bytes(
    gap: int, tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the server sent: the answer that tells the length, the rest of the header, and the layer in one piece."""
    monkeypatch.setattr(files, "SKIPPED", gap)
    monkeypatch.setattr(files, "FIRST", 4096)
    config = replace(SMALL, num_hidden_layers=4, vocab_size=4096)
    model, told = saved(tmp_path, config, shard=10**9), Behaviour()
    address = serve(partial(Ranges, tmp_path, told))
    layer = DeepseekV2DecoderLayer.from_pretrained(address, 2)
    assert same(layer, model.model.layers[2])
    own = sum(weight.nbytes for weight in layer.state_dict().values())
    with (tmp_path / "model.safetensors").open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    ranges = [asked for path, asked, _ in told.asked if path == "/model.safetensors"]
    assert len(ranges) == 3, ranges
    whole = (tmp_path / "model.safetensors").stat().st_size
    assert told.sent == (tmp_path / "config.json").stat().st_size + header + own
    assert told.sent < whole / 8


@pytest.mark.parametrize("shard", [30_000, 10**9])
def test_a_model_from_afar(shard: int, tmp_path: Path, serve: Any) -> None:
    model = saved(tmp_path, V3_GATE, shard)
    for handler in (partial(Ranges, tmp_path, Behaviour()), partial(Quiet, directory=tmp_path)):
        address = serve(handler)
        assert same(DeepseekV2ForCausalLM.from_pretrained(address + "/"), model)
        assert same(DeepseekV2DecoderLayer.from_pretrained(address, 1), model.model.layers[1])


def test_a_server_without_ranges_is_read_once(tmp_path: Path, serve: Any) -> None:
    class Counting(Quiet):
        asked: ClassVar[list[str]] = []

        def do_GET(self) -> None:
            self.asked.append(self.path)
            super().do_GET()

    saved(tmp_path, shard=10**9)
    DeepseekV2DecoderLayer.from_pretrained(serve(partial(Counting, directory=tmp_path)), 1)
    assert Counting.asked.count("/model.safetensors") <= 2


def test_no_connection_outlives_a_load_that_fails(tmp_path: Path, serve: Any) -> None:
    """Although the error, through its traceback, still holds the files."""
    saved(tmp_path, shard=10**9)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"kv_lora_rank": 40}))
    with pytest.raises(ValueError, match="wanted") as caught:
        DeepseekV2DecoderLayer.from_pretrained(serve(partial(Quiet, directory=tmp_path)), 1)
    left = [x for x in gc.get_objects() if type(x) is HTTPResponse and not x.isclosed()]
    assert left == []
    assert caught.tb is not None


def test_redirects_do_not_tell_the_token_to_other_hosts(tmp_path: Path, serve: Any) -> None:
    model, told, elsewhere = saved(tmp_path), Behaviour(), Behaviour()
    own = serve(partial(Ranges, tmp_path, told))
    layer = DeepseekV2DecoderLayer.from_pretrained(f"{own}/moved", 1, token="secret")
    assert same(layer, model.model.layers[1])
    assert {token for _, _, token in told.asked} == {"Bearer secret"}

    other = serve(partial(Ranges, tmp_path, elsewhere))

    class Away(Quiet):
        def do_GET(self) -> None:
            self.send_response(307)
            self.send_header("Location", other + self.path)
            self.end_headers()

    assert same(DeepseekV2DecoderLayer.from_pretrained(serve(Away), 1, token="secret"), model.model.layers[1])
    assert {token for _, _, token in elsewhere.asked} == {None}


def test_a_connection_that_breaks_is_resumed(tmp_path: Path, serve: Any) -> None:
    model, told = saved(tmp_path, shard=10**9), Behaviour(break_after=60_000)
    address = serve(partial(Ranges, tmp_path, told))
    assert same(DeepseekV2ForCausalLM.from_pretrained(address), model)
    starts = [int(re.findall(r"\d+", asked or "0")[0]) for path, asked, _ in told.asked if path == "/model.safetensors"]
    assert len(starts) > 1
    assert starts == sorted(starts)  # nothing is read twice


def test_a_connection_that_always_breaks_is_given_up(
    tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    saved(tmp_path, shard=10**9)

    class Dead(Ranges):
        def do_GET(self) -> None:
            if self.path.endswith(".safetensors"):
                self.send_response(206)
                self.send_header("Content-Range", "bytes 0-999999/1000000")
                self.send_header("Content-Length", "1000000")
                self.end_headers()
            else:
                super().do_GET()

    assert_rejected(
        serve(partial(Dead, tmp_path, Behaviour())), r"model.safetensors cannot be read: \S.*connection ended", OSError
    )


def test_a_length_that_is_wrong(tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, shard=10**9)
    address = serve(partial(Ranges, tmp_path, Behaviour(lie=8)))
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    assert_rejected(address, r"config.json cannot be read: ", OSError)


@pytest.mark.parametrize("status", [401, 403, 404, 500, 503])
def test_a_server_that_says_no(status: int, tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, shard=10**9)
    told = Behaviour(status=status)
    address = serve(partial(Ranges, tmp_path, told))
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    assert_rejected(address, rf"{address}/model.safetensors .*the server says {status}", OSError)
    tried = sum(path == "/model.safetensors" for path, _, _ in told.asked)
    assert tried == (files.ATTEMPTS if status >= 500 else 1)


@pytest.mark.parametrize("address", ["http://", "https:///folder", "https://[::1", "http://[x]/"])
def test_addresses_without_a_host(address: str) -> None:
    assert_rejected(address, r"^source is '\S+'; wanted an address with a host, as http://host/folder$")


@pytest.mark.parametrize("name", ["an é", "two words", "a\nline"])
def test_addresses_that_no_request_can_carry(name: str) -> None:
    assert_rejected(f"http://127.0.0.1:9/{name}", r"^source is '.*'; wanted spaces and what is not ASCII percent-enc")


def test_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    assert_rejected("http://127.0.0.1:9", "http://127.0.0.1:9/config.json cannot be read: .*refused", OSError)


class Answering(Quiet):
    """Answers in one way, after a number of connections that are dropped without an answer."""

    drop: ClassVar[int] = 0
    status: ClassVar[int] = 0  # 0: as any server without ranges
    told: ClassVar[dict[str, str]] = {}

    def do_GET(self) -> None:
        kind = type(self)
        if kind.drop:
            kind.drop -= 1
        elif not kind.status:
            super().do_GET()
        else:
            self.send_response(kind.status)
            for name, value in kind.told.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"{}" * 50)


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (206, {"Content-Range": "bytes 8-99/100"}, "is sent as 'bytes 8-99/100'; wanted its bytes from 0 on"),
        (206, {"Content-Range": "bytes 0-100/100"}, "is sent as 'bytes 0-100/100'; wanted its bytes from 0 on"),
        (
            206,
            {"Content-Range": "bytes 0-99/*"},
            r"is sent with the length 'bytes 0-99/\*'; wanted how many bytes it has",
        ),
        (206, {"Content-Length": "100"}, "is sent with the length 'nothing'; wanted how many bytes it has"),
        (200, {"Content-Type": "text/html"}, "is sent with the length 'nothing'; wanted how many bytes it has"),
    ],
)
def test_an_answer_that_does_not_fit(status: int, headers: dict[str, str], message: str, serve: Any) -> None:
    handler = type("Handler", (Answering,), {"status": status, "told": headers})
    assert_rejected(serve(handler), f"config.json cannot be read: it {message}", OSError)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Python leaves their sockets open
def test_connections_that_are_dropped_before_an_answer(
    tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    model = saved(tmp_path)
    handler = type("Handler", (Answering,), {"drop": files.ATTEMPTS - 1})
    address = serve(partial(handler, directory=tmp_path))
    assert same(DeepseekV2DecoderLayer.from_pretrained(address, 1), model.model.layers[1])
    handler.drop = files.ATTEMPTS  # type: ignore[attr-defined]
    assert_rejected(address, "config.json cannot be read: Remote end closed connection", OSError)
    gc.collect()


def test_a_token_is_not_told_where_the_scheme_is_another() -> None:
    request = urllib.request.Request("https://here/a", headers={"Authorization": "Bearer secret"})
    for address, told in {"https://here/b": True, "http://here/b": False, "https://there/a": False}.items():
        new = files._Redirects().redirect_request(request, None, 302, "", {}, address)
        assert new.has_header("Authorization") == told, address


# Names on the Hub


def test_a_name_on_the_hub(tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a double of the Hub's client: whole models go through its cache, layers are read where they lie."""
    import huggingface_hub as hub

    model, told = saved(tmp_path / "repository"), Behaviour()
    address = serve(partial(Ranges, tmp_path / "repository", told))
    asked = []

    def snapshot_download(name: str, local_files_only: bool = False, **settings: Any) -> str:
        asked.append((name, local_files_only, settings["revision"]))
        if local_files_only:
            raise hub.errors.LocalEntryNotFoundError("not here")
        return str(tmp_path / "repository")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub, "hf_hub_url", lambda name, file, revision: f"{address}/{file}")
    monkeypatch.setattr(hub, "get_token", lambda: "mine")
    assert same(DeepseekV2ForCausalLM.from_pretrained("owner/model", revision="v1"), model)
    assert not told.asked
    assert same(DeepseekV2DecoderLayer.from_pretrained("owner/model", 1), model.model.layers[1])
    assert {token for _, _, token in told.asked} == {"Bearer mine"}
    assert asked == [("owner/model", False, "v1"), ("owner/model", True, None)]
    cached = tmp_path / "snapshots" / "0a1b2c"
    cached.mkdir(parents=True)
    (tmp_path / "repository" / "config.json").rename(cached / "config.json")
    addresses = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **settings: str(cached))
    monkeypatch.setattr(
        hub, "hf_hub_url", lambda name, file, revision: addresses.append(revision) or f"{address}/{file}"
    )
    assert same(DeepseekV2DecoderLayer.from_pretrained("owner/model", 1, revision="main"), model.model.layers[1])
    assert addresses == ["0a1b2c"]  # what is cached and what is not are of one commit

    def fail(*args: Any, **settings: Any) -> str:
        raise RuntimeError("503 Server Error\n\nfor url")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    assert_rejected(
        "owner/model", "^owner/model cannot be read from the Hugging Face Hub: 503 Server Error for url$", OSError
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ImportError, match="source is 'owner/model', which looks like a name on the Hub; wanted pip install"
    ):
        DeepseekV2DecoderLayer.from_pretrained("owner/model", 1)
