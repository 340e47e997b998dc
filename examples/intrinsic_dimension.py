"""Find how many numbers a task needs: a classifier few of its parameters, a language model nearly all.

Both are trained in random subspaces, θ = θ₀ + Dᵀ w, where only the dim numbers of w move. The dim at which they
reach 90 % of what full training reaches is d90, the intrinsic dimension of the task:

1. digits: a network of 55,210 parameters classifies handwritten digits; the metric is its accuracy.
2. text: one of 35,072 predicts the next letter in Python's standard library from the eight letters before it (Bengio
   et al., 2003). It starts from the frequencies of letters; the metric is how far its loss falls from there.

Each dimension is asked at the best of several rates. Prints two tables and writes the picture
runs/intrinsic_dimension/intrinsic_dimension.png. Less than two minutes on one core; `--full` trains the language model
five times as long, with three seeds for all.

Source of the question: C. Li et al., arXiv:1804.08838; of the comparison: A. Schioppa, arXiv:2402.03994.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pytorch_lightning import LightningModule, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import IntrinsicDimensionTuner

LETTERS, BEFORE = 128, 8  # ASCII; letters to predict the next one from
GRAY = "#777777"
COLORS = ("#0072B2", "#D55E00")  # Okabe & Ito: distinguishable for color-blind people too
QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Task(LightningModule):
    """Use Adam at a rate that falls to zero."""

    def __init__(self, net, lr):
        super().__init__()
        self.net, self.lr = net, lr

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch):
        outputs = self.net(batch[0])
        self.log("loss", F.cross_entropy(outputs, batch[1]))
        self.log("accuracy", (outputs.argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def classifier():
    return nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))


def language_model(frequencies):
    """Return a model of letters whose last layer starts from zero weights, with a bias of log frequencies."""
    read, write = nn.Embedding(LETTERS, 16), nn.Linear(128, LETTERS)
    nn.init.zeros_(write.weight)
    write.bias.data = frequencies.log()
    return nn.Sequential(read, nn.Flatten(), nn.Linear(16 * BEFORE, 128), nn.ReLU(), write)


def digits():
    """Pixels from 0 to 16; 1437 images to train on, 360 to validate."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images))
    images, labels = torch.tensor(images, dtype=torch.float32)[order], torch.tensor(labels)[order]
    train, val = TensorDataset(images[:1437], labels[:1437]), TensorDataset(images[1437:], labels[1437:])
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=360)


def text():
    """Return the modules of the standard library, cut into pieces of nine letters: eight, and the next one."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    letters = b"".join(file.read_text("utf-8", "replace").encode("ascii", "replace") for file in files)
    pieces = torch.tensor(list(letters[: len(letters) // (BEFORE + 1) * (BEFORE + 1)])).view(-1, BEFORE + 1)
    val, train = pieces[torch.randperm(len(pieces))].tensor_split([8192])
    return train, val


def loaders(train, val):
    train, val = (TensorDataset(pieces[:, :-1], pieces[:, -1]) for pieces in (train, val))
    return DataLoader(train, batch_size=512, shuffle=True), DataLoader(val, batch_size=8192)


def trivial(train, val):
    """Return the frequencies of letters, and the loss of a guess by the last letter alone."""
    pairs = torch.bincount(train[:, -2] * LETTERS + train[:, -1], minlength=LETTERS**2).view(LETTERS, LETTERS) + 0.01
    guess = (pairs / pairs.sum(dim=1, keepdim=True)).log()
    return pairs.sum(dim=0) / pairs.sum(), float(-guess[val[:, -2], val[:, -1]].mean())


def curve(result):
    """Return by dim the mean at the best rate, and its share of full training, or of the gain for a loss."""
    start = result.start if result.mode == "min" else 0.0
    return {dim: (value, (value - start) / (result.baseline - start)) for dim, value in result.means().items()}


def draw(found):
    """Plot both tasks on one scale: the share of parameters that is trained, and of full training that is reached."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(100, color=GRAY, lw=1)
    axes.axhline(90, color=GRAY, lw=1, ls="--")
    for color, (name, result) in zip(COLORS, found.items(), strict=True):
        percent = {100 * dim / result.n: 100 * part for dim, (_, part) in curve(result).items()}
        axes.plot(list(percent), list(percent.values()), "o-", color=color, ms=4)
        _, middle = min((abs(reached - 60), trained) for trained, reached in percent.items())
        axes.annotate(f"{name}  \nn = {result.n:,}  ", (middle, percent[middle]), color=color, ha="right")
        if d90 := result.suggestion():
            x = 100 * d90 / result.n
            axes.plot([x, x], [0, percent[x]], color=color, lw=1, ls=":")
            axes.plot(x, percent[x], "o", color=color, ms=10)
            axes.annotate(f"d90 = {d90:,}  \n{x:.2g} % of n  ", (x, 4), color=color, ha="right")
    axes.annotate("full training", (0.011, 101), color=GRAY)
    axes.annotate("90 % of it", (0.011, 91), color=GRAY)
    axes.set_xscale("log")
    axes.set(
        title="How many numbers does a task need?",
        xlabel="numbers trained, dim, in % of the parameters, n",
        ylabel="reached, in % of full training",
        xlim=(0.01, 150),
        ylim=(0, 108),
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.2)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/intrinsic_dimension"))
    parser.add_argument("--full", action="store_true", help="three seeds, and more training for the language model")
    args = parser.parse_args()
    if args.full:
        print("--full takes ten minutes on one core; if interrupted, it continues where it was", flush=True)
    seeds, epochs = (3, 5) if args.full else (1, 1)
    seed_everything(0, verbose=False)
    pieces = text()
    frequencies, by_last = trivial(*pieces)

    tuner = IntrinsicDimensionTuner({**QUIET, "max_epochs": 25, "default_root_dir": args.out / "digits"})
    train, val = digits()
    module = Task(classifier(), lr=3e-3)
    found = {"digits": tuner.find(module, train, val, monitor="accuracy", method="bisect", seeds=seeds)}

    trainer = {**QUIET, "max_epochs": epochs, "limit_train_batches": 500, "default_root_dir": args.out / "text"}
    tuner = IntrinsicDimensionTuner(trainer)
    module, dims = Task(language_model(frequencies), lr=0.01), [512, 2048, 8192, 16384, 24576, 32768]
    found["text"] = tuner.find(
        module, *loaders(*pieces), dims=dims, monitor="loss", mode="min", method="bisect", seeds=seeds
    )

    for name, result in found.items():
        print(f"\n{name}: {result.monitor} {result.start:.3f} at the start, {result.baseline:.3f} after full training")
        print(f"{'dim':>7}{'of n':>9}{'rate':>7}{result.monitor:>10}{'of full':>9}")
        rates = {row["dim"]: row["scale"] for row in result.table()}
        for dim, (value, part) in curve(result).items():
            mark = "  <- d90" if dim == result.suggestion() else ""
            print(f"{dim:>7,}{dim / result.n:>9.2%}{rates[dim]:>7g}{value:>10.3f}{part:>9.1%}{mark}")
    print(f"\nloss of text by the frequencies of letters {found['text'].start:.3f}, by the last letter {by_last:.3f}")
    for name, result in found.items():
        d90 = result.suggestion()
        found_it = "not reached" if d90 is None else f"{d90} of {result.n} parameters, {d90 / result.n:.2%}"
        print(f"{name}: d90 = {found_it}")
    print(f"digits: {found['digits'].bound(train)}")
    draw(found).savefig(args.out / "intrinsic_dimension.png", dpi=150)
    print(f"\npicture: {args.out / 'intrinsic_dimension.png'}")


if __name__ == "__main__":
    main()
