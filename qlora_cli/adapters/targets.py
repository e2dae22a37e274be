"""Which linears of a model an adapter changes: from the recipe's `adapter.targets` to roles."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_cli.errors import Problem, ProblemsError
from qlora_cli.nn.site import Site

EXPERTS = "experts"
"""The role of the stacked weights of experts."""
ALL = "all"
"""All linears. Experts are targeted by their role only, because there are so many of them."""

_QKV = ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "in_proj_qkv", "in_proj_qkvz")
_GATE_UP = ("gate_up_proj", "input_linear")
_FUSED = {"q": _QKV, "k": _QKV, "v": _QKV, "gate": _GATE_UP, "up": _GATE_UP}
"""Role -> names of fused linears that can contain it."""


def adapted_roles(sites: Sequence[Site], targets: str | Sequence[str]) -> dict[str, list[str]]:
    """Return path -> adapted roles of each targeted site, in the site's order of roles.

    targets: `all`, or a list of role names (`q`), module paths and `all`. Raises ProblemsError that
    names every unknown target.
    """
    known = {role for site in sites for role in site.roles}
    wanted = {targets} if isinstance(targets, str) else set(targets)
    if ALL in wanted:
        wanted = wanted - {ALL} | {
            role for site in sites if not site.num_experts for role in site.roles
        }
    _check_known(sites, wanted - known - {site.path for site in sites})
    roles = {
        site.path: list(site.roles)
        if site.path in wanted
        else [role for role in site.roles if role in wanted]
        for site in sites
    }
    return {path: adapted for path, adapted in roles.items() if adapted}


def _check_known(sites: Sequence[Site], unknown: set[str]) -> None:
    if unknown:
        roles = list(dict.fromkeys(role for site in sites for role in site.roles))
        raise ProblemsError(
            "unknown adapter targets",
            [
                Problem(
                    "adapter.targets",
                    f"{name!r} is neither a role nor the path of a linear",
                    _role_hint(name, sites),
                )
                for name in sorted(unknown)
            ],
            hint=f"roles of this model: {', '.join(roles)}; example of a path: {sites[0].path}",
        )


def _role_hint(name: str, sites: Sequence[Site]) -> str | None:
    """Return `write q` for the name of a module, such as `q_proj`, or None."""
    if name == EXPERTS:
        return "this model has no experts with stacked weights"
    fused = next(
        (role for site in sites for role in site.roles if role in _FUSED.get(name, ())), None
    )
    if fused is not None:
        return (
            f"{name} is a part of the fused linear {fused}, whose rows are not separated by role; "
            f"write {fused}"
        )
    for site in sites:
        if site.path.rpartition(".")[2] == name.rpartition(".")[2]:
            return f"write {', '.join(site.roles)}"
    role = name.removesuffix("_proj")
    return f"write {role}" if any(role in site.roles for site in sites) else None
