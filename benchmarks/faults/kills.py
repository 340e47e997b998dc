"""Kill real processes with SIGKILL at random, go on from what they saved, and see whether a row is lost or wrong.

Two kinds of trials, of which each has a store of its own:

    append     a program that appends rows, and flushes now and then, is killed at a random moment, and resumed from its
               newest flush or an older one, several times over; in between, and at the end, the store is compacted by
               processes that are killed in a random call that touches the disk, and then by one that is not
    fit        a Lightning fit with GradientSketchWriter and checkpoints is killed at a random moment, and resumed from
               the last checkpoint, from an older one after the later ones are deleted, or, before the first one,
               started again, which begins a new lineage; the last process of a trial runs to its end

After each kill verify() must pass, and the newest lineage must have each step once, without a gap, at least up to the
last flush or checkpoint, with the numbers that it had: those that an uninterrupted run writes, bit for bit. In the
trials of the first kind every older lineage is compared too.

    kills      processes that were killed before their end
    rows       that were compared
    lost       rows that were acknowledged and are not there
    wrong      rows of other numbers, twice, or after a gap; and any error, of the store or of a process that goes on
    torn       checkpoints that Lightning had not written to the end, which are no fault here

python benchmarks/faults/kills.py [--trials N] [--seed S] [--first K]

100 trials take about six minutes on one core. It exits with 1 if anything was lost or wrong. Processes are forked,
which takes no time for imports; the clock decides where a kill hits, so a seed does not repeat it. POSIX only.
"""

import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import arguments, rows, show, spec, table
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import GradientSketchWriter
from lightning_sketch import _files as files
from lightning_sketch.attribution import GradientStore, IndexedDataset
from lightning_sketch.store.format import read_runs

COLUMNS = "kills", "rows", "lost", "wrong", "torn"
STEPS, EPOCH = 32, 8  # of a fit, which saves a checkpoint after each epoch, since samplers restart on resuming


Tell = Callable[[str], Any]  # sends a line to the parent


class Fault(Exception):
    pass


class Process:
    """A forked process, and the lines that it told so far."""

    def __init__(self, work: Callable[..., None], *args: Any):
        self.source, target = os.pipe()
        self.id = os.fork()
        if not self.id:
            code = 1
            try:
                os.close(self.source)
                work(lambda line: os.write(target, f"{line}\n".encode()), *args)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(target)

    def ended(self, after: float | None = None) -> tuple[bool, list[list[str]]]:
        """Kill it after so many seconds, or let it end; return whether it was killed, and the words of its lines."""
        if after is not None:
            time.sleep(after)
            os.kill(self.id, signal.SIGKILL)  # it is a zombie at least, so that its number is not another's
        with os.fdopen(self.source) as file:
            lines = [line.split() for line in file if line.endswith("\n")]
        status = os.waitpid(self.id, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not killed and status:
            raise Fault("wrong", f"a process ended with {status}, after {lines[-1:]}")
        return killed, lines


def compared(store: GradientStore, known: list[Any], needed: int, text: str) -> int:
    """Compare the visible rows of a lineage with known ones, by step; return their number."""
    part = store.where(stage="fit").read()
    steps = part.step.tolist()
    if len(set(steps)) < needed:
        raise Fault("lost", f"{text}: {needed} steps were acknowledged, there are {steps}")
    if steps != list(range(1, len(steps) + 1)):
        raise Fault("wrong", f"{text}: steps {steps}")
    for step, own in zip(steps, told(part), strict=True):
        if own != known[step - 1]:
            raise Fault("wrong", f"{text}: the row of step {step} is {sorted(map(str, own))}"[:600])
    return len(steps)


def told(part: Any) -> list[Any]:
    """Return rows as sets of values; not the number of their run, which a resumed one has of its own."""
    columns = {name: column for name, column in part.columns.items() if name != "attempt"}
    return table(columns, part.sketches)


# ----------------------------------------------------------------------------------------------- a program that appends


def append(tell: Tell, path: Path, parent: int | None, step: int) -> None:
    store = GradientStore.create(path, spec())
    run = store.begin_run("fit", parent=parent, parent_step=None if parent is None else step)
    tell(f"RUN {run.number}")
    with store.appender(run, shard_bytes=500) as appender:
        while True:
            step += 1
            appender.put(rows([step], salt=run.number))
            if step % 5 == 0:
                appender.flush()
                tell(f"FLUSHED {step}")


def compact(tell: Tell, path: Path, last_call: int) -> None:
    """Compact the store, and be killed in a call that touches the disk."""
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == last_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "link", "unlink", "mkdir", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    files.open = counted(open)
    GradientStore.open(path).compact(shard_bytes=5000)


@cache
def told_row(run: int, step: int) -> Any:
    return told(rows([step], salt=run))[0]


def append_trial(folder: Path, draw: random.Random, counts: Counter[str]) -> None:
    path = folder / "store"
    lineages: dict[int, list[tuple[int, int]]] = {}  # the runs of each, with their first steps
    flushed: dict[int, int] = {}
    newest = 0

    def writer_of(number: int, step: int) -> int:
        return [run for run, first in lineages[number] if first <= step][-1]

    def check(text: str) -> None:
        for number in lineages:
            store = GradientStore.open(path, lineage=number)
            known = [told_row(writer_of(number, step), step) for step in range(1, len(store) + 1)]
            counts["rows"] += compared(store, known, flushed[number], f"{text}, lineage {number}")
        if lineages:
            store.verify()

    for _ in range(draw.randint(3, 8)):
        at = max(0, flushed.get(newest, 0) - draw.choice([0, 0, 5, 20]))
        parent = writer_of(newest, at) if at else None
        killed, lines = Process(append, path, parent, at).ended(draw.random() * 0.2)
        counts["kills"] += killed
        if (path / "spec.json").exists():
            number = max((run.number for run in read_runs(GradientStore.open(path).snapshot)), default=0)
            if number > newest:
                before = [(run, first) for run, first in lineages.get(newest, ()) if first <= at]
                lineages[number] = [*before, (number, at + 1)]
                flushed[number] = max([at, *(int(words[1]) for words in lines if words[0] == "FLUSHED")])
                newest = number
        check("after an append")
        compacted = not lineages or draw.random() < 0.6
        for left in range(draw.randint(0, 4), -1, -1):
            if compacted:
                break
            call = int(10 ** draw.uniform(0, 2.5)) if left else -1  # the last one is not killed
            before = GradientStore.open(path).snapshot.number
            killed, _ = Process(compact, path, call).ended()
            counts["kills"] += killed
            if GradientStore.open(path).snapshot.number > before:
                lineages = {newest: lineages[newest]}  # the others are dropped
            check("after a compaction")
            compacted = not killed


# ---------------------------------------------------------------------------------------------------- a Lightning fit


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


class Slow(Callback):
    def on_train_batch_end(self, *args):
        time.sleep(0.02)


def fit(tell: Tell, folder: Path, saved: Path | None) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seed_everything(3, verbose=False)
    data = torch.randn(64, 12), torch.arange(64) % 3
    save = ModelCheckpoint(folder / "saved", filename="{step}", every_n_train_steps=EPOCH, save_top_k=-1)
    writer = GradientSketchWriter(folder / "store", dim=16, dtype="float32")
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        callbacks=[save, Slow(), writer],
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=-1,
        max_steps=STEPS,
    )
    batches = DataLoader(IndexedDataset(TensorDataset(*data)), batch_size=64 // EPOCH)
    trainer.fit(Net(), batches, ckpt_path=saved)


def checkpoints(folder: Path, counts: Counter[str]) -> dict[int, Path]:
    """Return the complete checkpoints, by step."""
    found = {}
    for path in sorted((folder / "saved").glob("*.ckpt")):
        try:
            found[torch.load(path, weights_only=False)["global_step"]] = path
        except (RuntimeError, EOFError, ValueError):
            counts["torn"] += 1
            path.unlink()
    return dict(sorted(found.items()))


def fit_trial(folder: Path, draw: random.Random, counts: Counter[str], whole: list[Any], seconds: float) -> None:
    kills = draw.randint(3, 8)
    while True:
        saved = checkpoints(folder, counts)
        if saved and draw.random() < 0.4:
            last = draw.choice(list(saved))
            for step in [step for step in saved if step > last]:
                saved.pop(step).unlink()
        newest = max(saved, default=0)
        after = draw.uniform(0, 0.9 * seconds) if kills > 0 else None
        kills -= 1
        killed, _ = Process(fit, folder, saved.get(newest)).ended(after)
        counts["kills"] += killed
        if (folder / "store" / "spec.json").exists():
            store = GradientStore.open(folder / "store")
            store.verify()
            needed = max(checkpoints(folder, counts), default=0) if killed else STEPS
            counts["rows"] += compared(store, whole, needed, f"after {newest}")
        elif not killed or saved:
            raise Fault("lost", "the whole store")
        if not killed:
            break
    if draw.random() < 0.5:
        store = store.compact()
        counts["rows"] += compared(store, whole, STEPS, "compacted")


def main() -> int:
    asked = arguments(__doc__, 100, "first")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    counts: dict[str, Counter[str]] = {"append": Counter(), "fit": Counter()}
    with tempfile.TemporaryDirectory() as name:
        start = time.monotonic()
        Process(fit, Path(name, "whole"), None).ended()
        seconds = time.monotonic() - start
        whole = told(GradientStore.open(Path(name, "whole", "store")).read())
        assert len(whole) == STEPS
        print(f"{asked.trials} trials, seed {asked.seed}; an uninterrupted fit takes {seconds:.1f} s", flush=True)
        for number in range(asked.first, asked.first + asked.trials):
            folder, draw = Path(name, "trial"), random.Random(f"{asked.seed} {number}")
            kind = ("append", "fit")[number % 2]
            try:
                if kind == "append":
                    append_trial(folder, draw, counts[kind])
                else:
                    fit_trial(folder, draw, counts[kind], whole, seconds)
            except Exception as error:
                verdict, text = (
                    error.args if isinstance(error, Fault) else ("wrong", f"{type(error).__name__}: {error}")
                )
                counts[kind][verdict] += 1
                print(f"{number}: {kind}: {verdict}: {text[:1000]}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    show("processes", COLUMNS, counts.items())
    return int(any(count["lost"] or count["wrong"] for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
