"""Faster ways to compute what the core defines, each registered against its definition (`dsv2_ref.ops`): torch's own
products and fused attention, blocks and packed weights for CPUs, cuDNN, flash-attn, and Triton kernels. The core never
imports this package by name of a way; the first call of a definition loads it."""

from dsv2_ref.fast import compiled, cpu, cudnn, decode, flash, native, products, quantized, rows, sdpa, triton

__all__ = ["compiled", "cpu", "cudnn", "decode", "flash", "native", "products", "quantized", "rows", "sdpa", "triton"]
