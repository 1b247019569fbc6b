"""Linear and gated linear layers; a row of the native and the Triton ones does not depend on the others."""
