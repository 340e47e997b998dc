"""What the state dict of a subspace contains, and the checks when one is loaded.

    w, the buffers of the module, parameters trained in full, and frozen ones that the module itself has changed
    _extra_state: spec and scale of the directions, the number in use, a fingerprint of θ₀, what was frozen and when

It contains neither D nor a second copy of the weights. With `save_theta0` it also contains θ₀ and all frozen
parameters. A checkpoint of Lightning has a note in it too.
"""

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sketch.autodiff.fingerprint import short

if TYPE_CHECKING:
    from lightning_sketch.subspace.subspace_model import Subspace

_THETA0 = "theta0."
# An entry of Lightning's checkpoints, since a plain module that loads one lists the entries that it does not know.
_NOTE = "of a SubspaceModule: call load_from_checkpoint(path, module=YourModule()) of that class, and materialize()"


def encoded(state: dict[str, Any]) -> Tensor:
    """Return the extra state as bytes of JSON, in which floating-point numbers are exact."""
    text = json.dumps(state, default=lambda tensor: tensor.tolist())
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def decoded(state: Any) -> Any:
    """Return the extra state from `encoded`, or as it is if it is not encoded."""
    if not isinstance(state, Tensor):
        return state
    found = json.loads(bytes(state.tolist()))
    motions = found.get("motions", {}).items()
    offsets = {name: None if offset is None else torch.tensor(offset) for name, (_, offset) in motions}
    return {**found, "motions": {name: (trained, offsets[name]) for name, (trained, _) in motions}}


def trim_state(sub: "Subspace", state: dict[str, Any], prefix: str) -> None:
    """Remove from a state dict what can be recomputed, and add θ₀ if `save_theta0` is set."""
    for name in sub.frozen.following | (set() if sub.save_theta0 else sub.frozen.unchanged()):
        state.pop(f"{prefix}module.{name}", None)
    if sub.save_theta0:
        state.update({f"{prefix}{_THETA0}{name}": tensor for name, tensor in sub.theta0().items()})


def note_kind(state: dict[str, Any]) -> None:
    """Add an entry to a state dict by which the error of a plain module says how to load it."""
    state[_NOTE] = torch.empty(0)


def complete_state(sub: "Subspace", state: dict[str, Any], prefix: str) -> None:
    """Add to a state dict the entries that `trim_state` removed, and restore θ₀ if it was saved.

    Raises:
        ValueError: If the state dict is not of a `SubspaceModule`, or is of other directions or other initial weights.
    """
    state.pop(f"{prefix}{_NOTE}", None)
    start = f"{prefix}{_THETA0}"
    theta0 = {name[len(start) :]: state.pop(name) for name in list(state) if name.startswith(start)}
    there, here = decoded(state.get(f"{prefix}_extra_state")), decoded(sub.get_extra_state())
    if there is None:
        raise ValueError(
            "this is not a checkpoint of a SubspaceModule; load it into the plain module, then wrap that module."
        )
    if there["directions"] != here["directions"]:
        raise ValueError(
            f"the checkpoint was trained along other directions:\n  checkpoint: {there['directions']}\n  module:     "
            f"{here['directions']}\nmake the SubspaceModule with the arguments of the checkpoint."
        )
    if not theta0 and there["theta0"] != here["theta0"]:
        raise ValueError(
            f"the checkpoint was trained from other initial weights:\n  checkpoint: fingerprint "
            f"{short(there['theta0'])}\n  module:     fingerprint {short(here['theta0'])}\nmake the module with the "
            "same seed (seed_everything) or the same pretrained weights, or train with save_theta0=True."
        )
    absent = [name for name in sub.frozen.start if f"{prefix}module.{name}" not in state]
    if absent and not sub.frozen.unchanged().issuperset(absent):
        raise ValueError(
            "the checkpoint was saved while the frozen parameters had their initial values, and this module has since "
            "changed them; load it into a new module."
        )
    for name, tensor in theta0.items():
        sub.theta0()[name].copy_(tensor)
    for name, parameter in sub.module.named_parameters(remove_duplicate=False):
        state.setdefault(f"{prefix}module.{name}", parameter.detach())
