"""The knowledge study: score the layers, heads and neurons that raise the probability of an answer."""
