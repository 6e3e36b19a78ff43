"""Measuring: models, datasets, capture, probes, and the run that ties them to storage."""
