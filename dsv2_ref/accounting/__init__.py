"""What a layer and a model cost: parameters, FLOPs and bytes, counted from the configuration in exact integers.

Letters are those of the book (see `Sizes`): B sequences of S new tokens each, which attend to K tokens (the new ones
included); T = B · S. Nothing here needs torch, except `activation_peak`, which runs the layer on fake tensors.
"""

from dsv2_ref.accounting.cached import CACHE_KINDS, cache_bytes, cache_numbers
from dsv2_ref.accounting.call import CACHES, DTYPE_BYTES, FORMS, WEIGHTS, Call
from dsv2_ref.accounting.communication import (
    bytes_per_token,
    exchange_bytes,
    most_ranks_reached,
    rank_weight_bytes,
    ranks_reached,
)
from dsv2_ref.accounting.operations import elementwise, products
from dsv2_ref.accounting.stored import model_weight_bytes, weight_bytes
from dsv2_ref.accounting.summary import activation_peak, report
from dsv2_ref.accounting.traffic import (
    activations_moved,
    by_part,
    experts_read,
    intensities,
    read_by_part,
    weights_read,
)
from dsv2_ref.accounting.training import (
    OPTIMIZERS,
    backward,
    mfu,
    model_flops,
    recomputed,
    six_nd,
    state_bytes,
    step_flops,
)
from dsv2_ref.accounting.weights import Matrix, matrices, model_matrices, model_parameters, parameters
from dsv2_ref.checks import CHECKPOINTING

__all__ = [
    "CACHES", "CACHE_KINDS", "CHECKPOINTING", "DTYPE_BYTES", "FORMS", "OPTIMIZERS", "WEIGHTS", "Call", "Matrix",
    "activation_peak", "activations_moved", "backward", "by_part", "bytes_per_token", "cache_bytes", "cache_numbers",
    "elementwise", "exchange_bytes", "experts_read", "intensities", "matrices", "mfu", "model_flops",
    "model_matrices", "model_parameters", "model_weight_bytes", "most_ranks_reached", "parameters", "products",
    "rank_weight_bytes", "ranks_reached", "read_by_part", "recomputed", "report", "six_nd", "state_bytes",
    "step_flops", "weight_bytes", "weights_read",
]  # fmt: skip
