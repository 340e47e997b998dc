"""Program: search for the intrinsic dimension, on one process or two; each rank prints the result.

python searches.py FOLDER [NAME=JSON ...]

TRAINS DIM SEED RANK STEP  is printed when a run begins, full training as a dim of 0
WRITES RANK                when a file is renamed
FOUND JSON                 at the end: the result, and for each validation the dim, the metric on this rank alone, and
                           the value in the finder's history, if there is a finder

The options are steps, lr, devices, the arguments of `find`, and:

checkpoints: runs that are killed go on from their last validation.
shuffle: batches are drawn in random order, not in the order of the rows.
apart: the ranks have folders of their own, as on two machines.
halved: each rank validates on digits of its own, 0 to 4 or 5 to 9, and monitors the accuracy on these.
dies=[DIM, STEP]: the process is killed in this step of the run with this dim.
slow=DIM: this run takes half a second more for each step.
dies="replace": it is killed when it is about to rename a file.
full=[DIM, RANK]: this rank runs out of memory in the run with this dim.
differ: each rank makes other weights.
largest=BYTES: it is killed in the middle of the first file that becomes longer.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from nets import Classifier, digits, train_loader, trainer, val_loader
from pytorch_lightning.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_sketch.subspace import IntrinsicDimensionTuner, SubspaceModule

PROGRAM = Path(__file__)
DIMS = [4, 32, 128]
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")


class Watched(pl.Callback):
    def __init__(self, slow, dies, full, own):
        self.slow, self.dies, self.full, self.own = slow, dies, full, own

    def dim(self, pl_module):
        return pl_module.directions.dim if isinstance(pl_module, SubspaceModule) else 0

    def on_train_start(self, trainer, pl_module):
        seed = pl_module.hparams.seed if self.dim(pl_module) else 0
        line = f"\nTRAINS {self.dim(pl_module)} {seed} {trainer.global_rank} {trainer.global_step}\n"
        os.write(1, line.encode())  # whole, unlike print

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.slow == self.dim(pl_module):
            time.sleep(0.5)
        if self.dies == [self.dim(pl_module), trainer.global_step]:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.full == [self.dim(pl_module), trainer.global_rank] and trainer.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def on_validation_end(self, trainer, pl_module):
        if "own_acc" in trainer.callback_metrics and trainer.state.fn == "fit" and not trainer.sanity_checking:
            history = getattr(trainer.callbacks[0], "history", None)
            value = history[-1]["value"] if history else None
            self.own.append([self.dim(pl_module), float(trainer.callback_metrics["own_acc"]), value])


class InOrder(Classifier):
    """A module whose batches have the same rows on any number of ranks."""

    def train_dataloader(self):
        rows, ranks = TensorDataset(*digits(slice(0, 256))), self.trainer.world_size
        sampler = DistributedSampler(rows, ranks, rank=self.trainer.global_rank, shuffle=False)
        return DataLoader(rows, batch_size=32 // ranks, sampler=sampler)


class Halves(InOrder):
    """A module that logs a plain number for each batch, which is not reduced over ranks."""

    def validation_step(self, batch):
        self.log("own_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())


def halves():
    """Return a loader with small digits in even rows, for the first rank, and large ones in odd rows."""
    images, labels = digits(slice(1437, None))
    small, large = (labels < 5).nonzero().flatten(), (labels >= 5).nonzero().flatten()
    rows = torch.stack([part[: min(len(small), len(large))] for part in (small, large)], dim=1).flatten()
    return DataLoader(TensorDataset(images[rows], labels[rows]), batch_size=len(rows))


def searched(
    folder,
    steps=40,
    lr=3e-3,
    devices=1,
    halved=False,
    shuffle=False,
    checkpoints=False,
    apart=False,
    differ=False,
    slow=None,
    dies=None,
    full=None,
    **options,
):
    pl.seed_everything(int(os.environ.get("LOCAL_RANK", 0)) if differ else 0, verbose=False)
    folder = f"{folder}/{os.environ.get('LOCAL_RANK', 0)}" if apart else folder
    own: list[list[float]] = []
    options = {"dims": DIMS, "monitor": "own_acc" if halved else "val_acc", "threshold": 0.7, **options}

    def trainer_fn(dim):
        strategy = "auto" if devices == 1 else DDPStrategy(process_group_backend="gloo")
        watched = Watched(slow, dies, full, own)
        places = {"devices": devices, "strategy": strategy, "default_root_dir": folder}
        return trainer(watched, max_steps=steps, enable_checkpointing=checkpoints, **places)

    tuner = IntrinsicDimensionTuner(trainer_fn, rates=10)
    model = (Halves if halved else InOrder)(lr=lr)
    train = train_loader(batch_size=32 // devices, shuffle=True) if shuffle else None
    result = tuner.find(model, train, halves() if halved else val_loader(), **options)
    return {
        "results": {**result.results, "checkpoint": [Path(path or "").name for path in result.results["checkpoint"]]},
        "suggestion": result.suggestion(),
        "numbers": [result.baseline, result.start, result.target],
        "own": own,
    }


def start(folder, *launcher, **options):
    """Start the program; with a launcher in a session of its own."""
    from forks import Started  # which ranks do not find that run this file

    arguments = [str(folder), *(f"{k}={json.dumps(v)}" for k, v in options.items())]
    if not launcher:
        return Started(PROGRAM, *arguments)
    command = [sys.executable, *launcher, str(PROGRAM), *arguments]
    path = os.pathsep.join([str(PROGRAM.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )


def ended(process, timeout=3600):
    """Wait for a process; return its code, the lines that it printed, split at the first blank, and its errors."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes by itself, which are in sessions of their own
        try:
            process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, [line.split(" ", 1) for line in out.splitlines() if " " in line], err


def trained(lines):
    """Return [dim, seed, rank, step] of the runs that were started."""
    return [[int(number) for number in rest.split()] for word, rest in lines if word == "TRAINS"]


def found(lines):
    return [json.loads(rest) for word, rest in lines if word == "FOUND"]


def logged(rename, dies):
    def logged_rename(*args):
        if dies == "replace":
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(1, f"\nWRITES {os.environ.get('LOCAL_RANK', 0)}\n".encode())
        return rename(*args)

    return logged_rename


def main(folder, *options):
    torch.set_num_threads(1)
    asked = {name: json.loads(value) for name, value in (option.split("=", 1) for option in options)}
    largest = asked.pop("largest", None)
    os.replace = logged(os.replace, asked.get("dies"))
    if largest is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    os.write(1, f"\nFOUND {json.dumps(searched(folder, **asked))}\n".encode())
    if torch.distributed.is_initialized():  # else gloo's threads may abort the process as it ends
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
