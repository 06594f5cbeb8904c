"""Bugs that real implementations had, planted in the small trained model, and what each costs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv2_ref import DeepseekV2ForCausalLM, DeepseekV2MoE, rope
from dsv2_ref.forget import window_mask
from experiments import router
from experiments.trained import bits, probabilities, trained

Model = DeepseekV2ForCausalLM
PROMPT = 64
"""Bytes of each stored sequence that are read at once where a bug shows while decoding; the others follow one by one."""


@dataclass(frozen=True)
class Bug:
    """A bug, the chapter that explains it, and what it does to a model; a context manager undoes what lies outside."""

    name: str
    chapter: str
    plant: Callable[[Model], AbstractContextManager[Any] | None]
    decoding: bool = False


def layers(model: Model) -> list[Any]:
    """The layers, whose parts are about to be replaced."""
    return list(model.model.layers)


def attentions(model: Model, change: Callable[[Any], object]) -> None:
    """Change each layer's attention, which then computes from the cached latents."""
    for layer in layers(model):
        layer.self_attn.form = "absorbed"
        change(layer.self_attn)


def experts(model: Model, change: Callable[[Any], object]) -> None:
    """Change each mixture of experts."""
    for layer in layers(model):
        if isinstance(layer.mlp, DeepseekV2MoE):
            change(layer.mlp)


def given(model: Model, **arguments: Callable[[int], Tensor]) -> None:
    """Let every call have these arguments, each made from the number of tokens."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        made = {name: make(args[0].shape[1]).to(args[0].device) for name, make in arguments.items()}
        return args[:1], kwargs | made

    model.register_forward_pre_hook(hook, with_kwargs=True)


def exchange(attention: Any) -> None:
    """Take the values' up-projection for the keys', and the other way round."""
    w_uk, w_uv = attention.up_matrices()
    attention.up_matrices = lambda: (w_uv, w_uk)


def split_in_the_middle(attention: Any) -> None:
    """Read all keys' rows first and all values' rows after them, not head by head."""
    w_uk, w_uv = attention.up_matrices()
    rows = attention.kv_b_proj.weight
    keys = w_uk.numel() // rows.shape[1]
    attention.up_matrices = lambda: (rows[:keys].view_as(w_uk), rows[keys:].view_as(w_uv))


def absorbed_width(attention: Any) -> None:
    """Divide scores by the root of the absorbed width."""
    attention.softmax_scale = (attention.kv_lora_rank + attention.rotary_dim) ** -0.5


def no_rope_key(attention: Any) -> None:
    """Let the rope part of every score be zero."""
    attention.kv_a_proj_with_mqa.weight[attention.kv_lora_rank :] = 0


def residual_after_the_norm(model: Model) -> None:
    """Add each branch to what its norm made, not to the stream."""
    for layer in layers(model):
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: ((), kwargs | {"hidden_states": layer.norm(stream(args, kwargs))}),
            with_kwargs=True,
        )
        layer.norm, layer.input_layernorm = layer.input_layernorm, nn.Identity()
        layer.mlp, layer.post_attention_layernorm = Moved(layer.post_attention_layernorm, layer.mlp), nn.Identity()


def stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream, wherever a caller puts it."""
    tokens: Tensor = args[0] if args else kwargs["hidden_states"]
    return tokens


class Moved(nn.Module):
    """A branch that gives its output on top of its normalised input, and takes the input away."""

    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, x: Tensor) -> Tensor:
        """The layer adds ``x``, so it goes off here."""
        normalised = self.norm(x)
        return normalised + self.mlp(normalised) - x


class LayerNorm(nn.Module):
    """The norm that takes the mean away first, with the weight of an RMSNorm."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.layer_norm(x, x.shape[-1:], self.weight, None, self.eps)


def layer_norms(model: Model) -> None:
    """LayerNorm for the two norms of each layer."""
    for layer in layers(model):
        layer.input_layernorm = LayerNorm(layer.input_layernorm)
        layer.post_attention_layernorm = LayerNorm(layer.post_attention_layernorm)


def unit_weights(model: Model) -> None:
    """Every norm's weight 1."""
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.fill_(1.0)


def no_shared_expert(moe: Any) -> None:
    """Leave the experts out that every token visits."""
    moe.shared_experts = None


def rounded_gate(moe: Any) -> None:
    """Compute the gate's logits in bfloat16."""

    def forward(tokens: Tensor) -> tuple[Tensor, Tensor, None]:
        logits = F.linear(tokens.bfloat16(), moe.gate.weight.bfloat16()).flatten(0, -2)
        scores = logits.float().softmax(-1)
        groups = scores.unflatten(-1, (moe.gate.n_group, -1))
        best = groups.amax(-1).topk(moe.gate.topk_group).indices
        closed = torch.ones_like(groups, dtype=torch.bool).scatter(
            1, best[..., None].expand_as(groups[:, : best.shape[1]]), False
        )
        chosen = groups.masked_fill(closed, -1.0).flatten(1).topk(moe.gate.top_k).indices
        return chosen, scores.gather(1, chosen), None

    moe.gate.forward = forward


def hooked(part: str, hook: Callable[..., Tensor]) -> Callable[[Model], None]:
    """Let a part of each mixture of experts return something else."""
    return lambda model: experts(model, lambda moe: getattr(moe, part).register_forward_hook(hook))


def sorted_rows(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """What comes back from four ranks is sorted by rank, and is not put back in order."""
    return out[(args[1][:, 0] // 4).argsort(stable=True)]


def last_rank(part: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """What comes back from the last of a token's ranks overwrites the rest."""
    tokens, topk_idx, topk_weight = args
    rank = topk_idx // 4
    made: Tensor = type(part).forward(part, tokens, topk_idx, topk_weight * (rank == rank.amax(1, keepdim=True)))
    return made


def identity_at(*path: str) -> Callable[[Model], None]:
    """Leave a module of the model, or of each layer's attention, out."""

    def plant(model: Model) -> None:
        parents = [model.model] if path[0] == "model" else [layer.self_attn for layer in layers(model)]
        for parent in parents:
            setattr(parent, path[1], nn.Identity())

    return plant


def setting(**fields: Any) -> Callable[[Model], None]:
    """Set these attributes of each gate."""
    return lambda model: experts(model, lambda moe: vars(moe.gate).update(fields))


def positions(late: int | None, shift: int) -> Callable[[Model], None]:
    """Positions of the bytes after the prompt: counted from ``late`` if that is not None, and shifted."""

    def made(seq: int) -> Tensor:
        n = torch.arange(seq)
        after = n - PROMPT + late if late is not None else n
        return torch.where(n < PROMPT, n, after + shift)[None]

    return lambda model: given(model, position_ids=made)


def rows_for_positions(model: Model) -> None:
    """Keep 15 rows after each byte, and take their number for the next position: it stays 15."""
    given(
        model,
        attention_mask=lambda S: window_mask(S, S, sinks=0, last=16),
        position_ids=lambda S: torch.arange(S)[None].clamp(max=15),
    )


def half_split(_: Model) -> AbstractContextManager[Any]:
    """Rotate pairs of halves, not of neighbours."""
    return patch.object(rope, "rotate_interleaved", rope.rotate_half_split)


BUGS = [
    Bug("$W^{UK}$ and $W^{UV}$ exchanged", "decoding", lambda m: attentions(m, exchange)),
    Bug("no causal mask", "overview", lambda m: given(m, attention_mask=lambda S: torch.ones(1, 1, S, S).bool())),
    Bug("pairs half-split, not interleaved", "rope", half_split),
    Bug("while decoding, positions restart at 0", "decoding", positions(late=0, shift=0), decoding=True),
    Bug("`kv_b_proj` split in the middle, not head by head", "decoding", lambda m: attentions(m, split_in_the_middle)),
    Bug("routed weights scaled by 16, as in V2", "experts", setting(routed_scaling_factor=16.0)),
    Bug("all positions 0", "rope", lambda m: given(m, position_ids=lambda S: torch.zeros(1, S).long())),
    Bug("rope part of the score lost", "mla", lambda m: attentions(m, no_rope_key)),
    Bug("residual saved after the norm", "prenorm", residual_after_the_norm),
    Bug("in a window of 16, positions counted by its rows", "sparse", rows_for_positions),
    Bug("rows come back from four ranks in sorted order", "parallel", hooked("experts", sorted_rows)),
    Bug("routed experts silent", "experts", setting(routed_scaling_factor=0.0)),
    Bug(
        "shared output added by each of four ranks",
        "parallel",
        hooked("shared_experts", lambda part, args, out: 4 * out),
    ),
    Bug("what comes back from one rank overwrites the rest", "parallel", hooked("experts", last_rank)),
    Bug("final norm forgotten", "prenorm", identity_at("model", "norm")),
    Bug("shared expert left out", "experts", lambda m: experts(m, no_shared_expert)),
    Bug("no norm on the latent", "mla", identity_at("attention", "kv_a_layernorm")),
    Bug("routed weights normalised to sum to 1", "experts", setting(norm_topk_prob=True)),
    Bug("all norm weights 1", "rmsnorm", unit_weights),
    Bug("while decoding, positions one too far", "decoding", positions(late=None, shift=1), decoding=True),
    Bug("scores divided by $\\sqrt{C + R}$", "decoding", lambda m: attentions(m, absorbed_width)),
    Bug("LayerNorm for the layer's two norms", "rmsnorm", layer_norms),
    Bug("gate in bfloat16", "experts", lambda m: experts(m, rounded_gate)),
    Bug("none", "overview", lambda m: None),
]


def decoded_bits(model: Model) -> float:
    """Bits per byte after the prompt. A position changes a token's rotation alone, so one pass equals decoding."""
    losses = []
    for tokens in router.sample().values():
        logits, _ = model(tokens)
        losses.append(F.cross_entropy(logits[:, PROMPT - 1 : -1].flatten(0, 1), tokens[:, PROMPT:].flatten()))
    return float(torch.stack(losses).mean() / torch.tensor(2.0).log())


def measure(bug: Bug) -> tuple[float, float | None]:
    """Bits per byte with the bug, over the stored sequences or what is decoded of them, and P(``5``) after ``47+8=``.

    In float64. While decoding the prompt is right, so there is no P(``5``).
    """
    model = trained().double()
    with ExitStack() as undo:
        planted = bug.plant(model)
        if planted is not None:
            undo.enter_context(planted)
        if bug.decoding:
            return decoded_bits(model), None
        return bits(model), probabilities(model)["5"]
