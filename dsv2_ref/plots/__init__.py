"""Every figure of the book, as functions that take data and return matplotlib Axes; a module for each chapter.

`show` prints the package's own code on a page. Nothing else in the package needs matplotlib, or IPython.
"""

from dsv2_ref.plots.balance import co_activation, load_maps, load_over_steps
from dsv2_ref.plots.card import claimed_over_computed
from dsv2_ref.plots.counting import shares
from dsv2_ref.plots.decoding import crossover, memory_growth
from dsv2_ref.plots.experts import expert_loads, routing_map, sorted_choices
from dsv2_ref.plots.kernels import bytes_moved, decode_plan
from dsv2_ref.plots.mla import cache_growth, numbers_remembered, truncation_errors
from dsv2_ref.plots.overview import layer_flow, layer_kinds, parameter_shares
from dsv2_ref.plots.prenorm import by_layer, ends_by_rate, training_curves
from dsv2_ref.plots.rmsnorm import growth_through_layers, running_sums
from dsv2_ref.plots.rooflines import intensity_over_batch, roofline
from dsv2_ref.plots.rope import angle_errors, clocks, scores_by_distance, stretch_by_pair, turns_by_pair
from dsv2_ref.plots.source import show
from dsv2_ref.plots.style import add_curves, new_axes

__all__ = [
    "add_curves", "angle_errors", "by_layer", "bytes_moved", "cache_growth", "claimed_over_computed", "clocks",
    "co_activation", "crossover", "decode_plan", "ends_by_rate", "expert_loads", "growth_through_layers",
    "intensity_over_batch", "layer_flow", "layer_kinds", "load_maps", "load_over_steps", "memory_growth", "new_axes",
    "numbers_remembered", "parameter_shares", "roofline", "routing_map", "running_sums", "scores_by_distance", "shares",
    "show", "sorted_choices", "stretch_by_pair", "training_curves", "truncation_errors", "turns_by_pair",
]  # fmt: skip
