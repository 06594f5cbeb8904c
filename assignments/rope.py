"""Assignment 2: rotary positions. The page rope.md says what is wanted.

python -m dsv2_ref grade rope rope.py
"""

import torch


def rotary_tables(position_ids, dim, theta, scaling=None, dtype=torch.float32):
    """Cosine and sine of every position's angles: two tensors (batch, seq, dim / 2).

    position_ids: (batch, seq). scaling: None, or a dsv2_ref.RopeScaling of type yarn.
    """
    raise NotImplementedError("rotary_tables: start with the frequencies, theta**(-2i / dim)")


def apply_rotary(q_pe, k_pe, cos, sin):
    """Rotate queries (batch, heads, seq, dim) and the key (batch, seq, dim) of all heads.

    cos and sin: (batch, seq, dim / 2). Pairs are neighbours: (0, 1), (2, 3), ...
    """
    raise NotImplementedError("apply_rotary: rotate the pair (2i, 2i + 1) by angle i")


def softmax_temperature(scaling):
    """What YaRN multiplies the scores by, a float; 1.0 where scaling is None."""
    raise NotImplementedError("softmax_temperature: a function of factor and mscale_all_dim")
