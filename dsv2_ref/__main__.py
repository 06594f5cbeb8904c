"""``python -m dsv2_ref account``: what a layer or a model costs, as a table or as JSON. Needs no torch."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Never

from dsv2_ref.accounting import DTYPE_BYTES, FORMS, Call, report
from dsv2_ref.config import DeepseekV2Config

PRESETS = ("card", "tiny", "deepseek_v2", "deepseek_v2_lite", "deepseek_ocr")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> Never:
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m dsv2_ref", description="Tools of the DeepSeek-V2 reference.")
    commands = parser.add_subparsers(dest="command", required=True)
    account = commands.add_parser("account", help="parameters, FLOPs and bytes of a layer or a model")
    model = account.add_mutually_exclusive_group()
    model.add_argument("--preset", help=f"one of {', '.join(PRESETS)} (default: card)")
    model.add_argument("--config", metavar="FILE", help="a published config.json")
    account.add_argument("--layer", type=int, metavar="I", help="only the layer of this index, from 0")
    account.add_argument("--batch", type=int, default=1, help="sequences")
    account.add_argument("--seq", type=int, default=1, help="new tokens of each sequence")
    account.add_argument("--kv", type=int, help="tokens attended to, new ones included (default: --seq)")
    account.add_argument("--dtype", default="bfloat16", help=f"one of {', '.join(DTYPE_BYTES)}")
    account.add_argument("--form", default="auto", help=f"of latent attention: {', '.join(FORMS)}")
    account.add_argument(
        "--causal", action=argparse.BooleanOptionalAction, default=True, help="count pairs that see each other only"
    )
    account.add_argument("--attention", help="eager, sdpa or flash_attention_2, instead of the configuration's")
    account.add_argument("--training", action="store_true", help="activations of a training step, gradients included")
    account.add_argument("--checkpointing", action="store_true", help="keep only the inputs of layers, in --training")
    account.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _config(args: argparse.Namespace) -> DeepseekV2Config:
    config = _stored(args)
    return config if args.attention is None else replace(config, _attn_implementation=args.attention)


def _stored(args: argparse.Namespace) -> DeepseekV2Config:
    if args.config is not None:
        return DeepseekV2Config.from_published(args.config)
    name = "card" if args.preset is None else args.preset
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; wanted one of {', '.join(PRESETS)}")
    preset: DeepseekV2Config = getattr(DeepseekV2Config, name)()
    return preset


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _title(found: dict[str, Any]) -> str:
    call, attention = found["config"]["call"], found["config"]["_attn_implementation"]
    what = "model" if call["layer"] is None else f"layer {call['layer']}"
    form = f", {call['form']}" if call["form"] else ""
    how = f"{'causal' if call['causal'] else 'all pairs'}, {call['dtype']}, {attention}{form}"
    return f"{what}: {call['batch']} x {call['seq']} tokens over {call['kv']}, {how}"


def _table(found: dict[str, Any]) -> str:
    call, counts, flops, sizes = found["config"]["call"], found["parameters"], found["flops"], found["bytes"]
    way = ", training" * call["training"] + " with checkpointing" * call["checkpointing"]
    lines = [_title(found), "", f"{'parameters':46}{'stored':>22}{'active per token':>22}"]
    lines += [f"  {name:44}{n:22,}{counts['active_by_module'][name]:22,}" for name, n in counts["by_module"].items()]
    lines += [f"  {'total':44}{counts['total']:22,}{counts['active_per_token']:22,}", "", "FLOPs"]
    lines += [f"  {name:44}{count:22,}" for name, count in flops["by_operation"].items()]
    lines += [f"  {name:44}{flops[key]:22,}" for name, key in (("products alone", "products"), ("total", "total"))]
    rows = [
        ("weights", sizes["weights"]),
        ("weights that this call reads", sizes["weights_read"]),
        ("cache after the call", sizes["kv_cache"]),
        *((f"cache if it were {kind}", size) for kind, size in sizes["kv_cache_by_kind"].items()),
        ("cache that this call writes", sizes["kv_cache_written"]),
        ("activations read, operation by operation", sizes["activations_read"]),
        ("activations written", sizes["activations_written"]),
        (f"activations alive together{way}", sizes["activations_peak"]),
    ]
    lines += ["", "bytes"] + [f"  {label:44}{size:22,}  {_bytes(size)}" for label, size in rows]
    return "\n".join([*lines, "", f"intensity: {found['intensity']:,} FLOP for each byte of weights and cache read"])


def _refuse(error: Exception) -> int:
    print(*f"{error}".splitlines(), file=sys.stderr)
    return 2


def _write(text: str) -> int:
    """Print; 141, as of a program that SIGPIPE ends, where nobody reads on."""
    try:
        print(text, flush=True)
    except OSError as error:
        # What is left in the buffer is written when Python ends, and must find a place.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141 if isinstance(error, BrokenPipeError) else _refuse(error)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for what cannot be computed or written, with one line that says why."""
    try:
        args = _parser().parse_args(arguments)
        call = Call(
            batch=args.batch,
            seq=args.seq,
            kv=args.seq if args.kv is None else args.kv,
            form=args.form,
            causal=args.causal,
            dtype=args.dtype,
        )
        found = report(_config(args), call, args.layer, args.training, args.checkpointing)
        text = json.dumps(found, indent=2) if args.json else _table(found)
    except (ValueError, TypeError, AttributeError, OverflowError, OSError) as error:
        return _refuse(error)
    return _write(text)


if __name__ == "__main__":
    sys.exit(main())
