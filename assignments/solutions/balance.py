"""Balance: solution."""

import torch


def expert_balance_loss(scores, topk_idx, alpha, seq_aux=True):
    if not seq_aux:
        scores, topk_idx = scores.flatten(0, 1)[None], topk_idx.flatten(0, 1)[None]
    batch, seq, experts = scores.shape
    k = topk_idx.shape[-1]
    counts = torch.zeros(batch, experts, dtype=scores.dtype)
    for sequence in range(batch):
        counts[sequence] = topk_idx[sequence].flatten().bincount(minlength=experts)
    f = counts * experts / (k * seq)
    P = scores.mean(dim=1)
    return alpha * (f * P).sum(dim=-1).mean()


def updated_bias(bias, load, speed):
    below = load.double().mean() - load
    return bias + speed * below.sign().to(bias.dtype)
