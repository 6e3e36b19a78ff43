"""The concept-depth study: probes on hidden states, layer by layer."""
