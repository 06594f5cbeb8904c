"""Every part that can be graded, a module each: its cases, and the mistakes that are known."""

from dsv2_ref.grading.part import Part
from dsv2_ref.grading.parts.balance import BALANCE
from dsv2_ref.grading.parts.decoding import DECODING
from dsv2_ref.grading.parts.experts import EXPERTS
from dsv2_ref.grading.parts.gate import GATE
from dsv2_ref.grading.parts.layer import LAYER
from dsv2_ref.grading.parts.mla import MLA
from dsv2_ref.grading.parts.quantize import QUANTIZE
from dsv2_ref.grading.parts.rmsnorm import RMSNORM
from dsv2_ref.grading.parts.rope import ROPE
from dsv2_ref.grading.parts.window import WINDOW

_ALL = (RMSNORM, ROPE, MLA, DECODING, GATE, EXPERTS, BALANCE, LAYER, QUANTIZE, WINDOW)
PARTS: dict[str, Part] = {part.name: part for part in _ALL}
"""Every part that can be graded, by its name."""
