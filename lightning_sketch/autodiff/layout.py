"""Named parameters <-> one flat vector, in a fixed order."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float
from torch import Size, Tensor, nn

from lightning_sketch.operators.sketch import Sketch

_SLAB = 1 << 20
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Layout:
    """Which parameters make up the flat vector, in which order and shape.

    Made once, from what is trainable at that moment; a hook that freezes parameters later changes nothing.

    >>> layout = Layout.of(nn.Linear(3, 2))
    >>> layout.names, layout.n
    (('weight', 'bias'), 8)
    """

    names: tuple[str, ...]
    shapes: tuple[Size, ...]

    @classmethod
    def of(cls, module: nn.Module, pattern: str | Sequence[str] = "*") -> "Layout":
        """Return the layout of the trainable parameters whose name matches, shared ones once, in the module's order.

        Args:
            module: names are taken without the prefixes that torch.compile, FSDP, DDP and
                activation checkpointing add.
            pattern: shell-style, e.g. `"blocks.*.attn.*"`, or several; a shared parameter is found
                under each of its names and listed under the first.

        Raises:
            ValueError: if no parameter is trainable, or none that is matches.
            TypeError: if one of them is complex.
        """
        found = _trainable(module)
        patterns = [pattern] if isinstance(pattern, str) else list(pattern)
        chosen = {
            names[0]: parameter
            for parameter, names in found.values()
            if any(fnmatchcase(name, p) for name in names for p in patterns)
        }
        if not found:
            raise ValueError(f"{type(module).__name__} has no trainable parameter; set requires_grad=True on some.")
        if not chosen:
            known = ", ".join(names[0] for _, names in itertools.islice(found.values(), 10))
            raise ValueError(f"no trainable parameter matches {pattern!r}; the names start with {known}.")
        for name, parameter in chosen.items():
            if parameter.is_complex():
                raise TypeError(f"parameter {name} is {parameter.dtype}; hold it as two real parameters.")
        return cls(tuple(chosen), tuple(p.shape for p in chosen.values()))

    @property
    def n(self) -> int:
        """Total number of scalars."""
        return sum(shape.numel() for shape in self.shapes)

    def parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """Return the parameters of the module, in this order."""
        found = {names[0]: parameter for parameter, names in _trainable(module, frozen=True).values()}
        missing = [
            name
            for name, shape in zip(self.names, self.shapes, strict=True)
            if name not in found or found[name].shape != shape
        ]
        if missing:
            raise ValueError(f"{type(module).__name__} lacks parameters of the layout: {', '.join(missing)}.")
        return [found[name] for name in self.names]

    def flatten(self, tensors: Sequence[Tensor | None], like: Tensor) -> Float[Tensor, " n"]:
        """Return one vector, of the type and on the device of `like`; None is zero."""
        vector, start = like.new_zeros(self.n), 0
        for size, tensor in zip(self._sizes, tensors, strict=True):
            if tensor is not None:
                vector[start : start + size].view(tensor.shape).copy_(tensor)
            start += size
        return vector

    def unflatten(self, vector: Float[Tensor, " n"]) -> list[Tensor]:
        """Return views into the vector, in the parameters' shapes."""
        return [part.view(shape) for part, shape in zip(vector.split(self._sizes), self.shapes, strict=True)]

    def sketch(self, sketch: Sketch, tensors: Mapping[str, Tensor | None]) -> Float[Tensor, " dim"]:
        """Sketch the flat vector of these tensors, without making that vector if the sketch streams.

        Args:
            sketch: with n as here.
            tensors: by name, e.g. gradients, on any device, in any floating type; one that is missing or
                None is zero, a sparse one is coalesced. Of a DTensor each rank sketches its own shard, where it is,
                and `dim` numbers are added up over the ranks that hold others: all ranks must call this.

        Raises:
            ValueError: if sizes disagree or a name is unknown, or a DTensor meets a sketch that does not stream.
            TypeError: if a tensor is complex, or a DTensor in other parts than runs of rows.
        """
        self._check(sketch, tensors)
        sharded = {name: tensor for name, tensor in tensors.items() if hasattr(tensor, "placements")}
        if sharded:
            plain = {name: tensor for name, tensor in tensors.items() if name not in sharded}
            return self.sketch(sketch, plain) + self._sketch_sharded(sketch, sharded)
        given = [tensor for tensor in tensors.values() if tensor is not None]
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in given), torch.float32)
        total = torch.zeros(sketch.dim, dtype=dtype, device=given[0].device if given else None)
        if not sketch.streams:
            vector = self.flatten([_dense(tensors.get(name)) for name in self.names], total)
            return sketch.matvec(vector)
        # Whole chunks, so that none is mapped twice; in memory that stays in cache.
        slab = total.new_empty(max(1, _SLAB // sketch.chunk) * sketch.chunk)
        for start, piece in self._slabs(tensors, slab):
            total += sketch.columns(start, start + len(piece)).matvec(piece)
        return total

    def adjoint(self, sketch: Sketch, y: Float[Tensor, " dim"], like: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield Sᵀ y, the adjoint of `sketch`, cut into the parameters' shapes, one after the other.

        Scratch: the largest parameter and a slab, if the sketch streams; n numbers if not.

        Args:
            sketch: with n as here.
            y: what to lift.
            like: the parameters; of a DTensor each rank gets its own shard.

        Raises:
            ValueError: if sizes disagree, or a DTensor meets a sketch that does not stream.
        """
        self._check(sketch, dict(zip(self.names, like, strict=True)))
        slab = max(1, _SLAB // sketch.chunk) * sketch.chunk if sketch.streams else self.n
        begin, held = 0, y[:0]

        def read(start: int, stop: int) -> Tensor:
            nonlocal begin, held
            parts = []
            while start < stop:
                if not begin <= start < begin + len(held):
                    begin = start // slab * slab
                    held = sketch.columns(begin, min(begin + slab, self.n)).rmatvec(y)
                parts.append(held[start - begin : stop - begin])
                start += len(parts[-1])
            return parts[0] if len(parts) == 1 else torch.cat([y[:0], *parts])

        for start, tensor in zip(itertools.accumulate(self._sizes, initial=0), like, strict=False):
            if hasattr(tensor, "placements"):
                local = tensor.to_local()
                first = start + _first_of_shard(tensor)
                whole = sketch.columns(first, first + local.numel()).rmatvec(y) if local.numel() else y[:0]
                yield whole.view(local.shape)
            else:
                yield read(start, start + tensor.numel()).view(tensor.shape)

    def _sketch_sharded(self, sketch: Sketch, tensors: Mapping[str, Tensor]) -> Float[Tensor, " dim"]:
        """Return the sum over all shards of their sketches, each taken by the rank that holds it."""
        starts = dict(zip(self.names, itertools.accumulate(self._sizes, initial=0), strict=False))
        partial: dict[tuple, Tensor] = {}
        for name, tensor in tensors.items():
            local = tensor.to_local().reshape(-1)
            key = tensor.device_mesh, tuple(tensor.placements)
            if key not in partial:
                partial[key] = torch.zeros(sketch.dim, dtype=torch.promote_types(local.dtype, torch.float32))
                partial[key] = partial[key].to(local.device)
            if len(local):
                start = starts[name] + _first_of_shard(tensor)
                partial[key] += sketch.columns(start, start + len(local)).matvec(local).to(partial[key])
        return sum(_summed(part, *key) for key, part in partial.items())

    @property
    def _sizes(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    def _check(self, sketch: Sketch, tensors: Mapping[str, Tensor | None]) -> None:
        if sketch.n != self.n:
            raise ValueError(
                f"the sketch takes n={sketch.n} numbers, the layout has {self.n}; build it with n={self.n}."
            )
        shapes = dict(zip(self.names, self.shapes, strict=True))
        for name, tensor in tensors.items():
            if name not in shapes:
                raise ValueError(f"{name} is not in the layout; it starts with {', '.join(self.names[:10])}.")
            if tensor is None:
                continue
            if tensor.shape != shapes[name]:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the layout says {tuple(shapes[name])}.")
            if tensor.is_complex():
                raise TypeError(f"{name} is {tensor.dtype}; sketch its real and imaginary parts apart.")
            if hasattr(tensor, "placements"):
                _check_sharded(name, tensor, sketch)

    def _slabs(self, tensors: Mapping[str, Tensor | None], slab: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield pieces of the flat vector, one after the other in the same memory, but those without any tensor."""
        begin, offset, given = 0, 0, False
        for name, size in zip(self.names, self._sizes, strict=True):
            tensor = _dense(tensors.get(name))
            flat = None if tensor is None else tensor.reshape(-1)
            done = 0
            while done < size:
                low = offset + done - begin
                part = min(size - done, len(slab) - low)
                slab[low : low + part] = 0 if flat is None else flat[done : done + part]
                given |= flat is not None
                done += part
                if low + part == len(slab):
                    if given:
                        yield begin, slab
                    begin, given = begin + len(slab), False
            offset += size
        if given:
            yield begin, slab[: offset - begin]


def _check_sharded(name: str, tensor: Tensor, sketch: Sketch) -> None:
    strange = [
        str(placement) for placement in tensor.placements if not (placement.is_replicate() or placement.is_shard(0))
    ]
    if strange or sum(placement.is_shard(0) for placement in tensor.placements) > 1:
        raise TypeError(f"{name} is laid out as {tensor.placements}, not in runs of rows; pass tensor.full_tensor().")
    if not sketch.streams:
        raise ValueError(f"{type(sketch).__name__} needs the whole vector, {name} is sharded; use 'block_srht'.")


def _first_of_shard(tensor: Tensor) -> int:
    """Return the flat place of the first number of this rank's shard, a run of rows."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # loaded with DTensor anyway

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tuple(tensor.placements))
    return offset[0] * tensor.shape[1:].numel() if tensor.ndim else 0


def _summed(partial: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    """Add up over the axes of the mesh that shards lie along; along the others all ranks have the same."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    parts = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    return DTensor.from_local(partial, mesh, parts, run_check=False).full_tensor()


def _dense(tensor: Tensor | None) -> Tensor | None:
    return tensor.to_dense() if tensor is not None and tensor.layout != torch.strided else tensor


def _trainable(module: nn.Module, frozen: bool = False) -> dict[int, tuple[nn.Parameter, list[str]]]:
    """Return each parameter with all its names, by identity."""
    while isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        module = module.module
    found: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad or frozen:
            for prefix in _WRAPPERS:
                name = name.replace(prefix, "")
            found.setdefault(id(parameter), (parameter, []))[1].append(name)
    return found
