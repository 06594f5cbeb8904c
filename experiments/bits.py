"""What a bit is worth: the small trained model with rounded weights, or a rounded cache.

    python -m experiments.bits        measures all of it again: a minute of one core

Everything is computed in float64, so that nothing but the rounding changes a result.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dsv2_ref import DeepseekV2ForCausalLM
from dsv2_ref.cache import LatentCache
from dsv2_ref.codes import from_codes, to_codes
from dsv2_ref.mla import by_head
from dsv2_ref.rope import apply_rotary, position_tables
from experiments import router
from experiments.trained import bits, ids, trained

FILE = router.DATA / "bits.json"
PARTS: Mapping[str, Callable[[str], bool]] = {
    "attention": lambda name: "self_attn" in name and "proj" in name,
    "routed experts": lambda name: ".experts." in name,
    "dense and shared": lambda name: "shared_experts" in name or "layers.0.mlp" in name,
    "gate": lambda name: name.endswith("gate.weight"),
}
"""Which parameters belong to a part; all but the gate together are ``all``."""

ROW = None  # one scale for a row, however long
GROUPS = {"int8": ROW, "int5": 32, "int4": 32, "int3": 32, "int2": 16}
OTHERS = [("int4", ROW), ("int4", 16), ("int3", ROW), ("int3", 16), ("int5", ROW)]
CACHED = ("fp8", "int8", "int6", "int5", "int4", "int3", "int2")


def rounded(
    x: Float[Tensor, "*rows inputs"],
    kind: str | None,
    group: int | None = ROW,
    scale_dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*rows inputs"]:
    """What is left of ``x`` in codes of this kind; None leaves it as it is."""
    if kind is None:
        return x
    codes = to_codes(x, kind, group or x.shape[-1], scale_dtype)
    return from_codes(*codes).to(x.dtype)


def chosen(model: nn.Module, part: str) -> Iterator[Tensor]:
    """The weights of a part."""
    for name, weight in model.named_parameters():
        if any(holds(name) for each, holds in PARTS.items() if each == part or (part == "all" and each != "gate")):
            yield weight


def with_rounded(part: str, kind: str, group: int | None) -> dict[str, Any]:
    """Bits per byte with the weights of a part rounded, and the relative errors of the
    least and the most changed matrix."""
    model, errors = trained().double(), []
    for weight in chosen(model, part):
        new = rounded(weight.data, kind, group, weight.dtype)
        off = (new - weight).flatten(-2).norm(dim=-1)
        errors += (off / weight.flatten(-2).norm(dim=-1)).reshape(-1).tolist()
        weight.data.copy_(new)
    found = {"bits": round(bits(model), 3)}
    return found | {"error": [round(min(errors), 3), round(max(errors), 3)]}


class RoundedCache(LatentCache):
    """A `LatentCache` whose latents and rope keys are rounded as they are appended, each
    with a scale per token, and stored in the model's dtype: to measure, not to save."""

    kinds: tuple[str | None, str | None] = (None, None)
    latent: int

    def rounded_tokens(self, new: Tensor) -> Tensor:
        """Latents and rope keys, each rounded to its own kind."""
        parts = new.split((self.latent, new.shape[-1] - self.latent), dim=-1)
        pairs = zip(parts, self.kinds, strict=True)
        return torch.cat([rounded(*pair) for pair in pairs], dim=-1)

    def append(self, new: Tensor) -> Self:
        """The cache with these tokens, rounded, after its own."""
        longer = super().append(self.rounded_tokens(new))
        longer.kinds, longer.latent = self.kinds, self.latent
        return longer


def rounding_caches(
    model: DeepseekV2ForCausalLM, batch: int, latent: str | None, rope: str | None
) -> list[RoundedCache]:
    """Empty caches of all layers, which round to these kinds."""
    caches = [RoundedCache.of(each.self_attn, batch, 0) for each in model.model.layers]
    for cache in caches:
        cache.kinds, cache.latent = (latent, rope), model.config.kv_lora_rank
    return caches


def bits_through(model: DeepseekV2ForCausalLM, empty: Callable[[int], Sequence[Any]]) -> float:
    """As `bits`, with everything that is attended to read from caches of a given batch,
    which ``empty`` makes."""
    device, losses = next(model.parameters()).device, []
    for tokens in router.sample().values():
        tokens = tokens.to(device)
        logits, _ = model(tokens, past_key_values=empty(len(tokens)))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        losses.append(loss)
    return float(torch.stack(losses).mean() / torch.tensor(2.0).log())


def with_cache(latent: str | None, rope: str | None) -> float:
    """Bits per byte with latents and rope keys rounded to these kinds."""
    model = trained().double()
    caches = partial(rounding_caches, model, latent=latent, rope=rope)
    return round(bits_through(model, caches), 3)


def on_the_line() -> dict[str, dict[str, list[float]]]:
    """Root mean square and largest of what each layer caches of the book's line."""
    model = trained().double()
    _, caches = model(ids(), use_cache=True)
    found: dict[str, dict[str, list[float]]] = {}
    for cache in caches or ():
        pair = cache.split(model.config.kv_lora_rank)
        for name, part in zip(("latent", "rope key"), pair, strict=True):
            sizes = found.setdefault(name, {"rms": [], "largest": []})
            sizes["rms"].append(round(float(part.square().mean().sqrt()), 2))
            sizes["largest"].append(round(float(part.abs().max()), 2))
    return found


def score_errors(part: str, kind: str) -> list[float]:
    """By how much the scores of the book's line change in each layer (root mean square, causal pairs) when its latents, or
    its rope keys, are rounded to codes of this kind."""
    model, heard = trained().double(), []

    def hear(attention: Any, _: Any, call: dict[str, Any]) -> None:
        heard.append((attention, call["hidden_states"]))

    layers: Any = model.model.layers
    for layer in layers:
        layer.self_attn.register_forward_pre_hook(hear, with_kwargs=True)
    model(ids())
    changes = []
    for attention, x in heard:
        heads, N, R = attention.num_heads, attention.qk_nope_head_dim, attention.rotary_dim
        query = attention.q_proj(x).unflatten(-1, (heads, N + R)).transpose(1, 2)
        q_nope, q_pe = query.split((N, R), dim=-1)
        latent, k_pe = attention.kv_a_proj_with_mqa(x).split((attention.kv_lora_rank, R), dim=-1)
        latent = attention.kv_a_layernorm(latent)
        q_pe, k_pe = apply_rotary(q_pe, k_pe, *position_tables(attention.config, x))
        query = by_head(q_nope, attention.up_matrices()[0]) if part == "latent" else q_pe
        cached = latent if part == "latent" else k_pe
        change = query @ (rounded(cached, kind) - cached)[:, None].mT * attention.softmax_scale
        causal = torch.ones(change.shape[-2:], dtype=torch.bool).tril()
        changes.append(float(change[..., causal].square().mean().sqrt()))
    return changes


def settings() -> tuple[list[tuple[str, str, int | None]], list[tuple[Any, Any]]]:
    """What is measured: parts, kinds and groups of weights; latents and rope keys."""
    parts = ("all", *PARTS)
    weights = [(part, kind, group) for part in parts for kind, group in GROUPS.items()]
    weights += [("all", kind, group) for kind, group in OTHERS]
    cached = [pair for kind in CACHED for pair in ((kind, None), (None, kind))]
    return weights, cached + [(kind, kind) for kind in CACHED]


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and store it."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bits", description="What each bit costs.")
    parser.add_argument("--out", type=Path, default=FILE, help="the file to write")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    weights, cached = settings()
    log: dict[str, Any] = {"right": round(bits(trained().double()), 3)}
    log["weights"] = [
        {"part": part, "kind": kind, "group": group, **with_rounded(part, kind, group)} for part, kind, group in weights
    ]
    log["cache"] = [{"latent": latent, "rope": rope, "bits": with_cache(latent, rope)} for latent, rope in cached]
    log["line"] = on_the_line()
    args.out.write_text(json.dumps(log, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
