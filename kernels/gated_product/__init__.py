"""silu(gate) * up of a gated feed-forward; `kernels.blocks.GatedProduct` is the contract."""
