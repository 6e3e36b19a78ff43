"""Load datasets: texts with labels, or prompts with answers; built-in, published, or from a user's file.

from kdb.ingest.datasets import load_dataset, prompts
prompts(load_dataset("world-cities", limit=100))
prompts(load_dataset("knowledge"))
"""

from kdb.ingest.datasets.base import Dataset, DatasetInfo, Example, prompts
from kdb.ingest.datasets.catalogue import available_datasets, load_dataset

__all__ = ["Dataset", "DatasetInfo", "Example", "available_datasets", "load_dataset", "prompts"]
