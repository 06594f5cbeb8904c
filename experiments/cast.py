"""The sizes that the chapters use: a toy by hand, the trained model, DeepSeek-V2-Lite and DeepSeek-V2."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dsv2_ref.config import DeepseekV2Config
from experiments.router import CONFIG

TOY = replace(
    DeepseekV2Config.tiny(), hidden_size=4, num_hidden_layers=1, num_attention_heads=2, q_lora_rank=None,
    kv_lora_rank=3, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=1, n_routed_experts=4, num_experts_per_tok=2,
    n_shared_experts=1, topk_method="group_limited_greedy", n_group=2, topk_group=1,
)  # fmt: skip
CAST = {
    "toy": TOY,
    "trained": CONFIG,
    "V2-Lite": DeepseekV2Config.deepseek_v2_lite(),
    "V2": DeepseekV2Config.deepseek_v2(),
}

NO_SIZE_IN_THE_TOY = {"I"}

SYMBOLS: dict[str, tuple[str, Callable[[DeepseekV2Config], Any]]] = {
    "D": ("width of the stream", lambda c: c.hidden_size),
    "H": ("heads", lambda c: c.num_attention_heads),
    "N": ("query and key width of a head, without position", lambda c: c.qk_nope_head_dim),
    "R": ("query and key width of a head, with position", lambda c: c.qk_rope_head_dim),
    "V": ("value width of a head", lambda c: c.v_head_dim),
    "C": ("latent of keys and values", lambda c: c.kv_lora_rank),
    "Q": ("latent of queries", lambda c: c.q_lora_rank),
    "E": ("routed experts", lambda c: c.n_routed_experts),
    "k": ("experts chosen per token", lambda c: c.num_experts_per_tok),
    "I": ("width of an expert", lambda c: c.moe_intermediate_size),
}
"""What each letter counts, and where a configuration says it."""


def sizes_of(symbol: str) -> dict[str, str]:
    """The size of a symbol in each member of the cast; a dash where it has none."""
    _, of = SYMBOLS[symbol]
    found = {}
    for name, config in CAST.items():
        size = None if name == "toy" and symbol in NO_SIZE_IN_THE_TOY else of(config)
        found[name] = "–" if size is None else f"{size:,}"
    return found


def table() -> str:
    """All sizes as a table in Markdown."""
    rows: list[tuple[str, Callable[[DeepseekV2Config], Any]]] = [
        (f"{text} ${symbol}$", of) for symbol, (text, of) in SYMBOLS.items()
    ]
    rows[1:1] = [("layers", lambda c: c.num_hidden_layers)]
    rows += [
        ("width of a dense layer's MLP", lambda c: c.intermediate_size),
        ("shared experts", lambda c: c.n_shared_experts),
        ("groups of experts, and groups open to a token", _groups),
        ("cached elements per token and layer, $C + R$", lambda c: c.kv_lora_rank + c.qk_rope_head_dim),
        ("the same for keys and values, $H (N + R + V)$", _expanded),
    ]
    toy_has_none = {f"{SYMBOLS['I'][0]} $I$", "width of a dense layer's MLP"}
    lines = ["| size | " + " | ".join(CAST) + " |", "| --- |" + " ---: |" * len(CAST)]
    for text, of in rows:
        values = [None if name == "toy" and text in toy_has_none else of(c) for name, c in CAST.items()]
        shown = ["–" if v is None else f"{v:,}" if isinstance(v, int) else v for v in values]
        lines.append(f"| {text} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _groups(config: DeepseekV2Config) -> str:
    limited = config.topk_method == "group_limited_greedy"
    return f"{config.n_group}, {config.topk_group}" if limited else "1, 1"


def _expanded(config: DeepseekV2Config) -> int:
    return config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
