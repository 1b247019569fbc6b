"""Moving the keys and values of an accepted path into place; `kernels.blocks.KvCompaction` is the contract."""
