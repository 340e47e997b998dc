"""Vectors of a sharded module's parameters, of which each rank has the numbers that belong to its own shards.

Parameters are DTensors as FSDP2 (`fully_shard`) and tensor parallelism make them, or whole on every rank. Nothing of
the size of all parameters is formed on one rank.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch._private import required
from lightning_sketch.autodiff.content_hash import content_hash
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators.random import Key
from lightning_sketch.operators.space import VectorSpace, chunk_size, dot_here, fill_with_normals


@dataclass(frozen=True)
class _Block:
    """The part of one parameter that a rank has.

    Attributes:
        start: The index of its first number among all n. Blocks of a parameter are numbered by their places in it, so
            that shards by rows have the indices that they have in the flat vector.
        size: The number of its numbers.
        ranks: All ranks that have the same block.
    """

    start: int
    size: int
    ranks: tuple[int, ...]


class Shards(VectorSpace):
    """The flat vectors of a module's parameters, in shards. All ranks make it, and call its methods, together.

    Args:
        layout: Names and whole shapes of the parameters.
        parameters: The parameters, DTensors or whole.
        dtype: The type of vectors.

    Attributes:
        n: The number of numbers in all parameters.
        size: The number of numbers that this rank has, copies included.

    Raises:
        TypeError: If a parameter is sharded in a way that is not supported.
    """

    sharded = True

    def __init__(self, layout: Layout, parameters: Sequence[Tensor], dtype: torch.dtype):
        super().__init__(layout.n, dtype, local(parameters[0]).device)
        self._shapes = [local(parameter).shape for parameter in parameters]
        self._sizes = [shape.numel() for shape in self._shapes]
        self.size = sum(self._sizes)
        self._blocks, self.numbering = _blocks(layout, parameters)
        self._runs: list[tuple[tuple[int, ...], slice]] = []  # neighbors with copies on the same ranks
        for ranks, run in itertools.groupby(zip(self._blocks, self._slices(), strict=True), lambda pair: pair[0].ranks):
            places = [place for _, place in run]
            self._runs.append((ranks, slice(places[0].start, places[-1].stop)))
        self._groups = _groups({ranks for ranks, _ in self._runs})

    def pieces(self, vector: Float[Tensor, " size"]) -> list[Tensor]:
        """Return views of a vector, in the shapes of this rank's shards."""
        return [part.view(shape) for part, shape in zip(vector.split(self._sizes), self._shapes, strict=True)]

    def flatten(self, tensors: Sequence[Tensor | None]) -> Float[Tensor, " size"]:
        """Return this rank's numbers of tensors, sharded as the parameters are; None is zero."""
        vector = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for piece, tensor in zip(self.pieces(vector), tensors, strict=True):
            if tensor is not None:
                piece.copy_(local(tensor))
        return vector

    def dot(self, x: Float[Tensor, " size"], y: Float[Tensor, " size"]) -> float:
        """Return the inner product of two vectors over all ranks, summed in float64."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for ranks, part in self._runs:
            total += dot_here(x[part], y[part]) / len(ranks)
        return float(summed(total))

    def normal(self, key: Key, dtype: torch.dtype | None = None) -> Float[Tensor, " size"]:
        """Return this rank's part of a vector of standard normal numbers."""
        v = torch.empty(self.size, dtype=dtype or self.dtype, device=self.device)
        for block, place in zip(self._blocks, self._slices(), strict=True):
            fill_with_normals(v[place], key, block.start)
        return v

    def sketched(self, sketch: Any, x: Float[Tensor, " size"]) -> Float[Tensor, " dim"]:
        """Return S x, summed over the ranks, or all of x if the sketch S is None, in float64 on the CPU."""
        total = torch.zeros(self.n if sketch is None else sketch.dim, dtype=torch.float64, device=self.device)
        for block, place in zip(self._blocks, self._slices(), strict=True):
            if block.size and block.ranks[0] == _rank():
                stop = block.start + block.size
                if sketch is None:
                    total[block.start : stop] = x[place]
                else:
                    total += sketch.columns(block.start, stop).matvec(x[place])
        return summed(total).cpu()

    def anywhere(self, here: bool) -> bool:
        """Return whether something is so on any rank."""
        return bool(summed(torch.tensor(float(here), device=self.device)))

    def typical_length(self, parameters: Sequence[Tensor]) -> float:
        """Return the length of a vector whose numbers are all as large as those of a typical parameter; 0 if none is.

        The root mean square of each parameter counts, and of these the median: a single large one changes nothing.
        """
        squares = [
            local(p).double().square().sum() / len(b.ranks) for p, b in zip(parameters, self._blocks, strict=True)
        ]
        counts = [block.size / len(block.ranks) for block in self._blocks]
        sums = summed(torch.stack([torch.stack(squares), torch.tensor(counts).to(squares[0])]))
        sizes = (sums[0] / sums[1].clamp(min=1)).sqrt()
        return float(sizes[sizes > 0].median()) * self.n**0.5 if bool(sizes.any()) else 0.0

    def differing(self, everywhere: Sequence[Sequence[int]]) -> list[int]:
        """Return the indices of the parameters whose copies differ, from the `checksums` of each rank."""
        return [i for i, block in enumerate(self._blocks) if len({everywhere[rank][i] for rank in block.ranks}) > 1]

    def mean_of_copies_(self, x: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
        """Replace numbers that several ranks have by the mean of these, in place."""
        for ranks, part in self._runs:
            if len(ranks) > 1 and part.stop > part.start:
                distributed.all_reduce(x[part], group=self._groups[ranks])
                x[part] /= len(ranks)
        return x

    def _slices(self) -> Iterator[slice]:
        """Yield the places of the blocks in this rank's part of a vector."""
        starts = itertools.accumulate(self._sizes, initial=0)
        return itertools.starmap(slice, itertools.pairwise(starts))


def is_sharded(module: nn.Module) -> bool:
    """Return whether a parameter of the module is a DTensor."""
    return any(hasattr(parameter, "placements") for parameter in module.parameters())


def local(tensor: Any) -> Tensor:
    """Return the values of a tensor, of a DTensor this rank's shard, in its own memory.

    What is written there does not count as a change of the tensor, so that graphs which saved it stay valid.
    """
    data = tensor.data
    return data.to_local() if hasattr(data, "to_local") else data


def checksums(parameters: Sequence[Tensor]) -> list[int]:
    """Return a weighted sum of the bits of each parameter, of a DTensor of this rank's shard.

    The version of a DTensor does not count the steps of most optimizers.
    """
    types = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = []
    for parameter in parameters:
        bits = local(parameter).contiguous().view(-1).view(types[parameter.element_size()])
        total, size = torch.zeros((), dtype=torch.int64, device=bits.device), chunk_size(bits.device)
        for start, part in zip(range(0, len(bits), size), bits.split(size), strict=False):
            places = torch.arange(2 * start + 1, 2 * (start + len(part)), 2, device=bits.device)  # odd: none is lost
            total += (part.long() * places).sum()
        sums.append(total)
    return torch.stack(sums).tolist()


def reshard(module: nn.Module) -> None:
    """Free the gathered weights that FSDP keeps after a forward pass, so that the next one gathers the shards again.

    To be called between two passes: one that ended in an error is given up first, or FSDP would wait for the rest of it
    and go on with the weights that it gathered.
    """
    states = _fsdp_states(module)
    if any(required(group, "_training_state").name != "IDLE" for _, group in states):
        _give_up(states)
    parts: Any = module.modules()
    for part in parts:
        if hasattr(part, "reshard") and hasattr(part, "unshard"):
            part.reshard()


@contextmanager
def reduced_gradients(module: nn.Module) -> Iterator[None]:
    """Let backward passes reduce gradients into `.grad` of the shards, and put aside what is there.

    Also where gradients are being accumulated without communication: FSDP keeps these apart from `.grad`.
    """
    reshard(module)
    kept: list[tuple[Any, str, Any, Any]] = [(p, "grad", p.grad, None) for p in module.parameters()]
    for group in fsdp_groups(module):
        for name, inside in (("reduce_grads", True), ("all_reduce_grads", True), ("_partial_reduce_output", None)):
            kept.append((group, name, required(group, name), inside))
        for of_fsdp in required(group, "fsdp_params"):
            name, gathered = "unsharded_accumulated_grad", getattr(of_fsdp, "_unsharded_param", None)
            kept.append((of_fsdp, name, required(of_fsdp, name), None))
            if gathered is not None:  # after the first forward pass
                kept.append((gathered, "grad", gathered.grad, None))
    try:
        for owner, name, _, inside in kept:
            setattr(owner, name, inside)
        yield
    finally:
        reshard(module)
        for owner, name, before, _ in kept:
            setattr(owner, name, before)


def tensor_parallel_groups(module: nn.Module) -> list[Any]:
    """Return the process groups of this rank's mesh axes along which FSDP does not run: these ranks share batches."""
    of_fsdp = {
        id(one.sharded_param): group.mesh_info.mesh.ndim
        for group in fsdp_groups(module)
        for one in required(group, "fsdp_params")
    }
    found = {}
    for parameter in module.parameters():
        mesh: Any = getattr(parameter, "device_mesh", None)
        for axis in range(of_fsdp.get(id(parameter), 0), mesh.ndim if mesh is not None else 0):
            if mesh.size(axis) > 1:
                group = mesh.get_group(axis)
                found[group.group_name] = group
    return list(found.values())


def _give_up(states: Sequence[tuple[Any, Any]]) -> None:
    """Let FSDP forget a pass that ended in an error, as its own method does where there is one (PyTorch 2.13)."""
    if states[0][1].device.type == "cuda":  # collectives that are under way
        torch.cuda.synchronize()
    for state, group in states:
        idle = type(group._training_state).IDLE
        state._training_state = group._training_state = idle
        group._all_gather_result = group._reshard_after_forward_event = None
        group._post_forward_indices.clear()
        context, communication = state._state_ctx, group.comm_ctx
        context.iter_forward_root, context.post_backward_final_callback_queued = None, False
        communication.all_gather_state = None
        communication.post_forward_order.clear()
        if hasattr(state, "_modules_to_run_forward"):
            state._modules_to_run_forward.clear()


def fsdp_groups(module: nn.Module) -> list[Any]:
    """Return what FSDP2 knows of the parameters that it gathers together."""
    return [group for _, group in _fsdp_states(module)]


def _fsdp_states(module: nn.Module) -> list[tuple[Any, Any]]:
    """Return the state of each part of a module that FSDP2 runs, with what it knows of parameters gathered together."""
    found: list[tuple[Any, Any]] = []
    parts: Any = module.modules()
    for part in parts:
        if hasattr(part, "reshard") and hasattr(part, "unshard"):
            state = required(part, "_get_fsdp_state")()
            several = getattr(state, "_fsdp_param_groups", None)  # since PyTorch 2.12 or so
            groups = [required(state, "_fsdp_param_group")] if several is None else several
            found += [(state, group) for group in groups if group is not None]
    return found


def summed(tensor: Tensor) -> Tensor:
    """Return the sum over all ranks, in place."""
    if distributed.get_world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def _rank() -> int:
    return distributed.get_rank()


def _blocks(layout: Layout, parameters: Sequence[Tensor]) -> tuple[list[_Block], int]:
    """Return this rank's block of each parameter, and what tells this numbering from that of the flat vector, or 0."""
    mine = [_place(parameter) for parameter in parameters]
    everywhere: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everywhere, mine)
    blocks, start, by_rows = [], 0, True
    for i, (name, shape) in enumerate(zip(layout.names, layout.shapes, strict=True)):
        ranks: dict[tuple, list[int]] = {}
        for rank, places in enumerate(everywhere):
            ranks.setdefault(places[i], []).append(rank)
        sizes = {place: size for place in ranks if (size := torch.Size(place[1]).numel())}
        by_rows &= all(tuple(part[1:]) == tuple(shape[1:]) for _, part in sizes)
        if sum(sizes.values()) != shape.numel():
            raise TypeError(
                f"parameter {name} is sharded as {getattr(parameters[i], 'placements', 'whole')}, whose parts have "
                f"{sum(sizes.values()):,} of its {shape.numel():,} numbers; shard it by rows or columns."
            )
        place, ends = mine[i], itertools.accumulate(sizes[place] for place in sorted(sizes))
        starts = {place: start + end - sizes[place] for place, end in zip(sorted(sizes), ends, strict=True)}
        blocks.append(_Block(starts.get(place, start), sizes.get(place, 0), tuple(ranks[place])))
        start += shape.numel()
    every = [[places[i] for places in everywhere] for i in range(len(parameters))]
    return blocks, 0 if by_rows else content_hash(every) | 1


def _place(parameter: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return where this rank's shard begins along each axis, and its shape."""
    if not hasattr(parameter, "placements"):
        return (0,) * parameter.ndim, tuple(parameter.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # loaded with DTensor anyway

    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, tuple(parameter.placements)
    )
    return tuple(offset), tuple(shape)


def _groups(wanted: set[tuple[int, ...]]) -> dict[tuple[int, ...], Any]:
    """Return a process group for each set of ranks that share numbers."""
    everywhere: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everywhere, sorted(ranks for ranks in wanted if len(ranks) > 1))
    return {ranks: _group(ranks, distributed.group.WORLD) for ranks in sorted(set(itertools.chain(*everywhere)))}


@functools.lru_cache(maxsize=64)
def _group(ranks: tuple[int, ...], whole: Any) -> Any:
    """Return a process group of these ranks, made once; all ranks of the whole group call this."""
    return whole if len(ranks) == whole.size() else distributed.new_group(list(ranks))
