"""``python -m bench``: print the table, write the figures to a JSON file."""

import argparse
import gc
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.machine import in_turn, median, product_rate, read_bandwidth
from bench.memory import attention_prefill_peak
from bench.work import CONFIG, WORKS, Work

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Both sides round every intermediate result; what they may differ by is measured on outputs of unit size.
SAME_WITHIN = {torch.bfloat16: 0.03, torch.float32: 1e-4}


def check_same(work: Work, dtype: torch.dtype) -> None:
    """Refuse to compare times of different results."""
    first, *others = [(name, call().float()) for name, call in (work.ours | work.peers).items()]
    for name, output in others:
        error = ((output - first[1]).norm() / first[1].norm()).item()
        if not error < SAME_WITHIN[dtype]:
            raise SystemExit(f"{work.name}: {name} and {first[0]} differ by {error:.2g} in {dtype}")


def measure(work: Work, dtype: torch.dtype, rounds: int, bandwidth: float, rate: float) -> dict[str, Any]:
    """Median seconds of all contestants, and their ratios."""
    check_same(work, dtype)
    contestants = {"ours": work.ours, "transformers": work.peers, "floor": work.floors}
    named = {f"{who}, {name}": call for who, calls in contestants.items() for name, call in calls.items()}
    seconds = {name: median(samples) for name, samples in in_turn(named, rounds).items()}
    best = {
        who: min((name for name in seconds if name.startswith(who)), key=seconds.__getitem__) for who in contestants
    }
    ours, peer, floor = (seconds[best[who]] for who in contestants)
    limit, in_turn_limit = work.limit(bandwidth, rate), work.limit_in_turn(bandwidth, rate)
    return {
        "work": work.name,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": seconds,
        "best": best,
        "flops": work.flops,
        "bytes": work.nbytes,
        "limit_seconds": limit,
        "limit_in_turn_seconds": in_turn_limit,
        "faster_than_transformers": peer / ours,
        "over_floor": ours / floor,
        "over_limit": ours / limit,
        "over_limit_in_turn": ours / in_turn_limit,
        "faster_at_limit_in_turn": peer / in_turn_limit,
    }


def prefill_memory() -> list[dict[str, int]]:
    """Peak and cache bytes of an attention prefill, and what the formula says of the cache."""
    numbers = (CONFIG.kv_lora_rank or 0) + CONFIG.qk_rope_head_dim
    rows = []
    for seq in (1024, 2048, 4096, 8192):
        peak, cache = attention_prefill_peak(seq)
        rows.append({"seq": seq, "peak_bytes": peak, "cache_bytes": cache, "cache_formula": seq * numbers * 2})
    return rows


def main() -> None:
    """Measure what was asked for, one work at a time, so that only its weights are in memory."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS), help="what to time; all by default")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=7, help="samples of each contestant, of which the median counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory of a prefill")
    parser.add_argument("--json", type=Path, default=Path("_build/bench.json"), help="where the figures go")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)

    bandwidth = read_bandwidth()
    rates = {name: product_rate(DTYPES[name]) for name in args.dtype}
    machine = f"{platform.machine()}, {args.threads} threads, reads {bandwidth / 1e9:.1f} GB/s, products "
    machine += ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in rates.items())
    print(f"torch {torch.__version__}, transformers {transformers.__version__}; {machine}\n")
    columns = "{:24} {:9} {:>10} {:>12} {:>10} {:>10} {:>10} {:>9} {:>8} {:>8} {:>8} {:>9}  {}"
    heads = ["transformers", "floor", "limit", "in turn", "faster", "/floor", "/limit", "/in turn", "at most"]
    print(columns.format("work", "dtype", "ours ms", *heads, "best setting of each"))
    rows = []
    for name in args.work:
        for dtype in args.dtype:
            work = WORKS[name](DTYPES[dtype])
            row = measure(work, DTYPES[dtype], args.rounds, bandwidth, rates[dtype])
            rows.append(row)
            times = (row["seconds"][name] for name in row["best"].values())
            limits = row["limit_seconds"], row["limit_in_turn_seconds"]
            shown = [f"{1e3 * seconds:.2f}" for seconds in (*times, *limits)]
            ratios = "faster_than_transformers over_floor over_limit over_limit_in_turn faster_at_limit_in_turn"
            shown += [f"{row[key]:.2f}" for key in ratios.split()]
            settings = "; ".join(name.split(", ")[1] for name in row["best"].values())
            print(columns.format(row["work"], dtype, *shown, settings), flush=True)
            del work
            gc.collect()

    memory = [] if args.no_memory else prefill_memory()
    if memory:
        print("\nattention prefill, bfloat16: peak beyond weights and input, and the cache it leaves")
    for entry in memory:
        per_token = entry["peak_bytes"] / entry["seq"] / 1024
        same = "as" if entry["cache_bytes"] == entry["cache_formula"] else "NOT as"
        print(
            f"  S = {entry['seq']:5}  peak {entry['peak_bytes'] / 2**20:7.0f} MiB ({per_token:.0f} KiB a token)"
            f"  cache {entry['cache_bytes']} bytes, {same} the formula"
        )
    figures = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": args.threads}
    figures |= {"machine": platform.machine(), "read_bytes_per_second": bandwidth, "product_flops_per_second": rates}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(figures | {"rows": rows, "prefill_memory": memory}, indent=2) + "\n")
    print(
        "\nlimit: all reads and all products at once, at the machine's rates; in turn: one product after the other, as each"
        "\nneeds the one before; at most: how much faster than transformers a step at this second limit would be"
    )
    print(f"\nfigures in {args.json}")


if __name__ == "__main__":
    main()
