"""Cut the power at any moment of a store's life, and see whether what was acknowledged is there and writing can go on.

A small program creates a store in new folders, appends several shards from two ranks with a flush at each checkpoint,
resumes from a checkpoint, validates, compacts, saves curvatures into the store and over one another, resumes and
compacts again, and at last overwrites the store by a new one. Its calls that change the disk are recorded, with the
calls of the package that had returned by then. A trial takes a prefix of these calls, and builds what a disk may have
after a power cut there:

    names      changes of a folder's names since its last fsync are kept: none, all, the first ones (of all folders or
               of each), or a random part
    data       of a file since its last fsync is kept, dropped, zeroed or cut, each file by itself

which is more than any journaling file system allows itself. In that state every check must hold:

    lost       a row whose flush() had returned, a run, a curvature or a whole store is not there
    wrong      there is something that was never written, or twice, or other numbers
    unread     open() or verify() fails
    stuck      writing does not go on: create, resume from the newest checkpoint, append, reopen, compact, verify

python benchmarks/faults/power.py [--trials N] [--seed S] [--first K]

4,500 trials take about seven minutes on one core. It exits with 1 if anything was lost, wrong, unread or stuck; the
first 20 are printed with their numbers, and `--first NUMBER --trials 1` repeats one. POSIX only: it knows files by
inode.
"""

import os
import random
import shutil
import sys
import tempfile
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import arguments, curvature, numbers, rows, show, spec, table

from lightning_sketch import _files as files
from lightning_sketch.attribution import Curvature, GradientStore
from lightning_sketch.store import Run
from lightning_sketch.store.format import read_runs

PLACE = Path("logs", "version_0", "sketches")  # of the store, in folders that are new too
FOREVER = 1 << 62
NAMES = "none", "all", "prefix", "prefix of each", "subset"
DATA = "kept", "dropped", "zeroed", "cut"
PRINTED = 20  # faults; one cause may show in each state
VERDICTS = "right", "lost", "wrong", "unread", "stuck"


# ---------------------------------------------------------------------------------------------------- the recorder


class Op(NamedTuple):
    """A change of names in a folder, of a file's data, or an fsync of either."""

    what: str  # "names", "write" or "fsync"
    target: int  # the folder or the file
    change: Any = None  # {name: file, folder or None}, or the bytes that were written


class Row(NamedTuple):
    run: int
    rank: int
    step: int


@dataclass
class Trace:
    """What a program did to the disk, and what the package had promised when.

    `began` and `done` have the number of changes before and after each call, by what it makes: a store, a run, ...
    """

    ops: list[Op] = field(default_factory=list)
    began: dict[Any, int] = field(default_factory=dict)
    done: dict[Any, int] = field(default_factory=dict)
    runs: dict[int, Run] = field(default_factory=dict)
    kept: dict[int, dict[int, int]] = field(default_factory=lambda: {1: {}})  # last steps of runs, by generation
    folders: set[int] = field(default_factory=set)
    _numbers: dict[int, int] = field(default_factory=dict)  # by inode, which the system uses again
    _count: int = 0
    _lock: Any = field(default_factory=threading.RLock)

    def begin(self, *keys: Any) -> None:
        self.began.update((key, len(self.ops)) for key in keys)

    def end(self, *keys: Any) -> None:
        self.done.update((key, len(self.ops)) for key in keys)

    @contextmanager
    def promise(self, key: Any) -> Iterator[None]:
        self.begin(key)
        yield
        self.end(key)

    def number(self, path: Any, new: bool = False) -> int:
        inode = os.stat(path).st_ino
        if new:
            self._numbers[inode] = self._count
            self._count += 1
        return self._numbers[inode]

    @contextmanager
    def recording(self, root: Path) -> Iterator[None]:
        """Record all that changes the folder, by whatever thread."""
        plain = {name: getattr(os, name) for name in ("open", "fsync", "replace", "link", "unlink", "mkdir", "rmdir")}
        self.folders.add(self.number(root, new=True))

        def names(path: Any, target: int | None) -> Op:
            return Op("names", self.number(os.path.dirname(os.path.abspath(path))), {os.path.basename(path): target})

        def opened(path, flags, *args, **kwargs):
            with self._lock:
                new = flags & os.O_CREAT and not os.path.lexists(path)
                handle = plain["open"](path, flags, *args, **kwargs)
                if new:
                    self.ops.append(names(path, self.number(path, new=True)))
                return handle

        def created(path, mode):
            with self._lock:
                file = open(path, mode, buffering=0)
                self.ops.append(names(path, self.number(path, new=True)))
                write, number = file.write, self.number(path)

                class Recorded:
                    def __enter__(self):
                        return self

                    def __exit__(self, *error):
                        file.close()

                    def write(self, data):
                        with trace._lock:
                            write(data)
                            trace.ops.append(Op("write", number, bytes(data)))

                    def flush(self):
                        pass

                    def fileno(self):
                        return file.fileno()

                return Recorded()

        def fsync(handle):
            with self._lock:
                plain["fsync"](handle)
                self.ops.append(Op("fsync", self.number(handle)))

        def replace(source, target):
            with self._lock:
                number = self.number(source)
                plain["replace"](source, target)
                op = names(target, number)
                self.ops.append(op._replace(change={**op.change, os.path.basename(source): None}))

        def link(source, target):
            with self._lock:
                plain["link"](source, target)
                self.ops.append(names(target, self.number(source)))

        def removing(function):
            def remove(path, *args, **kwargs):
                with self._lock:
                    plain[function](path, *args, **kwargs)
                    self.ops.append(names(path, None))

            return remove

        def mkdir(path, *args, **kwargs):
            with self._lock:
                plain["mkdir"](path, *args, **kwargs)
                number = self.number(path, new=True)
                self.folders.add(number)
                self.ops.append(names(path, number))

        trace = self
        changed = {"open": opened, "fsync": fsync, "replace": replace, "link": link, "mkdir": mkdir}
        changed |= {name: removing(name) for name in ("unlink", "rmdir")}
        try:
            for name, function in changed.items():
                setattr(os, name, function)
            files.open = created
            yield
        finally:
            for name, function in plain.items():
                setattr(os, name, function)
            del files.open

    def state(self, count: int, how: str, draw: random.Random, kinds: Sequence[str] = DATA) -> dict[str, Any]:
        """Return what a disk may have after the first `count` changes: nested dictionaries of names, and bytes."""
        ops = self.ops[:count]
        synced = {op.target: i for i, op in enumerate(ops) if op.what == "fsync"}
        entries: dict[int, dict[str, int]] = defaultdict(dict)
        data: dict[int, bytes] = {}
        pending = [i for i, op in enumerate(ops) if op.what == "names" and i > synced.get(op.target, -1)]
        until: dict[int, int] = defaultdict(lambda: draw.randint(0, count))
        cut, share = draw.randint(0, len(pending)), draw.random()
        kept = {
            "none": lambda i: False,
            "all": lambda i: True,
            "prefix": lambda i: i in pending[:cut],
            "prefix of each": lambda i: i < until[ops[i].target],
            "subset": lambda i: draw.random() < share,
        }[how]
        left_out = {i for i in pending if not kept(i)}
        for i, op in enumerate(ops):
            if op.what == "names" and i not in left_out:
                for name, target in op.change.items():
                    entries[op.target].pop(name, None)
                    if target is not None:
                        entries[op.target][name] = target
            elif op.what == "write":
                new, kind = op.change, "kept" if i < synced.get(op.target, -1) else draw.choice(kinds)
                if kind in ("dropped", "cut"):
                    new = new[: draw.randrange(len(new)) if kind == "cut" else 0]
                data[op.target] = data.get(op.target, b"") + (bytes(len(new)) if kind == "zeroed" else new)

        def tree(folder: int) -> dict[str, Any]:
            return {
                name: tree(number) if number in self.folders else data.get(number, b"")
                for name, number in entries[folder].items()
            }

        return tree(0)


def written(tree: dict[str, Any], folder: Path) -> Path:
    folder.mkdir()
    for name, part in tree.items():
        if isinstance(part, dict):
            written(part, folder / name)
        else:
            (folder / name).write_bytes(part)
    return folder


def found(folder: Path) -> dict[str, Any]:
    return {entry.name: found(entry) if entry.is_dir() else entry.read_bytes() for entry in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------- the program


def row(key: Row, stage: str) -> Any:
    return rows([key.step], stage, fingerprint=key.step * (stage != "fit"), salt=key.rank + 10 * key.run)


@cache
def told(key: Row, stage: str) -> frozenset[Any]:
    return plain(row(key, stage))[0]


def limits(runs: dict[int, Run], last: int) -> dict[int, int]:
    """Return the runs of a lineage, each with its last visible step."""
    lineage, until, current = {}, FOREVER, runs[last]
    while True:
        lineage[current.number] = until
        if current.parent is None:
            return lineage
        until, current = min(until, current.parent_step), runs[current.parent]


def write_run(trace: Trace, store: GradientStore, steps: range, every: int, late: bool = False, **options: Any) -> None:
    """Write a run of two ranks in lock step, with a checkpoint every few steps; late: the second begins after one."""
    stage = options.pop("stage", "fit")
    number = max(trace.runs, default=0) + 1
    trace.runs[number] = Run(number, stage, world_size=2, **options)
    with trace.promise(("run", number)):
        begun = store.begin_run(stage, world_size=2, **options)
        assert replace(begun, id="") == trace.runs[number]
    appenders = {}

    def begin(rank):
        appenders[rank] = store.appender(trace.runs[number], rank, shard_bytes=300)

    def put(rank, listed):
        for step in listed:
            trace.begin(Row(number, rank, step))
            appenders[rank].put(row(Row(number, rank, step), stage))
        appenders[rank].flush()
        trace.end(*(Row(number, rank, step) for step in listed))

    for rank in range(2 - late):
        begin(rank)
    for start in range(steps.start, steps.stop, every):
        part = range(start, min(start + every, steps.stop))
        for rank in range(2):
            if rank not in appenders:
                begin(rank)
            put(rank, part)
        trace.end(("checkpoint", number, part[-1]))
    for appender in appenders.values():
        appender.close()


def compact(trace: Trace, store: GradientStore) -> None:
    number = max(trace.kept) + 1
    lineage = limits(trace.runs, max(number for number, run in trace.runs.items() if run.stage == "fit"))
    before = trace.kept[number - 1]
    trace.kept[number] = {
        run: min(lineage.get(run, 0), before.get(run, FOREVER))
        for run, record in trace.runs.items()
        if record.stage == "fit"
    }
    with trace.promise(("generation", number)):
        store.compact(shard_bytes=600)


def program(trace: Trace, root: Path) -> None:
    path = root / PLACE
    with trace.promise("store"):
        store = GradientStore.create(path, spec())

    def save(weights, version):
        with trace.promise(("curvature", weights, version)):
            curvature(weights, version).save(path / "curvature")

    write_run(trace, store, range(1, 6), 3)
    save(1, 0)
    write_run(trace, store, range(4, 6), 1, late=True, parent=1, parent_step=3)
    write_run(trace, store, range(5, 6), 1, stage="validate")
    save(1, 1)
    compact(trace, store)
    save(2, 0)
    write_run(trace, store, range(5, 7), 2, parent=2, parent_step=4)
    compact(trace, store)
    save(2, 1)
    with trace.promise("overwritten"):
        GradientStore.create(path, spec(), overwrite=True)


# ---------------------------------------------------------------------------------------------------- the checks


class Fault(Exception):
    pass


def check(fine: bool, verdict: str, text: Any) -> None:
    if not fine:
        raise Fault(verdict, str(text))


@contextmanager
def never(verdict: str) -> Iterator[None]:
    """Take any exception for a fault."""
    try:
        yield
    except Fault:
        raise
    except Exception as error:
        raise Fault(verdict, f"{type(error).__name__}: {error}") from error


COLUMNS = {*rows([1]).columns, "sketch"}


def plain(part: Any) -> list[frozenset[Any]]:
    return [frozenset(pair for pair in one if pair[0] in COLUMNS) for one in table(part.columns, part.sketches)]


class Moment:
    """What must be and what may be in a store, after so many changes.

    Args:
        trace: The recorded program.
        count: The number of changes.
    """

    def __init__(self, trace: Trace, count: int):
        self.trace, self.count = trace, count
        self.there: dict[int, Run] = {}
        self.kept: dict[int, int] = {}

    def must(self, key: Any) -> bool:
        return self.trace.done.get(key, FOREVER) <= self.count

    def may(self, key: Any) -> bool:
        return self.trace.began.get(key, FOREVER) < self.count

    def check_present(self, present: Any, keys: list[Any], text: str) -> None:
        for key in keys:
            check(key in present or not self.must(key), "lost", f"{key} {text}")
        for key in present:
            check(self.may(key), "wrong", f"{key} {text}, before it began")

    def check_rows(self, store: GradientStore, last: int, runs: dict[int, Run], added: set[Row] = frozenset()) -> None:
        """Compare the visible rows of a lineage."""
        lineage, names = limits(runs, last), {}
        for key in [key for key in self.trace.began if isinstance(key, Row) and key.run in self.there] + sorted(added):
            run = runs[key.run]
            until = FOREVER if run.stage != "fit" else lineage.get(key.run, -1)
            if key.step <= min(until, self.kept.get(key.run, FOREVER)):
                names[told(key, run.stage)] = key
        with never("unread"):
            there = Counter(plain(GradientStore.open(store.path, lineage=last).read()))
        for one, times in there.items():
            known = names.get(one) or {name: value for name, value in one if name != "sketch"}
            check(one in names and times == 1, "wrong", f"lineage {last}: {known} {times} times")
            check(names[one] in added or self.may(names[one]), "wrong", f"{names[one]} was not written")
        for one, key in names.items():
            known = key in added or self.must(key)
            check(one in there or not known, "lost", f"lineage {last}: {key}, which was flushed")

    def check_curvatures(self, path: Path) -> None:
        versions = [key for key in self.trace.began if key[0] == "curvature"]
        for weights in {weights for _, weights, _ in versions}:
            own = [key for key in versions if key[1] == weights]
            needed = max((i for i, key in enumerate(own) if self.must(key)), default=-1)
            right = [numbers(curvature(weights, key[2])) for key in own[max(0, needed) :] if self.may(key)]
            try:
                with never("unread"):
                    now = numbers(Curvature.load(path / "curvature", "fisher", fingerprint=weights))
            except Fault as fault:
                check("FileNotFoundError: no curvature" in fault.args[1], *fault.args)
                check(needed < 0, "lost", f"the curvature at {weights}")
            else:
                check(now in right, "wrong", f"the curvature at {weights}")

    def examine(self, path: Path) -> None:
        """Check what is there, then go on writing."""
        trace = self.trace
        if self.may("overwritten") and not self.must("overwritten"):  # whatever is left may be deleted
            with never("stuck"):
                store = GradientStore.create(path, spec(), overwrite=True)
            return self.go_on(store)
        if not (path / "spec.json").exists():
            check(not self.must("store"), "lost", "the store")
            with never("stuck"):
                store = GradientStore.create(path, spec())
            return self.go_on(store)
        with never("unread"):
            store = GradientStore.open(path)
            numbers_there = [run.number for run in read_runs(store.snapshot)]
        if self.must("overwritten"):
            check(len(store) == 0 and not numbers_there, "wrong", "rows of the store that was overwritten")
            return self.go_on(store)
        self.check_present([("run", i) for i in numbers_there], [("run", i) for i in trace.runs], "of attempts")
        self.there = {number: trace.runs[number] for number in numbers_there}
        now = store.snapshot.number
        for number in trace.kept:
            key = ("generation", number)
            check(number <= now or not self.must(key), "lost", f"{key}: it is {now}")
            check(number > now or number == 1 or self.may(key), "wrong", f"{key}: it is {now}")
        self.kept = trace.kept[now]
        for number, run in self.there.items():
            if run.stage == "fit":
                self.check_rows(store, number, self.there)
        self.check_curvatures(path)
        self.go_on(store)

    def go_on(self, store: GradientStore) -> None:
        """Resume from the newest checkpoint, by two ranks, and compact; nothing may be in the way."""
        with never("unread"):
            store.verify()
        saved = [key[1:] for key in self.trace.done if key[0] == "checkpoint" and self.must(key)]
        fits = [place for place in saved if place[0] in self.there and self.there[place[0]].stage == "fit"]
        parent, step = fits[-1] if fits else (None, None)
        with never("stuck"):
            store = GradientStore.create(store.path, spec())
            run = store.begin_run("fit", parent=parent, parent_step=step, world_size=2)
            added = {Row(run.number, rank, (step or 0) + i) for rank in range(2) for i in (1, 2)}
            appenders = [store.appender(run, rank, shard_bytes=1) for rank in range(2)]
            for key in sorted(added):
                appenders[key.rank].put(row(key, "fit"))
            for appender in appenders:
                appender.close()
        runs = self.there | {run.number: run}
        self.check_rows(store, run.number, runs, added)
        with never("stuck"):
            store = store.compact()  # verifies all before
        self.check_rows(store, run.number, runs, added)
        with never("unread"):
            visible = len(store)
            check(store.verify() == visible, "wrong", "verify() counts other rows than those that were kept")
        check(not list(store.path.glob("rows*/**/*.tmp")), "wrong", "temporary files were left by compaction")


def main() -> int:
    asked = arguments(__doc__, 4500, "first")
    torch.set_num_threads(1)
    counts: dict[str, Counter[str]] = {how: Counter() for how in NAMES}
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        trace, root = Trace(), Path(folder, "root")
        root.mkdir()
        with trace.recording(root):
            program(trace, root)
        everything = trace.state(len(trace.ops), "all", random.Random(0), ["kept"])
        assert everything == found(root), "the recorder missed a change"
        os.fsync = lambda handle: None  # no power cut comes in the trials
        prefixes = len(trace.ops) + 1
        print(f"{prefixes - 1} changes of the disk, {asked.trials} states, seed {asked.seed}", flush=True)
        for number in range(asked.first, asked.first + asked.trials):
            draw = random.Random(f"{asked.seed} {number}")
            count, how = number % prefixes, NAMES[number // prefixes % len(NAMES)]
            path = written(trace.state(count, how, draw), Path(folder, "state")) / PLACE
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    Moment(trace, count).examine(path)
                    verdict = "right"
                except Fault as fault:
                    verdict, text = fault.args
                    faults += 1
                    if faults <= PRINTED:
                        print(f"{number}: {verdict} after {count} changes, names kept: {how}\n    {text[:600]}")
                        print(f"    last change: {str(trace.ops[count - 1])[:200]}", flush=True)
            counts[how][verdict] += 1
            shutil.rmtree(Path(folder, "state"))
    show("names kept", VERDICTS, counts.items())
    print(f"{faults} faults in {asked.trials} states")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
