"""What a decoding layer caches, multiplies and reads, in three ways."""

import html

from dsv2_ref.config import DeepseekV2Config

SCRIPTS = ("data",)
STATES = [("deepseek_v2_lite", 1, 8192), ("deepseek_v2_lite", 64, 8192), ("deepseek_v2_lite", 512, 8192)]
STATES += [("deepseek_v2", 1, 8192), ("deepseek_v2", 1, 131072)]
WAYS = ("keys and values cached", "absorbed", "expanded anew")


def three_ways(config: DeepseekV2Config, seq: int, kv_seq: int) -> dict[str, dict[str, int]]:
    """FLOPs and bytes (bfloat16) of the last ``seq`` of ``kv_seq`` tokens in the attention of one layer, in three ways.

    What all of them share is left out: the projections of the new tokens themselves.
    """
    heads, latent, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    pairs = seq * kv_seq - seq * (seq - 1) // 2
    expanded = config.qk_nope_head_dim + rope + config.v_head_dim
    matrix = latent * (config.qk_nope_head_dim + config.v_head_dim)
    whole, latents = 2 * kv_seq * heads * expanded, 2 * (kv_seq * (latent + rope) + heads * matrix)
    flops = pairs * expanded, pairs * (2 * latent + rope) + seq * matrix, pairs * expanded + kv_seq * matrix
    return {
        "flops": dict(zip(WAYS, (2 * heads * count for count in flops), strict=True)),
        "bytes": dict(zip(WAYS, (whole, latents, latents + 2 * whole), strict=True)),
    }


def table() -> str:
    """Five states of the figure, in HTML: what is cached per token, multiplied and read."""
    head = "".join(f"<th scope='col'>{way}</th>" for way in WAYS)
    rows = ""
    for preset, seq, kv_seq in STATES:
        config = getattr(DeepseekV2Config, preset)()
        counted, latents = three_ways(config, seq, kv_seq), config.kv_lora_rank + config.qk_rope_head_dim
        keys_and_values = config.num_attention_heads * (
            config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        )
        cells = ""
        for way, cached in zip(WAYS, (keys_and_values, latents, latents), strict=True):
            flops, size = counted["flops"][way] / 1e6, counted["bytes"][way] / 1e6
            cells += f"<td>{cached:,} elements, {flops:,.0f} MFLOP, {size:,.1f} MB</td>"
        name = {"deepseek_v2_lite": "V2-Lite", "deepseek_v2": "V2"}[preset]
        rows += f"<tr><th scope='row'>{html.escape(name)}, {seq:,} new of {kv_seq:,} tokens</th>{cells}</tr>"
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"
