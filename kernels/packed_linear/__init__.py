"""Linear layers whose rows do not depend on each other; `kernels.blocks.Linear` is the contract."""
