"""``python -m bench.llama``: V2-Lite's layer in llama.cpp and compiled here, one token after the other in turn.

It needs ``pip install llama-cpp-python gguf``, which compiles llama.cpp for this processor in some ten minutes. Models of
a few layers with random weights are written in llama.cpp's own formats; the time does not depend on the weights.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch

from bench.bits import CONFIG, LAYERS, PREFILL, SHORT, random_layers, steps_of
from bench.machine import median, once

VOCABULARY = 64  # small, so that embedding and head take no time
FORMATS = {"BF16": None, "Q8_0": "int8", "Q4_0": "int4"}  # and the weights of ours that have as many bits


def random_weights(shape: tuple[int, ...], kind: str) -> Any:
    """The bytes of a matrix, or of a stack of equal ones, in one of llama.cpp's formats. Norms and gates are float32."""
    *stack, outputs, inputs = shape if len(shape) > 1 else (1, *shape)
    random = np.random.default_rng(0)
    if kind == "F32":
        matrix: Any = random.normal(0, 0.02, (outputs, inputs)).astype(np.float32)
    elif kind == "BF16":
        matrix = (random.normal(0, 0.02, (outputs, inputs)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        matrix = matrix.view(np.uint8)
    else:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        blocks = random.integers(0, 256, (outputs, inputs // block, size), np.uint8)
        blocks[..., :2] = np.array([2e-3], np.float16).view(np.uint8)  # the scale, before the codes
        matrix = blocks.reshape(outputs, -1)
    matrix = np.broadcast_to(matrix, (*stack, *matrix.shape))
    return np.ascontiguousarray(matrix[0] if len(shape) == 1 else matrix)


def write_model(path: Path, kind: str) -> None:
    """A file with `LAYERS` layers of experts of V2-Lite and a small vocabulary."""
    D, H, C = CONFIG.hidden_size, CONFIG.num_attention_heads, CONFIG.kv_lora_rank or 0
    N, R, V = CONFIG.qk_nope_head_dim, CONFIG.qk_rope_head_dim, CONFIG.v_head_dim
    E, width = CONFIG.n_routed_experts or 0, CONFIG.moe_intermediate_size
    shared = width * (CONFIG.n_shared_experts or 0)
    writer = gguf.GGUFWriter(path, "deepseek2")
    writer.add_block_count(LAYERS)
    writer.add_context_length(PREFILL + SHORT)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(H)
    writer.add_head_count_kv(1)  # the absorbed form: all heads share a key and a value
    writer.add_key_length(C + R)
    writer.add_value_length(C)
    writer.add_key_length_mla(N + R)
    writer.add_value_length_mla(V)
    writer.add_q_lora_rank(0)
    writer.add_kv_lora_rank(C)
    writer.add_rope_dimension_count(R)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_leading_dense_block_count(0)
    writer.add_expert_count(E)
    writer.add_expert_used_count(CONFIG.num_experts_per_tok or 0)
    writer.add_expert_shared_count(CONFIG.n_shared_experts or 0)
    writer.add_expert_feed_forward_length(width)
    writer.add_expert_weights_scale(CONFIG.routed_scaling_factor)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    layer: dict[str, tuple[Any, ...]] = {
        "attn_norm": ("F32", D),
        "attn_kv_a_norm": ("F32", C),
        "ffn_norm": ("F32", D),
        "ffn_gate_inp": ("F32", E, D),
        "attn_q": (kind, H * (N + R), D),
        "attn_kv_a_mqa": (kind, C + R, D),
        "attn_k_b": (kind, H, C, N),
        "attn_v_b": (kind, H, V, C),
        "attn_output": (kind, D, H * V),
        "ffn_gate_exps": (kind, E, width, D),
        "ffn_up_exps": (kind, E, width, D),
        "ffn_down_exps": (kind, E, D, width),
        "ffn_gate_shexp": (kind, shared, D),
        "ffn_up_shexp": (kind, shared, D),
        "ffn_down_shexp": (kind, D, shared),
    }
    tensors: dict[str, tuple[Any, ...]] = {"token_embd": ("F32", VOCABULARY, D), "output_norm": ("F32", D)}
    tensors |= {f"blk.{index}.{name}": shape for index in range(LAYERS) for name, shape in layer.items()}
    for name, (stored, *shape) in tensors.items():
        weights = random_weights(tuple(shape), stored)
        writer.add_tensor(f"{name}.weight", weights, raw_dtype=gguf.GGMLQuantizationType[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Model:
    """A file that llama.cpp has read, and the tokens that it has seen."""

    def __init__(self, path: Path, threads: int) -> None:
        parameters = llama_cpp.llama_model_default_params()
        parameters.use_mmap = False  # read before the clock starts
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = PREFILL + SHORT
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)

    def __call__(self, tokens: int) -> None:
        """Compute so many tokens more."""
        numbers = (llama_cpp.llama_token * tokens)(*[i % VOCABULARY for i in range(tokens)])
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(numbers, tokens)):
            raise SystemExit("llama.cpp could not run the model")
        llama_cpp.llama_synchronize(self.context)

    def forget(self, after: int) -> None:
        """Leave only the first tokens."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.context), 0, after, -1)

    def close(self) -> None:
        """Give its memory back."""
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


def measure(path: Path, ours: Callable[[], Any], rounds: int, threads: int) -> tuple[float, float, float]:
    """Seconds of a layer for each token of a prompt of `PREFILL`, for one token after `SHORT` others, and of ``ours``.

    Single tokens are timed in turn, each after one that is not counted: the threads of the other have come to rest then.
    """
    model = Model(path, threads)
    for _ in range(2):
        model.forget(0)
        prefill = once(lambda: model(PREFILL))
    model.forget(0)
    model(SHORT)
    samples: dict[str, list[float]] = {"llama.cpp": [], "ours": []}
    for _ in range(rounds):
        for name, work in (("llama.cpp", lambda: model(1)), ("ours", ours)):
            time.sleep(0.01)
            work()
            samples[name].append(once(work))
        model.forget(SHORT)
    model.close()
    theirs, here = (median(seconds[2:]) / LAYERS for seconds in samples.values())
    return prefill / PREFILL / LAYERS, theirs, here


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.llama", description=__doc__)
    parser.add_argument("--rounds", type=int, default=60, help="tokens, of which the median counts")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    print(f"llama-cpp-python {llama_cpp.__version__}, {args.threads} threads\n")
    print(f"{'a layer of V2-Lite, weights in':32}{'prefill ms':>12}{'decode ms':>12}{'compiled here':>15}")
    for kind, weights in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_model(path, kind)
            ours = steps_of(random_layers(weights, "compiled", CONFIG), SHORT, 1)
            prefill, theirs, here = measure(path, ours, args.rounds, args.threads)
        both = f"{kind}, {weights or 'bfloat16'}"
        print(f"{both:32}{1e3 * prefill:12.3f}{1e3 * theirs:12.2f}{1e3 * here:15.2f}")


if __name__ == "__main__":
    main()
