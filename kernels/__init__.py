"""The kernels of a decoding step. They take tensors and have never heard of a token tree, a sequence or a service.

One stem per kernel: `tree_attention/{reference,triton,native}.py` compute the same function. `backend.choose_backend`
picks one implementation of everything for a device.

This package carries no version attribute: transformers takes a package named `kernels` that has one for Hugging Face's.
"""
