"""What the small trained model loses when its cache keeps or reads less: windows, heavy hitters, the best rows, an indexer.

    python -m experiments.forgetting            trains the indexer and measures: five minutes of one core
    python -m experiments.forgetting --steps 20 --out /tmp/forgetting

Writes the indexers of all layers (bfloat16) and a file of results. Every budget is the number of tokens that a query
reads, its own among them. One small model, one seed, texts of 128 bytes.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsv2_ref import DeepseekV2ForCausalLM
from dsv2_ref.forget import HeavyHitters, chosen_mask, window_mask
from dsv2_ref.rope import rotary_tables
from experiments import router
from experiments.corpus import KINDS, corpus, windows
from experiments.indexer import LightningIndexer
from experiments.trained import trained

FILE, WEIGHTS = "forgetting.json", "forgetting_indexer.safetensors"
BUDGETS, SINKS = (4, 8, 16, 32), 4
HEADS, WIDTH = 4, 16
STEPS, EVERY, PER_KIND, RATE = 500, 25, 2, 3e-3

Choose = Callable[[Tensor, Tensor, int], Tensor]
"""What a layer's queries may read: from its weights (B, H, S, S), its normalised input (B, S, D) and its index to a
mask (B, H or 1, S, S)."""


def model_with_weights(dtype: torch.dtype = torch.float64) -> DeepseekV2ForCausalLM:
    """The small trained model, in the form that decodes, and able to return its attention weights."""
    model = trained().to(dtype)
    for layer in layers(model):
        layer.self_attn.implementation, layer.self_attn.form = "eager", "absorbed"
    return model


def layers(model: DeepseekV2ForCausalLM) -> list[Any]:
    """The layers of a model."""
    return list(model.model.layers)


def texts() -> Tensor:
    """The 48 stored sequences of 128 bytes, none of which was trained on."""
    return torch.cat([router.sample()[kind] for kind in KINDS])


def to_bits(loss: Tensor) -> float:
    """Nats per byte as bits."""
    return float(loss / torch.tensor(2.0, dtype=loss.dtype).log())


# Reading less, or a window: masks in one pass


@torch.no_grad()
def logits_of(model: DeepseekV2ForCausalLM, tokens: Tensor, choose: Choose | None = None) -> Tensor:
    """What the model expects after each token where each layer reads what ``choose`` leaves of it, from the first on."""
    x = model.model.embed_tokens(tokens)
    for index, layer in enumerate(layers(model)):
        mask = None
        if choose is not None:
            _, weights = layer(x, output_attentions=True)
            mask = choose(weights, layer.input_layernorm(x), index)
        (x,) = layer(x, mask)
    logits: Tensor = model.lm_head(model.model.norm(x))
    return logits


def bits(model: DeepseekV2ForCausalLM, tokens: Tensor, choose: Choose | None = None) -> float:
    """Bits per byte where each layer reads what ``choose`` leaves of it."""
    logits = logits_of(model, tokens, choose)
    return to_bits(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


def in_window(budget: int, sinks: int = 0) -> Choose:
    """The newest tokens, and the first ones: ``budget`` in all."""
    return lambda weights, u, layer: window_mask(u.shape[1], u.shape[1], sinks, budget - sinks, u.device)


def best(budget: int, newest: int = 0) -> Choose:
    """The ``newest`` tokens, and those to which the heads of the layer attend most, together: ``budget`` in all.

    A policy could not know them: it would have to read everything first.
    """

    def choose(weights: Tensor, u: Tensor, layer: int) -> Tensor:
        recent = (
            window_mask(u.shape[1], u.shape[1], 0, newest, u.device)[:, 0] if newest else weights.new_zeros(1).bool()
        )
        attended = weights.sum(1).masked_fill(recent, torch.inf)
        return chosen_mask(attended.topk(budget, dim=-1).indices, u.shape[1])

    return choose


def best_per_head(budget: int) -> Choose:
    """The tokens to which each head attends most."""

    def choose(weights: Tensor, u: Tensor, layer: int) -> Tensor:
        rows = weights.topk(budget, dim=-1).indices
        return torch.zeros_like(weights, dtype=torch.bool).scatter(-1, rows, True).tril()

    return choose


def indexed(indexers: nn.ModuleList, budget: int) -> Choose:
    """The tokens that the layer's indexer scores highest."""

    def choose(weights: Tensor, u: Tensor, layer: int) -> Tensor:
        indexer: Any = indexers[layer]
        scores, _ = indexer.scores(u, u, *tables(u))
        return chosen_mask(scores.topk(budget, dim=-1).indices, u.shape[1])

    return choose


# Keeping less: policies on caches, token by token


@torch.no_grad()
def decoded_bits(
    model: DeepseekV2ForCausalLM, tokens: Tensor, policies: Sequence[Callable[[Any, Tensor], Any]]
) -> float:
    """Bits per byte of decoding from the first byte on, where a policy shortens each layer's cache after every token."""
    caches = list(model.empty_caches(len(tokens)))
    losses = []
    for new, following in zip(tokens[:, :-1].T, tokens[:, 1:].T, strict=True):
        x = model.model.embed_tokens(new[:, None])
        for index, layer in enumerate(layers(model)):
            x, weights, cache = layer(x, past_key_value=caches[index], output_attentions=True, use_cache=True)
            caches[index] = policies[index](cache, weights)
        losses.append(F.cross_entropy(model.lm_head(model.model.norm(x))[:, 0], following))
    return to_bits(torch.stack(losses).mean())


def heavy_hitters(budget: int, recent: int) -> list[Callable[[Any, Tensor], Any]]:
    """For each layer the policy that leaves a query ``budget`` tokens, its own among them, ``recent`` of them kept as the newest."""
    return [HeavyHitters(budget - 1, recent).step for _ in range(router.CONFIG.num_hidden_layers)]


# The indexer


def tables(u: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for tokens from position 0 on."""
    positions = torch.arange(u.shape[1], device=u.device)[None]
    rotating, theta = router.CONFIG.qk_rope_head_dim, float(router.CONFIG.rope_theta)
    cos, sin = rotary_tables(positions, rotating, theta, dtype=u.dtype)
    return cos, sin


def new_indexers() -> nn.ModuleList:
    """An untrained indexer for each layer. The model has no query latent, so queries come from what ``q_proj`` reads."""
    torch.manual_seed(0)
    width = router.CONFIG.hidden_size
    count = router.CONFIG.num_hidden_layers
    return nn.ModuleList(LightningIndexer(width, width, HEADS, WIDTH, top_k=8) for _ in range(count))


def divergence(scores: Tensor, target: Tensor) -> Tensor:
    """Mean over queries of D(target | softmax of scores): equation 3 of the DeepSeek-V3.2-Exp report.

    Args:
        scores: (B, S, S), minus infinity after the query. target: what all heads together attend to, sum 1.
    """
    logs = scores.log_softmax(-1).masked_fill(scores.isneginf(), 0)
    return (torch.xlogy(target, target) - target * logs).sum(-1).mean()


@torch.no_grad()
def lessons(model: DeepseekV2ForCausalLM, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each layer its normalised input, and the attention summed over heads and divided by their number."""
    x, found = model.model.embed_tokens(tokens), []
    for layer in layers(model):
        u = layer.input_layernorm(x)
        x, weights = layer(x, output_attentions=True)
        found.append((u, weights.mean(1)))
    return found


def train(steps: int = STEPS, total: int = STEPS) -> tuple[nn.ModuleList, dict[str, list[float]]]:
    """The indexers after so many of the ``total`` steps, and their loss, a mean over layers, in nats.

    The model stays as it is, as in the report's warm-up (section 2.1.1).
    """
    model, indexers, data = model_with_weights(torch.float32), new_indexers(), corpus()
    optimiser = torch.optim.Adam(indexers.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(1)
    log: dict[str, list[float]] = {"step": [], "loss": []}
    since: list[float] = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = RATE * (1 - step / total)
        tokens = torch.cat([windows(data[kind], PER_KIND, router.SEQ, generator) for kind in KINDS])
        losses = [
            divergence(indexer.scores(u, u, *tables(u))[0], target)  # type: ignore[operator]
            for indexer, (u, target) in zip(indexers, lessons(model, tokens), strict=True)
        ]
        loss = torch.stack(losses).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        since.append(loss.item())
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            log["step"].append(step + 1)
            log["loss"].append(round(sum(since) / len(since), 4))
            since.clear()
    return indexers.requires_grad_(False), log


def load(folder: Path = router.DATA) -> nn.ModuleList:
    """The trained indexers, in float64 like the model that is measured."""
    indexers = new_indexers()
    indexers.load_state_dict(load_file(folder / WEIGHTS))
    return indexers.double().requires_grad_(False)


# All of it


def measure(indexers: nn.ModuleList) -> dict[str, dict[str, float]]:
    """Bits per byte of every policy, by budget."""
    model, tokens = model_with_weights(), texts()

    def hitters(budget: int, recent: int) -> float:
        return decoded_bits(model, tokens, heavy_hitters(budget, recent))

    ways: dict[str, Callable[[int], float]] = {
        "window": lambda b: bits(model, tokens, in_window(b)),
        "4 first and window": lambda b: bits(model, tokens, in_window(b, SINKS)),
        "heavy hitters": lambda b: hitters(b, b // 2),
        "heavy hitters, one newest": lambda b: hitters(b, 1),
        "best, shared by heads": lambda b: bits(model, tokens, best(b)),
        "newest half, best half": lambda b: bits(model, tokens, best(b, newest=b // 2)),
        "best, per head": lambda b: bits(model, tokens, best_per_head(b)),
        "indexer": lambda b: bits(model, tokens, indexed(indexers, b)),
    }
    found = {"everything": {str(router.SEQ): round(bits(model, tokens), 4)}}
    for name, way in ways.items():
        budgets = [b for b in BUDGETS if b > SINKS or "first" not in name]  # with four first ones, four are no window
        found[name] = {str(budget): round(way(budget), 4) for budget in budgets}
    return found


def alone() -> dict[str, dict[str, float]]:
    """Bits per byte where one layer alone reads 8 tokens, by layer and policy, and the others read everything."""
    model, tokens = model_with_weights(), texts()
    policies = {"window": in_window(8), "best, shared by heads": best(8)}
    return {
        name: {str(one): round(bits(model, tokens, in_layer(one, choose)), 4) for one in range(len(layers(model)))}
        for name, choose in policies.items()
    }


def in_layer(one: int, choose: Choose) -> Choose:
    """What ``choose`` leaves in one layer, and everything in the others."""

    def chosen(weights: Tensor, u: Tensor, layer: int) -> Tensor:
        everything = window_mask(u.shape[1], u.shape[1], 0, u.shape[1], u.device)
        return choose(weights, u, layer) if layer == one else everything

    return chosen


@torch.no_grad()
def rows_read_per_head(model: DeepseekV2ForCausalLM, tokens: Tensor, budget: int) -> float:
    """Mean number of tokens that at least one head of a layer chooses, over the queries that see more than all heads' budgets."""
    counts, x = [], model.model.embed_tokens(tokens)
    for layer in layers(model):
        x, weights = layer(x, output_attentions=True)
        union = best_per_head(budget)(weights, x, 0).any(1).sum(-1)  # (B, S)
        counts.append(union[:, weights.shape[1] * budget :])
    return float(torch.stack(counts).double().mean())


def stored(folder: Path = router.DATA) -> dict[str, Any]:
    """The results that the book shows."""
    results: dict[str, Any] = json.loads((folder / FILE).read_text())
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the indexers, and measure every policy."""
    parser = argparse.ArgumentParser(prog="python -m experiments.forgetting", description="Forget and choose.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=router.DATA, help="folder for indexers and results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    indexers, log = train(args.steps, args.steps)
    weights = {name: weight.bfloat16().contiguous() for name, weight in indexers.state_dict().items()}
    save_file(weights, args.out / WEIGHTS)
    results: dict[str, Any] = {"bits": measure(load(args.out)), "one_layer_alone": alone(), "indexer": log}
    results["rows_read_per_head"] = {
        str(budget): round(rows_read_per_head(model_with_weights(), texts(), budget), 2) for budget in (8, 16)
    }
    (args.out / FILE).write_text(json.dumps(results, indent=1) + "\n")
    for name, by_budget in results["bits"].items():
        print(name, by_budget, flush=True)


if __name__ == "__main__":
    main()
