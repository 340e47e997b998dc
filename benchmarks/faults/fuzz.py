"""Corrupt one thing in a small store, at random, and see what a reader says.

Six stores: float32, float16 and bfloat16, each as written and compacted; two ranks, a fit, its resume from an older
step, two validate runs, stored queries, columns of strings, several files per run, two curvatures. A trial copies one,
applies one mutator, and reads in a process of its own, which ends after 10 seconds: metadata(), then read() and
queries() of the store opened anew, and both curvatures. The worst answer counts:

    right      equal to what the store had before
    error      CorruptFile, FileNotFoundError or ValueError, and its text names a path of the store
    warned     a part of the rows, each right, and a warning that names a path of the store
    unnamed    such an error or warning that names no path
    foreign    an exception of another type, or a process that crashed
    hang       no answer in 10 seconds
    silent     anything else: other numbers, or fewer, without a word

and beside it whether verify() saw it: seen (or the store could not even be opened), passed though the answer was right,
missed. A curvature that is gone is not missed, since a store need not have one.

python benchmarks/faults/fuzz.py [--trials N] [--seed S] [--first K]

2,400 trials take about two minutes on one core. It exits with 1 if anything was unnamed, foreign, silent, missed or
a hang. Each is printed with its number; `--first NUMBER --trials 1` repeats it. POSIX only: it forks.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import WEIGHTS, all_rows, arguments, copied, curvature, numbers, rows, show, spec, table

from lightning_sketch._files import CorruptFile
from lightning_sketch.attribution import Curvature, GradientStore
from lightning_sketch.store.format import CorruptShard

LIMIT, MEMORY = 10, 8 << 30  # seconds, bytes
READING = "right", "error", "warned", "unnamed", "foreign", "hang", "silent"
VERIFYING = "seen", "passed", "missed"
PARTS = "metadata", "rows", "curvature", "curvature"
BAD = "unnamed", "foreign", "hang", "silent", "missed"
OWN_ERRORS = CorruptFile, CorruptShard, FileNotFoundError, ValueError


# ---------------------------------------------------------------------------------------------------- the stores


def write_store(path: Path, dtype: str, compacted: bool, salt: float) -> None:
    """Write a store; beside it, in `path`-old, what its manifests and generation.json were earlier."""
    store, old = GradientStore.create(path, spec(dtype)), path.with_name(f"{path.name}-old")

    def run(stage, parts, **options):
        record = store.begin_run(stage, world_size=2, **options)
        for rank in range(2):
            with store.appender(record, rank) as appender:
                for i, part in enumerate(parts):
                    appender.put(rows(*part, salt=salt + rank + 10 * record.number))
                    appender.flush()
                    if i == 0:
                        keep_old()

    def keep_old():
        for file in (path / "generation.json", *path.glob("rows*/manifests/*.json")):
            copy = old / file.relative_to(path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())

    run("fit", [([1, 2, 3],), ([3, 3], "queries"), ([4, 5],), ([6],), ([7],)])
    run("fit", [([5, 6],), ([6, 6], "queries"), ([7],), ([8, 9],)], parent=1, parent_step=4)
    for _ in range(2):  # of the same weights: the second is visible
        run("validate", [(range(3), "validate", 7), ([3], "validate", 7)])
    for weights in WEIGHTS:
        curvature(weights, salt).save(path / "curvature")
    if compacted:
        store.compact(shard_bytes=600)


# -------------------------------------------------------------------------------------------------- the mutators


class Trial:
    """A copy of a store to corrupt, with another store of the same spec, and older versions of its files."""

    def __init__(self, path: Path, source: Path, other: Path, draw: random.Random):
        self.path, self.source, self.other, self.draw = path, source, other, draw
        self.old = source.with_name(f"{source.name}-old")
        self.outside = path.with_name("outside")

    def files(self, kind: str) -> list[Path]:
        patterns = {
            "shard": ["rows*/r*/a*/*.safetensors"],
            "manifest": ["rows*/manifests/*.json"],
            "attempt": ["attempts/*.json"],
            "spec": ["spec.json"],
            "generation": ["generation.json"],
            "curvature": ["curvature/*.safetensors"],
            "lock": ["**/*.lock"],
        }
        kinds = {"json": "manifest attempt spec generation", "tensors": "shard curvature"}
        kinds["any"] = " ".join(kinds.values())
        return sorted(
            file
            for name in kinds.get(kind, kind).split()
            for pattern in patterns[name]
            for file in self.path.glob(pattern)
        )

    def one(self, kind: str) -> Path:
        """Draw a file of a kind; of "any", each kind is as likely as another."""
        if kind == "any":
            kind = self.draw.choice(["shard", "shard", "manifest", "attempt", "spec", "generation", "curvature"])
        return self.draw.choice(self.files(kind))

    def in_other(self, file: Path) -> Path:
        return self.other / file.relative_to(self.path)

    @property
    def rows(self) -> Path:
        return next(self.path.glob("rows*"))


MUTATORS: dict[str, Callable[[Trial], Any]] = {}
Bytes = Callable[[Trial, bytearray], bytes | bytearray]


def mutator(function: Callable[[Trial], Any]) -> Callable[[Trial], Any]:
    MUTATORS[function.__name__.replace("_", " ")] = function
    return function


def changes(name: str, kind: str, change: Bytes) -> None:
    """Add a mutator that changes the bytes of a file."""

    def apply(trial: Trial):
        file = trial.one(kind)
        file.write_bytes(change(trial, bytearray(file.read_bytes())))
        return file

    MUTATORS[name] = apply


def flip(trial: Trial, data: bytearray, start: int = 0, stop: int | None = None) -> bytearray:
    place = trial.draw.randrange(start, len(data) if stop is None else stop)
    data[place] ^= 1 << trial.draw.randrange(8)
    return data


def header_end(data: bytearray) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def flip_in_tensor(*columns: str) -> Bytes:
    """Flip a bit in one of these tensors of a shard, or in any but the sketches."""

    def change(trial: Trial, data: bytearray) -> bytearray:
        end = header_end(data)
        places = {key: value["data_offsets"] for key, value in json.loads(data[8:end]).items() if "shape" in value}
        start, stop = places[trial.draw.choice(columns or sorted({*places} - {"sketches"}))]
        return flip(trial, data, end + start, end + stop)

    return change


def some(trial: Trial, low: int, high: int) -> bytes:
    return trial.draw.randbytes(trial.draw.randint(low, high))


def cut(trial: Trial, data: bytearray, share: float) -> bytearray:
    return data[: int(len(data) * share)]


def zero_tail(trial: Trial, data: bytearray) -> bytearray:
    count = trial.draw.randint(8, len(data) * 3 // 4)
    return data[:-count] + bytes(count)


def zero_block(trial: Trial, data: bytearray) -> bytearray:
    start = trial.draw.randrange(len(data) // 2)
    data[start : start + len(data) // 4] = bytes(len(data) // 4)
    return data


changes("flip in the length of a header", "tensors", lambda t, d: flip(t, d, 0, 8))
changes("flip in a header", "tensors", lambda t, d: flip(t, d, 8, header_end(d)))
changes("flip in a column", "shard", flip_in_tensor())
changes("flip in a column that hides rows", "shard", flip_in_tensor("step", "stage", "fingerprint"))
changes("flip in a string of a column", "shard", flip_in_tensor("source.texts"))
changes("flip in sketches", "shard", flip_in_tensor("sketches"))
changes("flip in the header of a curvature", "curvature", lambda t, d: flip(t, d, 8, header_end(d)))
changes("flip in a curvature", "curvature", lambda t, d: flip(t, d, header_end(d)))
for _kind in ("manifest", "attempt", "spec", "generation"):
    changes(f"flip in a file {_kind}", _kind, flip)
changes("cut to nothing", "any", lambda t, d: d[:0])
changes("cut to a few bytes", "any", lambda t, d: d[: t.draw.randint(1, 16)])
changes("cut to half", "any", lambda t, d: cut(t, d, 0.5))
changes("cut anywhere", "any", lambda t, d: cut(t, d, t.draw.random()))
changes("last byte gone", "any", lambda t, d: d[:-1])
changes("first byte gone", "any", lambda t, d: d[1:])
changes("tail of zeros", "any", zero_tail)
changes("block of zeros", "any", zero_block)
changes("zeroed header", "any", lambda t, d: bytes(t.draw.choice([8, 64, 512])) + d[64:])
changes("all zeros", "any", lambda t, d: bytes(len(d)))
changes("garbage appended", "any", lambda t, d: d + some(t, 1, 200))
changes("zeros appended", "any", lambda t, d: d + bytes(t.draw.randint(1, 4096)))
changes("written twice over", "any", lambda t, d: d + d)
changes("random bytes", "any", lambda t, d: some(t, len(d), len(d)))
changes("invalid UTF-8", "json", lambda t, d: d[:30] + b"\xff\xfe" + d[30:])
changes("byte order mark", "json", lambda t, d: b"\xef\xbb\xbf" + d)
changes("deeply nested JSON", "json", lambda t, d: b"[" * 100_000)
changes("deeply nested header", "tensors", lambda t, d: (1 << 16).to_bytes(8, "little") + b"[" * (1 << 16) + d)
changes("JSON of another kind", "json", lambda t, d: t.draw.choice([b"[]", b"3", b'"text"', b"null", b"true", b"{}"]))
changes("JSON of one huge number", "json", lambda t, d: b'{"format": ' + b"9" * 10_000 + b"}")


def remove(path: Path) -> Path:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    return path


def remove_run(trial):
    folder = trial.one("shard").parent
    remove(folder)
    remove(trial.rows / "manifests" / f"{folder.parent.name}-{folder.name}.json")


for _kind in ("shard", "manifest", "attempt", "spec", "generation", "curvature", "lock"):
    MUTATORS[f"no file {_kind}"] = lambda trial, kind=_kind: remove(trial.one(kind))
MUTATORS["no last shard of a run"] = lambda trial: remove(max(trial.one("shard").parent.glob("*.safetensors")))
MUTATORS["no last attempt"] = lambda trial: remove(trial.files("attempt")[-1])
MUTATORS["no folder of a run"] = lambda trial: remove(trial.one("shard").parent)
MUTATORS["no folder of a rank"] = lambda trial: remove(trial.one("shard").parents[1])
MUTATORS["no run and none of its manifests"] = lambda trial: remove_run(trial)
MUTATORS["no folder rows"] = lambda trial: remove(trial.rows)
MUTATORS["no folder manifests"] = lambda trial: remove(trial.rows / "manifests")
MUTATORS["no folder attempts"] = lambda trial: remove(trial.path / "attempts")
MUTATORS["no folder curvature"] = lambda trial: remove(trial.path / "curvature")


def exchange(first: Path, second: Path) -> tuple[Path, Path]:
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    return first, second


def two_shards(trial: Trial, fits: Callable[[Path, Path], bool]) -> tuple[Path, Path]:
    files = trial.files("shard")
    pairs = [(a, b) for i, a in enumerate(files) for b in files[i + 1 :] if fits(a, b)]
    return exchange(*trial.draw.choice(pairs or [(files[0], files[-1])]))


@mutator
def exchanged_shards_of_a_run(trial: Trial):
    return two_shards(trial, lambda a, b: a.parent == b.parent)


@mutator
def exchanged_shards_of_two_runs(trial: Trial):
    return two_shards(trial, lambda a, b: a.parents[1] == b.parents[1] and a.parent != b.parent)


@mutator
def exchanged_shards_of_two_ranks(trial: Trial):
    return two_shards(trial, lambda a, b: a.parent.name == b.parent.name and a.parents[1] != b.parents[1])


for _kind in ("manifest", "attempt", "curvature"):
    MUTATORS[f"exchanged {_kind}s"] = lambda trial, kind=_kind: exchange(*trial.draw.sample(trial.files(kind), 2))


def from_other(trial: Trial, file: Path) -> Path:
    """Put what another store has at a place there."""
    source = trial.in_other(file)
    if source.is_dir():
        remove(file)
        copied(source, file)
    else:
        file.write_bytes(source.read_bytes())
    return file


for _kind in ("shard", "manifest", "attempt", "spec", "generation", "curvature"):
    MUTATORS[f"{_kind} of another store"] = lambda trial, kind=_kind: from_other(trial, trial.one(kind))
MUTATORS["run of another store"] = lambda trial: from_other(trial, trial.one("shard").parent)
MUTATORS["rows of another store"] = lambda trial: from_other(trial, trial.rows)
MUTATORS["attempts of another store"] = lambda trial: from_other(trial, trial.path / "attempts")


@mutator
def a_shard_over_another(trial: Trial):
    source, target = trial.draw.sample(trial.files("shard"), 2)
    return shutil.copyfile(source, target)


@mutator
def a_shard_copied_as_the_next(trial: Trial):
    file = max(trial.one("shard").parent.glob("*.safetensors"))
    return shutil.copyfile(file, file.with_stem(f"{int(file.stem) + 1:08d}"))


@mutator
def older_manifest(trial: Trial):
    files = [file for file in trial.files("manifest") if (trial.old / file.relative_to(trial.path)).exists()]
    for file in files and [trial.draw.choice(files)]:
        file.write_bytes((trial.old / file.relative_to(trial.path)).read_bytes())
    return files


@mutator
def older_manifest_of_before_the_compaction(trial: Trial):
    file = trial.one("manifest")
    file.write_bytes((trial.old / "rows" / "manifests" / file.name).read_bytes())
    return file


@mutator
def older_generation(trial: Trial):
    return shutil.copyfile(trial.old / "generation.json", trial.path / "generation.json")


# Changed fields: of one leaf, wherever it is nested. With a matching checksum they test what a checksum hides; no store
# has such values, since what is possible and matches its checksum cannot be told from what was written.


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the places of all values in nested lists and dictionaries, but the outermost."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path][not path :] + [place for key, part in inner for place in leaves(part, (*path, key))]


def change_field(trial: Trial, change: Callable[[Any], Any], sealed: bool, kind: str = "json") -> Path:
    file = trial.one("any" if kind == "json" else kind)
    while file.suffix != ".json":
        file = trial.one("any")
    fields = json.loads(file.read_bytes())
    fields.pop("checksum") if sealed else None
    *above, last = trial.draw.choice(leaves(fields))
    place = fields
    for key in above:
        place = place[key]
    found = change(place[last])
    if found is None and sealed and last in ("parent", "parent_step"):  # null there is that of a run without a parent
        found = {}
    if found is remove:
        del place[last]
    else:
        place[last] = found
    if sealed:
        fields["checksum"] = zlib.crc32(json.dumps(fields, sort_keys=True).encode())
    file.write_text(json.dumps(fields, indent=1))
    return file


def of_another_type(value: Any) -> Any:
    return {"text": "x"} if isinstance(value, str) else "text" if value is None or isinstance(value, int) else 1.5


CHANGES = {
    "removed": lambda value: remove,
    "of another type": of_another_type,
    "huge": lambda value: 10**300 if isinstance(value, int) else "9" * 70_000,
    "negative": lambda value: -1 - value if isinstance(value, int) else -7,
    "null": lambda value: {} if value is None else None,
    "a list": lambda value: [value, 1],
    "nested": lambda value: json.loads("[" * 400 + "]" * 400),
    "NaN": lambda value: float("nan"),
    "true": lambda value: "true" if value is True else True,
}
for _name, _change in CHANGES.items():
    for _sealed in (False, True):
        MUTATORS[f"field {_name}{' with a checksum' * _sealed}"] = lambda trial, change=_change, sealed=_sealed: (
            change_field(trial, change, sealed)
        )


@mutator
def a_field_twice(trial: Trial):
    file = trial.one("json")
    name, value = trial.draw.choice(sorted(json.loads(file.read_bytes()).items()))
    other = json.dumps(of_another_type(value))
    file.write_text(file.read_text().rstrip().removesuffix("}").rstrip() + f',\n "{name}": {other}\n}}')
    return file


@mutator
def parents_in_a_circle(trial: Trial):
    """With matching checksums."""
    own, other = trial.draw.choice([(1, 1), (2, 2), (1, 2), (2, 4), (1, 99), (2, 0)])
    file = trial.path / "attempts" / f"{own:08d}.json"
    fields = json.loads(file.read_bytes()) | {"parent": other}
    del fields["checksum"]
    fields["checksum"] = zlib.crc32(json.dumps(fields, sort_keys=True).encode())
    file.write_text(json.dumps(fields))
    return file


# Names, and what is no file


def rename(file: Path, name: str) -> Path:
    return file.rename(file.with_name(name))


HUGE = "99999999.safetensors"
MUTATORS["a shard of a huge number"] = lambda t: rename(t.one("shard"), HUGE)
MUTATORS["a shard copied to a huge number"] = lambda t: shutil.copyfile(f := t.one("shard"), f.with_name(HUGE))
MUTATORS["a shard of a strange name"] = lambda t: rename(
    t.one("shard"),
    t.draw.choice(["0.safetensors", "0000000x.safetensors", "00000000 (1).safetensors", "\n.safetensors"]),
)
MUTATORS["a shard renamed away"] = lambda t: rename(f := t.one("shard"), f"{f.name}.bak")
MUTATORS["a folder of a run renamed"] = lambda t: rename(
    t.one("shard").parent, t.draw.choice(["a99999999", "a1", "copy", "a00000000", "a00000009"])
)
MUTATORS["a folder of a rank renamed"] = lambda t: rename(
    t.one("shard").parents[1], t.draw.choice(["r99999", "r1", "copy", "r00007"])
)
MUTATORS["a manifest renamed"] = lambda t: rename(
    t.one("manifest"), t.draw.choice(["r00000-a00000009.json", "r00009-a00000001.json", "x.json", "r0-a1.json"])
)
MUTATORS["an attempt renamed"] = lambda t: rename(
    t.one("attempt"), t.draw.choice(["00000009.json", "99999999.json", "9.json", "x.json"])
)
MUTATORS["a curvature renamed"] = lambda t: rename(
    t.one("curvature"), t.draw.choice(["ggn_000000000000000b.safetensors", "fisher_1.safetensors", "x.safetensors"])
)
MUTATORS["the rows renamed"] = lambda t: rename(t.rows, t.draw.choice(["rows-9", "rows.bak", "Rows"]))


@mutator
def a_foreign_file(trial: Trial):
    folders = [trial.path, trial.rows, *{file.parent for file in trial.files("any")}]
    name = trial.draw.choice([".DS_Store", "notes.txt", "x.tmp", "00000000.safetensors.1234.tmp", "~$a.npy"])
    file = trial.draw.choice(sorted(folders)) / name
    file.write_bytes(some(trial, 0, 50))
    return file


def replaced(name: str, kind: str, put: Callable[[Trial, Path, bytes], Any]) -> None:
    """Add a mutator that puts something in place of a file."""

    def apply(trial: Trial):
        file = trial.one(kind)
        data = file.read_bytes()
        file.unlink()
        put(trial, file, data)
        return file

    MUTATORS[name] = apply


def link_outside(trial: Trial, file: Path, data: bytes) -> None:
    trial.outside.write_bytes(data)
    file.symlink_to(trial.outside)


replaced("a pipe in place of a file", "any", lambda t, f, d: os.mkfifo(f))
replaced("a link to a file outside", "any", link_outside)
replaced("a link to /dev/zero", "any", lambda t, f, d: f.symlink_to("/dev/zero"))
replaced("a link to itself", "any", lambda t, f, d: f.symlink_to(f.name))
replaced("a link to nothing", "any", lambda t, f, d: f.symlink_to("nothing"))
replaced("a folder in place of a file", "any", lambda t, f, d: f.mkdir())
replaced("a huge file of holes", "any", lambda t, f, d: (f.write_bytes(d), os.truncate(f, 1 << 32)))


@mutator
def a_file_in_place_of_a_folder(trial: Trial):
    folder = trial.draw.choice(sorted({file.parent for file in trial.files("any")} - {trial.path} | {trial.rows}))
    remove(folder).write_bytes(some(trial, 0, 50))
    return folder


@mutator
def a_folder_linked_outside(trial: Trial):
    folder = trial.draw.choice(sorted({file.parent for file in trial.files("any")} - {trial.path} | {trial.rows}))
    shutil.move(folder, trial.outside)
    folder.symlink_to(trial.outside)
    return folder


# ---------------------------------------------------------------------------------------------------- the reader


def judged(path: Path, read: Callable[[], Any], right: Callable[[Any, bool], bool]) -> tuple[str, str]:
    """Return what a reader says, and its words; `right` takes the answer, and whether a warning was given."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = read()
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            return "foreign" if type(error) not in OWN_ERRORS else "error" if str(path) in str(
                error
            ) else "unnamed", words
    words = "; ".join(str(warning.message) for warning in caught)
    if right(found, False):
        return "right", words
    if not words or not right(found, True):
        return "silent", words or "no word"
    return "warned" if str(path) in words else "unnamed", words


def rows_right(truth: dict[str, list[Any]]) -> Callable[[Any, bool], bool]:
    def right(found: dict[str, list[Any]], part: bool) -> bool:
        if not part:
            return found == truth
        return all(not Counter(table) - Counter(truth.get(name, ())) for name, table in found.items())

    return right


def truth_of(path: Path) -> dict[str, Any]:
    store = GradientStore.open(path)
    curvatures = {w: numbers(Curvature.load(path / "curvature", "fisher", fingerprint=w)) for w in WEIGHTS}
    return {"metadata": {"rows": table(store.metadata())}, "rows": all_rows(store), "curvatures": curvatures}


def examine(path: Path, truth: dict[str, Any]) -> dict[str, str]:
    """Read the metadata, the rows and the curvatures; return the worst answer, what verify says, and their words."""
    opened: list[GradientStore] = []

    def metadata():
        opened.append(GradientStore.open(path))
        return {"rows": table(opened[0].metadata())}

    verdicts = [
        judged(path, metadata, rows_right(truth["metadata"])),
        judged(path, lambda: all_rows(GradientStore.open(path)), rows_right(truth["rows"])),
    ]
    wrong = any(answer != "right" for answer, _ in verdicts)
    for weights, expected in truth["curvatures"].items():
        verdict = judged(
            path,
            lambda weights=weights: numbers(Curvature.load(path / "curvature", "fisher", fingerprint=weights)),
            lambda found, part, expected=expected: found == expected,
        )
        verdicts.append(verdict)
        wrong |= verdict[0] != "right" and not verdict[1].startswith("FileNotFoundError: no curvature")
    answer, words = max(verdicts, key=lambda verdict: READING.index(verdict[0]))
    verify, said = judged(path, opened[0].verify, lambda *_: True) if opened else ("error", "not opened")
    if verify == "right":
        verify = "missed" if wrong else "passed"
    elif verify == "error":
        verify = "seen"
    parts = ", ".join(f"{part} {verdict}" for part, (verdict, _) in zip(PARTS, verdicts, strict=True))
    return {"answer": answer, "words": f"{words} ({parts})", "verify": verify, "said": said}


def in_own_process(work: Callable[[], dict[str, str]]) -> dict[str, str]:
    """Run in a forked process, which a time limit ends even in the middle of a system call, and return the result."""
    source, target = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(LIMIT)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            with os.fdopen(target, "w") as file:
                json.dump(work(), file)
        finally:
            os._exit(0)
    os.close(target)
    with os.fdopen(source) as file:
        text = file.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        kind = "hang" if os.WTERMSIG(status) == signal.SIGALRM else "foreign"
        return {"answer": kind, "words": f"signal {os.WTERMSIG(status)}", "verify": "", "said": ""}
    return json.loads(text)


def main() -> int:
    asked = arguments(__doc__, 2400, "first")
    torch.set_num_threads(1)
    reading: dict[str, Counter[str]] = defaultdict(Counter)
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        stores, truths = [], []
        for dtype in ("float32", "float16", "bfloat16"):
            for compacted in (False, True):
                path = Path(folder, f"{dtype}{'-compacted' * compacted}")
                write_store(path, dtype, compacted, 0.0)
                write_store(path.with_name(f"{path.name}-other"), dtype, compacted, 0.25)
                stores.append(path)
                truths.append(truth_of(path))
        names = list(MUTATORS)
        print(f"{len(names)} mutators, {asked.trials} trials, seed {asked.seed}")
        for number in range(asked.first, asked.first + asked.trials):
            draw = random.Random(f"{asked.seed} {number}")
            name, which = names[number % len(names)], draw.randrange(len(stores))
            path = copied(stores[which], Path(folder, "work", "store"))
            other = stores[which].with_name(f"{stores[which].name}-other")
            touched = MUTATORS[name](Trial(path, stores[which], other, draw))
            found = in_own_process(lambda path=path, which=which: examine(path, truths[which]))
            reading[name].update([found["answer"], found["verify"]])
            bad = {found["answer"], found["verify"]} & set(BAD)
            if bad:
                faults += 1
                print(
                    f"{number}: {name} in {stores[which].name}: {found['answer']}, verify {found['verify']}, {touched}"
                )
                print(f"    {found['words'][-300:]}\n    verify: {found['said'][:300]}", flush=True)
            shutil.rmtree(path.parent)
    show("mutator", (*READING, *VERIFYING), reading.items())
    print(f"{faults} faults in {asked.trials} trials")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
