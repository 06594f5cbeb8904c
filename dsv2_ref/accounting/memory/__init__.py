"""The memory of activations: a layer's own operations in their order, told in sizes.

Each function here mirrors one of the reference (the plain PyTorch that defines it, not a fused kernel of ours) and holds what
that holds, as long: the float32 copies inside a norm, the copies of the scores in eager attention, the float32 sum of experts.
*Fused* attention (``sdpa``, ``flash_attention_2``) holds queries, keys, values, its result and a float32 number for each
query and head, but no scores. Training goes back through the operations as autograd does.

Not counted: weights and their gradients (two of them where an embedding is the head as well), the optimizer, the input of a layer, the cache, the loss and its gradient, and what an
operation uses inside its own kernel. A cache is taken to have room for more tokens, so what several sequences remember is
copied where it is expanded. A sum of gradients is a new tensor, as it is where operations are watched; autograd
itself may add in place, and then needs less.

Live storages agree, nearly always to the byte and else to 0.5 %. Fused attention is counted as on a GPU: in half precision on a
CPU, without gradients, it works in blocks of its own (`dsv2_ref.attend_cpu`). The absorbed form is counted without gradients.

All layers of a kind cost the same, so a model of any depth is gone through in its last layer of each kind; what those before
keep for the way back is measured once and held. Needs no torch.
"""

from functools import partial

from dsv2_ref.accounting.call import layers_alike, moe_layers
from dsv2_ref.accounting.memory.attention import attend
from dsv2_ref.accounting.memory.experts import moe
from dsv2_ref.accounting.memory.ledger import Ledger
from dsv2_ref.accounting.memory.parts import Pass, mlp, norm
from dsv2_ref.accounting.memory.tape import Sized

__all__ = ["Pass", "peak"]


def _layer(ledger: Ledger, p: Pass, layer_idx: int, x: Sized) -> Sized:
    """The residual stream behind a layer."""
    config, hidden = p.config, p.config.hidden_size
    out = attend(ledger, p, norm(ledger, x, hidden, p.wide))
    total = ledger.add(x, out)
    normed = norm(ledger, total, hidden, p.wide)
    del out
    if config.is_moe_layer(layer_idx):
        return ledger.add(total, moe(ledger, p, normed))
    return ledger.add(total, mlp(ledger, normed, hidden, config.intermediate_size))


def _run(ledger: Ledger, p: Pass, layer_idx: int, x: Sized, checkpointing: bool) -> Sized:
    run = partial(_layer, ledger, p, layer_idx)
    return ledger.checkpointed(run, x) if checkpointing else run(x)


def _kept(p: Pass, layer_idx: int, checkpointing: bool) -> int:
    """Bytes that one more layer keeps for the way back, its result in place of its input."""
    ledger = Ledger(recording=True)
    x = ledger.leaf(p.tokens * p.config.hidden_size, p.width, counted=True)
    before = ledger.alive
    x = _run(ledger, p, layer_idx, x, checkpointing)
    return ledger.alive - before


def _model(ledger: Ledger, p: Pass, checkpointing: bool = False) -> Sized:
    """The logits of a model: embedding, layers, last norm and head."""
    config, start = p.config, 0
    x = ledger.leaf(p.tokens * config.hidden_size, p.width, counted=True)
    last = [layer_idx for layer_idx, _ in layers_alike(config)]
    kept = {config.is_moe_layer(i): _kept(p, i, checkpointing) for i in last if ledger.recording}
    for layer_idx in last:
        mixed = moe_layers(config, layer_idx) - moe_layers(config, start)
        passed = mixed * kept.get(True, 0) + (layer_idx - start - mixed) * kept.get(False, 0)
        x = _run(ledger, p, layer_idx, ledger.held(x, passed), checkpointing)
        start = layer_idx + 1
    normed = norm(ledger, x, config.hidden_size, p.wide)
    del x
    return ledger.cast(ledger.linear(normed, config.hidden_size, config.vocab_size), p.wide)


def peak(p: Pass, layer_idx: int | None = None, training: bool = False, checkpointing: bool = False) -> int:
    """The most bytes alive in a layer, or a model; in training on the way back as well.

    ``checkpointing`` keeps the inputs of layers and computes the rest once more on the way back.
    """
    ledger = Ledger(training)
    if layer_idx is None:
        out = _model(ledger, p, checkpointing)
    else:
        out = _run(ledger, p, layer_idx, ledger.leaf(p.tokens * p.config.hidden_size, p.width), checkpointing)
    ledger.backward(out)
    return ledger.peak
