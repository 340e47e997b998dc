"""A trained subspace as one small file: w, and what else training has changed, without θ₀ and D.

    header     how to make the subspace: kind and seed of the directions, dim, scale
    w          (dim,), or `codebook` (levels,) and `indices`, ⌈log₂ levels⌉ bits each, first bit first
    module.*   buffers, and parameters outside of the subspace that were trained
    roles      of each parameter: 0 frozen, 1 in the subspace, 2 trained in full, (parameters,) in uint8
    start      of each parameter: a fingerprint of it at θ₀, (parameters,) in int32
    constants  of each buffer that the module leaves out of its state dict: a fingerprint, in int32

It is a safetensors file with checksums. Whoever has the module at θ₀ gets the trained one from it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64, UInt8
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from lightning_sketch._files import TensorFile, write_tensors
from lightning_sketch.autodiff.fingerprint import fingerprint
from lightning_sketch.subspace._state_dict import decoded
from lightning_sketch.subspace.subspace_model import SubspaceModel
from lightning_sketch.subspace.subspace_module import SubspaceModule

_KIND = "lightning_sketch.subspace/1"
_SHOWN = 5  # names of parameters in a message


@dataclass(frozen=True)
class Quantized:
    """Numbers of which each is one of a few: the entry of a code book at its index.

    Args:
        codebook: The values, of shape (levels,), at most 256.
        indices: The index of each number, of shape (dim,), in uint8.

    >>> Quantized(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([2, 1, 1, 0], dtype=torch.uint8)).w
    tensor([ 1.,  0.,  0., -1.])
    """

    codebook: Float[Tensor, " levels"]
    indices: UInt8[Tensor, " dim"]

    @property
    def w(self) -> Float[Tensor, " dim"]:
        """The numbers, of shape (dim,)."""
        return self.codebook[self.indices.long()]


def quantize(w: Float[Tensor, " dim"], levels: int) -> Quantized:
    """Replace numbers by the centers of clusters, so that the sum of squared differences is small.

    Args:
        w: The numbers, of shape (dim,).
        levels: The number of clusters, from 1 to 256.

    Returns:
        The centers in ascending order, and the index of each number; fewer than `levels` if fewer numbers differ.

    Raises:
        ValueError: If `levels` is out of range, or a number is not finite.
        ImportError: If scikit-learn is missing.

    >>> quantize(torch.tensor([-1.1, -0.9, 0.4, 0.6]), 2).w
    tensor([-1.0000, -1.0000,  0.5000,  0.5000])

    Source: Lloyd (1982), "Least squares quantization in PCM", IEEE Transactions on Information Theory 28(2),
    doi:10.1109/TIT.1982.1056489, by scikit-learn's KMeans.
    """
    if not 1 <= levels <= 256:
        raise ValueError(f"need 1 <= levels <= 256, so that an index is a byte, got {levels}.")
    if not w.isfinite().all():
        raise ValueError("w has entries that are not finite, as after a training that diverged; export another run.")
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("quantize() needs scikit-learn: pip install 'lightning-sketch[bounds]'") from error
    column = w.detach().cpu().double().numpy()[:, None]
    found = KMeans(min(levels, len(np.unique(column))), n_init=10, random_state=0).fit(column)
    codebook, indices = np.unique(found.cluster_centers_[found.labels_], return_inverse=True)
    return Quantized(torch.tensor(codebook).to(w.dtype), torch.tensor(indices.reshape(-1), dtype=torch.uint8))


def save_subspace(sub: Any, path: str | Path, levels: int | Quantized | None = None) -> dict[str, int]:
    """Write a trained subspace to one safetensors file, from which `load_subspace` makes the module again.

    The file contains w, the module's buffers, and parameters outside of the subspace that were trained in full; not θ₀,
    of which it has fingerprints, nor the directions, which are a few integers.

    Args:
        sub: A `SubspaceModule` or `SubspaceModel`, which is not changed.
        path: The path of the file, which is replaced if it exists.
        levels: None to save w as it is. A number to save w rounded to that many values, which `quantize` chooses; or
            the rounded w itself, as the `quantized` of a bound. The file then gives the module at the rounded w.

    Returns:
        The number of bytes of each part: "w" or "codebook" and "indices", "roles" and "start" for five bytes for each
        parameter, "module.*" for each buffer and each parameter that was trained in full, and "file" for the whole.

    Raises:
        ValueError: If `levels` is out of range or of another dim, or if parameters were frozen during training.
        OSError: If the disk is full or the folder cannot be written.

    >>> import tempfile
    >>> from lightning_sketch.subspace import SubspaceModel
    >>> torch.manual_seed(0) and None
    >>> sub = SubspaceModel(nn.Linear(30, 10), 8)
    >>> _ = sub.w.data.normal_()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sizes = save_subspace(sub, f"{folder}/w.safetensors")
    ...     _ = torch.manual_seed(0)
    ...     plain = load_subspace(f"{folder}/w.safetensors", nn.Linear(30, 10))
    >>> sizes["w"]
    32
    >>> torch.equal(plain.weight, sub.materialize().weight)
    True
    """
    path, w = Path(path), sub.coordinates().detach().cpu()
    tensors, extra = trained_state(sub)
    if isinstance(levels, int):
        levels = quantize(w, levels)
    if levels is None:
        tensors["w"] = w
    elif len(levels.indices) != len(w):
        raise ValueError(f"the rounded w has {len(levels.indices)} numbers, this subspace {len(w)}; round its own w.")
    else:
        tensors |= {"codebook": levels.codebook.cpu(), "indices": _packed(levels)}
    constants = list(_constants(sub.module, set(tensors)).values())
    tensors["constants"] = torch.tensor(constants, dtype=torch.int32)
    moved, spec = sub.theta0(), extra["directions"]
    roles = [1 if name in moved else 2 * p.requires_grad for name, p in sub.module.named_parameters()]
    tensors |= {"roles": torch.tensor(roles, dtype=torch.uint8), "start": _start(sub.module, moved)}
    arguments = {
        "dim": len(w),
        "sketch": "block_srht" if spec["kind"] == "identity" else spec["kind"],  # a choice that has no effect then
        "seed": spec["seed"],
        "max_dim": spec["dim"] if spec["nested"] else None,
        "structure": "layers" if len(w) > sub.directions.dim else None,
        "scale": extra["scale"],
    }
    header = {"kind": _KIND, "arguments": json.dumps(arguments), "extra": json.dumps(extra)}
    write_tensors(path, tensors, header)
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    return {**sizes, "file": path.stat().st_size}


def load_subspace(path: str | Path, module: nn.Module) -> Any:
    """Set a module at θ₀ to the weights of a subspace that `save_subspace` wrote, bit for bit on the same device.

    Args:
        path: The path of the file.
        module: The module with the initial weights: made with the same seed, or with the same pretrained weights. Its
            weights and buffers are replaced.

    Returns:
        The module itself, trainable as before.

    Raises:
        FileNotFoundError: If there is no such file.
        CorruptFile: If the file is truncated or was changed.
        ValueError: If it is another kind of file, or if the module has other weights, which are named.

    >>> import tempfile
    >>> from lightning_sketch.subspace import SubspaceModel
    >>> _ = torch.manual_seed(0)
    >>> sub = SubspaceModel(nn.Linear(30, 10), 8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sizes = save_subspace(sub, f"{folder}/w.safetensors")
    ...     _ = torch.manual_seed(0)
    ...     plain = load_subspace(f"{folder}/w.safetensors", nn.Linear(30, 10))
    >>> torch.equal(plain.weight, sub.module.weight)
    True
    """
    file = TensorFile(Path(path), sealed=False)  # other kinds of files have no checksum
    if file.header.get("kind") != _KIND or not file.sealed:
        raise ValueError(f"{path} is a safetensors file, but none of save_subspace; load it with safetensors.torch.")
    file.check()
    state = {name: file.tensor(name).clone() for name in file.shapes}
    arguments, extra = json.loads(file.header["arguments"]), json.loads(file.header["extra"])
    changed = {name.removeprefix("module.") for name in state}
    constants = _constants(module, set(state))
    if not torch.equal(state.pop("constants"), torch.tensor(list(constants.values()), dtype=torch.int32)):
        raise ValueError(
            f"this module has other buffers than the one in {path}, among those that are not in its state dict: "
            f"{', '.join(list(constants)[:_SHOWN])}. Make the same module; if training changes them, register them "
            "with persistent=True."
        )
    _refuse_others(path, module, state.pop("start"), changed)
    named = list(zip(module.named_parameters(), state.pop("roles").tolist(), strict=True))
    arguments["parameters"] = [name for (name, _), role in named if role]
    arguments["head"] = [name for (name, _), role in named if role == 2] or None
    if "codebook" in state:
        codebook = state.pop("codebook")
        state["w"] = codebook[_unpacked(state.pop("indices"), len(codebook), arguments["dim"])]
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    try:
        for (_, parameter), role in named:
            parameter.requires_grad_(role > 0)
        wrap: Any = SubspaceModule if isinstance(module, LightningModule) else SubspaceModel
        sub = wrap(module, **arguments)
        w = state.pop("w")
        blocks = {"w": w} if arguments["max_dim"] is None else {f"w.{i}": b for i, b in enumerate(sub.cut(w))}
        unknown = sub.load_state_dict({**state, **blocks, "_extra_state": extra}, strict=False).unexpected_keys
        if unknown:
            raise ValueError(
                f"this module has no {', '.join(unknown[:_SHOWN])}, which {path} has; make the same module."
            )
    finally:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in trainable)
    return module


def trained_state(sub: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what training may have changed besides w, by names with `module.` before them, and the extra state.

    These are all buffers, parameters trained in full, and frozen ones that the module itself has changed.

    Raises:
        ValueError: If parameters were frozen in the middle of training: w does not determine them.
    """
    sub.ready()
    with _without_start(sub):
        state = sub.state_dict()
    extra = decoded(state.pop("_extra_state"))
    if extra.get("motions"):
        raise ValueError(
            "parameters were frozen in the middle of this training, and w alone does not determine them; use "
            "materialize(), or freeze before training."
        )
    own = [name for kind in (sub.module.named_parameters(), sub.module.named_buffers()) for name, _ in kind]
    names = [f"module.{name}" for name in own]  # without what quantized layers add, which belongs to frozen weights
    return {name: state[name].detach().cpu().clone() for name in names if name in state}, extra


@contextmanager
def _without_start(sub: Any) -> Iterator[None]:
    """Leave θ₀ and unchanged parameters out of the state dict within the context."""
    before, sub.save_theta0 = sub.save_theta0, False
    try:
        yield
    finally:
        sub.save_theta0 = before


def _start(module: nn.Module, theta0: dict[str, Tensor]) -> Int32[Tensor, " parameters"]:
    """Return 32 bits of the fingerprint of each parameter at θ₀, in the module's order."""
    found = [fingerprint([theta0.get(name, p.detach())]) & 0x7FFFFFFF for name, p in module.named_parameters()]
    return torch.tensor(found, dtype=torch.int32)


def _constants(module: nn.Module, saved: set[str]) -> dict[str, int]:
    """Return a fingerprint of each buffer that is not saved, by its name."""
    buffers = [(name, b) for name, b in module.named_buffers() if f"module.{name}" not in saved]
    return {name: fingerprint([buffer.detach()]) & 0x7FFFFFFF for name, buffer in buffers}


def _refuse_others(path: str | Path, module: nn.Module, start: Int32[Tensor, " parameters"], changed: set[str]) -> None:
    """Refuse a module whose parameters, except those in the file, are not the ones that training began with."""
    names, found = [name for name, _ in module.named_parameters()], _start(module, {})
    if len(found) != len(start):
        raise ValueError(
            f"this module has {len(found)} parameters, the one in {path} had {len(start)}; make the same module."
        )
    different = [name for name, same in zip(names, found == start, strict=True) if not same and name not in changed]
    if different:
        shown = ", ".join(different[:_SHOWN]) + (", ..." if len(different) > _SHOWN else "")
        raise ValueError(
            f"this module has other initial weights than the subspace in {path} was trained from, in {len(different)} "
            f"of {len(names)} parameters: {shown}. Make it with the same seed (seed_everything), or from the same "
            "pretrained weights in the same precision."
        )


def _packed(quantized: Quantized) -> UInt8[Tensor, " bytes"]:
    """Return the indices in as few bits as the code book needs."""
    width = (len(quantized.codebook) - 1).bit_length()
    bits = np.unpackbits(quantized.indices.cpu().numpy()[:, None], axis=1, bitorder="little")[:, :width]
    return torch.from_numpy(np.packbits(bits))


def _unpacked(packed: UInt8[Tensor, " bytes"], levels: int, dim: int) -> Int64[Tensor, " dim"]:
    """Return the indices that `_packed` packed."""
    width = (levels - 1).bit_length()
    bits = np.unpackbits(packed.numpy())[: dim * width].reshape(dim, width)
    return torch.from_numpy(
        np.packbits(bits, axis=1, bitorder="little").reshape(dim) if width else np.zeros(dim)
    ).long()
