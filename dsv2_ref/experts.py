"""The routed experts: their storage, and two ways to send every token through the experts it chose."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.grouped import grouped_product
from dsv2_ref.projection import autocast_is_on


def loop_dispatch(
    hidden_states: Float[Tensor, "tokens hidden"],
    topk_idx: Int[Tensor, "tokens top_k"],
    topk_weight: Float[Tensor, "tokens top_k"],
    gate_up_proj: Float[Tensor, "experts two_expert_hidden hidden"],
    down_proj: Float[Tensor, "experts hidden expert_hidden"],
) -> Float[Tensor, "tokens hidden"]:
    """The definition: expert by expert, add its weighted output to the tokens that chose it; the sum in float32."""
    out = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
    for expert in range(len(gate_up_proj)):
        token, choice = torch.where(topk_idx == expert)
        gate, up = F.linear(hidden_states[token], gate_up_proj[expert]).chunk(2, dim=-1)
        expert_out = F.linear(F.silu(gate) * up, down_proj[expert])
        out = out.index_add(0, token, expert_out * topk_weight[token, choice, None])
    return out.to(hidden_states.dtype)


GroupedExperts = Callable[[Tensor, Tensor], Tensor]
"""From rows sorted by expert, and where each expert's rows end, to the outputs of the experts."""


def dispatch_by_group(
    hidden_states: Float[Tensor, "tokens hidden"],
    topk_idx: Int[Tensor, "tokens top_k"],
    topk_weight: Float[Tensor, "tokens top_k"],
    experts: int,
    run: GroupedExperts,
) -> Float[Tensor, "tokens hidden"]:
    """`loop_dispatch` without the loop: sort the choices by expert, ``run`` all groups at once, sort back.

    The groups' sizes stay on the device, and each token's outputs are summed in the order of its choices, so that the
    result does not vary from run to run.
    """
    tokens, top_k = topk_idx.shape
    choices = topk_idx.flatten()
    order = choices.argsort(stable=True)
    counts = choices.new_zeros(experts).scatter_add(0, choices, torch.ones_like(choices))
    group_ends = counts.cumsum(0).to(torch.int32)
    sorted_out = run(hidden_states[order // top_k], group_ends)
    places = order.argsort().view(tokens, top_k)
    out = sorted_out[places[:, 0]] * topk_weight[:, :1]
    for choice in range(1, top_k):  # one at a time: all choices of all tokens in float32 would leave the caches
        out = out + sorted_out[places[:, choice]] * topk_weight[:, choice, None]
    return out.to(hidden_states.dtype)


def grouped_dispatch(
    hidden_states: Float[Tensor, "tokens hidden"],
    topk_idx: Int[Tensor, "tokens top_k"],
    topk_weight: Float[Tensor, "tokens top_k"],
    gate_up_proj: Float[Tensor, "experts two_expert_hidden hidden"],
    down_proj: Float[Tensor, "experts hidden expert_hidden"],
) -> Float[Tensor, "tokens hidden"]:
    """`dispatch_by_group` over stacked weights, of which only those of chosen experts are read (`grouped_product`)."""

    def run(rows: Tensor, group_ends: Tensor) -> Tensor:
        gate, up = grouped_product(rows, gate_up_proj, group_ends).chunk(2, dim=-1)
        return grouped_product(F.silu(gate) * up, down_proj, group_ends)

    return dispatch_by_group(hidden_states, topk_idx, topk_weight, len(gate_up_proj), run)


class RoutedExperts(nn.Module):
    """The weights of all routed experts, stacked, so that one grouped product reads those it needs.

    Parameters are ``gate_up_proj`` (E, 2I, D), gates above ups, and ``down_proj`` (E, D, I); `state_dict` and
    `load_state_dict` speak the published names, ``{expert}.gate_proj.weight`` and so on.
    """

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        experts, hidden = config.n_routed_experts or 0, config.hidden_size
        self.expert_hidden = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * self.expert_hidden, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, self.expert_hidden))
        for weight in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(weight, std=config.initializer_range)

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        topk_idx: Int[Tensor, "tokens top_k"],
        topk_weight: Float[Tensor, "tokens top_k"],
    ) -> Float[Tensor, "tokens hidden"]:
        """Σ weight · expert(token) over each token's choices."""
        gate_up_proj: Tensor = self.gate_up_proj
        down_proj: Tensor = self.down_proj
        if autocast_is_on(hidden_states.device):
            dtype = torch.get_autocast_dtype(hidden_states.device.type)
            hidden_states, gate_up_proj, down_proj = (x.to(dtype) for x in (hidden_states, gate_up_proj, down_proj))
        return grouped_dispatch(hidden_states, topk_idx, topk_weight, gate_up_proj, down_proj)

    def _published(self) -> Iterator[tuple[str, Tensor, int]]:
        """Every published name, with its place: a view of the stacked weight, and the expert's index."""
        for expert in range(len(self.gate_up_proj)):
            gate, up = self.gate_up_proj[expert].chunk(2)
            yield f"{expert}.gate_proj.weight", gate, expert
            yield f"{expert}.up_proj.weight", up, expert
            yield f"{expert}.down_proj.weight", self.down_proj[expert], expert

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, weight, _ in self._published():
            destination[prefix + name] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        places = {prefix + name: weight for name, weight, _ in self._published()}
        given = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        missing_keys.extend(key for key in places if key not in given)
        if strict:
            unexpected_keys.extend(key for key in given if key not in places)
        wrong = [key for key in places if key in given and given[key].shape != places[key].shape]
        for key in wrong:
            want, got = tuple(places[key].shape), tuple(given[key].shape)
            error_msgs.append(f"size mismatch for {key}: the checkpoint has {got}, the layer {want}.")
        if local_metadata.get("assign_to_params_buffers", False) and not wrong and places.keys() <= given.keys():
            self._assign({key.removeprefix(prefix): value for key, value in given.items()})
            return
        with torch.no_grad():
            for key in places.keys() & given.keys() - set(wrong):
                places[key].copy_(given[key])

    def _assign(self, given: Mapping[str, Tensor]) -> None:
        """Take the checkpoint's dtype and device, as ``load_state_dict(assign=True)`` does."""
        experts = range(len(self.gate_up_proj))
        gate_up = [torch.cat((given[f"{i}.gate_proj.weight"], given[f"{i}.up_proj.weight"])) for i in experts]
        down = [given[f"{i}.down_proj.weight"] for i in experts]
        self.gate_up_proj = nn.Parameter(torch.stack(gate_up), requires_grad=self.gate_up_proj.requires_grad)
        self.down_proj = nn.Parameter(torch.stack(down), requires_grad=self.down_proj.requires_grad)
