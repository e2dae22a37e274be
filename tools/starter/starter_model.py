"""The embedded base's architecture, its start and its optimizers."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


def build_model(context: int, bos: int, eos: int, pad: int) -> LlamaForCausalLM:
    """3.5 M parameters; all sizes are multiples of the 64 weights that share an NF4 scale."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        start_ready_to_copy(layer.self_attn, config.head_dim)
    return model


@torch.no_grad()
def start_ready_to_copy(attention: torch.nn.Module, head_dim: int) -> None:
    """Let a head look for what its own token holds, and every head pass on what it sees.

    W_K = W_Q of the first head of each group, W_O = W_V^T / 2 ("mimetic initialization", Trockman
    and Kolter 2023). In one trial of 125 steps the repetition of random words then cost 0.8 nats
    less than the words had cost at first; from the usual start, with heads of 32, it was 0.1.
    """
    hidden = attention.q_proj.in_features
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        torch.nn.init.normal_(linear.weight, std=hidden**-0.5)
    queries = attention.q_proj.weight.view(-1, head_dim, hidden)
    keys = attention.k_proj.weight.view(-1, head_dim, hidden)
    values = attention.v_proj.weight.view(-1, head_dim, hidden)
    group = len(queries) // len(keys)
    keys.copy_(queries[::group])
    passed_on = values.repeat_interleave(group, dim=0).flatten(0, 1)  # (heads * head_dim, hidden)
    attention.o_proj.weight.copy_(passed_on.T / 2)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: for matrices (Jordan et al. 2024, "Muon").

    Not torch.optim.Muon, which computes in bfloat16: many CPUs do that several times slower.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix by `lr`, in the spectral norm, along its Nesterov momentum."""
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalize(weight.grad.lerp(momentum, group["momentum"]))
                scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.add_(update, alpha=-group["lr"] * scale)


def orthogonalize(matrix: Tensor) -> Tensor:
    """About U V^T of `matrix` = U S V^T, by five quintic Newton-Schulz steps."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the tied embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    adam = torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, lr=0.02), adam]


def learning_rate(step: int, steps: int) -> float:
    """Factor on the peak rate: 20 steps up, level, then linearly to zero over the last 60 %."""
    return min((step + 1) / 20, 1.0, (steps - step) / (0.6 * steps))
