"""``python -m dsv2_ref account``: what a layer or a model costs, as a table or as JSON. Needs no torch."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dsv2_ref.accounting import DTYPE_BYTES, FORMS, Call, report
from dsv2_ref.config import DeepseekV2Config

PRESETS = ("card", "tiny", "deepseek_v2", "deepseek_v2_lite", "deepseek_ocr")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dsv2_ref", description="Tools of the DeepSeek-V2 reference.")
    commands = parser.add_subparsers(dest="command", required=True)
    account = commands.add_parser("account", help="parameters, FLOPs and bytes of a layer or a model")
    model = account.add_mutually_exclusive_group()
    model.add_argument("--preset", default="card", help=f"one of {', '.join(PRESETS)} (default: card)")
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
    if args.preset not in PRESETS:
        raise ValueError(f"preset is {args.preset!r}; wanted one of {', '.join(PRESETS)}")
    preset: DeepseekV2Config = getattr(DeepseekV2Config, args.preset)()
    return preset


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _table(found: dict[str, Any]) -> str:
    call, counts, flops, sizes = found["call"], found["parameters"], found["flops"], found["bytes"]
    what = "model" if call["layer"] is None else f"layer {call['layer']}"
    form = f", {call['form']}" if call["form"] else ""
    way = ", training" * call["training"] + " with checkpointing" * call["checkpointing"]
    lines = [
        f"{what}: {call['batch']} x {call['seq']} tokens over {call['kv']}, {call['dtype']}{form}",
        "",
        "parameters",
    ]
    lines += [f"  {name:44}{count:22,}" for name, count in counts["by_module"].items()]
    lines += [f"  {'total':44}{counts['total']:22,}", f"  {'active per token':44}{counts['active_per_token']:22,}"]
    lines += ["", "FLOPs"] + [f"  {name:44}{count:22,}" for name, count in flops["by_operation"].items()]
    lines += [f"  {'total':44}{flops['total']:22,}", "", "bytes"]
    for name, label in (
        ("weights", "weights"),
        ("weights_read", "weights that this call reads"),
        ("kv_cache", "cache after the call"),
        ("kv_cache_written", "cache that this call writes"),
        ("activations_read", "activations read, operation by operation"),
        ("activations_written", "activations written"),
        ("activations_peak", f"activations alive together{way}"),
    ):
        lines.append(f"  {label:44}{sizes[name]:22,}  {_bytes(sizes[name])}")
    return "\n".join([*lines, "", f"intensity: {found['intensity']:,} FLOP for each byte of weights and cache read"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for what cannot be computed, with one line that says why."""
    args = _parser().parse_args(arguments)
    try:
        call = Call(
            batch=args.batch,
            seq=args.seq,
            kv=args.seq if args.kv is None else args.kv,
            form=args.form,
            causal=args.causal,
            dtype=args.dtype,
        )
        found = report(_config(args), call, args.layer, args.training, args.checkpointing)
    except json.JSONDecodeError as error:
        print(f"{args.config} is no JSON: {error}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, AttributeError, OSError) as error:
        print(f"{error}".replace("\n", " "), file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2) if args.json else _table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
