"""Programs in processes of their own that begin after their imports: a tenth of a second each, instead of five.

A fork of a server that has imported everything runs the program; what it does from there, and how it ends, is its own.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
IMPORTED = ("pytest", "sklearn.datasets", "torch.distributed.fsdp", "pytorch_lightning", "torchmetrics.classification")
ROOMS = ("attribution", "callbacks.gradient_sketch_writer", "subspace")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*IMPORTED, *(f"lightning_sketch.{room}" for room in ROOMS)])


def _run(command, ends, environment, folder, alone):
    os.chdir(folder)
    gc.freeze()  # collections pass over what is imported
    np.random.seed()
    if alone:
        ours = [ROOT, *(path for name in ("tests", "benchmarks") for path in (ROOT / name, *(ROOT / name).rglob("*")))]
        sys.path = [path for path in sys.path if Path(path).resolve() not in ours]
    os.environ.clear()
    os.environ.update(environment)
    for number, end in enumerate(ends, 1):
        os.dup2(end.fileno(), number)
        end.close()
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            sys.path.insert(0, str(folder))
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).parent.absolute()))
            runpy.run_path(command[0], run_name="__main__")
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()  # which processes of multiprocessing leave out


def run(program, *arguments, cwd=None, env=None, timeout=3600):
    """Run `python PROGRAM ARGUMENTS`, or `python -m MODULE ARGUMENTS`, to its end, as `subprocess.run` does.

    It does not find the modules of our tests, as a user's program does not; it finds modules that are imported already.
    """
    process = Started(program, *arguments, cwd=cwd, env=env, alone=True)
    output, errors = process.communicate(timeout)
    return subprocess.CompletedProcess([program, *arguments], process.returncode, output, errors)


class Started:
    """A process that runs `python PROGRAM ARGUMENTS`, with what tests use of `subprocess.Popen`."""

    def __init__(self, program, *arguments, cwd=None, env=None, alone=False):
        (lines, out), (errors, err) = FORKS.Pipe(duplex=False), FORKS.Pipe(duplex=False)
        command = [str(word) for word in (program, *arguments)]
        environment = dict(os.environ if env is None else env)
        self._process = FORKS.Process(target=_run, args=(command, (out, err), environment, cwd or os.getcwd(), alone))
        self._process.start()
        for end in (out, err):
            end.close()
        self.stdout, self._stderr = (os.fdopen(os.dup(end.fileno())) for end in (lines, errors))
        for end in (lines, errors):
            end.close()
        self._errors = ThreadPoolExecutor(1).submit(self._stderr.read)
        self.kill = self._process.kill

    def communicate(self, timeout=3600):
        """Wait for the end; return what is left of its output, and its errors. It is killed after `timeout` seconds."""
        watch = threading.Timer(timeout, self.kill)
        watch.start()
        with self.stdout, self._stderr:
            output, errors = self.stdout.read(), self._errors.result()
        self._process.join()
        watch.cancel()
        return output, errors

    @property
    def returncode(self):
        return self._process.exitcode
