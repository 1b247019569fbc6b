"""Growing a token tree with a small model, all levels in one call. On other devices the levels are separate passes."""
