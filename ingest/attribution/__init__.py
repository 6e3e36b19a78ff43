"""The knowledge study: which layers, heads and neurons write an answer."""
