"""Linear layers whose rows do not depend on each other."""
