"""The index of a store: the columns and the place of every row, without its sketch, and which rows are visible.

A fit that resumes from a checkpoint has a parent: the run that was writing when the checkpoint was saved, and the step
of the checkpoint. The lineage of a fit is the chain of runs that it resumed through. A row of a run in the lineage is
visible if its step is not beyond the steps at which the later runs branched off:

    visible(row) = row.step <= min of run.parent_step over the later runs of the lineage

so each step of a lineage has its rows exactly once. A run that measures a checkpoint (validate, test, predict) has the
fit of the checkpoint as its parent, if that is known, and its rows are visible where those of the fit's same step are.
Of several such runs in one stage at the same weights the rows of other examples add up, as of a data set that was
written in parts, and of an example (the same id and loader) the last run's are visible. Examples without ids cannot be
told apart: a run that has such rows hides those of all runs before it, and any later run hides these. Runs are ordered
by number, not by clock.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import cast, get_args

import torch
from torch import Tensor

from lightning_sketch._files import CorruptFile, check_folder
from lightning_sketch.store.format import (
    FOLDERS,
    FOREVER,
    MANIFEST,
    CorruptShard,
    Manifest,
    Run,
    RunStage,
    Shard,
    ShardName,
    Snapshot,
    run_path,
)
from lightning_sketch.store.sketched_gradients import DEFAULTS, UNKNOWN_ID, Column, cat_columns, keys_of


@dataclass
class Inventory:
    """The shards of a snapshot, and what is wrong with its files.

    Args:
        missing: The files that were written and are not there, in words.
        wrong: What else is not as it was written.
    """

    missing: list[str] = field(default_factory=list)
    wrong: list[CorruptFile] = field(default_factory=list)

    def problems(self) -> list[str]:
        """Return all that is not as it was written, in words."""
        gone = [f"{name} is missing: it was written, and is gone." for name in self.missing]
        return [str(error) for error in self.wrong] + gone

    @classmethod
    def of(cls, snapshot: Snapshot, runs: Sequence[Run], visit: Callable[[Shard], object]) -> "Inventory":
        """Open the shards of a snapshot, one at a time, and compare them with its manifests and runs.

        Args:
            snapshot: The snapshot.
            runs: The runs of the store.
            visit: Called with each shard that can be opened, ordered by run, rank and time; may find it corrupt.
        """
        found = cls()
        try:
            check_folder(snapshot.folder)
        except CorruptFile as error:
            found.wrong.append(error)
            return found
        if snapshot.store and not snapshot.folder.exists():
            found.wrong.append(CorruptFile(f"{snapshot.folder} is missing, with all rows; restore it from a copy."))
        manifests = found._manifests(snapshot)  # read first: a writer who goes on meanwhile makes no shard missing
        written = found._written(snapshot.folder)
        for run, rank in sorted({*manifests, *written}):
            folder = (snapshot.folder / ShardName(run, rank, 0).path).parent
            own, manifest = written.get((run, rank), set()), manifests.get((run, rank), Manifest())
            place = snapshot.folder / Manifest.path(rank, run)
            if run > len(runs):  # began after the runs were read, or did not begin
                if not run_path(snapshot.path, run).exists() and (own or manifest.files):
                    lost = f"{folder} has rows of run {run}, whose record {run_path(snapshot.path, run)} is missing."
                    found.wrong.append(CorruptFile(lost))
            elif snapshot.store and (run, rank) not in manifests and not place.exists():
                found.wrong.append(CorruptFile(f"{place} is missing; restore it from a copy."))
            else:
                found._compare(snapshot, run, rank, manifest, own, visit)
        if snapshot.store:
            for begun in runs:
                for rank in snapshot.settled.get(begun.number, range(begun.world_size)):
                    if (begun.number, rank) not in {*manifests, *written}:
                        found.missing.append(f"all of rank {rank} in run {begun.number} in {snapshot.folder}")
        return found

    def _manifests(self, snapshot: Snapshot) -> dict[tuple[int, int], Manifest]:
        """Read the manifests, by run and rank."""
        found = {}
        folder = snapshot.folder / "manifests"
        for name in self._names(folder) if snapshot.store else ():
            matched = MANIFEST.fullmatch(name)
            if matched is not None:
                rank, run = map(int, matched.groups())
                found[run, rank] = Manifest()
                try:
                    found[run, rank] = snapshot.manifest(rank, run)
                except CorruptFile as error:
                    self.wrong.append(error)
        return found

    def _written(self, folder: Path) -> dict[tuple[int, int], set[int]]:
        """Return the numbers of the shards that are there, by run and rank."""
        found: dict[tuple[int, int], set[int]] = {}
        for rank in self._names(folder):
            for run in self._names(folder / rank) if FOLDERS[0].fullmatch(rank) else ():
                for name in self._names(folder / rank / run) if FOLDERS[1].fullmatch(run) else ():
                    if name.endswith(".safetensors"):
                        try:
                            shard = ShardName.of(folder / rank / run / name)
                            found.setdefault((shard.run, shard.rank), set()).add(shard.sequence)
                        except CorruptFile as error:
                            self.wrong.append(error)
        return found

    def _names(self, folder: Path) -> list[str]:
        """Return the names in a folder, none if it is missing; a link is wrong."""
        try:
            check_folder(folder)
            return sorted(os.listdir(folder))
        except FileNotFoundError:
            return []
        except CorruptFile as error:
            self.wrong.append(error)
            return []

    def _compare(
        self,
        snapshot: Snapshot,
        run: int,
        rank: int,
        manifest: Manifest,
        written: set[int],
        visit: Callable[[Shard], object],
    ) -> None:
        """Open the shards of a rank's run, and compare each with the one before it, and the last with the manifest."""
        count = max([manifest.files, *(number + 1 for number in written)])
        if count > len(written):
            first = next(i for i in range(count) if i not in written)
            others = f" and {count - len(written) - 1} more" if count > len(written) + 1 else ""
            self.missing.append(f"{snapshot.folder / ShardName(run, rank, first).path}{others}")
        seals = {-1: ""}
        for sequence in sorted(written):
            name = ShardName(run, rank, sequence)
            try:
                shard = Shard(snapshot, name, manifest)
                visit(shard)
            except FileNotFoundError:
                self.missing.append(str(snapshot.folder / name.path))
                continue
            except CorruptFile as error:
                self.wrong.append(error)
                continue
            before = shard.header.get("previous")  # not in format 1
            if before is not None and before != seals.get(sequence - 1, before):
                self.wrong.append(CorruptShard(f"{shard.path} or the file before it was exchanged; restore both."))
            if sequence == manifest.files - 1 and shard.seal != manifest.seal:
                self.wrong.append(CorruptShard(f"{shard.path} or its manifest was exchanged; restore both."))
            seals[sequence] = shard.seal


def read_index(
    snapshot: Snapshot, runs: Sequence[Run]
) -> tuple[list[str], dict[str, Column], list[ShardName], Tensor, Tensor]:
    """Read the index of all rows of a snapshot, visible or not, ordered by run, rank and time.

    Returns:
        The files that are missing; the columns; the names of the shards; for each row the index of its shard, and its
        position there.

    Raises:
        CorruptFile: if a file is truncated, changed, foreign, or has a name that no store uses.
    """
    nothing = torch.zeros(0, dtype=torch.int64)
    parts: list[dict[str, Column]] = []
    names: list[ShardName] = []

    def read(shard: Shard) -> None:
        names.append(shard.name)
        parts.append(shard.columns() | {"attempt": torch.full((len(shard),), shard.name.run)})

    inventory = Inventory.of(snapshot, runs, read)
    if len(inventory.wrong) > 1:
        raise CorruptShard(f"{len(inventory.wrong)} files are wrong:\n" + "\n".join(map(str, inventory.wrong)))
    if inventory.wrong:
        raise inventory.wrong[0]
    lengths = torch.tensor([len(part["attempt"]) for part in parts], dtype=torch.int64)
    file = torch.arange(len(lengths)).repeat_interleave(lengths)
    place = torch.arange(len(file)) - (lengths.cumsum(0) - lengths)[file]
    columns: dict[str, Column] = {name: torch.full((len(file),), value) for name, value in DEFAULTS.items()}
    columns |= cat_columns(parts) or {"attempt": nothing}
    return inventory.missing, columns, names, file, place


def lineage_of(
    runs: Sequence[Run], last: int | None = None, kept: Mapping[int, int] = MappingProxyType({})
) -> dict[int, int]:
    """Return the runs of a fit's lineage, in order, each with the last of its steps that is visible.

    Args:
        runs: All runs of a store.
        last: Number of the fit whose lineage it is; the latest if None.
        kept: As in `Snapshot`: fits that compaction has deleted are none of the store.

    Raises:
        ValueError: if there is no such fit.

    >>> lineage_of([Run(1), Run(2, parent=1, parent_step=50), Run(3, parent=1, parent_step=20)])[1]
    20
    """
    by_number = {run.number: run for run in runs}
    fits = [run.number for run in runs if run.stage == "fit" and kept.get(run.number, 0) >= 0]
    if last is not None and last not in fits:
        raise ValueError(f"lineage={last} is no fit of the store; its fits are {fits}; leave it out for the latest.")
    current = last if last is not None else max(fits, default=None)
    lineage, until = {}, FOREVER
    while current is not None:  # ends, since a parent has a smaller number
        lineage[current] = until
        run = by_number[current]
        until = min(until, FOREVER if run.parent_step is None else run.parent_step)
        current = run.parent
    return dict(sorted(lineage.items()))


def visible(columns: Mapping[str, Column], runs: Sequence[Run], lineage: Mapping[int, int]) -> Tensor:
    """Return a mask of the rows that are visible in a lineage.

    Args:
        columns: The columns of all rows of a store.
        runs: All runs of the store.
        lineage: The runs of the lineage, each with its last visible step, as `lineage_of` returns it.
    """
    number, step, weights = (cast(Tensor, columns[name]) for name in ("attempt", "step", "fingerprint"))
    until = torch.full((len(runs) + 1,), FOREVER)
    kinds = torch.zeros(len(runs) + 1, dtype=torch.long)
    for run in runs:
        fit = run.number if run.stage == "fit" else run.parent
        until[run.number] = FOREVER if fit is None else lineage.get(fit, -1)
        kinds[run.number] = get_args(RunStage).index(run.stage)
    keep = step <= until[number]
    (measured,) = (keep & (kinds[number] > 0) & (weights != 0)).nonzero(as_tuple=True)  # 0 is unknown
    taken, ids = number[measured], keys_of(columns["example_id"])[measured]
    loader = keys_of(columns.get("dataloader", torch.zeros_like(number)))[measured]
    pass_of = equal_rows(kinds[taken], weights[measured])  # over the examples, in one stage at the same weights
    unknown = ids == UNKNOWN_ID
    last_unknown = _last(pass_of, taken.where(unknown, 0))
    newest = torch.where(unknown, _last(pass_of, taken), _last(equal_rows(pass_of, loader, ids), taken))
    keep[measured] = (taken == newest) & (taken >= last_unknown)
    return keep


def equal_rows(*columns: Tensor) -> Tensor:
    """Assign numbers to the rows of a table so that equal rows, and no others, have equal numbers.

    >>> equal_rows(torch.tensor([7, 7, 5]), torch.tensor([1, 1, 1]))
    tensor([1, 1, 0])
    """
    found = columns[0].unique(return_inverse=True)[1]
    for column in columns[1:]:
        values, inverse = column.unique(return_inverse=True)
        found = (found * len(values) + inverse).unique(return_inverse=True)[1]
    return found


def _last(groups: Tensor, runs: Tensor) -> Tensor:
    """Return for each row the last run of its group."""
    return torch.zeros_like(runs).scatter_reduce(0, groups, runs, "amax")[groups]
