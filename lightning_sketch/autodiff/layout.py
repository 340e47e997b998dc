"""The map between named parameters and one flat vector, in a fixed order."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Size, Tensor, nn

from lightning_sketch._arguments import check_patterns
from lightning_sketch.operators import kernels
from lightning_sketch.operators._apply import is_followed
from lightning_sketch.operators._hadamard import group_size
from lightning_sketch.operators.sketch import Sketch

# Numbers of the flat vector that are read or written at once on a CPU; on a GPU as many as a sketch handles at once.
_BUFFER = 1 << 20

# Numbers of tensors that are copied at once, where they do not lie as they are read.
_COPIED = 1 << 20

# Parameters in a repr.
_SHOWN = 3

# Prefixes that wrappers add to the names of parameters.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Layout:
    """The parameters that make up a flat vector, in a fixed order.

    It is built once, from the parameters that are trainable then; freezing some later does not change it.

    Attributes:
        names: The names of the parameters, in their order.
        shapes: The shapes of the parameters.

    >>> layout = Layout.of(nn.Linear(3, 2))
    >>> layout.names, layout.n
    (('weight', 'bias'), 8)
    """

    names: tuple[str, ...]
    shapes: tuple[Size, ...]

    def __repr__(self) -> str:
        shown = [f"{name} {tuple(shape)}" for name, shape in zip(self.names[:_SHOWN], self.shapes, strict=False)]
        listed = ", ".join(shown + ["..."] * (len(self.names) > _SHOWN))
        return f"Layout of {self.n:,} numbers in {len(self.names)} parameters: {listed}"

    @classmethod
    def of(cls, module: nn.Module, pattern: str | Sequence[str] = "*") -> "Layout":
        """Return the layout of the trainable parameters whose names match, shared ones once, in the module's order.

        Args:
            module: The module; names are taken without the prefixes that torch.compile, FSDP, DDP and activation
                checkpointing add.
            pattern: A shell-style pattern such as `"blocks.*.attn.*"`, or several; a shared parameter is found under
                each of its names and listed under the first.

        Raises:
            ValueError: if no parameter is trainable, or no trainable one matches.
            TypeError: if one of the parameters is complex.
        """
        check_patterns(pattern)
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
            of_parts = [p for p in patterns if any(names[0].startswith(f"{p}.") for _, names in found.values())]
            whole = f" For all parameters of a module write '{of_parts[0]}.*'." if of_parts else ""
            raise ValueError(f"no trainable parameter matches {pattern!r}; the names start with {known}.{whole}")
        for name, parameter in chosen.items():
            if parameter.is_complex():
                raise TypeError(f"parameter {name} is {parameter.dtype}; replace it by two real parameters.")
        return cls(tuple(chosen), tuple(p.shape for p in chosen.values()))

    @property
    def n(self) -> int:
        """The number of scalars, the size of the flat vector."""
        return sum(shape.numel() for shape in self.shapes)

    def parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """Return the parameters of a module, frozen ones too, in the order of the layout.

        Raises:
            ValueError: if a parameter is missing or has another shape.
        """
        found = {names[0]: parameter for parameter, names in _trainable(module, frozen=True).values()}
        missing = [
            name
            for name, shape in zip(self.names, self.shapes, strict=True)
            if name not in found or found[name].shape != shape
        ]
        if missing:
            raise ValueError(f"{type(module).__name__} lacks parameters of the layout: {', '.join(missing)}.")
        return [found[name] for name in self.names]

    def without(self, names: Collection[str]) -> "Layout":
        """Return the layout of all parameters but those with these names.

        Raises:
            ValueError: if none is left.
        """
        pairs = [(n, shape) for n, shape in zip(self.names, self.shapes, strict=True) if n not in names]
        if not pairs:
            raise ValueError(f"no parameter is left without {', '.join(list(names)[:10])}.")
        return Layout(tuple(name for name, _ in pairs), tuple(shape for _, shape in pairs))

    def flatten(self, tensors: Sequence[Tensor | None], like: Tensor) -> Float[Tensor, " n"]:
        """Return one vector of tensors in the order of the layout.

        Args:
            tensors: The tensors; None is zero.
            like: A tensor whose type and device the vector gets.
        """
        vector, start = like.new_zeros(self.n), 0
        for size, tensor in zip(self._sizes, map(_dense, tensors), strict=True):
            if tensor is not None:
                vector[start : start + size].view(tensor.shape).copy_(tensor)
            start += size
        return vector

    def unflatten(self, vector: Float[Tensor, " n"]) -> list[Tensor]:
        """Return views of a vector, in the shapes of the parameters."""
        return [part.view(shape) for part, shape in zip(vector.split(self._sizes), self.shapes, strict=True)]

    def sketch(self, sketch: Sketch, tensors: Mapping[str, Tensor | None]) -> Float[Tensor, " dim"]:
        """Sketch the flat vector of these tensors, without forming that vector if the sketch streams.

        Args:
            sketch: The sketch, of vectors of size n.
            tensors: The tensors by name, such as gradients, on any device, in any floating type; a missing name or
                None is zero, a sparse tensor is coalesced. Each rank sketches its own shard of a DTensor, and `dim`
                numbers are summed over the ranks that have the other shards: all ranks must call this.

        Returns:
            The sketch, (dim,), in float32, or float64 if a tensor is.

        Raises:
            ValueError: if sizes disagree, a name is unknown, or the sketch does not stream and a tensor is a DTensor.
            TypeError: if a tensor is complex, or a DTensor whose shards are not runs of rows.
        """
        self._check(sketch, tensors)
        sharded: dict[str, Any] = {name: t for name, t in tensors.items() if hasattr(t, "placements")}
        if sharded:
            plain = {name: t for name, t in tensors.items() if t is not None and name not in sharded}
            found = self._sketch_sharded(sketch, sharded)
            return self.sketch(sketch, plain) + found if plain else found
        given = [tensor for tensor in tensors.values() if tensor is not None and tensor.numel()]
        if not given:
            return torch.zeros(sketch.dim)
        if is_followed(*given):
            parts = itertools.chain.from_iterable(self._parts(tensors))
            return cast(Tensor, sum(sketch.columns(start, start + len(x)).matvec(x) for start, x in parts))
        groups = self._parts(tensors, _COPIED if sketch.streams else None)
        return cast(Tensor, sum(kernels.forward_pieces(sketch, group) for group in groups))

    def adjoint(self, sketch: Sketch, y: Float[Tensor, " dim"], *, like: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield Sᵀ y, the adjoint of `sketch`, split into tensors of the parameters' shapes, one after the other.

        Scratch memory: the largest parameter and 2^20 numbers (2^24 on a GPU) if the sketch streams, else n numbers.

        Args:
            sketch: The sketch, of vectors of size n.
            y: The vector that Sᵀ is multiplied by, (dim,).
            like: The parameters; of a DTensor each rank gets its own shard.

        Raises:
            ValueError: if sizes disagree, or the sketch does not stream and a parameter is a DTensor.
        """
        self._check(sketch, dict(zip(self.names, like, strict=True)))
        size = _buffer_size(sketch, y.device) if sketch.streams else self.n
        begin, buffer = 0, y[:0]

        def read(start: int, stop: int) -> Tensor:
            nonlocal begin, buffer
            parts = []
            while start < stop:
                if not begin <= start < begin + len(buffer):
                    begin = start // size * size
                    buffer = sketch.columns(begin, min(begin + size, self.n)).rmatvec(y)
                parts.append(buffer[start - begin : stop - begin])
                start += len(parts[-1])
            return parts[0] if len(parts) == 1 else torch.cat([y[:0], *parts])

        for start, tensor in zip(itertools.accumulate(self._sizes, initial=0), like, strict=False):
            if hasattr(tensor, "placements"):
                local = cast(Any, tensor).to_local()
                first = start + _first_of_shard(tensor)
                whole = sketch.columns(first, first + local.numel()).rmatvec(y) if local.numel() else y[:0]
                yield whole.view(local.shape)
            else:
                yield read(start, start + tensor.numel()).view(tensor.shape)

    def _sketch_sharded(self, sketch: Sketch, tensors: Mapping[str, Any]) -> Float[Tensor, " dim"]:
        """Return the sum of the sketches of all shards of DTensors, each computed by the rank that has it."""
        partial: dict[tuple, Tensor] = {}
        places = self._places
        for name, tensor in tensors.items():
            local = tensor.to_local().reshape(-1)
            key = tensor.device_mesh, tuple(tensor.placements)
            if key not in partial:
                partial[key] = torch.zeros(sketch.dim, dtype=torch.promote_types(local.dtype, torch.float32))
                partial[key] = partial[key].to(local.device)
            if len(local):
                start = places[name][0] + _first_of_shard(tensor)
                partial[key] += sketch.columns(start, start + len(local)).matvec(local).to(partial[key])
        return cast(Tensor, sum(_summed(part, *key) for key, part in partial.items()))

    @property
    def _sizes(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    @property  # not cached, since torch.compile cannot trace that
    def _places(self) -> dict[str, tuple[int, Size]]:
        """Where each parameter begins, and its shape, by name."""
        starts = itertools.accumulate(self._sizes, initial=0)
        return {name: (start, shape) for name, start, shape in zip(self.names, starts, self.shapes, strict=False)}

    def _check(self, sketch: Sketch, tensors: Mapping[str, Tensor | None]) -> None:
        if sketch.n != self.n:
            raise ValueError(
                f"the sketch takes n={sketch.n} numbers, the layout has {self.n}; build it with n={self.n}."
            )
        places = self._places
        for name, tensor in tensors.items():
            if name not in places:
                raise ValueError(f"{name} is not in the layout; it starts with {', '.join(self.names[:10])}.")
            if tensor is None:
                continue
            shape = places[name][1]
            if tensor.shape != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the layout says {tuple(shape)}.")
            if tensor.is_complex():
                raise TypeError(f"{name} is {tensor.dtype}; sketch its real and imaginary parts apart.")
            if hasattr(tensor, "placements"):
                _check_sharded(name, tensor, sketch)

    def _parts(
        self, tensors: Mapping[str, Tensor | None], most: int | None = None
    ) -> Iterator[list[tuple[int, Tensor]]]:
        """Yield the tensors that are given, flat and on one device, with where each begins, in one list or several.

        Args:
            tensors: The tensors by name.
            most: How many numbers of one list may be copies, unless a single tensor has more; None for all.
        """
        device, copied, places = None, 0, self._places
        parts: list[tuple[int, Tensor]] = []
        for name in sorted(tensors, key=lambda name: places[name][0]):
            tensor = _dense(tensors[name])
            if tensor is None or not tensor.numel():
                continue
            device = device or tensor.device
            # A kernel on a CPU copies float16.
            moved = not tensor.is_contiguous() or tensor.device != device or tensor.dtype == torch.float16
            if moved and copied and most is not None and copied + tensor.numel() > most:
                yield parts
                parts, copied = [], 0
            copied += tensor.numel() if moved else 0
            parts.append((places[name][0], tensor.reshape(-1).to(device)))
        if parts:
            yield parts


def _buffer_size(sketch: Sketch, device: torch.device) -> int:
    """Return the size of a buffer of whole chunks, if it has some, for a sketch that streams."""
    chunk = getattr(sketch, "chunk", 1)
    return max(1, max(_BUFFER, group_size(device)) // chunk) * chunk


def _check_sharded(name: str, tensor: Any, sketch: Sketch) -> None:
    strange = [
        str(placement) for placement in tensor.placements if not (placement.is_replicate() or placement.is_shard(0))
    ]
    if strange or sum(placement.is_shard(0) for placement in tensor.placements) > 1:
        raise TypeError(f"{name} is sharded as {tensor.placements}, not by rows; pass tensor.full_tensor().")
    if not sketch.streams:
        raise ValueError(f"{type(sketch).__name__} needs the whole vector, {name} is sharded; use 'block_srht'.")


def _first_of_shard(tensor: Any) -> int:
    """Return where this rank's shard of a DTensor, a run of rows, begins in the flat tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # loaded with DTensor anyway

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tuple(tensor.placements))
    return offset[0] * tensor.shape[1:].numel() if tensor.ndim else 0


def _summed(partial: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    """Return the sum over the axes of the mesh that shards lie along; along the others all ranks have the same."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    parts = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    return DTensor.from_local(partial, mesh, parts, run_check=False).full_tensor()


def _dense(tensor: Tensor | None) -> Tensor | None:
    return tensor.to_dense() if tensor is not None and tensor.layout != torch.strided else tensor


def _trainable(module: nn.Module, frozen: bool = False) -> dict[int, tuple[nn.Parameter, list[str]]]:
    """Return each trainable parameter, and each frozen one if `frozen`, with all its names, by its id."""
    while isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        module = module.module
    found: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad or frozen:
            for prefix in _WRAPPERS:
                name = name.replace(prefix, "")
            found.setdefault(id(parameter), (parameter, []))[1].append(name)
    return found
