"""OpenAI's HTTP API in front of the verifier: validation, text, request records. Never imports torch."""
