"""Several drafts of a sequence made one tree, for all sequences of a step in one call."""
