"""What is timed: a step of attention or of the experts, by us, by transformers, and as bare products."""

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import DynamicCache
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as peer
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config as PeerConfig

from dsv2_ref import (
    DeepseekV2Attention,
    DeepseekV2Config,
    DeepseekV2DecoderLayer,
    DeepseekV2MoE,
    accounting,
    pack_weights,
)
from dsv2_ref.fast.processor import has_bfloat16

Call = Callable[[], Any]
Module = TypeVar("Module", bound=nn.Module)
CONFIG = replace(DeepseekV2Config.card(), num_experts_per_tok=6)
MODEL = DeepseekV2Config.deepseek_v2_lite()
GATHERED_BYTES_AT_MOST = 2**32


@dataclass
class Work:
    """One row of the table.

    Attributes:
        ours: by setting, each gives the output. peers: the same, by setting of transformers.
        floors: ways to compute the matrix products alone through torch's kernels; the fastest counts.
        flops: of these products. nbytes: of the weights and the cache, each read once.
        chain: the products in their order, each as (FLOPs, bytes of its largest operand).
        flash: the same by us through flash-attn, which only GPUs have.
    """

    name: str
    ours: dict[str, Callable[[], Tensor]]
    peers: dict[str, Callable[[], Tensor]]
    floors: dict[str, Call]
    flops: int
    nbytes: int
    chain: list[tuple[int, int]]
    flash: dict[str, Callable[[], Tensor]] = field(default_factory=dict)

    def limit(self, bandwidth: float, rate: float) -> float:
        """Seconds below which no machine of this bandwidth and rate can go: as if it read and multiplied all at once."""
        return max(self.nbytes / bandwidth, self.flops / rate)

    def limit_in_turn(self, bandwidth: float, rate: float) -> float:
        """The same where a product starts when the one before it has ended, as it must: each needs the last one's result.

        Then the matrices of one are not read while another is computed, as they would have to be to reach `limit`.
        """
        return sum(max(nbytes / bandwidth, flops / rate) for flops, nbytes in self.chain)


class _Chain(TorchDispatchMode):
    """Notes every product that is computed while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            operands = [x for x in args if isinstance(x, Tensor)]
            self.products.append(
                (int(count(*args, **(kwargs or {}), out_val=out)), max(_nbytes([x]) for x in operands))
            )
        return out


def _chain(products: Call) -> list[tuple[int, int]]:
    with _Chain() as chain:
        products()
    return chain.products


def _flops(products: Call) -> int:
    with FlopCounterMode(display=False) as counter:
        products()
    return int(counter.get_total_flops())


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _settings(module: Module, by_us: Callable[[Module], Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
    """A step with the weights as they are published, and packed where that is to be had."""
    modules, weight = {"plain": module}, next(module.parameters())
    packs = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    if packs and has_bfloat16():
        modules["packed"] = pack_weights(copy.deepcopy(module))
    return {name: by_us(module) for name, module in modules.items()}


def _peer_config(**settings: Any) -> PeerConfig:
    same = (
        "hidden_size intermediate_size moe_intermediate_size num_attention_heads n_shared_experts n_routed_experts "
        "kv_lora_rank q_lora_rank qk_rope_head_dim v_head_dim qk_nope_head_dim num_experts_per_tok rms_norm_eps"
    )
    shared = {name: getattr(CONFIG, name) for name in same.split()}
    rope = {"rope_type": "default", "rope_theta": CONFIG.rope_theta}
    return PeerConfig(**shared, topk_method="greedy", rope_parameters=rope, **settings)


def _attention(dtype: torch.dtype, implementation: str, ours: DeepseekV2Attention) -> Any:
    module = peer.DeepseekV2Attention(_peer_config(attn_implementation=implementation), 0).to(dtype).eval()
    module.load_state_dict(ours.state_dict(), assign=True)
    return module


def _rotations(x: Tensor, first: int) -> Tensor:
    """What transformers computes once for all layers; left out of its time."""
    positions = torch.arange(first, first + x.shape[1])[None]
    rotations: Tensor = peer.DeepseekV2RotaryEmbedding(_peer_config())(x, positions)
    return rotations


def attention_weights(ours: DeepseekV2Attention) -> list[Tensor]:
    """The matrices of an attention, each of which a step reads once."""
    return [weight for weight in ours.parameters() if weight.ndim == 2]


ROOM = 64
"""Tokens for which a cache has more room than a step needs."""


def forget_last(cache: Any) -> None:
    """Let the next step write where the last one did, as the peer's ``crop`` does: all steps are alike."""
    cache._storage.used = len(cache)


def attention_decode(dtype: torch.dtype, kv_seq: int = 8192, batch: int = 1) -> Work:
    """One token of each sequence attends to ``kv_seq`` tokens, itself included."""
    ours = DeepseekV2Attention(CONFIG, 0).to(dtype).eval()
    heads, latent, nope = CONFIG.num_attention_heads, ours.kv_lora_rank, CONFIG.qk_nope_head_dim
    x = torch.randn(batch, 1, CONFIG.hidden_size, dtype=dtype)
    past = torch.randn(batch, kv_seq - 1, *ours.cache_features, dtype=dtype)
    rotations = _rotations(x, kv_seq - 1)

    def by_us(module: DeepseekV2Attention) -> Callable[[], Tensor]:
        cache = module.empty_cache(batch, capacity=kv_seq + ROOM).append(past)

        def step() -> Tensor:
            out, _, _ = module(x, past_key_value=cache, use_cache=True)
            forget_last(cache)
            return out

        return step

    def by_peer(implementation: str) -> Callable[[], Tensor]:
        module = _attention(dtype, implementation, ours)
        peer_cache = DynamicCache()
        peer_cache.update(past[:, None, :, :latent].contiguous(), past[:, None, :, latent:].contiguous(), 0)

        def step() -> Tensor:
            out: Tensor = module(x, past_key_values=peer_cache, position_embeddings=rotations)[0]
            peer_cache.crop(-1)
            return out

        return step

    w_uk, w_uv = ours.kv_b_proj.weight.view(heads, -1, latent).split((nope, CONFIG.v_head_dim), dim=1)
    q_a, q = torch.randn(batch, CONFIG.q_lora_rank or 0, dtype=dtype), torch.randn(heads, batch, nope, dtype=dtype)
    query, keys = (torch.randn(batch, rows, past.shape[-1], dtype=dtype) for rows in (heads, kv_seq))
    weights, attended = torch.rand(batch, heads, kv_seq, dtype=dtype), torch.randn(heads, latent, batch, dtype=dtype)
    out = torch.randn(batch, ours.o_proj.in_features, dtype=dtype)
    if batch == 1:
        query, keys, weights = query[0], keys[0], weights[0]

    def products() -> None:
        F.linear(x, ours.q_a_proj.weight)
        F.linear(q_a, ours.q_b_proj.weight)
        F.linear(x, ours.kv_a_proj_with_mqa.weight)
        torch.bmm(q, w_uk)
        query @ keys.mT
        weights @ keys[..., :latent]
        torch.bmm(w_uv, attended)
        F.linear(out, ours.o_proj.weight)

    return Work(
        f"MLA decode step, K = {kv_seq}" + f", batch {batch}" * (batch > 1),
        _settings(ours, by_us),
        {name: by_peer(name) for name in ("sdpa", "eager")},
        {"products": products},
        _flops(products),
        _nbytes([*attention_weights(ours), keys]),
        _chain(products),
    )


def attention_prefill(dtype: torch.dtype, seq: int = 2048) -> Work:
    """``seq`` tokens attend to those before them; a cache is begun."""
    ours = DeepseekV2Attention(CONFIG, 0).to(dtype).eval()
    heads, value_width = CONFIG.num_attention_heads, CONFIG.v_head_dim
    x = torch.randn(1, seq, CONFIG.hidden_size, dtype=dtype)
    rotations = _rotations(x, 0)
    causal = torch.full((1, 1, seq, seq), torch.finfo(dtype).min, dtype=dtype).triu(1)

    def by_peer(implementation: str) -> Callable[[], Tensor]:
        module, mask = _attention(dtype, implementation, ours), causal if implementation == "eager" else None

        def step() -> Tensor:
            out: Tensor = module(x, mask, past_key_values=DynamicCache(), position_embeddings=rotations)[0]
            return out

        return step

    @functools.cache
    def by_flash() -> DeepseekV2Attention:  # fails where the package is missing: not before it is asked for
        with torch.device("meta"):
            module = DeepseekV2Attention(replace(CONFIG, _attn_implementation="flash_attention_2"), 0).eval()
        module.load_state_dict(ours.state_dict(), assign=True)
        return module

    linears = (ours.q_a_proj, ours.q_b_proj, ours.kv_a_proj_with_mqa, ours.kv_b_proj, ours.o_proj)
    inputs = [torch.randn(seq, linear.in_features, dtype=dtype) for linear in linears]
    query, key, value = (torch.randn(1, heads, seq, ours.qk_head_dim, dtype=dtype) for _ in range(3))
    narrow = value[..., :value_width].contiguous()

    def project() -> None:
        for inp, linear in zip(inputs, linears, strict=True):
            F.linear(inp, linear.weight)

    def by_blocks(rows: int = 512) -> None:
        project()
        for start in range(0, seq, rows):
            stop = start + rows
            (query[0, :, start:stop] @ key[0, :, :stop].mT) @ narrow[0, :, :stop]

    def by_fused() -> None:
        project()
        F.scaled_dot_product_attention(query, key, value, is_causal=True)

    return Work(
        f"MLA prefill, S = {seq}",
        _settings(ours, lambda module: lambda: module(x, use_cache=True)[0]),
        {name: by_peer(name) for name in ("sdpa", "eager")},
        {"products by blocks of 512 queries": by_blocks, "fused attention": by_fused},
        _flops(project) + heads * seq * (seq + 1) * (ours.qk_head_dim + value_width),
        _nbytes(attention_weights(ours)),
        _chain(by_blocks),
        {"flash_attention_2": lambda: by_flash()(x, use_cache=True)[0]},
    )


def experts(dtype: torch.dtype, seq: int) -> Work:
    """``seq`` tokens through gate, routed and shared experts."""
    ours = DeepseekV2MoE(CONFIG).to(dtype).eval()
    hidden, width = CONFIG.hidden_size, CONFIG.moe_intermediate_size
    x = torch.randn(1, seq, hidden, dtype=dtype)
    chosen, _, _ = ours.gate(x)
    counts = torch.bincount(chosen.flatten(), minlength=len(ours.experts.down_proj)).tolist()
    gate_up, down, shared = ours.experts.gate_up_proj, ours.experts.down_proj, ours.shared_experts
    assert shared is not None
    gathered = chosen.numel() * 3 * hidden * width * x.element_size()
    settings = ["eager", "grouped_mm"] + ["batched_mm"] * (gathered <= GATHERED_BYTES_AT_MOST)

    def by_peer(implementation: str) -> Callable[[], Tensor]:
        with torch.device("meta"):
            module = peer.DeepseekV2Moe(_peer_config(experts_implementation=implementation)).eval()
        packed = {"experts.gate_up_proj": gate_up, "experts.down_proj": down, "gate.weight": ours.gate.weight}
        packed |= {f"shared_experts.{name}": weight for name, weight in shared.named_parameters()}
        module.load_state_dict(packed, assign=True)
        return lambda: module(x)

    rows, inner = torch.randn(chosen.numel(), hidden, dtype=dtype), torch.randn(chosen.numel(), width, dtype=dtype)
    shared_inner, ends = torch.randn(seq, shared.intermediate_size, dtype=dtype), torch.tensor(counts).cumsum(0).int()
    wide, gate = x.float(), ours.gate.weight.float()

    def other_products() -> None:
        F.linear(wide, gate)
        F.linear(x, shared.gate_proj.weight)
        F.linear(x, shared.up_proj.weight)
        F.linear(shared_inner, shared.down_proj.weight)

    def by_expert() -> None:
        other_products()
        for expert, (row, mid) in enumerate(zip(rows.split(counts), inner.split(counts), strict=True)):
            if len(row):
                F.linear(row, gate_up[expert])
                F.linear(mid, down[expert])

    def by_group() -> None:
        other_products()
        F.grouped_mm(rows, gate_up.mT, offs=ends)
        F.grouped_mm(inner, down.mT, offs=ends)

    used = sum(count > 0 for count in counts)
    return Work(
        "MoE decode step" if seq == 1 else f"MoE prefill, {seq} tokens",
        _settings(ours, lambda module: lambda: module(x)),
        {name: by_peer(name) for name in settings},
        {"products by expert": by_expert, "grouped products": by_group},
        _flops(by_expert),
        _nbytes([gate_up[0], down[0]]) * used + _nbytes([*shared.parameters(), ours.gate.weight]),
        _chain(by_expert),
    )


def layer(dtype: torch.dtype, seq: int, kv_seq: int) -> Work:
    """A whole layer with experts: ``seq`` tokens that attend to ``kv_seq``, themselves included."""
    ours = DeepseekV2DecoderLayer(CONFIG, CONFIG.first_k_dense_replace).to(dtype).eval()
    moe: Any = ours.mlp
    attention, routed, shared = ours.self_attn, moe.experts, moe.shared_experts
    latent, past_seq = attention.kv_lora_rank, kv_seq - seq
    x = torch.randn(1, seq, CONFIG.hidden_size, dtype=dtype)
    past = torch.randn(1, past_seq, *attention.cache_features, dtype=dtype)
    rotations = _rotations(x, past_seq)
    cache = attention.empty_cache(1, capacity=kv_seq + ROOM).append(past)

    def by_us() -> Tensor:
        out: Tensor = ours(x, past_key_value=cache, use_cache=True)[0]
        forget_last(cache)
        return out

    def by_peer(experts_implementation: str) -> Callable[[], Tensor]:
        settings = {"attn_implementation": "sdpa", "experts_implementation": experts_implementation}
        with torch.device("meta"):
            module: Any = peer.DeepseekV2DecoderLayer(_peer_config(**settings, first_k_dense_replace=0), 0).eval()
        named = {f"self_attn.{name}": weight for name, weight in attention.state_dict().items()}
        named |= {f"mlp.shared_experts.{name}": weight for name, weight in shared.named_parameters()}
        named |= {"mlp.experts.gate_up_proj": routed.gate_up_proj, "mlp.experts.down_proj": routed.down_proj}
        named["mlp.gate.weight"] = moe.gate.weight
        for norm in ("input_layernorm", "post_attention_layernorm"):
            named[f"{norm}.weight"] = getattr(ours, norm).weight
        module.load_state_dict(named, assign=True)
        remembered = DynamicCache()
        if past_seq:
            remembered.update(past[:, None, :, :latent].contiguous(), past[:, None, :, latent:].contiguous(), 0)

        def step() -> Tensor:
            out = module(x, past_key_values=remembered, position_embeddings=rotations)
            remembered.crop(-seq)
            return out if isinstance(out, Tensor) else out[0]

        return step

    call = accounting.Call(seq=seq, kv=kv_seq, dtype=str(dtype).removeprefix("torch."))
    counts = accounting.report(CONFIG, call, CONFIG.first_k_dense_replace)
    return Work(
        "layer, decode step, K = " + str(kv_seq) if seq == 1 else f"layer, prefill, S = {seq}",
        {"plain": by_us},
        {name: by_peer(name) for name in ("eager", "grouped_mm")},
        {},
        counts["flops"]["total"],
        round(counts["bytes"]["weights_read"] + counts["bytes"]["kv_cache"]),
        [],
    )


WORKS: dict[str, Callable[[torch.dtype], Work]] = {
    "attention-decode": attention_decode,
    "attention-prefill": attention_prefill,
    "experts-decode": lambda dtype: experts(dtype, seq=1),
    "experts-prefill": lambda dtype: experts(dtype, seq=2048),
}
