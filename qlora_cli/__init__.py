"""Fine-tune a large language model on one consumer GPU, and know where every byte went."""

__version__ = "0.1.0"
