"""The files of a store: what each contains, and how it is written.

    spec.json                                       which store this is (a UUID), and the sketch of what its rows are
    attempts/00000003.json                          run 3: its stage, and the run that it resumes
    generation.json                                 which snapshot is the store now: 1 is rows/, 2 is rows-2/, ...
    rows/r00002/a00000003/00000017.safetensors      the 18th file of rows (a shard) of rank 2 in run 3
    rows/manifests/r00002-a00000003.json            how many shards rank 2 has committed in run 3, the last one's seal
    curvature/                                      see `attribution.Curvature`
    preconditioner/3fa9c04417be21d8/                see `attribution.Preconditioner`
    store.lock, rows/r00002/a00000003/writer.lock   held while the store, or this rank's run, is changed

Every file but the locks has a checksum and the UUID, and each shard has the seal of the one before it, so that a file
that is missing, changed or exchanged is seen. A shard is committed once it is in place; its manifest follows, and is
behind by one shard if the writer was killed in between. Format 1, of the first version, had no UUID and no manifests;
such stores are read as they are, and get both before anything is written to them.

Each row in float16 has a scale, its largest magnitude, so that gradients of any size fit. Rounding: 2^-9 of a number in
bfloat16, 2^-11 of the largest number of the row in float16.
"""

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_sketch._files import (
    CorruptFile,
    TensorFile,
    check_folder,
    check_place,
    checksum,
    locked,
    make_folder,
    read_document,
    write_document,
    write_tensors,
)
from lightning_sketch.store.sketched_gradients import Column, SketchedGradients, Strings
from lightning_sketch.store.spec import DTYPES, Dtype, StoreSpec

RunStage = Literal["fit", "validate", "test", "predict"]

LOCK, WRITER_LOCK = "store.lock", "writer.lock"
FOLDERS = re.compile(r"r\d{5}"), re.compile(r"a\d{8}")  # of a rank, and in it of a run
SHARD = re.compile(r"r(\d{5})/a(\d{8})/(\d{8})\.safetensors")
MANIFEST = re.compile(r"r(\d{5})-a(\d{8})\.json")

_FORMAT = 2
FOREVER = 1 << 62
_VERSIONS = ("torch", "pytorch-lightning", "safetensors", "lightning-sketch")
_SKETCHES, _SCALE = "sketches", "scale"
_KEYS, _TEXTS = ".keys", ".texts"  # of a column of strings


class CorruptShard(CorruptFile):
    """Raised if a file of rows is not what was written."""


@dataclass(frozen=True)
class Snapshot:
    """What a store consists of at a moment: compaction replaces it by another one.

    Args:
        path: The folder of the store.
        spec: The spec of its rows.
        store: The UUID of the store; empty in format 1.
        number: 1, 2, ...: how often the store was compacted, plus 1.
        kept: The last step of each fit that compaction has kept, by run, -1 if no row; other fits are complete.
        settled: The ranks that have rows, for each run that was there at the last compaction; later runs have files of
            all their ranks.
    """

    path: Path
    spec: StoreSpec
    store: str
    number: int = 1
    kept: Mapping[int, int] = field(default_factory=dict)
    settled: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Snapshot":
        """Read which snapshot is the current one.

        Raises:
            FileNotFoundError: if the folder has no store.
            CorruptFile: if a file of the store is not what was written.
            ValueError: if a later version of lightning_sketch has written the store.
        """
        file, generation = path / "spec.json", path / "generation.json"
        try:
            found = read_document(file, {"format": int}, sealed=False)["format"]
        except (FileNotFoundError, NotADirectoryError) as error:
            if generation.exists():
                what = "it lost its spec.json; restore that"
            elif path.is_file():
                what = "it is a file, and a store is a folder"
            elif path.exists():
                what = "it has no spec.json"
            else:
                what = "there is no such folder (that of fast_dev_run is deleted at the end of its process)"
            raise FileNotFoundError(f"{path} has no store, since {what}; pass the writer's dirpath.") from error
        if found not in (1, _FORMAT):
            raise ValueError(
                f"{path} has format {found}, this version of lightning_sketch reads 1 and {_FORMAT}; install the "
                "version that wrote it."
            )
        sealed = found > 1
        types: dict[str, Any] = {"sketch": dict, "layout": list, "dtype": str, "normalization": str, "left_out": dict}
        types |= {"contribution": bool} | ({"store": str} if sealed else {})
        fields = read_document(file, types, sealed=sealed)
        store = fields.pop("store", "")
        try:
            spec = StoreSpec(**fields)
            repr(spec)  # builds the sketch and the layout
        except (ValueError, TypeError, KeyError, OverflowError, RuntimeError) as error:
            raise CorruptFile(f"{file} has a spec of no rows that are known here: {str(error)[:300]}") from error
        if not sealed and not generation.exists():
            return cls(path, spec, store)
        try:
            expected = {"store": store} if sealed else {}
            types = {"generation": int, "kept": dict} | ({"settled": dict} if sealed else {})
            now = read_document(generation, types, expected, sealed=sealed)
        except FileNotFoundError as error:
            raise CorruptFile(f"{generation} is missing; restore it from a copy.") from error
        kept, settled = now["kept"], now.get("settled", {})
        steps = all(run.isdecimal() and isinstance(step, int) and step >= -1 for run, step in kept.items())
        ranks = all(run.isdecimal() and isinstance(found, list) for run, found in settled.items())
        whole = ranks and all(isinstance(rank, int) for found in settled.values() for rank in found)
        if not steps or not whole or any(step < 0 and settled.get(run) for run, step in kept.items()):
            raise CorruptFile(f"{generation} has {str(kept)[:60]} and {str(settled)[:60]}, no steps and ranks of runs.")
        by_run = [{int(run): value for run, value in found.items()} for found in (kept, settled)]
        return cls(path, spec, store, now["generation"], *by_run)

    @cached_property
    def folder(self) -> Path:
        """The folder of the rows."""
        return self.path / ("rows" if self.number == 1 else f"rows-{self.number}")

    def manifest(self, rank: int, run: int) -> "Manifest":
        """Read the manifest of a rank's run, which counts no shard if there is none.

        Raises:
            CorruptFile: if it is not what was written, or of another store or place.
        """
        path = self.folder / Manifest.path(rank, run)
        try:
            types = {"files": int, "rows": int, "seal": str, "doubted": int}
            expected = {"store": self.store, "generation": self.number, "run": run, "rank": rank}
            return Manifest(**read_document(path, types, expected, defaults={"doubted": 0}))
        except FileNotFoundError:
            return Manifest()

    def write(self) -> None:
        """Make this snapshot the current one."""
        fields: dict[str, Any] = {"store": self.store, "generation": self.number}
        fields |= {"kept": {str(run): step for run, step in self.kept.items()}}
        fields |= {"settled": {str(run): list(ranks) for run, ranks in self.settled.items()}}
        write_document(self.path / "generation.json", fields)

    def write_spec(self) -> None:
        """Write spec.json, with the versions of the libraries."""
        versions = {name: _version(name) for name in _VERSIONS}
        fields = {**asdict(self.spec), "format": _FORMAT, "store": self.store, "versions": versions}
        write_document(self.path / "spec.json", fields)


@dataclass(frozen=True)
class Manifest:
    """What one rank has committed in a run.

    Args:
        files: The number of its shards.
        rows: The number of their rows.
        seal: The seal of the last one; empty if there is none.
        doubted: The number of its first shards whose rows turned out later to have an unknown scale.
    """

    files: int = 0
    rows: int = 0
    seal: str = ""
    doubted: int = 0

    @staticmethod
    def path(rank: int, run: int) -> Path:
        """Return the path of a manifest, relative to the folder of the rows."""
        return Path("manifests", f"r{rank:05d}-a{run:08d}.json")

    def write(self, snapshot: Snapshot, rank: int, run: int, *, once: bool = False) -> None:
        """Write the manifest of a rank's run, with `once` unless there is one; a vanished folder is an error."""
        fields = {"store": snapshot.store, "generation": snapshot.number, "run": run, "rank": rank, **asdict(self)}
        write_document(snapshot.folder / self.path(rank, run), fields, once=once, new_folders=False)


@dataclass(frozen=True)
class Run:
    """A run of a Trainer that writes rows.

    Args:
        number: 1, 2, ... in the order in which runs began.
        stage: "fit", "validate", "test" or "predict".
        parent: Number of the fit that this one resumes, or at whose weights this one takes its rows, if it is known.
        parent_step: Optimizer steps done at the checkpoint that this run resumes from.
        world_size: Number of processes that write.
        id: A UUID, which tells the run from one of equal number in a copy of the store; empty in format 1.
        origin: The id of the run whose checkpoint this one continues without its rows, as its store was lost.
        incomplete: Whether rows could not be written, and the fit went on without.
        optimizer: The classes of the optimizers, separated by commas, such as "AdamW"; empty if unknown.
        arguments: What the rows were computed with, as far as it is not the default; functions by name.
    """

    number: int
    stage: RunStage = "fit"
    parent: int | None = None
    parent_step: int | None = None
    world_size: int = 1
    id: str = ""
    origin: str | None = None
    incomplete: bool = False
    optimizer: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def write(self, snapshot: Snapshot, *, once: bool = False) -> bool:
        """Write the record of the run; with `once` only if the number is free. Return whether it was written."""
        fields = {**asdict(self), "store": snapshot.store}
        return write_document(run_path(snapshot.path, self.number), fields, once=once)


def begin_run(
    path: Path,
    stage: RunStage,
    parent: int | None = None,
    parent_step: int | None = None,
    world_size: int = 1,
    origin: str | None = None,
    optimizer: str = "",
    arguments: Mapping[str, Any] | None = None,
) -> Run:
    """Record a new run under the next free number; see `RowStore.begin_run`, and for `origin` `Run`."""
    if stage not in get_args(RunStage):
        raise ValueError(f"stage={stage!r} does not write a run; use one of {', '.join(get_args(RunStage))}.")
    if world_size < 1:
        raise ValueError(f"need world_size >= 1, got {world_size}.")
    snapshot = Snapshot.read(path)
    if not snapshot.store:
        snapshot = create_store(path, snapshot.spec)
    run = Run(
        0,
        stage,
        parent,
        parent_step,
        world_size,
        str(uuid.uuid4()),
        origin,
        optimizer=optimizer,
        arguments=arguments or {},
    )
    with locked(path / LOCK):  # compaction keeps the lineage of the latest fit, so this one comes before or after it
        return _numbered(run, Snapshot.read(path))


def _numbered(run: Run, snapshot: Snapshot) -> Run:
    """Record a run under the next free number, after empty manifests, so that missing ones are known to be lost."""
    parent, parent_step, path = run.parent, run.parent_step, snapshot.path
    known = {run.number for run in read_runs(snapshot)}
    if parent is not None and parent not in known:
        raise ValueError(
            f"the checkpoint resumes run {parent}, which is not in {path} (it has {sorted(known)}); use the folder "
            "that was written when the checkpoint was saved, or another one, where a new lineage begins."
        )
    kept = FOREVER if parent is None else snapshot.kept.get(parent, FOREVER)
    if run.stage == "fit" and parent is not None and (FOREVER if parent_step is None else parent_step) > kept:
        at = "its end" if parent_step is None else f"step {parent_step}"
        left = "no rows of that run" if kept < 0 else f"only the first {kept} steps of that run"
        raise ValueError(
            f"the checkpoint resumes run {parent} at {at}, but compact() has kept {left}, since it keeps what the "
            "latest fit resumed from; use a later checkpoint, or another folder."
        )
    number = max(known, default=0)
    while True:
        run = replace(run, number=(number := number + 1))
        for rank in range(run.world_size):
            Manifest().write(snapshot, rank, number, once=True)
        if run.write(snapshot, once=True):  # else, where there are no locks, another process was quicker
            return run


def read_runs(snapshot: Snapshot) -> list[Run]:
    """Read all runs of a store, in order of their numbers.

    Raises:
        CorruptFile: if a file is missing, or not what was written.
    """
    folder = snapshot.path / "attempts"
    check_folder(folder)
    files, sealed = sorted(folder.glob("*.json")), snapshot.store != ""
    runs: list[Run] = []
    number_or_none = int | None
    types = {"number": int, "stage": str, "parent": number_or_none, "parent_step": number_or_none, "world_size": int}
    types |= (
        {"id": str, "origin": str | None, "incomplete": bool, "optimizer": str, "arguments": dict} if sealed else {}
    )
    for file in files:
        place = run_path(snapshot.path, len(runs) + 1)
        if file != place:
            raise CorruptFile(f"{place} is missing, or {file} is not a file of a store; restore it from a copy.")
        expected = {"number": len(runs) + 1} | ({"store": snapshot.store} if sealed else {})
        found = read_document(file, types, expected, defaults={"optimizer": "", "arguments": {}}, sealed=sealed)
        older = found["parent"] is None or 1 <= found["parent"] < found["number"]  # so that there is no cycle
        if found["stage"] not in get_args(RunStage) or not older:
            raise CorruptFile(f"{file} has stage {found['stage']} and parent {found['parent']}, which cannot be.")
        runs.append(Run(**found))
    return runs


def store_id(path: Path) -> str:
    """Return the UUID of the store in a folder; empty if there is none, or it is of format 1."""
    try:
        found = read_document(path / "spec.json", {"format": int}, sealed=False)["format"]
    except FileNotFoundError:
        return ""
    return "" if found == 1 else read_document(path / "spec.json", {"store": str})["store"]


def create_store(path: Path, spec: StoreSpec) -> Snapshot:
    """Create a store in a folder, or return that which the folder has, if its spec is equal; see `RowStore.create`."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, where the folder of a store is to be; pass another dirpath.")
    make_folder(path)
    with locked(path / LOCK):
        try:
            snapshot = Snapshot.read(path)
        except FileNotFoundError:
            # no files yet if creation was interrupted, whose last step is spec.json
            own = {"attempts": "attempts/[0-9]*.json", "rows": "rows*/**/*.safetensors"}
            left = [name for name, pattern in own.items() if any(path.glob(pattern))]
            if left:
                raise CorruptFile(
                    f"{path} has parts of a store ({', '.join(left)}) but no spec.json; restore it, use another "
                    "folder, or overwrite=True, which deletes the rows that are there."
                ) from None
            snapshot = Snapshot(path, spec, str(uuid.uuid4()))
            make_folder(snapshot.folder / "manifests")
            snapshot.write()
            snapshot.write_spec()
            return snapshot
        spec.check_equal(snapshot.spec, path)
        return snapshot if snapshot.store else _upgraded(snapshot)


def _upgraded(old: Snapshot) -> Snapshot:
    """Give a store of format 1 a UUID and manifests; killed at any point, it has one of the formats and its rows."""
    runs = read_runs(old)
    shards: dict[tuple[int, int], list[Shard]] = {}
    for file in sorted(old.folder.glob("r*/a*/*.safetensors")):
        shard = Shard(old, ShardName.of(file))
        shards.setdefault((shard.name.rank, shard.name.run), []).append(shard)
    settled = {run.number: sorted(rank for rank, number in shards if number == run.number) for run in runs}
    snapshot = replace(old, store=str(uuid.uuid4()), settled=settled)
    make_folder(snapshot.folder / "manifests")
    for (rank, number), own in shards.items():
        Manifest(own[-1].name.sequence + 1, sum(map(len, own)), own[-1].seal).write(snapshot, rank, number)
    for run in runs:
        run.write(snapshot)
    snapshot.write()
    snapshot.write_spec()
    return snapshot


@dataclass(frozen=True, order=True)
class ShardName:
    """The name of a file of rows: which process of which run wrote it, and as which of its files.

    Args:
        run: Number of the run.
        rank: Rank of the process.
        sequence: 0, 1, ... in the order of writing.
    """

    run: int
    rank: int
    sequence: int

    @property
    def path(self) -> Path:
        """The path of the file, relative to the folder of the rows."""
        return Path(f"r{self.rank:05d}", f"a{self.run:08d}", f"{self.sequence:08d}.safetensors")

    @classmethod
    def of(cls, path: Path) -> "ShardName":
        """Parse a path; the inverse of the property `path`.

        Raises:
            CorruptShard: if no store names a file so.
        """
        found = SHARD.fullmatch("/".join(path.parts[-3:]))
        if found is None:
            raise CorruptShard(f"{path} is not a file of a store; move it away.")
        rank, run, sequence = map(int, found.groups())
        return cls(run, rank, sequence)


def write_shard(snapshot: Snapshot, name: ShardName, rows: SketchedGradients, previous: str) -> str:
    """Write rows, which are on the CPU and in the spec's type, as one file, atomically, and return its seal.

    Args:
        snapshot: The snapshot that the file belongs to.
        name: The name of the file, in an existing folder.
        rows: The rows.
        previous: The seal of the writer's file before, empty for its first.

    Raises:
        OSError: if the disk is full or the folder cannot be written; no file is left then.
    """
    tensors: dict[str, Tensor] = {_SKETCHES: rows.sketches}
    for key, column in rows.columns.items():
        if isinstance(column, Strings):
            distinct = Strings.of(sorted(set(column.tolist())))
            tensors |= {key: column.hashes, key + _KEYS: distinct.tables[0][0], key + _TEXTS: distinct.tables[0][1]}
        else:
            tensors[key] = column
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    own = {key: tensor for key, tensor in tensors.items() if key != _SKETCHES}
    header = {"spec": snapshot.spec.id, "store": snapshot.store, "previous": previous}
    header["columns_crc32"] = checksum(own)  # so that an index need not read the sketches
    header |= {"attempt": str(name.run), "rank": str(name.rank), "sequence": str(name.sequence), "rows": str(len(rows))}
    return write_tensors(snapshot.folder / name.path, tensors, header, new_folders=False)


def narrowed(rows: SketchedGradients, dtype: Dtype) -> SketchedGradients:
    """Copy rows to the CPU in a stored type; a row that is not finite becomes zero, with the column `finite` False.

    >>> from lightning_sketch.operators import BlockSRHT
    >>> rows = narrowed(SketchedGradients(torch.tensor([[1e9, 5e8]]), BlockSRHT(9, 2)), "float16")
    >>> rows.sketches, rows.scale
    (tensor([[1.0000, 0.5000]], dtype=torch.float16), tensor([1.0000e+09]))
    """
    columns: dict[str, Column] = {
        key: column if isinstance(column, Strings) else column.detach().to("cpu", copy=True)
        for key, column in rows.columns.items()
    }
    sketches = rows.sketches.detach().to("cpu", copy=True)
    limit = torch.finfo(torch.float32 if dtype == "float16" else DTYPES[dtype]).max
    finite = (sketches.abs() <= limit).all(1)
    if not finite.all():
        sketches = sketches.where(finite[:, None], 0)
        columns["finite"] = rows.finite.cpu() & finite
    if dtype == "float16":
        if _SCALE in columns:
            raise ValueError("a column has the name 'scale', which float16 has for its own; rename it.")
        largest = sketches.abs().amax(1).float()
        scale = largest.where(largest > 0, 1.0)
        columns[_SCALE], sketches = scale, sketches / scale[:, None]
    return SketchedGradients(sketches.to(DTYPES[dtype]), rows.sketch, columns)


class Shard(TensorFile):
    """An open file of rows, read lazily: opening it reads the header only.

    Args:
        snapshot: The snapshot that it belongs to.
        name: The name of the file.
        manifest: The manifest of its rank's run; read when it is needed if None.

    Raises:
        FileNotFoundError: if there is no such file.
        CorruptShard: if the file is truncated, changed, or belongs to another store or place.
    """

    def __init__(self, snapshot: Snapshot, name: ShardName, manifest: Manifest | None = None):
        super().__init__(snapshot.folder / name.path, error=CorruptShard)
        self.name, self.snapshot, self.spec, self._manifest = name, snapshot, snapshot.spec, manifest
        expected = {"spec": snapshot.spec.id, "attempt": name.run, "rank": name.rank, "sequence": name.sequence}
        if "store" in self.header:  # not in format 1
            expected["store"] = snapshot.store
        check_place(self.path, self.header, {key: str(value) for key, value in expected.items()}, CorruptShard)

    def __len__(self) -> int:
        return int(self.header["rows"])

    def columns(self) -> dict[str, Column]:
        """Read all columns but the sketches and their scale, as copies, so that the file can be closed.

        Raises:
            CorruptShard: if a bit of them has changed; of format 1 only `check` sees that.
        """
        own = {key: self.tensor(key).clone() for key in self.shapes if key != _SKETCHES}
        if "columns_crc32" in self.header and self.header["columns_crc32"] != checksum(own):
            raise CorruptShard(f"{self.path}: its columns do not match their checksum; restore it from a copy.")
        found: dict[str, Column] = {}
        scaled = self.spec.dtype == "float16"  # else a column of that name is a user's
        for key, column in own.items():
            if key + _KEYS in own:
                found[key] = Strings(column, [(own[key + _KEYS], own[key + _TEXTS])])
            elif (key != _SCALE or not scaled) and not key.endswith((_KEYS, _TEXTS)):
                found[key] = column
        manifest = self._manifest or self.snapshot.manifest(self.name.rank, self.name.run)
        if self.name.sequence < manifest.doubted:
            found["scale_known"] = torch.zeros(len(self), dtype=torch.bool)
        return found

    def rows(self, places: slice | Tensor) -> SketchedGradients:
        """Read the rows at these positions."""
        columns = {key: column[places] for key, column in self.columns().items()}
        return SketchedGradients(self.sketches(places), self.spec.operator, columns)

    def sketches(self, places: slice | Tensor) -> Tensor:
        """Read the sketches at these positions: of a slice without a copy, or in float16 as float32 times the scale."""
        found, scale = self.scaled(places)
        return found if scale is None else found.float().mul_(scale[:, None])

    def scaled(self, places: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        """Read the sketches as they are stored, of a slice without a copy, and in float16 the scales of the rows."""
        keys = (_SKETCHES, _SCALE) if self.spec.dtype == "float16" else (_SKETCHES,)
        found = [self.tensor(key) for key in keys]
        # index_select copies whole rows, indexing copies number by number
        found = [x[places] if isinstance(places, slice) else x.index_select(0, places) for x in found]
        return found[0], found[1] if len(found) > 1 else None


def run_path(path: Path, number: int) -> Path:
    """Return the path of the record of a run."""
    return path / "attempts" / f"{number:08d}.json"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
