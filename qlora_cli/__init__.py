"""Fine-tune a large language model on one consumer GPU with exact memory accounting."""

__version__ = "0.1.0"
