"""The two halves of a decoder layer of the Llama family; `kernels.blocks` holds their contracts."""
