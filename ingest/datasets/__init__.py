"""Labelled texts to measure a model on: the nine of the concept-depth paper, two built in, and a user's own.

from kdb.ingest.datasets import load_dataset, prompts
prompts(load_dataset("world-cities", limit=100))
"""

from kdb.ingest.datasets.base import Dataset, DatasetInfo, Example, prompts
from kdb.ingest.datasets.catalogue import available_datasets, load_dataset

__all__ = ["Dataset", "DatasetInfo", "Example", "available_datasets", "load_dataset", "prompts"]
