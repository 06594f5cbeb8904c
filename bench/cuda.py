"""``python -m bench.cuda``: time the layer's parts on a GPU, print a table, write the figures to a JSON file."""

import argparse
import datetime
import functools
import gc
import importlib.metadata
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import gpu, work
from bench.gpu import Clock
from dsv2_ref import DeepseekV2ForCausalLM, DeepseekV2RMSNorm, accounting, ops
from dsv2_ref.attention import attend
from dsv2_ref.fast.sdpa import equally_wide
from dsv2_ref.fast.triton import operators, plan
from dsv2_ref.masks import Visibility
from dsv2_ref.moe import RoutedExperts
from dsv2_ref.quantize import KINDS
from dsv2_ref.quantized_modules import QuantizedExperts
from dsv2_ref.records import QuantizedLatentCache, Record, attend_records
from dsv2_ref.rope import rotate_interleaved

Step = Callable[[], Tensor]

SAME_WITHIN = {torch.bfloat16: 0.03, torch.float16: 0.01, torch.float32: 1e-4}
"""How far results may differ, of their size: both sides round every intermediate result."""


@dataclass
class Contest:
    """One row: ways to compute the same, by who does it and in which setting; ``ours`` come first.

    ``flops`` and ``nbytes`` are those that cannot be spared: products, and weights, cache and streams moved once.
    """

    name: str
    contestants: dict[str, dict[str, Step]]
    flops: int
    nbytes: int


def _without_kernels(step: Step) -> Step:
    def plain() -> Tensor:
        with ops.without("triton"):
            return step()

    return plain


def _from_work(made: work.Work) -> Contest:
    plain = {name: _without_kernels(step) for name, step in made.ours.items()}
    contestants = {"ours": made.ours, "without kernels": plain, "transformers": made.peers}
    if made.flash:
        contestants["flash-attn"] = made.flash
    return Contest(made.name, contestants, made.flops, made.nbytes)


def _add_rmsnorm(dtype: torch.dtype, tokens: int = 8192) -> Contest:
    hidden = work.CONFIG.hidden_size
    update, residual = (torch.randn(tokens, hidden, dtype=dtype) for _ in range(2))
    weight = torch.randn(hidden, dtype=dtype)
    norm = DeepseekV2RMSNorm(len(weight)).to(weight)
    norm.weight.data = weight

    def definition() -> Tensor:
        with ops.plain():
            out: Tensor = norm(residual + update)
            return out

    def kernel() -> Tensor:
        if update.is_cuda:
            return operators.add_rms_norm(update, residual, weight, 1e-6)[1]
        return definition()

    ours = {"kernel": kernel}
    plain = {"definition": definition}
    moved = 4 * update.nbytes + weight.nbytes
    return Contest(f"add + RMSNorm, {tokens} tokens", {"ours": ours, "without kernels": plain}, 0, moved)


def _rotation(dtype: torch.dtype, tokens: int = 4096) -> Contest:
    x = torch.randn(1, work.CONFIG.num_attention_heads, tokens, work.CONFIG.qk_rope_head_dim, dtype=dtype)
    cos, sin = (torch.randn(1, 1, tokens, work.CONFIG.qk_rope_head_dim // 2) for _ in range(2))
    ours = {"kernel": lambda: operators.rotate(x, cos, sin) if x.is_cuda else rotate_interleaved(x, cos, sin)}
    plain = {"definition": lambda: rotate_interleaved(x, cos, sin)}
    moved = 2 * x.nbytes + cos.nbytes + sin.nbytes
    return Contest(f"rotation of queries, {tokens} tokens", {"ours": ours, "without kernels": plain}, 0, moved)


TILES = {"narrow blocks": plan.Tile(16, 32, 4, 2, 4), "wide blocks": plan.Tile(64, 64, 8, 2, 1)}


def _attend_decode(dtype: torch.dtype, batch: int, kv_seq: int = 8192, heads: int | None = None) -> Contest:
    """The decoding kernel, whether or not the layer would choose it here, against plain products, and with either tile."""
    config = work.CONFIG
    heads, latent = heads or config.num_attention_heads, config.kv_lora_rank
    width = latent + config.qk_rope_head_dim
    query = torch.randn(batch, heads, 1, width, dtype=dtype)
    tokens = torch.randn(batch, kv_seq, width, dtype=dtype)
    visible = Visibility(1, kv_seq, tokens.device)

    def products() -> Tensor:
        key = tokens[:, None]
        return attend(query, key, key[..., :latent], visible, width**-0.5, implementation="products")[0]

    def kernel() -> Tensor:
        return operators.mla_decode(query, tokens, latent, width**-0.5) if query.is_cuda else products()

    def with_tile(tile: plan.Tile) -> Tensor:
        with patch.object(plan, "decode_tile", lambda *_: tile):
            return kernel()

    contestants: dict[str, dict[str, Step]] = {
        "ours": {"kernel": kernel},
        "without kernels": {"products": _without_kernels(products)},
        "tile": {name: functools.partial(with_tile, tile) for name, tile in TILES.items()},
    }
    flops = 2 * batch * heads * kv_seq * (width + latent)
    name = f"attention of {heads} heads to the cache, K = {kv_seq}, batch {batch}"
    return Contest(name, contestants, flops, tokens.nbytes)


def _experts_in_fewer_bits(dtype: torch.dtype, kind: str, tokens: int = 1) -> Contest:
    """The routed experts by codes, against the same weights in ``dtype``: what reading fewer bytes gains."""
    plain = RoutedExperts(work.CONFIG).to(dtype).eval()
    hidden, choices = work.CONFIG.hidden_size, work.CONFIG.num_experts_per_tok
    experts = QuantizedExperts(plain, kind, group=64 if hidden % 64 == 0 else 4)
    with torch.no_grad():
        for expert in range(len(plain.down_proj)):
            for name in ("gate_up_proj", "down_proj"):
                quantised, stack = getattr(experts, name), getattr(plain, name)
                quantised.fill(stack[expert], expert)
                stack[expert] = quantised[expert]
    x = torch.randn(tokens, hidden, dtype=dtype)
    topk_idx = torch.rand(tokens, len(plain.down_proj)).topk(choices).indices
    topk_weight = torch.rand(tokens, choices)
    read = len(topk_idx.unique()) / len(plain.down_proj)
    nbytes = round(read * sum(buffer.nbytes for buffer in experts.buffers()))
    flops = 2 * 3 * hidden * experts.expert_hidden * tokens * choices
    contestants: dict[str, dict[str, Step]] = {
        "ours": {kind: lambda: experts(x, topk_idx, topk_weight)},
        "without kernels": {str(dtype).removeprefix("torch."): lambda: plain(x, topk_idx, topk_weight)},
    }
    return Contest(f"experts in {kind}, {tokens} tokens, against {dtype}", contestants, flops, nbytes)


def _attend_records(dtype: torch.dtype, format: str, batch: int = 1, kv_seq: int = 8192) -> Contest:
    """The decoding kernel over a cache in fewer bits, against that over the same tokens in ``dtype``, and against making
    these in every step."""
    config = work.CONFIG
    heads, latent, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    record = Record(format, latent, rope, dtype)
    held = torch.randn(batch, kv_seq, latent + rope, dtype=dtype)
    cache = QuantizedLatentCache(0, record.encode(held), record=record)
    query, tokens = torch.randn(batch, heads, 1, latent + rope, dtype=dtype), cache.tokens
    visible, scale = Visibility(1, kv_seq, tokens.device), (latent + rope) ** -0.5

    def definition() -> Tensor:
        return attend_records(query, cache, visible, scale, implementation="products")[0]

    def kernel() -> Tensor:
        if query.is_cuda:
            return operators.mla_decode_records(query, cache.stored, format, latent, scale)
        return definition()

    def of_tokens() -> Tensor:
        if query.is_cuda:
            return operators.mla_decode(query, tokens, latent, scale)
        key = tokens[:, None]
        return attend(query, key, key[..., :latent], visible, scale, implementation="products")[0]

    without = {f"{dtype} cache".removeprefix("torch."): of_tokens, "tokens made anew": _without_kernels(definition)}
    flops = 2 * batch * heads * kv_seq * (2 * latent + rope)
    name = f"attention to a cache in {format}, K = {kv_seq}, batch {batch}, against {dtype}"
    return Contest(name, {"ours": {"kernel": kernel}, "without kernels": without}, flops, cache.stored.nbytes)


BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def _sdpa_backends(dtype: torch.dtype, seq: int = 2048) -> Contest:
    """Expanded attention of a prompt as torch chooses, and by each backend, values padded to the keys' width and not."""
    config = work.CONFIG
    heads, width = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim
    query, key = (torch.randn(1, heads, seq, width, dtype=dtype) for _ in range(2))
    value = torch.randn(1, heads, seq, config.v_head_dim, dtype=dtype)
    scale = width**-0.5

    def run(pad: bool, backends: list[SDPBackend]) -> Tensor:
        _, padded = equally_wide(key, value) if pad else (key, value)
        with sdpa_kernel(backends):
            out = F.scaled_dot_product_attention(query, key, padded, is_causal=True, scale=scale)
        return out[..., : config.v_head_dim]

    by_backend: dict[str, Step] = {}
    for name, backend in BACKENDS.items():
        by_backend[f"{name}, padded"] = functools.partial(run, True, [backend])
        by_backend[name] = functools.partial(run, False, [backend])

    def chosen() -> Tensor:
        visible = Visibility(seq, seq, query.device)
        return attend(query, key, value, visible, scale, implementation="sdpa")[0]

    flops = heads * seq * (seq + 1) * (width + config.v_head_dim)
    nbytes = query.nbytes + key.nbytes + 2 * value.nbytes
    return Contest(f"SDPA by backend, S = {seq}", {"ours": {"sdpa": chosen}, "backend": by_backend}, flops, nbytes)


def _as_graph(step: Step) -> Step:
    """The step recorded at its first call and replayed, by one launch for all its kernels; as it is without a GPU."""
    recorded: dict[str, Any] = {}

    def replay() -> Tensor:
        if not torch.cuda.is_available():
            return step()
        if not recorded:
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(beside)
            recorded["graph"] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded["graph"]):
                recorded["out"] = step()
        recorded["graph"].replay()
        out: Tensor = recorded["out"]
        return out

    return replay


def _model_decode(dtype: torch.dtype, weights: str | None = None) -> Contest:
    """One token of a whole model with random weights, after 256 others."""
    config, device = work.MODEL, torch.get_default_device()
    model = DeepseekV2ForCausalLM.random(config, weights, dtype=dtype, device=device)
    tokens = torch.randint(0, config.vocab_size, (1, 257))
    _, caches = model(tokens[:, :256], past_key_values=model.empty_caches(1, capacity=257), use_cache=True)

    def step() -> Tensor:
        return model(tokens[:, 256:], past_key_values=caches)[0]

    ours = {"as a graph": _as_graph(step), "from Python": step}
    plain = {"as a graph": _without_kernels(_as_graph(step))}
    call = accounting.Call(kv=257, dtype=str(dtype).removeprefix("torch."), weights=weights)
    layers = config.num_hidden_layers
    nbytes = sum(accounting.weights_read(config, layer, call) for layer in range(layers))
    nbytes += model.lm_head.weight.nbytes + sum(cache.nbytes for cache in caches)
    return Contest(
        f"{layers} layers of V2-Lite in {weights or call.dtype}, a token",
        {"ours": ours, "without kernels": plain},
        0,
        nbytes,
    )


CONTESTS: dict[str, Callable[[torch.dtype], Contest]] = {
    "add-rmsnorm": _add_rmsnorm,
    "rotation": _rotation,
    "attention-decode": lambda dtype: _from_work(work.attention_decode(dtype, 8192)),
    "attention-decode-128k": lambda dtype: _from_work(work.attention_decode(dtype, 131_072)),
    "attention-decode-batch": lambda dtype: _from_work(work.attention_decode(dtype, 8192, batch=32)),
    "attention-decode-128k-batch": lambda dtype: _from_work(work.attention_decode(dtype, 131_072, batch=32)),
    "attention-prefill": lambda dtype: _from_work(work.attention_prefill(dtype, 2048)),
    "attention-prefill-8k": lambda dtype: _from_work(work.attention_prefill(dtype, 8192)),
    "experts-decode": lambda dtype: _from_work(work.experts(dtype, 1)),
    "experts-decode-batch": lambda dtype: _from_work(work.experts(dtype, 64)),
    "experts-prefill": lambda dtype: _from_work(work.experts(dtype, 2048)),
    "layer-decode": lambda dtype: _from_work(work.layer(dtype, 1, 8192)),
    "layer-prefill": lambda dtype: _from_work(work.layer(dtype, 2048, 2048)),
    "sdpa-backends": _sdpa_backends,
    "model-decode": _model_decode,
}
for _kind in KINDS:
    CONTESTS[f"model-decode-{_kind}"] = functools.partial(_model_decode, weights=_kind)
    CONTESTS[f"experts-decode-{_kind}"] = functools.partial(_experts_in_fewer_bits, kind=_kind)
for _format in ("fp8", "int8"):
    CONTESTS[f"attend-decode-{_format}"] = functools.partial(_attend_records, format=_format)
for _batch in (1, 8, 32, 64, 128):
    CONTESTS[f"attend-decode-{_batch}"] = functools.partial(_attend_decode, batch=_batch)
    CONTESTS[f"attend-decode-16-heads-{_batch}"] = functools.partial(_attend_decode, batch=_batch, heads=16)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".removesuffix(": ")


def measure(contest: Contest, dtype: torch.dtype, clock: Clock, rounds: int) -> dict[str, Any]:
    """Times of all contestants that run, and whether their results agree with the first that is finite.

    What fails, in whatever way, leaves one contestant out, and not the whole run. By how much a result is wrong is None
    where it is not finite.
    """
    seconds: dict[str, float] = {}
    from_python: dict[str, float] = {}
    left_out: dict[str, str] = {}
    wrong: dict[str, float | None] = {}
    first: Tensor | None = None
    for who, settings in contest.contestants.items():
        for setting, step in settings.items():
            name = f"{who}, {setting}"
            try:
                out = step().float()
                if first is None and bool(out.isfinite().all()):
                    first = out
                error = math.nan if first is None else float((out - first).norm() / first.norm())
                if not error < SAME_WITHIN[dtype]:
                    wrong[name] = error if math.isfinite(error) else None
                    continue
                del out
                seconds[name] = gpu.samples(step, clock, rounds)
                from_python[name] = gpu.samples(step, gpu.from_python, rounds)
            except Exception as error_:
                left_out[name] = _first_line(error_)
                torch.cuda.empty_cache()
    return {
        "work": contest.name,
        "flops": contest.flops,
        "bytes": contest.nbytes,
        "seconds": seconds,
        "seconds_from_python": from_python,
        "not_measured": left_out,
        "wrong": wrong,
    }


def judge(row: dict[str, Any], peak: float, bandwidth: float) -> dict[str, Any]:
    """What follows from the times: the best of each, rates, share of the measured peak, and ratios."""
    best: dict[str, str] = {}
    for name, seconds in row["seconds"].items():
        who = name.split(", ")[0]
        if who not in best or seconds < row["seconds"][best[who]]:
            best[who] = name
    if "ours" not in best:
        return row | {"best": best}
    ours = row["seconds"][best["ours"]]
    least = max(row["flops"] / peak, row["bytes"] / bandwidth)
    ratios = {who: row["seconds"][name] / ours for who, name in best.items() if who != "ours"}
    rates = {"flops_per_second": row["flops"] / ours, "bytes_per_second": row["bytes"] / ours}
    return row | rates | {"best": best, "share_of_peak": least / ours, "times_faster_than": ratios}


COLUMNS = ("work", "ms", "from Python, ms", "TFLOP/s", "GB/s", "of the peak", "kernels", "transformers", "flash-attn")


def table(rows: list[dict[str, Any]]) -> str:
    """A table in Markdown; ratios say how many times longer the others take."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- " + "| ---: " * (len(COLUMNS) - 1) + "|"]
    for row in rows:
        if "share_of_peak" not in row:
            lines.append(f"| {row['work']} | not measured " + "| " * (len(COLUMNS) - 2) + "|")
            continue
        name, tried = row["best"]["ours"], {name.split(", ")[0] for name in (*row["not_measured"], *row["wrong"])}
        ratios = [
            f"{row['times_faster_than'][who]:.2f}" if who in row["times_faster_than"]
            else "not measured" if who in tried else ""
            for who in ("without kernels", "transformers", "flash-attn")
        ]  # fmt: skip
        cells = [
            f"{1e3 * row['seconds'][name]:.3f}",
            f"{1e3 * row['seconds_from_python'][name]:.3f}",
            f"{row['flops_per_second'] / 1e12:.1f}" if row["flops"] else "",
            f"{row['bytes_per_second'] / 1e9:.0f}",
            f"{100 * row['share_of_peak']:.0f} %",
        ]
        lines.append(f"| {row['work']} | " + " | ".join([*cells, *ratios]) + " |")
    return "\n".join(lines)


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """What was left out, and what was wrong, a line each."""
    said = [f"{row['work']}: {name} not measured: {why}" for row in rows for name, why in row["not_measured"].items()]
    for row in rows:
        for name, error in row["wrong"].items():
            said.append(f"{row['work']}: {name} is WRONG, " + ("not finite" if error is None else f"by {error:.2g}"))
        for name, seconds in row["seconds"].items():
            if name.startswith(("backend", "tile")):
                said.append(f"{row['work']}: {name}: {1e3 * seconds:.3f} ms")
    return said


def failed(rows: list[dict[str, Any]]) -> bool:
    """Whether a result is wrong, or one of ours did not run for another reason than too little memory."""
    missing = [(name, why) for row in rows for name, why in row["not_measured"].items()]
    ours = [why for name, why in missing if not name.startswith(("transformers", "flash-attn", "backend", "tile"))]
    return any(row["wrong"] for row in rows) or not all(why.startswith("OutOfMemoryError") for why in ours)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: str) -> dict[str, Any]:
    """The GPU, and the versions that matter."""
    versions = {name: _version(name) for name in ("torch", "triton", "transformers", "flash-attn")}
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device,
    } | versions
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "capability": f"sm_{properties.major}{properties.minor}"}
        found |= {"memory_bytes": properties.total_memory, "cuda": torch.version.cuda, "driver": gpu.driver()}
    return found


def run(names: list[str], device: str, dtype: torch.dtype, rounds: int, clock: Clock) -> dict[str, Any]:
    """Measure one work after the other, so that only its weights are in memory."""
    rows = []
    with torch.no_grad():
        size, nbytes = (8192, 2**30) if device == "cuda" else (64, 2**16)
        with torch.device(device):
            peak, bandwidth = gpu.product_rate(dtype, clock, size), gpu.bandwidth(clock, nbytes)
        for name in names:
            try:
                with torch.device(device):  # not while it is timed: it makes every call of torch slower
                    contest = CONTESTS[name](dtype)
                rows.append(judge(measure(contest, dtype, clock, rounds), peak, bandwidth))
            except Exception as error:
                empty: dict[str, Any] = {"seconds": {}, "wrong": {}, "not_measured": {"all": _first_line(error)}}
                rows.append({"work": name} | empty)
            gc.collect()
            torch.cuda.empty_cache()
    measured = {"dtype": str(dtype).removeprefix("torch."), "peak_flops": peak, "bandwidth": bandwidth}
    return machine(device) | measured | {"rows": rows}


def main(arguments: list[str] | None = None) -> int:
    """Return 0, or 1 where there is no GPU or something `failed`."""
    parser = argparse.ArgumentParser(prog="python -m bench.cuda", description=__doc__)
    parser.add_argument(
        "--work", nargs="+", choices=CONTESTS, default=list(CONTESTS), help="what to time; all by default"
    )
    parser.add_argument("--rounds", type=int, default=20, help="samples of each contestant, of which the median counts")
    parser.add_argument("--json", type=Path, default=Path("_build/bench-cuda.json"), help="where the figures go")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("make bench-cuda: torch sees no CUDA GPU here", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    figures = run(args.work, "cuda", torch.bfloat16, args.rounds, gpu.GpuClock())
    print_figures(figures)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
    print(f"\nfigures in {args.json}")
    return int(failed(figures["rows"]))


def print_figures(figures: dict[str, Any]) -> None:
    """A header, the table, and below it what was not measured."""
    kept = ("device", "capability", "driver", "cuda", "torch", "triton", "transformers", "flash-attn", "date", "dtype")
    print(", ".join(f"{name} {figures[name] or 'not installed'}" for name in kept if name in figures))
    print(f"measured peaks: {figures['peak_flops'] / 1e12:.0f} TFLOP/s, {figures['bandwidth'] / 1e9:.0f} GB/s\n")
    print(table(figures["rows"]))
    print(
        "\nkernels: how many times longer without the fused kernels; transformers, flash-attn: how many times longer these take"
    )
    for line in notes(figures["rows"]):
        print(line)


if __name__ == "__main__":
    sys.exit(main())
