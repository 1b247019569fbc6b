"""OpenAI's HTTP API in front of the verifier: validation, text, request records. Computes no tensors, imports no torch."""
