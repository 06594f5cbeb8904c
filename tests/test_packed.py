"""Packed weights: the same layer, the same names and values, and no way to use them wrongly in silence."""

import copy

import pytest
import torch

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, pack_weights

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bfloat16 instructions for oneDNN"
)


def plain_and_packed(layer_idx: int = 1) -> tuple[DeepseekV2DecoderLayer, DeepseekV2DecoderLayer]:
    torch.manual_seed(0)
    plain = DeepseekV2DecoderLayer(DeepseekV2Config.tiny(), layer_idx).bfloat16().eval()
    return plain, pack_weights(copy.deepcopy(plain))


@pytest.mark.parametrize("layer_idx", [0, 1])
@pytest.mark.parametrize("seq", [1, 7, 40])
@torch.no_grad()
def test_a_packed_layer_computes_the_same(layer_idx: int, seq: int) -> None:
    plain, packed = plain_and_packed(layer_idx)
    tokens = torch.randn(2, seq, 64).bfloat16()
    expected, expected_cache = plain(tokens, use_cache=True)
    output, cache = packed(tokens, use_cache=True)
    # Sums in another order may round to the neighbouring bfloat16, here at a stream of size 1 to 4: 2**-6 is one step.
    torch.testing.assert_close(output, expected, rtol=0, atol=2**-6)
    torch.testing.assert_close(cache.tokens, expected_cache.tokens, rtol=0, atol=2**-6)
    output, _ = packed(tokens[:, :1], past_key_value=cache, use_cache=True)
    expected, _ = plain(tokens[:, :1], past_key_value=cache, use_cache=True)
    torch.testing.assert_close(output, expected, rtol=0, atol=2**-6)


def test_the_state_dict_keeps_its_names_and_values() -> None:
    plain, packed = plain_and_packed()
    expected, got = plain.state_dict(), packed.state_dict()
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name
    plain.load_state_dict(got, strict=True)


def test_loading_into_packed_weights_is_refused() -> None:
    plain, packed = plain_and_packed()
    with pytest.raises(RuntimeError, match=r"self_attn\.q_a_proj holds packed weights; wanted a layer to load into"):
        packed.load_state_dict(plain.state_dict())


def test_gradients_are_refused_rather_than_lost() -> None:
    _, packed = plain_and_packed()
    with pytest.raises(ValueError, match="packed weights give none"):
        packed(torch.randn(1, 3, 64).bfloat16())


def test_weights_of_another_dtype_are_refused_before_anything_is_packed() -> None:
    layer = DeepseekV2DecoderLayer(DeepseekV2Config.tiny(), 1)
    layer.mlp.bfloat16()
    with pytest.raises(ValueError, match=r"the weight of q_a_proj is .*float32 on cpu; wanted bfloat16 on cpu"):
        pack_weights(layer)
    assert isinstance(layer.mlp.shared_experts.gate_proj, torch.nn.Linear)
