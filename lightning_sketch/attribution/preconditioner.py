"""A preconditioner of gradients, block by block of the parameters, and how it is kept on disk.

    rows and queries are S L g,  Lᵀ L = (P + lambda)⁻¹       so that their inner product is that of influence functions

kind       P of a matrix with the layer's bias                 P of other parameters
ekfac      (U ⊗ V) diag(E) (U ⊗ V)ᵀ, E = E (Uᵀ G V)²           diagonal, E g²
kfac       the same with E = a product of eigenvalues          diagonal, E g²
optimizer  diagonal, by which Adam and its like divide         the same

The damping is that of each block: lambda = c times the mean of its eigenvalues.

Source: George et al. (2018), "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis",
arXiv:1806.03884; Grosse et al. (2023), "Studying large language model generalization with influence functions",
arXiv:2308.03296, for influence by it; Choe et al. (2024), arXiv:2405.13954, and Chang et al. (2024), arXiv:2410.17413,
for whitening before a projection.
"""

import json
import struct
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_sketch._files import CorruptFile, TensorFile, check_folder, make_folder, read_document, write_document
from lightning_sketch._files import write_tensors as write_file
from lightning_sketch.autodiff.fingerprint import fingerprint, module_fingerprint, short
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.optimizer_state import divisors
from lightning_sketch.per_example.precondition import Block, Blocks, GradientMap, JointBias, Preconditioned
from lightning_sketch.store.format import store_id

Kind = Literal["ekfac", "kfac", "optimizer"]

FOLDER = "preconditioner"  # the folder of a store that has its preconditioners
DAMPING = 0.1

_DOCUMENT = "preconditioner.json"


@dataclass(frozen=True, eq=False, kw_only=True)
class Preconditioner:
    """A preconditioner of gradients: blocks that cover the parameters, each with a damping of its own.

    Made by `fit_preconditioner`, or by `from_optimizer`.

    Args:
        kind: "ekfac", "kfac" or "optimizer".
        fingerprint: Fingerprint of the weights at which it was taken; 0 if unknown.
        examples: The number of examples that it is a mean over; 0 for that of an optimizer.
        damping: The damping c of each block, in units of the mean of its eigenvalues.
        labels: "model" or "data", where the labels that it was fitted with come from; empty for that of an optimizer.
        blocks: The blocks of each parameter, by name.

    Raises:
        ValueError: if the damping is not positive.

    >>> from lightning_sketch.attribution import fit_preconditioner, sketch_gradients
    >>> from lightning_sketch.operators import BlockSRHT
    >>> module, batch = nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,)))
    >>> loss_fn = lambda module, batch: nn.functional.cross_entropy(module(batch[0]), batch[1])
    >>> p = fit_preconditioner(module, [batch], loss_fn=loss_fn)
    >>> p
    Preconditioner: ekfac of 2 parameters, 8 numbers, of 8 examples with labels of the model, damping 0.1 of each mean
    >>> rows = sketch_gradients(module, [batch], BlockSRHT(8, 4), loss_fn, preconditioner=p)
    """

    kind: Kind
    fingerprint: int
    examples: int
    damping: float = DAMPING
    labels: str = ""
    blocks: Blocks

    def __post_init__(self):
        if not 0 < self.damping < float("inf"):
            raise ValueError(
                f"damping={self.damping} of a preconditioner; it is a positive number, in units of the mean eigenvalue "
                f"of each block, such as {DAMPING}."
            )

    def __repr__(self) -> str:
        of = f", of {self.examples} examples with labels of the {self.labels}" if self.examples else ""
        return (
            f"Preconditioner: {self.kind} of {len(self.blocks)} parameters, {self.n} numbers{of}, damping "
            f"{self.damping:g} of each mean"
        )

    @classmethod
    def from_optimizer(
        cls,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        parameters: str | Sequence[str] = "*",
        damping: float = DAMPING,
    ) -> "Preconditioner":
        """Take the diagonal P by which an optimizer divides its steps, see `autodiff.optimizer_state`.

        Args:
            module: The module.
            optimizer: Adam, AdamW, NAdam, Adamax, RMSprop or Adagrad of PyTorch after some steps, or several of them.
            parameters: The parameters to cover, as shell patterns of their names.
            damping: The damping c. Without it a number whose gradient was always zero would be divided by epsilon.

        Returns:
            The preconditioner, with n numbers in memory.

        Raises:
            ValueError: if the optimizer is of another kind, or has no state yet for some parameters.
        """
        layout = Layout.of(module, parameters if isinstance(parameters, str) else list(parameters))
        several = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        found: dict[int, Tensor] = {}
        for one in several:
            found |= divisors(one)
        named = dict(zip(layout.names, layout.parameters(module), strict=True))
        missing = [name for name, parameter in named.items() if id(parameter) not in found]
        if missing:
            raise ValueError(
                f"the optimizer has no state of {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; train "
                "for a step, or load the checkpoint's, or leave these parameters out by parameters=...."
            )
        blocks = {name: [diagonal(found[id(parameter)])] for name, parameter in named.items()}
        weights = module_fingerprint(module)
        return cls(kind="optimizer", fingerprint=weights, examples=0, damping=damping, blocks=blocks)

    @property
    def n(self) -> int:
        """The number of scalars of all parameters that it covers."""
        return sum(block.eigenvalues.numel() for blocks in self.blocks.values() for block in blocks)

    @cached_property
    def id(self) -> int:
        """A number of 64 bits that identifies it, damping included; never 0. One pass over its numbers."""
        total = zlib.crc32(self.kind.encode())
        for name in sorted(self.blocks):
            tensors = [t for block in self.blocks[name] for t in (block.eigenvalues, block.left, block.right)]
            places = [(block.start, block.bias) for block in self.blocks[name]]
            total = (total * 0x9E3779B1 + zlib.crc32(f"{name} {places}".encode())) % (1 << 64)
            known = [tensor for tensor in tensors if tensor is not None]
            total = (total * 0x9E3779B1 + (fingerprint(known) if known else 0)) % (1 << 64)
        return fingerprint([torch.tensor([total - (1 << 63), _bits(self.damping)])])

    def damped(self, damping: float) -> "Preconditioner":
        """Return the same preconditioner with another damping; nothing is fitted again."""
        return replace(self, damping=damping)

    def to(self, device: torch.device | str) -> "Preconditioner":
        """Return the same preconditioner with its numbers in the memory of a device."""
        blocks = {name: [block.to(device) for block in own] for name, own in self.blocks.items()}
        return replace(self, blocks=blocks)

    def whiten(self, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Return L g: the gradients of parameters, by name, each times its part of L; None is zero.

        Raises:
            ValueError: if it does not cover a parameter.
        """
        self.check({name: g.shape for name, g in gradients.items() if g is not None}, set(gradients))
        return Preconditioned(self.blocks, self.damping, {}).gradients(gradients)

    def of(self, layout: Layout, weights: int) -> Callable[[Mapping[str, nn.Parameter]], GradientMap]:
        """Return a function from parameters by name to the map of their gradients.

        Args:
            layout: The parameters that it is to cover.
            weights: Fingerprint of the present weights.

        Raises:
            ValueError: if it was taken at other weights, or does not cover them.
        """
        if self.fingerprint and weights and self.fingerprint != weights:
            raise ValueError(
                f"the preconditioner was taken at weights {short(self.fingerprint)}, the module has {short(weights)}: "
                "queries and rows need one, taken at their weights; load that checkpoint, or fit it again."
            )
        self.check(dict(zip(layout.names, layout.shapes, strict=True)))
        return partial(Preconditioned, self.blocks, self.damping)

    def check(self, shapes: Mapping[str, torch.Size], zero: Collection[str] = ()) -> None:
        """Refuse parameters that it does not cover.

        Args:
            shapes: The shapes of the parameters, by name.
            zero: The names of more parameters, whose gradients are zero.

        Raises:
            ValueError: if one is missing, or has another size.
        """
        sizes: dict[str, int] = {}
        alone: list[str] = []
        for name, own in self.blocks.items():
            for block in own:
                rows, columns = block.shape
                sizes[name] = sizes.get(name, 0) + rows * columns
                if block.bias is not None:
                    side = rows if block.bias.side == "left" else columns
                    sizes[block.bias.name] = sizes.get(block.bias.name, 0) + side
                    for one, other in ((name, block.bias.name), (block.bias.name, name)):
                        alone += [one] * (one in shapes and other not in shapes and other not in zero)
        wrong = [name for name, shape in shapes.items() if sizes.get(name) != shape.numel() or name in alone]
        if wrong:
            raise ValueError(
                f"the preconditioner does not cover {', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}; fit it "
                "with the parameters of the rows: fit_preconditioner(module, batches, parameters=...)."
            )

    def save(self, folder: str | Path) -> Path:
        """Write the preconditioner into a folder of its own below this one, a file for each parameter.

        Returns:
            The folder, whose name is the `id`. It is complete once its document is there, which comes last.

        Raises:
            OSError: if the disk is full or the folder cannot be written.
        """
        path = _path(Path(folder), self.id)
        store = store_id(path.absolute().parents[1])
        make_folder(path)
        if store:
            check_folder(path)  # a link would be written through
        seals = []
        for i, blocks in enumerate(self.blocks.values()):
            if not blocks:  # a bias that is in the blocks of a matrix
                seals.append("")
                continue
            tensors: dict[str, Tensor] = {}
            for k, block in enumerate(blocks):
                parts = {"eigenvalues": block.eigenvalues, "left": block.left, "right": block.right}
                tensors |= {f"{k}.{part}": t.detach().cpu() for part, t in parts.items() if t is not None}
            header = {"store": store, **{f"{k}.start": str(block.start) for k, block in enumerate(blocks)}}
            joint = {f"{k}.bias": block.bias for k, block in enumerate(blocks) if block.bias is not None}
            header |= {key: json.dumps(asdict(bias)) for key, bias in joint.items()}
            seals.append(write_file(_file(path, i), tensors, header))
        fields = {"kind": self.kind, "fingerprint": str(self.fingerprint), "examples": self.examples, "store": store}
        fields["labels"] = self.labels
        write_document(
            path / _DOCUMENT, {**fields, "damping": self.damping, "names": list(self.blocks), "seals": seals}
        )
        return path

    @classmethod
    def load(cls, folder: str | Path, id: int) -> "Preconditioner":
        """Open a preconditioner that `save` wrote; its numbers are read when they are used, a parameter at a time.

        Args:
            folder: The folder that was given to `save`.
            id: The `id` of the preconditioner.

        Raises:
            FileNotFoundError: if there is none.
            CorruptFile: if a file is not what was written.
        """
        return cls.read(_path(Path(folder), id))

    @classmethod
    def stored(cls, folder: Path) -> Iterator[Path]:
        """Yield the folders below this one that `save` wrote to their end, in the order of their names."""
        yield from sorted(document.parent for document in folder.glob(f"*/{_DOCUMENT}"))

    @classmethod
    def read(cls, path: Path, *, check: bool = False) -> "Preconditioner":
        """Open the preconditioner in a folder that `save` returned, with `check` after reading all of it.

        Raises:
            FileNotFoundError: if there is none.
            CorruptFile: if a file is not what was written.
        """
        types: dict[str, Any] = {"kind": str, "fingerprint": str, "examples": int, "damping": float}
        types |= {"names": list, "seals": list, "store": str, "labels": str}
        found = read_document(path / _DOCUMENT, types, {"store": store_id(path.absolute().parents[1])})
        blocks = _StoredBlocks(path, found["names"], found["seals"])
        if check:
            blocks.check()
        weights = int(found["fingerprint"])
        own = {"kind": found["kind"], "fingerprint": weights, "examples": found["examples"], "labels": found["labels"]}
        result = cls(**own, damping=found["damping"], blocks=blocks)
        result.__dict__["id"] = _id(path)  # else all of it would be read
        return result


class _StoredBlocks(Mapping[str, Sequence[Block]]):
    """Blocks in files, each read when it is asked for.

    Args:
        path: The folder.
        names: The names of the parameters, in the order of their files.
        seals: The seals of the files.
    """

    def __init__(self, path: Path, names: Sequence[str], seals: Sequence[str]):
        self.path, self.names, self.seals = path, names, seals
        self.places = {name: i for i, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> Sequence[Block]:
        blocks: list[Block] = []
        if not self.seals[self.places[name]]:
            return blocks
        file = self._file(name)
        while f"{len(blocks)}.start" in file.header:
            k = len(blocks)
            parts = (f"{k}.{part}" for part in ("left", "right"))
            left, right = (file.tensor(key) if key in file.shapes else None for key in parts)
            bias = JointBias(**json.loads(file.header[f"{k}.bias"])) if f"{k}.bias" in file.header else None
            blocks.append(Block(int(file.header[f"{k}.start"]), file.tensor(f"{k}.eigenvalues"), left, right, bias))
        return blocks

    def check(self) -> None:
        """Compare all files with their checksums."""
        for name in self.names:
            if self.seals[self.places[name]]:
                self._file(name).check()

    def _file(self, name: str) -> TensorFile:
        path = _file(self.path, self.places[name])
        try:
            file = TensorFile(path)
        except FileNotFoundError as error:
            raise CorruptFile(f"{path} is missing; restore it from a copy, or fit the preconditioner again.") from error
        if file.seal != self.seals[self.places[name]]:
            raise CorruptFile(f"{path} is not the file that was written; restore it, or fit the preconditioner again.")
        return file


def diagonal(values: Tensor) -> Block:
    """Return the block of a parameter whose preconditioner is diagonal."""
    return Block(0, values.detach().reshape(1, -1))


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _path(folder: Path, id: int) -> Path:
    return folder / f"{id % (1 << 64):016x}"


def _id(path: Path) -> int:
    found = int(path.name, 16)
    return found - (1 << 64) if found >= 1 << 63 else found


def _file(path: Path, place: int) -> Path:
    return path / f"{place:05d}.safetensors"
