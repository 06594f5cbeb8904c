"""Every figure of the book, as functions that take data and return matplotlib Axes; a module for each chapter.

`show` prints the package's own code on a page. Nothing else in the package needs matplotlib, or IPython.
"""

from dsv2_ref.plots.balance import co_activation, load_maps, load_over_steps
from dsv2_ref.plots.card import claimed_over_computed
from dsv2_ref.plots.counting import shares
from dsv2_ref.plots.decoding import crossover, moved_bracket, three_ways
from dsv2_ref.plots.experts import expert_loads, narrow_networks, routing_map, sorted_choices
from dsv2_ref.plots.kernels import bytes_moved, decode_plan
from dsv2_ref.plots.mla import cached_elements, low_rank, truncation_errors, up_maps
from dsv2_ref.plots.overview import attention_by_hand, layer_kinds, stored_and_used, two_layers, what_heads_read
from dsv2_ref.plots.prenorm import by_layer, ends_by_rate, training_curves
from dsv2_ref.plots.rmsnorm import growth_through_layers, running_sums
from dsv2_ref.plots.rooflines import intensity_over_batch, roofline
from dsv2_ref.plots.rope import angle_errors, clocks, scores_by_distance, stretch_by_pair, turns_by_pair
from dsv2_ref.plots.source import show
from dsv2_ref.plots.style import add_curves, new_axes

__all__ = [
    "add_curves", "angle_errors", "attention_by_hand", "by_layer", "bytes_moved", "cached_elements",
    "claimed_over_computed", "clocks", "co_activation", "crossover", "decode_plan", "ends_by_rate", "expert_loads",
    "growth_through_layers", "intensity_over_batch", "layer_kinds", "load_maps", "load_over_steps", "low_rank",
    "moved_bracket", "narrow_networks", "new_axes", "roofline", "routing_map", "running_sums", "scores_by_distance",
    "shares", "show", "sorted_choices", "stored_and_used", "stretch_by_pair", "three_ways", "training_curves",
    "truncation_errors", "turns_by_pair", "two_layers", "up_maps", "what_heads_read",
]  # fmt: skip
