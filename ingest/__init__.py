"""Measure models on datasets: find and load models, read datasets, and run the two studies."""
