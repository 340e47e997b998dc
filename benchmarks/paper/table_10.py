"""Table 10, in kind: the dimensions that fine-tuning needs, to classify and to generate, by one run for each.

The GPT of two layers of `intrinsic_dimension_language`, 21,936 parameters, learns to continue modules of Python's
standard library, as tokens of a byte-pair encoding of 256 (`fine_tuning`). It is then fine-tuned

sources     to tell whether 64 tokens are from code, a table of encodings or Python's language reference, by a new
            linear layer, inside of the subspace, on the mean of its last layer; metric: accuracy on other files
packages    to tell which of three packages of code they are from, which is harder
generate    to continue Python's language reference, English in place of code; metric: loss on other parts of it

in full, by Adam, 500 steps, and along random directions, at five times the rate. Cells are log2 of D_*, one for each of
three seeds: at D_* one run, that begins with 8 directions and doubles them at each plateau, reaches 90 % of full
fine-tuning, that is of its accuracy, or of what its loss gains. ">13" did not reach it in 2,000 steps, at the end of
which it had 2^13 directions. Seeds draw directions and the order of data. D_* is an upper bound.

theirs     RoBERTa on SNLI, accuracy; BART on XSUM, Rouge-1
ours       `IntrinsicDimensionFinder` with the kinds of the paper, and with block_srht, which the paper does not have

What differs: model, text and metrics, since theirs cannot be had here. So exponents cannot be compared; but whether
kinds agree can be, and whether generating needs more than classifying does; a search ends at 2^14 directions, about as
many as there are parameters. The rule of the search is the paper's (listing 9), at the mean of the last half of the
steps between two validations in place of the last step. The least improvement is a twentieth of what full fine-tuning
gains, and a search has four times its steps; the paper's are 0.1 for accuracy, 0.5 for Rouge, and once or twice the
steps.

    python benchmarks/paper/table_10.py [sources] [packages] [generate] [--small | --full] [--device cuda]

A quarter of an hour of one thread. Needs tokenizers.

Source: A. Schioppa, arXiv:2402.03994, table 10.
"""

import argparse
import copy
import logging
import math
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from fine_tuning import FULL, SMALL, TASKS, USUAL, FineTuned, Task, fit, pretrained, trainer
from pytorch_lightning import seed_everything
from torch.utils.data import DataLoader

from lightning_sketch import IntrinsicDimensionFinder, SubspaceModule

sys.path.append(str(Path(__file__).parents[1]))
from sketch_speed import machine, print_table

KINDS = ("block_srht", "ffd", "afjl", "qk")
PAPER = {
    "SNLI": {"ffd": "14 13 13", "afjl": "14 13 13", "qk": "13 13 13"},
    "XSUM": {"ffd": "26 25 25", "afjl": "24 24 25", "qk": "26 25 26"},
}
FIRST, RATE = 8, 5  # dim that a search begins with, and its rate, in rates of full fine-tuning
VALIDATIONS, LENGTHS = 10, 4  # validations in as many steps as full fine-tuning has; steps of a search, in these
SILENCED = ("does not have many workers", "nested tensor", "treespec", "The number of training", "validation_step")


class Search(NamedTuple):
    """What the searches of a task have in common."""

    module: FineTuned
    task: Task
    start: float
    full: float
    steps: int
    device: str

    @classmethod
    def of(cls, module: FineTuned, task: Task, steps: int, device: str) -> "Search":
        """Fine-tune in full."""
        once = DataLoader(task.val, 256)
        (start,) = trainer(1, 1, device, []).validate(module, once, verbose=False)
        seed_everything(0, verbose=False)
        full = fit(copy.deepcopy(module), task, steps, steps, device)
        return cls(module, task, start[task.monitor], full, steps, device)

    @property
    def target(self) -> float:
        """90 % of the metric, or of what the loss gains."""
        return 0.9 * self.full if self.task.mode == "max" else self.start - 0.9 * (self.start - self.full)

    def run(self, kind: str, seed: int) -> str:
        """Return log2 of the dim at which a run that doubles it reaches the target, or of the last, which does not."""
        seed_everything(seed, verbose=False)
        largest = 1 << int(math.log2(sum(p.numel() for p in self.module.parameters())))
        every, delta = self.steps // VALIDATIONS, abs(self.full - self.start) / 20
        own = {"mode": self.task.mode, "delta": delta, "every_n_train_steps": every}
        finder = IntrinsicDimensionFinder(self.task.monitor, self.target, **own)
        sub = SubspaceModule(copy.deepcopy(self.module), FIRST, max_dim=largest, sketch=kind, seed=seed, scale=RATE)
        fit(sub, self.task, LENGTHS * self.steps, every, self.device, finder)
        return f"{'' if finder.found else '>'}{int(math.log2(finder.history[-1]['dim']))}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help="sources, packages, generate; all by default")
    parser.add_argument("--small", action="store_true", help="try the script out; the numbers say nothing")
    parser.add_argument("--full", action="store_true", help="a wider model, trained longer")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    asked = parser.parse_args()
    size = SMALL if asked.small else FULL if asked.full else USUAL
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=f".*({'|'.join(SILENCED)})")
    print(f"{machine()}, {torch.get_num_threads()} threads, {asked.device}\n")

    seed_everything(0, verbose=False)
    model, tokenizer = pretrained(size, asked.device)
    about, lines, header = [], [[kind] for kind in KINDS], ["kind"]
    for name in asked.tasks or TASKS:
        seed_everything(0, verbose=False)
        task = TASKS[name](tokenizer)
        module = FineTuned(model, task)
        search = Search.of(module, task, size.steps, asked.device)
        sizes = f"{sum(p.numel() for p in module.parameters()):,}", f"{len(task.train):,}"
        about.append([name, *sizes, task.monitor, *(f"{x:.3f}" for x in (search.start, search.full, search.target))])
        theirs = "XSUM" if name == "generate" else "SNLI"
        header += [f"theirs, {theirs}", f"ours, {name}"]
        for line in lines:
            found = " ".join(search.run(line[0], seed) for seed in range(size.seeds))
            line.extend([PAPER[theirs].get(line[0], "-"), found])
            print(f"{name}, {line[0]}: {found}", file=sys.stderr, flush=True)

    print_table(["ours", "parameters", "pieces", "metric", "before", "after full fine-tuning", "target"], about)
    print("log2 D_*, one for each seed\n")
    print_table(header, lines)


if __name__ == "__main__":
    main()
