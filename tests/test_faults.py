"""Mistakes that readers and ports make, planted one by one: the checks of the other files must each find theirs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv2_ref import DeepseekV2Attention, DeepseekV2RMSNorm, MoEGate, mha, moe, quantized, records, rope
from dsv2_ref.attention import Visibility
from dsv2_ref.codes import from_codes, to_codes
from dsv2_ref.fast import quantized as fast_quantized
from dsv2_ref.records import QuantizedLatentCache, Record
from dsv2_ref.rope import rotate_half_split, rotate_interleaved
from tests import test_against_transformers as transformers_tests
from tests import test_bfloat16 as bfloat16_tests
from tests import test_oracle as oracle_tests
from tests import test_quantize as quantize_tests
from tests import test_records as records_tests
from tests.peers import CALLS, COMMON

Plant = Callable[[pytest.MonkeyPatch], None]


def built_wrong(kind: type[nn.Module], change: Callable[[Any], None]) -> Plant:
    """Every module of the kind is changed once it has been built."""
    build = kind.__init__

    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        change(self)

    return lambda monkeypatch: monkeypatch.setattr(kind, "__init__", init)


def replaced(owner: object, name: str, value: Any) -> Plant:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, value)


def written_out(value: Any) -> Plant:
    """Codes become numbers otherwise, in the definition and in the way of CPUs."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (quantized, fast_quantized):
            monkeypatch.setattr(module, "from_codes", value)

    return plant


def set_to(name: str, value: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda module: setattr(module, name, value(module))


def without_latent_norm(module: Any) -> None:
    module.kv_a_layernorm.forward = lambda compressed_kv: compressed_kv


def latent_norm_with_the_layers_epsilon(module: Any) -> None:
    module.kv_a_layernorm.variance_epsilon = module.config.rms_norm_eps


def positions_changed(change: Callable[[Tensor, int], Tensor]) -> Plant:
    """``change`` gets the positions of a call's tokens and the number of keys they see."""
    tables = rope.rotary_tables

    def changed(position_ids: Tensor, *args: Any, kv_length: int, **kwargs: Any) -> Any:
        return tables(change(position_ids, kv_length), *args, kv_length=kv_length, **kwargs)

    return replaced(rope, "rotary_tables", changed)


def last_key_seen(place: Callable[[Visibility, Tensor], Tensor]) -> Plant:
    """``place`` gives the last key that each query of a call, counted from 0, may see; all see the first one."""

    def block(self: Visibility, start: int, stop: int) -> tuple[Tensor, None]:
        last = place(self, torch.arange(start, stop)).clamp(min=0)
        return (torch.arange(self.keys_until(stop)) <= last[:, None])[None, None], None

    return replaced(Visibility, "block", block)


def blind_queries_see_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Visibility.block
    monkeypatch.setattr(Visibility, "block", lambda self, start, stop: (block(self, start, stop)[0], None))


def scores_in_bfloat16(self: MoEGate, hidden_states: Tensor) -> tuple[Tensor, Tensor, None]:
    scores = F.linear(hidden_states.flatten(0, 1), self.weight).float().softmax(dim=-1)
    topk_weight, topk_idx = scores.topk(self.top_k)
    return topk_idx, topk_weight, None


def rounded_once(self: DeepseekV2RMSNorm, hidden_states: Tensor) -> Tensor:
    return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def loss_added_to_the_output(hidden_states: Tensor, loss: Tensor) -> Tensor:
    return hidden_states + (loss - loss.detach())


def scales_swapped(codes: Tensor, scales: Tensor) -> Tensor:
    """Of two neighbouring groups."""
    return from_codes(
        codes, torch.cat((scales[..., 1::2], scales[..., ::2]), dim=-1).unflatten(-1, (2, -1)).mT.flatten(-2)
    )


def a_group_off_by_one(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Scales are those of the elements one place to the right."""
    scales = to_codes(x.roll(-1, dims=-1), *args, **kwargs)[1]
    wide = scales.repeat_interleave(x.shape[-1] // scales.shape[-1], dim=-1)
    return (x / wide).round().clamp(-7, 7).char(), scales


def rope_key_with_the_latents_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Record.encode

    def rounding(self: Record, tokens: Tensor) -> Tensor:
        whole = from_codes(*to_codes(tokens, self.format, tokens.shape[-1])).to(tokens.dtype)
        return encode(self, torch.cat((tokens[..., : self.latent], whole[..., self.latent :]), dim=-1))

    monkeypatch.setattr(Record, "encode", rounding)


def scale_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of each test finds it, and all later tokens are rounded with it."""
    frozen: list[Tensor] = []

    def rounding(x: Tensor, kind: str, *args: Any) -> tuple[Tensor, Tensor]:
        codes, scales = to_codes(x, kind, *args)
        frozen.append(scales[:1, :1])
        scale = frozen[0].expand_as(scales)
        largest = 448.0 if kind == "fp8" else float(codes.abs().max())
        units = (x.float() / scale).clamp(-largest, largest)
        return units.to(codes.dtype) if kind == "fp8" else units.round().to(codes.dtype), scale

    monkeypatch.setattr(records, "to_codes", rounding)


def row_position_lost(self: QuantizedLatentCache, stored: Tensor, seen: int) -> Any:
    return type(self)(self.layer_idx, stored, seen=stored.shape[1], record=self.record)


def attend(name: str, calls: str = "prefill", form: str = "expanded") -> Callable[[], None]:
    config = replace(COMMON[name], mla_form=form, _attn_implementation="eager")
    return partial(transformers_tests.check_attention, config, CALLS[calls], torch.float64)


@dataclass(frozen=True)
class Fault:
    plant: Plant
    check: Callable[[], None]
    found: str = "roundings apart"


FAULTS: Mapping[str, Fault] = {
    "absorbed attention scaled by the width of the latents": Fault(
        built_wrong(
            DeepseekV2Attention, set_to("softmax_scale", lambda self: (self.kv_lora_rank + self.rotary_dim) ** -0.5)
        ),
        attend("plain", form="absorbed"),
    ),
    "no temperature with YaRN": Fault(
        built_wrong(DeepseekV2Attention, set_to("softmax_scale", lambda self: self.qk_head_dim**-0.5)),
        attend("yarn"),
    ),
    "latent attention rotates halves": Fault(
        replaced(rope, "rotate_interleaved", rotate_half_split),
        attend("plain"),
    ),
    "plain attention rotates neighbours": Fault(
        replaced(mha, "rotate_half_split", rotate_interleaved),
        partial(oracle_tests.check_layer, oracle_tests.ALL["mha"], 1, CALLS["prefill"]),
    ),
    "no norm of the latent": Fault(
        built_wrong(DeepseekV2Attention, without_latent_norm),
        attend("plain"),
    ),
    "norm of the latent with the layer's epsilon": Fault(
        built_wrong(DeepseekV2Attention, latent_norm_with_the_layers_epsilon),
        attend("everything"),
    ),
    "a query sees one key too many": Fault(
        last_key_seen(lambda call, query: call.kv_seq - call.seq + query + 1),
        attend("plain"),
    ),
    "a query does not see its own key": Fault(
        last_key_seen(lambda call, query: call.kv_seq - call.seq + query - 1),
        attend("plain"),
    ),
    "causal order aligned to the first key": Fault(
        last_key_seen(lambda call, query: query),
        attend("plain", "prefill_then_decode"),
    ),
    "a query that sees nothing attends evenly": Fault(
        blind_queries_see_everything,
        partial(oracle_tests.check_mask, COMMON["plain"], "bool_true_keeps"),
    ),
    "positions off by one after a cache": Fault(
        positions_changed(lambda position_ids, kv_length: position_ids + int(kv_length > position_ids.shape[1])),
        attend("plain", "prefill_then_decode"),
    ),
    "positions start at 0 in every call": Fault(
        positions_changed(lambda position_ids, _: position_ids - position_ids[:, :1]),
        attend("plain", "prefill_then_decode", form="absorbed"),
    ),
    "routed_scaling_factor dropped": Fault(
        built_wrong(MoEGate, set_to("routed_scaling_factor", lambda _: 1.0)),
        partial(transformers_tests.check_moe, COMMON["group_limited"], torch.float64),
    ),
    "norm_topk_prob ignored": Fault(
        built_wrong(MoEGate, set_to("norm_topk_prob", lambda _: False)),
        partial(oracle_tests.check_layer, oracle_tests.ALL["norm_topk_prob_scaled"], 1, CALLS["prefill"]),
    ),
    "groups of experts ignored": Fault(
        built_wrong(MoEGate, set_to("topk_group", lambda self: self.n_group)),
        partial(transformers_tests.check_gate, COMMON["group_limited"], torch.float64),
    ),
    "balance loss under the gradient of the output": Fault(
        replaced(moe, "inject_loss", loss_added_to_the_output),
        partial(oracle_tests.check_balance_loss, COMMON["plain"]),
        found="comparison failed",
    ),
    "gate in bfloat16": Fault(
        replaced(MoEGate, "forward", scores_in_bfloat16),
        bfloat16_tests.check_gate_is_not_rounded,
        found="tokens go elsewhere",
    ),
    "scales swapped between two groups": Fault(
        written_out(scales_swapped),
        partial(quantize_tests.check_half_a_step, "int4", torch.float32),
        found="more than half a step off",
    ),
    "a group off by one": Fault(
        replaced(quantized, "to_codes", a_group_off_by_one),
        partial(quantize_tests.check_half_a_step, "int4", torch.float32),
        found="more than half a step off",
    ),
    "rope key quantised with the latent's scale": Fault(
        rope_key_with_the_latents_scale,
        partial(records_tests.check_records, 256, torch.float32, "fp8"),
        found="the rope key has changed",
    ),
    "a scale frozen at the first call": Fault(
        scale_frozen,
        partial(records_tests.check_scales_are_never_frozen, "fp8"),
        found="another scale",
    ),
    "a row's position lost": Fault(
        replaced(QuantizedLatentCache, "_with", row_position_lost),
        partial(records_tests.check_chosen_rows, "int8"),
        found="position",
    ),
    "norm rounded once": Fault(
        replaced(DeepseekV2RMSNorm, "forward", rounded_once),
        bfloat16_tests.check_norm_rounds_as_published,
        found="numbers differ",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    fault.check()
    fault.plant(monkeypatch)
    with pytest.raises(AssertionError, match=fault.found):
        fault.check()
