"""The optimizer of ``training.optimizer``, and its state as tensors for checkpoints, exact to the bit.

AdamW has two moments of a weight's shape. bitsandbytes' 8-bit AdamW (Dettmers et al. 2021, arXiv:2110.02861) keeps them
as bytes, with a float32 scale for each block of 256 weights; small weights keep float32 moments. Bytes and scales are
saved as they are: turned into floats and quantized again they would not be the same.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lora_api.run import RunSpec
from lora_trainer.errors import InternalError
from lora_trainer.parallel import assign_full, full_tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
EIGHT_BIT_STATE = ("state1", "state2", "absmax1", "absmax2")
"""What changes in the state of bitsandbytes' optimizers (0.50). The tables of codes (qmap) are constants."""

Named = Iterable[tuple[str, torch.nn.Parameter]]


def optimizer_name(run: RunSpec, *, fused: bool) -> str:
    """Transformers' name of the run's optimizer."""
    if run.training.optimizer == "adamw":
        return "adamw_torch_fused" if fused else "adamw_torch"
    return "paged_adamw_8bit"


def collect_state(optimizer: torch.optim.Optimizer, trainable: Named) -> dict[str, torch.Tensor]:
    """The whole state of ``optimizer`` on the CPU, by the names of the parameters. All ranks call it."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in trainable:
        state = optimizer.state.get(parameter)
        if not state:  # every step so far was skipped
            continue
        found[f"{name}.step"] = torch.as_tensor(state["step"], dtype=torch.float32).detach().cpu().clone()
        for key in MOMENTS if MOMENTS[0] in state else EIGHT_BIT_STATE:
            if key in state:
                found[f"{name}.{key}"] = full_tensor(state[key])
    return found


def restore_state(optimizer: torch.optim.Optimizer, trainable: Named, saved: Mapping[str, torch.Tensor]) -> None:
    """Puts a state of ``collect_state`` back. No communication.

    Raises:
        InternalError: it is the state of another optimizer.
    """
    parameters = dict(trainable)
    if hasattr(optimizer, "init_state"):
        _restore_eight_bit(optimizer, parameters, saved)
        return
    fused = bool(optimizer.defaults.get("fused"))
    for name, parameter in parameters.items():
        if f"{name}.step" not in saved:  # it had none yet
            continue
        state: dict[str, Any] = {"step": _part(saved, name, "step").to(parameter.device if fused else "cpu")}
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(parameter, requires_grad=False)
            assign_full(state[moment], _part(saved, name, moment))
        optimizer.state[parameter] = state


def _restore_eight_bit(
    optimizer: Any, parameters: Mapping[str, torch.nn.Parameter], saved: Mapping[str, torch.Tensor]
) -> None:
    """The optimizer makes its own buffers, which may be paged; only their content is ours."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            name = names[id(parameter)]
            if f"{name}.step" not in saved:
                continue
            optimizer.init_state(group, parameter, group_index, index)
            state = optimizer.state[parameter]
            state["step"] = int(_part(saved, name, "step"))
            for key in EIGHT_BIT_STATE:
                if key in state:
                    state[key].copy_(_part(saved, name, key))


def _part(saved: Mapping[str, torch.Tensor], name: str, key: str) -> torch.Tensor:
    if f"{name}.{key}" not in saved:
        raise InternalError(f"the checkpoint has no {key} of {name}: it is of another optimizer")
    return saved[f"{name}.{key}"]
