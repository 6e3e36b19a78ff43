"""Forward passes: hidden states, activation caches, decompositions of the residual stream, ablations."""
