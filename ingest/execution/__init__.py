"""Engines that run stages: in this process, or on the workers of a Ray cluster."""
