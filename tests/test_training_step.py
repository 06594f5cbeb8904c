"""What the book draws of a training step agrees with what is counted: FLOPs to the last one, and bytes to the last byte."""

from dataclasses import replace

import pytest

from dsv2_ref import DeepseekV2Config
from dsv2_ref import accounting as acc
from dsv2_ref.accounting import training
from experiments.step import thinned, timeline
from tests.examples import thorough

pytestmark = pytest.mark.slow

TINY = replace(DeepseekV2Config.tiny(), num_hidden_layers=7)  # more layers of a kind than run
CALL = acc.Call(batch=2, seq=48, kv=48, form="expanded")


@pytest.mark.parametrize("mode", ["selective", *thorough(None, "full")])
@pytest.mark.parametrize(
    "config",
    [TINY, replace(TINY, first_k_dense_replace=0), replace(TINY, first_k_dense_replace=5), replace(TINY, n_routed_experts=None)],
    ids=["one dense layer", "experts everywhere", "five dense layers", "no experts"],
)  # fmt: skip
def test_a_timeline_is_what_is_counted(config: DeepseekV2Config, mode: str | None) -> None:
    done, alive = timeline(config, CALL, mode)
    counted = training.step_flops(config, CALL, None, mode)
    assert done[-1] == sum(sum(part.values()) for part in counted.values())
    assert max(alive) == acc.activation_peak(config, CALL, None, True, mode or False)
    assert alive[-1] == CALL.tokens * config.vocab_size * 4  # the logits, in float32


def test_thinning_keeps_the_peak_and_the_end() -> None:
    curve = [1, 2, 3, 4, 1000], [5, 9, 1, 1, 2]
    assert thinned(curve, parts=10) == {0: 9e-9, 1e-9: 2e-9}
