"""Adapters on stacked parameters of experts in PEFT's format (`target_parameters`).

PEFT stores the factors of all experts of a parameter in one A (E rank, in), expert by expert, and
one B (out, rank E), in which the number of the expert changes fastest. It wraps the module once for
each parameter. So the name of a tensor contains the module and, once for each wrapper around the
parameter, `base_layer`: the first parameter of a module is the innermost.

Source: peft 0.21.2, `tuners/lora/layer.py` (ParamWrapper), `BaseTuner._inject_parameters`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from qlora_cli.adapters.lora import LoraSettings
from qlora_cli.adapters.peft_config import PeftConfig
from qlora_cli.errors import ModelError
from qlora_cli.files.safetensors_io import TensorEntry, is_finite, read_tensor
from qlora_cli.nn.expert_stack import StackLora
from qlora_cli.nn.experts import DOWN_NAME, UP_NAMES

_WRAPPED = ".base_layer"
_ORDER = (*UP_NAMES, DOWN_NAME)
"""Names of the stacked parameters in the order in which transformers' classes define them."""

EXPERT_LINEARS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names of linears that PEFT takes for experts, which had such names in transformers 4. They are
targeted by their parameter, for which PEFT reads the same A and B."""


@dataclass(frozen=True)
class AdapterStack:
    """The A and B of one stacked parameter in a file. `read` reads them.

    path: the parameter. a, b: the entries of A and B as PEFT stores them. settings: of each expert.
    """

    path: str
    a: TensorEntry
    b: TensorEntry
    settings: LoraSettings

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape (out, in) of the matrix of one expert."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def num_experts(self) -> int:
        """Return the number of experts."""
        return self.a.shape[0] // self.settings.rank

    def read(self) -> StackLora:
        """Read the adapters of all experts. Raises ModelError if a value is not finite."""
        a, b = read_tensor(self.a), read_tensor(self.b)
        if not (is_finite(a) and is_finite(b)):
            raise ModelError(
                f"the adapter's A or B for {self.path} has values that are not finite",
                where=str(self.a.file),
                hint="the training diverged or the file is damaged; check the losses with "
                "`qlora report`",
            )
        return StackLora(*_from_file(a, b, self.num_experts), self.settings.scaling)


def to_file(factor: Tensor, letter: str) -> Tensor:
    """Return A (E rank, in) or B (out, rank E) of a file. factor: (E, rank, in) or (E, out, rank).

    letter: `A` or `B`.
    """
    if letter == "A":
        return factor.flatten(0, 1)
    return factor.permute(1, 2, 0).flatten(1)


def _from_file(a: Tensor, b: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return A (E, rank, in) and B (E, out, rank) from the tensors of a file."""
    rank = a.shape[0] // num_experts
    b = b.view(b.shape[0], rank, num_experts).permute(2, 0, 1).contiguous()
    return a.view(num_experts, rank, a.shape[1]), b


def file_paths(stacks: Iterable[str]) -> dict[str, str]:
    """Return path of a stacked parameter -> the path that names its tensors in a file.

    stacks: paths of the adapted parameters.
    """
    found: dict[str, str] = {}
    for module, names in _by_module(stacks).items():
        ordered = sorted(names, key=_ORDER.index)
        for depth, name in enumerate(reversed(ordered)):
            found[f"{module}.{name}"] = module + _WRAPPED * depth
    return found


def stack_paths(config: PeftConfig, paths: Iterable[str]) -> dict[str, str]:
    """Return path in a file -> path of the stacked parameter, for those in `paths`.

    paths: the paths of all pairs of A and B in the file.
    """
    modules = dict.fromkeys(path.split(_WRAPPED)[0] for path in paths)
    stacks = [
        f"{module}.{name}"
        for module in modules
        for name in _ORDER
        if config.targets_parameter(f"{module}.{name}") and not config.targets(module)
    ]
    return {in_file: stack for stack, in_file in file_paths(stacks).items()}


def _by_module(stacks: Iterable[str]) -> Mapping[str, Sequence[str]]:
    modules: dict[str, list[str]] = {}
    for path in stacks:
        module, _, name = path.rpartition(".")
        modules.setdefault(module, []).append(name)
    return modules


def unused_targets(config: PeftConfig, paths: Iterable[str]) -> Iterator[str]:
    """Yield the targeted parameters of `config` that are not among `paths`."""
    present = list(paths)
    for target in config.target_parameters or ():
        if not any(path == target or path.endswith(f".{target}") for path in present):
            yield target
