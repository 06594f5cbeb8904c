"""Train deep, narrow stacks with the norm before or behind each part, with and without warm-up, over several seeds.

    python -m experiments.norms                     all runs, as the book shows them: about an hour of one core
    python -m experiments.norms --steps 10 --seeds 1 --out /tmp/norms

Writes one log. A run counts as failed if it ends no better than guessing bytes by how often they occur.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, DeepseekV2ForCausalLM
from experiments.corpus import sums, to_bytes, windows

DATA = Path(__file__).resolve().parent.parent / "book" / "data"
WIDTH = 64
CONFIG = DeepseekV2Config(
    vocab_size=128, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=12, num_attention_heads=4,
    q_lora_rank=None, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=None,
    max_position_embeddings=256,
)  # fmt: skip
PLACES, WARM_UPS = ("pre", "post"), (0, 80)
V2_GAIN = 0.006 * 5120**0.5
RATES = {1.0: (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), V2_GAIN: (1e-3, 1e-2)}
"""Learning rates by gain, the standard deviation of first weights times the root of the width; V2's is the second."""

SEEDS, STEPS, EVERY, SEQ, BATCH = 3, 240, 10, 64, 8


class PostNormLayer(DeepseekV2DecoderLayer):
    """The same parts in the original Transformer's order: each norm after its sum."""

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """``h = norm(x + attention(x))``, then ``norm(h + feed_forward(h))``."""
        attended, *rest = self.self_attn(hidden_states, *args, **kwargs)
        hidden_states = self.input_layernorm(hidden_states + attended)
        fed = self.mlp(hidden_states)
        hidden_states = self.post_attention_layernorm(hidden_states + fed)
        return hidden_states, *(part for part in rest if part is not None)


def stack(
    place: str, layers: int, seed: int, config: DeepseekV2Config = CONFIG, gain: float = 1.0
) -> DeepseekV2ForCausalLM:
    """A stack with its norms before or behind the parts, and the same first weights either way."""
    torch.manual_seed(seed)
    initial = gain * config.hidden_size**-0.5
    model = DeepseekV2ForCausalLM(replace(config, num_hidden_layers=layers, initializer_range=initial))
    if place == "post":
        for layer in model.model.layers:
            layer.__class__ = PostNormLayer
    return model


def bits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean bits a byte needs, given those before it."""
    logits, _ = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / torch.tensor(2.0).log()


def train(place: str, warm_up: int, rate: float, seed: int, steps: int, text: Tensor, gain: float) -> dict[str, Any]:
    """One run with Adam at a constant rate after ``warm_up`` linear steps; bits every `EVERY` steps."""
    model = stack(place, CONFIG.num_hidden_layers, seed, gain=gain)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    curve, since = [], []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / max(1, warm_up))
        loss = bits(model, windows(text, BATCH, SEQ + 1, generator))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        since.append(loss.item())
        if (step + 1) % EVERY == 0:
            curve.append(round(sum(since) / len(since), 3))
            since.clear()
    return {"place": place, "gain": gain, "warm_up": warm_up, "rate": rate, "seed": seed, "bits": curve}


def bits_by_frequency(text: Tensor) -> float:
    """Bits a byte needs if only the frequencies of bytes are known: their entropy."""
    shares = text.bincount().double() / len(text)
    shares = shares[shares > 0]
    return float(-(shares * shares.log2()).sum())


def main(arguments: Sequence[str] | None = None) -> None:
    """Train every combination, seeds innermost."""
    parser = argparse.ArgumentParser(prog="python -m experiments.norms", description="Pre-norm against post-norm.")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=DATA, help="folder for the log")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    text = to_bytes(sums(20_000, seed=1))
    runs = []
    settings = [(gain, rate) for gain, rates in RATES.items() for rate in rates]
    for place, warm_up, (gain, rate), seed in itertools.product(PLACES, WARM_UPS, settings, range(args.seeds)):
        runs.append(train(place, warm_up, rate, seed, args.steps, text, gain))
        print(place, f"gain {gain:.2f}", warm_up, rate, seed, runs[-1]["bits"][-1], flush=True)
    log = {
        "every": EVERY,
        "layers": CONFIG.num_hidden_layers,
        "bits_by_frequency": bits_by_frequency(text),
        "runs": runs,
    }
    (args.out / "norms_log.json").write_text(json.dumps(log, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
