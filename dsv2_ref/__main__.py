"""``python -m dsv2_ref``: ``account`` tells what a layer or a model costs and needs no torch; ``ways`` tells which way
computes each call of a layer, and why; ``grade`` grades what a student wrote."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Never

from dsv2_ref import __date__, __version__
from dsv2_ref.accounting import CACHES, DTYPE_BYTES, FORMS, WEIGHTS, Call, report
from dsv2_ref.accounting.communication import on_ranks
from dsv2_ref.accounting.training import OPTIMIZERS
from dsv2_ref.checks import CHECKPOINTING, IMPLEMENTATIONS, require
from dsv2_ref.config import DeepseekV2Config

PRESETS = ("card", "tiny", "deepseek_v2", "deepseek_v2_lite", "deepseek_ocr", "deepseek_v3", "moonlight")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> Never:
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m dsv2_ref", description="Tools of the reference.")
    parser.add_argument("--version", action="version", version=f"dsv2_ref {__version__}, {__date__}")
    commands = parser.add_subparsers(dest="command", required=True)
    account = commands.add_parser("account", help="parameters, FLOPs and bytes")
    ways = commands.add_parser("ways", help="which way computes each call, and why")
    commands.add_parser("grade", help="a part of the layer that a student wrote", add_help=False)
    for command in (account, ways):
        model = command.add_mutually_exclusive_group()
        model.add_argument("--preset", help=f"{', '.join(PRESETS)} (default: card)")
        model.add_argument("--config", metavar="FILE", help="a published config.json")
        option = command.add_argument
        option("--layer", type=int, metavar="I", help="the layer of this index, from 0")
        option("--batch", type=int, default=1, help="sequences")
        option("--seq", type=int, default=1, help="new tokens of each sequence")
        option("--kv", type=int, help="tokens attended to, new ones included (--seq)")
        dtypes = [dtype for dtype in DTYPE_BYTES if dtype != "int8" or command is account]  # no layer runs in int8
        option("--dtype", default="bfloat16", help=", ".join(dtypes))
        option("--form", default="auto", help=f"of MLA: {', '.join(FORMS)}")
        option("--attention", help=", ".join(IMPLEMENTATIONS))
        option("--training", action="store_true", help="a training step")
    ways.add_argument("--device", default="cpu", help="cpu or cuda")
    ways.add_argument("--weights", metavar="KIND", help="quantised: int8, int4 or fp8")
    ways.add_argument("--group", type=int, default=64, help="weights of a row that share a scale in int4 (64)")
    ways.add_argument("--cache", metavar="FORMAT", help="in fewer bits: fp8, int8 or int4")
    option, yes_or_no = account.add_argument, argparse.BooleanOptionalAction
    option("--causal", action=yes_or_no, default=True, help="count visible pairs only")
    modes = f"{' or '.join(CHECKPOINTING)} (full where none is named)"
    option("--checkpointing", nargs="?", const="full", metavar="MODE", help=f"recompute in the backward pass: {modes}")
    option("--optimizer", help=f"of a training step: {', '.join(OPTIMIZERS)} (adamw)")
    option("--weights", help=f"stored as {', '.join(WEIGHTS)} and scales (default: in the dtype)")
    option("--group", type=int, default=64, help="weights of a row that share a scale in int4 (64)")
    option("--cache", help=f"latents stored as {', '.join(CACHES)} and scales (default: in the dtype)")
    option("--kept", type=int, help="rows per sequence that the cache holds (--kv)")
    option("--read", type=int, help="rows of them that each query reads (--kept)")
    option("--ranks", type=int, metavar="P", help="what each of P ranks that share the routed experts holds and sends")
    option("--json", action="store_true", help="print JSON")
    return parser


def _config(args: argparse.Namespace) -> DeepseekV2Config:
    if args.config is not None:
        with warnings.catch_warnings(record=True, action="always") as told:
            config = DeepseekV2Config.from_published(args.config)
        for warning in told:
            print(f"warning: {warning.message}", file=sys.stderr)
    else:
        name = "card" if args.preset is None else args.preset
        require(name in PRESETS, "preset", name, f"one of {', '.join(PRESETS)}")
        config = getattr(DeepseekV2Config, name)()
    return config if args.attention is None else replace(config, _attn_implementation=args.attention)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _tokens(call: dict[str, Any]) -> str:
    return f"{call['batch']} x {call['seq']} tokens over {call['kv']}"


def _account(args: argparse.Namespace, config: DeepseekV2Config, call: Call) -> str:
    found = report(config, call, args.layer, args.training, args.checkpointing, args.optimizer)
    if args.ranks is not None:
        named = [found["training"]["optimizer"], args.checkpointing] if args.training else []
        found["bytes"]["on_each_rank"] = on_ranks(config, call, args.ranks, args.layer, args.training, *named)
    return json.dumps(found, indent=2) if args.json else _table(found)


def _fewer(call: dict[str, Any]) -> list[str]:
    """A line on bits and rows, where a call has fewer of them."""
    weights, cache, kept, read = (call[name] for name in ("weights", "cache", "kept", "read"))
    group = f" in groups of {call['group']}" * (weights == "int4")
    said = [f"weights in {weights}{group}"] * bool(weights) + [f"cache in {cache}"] * bool(cache)
    said += [f"{kept} rows kept"] * bool(kept) + [f"{read} read per query"] * bool(read)
    return [", ".join(said)] if said else []


def _table(found: dict[str, Any]) -> str:
    call, counts, flops, sizes = (found["config"]["call"], found["parameters"], found["flops"], found["bytes"])
    what = "model" if call["layer"] is None else f"layer {call['layer']}"
    pairs, form = ("causal" if call["causal"] else "all pairs", f", {call['form']}" * bool(call["form"]))
    how = f"{pairs}, {call['dtype']}, {found['config']['_attn_implementation']}{form}"
    lines = [
        f"{what}: {_tokens(call)}, {how}",
        *_fewer(call),
        "",
        f"{'parameters':46}{'stored':>22}{'active per token':>22}",
    ]
    stored = counts["by_module"] | {"total": counts["total"]}
    active = counts["active_by_module"] | {"total": counts["active_per_token"]}
    lines += [f"  {name:44}{n:22,}{active[name]:22,}" for name, n in stored.items()]
    operations = flops["by_operation"] | {"products alone": flops["products"], "total": flops["total"]}
    lines += ["", "FLOPs", *(f"  {name:44}{n:22,}" for name, n in operations.items())]
    attended = {"cache that this call reads": sizes["kv_cache_read"]} if call["read"] else {}
    way = ", training" * call["training"] + (f", {call['checkpointing']}" if call["checkpointing"] else "")
    rows = {
        "weights": sizes["weights"],
        "weights that this call reads": sizes["weights_read"],
        "cache after the call": sizes["kv_cache"],
        **{f"cache if it were {kind}": size for kind, size in sizes["kv_cache_by_kind"].items()},
        **attended,
        "cache that this call writes": sizes["kv_cache_written"],
        "activations read, operation by operation": sizes["activations_read"],
        "activations written": sizes["activations_written"],
        f"activations alive together{way}": sizes["activations_peak"],
    }
    not_counted = "no layer runs in int8" if call["dtype"] == "int8" else "the call is too large"
    not_counted = "needs torch" if find_spec("torch") is None else not_counted
    lines += ["", "bytes"]
    for label, size in rows.items():
        shown = f"  not counted: {not_counted}" if size is None else f"{size:22,}  {_bytes(size)}"
        lines.append(f"  {label:44}{shown}")
    if found["training"]:
        lines += _training(found["training"], not_counted)
    if "on_each_rank" in sizes:
        lines += ["", "bytes on each rank, which receives as many as it sends"]
        lines += [f"  {what:44}{size:22,.0f}  {_bytes(size)}" for what, size in sizes["on_each_rank"].items()]
    return "\n".join([*lines, "", f"intensity: {found['intensity']:,} FLOP per byte of weights and cache read"])


def _training(step: dict[str, Any], not_counted: str) -> list[str]:
    """Of a training step: FLOPs of products, and the bytes that it holds."""
    flops = {name: step["flops"][name] for name in ("forward", "backward", "recomputed", "total")}
    lines = ["", "training step: FLOPs of products", *(f"  {name:44}{n:22,}" for name, n in flops.items())]
    if step["six_nd"]:
        lines.append(f"  {'forward and backward by the rule 6ND':44}{step['six_nd']['6ND']:22,}")
    lines += ["", f"training step: bytes with {step['optimizer']}"]
    for name, size in step["bytes"].items():
        shown = f"  not counted: {not_counted}" if size is None else f"{size:22,}  {_bytes(size)}"
        lines.append(f"  {name.replace('_', ' '):44}{shown}")
    return lines


def _ways(args: argparse.Namespace, config: DeepseekV2Config, call: Call) -> str:
    from dsv2_ref.fast.listing import choices

    layer = config.num_hidden_layers - 1 if args.layer is None else args.layer
    config = replace(config, mla_form=call.form if config.use_mla else "auto")
    require(args.device in ("cpu", "cuda"), "device", args.device, "cpu or cuda")
    require(call.dtype != "int8", "dtype", call.dtype, "a floating-point dtype")
    require(config.use_mla or args.cache is None, "cache", args.cache, "none for multi-head attention")
    require(not args.training or args.cache is None, "cache", args.cache, "None: training has no cache")
    wanted = "the {} new tokens: training has no cache"
    require(not args.training or call.kv == call.seq, "kv", call.kv, wanted, call.seq)
    bits = args.weights, args.group, args.cache
    made = choices(config, layer, args.device, call.dtype, call.batch, call.seq, call.kv, args.training, *bits)
    kind = "training" if args.training else "inference"
    lines = [f"layer {layer}: {_tokens(vars(call))}, {call.dtype} on {args.device}, {kind}", ""]
    for choice, times in made.items():
        name = choice.definition + f" x {times}" * (times > 1)
        lines.append(f"{name:36}{choice.way}")
        lines += [f"    not {way}: {reason}" for way, reason in choice.passed_over]
    if args.device == "cuda":
        lines += ["", "for a GPU of the Ampere generation or newer, with Triton"]
    return "\n".join(lines)


def _grade(arguments: Sequence[str]) -> tuple[str, int]:
    from dsv2_ref.grading import command

    parser = _Parser(prog="python -m dsv2_ref grade", description="Grade what a student wrote.")
    command.add_options(parser)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        dashed = next((name for name in unknown if name.startswith("-") and os.path.isfile(name)), None)
        advice = f"; the file is ./{dashed}" if dashed else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{advice}")
    return command.run(args)


def _refuse(error: Exception) -> int:
    print(*f"{error}".splitlines(), file=sys.stderr)
    return 2


def _write(text: str) -> int:
    """Print; 141, as a program that SIGPIPE ends, where the reader has gone."""
    try:
        print(text, flush=True)
    except UnicodeEncodeError as error:  # the names of files may hold letters that the terminal, or Windows, has not
        return _write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
    except OSError as error:
        # Python flushes once more when it ends, which must find an open file.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141 if isinstance(error, BrokenPipeError) else _refuse(error)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 2, and one line that says why, for what is rejected; 1 for work that did not pass."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if given[:1] == ["grade"]:
            text, status = _grade(given[1:])
            return _write(text) or status
        args = _parser().parse_args(given)
        kv, causal = (args.seq if args.kv is None else args.kv, getattr(args, "causal", True))
        call = Call(batch=args.batch, seq=args.seq, kv=kv, form=args.form, causal=causal, dtype=args.dtype)
        if args.command == "account":
            fewer = {name: getattr(args, name) for name in ("weights", "group", "cache", "kept", "read")}
            call = replace(call, **fewer)
        run = _account if args.command == "account" else _ways
        text = run(args, _config(args), call)
    except (ValueError, OverflowError, OSError, ImportError) as error:
        return _refuse(error)
    except KeyboardInterrupt:
        return 130  # as a program that SIGINT ends
    return _write(text)


if __name__ == "__main__":
    sys.exit(main())
