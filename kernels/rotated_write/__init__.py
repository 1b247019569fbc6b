"""From the projections of a row to its rotated queries and its entry in the cache.

`kernels.blocks.RotatedWrite` is the contract.
"""
