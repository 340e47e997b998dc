"""Any history of a store, with kills, full disks, compactions and changed files, against a model of plain lists.

A step is an operation of a user, or a fault: a kill leaves the files as they are before some call that changes the disk
(the folder is copied there, and the story goes on with the copy); an interrupt or a full disk raises in that call.
"""

import errno
import functools
import json
import math
import os
import shutil
import tempfile
import threading
import warnings
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from test_row_store import SKETCH, spec, written
from test_row_store import rows as rows_at

from lightning_sketch.store import STAGES, Busy, CorruptFile, RowStore, Run, SketchedGradients

MEMORY = Path("/dev/shm")  # a disk in memory, where fsync takes no time
USER_COLUMNS = {
    "score": lambda uid: uid / 2,
    "count": lambda uid: uid,
    "flag": lambda uid: uid % 2 == 0,
    "source": lambda uid: ("wiki", "books", "", "Łódź")[uid % 4],
    "loss": lambda uid: uid / 4,
    "padded": lambda uid: uid % 3 == 0,
    "weight": lambda uid: uid / 2,
    "scale_known": lambda uid: uid % 5 > 0,
    "preconditioner": lambda uid: uid % 3,
}
UNKNOWN = {"score": None, "count": -1, "flag": False, "source": "", "many": [], "loss": None, "prob_true": None}
UNKNOWN |= {"padded": False, "finite": True, "weight": None, "scale_known": True, "preconditioner": 0}


FAULTS = "kill", "kill in a write", "interrupt", "full"
FORMS = st.fixed_dictionaries(
    {
        "at_once": st.booleans(),  # all rows of a rank in one call
        "user": st.lists(st.sampled_from([*USER_COLUMNS, "many"]), unique=True, max_size=3),
        "width": st.integers(1, 3),
        "known": st.sampled_from([True, True, False]),  # whether the examples have ids
        "broken": st.sampled_from([False, False, False, True]),
        "shard_bytes": st.sampled_from([1, 400, 1 << 20]),
        "flush": st.booleans(),
        "fault": st.none() | st.none() | st.tuples(st.sampled_from(FAULTS), st.integers(1, 30)),
    }
)


class Interrupt(BaseException):
    """Raised in a call that changes the disk, as by Ctrl-C."""


@dataclass(frozen=True)
class Row:
    """A row that was put; `columns` has what it must say, `broken` is whether its gradient had a NaN."""

    uid: int
    run: int
    rank: int
    step: int
    stage: str
    fingerprint: int
    broken: bool
    columns: dict

    @property
    def sketch(self):
        """Numbers that are exact in each stored type: the largest is a power of two, the others have three bits."""
        return [8.0] + [float(self.uid // 8**i % 8) for i in range(15)]


@dataclass
class Begun:
    stage: str
    world: int
    parent: int | None = None
    parent_step: int | None = None
    fingerprint: int = 0
    at: int = 0  # its last step


@dataclass(frozen=True)
class Model:
    """What a store must have: rows in the order in which they were put, by (run, rank), of which some are flushed.

    `lost` are the rows that compactions have dropped; `latest` has, for each compaction, the number of runs that there
    were and the latest fit.
    """

    runs: list[Begun] = field(default_factory=list)
    put: dict = field(default_factory=dict)
    flushed: dict = field(default_factory=dict)
    lost: list[Row] = field(default_factory=list)
    latest: list = field(default_factory=list)
    generation: int = 1

    @property
    def fits(self):
        return [i for i, run in enumerate(self.runs, 1) if run.stage == "fit"]

    def rows(self, counts):
        """The rows on the disk, given how many are there of each rank of each run."""
        return [row for key in sorted(self.put) for row in self.put[key][: counts.get(key, 0)]]

    def history(self, fit, rows):
        """The rows of a fit and, up to the checkpoint that it resumed, those of its parent's history."""
        run, own = self.runs[fit - 1], [row for row in rows if row.run == fit]
        if run.parent is None:
            return own
        return [row for row in self.history(run.parent, rows) if row.step <= run.parent_step] + own

    def visible(self, rows, fit=None):
        """The rows that a reader sees, those of queries too."""
        fit = fit or max(self.fits, default=None)
        measured = [row for row in rows if self.runs[row.run - 1].stage != "fit"]
        keep = [row for row in measured if not any(self.hides(other, row) for other in measured)]
        return sorted(keep + (self.history(fit, rows) if fit else []), key=lambda row: (row.run, row.rank))

    @staticmethod
    def hides(later, row):
        """Whether a row of a checkpoint takes the place of another, of the same example or one of the two unknown."""
        same = (later.stage, later.fingerprint) == (row.stage, row.fingerprint) and row.fingerprint != 0
        ids = [one.columns.get("example_id") for one in (later, row)]
        return same and later.run > row.run and (None in ids or ids[0] == ids[1])

    def compacted(self):
        """The model after a compaction; this one stays as it is."""
        before = [row for key in sorted(self.put) for row in self.put[key]]
        kept = {row.uid for row in self.visible(before)}
        put = {key: [row for row in rows if row.uid in kept] for key, rows in self.put.items()}
        put = {key: rows for key, rows in put.items() if rows}
        return Model(
            list(self.runs),
            put,
            {key: len(rows) for key, rows in put.items()},
            self.lost + [row for row in before if row.uid not in kept],
            [*self.latest, (len(self.runs), max(self.fits, default=None))],
            self.generation + 1,
        )

    def dropped(self, run, step):
        """Whether a compaction kept less of a fit than this: a point that was not on the lineage of the latest fit."""
        return any(run <= known and not self.passes(fit, run, step) for known, fit in self.latest)

    def passes(self, fit, run, step):
        """Whether a fit went through this step of a run."""
        last = math.inf
        while fit is not None:
            if fit == run:
                return step <= last
            last, fit = min(last, self.runs[fit - 1].parent_step or 0), self.runs[fit - 1].parent
        return False


class Fault:
    """Within the context, does something before the K-th call that changes the disk, in whichever thread."""

    def __init__(self, number, action):
        self.number, self.action, self.calls = number, action, 0
        self.fired, self.active, self.lock = False, True, threading.RLock()

    def __enter__(self):
        names = ("fsync", "replace", "link", "unlink", "rmdir", "mkdir")
        self.real = {name: getattr(os, name) for name in names}
        for name, function in self.real.items():
            setattr(os, name, self.counted(function))
        return self

    def __exit__(self, *_):
        with self.lock:
            self.active = False
        for name, function in self.real.items():
            setattr(os, name, function)

    def counted(self, function):
        def call(*args, **kwargs):
            with self.lock:  # while the folder is copied, no other thread changes it
                if self.active:
                    self.calls += 1
                    if self.calls == self.number:
                        self.fire()
                return function(*args, **kwargs)

        return call

    def fire(self):
        with self.lock:
            self.fired, self.active = True, False
            self.action()


def table(rows, user, known):
    """The rows as they are put; all of one call have the same columns."""
    columns = {
        "step": [row.step for row in rows],
        "stage": [STAGES.index(row.stage) for row in rows],
        "fingerprint": [row.fingerprint for row in rows],
        "rank": [row.rank for row in rows],
        "lr": torch.tensor([row.columns["lr"] for row in rows]),
        "epoch": [row.columns["epoch"] for row in rows],
    }
    for name in (*user, *(["example_id"] if known else [])):
        columns[name] = [row.columns[name] for row in rows]
    sketches = torch.tensor([row.sketch for row in rows])
    for i, row in enumerate(rows):
        if row.broken:
            sketches[i, row.uid % 16] = torch.nan
    return SketchedGradients(sketches, SKETCH, columns)


def plain(name, value):
    """A value of a column, with NaN as None, and lists without the -1 that fill them up."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if name == "many":
        return [number for number in value if number != -1]
    return value


def numbers(file):
    """The number of rows that a file says it has: the header of safetensors is JSON after eight bytes of its length."""
    data = file.read_bytes()
    return int(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["rows"])


def attempt(function, *refusals):
    """What a function returns, or the message of its refusal."""
    try:
        return None, function()
    except refusals as error:
        return str(error), None


@functools.cache
def foreign(dtype):
    """The files of another store of the same sketch, by their names."""
    with tempfile.TemporaryDirectory() as folder:
        store = RowStore.create(folder, spec(dtype))
        for _ in range(3):
            with store.appender(store.begin_run("fit"), shard_bytes=1) as appender:
                for step in range(3):
                    appender.put(rows_at([step]))
        return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*.*")}


def flipped(file, place, column):
    """The bytes of a file with one bit changed, of rows in this column."""
    data = bytearray(file.read_bytes())
    start, end = 0, len(data)
    if column and file.suffix == ".safetensors":
        length = 8 + int.from_bytes(data[:8], "little")
        start, end = (length + offset for offset in json.loads(data[8:length])[column]["data_offsets"])
    data[start + place % (end - start)] ^= 1 << place // 8 % 8
    return bytes(data)


class StoreMachine(RuleBasedStateMachine):
    """A store and its model.

    All numbers are drawn from fixed ranges and taken modulo what there is: what a killed thread had written by then
    differs from time to time, and must not change what is drawn.
    """

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.path, self.copy = self.folder / "store", self.folder / "copy"
        self.model, self.open, self.handles, self.checkpoints = Model(), {}, [], []
        self.armed, self.beginning, self.compacting, self.uid = None, None, False, 0

    def teardown(self):
        self.close_all()
        shutil.rmtree(self.folder)

    # Faults

    def do(self, operation):
        """Do an operation, with the fault that was prepared, and return whether it was done without one."""
        armed, self.armed = self.armed, None
        if armed is None:
            operation()
            return True
        how, number = armed
        frozen = None

        def act():
            nonlocal frozen
            if how == "interrupt":
                raise Interrupt
            if how == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            frozen = self.certain()
            if self.path.exists():
                shutil.copytree(self.path, self.copy)

        with Fault(number, act) as fault:
            try:
                operation()
            except (Interrupt, OSError, RuntimeError) as error:
                if not fault.fired or how.startswith("kill"):
                    raise
                del error  # its frames hold the lock of a writer that could not open, see the last tests
            if how.startswith("kill") and not fault.fired:
                fault.fire()
        if not fault.fired:
            return True
        frozen = frozen or self.certain()
        self.close_all()
        if how.startswith("kill"):
            shutil.rmtree(self.path, ignore_errors=True)
            if self.copy.exists():
                self.copy.rename(self.path)
            for file in self.path.rglob("*.tmp") if how == "kill in a write" else ():
                os.truncate(file, file.stat().st_size // 2)
        self.recover(*frozen)
        return False

    def certain(self):
        """What must be on the disk now, and what may be."""
        model = self.model
        return model, len(model.runs), dict(model.flushed), self.beginning, self.compacting

    def recover(self, model, runs, flushed, beginning, compacting):
        """Take up what the fault has left: all that was certain, and each operation wholly or not at all."""
        self.beginning, self.compacting, self.model = None, False, model
        if not (self.path / "spec.json").exists():
            assert runs == 0  # it was being created
            return
        there = len(list((self.path / "attempts").glob("*.json")))
        assert there == runs or (beginning and there == runs + 1)
        model.runs[runs:] = [beginning] if there > runs else []
        generation = json.loads((self.path / "generation.json").read_text())["generation"]
        assert generation == model.generation or (compacting and generation == model.generation + 1)
        if generation > model.generation:
            self.model = model.compacted()
        else:
            counts = self.on_disk()
            self.check_counts(counts, flushed)
            for key, rows in model.put.items():
                rows[counts.get(key, 0) :] = []
                model.flushed[key] = len(rows)
        self.compare()

    @rule(
        how=st.sampled_from(FAULTS),
        number=st.integers(1, 6) | st.integers(1, 40),
    )
    def prepare_a_fault(self, how, number):
        self.armed = how, number

    # What the disk has

    def on_disk(self):
        """The number of rows of each rank of each run, read without the package."""
        number, found = self.model.generation, {}
        for file in (self.path / ("rows" if number == 1 else f"rows-{number}")).glob("r*/a*/*.safetensors"):
            key = int(file.parts[-2][1:]), int(file.parts[-3][1:])
            found[key] = found.get(key, 0) + numbers(file)
        return found

    def check_counts(self, counts, flushed):
        """Of each writer, a beginning of what was put is there, and at least what was flushed."""
        put = self.model.put
        assert all(count <= len(put.get(key, ())) for key, count in counts.items())
        assert all(counts.get(key, 0) >= count for key, count in flushed.items())

    def check_rows(self, found, rows):
        """A table has these rows in this order, with all their columns."""
        sketches = [[0.0] * 16 if row.broken else row.sketch for row in rows]
        assert found.sketches.float().tolist() == sketches
        self.check_columns(found.columns, rows)

    def check_columns(self, columns, rows):
        assert {name for row in rows for name in row.columns} <= set(columns)
        unknown = {**UNKNOWN, "example_id": "" if self.names else -1}
        for name, column in columns.items():
            values = [plain(name, value) for value in column.tolist()]
            if name == "example_id":  # a store in which nobody gave any has numbers
                values = [unknown[name] if value == -1 else value for value in values]
            assert values == [row.columns.get(name, unknown.get(name)) for row in rows], name

    def compare(self, fit=None):
        """Open the store, compare all that it says, and return it with the rows that it must have."""
        for _ in range(10_000):  # until no thread writes meanwhile
            counts = self.on_disk()
            store = RowStore.open(self.path) if fit is None else RowStore.open(self.path, lineage=fit)
            if counts == self.on_disk():
                break
        self.check_counts(counts, self.model.flushed)
        visible = self.model.visible(self.model.rows(counts), fit)
        rows = [row for row in visible if row.stage != "queries"]
        assert len(store) == len(rows)
        self.check_rows(store.read(), rows)
        queries = [row for row in visible if row.stage == "queries"]
        found = store.queries()
        assert sorted(found) == sorted({row.step for row in queries})
        for step, part in found.items():
            self.check_rows(part, [row for row in queries if row.step == step])
        if all(len(put) == self.model.flushed.get(key, 0) for key, put in self.model.put.items()):
            assert store.verify() == sum(counts.values())
        return store, rows

    # What users do

    @initialize(
        dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
        names=st.booleans(),
        how=st.sampled_from(FAULTS),
        number=st.integers(0, 12),
    )
    def create(self, dtype, names, how, number):
        self.spec, self.names = spec(dtype), names
        if number:
            self.armed = how, number
            self.do(lambda: RowStore.create(self.path, self.spec))
        self.store = RowStore.create(self.path, self.spec)
        self.compare()
        self.begin(Begun("fit", 2))
        self.checkpoints.append((1, 0))

    def begin(self, run):
        def operation():
            self.beginning = run
            options = {} if run.parent is None else {"parent": run.parent, "parent_step": run.parent_step}
            begun = self.store.begin_run(run.stage, world_size=run.world, **options)
            assert (begun.number, begun.stage) == (len(self.model.runs) + 1, run.stage)
            self.model.runs.append(run)
            self.beginning = None

        if self.do(operation) and run.parent:
            self.compare()

    @rule(world=st.integers(1, 3), count=st.integers(0, 4), form=FORMS)
    def begin_a_fresh_fit(self, world, count, form):
        self.begin(Begun("fit", world))
        self.train(count, form)

    @rule(
        stage=st.sampled_from(["validate", "test", "predict"]),
        fingerprint=st.sampled_from([0, 7, (1 << 63) - 1]),
        world=st.integers(1, 2),
        form=FORMS,
    )
    def measure_a_checkpoint(self, stage, fingerprint, world, form):
        self.begin(Begun(stage, world, fingerprint=fingerprint))
        run = self.model.runs[-1]  # an earlier one, if this one could not begin
        if (run.stage, run.fingerprint) == (stage, fingerprint):
            self.write(len(self.model.runs), range(run.world), [5, 5], stage, form)

    @rule(which=st.integers(0, 40), world=st.integers(1, 3), count=st.integers(0, 4), form=FORMS)
    def resume(self, which, world, count, form):
        """From any checkpoint; refused if rows up to it were dropped."""
        parent, step = self.checkpoints[-1 - which % len(self.checkpoints)]
        model = self.model
        if model.dropped(parent, step):
            with pytest.raises(ValueError, match=r"compact\(\) has kept (no|only)"):
                self.store.begin_run("fit", parent=parent, parent_step=step)
            return
        lost = [row for row in model.history(parent, model.lost) if row.step <= step]
        assert not lost, "a resume was accepted, and rows of its lineage were dropped before"
        self.begin(Begun("fit", world, parent, step, at=step))
        self.train(count, form)

    def appender(self, run, rank, shard_bytes):
        if (run, rank) not in self.open:
            self.open[run, rank] = self.store.appender(Run(run), rank, shard_bytes=shard_bytes)
        return self.open[run, rank]

    def make(self, key, step, stage, form, place):
        """A new row of (run, rank), at this place of those that are put at once."""
        self.uid += 1
        uid, run, user = self.uid, self.model.runs[key[0] - 1], form["user"]
        broken = form["broken"] and place == 0
        columns = {name: USER_COLUMNS[name](uid) for name in user if name != "many"}
        columns |= {"many": [uid] * form["width"]} if "many" in user else {}
        example = uid if stage in ("fit", "queries") else uid % 3  # of checkpoints, some are measured again
        columns |= {"example_id": f"example {example}" if self.names else example} if form["known"] else {}
        columns |= {"step": step, "stage": STAGES.index(stage), "fingerprint": run.fingerprint, "rank": key[1]}
        columns |= {"attempt": key[0], "lr": uid / 8, "epoch": step // 3} | ({"finite": False} if broken else {})
        return Row(uid, *key, step, stage, run.fingerprint, broken, columns)

    def write(self, number, ranks, steps, stage, form):
        """Put rows into a run, and flush or not."""
        self.armed = form["fault"] or self.armed
        run = self.model.runs[number - 1]
        run.at = max(run.at, steps[-1]) if stage != "queries" else run.at

        def operation():
            for rank in range(run.world):  # all of them before the first row, see the last tests
                self.appender(number, rank, form["shard_bytes"])
            for rank in ranks:
                key = number, rank
                appender = self.open[key]
                for part in [steps] if form["at_once"] else [[step] for step in steps]:
                    rows = [self.make(key, step, stage, form, i) for i, step in enumerate(part)]
                    self.model.put.setdefault(key, []).extend(rows)  # before: part of a put may be written at once
                    appender.put(table(rows, form["user"], form["known"]))
            if form["flush"]:
                self.flush([key for key in self.open if key[0] == number])

        return self.do(operation)

    @rule(count=st.integers(1, 4), form=FORMS)
    def train(self, count, form):
        """The latest fit does some steps, and may save a checkpoint then."""
        number = self.model.fits[-1]
        run = self.model.runs[number - 1]
        steps = list(range(run.at + 1, run.at + count + 1))
        if count and self.write(number, range(run.world), steps, "fit", form) and form["flush"]:
            self.checkpoints.append((number, run.at))

    @rule(back=st.integers(0, 5), ranks=st.sets(st.integers(0, 2), min_size=1), queries=st.booleans(), form=FORMS)
    def append(self, back, ranks, queries, form):
        """Some ranks of any run write: the next step, an example, or the queries of a step."""
        number = max(1, len(self.model.runs) - back)
        run = self.model.runs[number - 1]
        fits = run.stage == "fit"
        step = run.at + 1 if fits and not queries else max(1, run.at)  # not 0, see the last tests
        ranks = sorted({rank % run.world for rank in ranks})
        self.write(number, ranks, [step], "queries" if fits and queries else run.stage, form)

    def flush(self, keys):
        for key in keys:
            self.open[key].flush()
            self.model.flushed[key] = len(self.model.put.get(key, ()))

    @rule(back=st.integers(0, 3))
    def save_a_checkpoint(self, back):
        """Of a fit that is often the last, once its rows are on the disk."""
        number = self.model.fits[max(-1 - back, -len(self.model.fits))]
        if self.do(lambda: self.flush([key for key in self.open if key[0] == number])):
            self.checkpoints.append((number, self.model.runs[number - 1].at))

    @rule(which=st.integers(0, 5))
    def doubt_the_scale(self, which):
        """Of all that a writer has put; old handles do not learn it."""
        for key in list(self.open)[which % max(1, len(self.open)) :][:1]:
            self.open[key].doubt_scale()
            rows = self.model.put.get(key, [])
            rows[:] = [replace(row, columns={**row.columns, "scale_known": False}) for row in rows]
            self.model.flushed[key] = len(rows)

    def close_all(self):
        """As at the end of a process; a writer that had an error repeats it."""
        for key in list(self.open):
            with suppress(RuntimeError):
                self.open.pop(key).close()

    @rule(which=st.none() | st.integers(0, 5))
    def end_writers(self, which):
        """All of them, or one."""
        keys = list(self.open) if which is None else list(self.open)[which % max(1, len(self.open)) :][:1]

        def operation():
            for key in keys:
                self.open[key].close()
                del self.open[key]
                self.model.flushed[key] = len(self.model.put.get(key, ()))

        self.do(operation)

    @rule(shard_bytes=st.sampled_from([1, 400, 1 << 20]))
    def compact_while_somebody_writes(self, shard_bytes):
        """Refused, and so is a second writer in the place of the first."""
        if not self.open:
            self.compact(shard_bytes, None, 0)
            return
        with pytest.raises(Busy, match="is being written"):
            self.store.compact()
        number, rank = next(iter(self.open))
        with pytest.raises(Busy, match=f"rank {rank} of run {number} .* is being written"):
            self.store.appender(Run(number), rank)

    @rule(shard_bytes=st.sampled_from([1, 400, 1 << 20]), how=st.sampled_from(FAULTS), number=st.integers(0, 60))
    def compact(self, shard_bytes, how, number):
        """In any call of it there may be a fault."""
        self.flush(self.open)
        self.close_all()
        self.armed = (how, number) if number else None

        def operation():
            self.compacting = True
            self.store = self.store.compact(shard_bytes)
            self.model, self.compacting = self.model.compacted(), False

        self.do(operation)
        self.compare()
        self.read_old_handles()

    @rule(which=st.none() | st.integers(0, 7))
    def reopen(self, which):
        """At the latest lineage, or at that of any fit whose rows were not dropped."""
        runs = len(self.model.runs)
        fit = None if which is None or not runs else 1 + which % runs
        if fit is not None and (fit not in self.model.fits or self.model.dropped(fit, 0)):
            with pytest.raises(ValueError, match=f"lineage={fit} is no fit"):
                RowStore.open(self.path, lineage=fit)
            return
        self.handles.append(self.compare(fit))
        del self.handles[:-3]

    @rule()
    def read_old_handles(self):
        """They have the rows that there were when they were opened, or say that these were compacted."""
        for store, rows in self.handles:
            self.check_columns(store.metadata(), rows)
            refusal, found = attempt(store.read, RuntimeError)
            if refusal:
                assert "was compacted since this object was opened" in refusal
                assert store.snapshot.number < self.model.generation
            else:
                self.check_rows(found, rows)

    # What disks and users do to files

    @rule(
        kind=st.sampled_from(
            ["spec.json", "generation.json", "attempts/*.json", "manifests/*.json", *["r*/a*/*.safetensors"] * 3]
        ),
        which=st.integers(0, 99),
        how=st.sampled_from(["flip", "flip", "truncate", "delete", "exchange", "of another store"]),
        place=st.integers(0, 1 << 16),
        column=st.sampled_from([None, "step", "stage", "fingerprint", "sketches"]),
        compacts=st.booleans(),
    )
    def change_a_file(self, kind, which, how, place, column, compacts):
        """It is named by what reads it; what is read in spite of it is right; afterward it is put back."""
        self.flush(self.open)
        number = self.model.generation
        folder = self.path / ("rows" if number == 1 else f"rows-{number}")
        group = sorted((folder if kind[0] in "mr" else self.path).glob(kind)) or [self.path / "spec.json"]
        file = group[which % len(group)]
        if how == "delete" and self.is_all_there_was(file, folder):
            return
        changed = {file: file.read_bytes()}
        data, other, names = changed[file], group[place % len(group)], []
        if how == "exchange" and other != file:
            changed[other] = other.read_bytes()
            file.write_bytes(changed[other])
            other.write_bytes(data)
        elif how == "of another store" and str(file.relative_to(self.path)) in foreign(self.spec.dtype):
            file.write_bytes(foreign(self.spec.dtype)[str(file.relative_to(self.path))])
            names.append("generation.json")  # which tells which store it is, as spec.json does
        elif how == "delete":
            file.unlink()
        elif how == "truncate":
            file.write_bytes(data[: place % len(data)])
        else:
            file.write_bytes(flipped(file, place, column))
        names += [str(name) for name in changed] + ["spec.json"] * (file.name == "spec.json")
        names += ["record in attempts is missing"] * (how == "delete" and file.parent.name == "attempts")
        try:
            self.check_refused(names, compacts and not self.open)
        finally:
            for name, before in changed.items():
                name.write_bytes(before)
        self.compare()

    def is_all_there_was(self, file, folder):
        """Whether no other file says that this one was written.

        So it is with the last run before somebody writes in it, with a manifest that counts no file, and with the file
        of rows that a killed writer had no time to count.
        """
        if file.parent.name == "attempts":
            last = int(file.stem) == len(self.model.runs)
            return last and not list(folder.glob(f"r*/a{file.stem}/*.safetensors"))
        if file.parent.name == "manifests":
            rank, run = file.stem.split("-")
            return not list((folder / rank / run).glob("*.safetensors"))
        if file.suffix == ".safetensors":
            manifest = folder / "manifests" / f"{file.parts[-3]}-{file.parts[-2]}.json"
            return int(file.stem) >= json.loads(manifest.read_text())["files"]
        return False

    def check_refused(self, names, compacts):
        """`verify` raises; what `open` returns and does not warn of is right; compaction makes no loss final."""
        refusals = CorruptFile, FileNotFoundError
        with pytest.raises(refusals) as refused:
            self.store.verify()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            refusal, found = attempt(lambda: RowStore.open(self.path).read(), *refusals)
        messages = (
            [str(refused.value)] + [refusal] * (refusal is not None) + [str(warning.message) for warning in warned]
        )
        assert all(any(name in message for name in names) for message in messages)
        if len(messages) == 1:
            visible = [row for row in self.model.visible(self.model.rows(self.on_disk())) if row.stage != "queries"]
            self.check_rows(found, visible)
        if compacts:
            with pytest.raises(refusals):
                self.store.compact()


CALM = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True)


def test_short_histories():
    few = settings(CALM, max_examples=8, stateful_step_count=20, derandomize=True, phases=[Phase.generate])
    run_state_machine_as_test(StoreMachine, settings=few)


@pytest.mark.slow
def test_long_histories():
    run_state_machine_as_test(StoreMachine, settings=settings(CALM, max_examples=40, stateful_step_count=50))


# What the machine has found: the rules above go around these.


def test_a_writer_that_could_not_open_leaves_its_place_free(tmp_path, monkeypatch):
    """A notebook keeps the last error, with all that its frames hold."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = RowStore.create(tmp_path, spec())
    run = store.begin_run("fit")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left") as kept:
            store.appender(run)
    store.appender(run).close()
    assert kept


@pytest.mark.parametrize(("column", "place"), [("stage", 16), ("step", 55)])
def test_a_changed_column_is_seen_when_it_hides_the_file(tmp_path, column, place):
    store = written(tmp_path, rows_at([1]), rows_at([2]))
    (file,) = (tmp_path / "rows").glob("r*/a*/00000001.safetensors")
    file.write_bytes(flipped(file, place, column))
    with pytest.raises(CorruptFile):
        store.open(tmp_path).read()


def test_a_resume_without_a_step_is_refused_if_the_rows_of_the_parent_were_dropped(tmp_path):
    written(tmp_path, rows_at([1, 2, 3]))
    store = written(tmp_path, rows_at([1])).compact()
    with pytest.raises(ValueError, match="has kept no rows of that run"):
        store.begin_run("fit", parent=1)


def test_a_resume_before_the_first_step_is_refused_if_the_queries_of_the_parent_were_dropped(tmp_path):
    written(tmp_path, rows_at([0], "queries"), rows_at([1]))
    store = written(tmp_path, rows_at([1])).compact()
    with pytest.raises(ValueError, match="has kept no rows of that run"):
        store.begin_run("fit", parent=1, parent_step=0)


def test_a_rank_that_was_killed_before_it_wrote_is_not_missing(tmp_path):
    store = RowStore.create(tmp_path, spec())
    with store.appender(store.begin_run("fit", world_size=2), 0) as appender:
        appender.put(rows_at([1]))
    assert len(RowStore.open(tmp_path)) == 1
    assert store.verify() == 1
