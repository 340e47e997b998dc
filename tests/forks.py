"""Programs in processes of their own that begin after their imports: a tenth of a second each, instead of five.

A fork of a server that has imported everything runs the program; what it does from there, and how it ends, is its own.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

IMPORTED = ("pytest", "sklearn.datasets", "torch.distributed.fsdp", "pytorch_lightning", "torchmetrics.classification")
ROOMS = ("attribution", "callbacks.gradient_sketch_writer", "subspace")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*IMPORTED, *(f"lightning_sketch.{room}" for room in ROOMS)])


def _run(command, end, errors, environment):
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(end.fileno(), 1)
    end.close()
    with open(errors, "w") as file:
        os.dup2(file.fileno(), 2)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


class Started:
    """A process that runs `python PROGRAM ARGUMENTS`, with what tests use of `subprocess.Popen`."""

    def __init__(self, program, *arguments):
        command = [str(word) for word in (program, *arguments)]
        lines, end = FORKS.Pipe(duplex=False)
        self._errors = tempfile.NamedTemporaryFile("r")
        self._process = FORKS.Process(target=_run, args=(command, end, self._errors.name, dict(os.environ)))
        self._process.start()
        end.close()
        self.stdout = os.fdopen(os.dup(lines.fileno()))
        lines.close()
        self.kill = self._process.kill

    def communicate(self):
        """Wait for the end; return what is left of its output, and its errors."""
        output = self.stdout.read()
        self._process.join()
        with self.stdout, self._errors:
            return output, self._errors.read()

    @property
    def returncode(self):
        return self._process.exitcode
