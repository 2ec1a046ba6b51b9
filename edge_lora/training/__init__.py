"""Train an attached method: the loop on accelerate, its report, its checkpoints, and text data."""

from edge_lora.training.data import TextBatches, read_pairs, split_pairs
from edge_lora.training.loop import train
from edge_lora.training.report import TrainReport

__all__ = ["TextBatches", "TrainReport", "read_pairs", "split_pairs", "train"]
