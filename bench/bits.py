"""``python -m bench.bits``: what fewer bits do to the time of V2-Lite's layer, of its cache, and of the whole model.

Caches are timed in turn, and so is what `pack_weights` makes of the same weights. Weights of other kinds follow, as they do
not fit into memory together. They are random: the time does not depend on them.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench.machine import in_turn, median, read_bandwidth
from bench.memory import status
from dsv2_ref import (
    DeepseekV2Config,
    DeepseekV2DecoderLayer,
    DeepseekV2ForCausalLM,
    pack_weights,
)
from dsv2_ref.fast.processor import has_bfloat16
from dsv2_ref.quantize import KINDS
from dsv2_ref.rope import position_tables

CONFIG = DeepseekV2Config.deepseek_v2_lite()
LAYERS = 2  # one after the other, as in a model: more weights than the processor caches
SHORT, LONG, PREFILL = 64, 8192, 2048
FORMATS = (None, "fp8", "int8", "int4")


def random_layers(weights: str | None, how: str, config: DeepseekV2Config) -> list[Any]:
    """`LAYERS` layers with experts, packed in one of the ways of `contestants`."""
    layers = [DeepseekV2DecoderLayer.random(config, 1 + i, weights, dtype=torch.bfloat16) for i in range(LAYERS)]
    if how:
        pack_weights(torch.nn.ModuleList(layers), compiled=how == "compiled")
    return layers


def contestants(config: DeepseekV2Config) -> dict[str | None, list[str]]:
    """What `pack_weights` makes of weights of each kind (None: bfloat16), and ``""`` for weights as they are. Plain
    bfloat16 is packed where the processor multiplies it."""
    found = {
        None: ["", "packed", "compiled"],
        "int8": ["", "packed", "compiled"],
        "int4": ["", "packed", "compiled"],
        "fp8": [""],
    }
    if not has_bfloat16():
        found[None].remove("packed")
    if config.moe_intermediate_size % 128:
        del found["fp8"]
    return found


def active_bytes(layer: DeepseekV2DecoderLayer, config: DeepseekV2Config) -> int:
    """Bytes of the weights that one token passes through."""
    shared = sum(x.nbytes for name, x in layer.state_dict().items() if ".experts." not in name)
    routed = sum(x.nbytes for name, x in layer.state_dict().items() if ".experts." in name)
    return shared + routed * config.num_experts_per_tok // (config.n_routed_experts or 1)


def steps_of(layers: list[Any], past: int, seq: int, format: str | None = None) -> Callable[[], Any]:
    """One call of every layer, or attention, of another token each time, over ``past`` cached ones."""
    attentions = [getattr(layer, "self_attn", layer) for layer in layers]
    config = attentions[0].config
    tokens = torch.randn(8, 1, seq, config.hidden_size).to(torch.bfloat16)
    caches = []
    for attention in attentions:
        cache = attention.empty_cache(1, past + 64, format)
        features = torch.randn(1, past, *attention.cache_features).to(torch.bfloat16)
        caches.append(cache.append(features) if past else cache)
    tables = position_tables(config, tokens[0], None, caches[0])  # once for all layers of a model, so not counted
    count = 0

    def step() -> None:
        nonlocal count
        hidden_states = tokens[count % len(tokens)]
        count += 1
        for layer, cache in zip(layers, caches, strict=True):
            cache._storage.used = len(cache)  # the next step writes where the last one did
            arguments = {"past_key_value": cache, "use_cache": True, "position_embeddings": tables}
            hidden_states, *_ = layer(hidden_states, **arguments)

    return step


def weights_table(config: DeepseekV2Config, rounds: int, bandwidth: float) -> list[dict[str, Any]]:
    """Milliseconds of a layer per token, decoding and in a prompt, by the bits of its weights."""
    rows: list[dict[str, Any]] = []
    for kind, ways in contestants(config).items():
        layers = {how: random_layers(kind, how, config) for how in ways}
        nbytes = active_bytes(layers[""][0], config)
        decode = in_turn({how: steps_of(layers[how], SHORT, 1) for how in ways}, rounds)
        for how in ways:
            prompt = steps_of(layers[how][:1], 0, PREFILL)
            prompt()
            start = time.perf_counter()
            prompt()
            prefill = (time.perf_counter() - start) / PREFILL
            times = {"decode": median(decode[how]) / LAYERS, "limit": nbytes / bandwidth, "prefill": prefill}
            rows.append({"weights": f"{kind or 'bfloat16'} {how}".strip(), "active_bytes": nbytes, **times})
        del layers
    return rows


def cache_table(config: DeepseekV2Config, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of a compiled layer per token over `LONG` cached ones, by the bits of the cache."""
    layers = random_layers(None, "compiled", config)
    steps = {format or "bfloat16": steps_of(layers, LONG - 1, 1, format) for format in FORMATS}
    seconds = in_turn(steps, rounds)
    attention = layers[0].self_attn
    sizes = {format or "bfloat16": attention.empty_cache(1, 1, format).reserved_nbytes for format in FORMATS}
    return [{"cache": name, "bytes": sizes[name], "decode": median(seconds[name]) / LAYERS} for name in seconds]


def _whole(weights: str, tokens: int, threads: int, config: DeepseekV2Config) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    bandwidths = [read_bandwidth()]  # before and after: on shared machines it changes within minutes
    start = time.perf_counter()
    model = pack_weights(DeepseekV2ForCausalLM.random(config, weights, dtype=torch.bfloat16), compiled=True)
    built = time.perf_counter() - start
    prompt = torch.randint(config.vocab_size, (1, 16))
    times = [time.perf_counter() for _ in model.stream(prompt, tokens)]
    steps = [after - before for before, after in pairwise(times)]
    peak = status("VmHWM")  # before state dicts, which hold packed codes once more: one part at a time
    bandwidths.append(read_bandwidth())
    blocks: Any = model.model.layers
    parts: list[Any] = [*blocks, model.model.embed_tokens, model.model.norm, model.lm_head]
    layers = sum(active_bytes(layer, config) for layer in blocks)
    return {
        "weights": weights,
        "bytes": sum(x.nbytes for part in parts for x in part.state_dict().values()),
        "peak": peak,
        "seconds_to_build": built,
        "active_bytes": layers + model.lm_head.weight.nbytes,
        "seconds_per_token": median(steps),
        "bandwidth": sum(bandwidths) / 2,
    }


def whole_model(weights: str, tokens: int, threads: int, config: DeepseekV2Config = CONFIG) -> dict[str, Any]:
    """A model with random weights built, packed and run in a process of its own: its peak of memory, and its speed."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # which says so if it is killed
        return pool.submit(_whole, weights, tokens, threads, config).result()


def main() -> None:
    """Measure, print the tables, and write the figures to a JSON file."""
    parser = argparse.ArgumentParser(prog="python -m bench.bits", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="samples of each row, of which the median counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--whole", nargs="*", choices=KINDS, default=["int4"], help="weights of the whole model, to run"
    )
    parser.add_argument("--tokens", type=int, default=32, help="that the whole model writes")
    parser.add_argument("--only-whole", action="store_true", help="leave the tables out")
    parser.add_argument("--json", type=Path, default=Path("_build/bench-bits.json"), help="where the figures go")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {capability}, {args.threads} threads, reads {bandwidth / 1e9:.1f} GB/s\n")
    weights = [] if args.only_whole else weights_table(CONFIG, args.rounds, bandwidth)
    caches = [] if args.only_whole else cache_table(CONFIG, args.rounds)
    if weights:
        print(
            f"{'a layer of V2-Lite, weights in':32}{'MB per token':>14}{'decode ms':>12}{'limit ms':>12}{'prefill ms':>12}"
        )
    for row in weights:
        times = f"{1e3 * row['decode']:12.2f}{1e3 * row['limit']:12.2f}{1e3 * row['prefill']:12.3f}"
        print(f"{row['weights']:32}{row['active_bytes'] / 1e6:14.1f}{times}")
    if caches:
        print(f"\n{f'over {LONG} tokens, cache in':32}{'bytes per token':>16}{'decode ms':>12}")
    for row in caches:
        print(f"{row['cache']:32}{row['bytes']:16}{1e3 * row['decode']:12.2f}")
    whole = [whole_model(kind, args.tokens, args.threads) for kind in args.whole]
    for row in whole:
        rate, limit = 1 / row["seconds_per_token"], row["bandwidth"] / row["active_bytes"]
        print(
            f"\nV2-Lite in {row['weights']}: {row['bytes'] / 1e9:.2f} GB, built in {row['seconds_to_build']:.0f} s, "
            f"{row['peak'] / 1e9:.2f} GB at the peak; {rate:.2f} tokens per second, "
            f"{rate / limit:.0%} of what reading {row['active_bytes'] / 1e9:.2f} GB per token allows at "
            f"{row['bandwidth'] / 1e9:.1f} GB/s"
        )
    figures = {"torch": torch.__version__, "capability": capability, "threads": args.threads, "bandwidth": bandwidth}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(figures | {"weights": weights, "caches": caches, "whole": whole}, indent=2) + "\n")


if __name__ == "__main__":
    main()
