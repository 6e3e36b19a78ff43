"""Notes that stand beside numbers wherever they are shown; listing figures needs them without any mathematics."""

from __future__ import annotations

CAVEAT = (
    "J and C are the paper's, of its probe and split (logistic-raw, paper) unless others are asked for. By chance "
    "alone, most flat curves of 100 test prompts have a J, and on real ones C is nearly always one of the last two "
    "layers."
)
"""Warning beside every J and C."""

FEW = "no interval below five prompts, or where all but a few prompts have the same score"
"""Reason for which the interval of a mean over prompts is NULL."""
