"""How a pruned model lasts: saved atomically, described in full, loaded by plain transformers."""
