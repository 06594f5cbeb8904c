"""Assignment 7: balance. The page balance.md says what is wanted.

python -m dsv2_ref grade balance balance.py
"""


def expert_balance_loss(scores, topk_idx, alpha, seq_aux=True):
    """alpha times the sum of f P over the experts, a tensor without axes.

    scores: (batch, seq, experts), softmax scores. topk_idx: (batch, seq, k), the choices.
    seq_aux: take it over each sequence and average; else over all tokens as one.
    """
    raise NotImplementedError("expert_balance_loss: start with how often each expert was chosen")


def updated_bias(bias, load, speed):
    """V3's biases (experts) after a step: up by speed below an even share, down above it."""
    raise NotImplementedError("updated_bias: compare each load with the mean load")
