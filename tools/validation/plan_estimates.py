"""Memory estimates of other projects for the same job, for comparison with the plan.

Both multiply the number of parameters by a factor for weights, gradients and Adam's states. They
include no activations and do not depend on sequence length, micro-batch or LoRA.
"""

from __future__ import annotations

from typing import Any

_BYTES_OF_BITS = {4: 0.5, 8: 1.0, 16: 2.0}
_TRAINING_WITH_ADAM = 4


def accelerate_load(parameters: int, bits: int) -> int:
    """Return the "Total Size" of `accelerate estimate-memory` in bytes: int4, int8 or float16.

    Source: https://huggingface.co/docs/accelerate/usage_guides/model_size_estimator, whose tables
    halve the size from float32 to float16 to int8 to int4.
    """
    return int(parameters * _BYTES_OF_BITS[bits])


def accelerate_adam(parameters: int, bits: int) -> int:
    """Return the column "Training using Adam" in bytes: four times the total size in every row.

    Source: the same page; bert-base-cased in int4 is 51.65 MB to load and 206.59 MB to train.
    """
    return _TRAINING_WITH_ADAM * accelerate_load(parameters, bits)


def litgpt_training(config: Any) -> int:
    """Return litgpt's `estimate_model_memory(config, dtype="bfloat16", training=True)` in bytes.

    It is four times the parameters in the dtype, which is always a float type. Embedding and head
    are counted separately even if they are tied; biases and position tables are not counted.
    Source: that function's documentation,
    https://github.com/Lightning-AI/litgpt/blob/main/litgpt/utils.py (litgpt 0.5.13).
    """
    width, heads = config.hidden_size, config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or width // heads
    groups = getattr(config, "num_key_value_heads", heads)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    attention = width * (heads + 2 * groups) * head_size + head_size * heads * width
    mlp = width * inner * (2 if config.model_type == "gpt2" else 3)
    block = attention + mlp + 2 * width
    parameters = 2 * config.vocab_size * width + config.num_hidden_layers * block + width
    return int(_TRAINING_WITH_ADAM * parameters * _BYTES_OF_BITS[16])
