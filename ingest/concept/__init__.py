"""The concept-depth study: probe hidden states, layer by layer."""
