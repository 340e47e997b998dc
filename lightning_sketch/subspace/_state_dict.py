"""What a checkpoint of a `SubspaceModule` holds, and when it is refused.

    w, the buffers of the module, parameters trained in full, and frozen ones that the module itself has changed
    _extra_state: what the directions are made from, and a fingerprint of θ₀

Neither D nor a second copy of the weights. With `save_theta0`, θ₀ and all frozen parameters too.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_sketch.subspace.subspace_module import SubspaceModule

THETA0 = "theta0."


def kept(sub: "SubspaceModule", state: dict[str, Any], prefix: str) -> None:
    """Take out of a state dict what need not be saved; put in θ₀ if it is asked for."""
    for name in sub.frozen.moving | (set() if sub.save_theta0 else sub.frozen.unchanged()):
        state.pop(f"{prefix}module.{name}", None)
    if sub.save_theta0:
        state.update({f"{prefix}{THETA0}{name}": tensor for name, tensor in sub.theta0().items()})


def complete(sub: "SubspaceModule", state: dict[str, Any], prefix: str) -> None:
    """Put into a state dict all that the module expects; if θ₀ was saved, take it from there.

    Raises:
        ValueError: if it was made with other directions or from other weights.
    """
    start = f"{prefix}{THETA0}"
    theta0 = {name[len(start) :]: state.pop(name) for name in list(state) if name.startswith(start)}
    there, here = state.get(f"{prefix}_extra_state"), sub.get_extra_state()
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
    absent = [name for name in sub.frozen.start if f"{prefix}module.{name}" not in state]
    if absent and not sub.frozen.unchanged().issuperset(absent):
        raise ValueError(
            "the checkpoint is of a time when frozen parameters were as at the start, and here they no longer are; "
            "load it into a module that is made anew."
        )
    for name, tensor in theta0.items():
        sub.theta0()[name].copy_(tensor)
    for name, parameter in sub.module.named_parameters(remove_duplicate=False):
        state.setdefault(f"{prefix}module.{name}", parameter.detach())
