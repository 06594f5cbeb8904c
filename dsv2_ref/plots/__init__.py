"""Every figure of the book, as functions that take data and return matplotlib Axes; a module for each chapter.

`show` prints the package's own code on a page. Nothing else in the package needs matplotlib, or IPython.
"""

from dsv2_ref.plots.balance import expert_loads, load_maps, load_over_steps, three_counts
from dsv2_ref.plots.bits import bits_lost, number_lines, records_to_scale
from dsv2_ref.plots.card import claimed_over_computed
from dsv2_ref.plots.counting import shares, weights_to_scale
from dsv2_ref.plots.decoding import crossover, moved_bracket, queries_by_distance, three_ways
from dsv2_ref.plots.experts import narrow_networks, routing_map, sorted_choices
from dsv2_ref.plots.kernels import bytes_moved, decode_plan, memory_passes, waves
from dsv2_ref.plots.lineage import cached_per_token, layer_changes
from dsv2_ref.plots.mla import cached_elements, latent_flow, low_rank, truncation_errors, up_maps
from dsv2_ref.plots.overview import attention_by_hand, layer_kinds, stored_and_used, two_layers, what_heads_read
from dsv2_ref.plots.parallel import device_weights, exchange_grids, hidden_behind, journey, time_lines
from dsv2_ref.plots.prenorm import by_layer, ends_by_rate, norm_places, stream_spiral, training_curves
from dsv2_ref.plots.rmsnorm import circle_of_tokens, growth_through_layers, running_sums
from dsv2_ref.plots.rooflines import roofline, step_times
from dsv2_ref.plots.rope import bits_by_length, clocks, quarter_turns, scores_by_distance, stretch_by_pair
from dsv2_ref.plots.source import show
from dsv2_ref.plots.sparse import hidden_by, kept_and_read, lost_by_budget
from dsv2_ref.plots.style import add_curves, new_axes
from dsv2_ref.plots.training import bytes_of_training, memory_over_step
from dsv2_ref.plots.weights import bytes_to_scale

__all__ = [
    "add_curves", "attention_by_hand", "bits_by_length", "bits_lost", "by_layer", "bytes_moved", "bytes_of_training",
    "bytes_to_scale", "cached_elements", "cached_per_token", "circle_of_tokens", "claimed_over_computed", "clocks",
    "crossover", "decode_plan", "device_weights", "ends_by_rate", "exchange_grids", "expert_loads",
    "growth_through_layers", "hidden_behind", "hidden_by", "journey", "kept_and_read", "latent_flow", "layer_changes",
    "layer_kinds", "load_maps", "load_over_steps", "lost_by_budget", "low_rank", "memory_over_step", "memory_passes",
    "moved_bracket", "narrow_networks", "new_axes", "norm_places", "number_lines", "quarter_turns",
    "queries_by_distance", "records_to_scale", "roofline", "routing_map", "running_sums", "scores_by_distance",
    "shares", "show", "sorted_choices", "step_times", "stored_and_used", "stream_spiral", "stretch_by_pair",
    "three_counts", "three_ways", "time_lines", "training_curves", "truncation_errors", "two_layers", "up_maps",
    "waves", "weights_to_scale", "what_heads_read",
]  # fmt: skip
