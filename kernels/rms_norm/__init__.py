"""Root mean square normalisation of rows; `kernels.blocks.RmsNorm` is the contract."""
