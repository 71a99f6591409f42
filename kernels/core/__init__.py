"""The fused Triton kernels and their launchers; the only place that imports Triton.

Layout is [B, T, H, D] with any strides, the last one 1. Every kernel works on one interval of
partners per token: a query sees the keys of one interval, a key is seen by the queries of one
interval, and both come from `primitives.partner_range`.
"""
