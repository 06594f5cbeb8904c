"""The small trained model that the chapters follow, and its line of text."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2_ref import DeepseekV2ForCausalLM
from experiments import router

LINE = "12+30=42\n47+8=55\n"
"""Two sums. After the last ``=``, at position 13, the model should write 5."""

EQUALS = LINE.rindex("=")


def trained() -> DeepseekV2ForCausalLM:
    """The run ``expert`` of `experiments.router`, in float32: 442,048 weights that have read code, prose and sums."""
    return router.load("expert").requires_grad_(False)


def ids(text: str = LINE) -> Tensor:
    """The tokens of a text, one per byte: (1, bytes)."""
    return torch.tensor([list(text.encode())])


def probabilities(model: DeepseekV2ForCausalLM, text: str = LINE[: EQUALS + 1]) -> dict[str, float]:
    """What the model expects next, by character, most probable first."""
    logits, _ = model(ids(text).to(next(model.parameters()).device))
    scores = logits[0, -1].softmax(-1).cpu()
    return {chr(token): float(scores[token]) for token in scores.argsort(descending=True).tolist()}


def bits(model: DeepseekV2ForCausalLM) -> float:
    """Bits per byte over the 48 stored sequences of 128 bytes, mean of the three kinds; 2.770 if nothing is wrong."""
    device, losses = next(model.parameters()).device, []
    for tokens in router.sample().values():
        logits, _ = model(tokens.to(device))
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens.to(device)[:, 1:].flatten()))
    return float(torch.stack(losses).mean() / torch.tensor(2.0).log())
