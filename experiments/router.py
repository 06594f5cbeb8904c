"""Train a tiny DeepSeek-V2 with and without balance losses, or with V3's bias, and keep who routed what.

    python -m experiments.router                    all runs, as the book shows them: twenty minutes of one core
    python -m experiments.router --steps 20 --out /tmp/router --runs none

Writes a checkpoint (published names, bfloat16) for each run and one log of them all. The same versions of Python and
torch on the same kind of processor give the same log; elsewhere roundings differ, and with them which expert ends up
with what.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv2_ref import DeepseekV2Config, DeepseekV2ForCausalLM, MoEGate
from dsv2_ref.loss_free import LossFreeBalancing
from experiments.corpus import KINDS, corpus, windows

DATA = Path(__file__).resolve().parent.parent / "book" / "data"
CONFIG = DeepseekV2Config(
    vocab_size=256, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=4,
    num_attention_heads=4, q_lora_rank=None, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
    n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=3, topk_method="group_limited_greedy", n_group=4,
    topk_group=2, max_position_embeddings=256, aux_loss_alpha=0.0, initializer_range=0.06,
)  # fmt: skip
RUNS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "expert": {"aux_loss_alpha": 0.003},
    "pooled": {"aux_loss_alpha": 0.003, "seq_aux": False},
    "all": {"aux_loss_alpha": 0.003, "device_aux_loss_alpha": 0.05, "communication_aux_loss_alpha": 0.02},
    "bias": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
}
"""Balance losses: none; the expert loss alone, over each sequence or pooled over the batch; all three, weighted as in
DeepSeek-V2, section 3.1.2; and no loss, but DeepSeek-V3's gate and the bias that balances it."""
SEQ, PER_KIND, STEPS, EVERY = 128, 6, 1500, 25
WARM_UP, RATE, CLIP = 100, 3e-3, 1.0
SPEED = 0.001  # of the bias, as in DeepSeek-V3, section 4.2


def tiny_model(run: str) -> DeepseekV2ForCausalLM:
    """The model of a run, with the same first weights for all of them."""
    torch.manual_seed(0)
    return DeepseekV2ForCausalLM(replace(CONFIG, **RUNS[run]))


def loss_of(model: DeepseekV2ForCausalLM, tokens: Tensor) -> Tensor:
    """Mean bits a byte needs, given those before it."""
    logits, _ = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / torch.tensor(2.0).log()


class Choices:
    """Notes what each gate of a model chooses, while it is open."""

    def __init__(self, model: torch.nn.Module) -> None:
        gates = [module for module in model.modules() if isinstance(module, MoEGate)]
        self.chosen: list[list[Tensor]] = [[] for _ in gates]
        self._hooks = [
            gate.register_forward_hook(self._note(kept)) for gate, kept in zip(gates, self.chosen, strict=True)
        ]

    @staticmethod
    def _note(kept: list[Tensor]) -> Any:
        return lambda module, inputs, output: kept.append(output[0])

    def counts(self, experts: int) -> list[list[int]]:
        """How often each layer chose each expert since the last call."""
        counted = [torch.cat(kept).flatten().bincount(minlength=experts).tolist() for kept in self.chosen]
        for kept in self.chosen:
            kept.clear()
        return counted

    def __enter__(self) -> "Choices":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def rate_at(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    warm_up = min(WARM_UP, steps // 5)
    if step < warm_up:
        return RATE * (step + 1) / warm_up
    done = torch.tensor((step - warm_up) / max(1, steps - warm_up) * torch.pi)
    return RATE * (0.55 + 0.45 * float(done.cos()))


def train(run: str, steps: int, texts: Mapping[str, Tensor]) -> tuple[DeepseekV2ForCausalLM, dict[str, Any]]:
    """Train for ``steps`` batches with as many sequences of each kind; the model, and its log."""
    model = tiny_model(run).train()
    balancing = LossFreeBalancing(model, SPEED) if model.config.topk_method == "noaux_tc" else None
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    log: dict[str, Any] = {"step": [], "bits": [], "counts": []}
    since: list[float] = []
    with Choices(model) as choices:
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = rate_at(step, steps)
            tokens = torch.cat([windows(texts[kind], PER_KIND, SEQ + 1, generator) for kind in KINDS])
            loss = loss_of(model, tokens)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimiser.step()
            if balancing is not None:
                balancing.step()
            since.append(loss.item())
            if (step + 1) % EVERY == 0 or step + 1 == steps:
                log["step"].append(step + 1)
                log["bits"].append(round(sum(since) / len(since), 3))
                log["counts"].append(choices.counts(CONFIG.n_routed_experts or 0))
                since.clear()
    return model.eval(), log


def sample(folder: Path = DATA) -> dict[str, Tensor]:
    """The stored sequences that the book shows to trained routers, (16, 128) bytes of each kind; none was trained on.

    Code and prose are this project's own. The sums were drawn with a seed that training does not use, but there are so
    few that most single ones are in the training text as well.
    """
    return {kind: tokens.long() for kind, tokens in load_file(folder / "router_sample.safetensors").items()}


@torch.no_grad()
def bits_by_kind(model: DeepseekV2ForCausalLM, texts: Mapping[str, Tensor]) -> dict[str, float]:
    """Bits a byte of each kind of training text, over the same pieces of it for every model."""
    generator = torch.Generator().manual_seed(2)
    return {kind: round(loss_of(model, windows(texts[kind], 64, SEQ, generator)).item(), 3) for kind in KINDS}


def load(run: str, folder: Path = DATA) -> DeepseekV2ForCausalLM:
    """The trained model of a run, in float32 and eval."""
    model = tiny_model(run)
    model.load_state_dict(load_file(folder / f"router_{run}.safetensors"), strict=True)
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the runs asked for, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m experiments.router", description="Train routers for the book.")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=DATA, help="folder for checkpoints and log")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    texts = corpus()
    logs = {}
    for run in args.runs:
        model, logs[run] = train(run, args.steps, texts)
        # As in V3's checkpoints, what chooses keeps its bits.
        weights = {
            name: weight.contiguous().to(torch.float32 if name.endswith("correction_bias") else torch.bfloat16)
            for name, weight in model.state_dict().items()
        }
        save_file(weights, args.out / f"router_{run}.safetensors")
        logs[run]["bits_by_kind"] = bits_by_kind(load(run, args.out), texts)
        print(f"{run}: {logs[run]['bits'][-1]} bits a byte", flush=True)
    (args.out / "router_log.json").write_text(json.dumps(logs, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
