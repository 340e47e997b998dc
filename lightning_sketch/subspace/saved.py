"""What a checkpoint of a `SubspaceModule` holds, and when it is refused.

    w, the buffers of the module, parameters trained in full
    _extra_state: what the directions are made from, and a fingerprint of θ₀

Neither D nor a second copy of the weights. With `save_theta0`, θ₀ and the frozen parameters too.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from lightning_sketch.subspace.subspace_module import SubspaceModule

THETA0 = "theta0."


def kept(sub: "SubspaceModule", state: dict[str, Any], prefix: str) -> None:
    """Take out of a state dict what need not be saved; put in θ₀ if it is asked for."""
    theta0 = sub.theta0()
    for name, parameter in sub.module.named_parameters(remove_duplicate=False):
        if name in theta0 or not (parameter.requires_grad or sub.save_theta0):
            state.pop(f"{prefix}module.{name}", None)
    if sub.save_theta0:
        state.update({f"{prefix}{THETA0}{name}": tensor for name, tensor in theta0.items()})


def completed(sub: "SubspaceModule", state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state dict with all that the module expects; and θ₀, empty if it was not saved.

    Raises:
        ValueError: if it was made with other directions or from other weights.
    """
    theta0 = {name[len(THETA0) :]: tensor for name, tensor in state.items() if name.startswith(THETA0)}
    state = {name: tensor for name, tensor in state.items() if not name.startswith(THETA0)}
    there, here = state.get("_extra_state"), sub.get_extra_state()
    if there is None:
        raise ValueError("this is no checkpoint of a SubspaceModule; load it into the module inside, then wrap that.")
    if there["directions"] != here["directions"]:
        raise ValueError(
            f"the checkpoint was trained along other directions:\n  checkpoint: {there['directions']}\n  module:     "
            f"{here['directions']}\nmake the SubspaceModule with the arguments of the checkpoint."
        )
    if not theta0 and there["theta0"] != here["theta0"]:
        raise ValueError(
            f"the checkpoint was trained from other initial weights:\n  checkpoint: fingerprint {there['theta0']}\n"
            f"  module:     fingerprint {here['theta0']}\nmake the module with the same seed (seed_everything) or the "
            "same pretrained weights, or train with save_theta0=True."
        )
    for name, parameter in sub.module.named_parameters(remove_duplicate=False):
        state.setdefault(f"module.{name}", parameter.detach())
    return state, theta0
