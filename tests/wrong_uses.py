"""Wrong uses that newcomers make, each with the words of the refusal, its reason and what to type instead.

`test_wrong_uses.py` makes every call, and `docs/troubleshooting.py` makes a page of them. The arguments of a call are
attributes of `Given`, by name.
"""

import ast
import contextlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import pytorch_lightning
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, seed_everything
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_sketch import (
    GGN,
    BlockSRHT,
    GradientSketchWriter,
    GradientStore,
    Hessian,
    IndexedDataset,
    IntrinsicDimensionFinder,
    IntrinsicDimensionTuner,
    SpectrumMonitor,
    SubspaceModule,
    load_spectrum,
    make_sketch,
    sketch_gradients,
    spectrum,
)
from lightning_sketch._files import CorruptFile
from lightning_sketch.attribution import suggest_dim
from lightning_sketch.autodiff.second_derivatives import NoSecondDerivative
from lightning_sketch.curvature import loss_slice
from lightning_sketch.store import LanceRows

Trainer = partial(
    pytorch_lightning.Trainer, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
)
Topic = Literal["Sketches", "Spectra", "Attribution", "Stores", "Intrinsic dimension", "Trainer and callbacks"]
TOPICS = get_args(Topic)


@dataclass(frozen=True)
class WrongUse:
    """A call that is refused.

    Attributes:
        topic: The chapter that it belongs to.
        title: What is wrong, in the words that one would search for.
        call: Makes the call; its arguments are names of what `Given` has.
        error: The type of the refusal, exactly.
        words: A regular expression of the decisive words of its message.
        why: The reason, one sentence.
        instead: What to type.
    """

    topic: Topic
    title: str
    call: Callable[..., Any]
    error: type[Exception]
    words: str
    why: str
    instead: str

    @property
    def code(self) -> str:
        """The lines of the call, as a user would type them."""
        source = textwrap.dedent(inspect.getsource(self.call))
        (function,) = ast.parse(source).body
        assert isinstance(function, ast.FunctionDef)
        first, last = function.body[0].lineno, function.body[-1].end_lineno
        return textwrap.dedent("\n".join(source.splitlines()[first - 1 : last]))

    def run(self, given: "Given") -> Any:
        """Make the call."""
        return self.call(**{name: getattr(given, name) for name in inspect.signature(self.call).parameters})

    def run_instead(self, given: "Given") -> None:
        """Type what the page advises, after the call."""
        space = {**globals(), "seed_everything": partial(seed_everything, verbose=False)}
        for code, error in ((self.code, self.error), (self.instead, ())):
            names = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
            space |= {name: getattr(given, name) for name in names if hasattr(given, name)}
            with contextlib.suppress(error):
                exec(code, space)


WRONG_USES: list[WrongUse] = []


def wrong(topic: Topic, title: str, error: type[Exception], words: str, *, why: str, instead: str):
    """Add a call to the table."""

    def add(call: Callable[..., Any]) -> Callable[..., Any]:
        WRONG_USES.append(WrongUse(topic, title, call, error, words, why, instead))
        return call

    return add


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx=0):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx=0):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SimCLR(Classifier):
    """A contrastive loss: each example is compared with the others of its batch."""

    def training_step(self, batch, batch_idx=0):
        z = F.normalize(self(batch[0]), dim=1)
        similar = (z @ z.T / 0.1).fill_diagonal_(-1e9)
        return F.cross_entropy(similar, torch.arange(len(z)).roll(1))


class GAN(Classifier):
    """A module that steps its optimizers itself."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class ReturnsNothing(Classifier):
    """A training step that forgets to return its loss."""

    def training_step(self, batch, batch_idx=0):
        self.log("loss", super().training_step(batch))


class TwoTowers(LightningModule):
    """Two networks and no forward."""

    def __init__(self):
        super().__init__()
        self.images, self.texts = nn.Linear(8, 4), nn.Linear(8, 4)

    def training_step(self, batch, batch_idx=0):
        return F.mse_loss(self.images(batch[0]), self.texts(batch[0]))


class Clip(torch.autograd.Function):
    """A function of one's own, whose derivative has no derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clamp(-1, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient


class Lines(IterableDataset):
    """A stream."""

    def __iter__(self):
        yield from range(10)


def loss_fn(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


class Given:
    """What the calls use: a small model, its data, and a store of its training in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(64, 8, generator=generator)
        self.data = TensorDataset(x, torch.randint(3, (64,), generator=generator))
        self.loader = DataLoader(IndexedDataset(self.data), batch_size=16)
        self.batches = list(DataLoader(self.data, batch_size=16))
        self.x, self.y = self.batches[0]

    @property
    def new_model(self) -> Classifier:
        """A model that is not trained."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return Classifier()

    @cached_property
    def _trained(self) -> dict[str, Any]:
        """Train a model, with a row for each step and each example, and two checkpoints."""
        model = self.new_model
        trainer = Trainer(max_epochs=1, callbacks=[GradientSketchWriter("sketches", dim=32)])
        trainer.fit(model, self.loader)
        trainer.save_checkpoint("last.ckpt")
        trainer.validate(model, self.loader, verbose=False)
        subspace = Trainer(max_epochs=1)
        subspace.fit(SubspaceModule(self.new_model, 8), self.loader)
        subspace.save_checkpoint("subspace.ckpt")
        return model.state_dict()

    @property
    def model(self) -> Classifier:
        """The trained model."""
        model = Classifier()
        model.load_state_dict(self._trained)
        return model

    @property
    def store(self) -> GradientStore:
        """The rows of its training and of its examples."""
        assert self._trained
        return GradientStore.open("sketches")

    @property
    def rows(self) -> GradientStore:
        """The rows of its examples."""
        return self.store.where(stage="validate")

    @property
    def queries(self):
        return self.rows.sketch_gradients(self.model, self.batches[:1])

    @property
    def h(self) -> Hessian:
        return Hessian(loss_fn, self.model, self.batches)

    @property
    def sketch(self) -> BlockSRHT:
        return BlockSRHT(n=1000, dim=64)

    @property
    def gradient(self) -> torch.Tensor:
        return torch.ones(1000)


# Sketches


@wrong(
    "Sketches",
    "dim is larger than n",
    ValueError,
    r"needs 0 < dim <= n, got dim=4096, n=1000",
    why="A sketch maps n numbers to fewer.",
    instead="BlockSRHT(n=1000, dim=512)",
)
def _():
    BlockSRHT(n=1000, dim=4096)


@wrong(
    "Sketches",
    "A negative seed",
    ValueError,
    r"needs 0 <= seed < 2\^63, got seed=-1",
    why="The seed is one of the integers that define the map on every machine, and is stored as 63 bits.",
    instead="BlockSRHT(n=1000, dim=64, seed=1)",
)
def _():
    BlockSRHT(n=1000, dim=64, seed=-1)


@wrong(
    "Sketches",
    "n or dim is a float",
    TypeError,
    r"takes an integer n, got 1000\.0",
    why="1e3 is a float in Python, and a map between 1000.0 numbers does not exist.",
    instead="BlockSRHT(n=1000, dim=64)",
)
def _():
    BlockSRHT(n=1e3, dim=64)


@wrong(
    "Sketches",
    "An unknown kind of sketch",
    ValueError,
    r"unknown kind of sketch 'srht'; choose one of .*block_srht",
    why="Kinds are found by their names, and a kind of your own when its module has been imported.",
    instead='make_sketch("block_srht", n=1000, dim=64)',
)
def _():
    make_sketch("srht", n=1000, dim=64)


@wrong(
    "Sketches",
    "The vector has another length than the sketch",
    ValueError,
    r"takes vectors of size 1000 along the last axis, got shape \(999,\)",
    why="The map is defined for n numbers, and padding would give another product than the one you meant.",
    instead="BlockSRHT(n=len(gradient), dim=64).matvec(gradient)",
)
def _(sketch, gradient):
    sketch.matvec(gradient[:999])


@wrong(
    "Sketches",
    "Several vectors along the wrong axis",
    ValueError,
    r"along the last axis, got shape \(1000, 8\); move that axis last",
    why="Vectors lie along the last axis, as in torch.nn.Linear; the axes before it are a batch.",
    instead="sketch.matvec(matrix.T)",
)
def _(sketch):
    matrix = torch.ones(1000, 8)
    sketch.matvec(matrix)


@wrong(
    "Sketches",
    "A vector of integers",
    TypeError,
    r"takes real floating-point numbers, got torch\.int64; convert it with \.float\(\)",
    why="A sketch multiplies by real numbers, which an integer type would round away.",
    instead="sketch.matvec(torch.arange(1000).float())",
)
def _(sketch):
    sketch.matvec(torch.arange(1000))


@wrong(
    "Sketches",
    "A NumPy array, or a list of parameters, in place of a tensor",
    TypeError,
    r"takes a torch tensor, got list; use torch\.as_tensor, or torch\.nn\.utils\.parameters_to_vector",
    why="A sketch takes one flat vector; the parameters of a module are many tensors.",
    instead="vector = torch.nn.utils.parameters_to_vector(model.parameters())\n"
    "BlockSRHT(n=len(vector), dim=64).matvec(vector)",
)
def _(sketch, model):
    sketch.matvec(list(model.parameters()))


# Spectra


@wrong(
    "Spectra",
    "A module in the place of loss_fn",
    TypeError,
    r"Hessian takes a module, got a function; .* Hessian\(loss_fn, module, batches\)",
    why="The loss comes first, then the module and the batches.",
    instead="Hessian(loss_fn, model, batches)",
)
def _(model, batches):
    Hessian(model, loss_fn, batches)


@wrong(
    "Spectra",
    "nn.CrossEntropyLoss() as loss_fn",
    TypeError,
    r"called as loss_fn\(module, batch\), got CrossEntropyLoss, which takes an output and labels; pass lambda",
    why="Only a function of the module and the batch can say which part of the batch goes where.",
    instead="Hessian(lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]), model, batches)",
)
def _(model, batches):
    Hessian(nn.CrossEntropyLoss(), model, batches)


@wrong(
    "Spectra",
    "loss_fn takes the batch alone",
    TypeError,
    r"called as loss_fn\(module, batch\), got <lambda>\(batch\), which takes other arguments",
    why="The loss is evaluated with other weights, so it has to use the module that it is given.",
    instead="Hessian(lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]), model, batches)",
)
def _(model, batches):
    Hessian(lambda batch: F.cross_entropy(model(batch[0]), batch[1]), model, batches)


@wrong(
    "Spectra",
    "loss_fn returns one loss per example",
    ValueError,
    r"a scalar tensor; got a tensor of shape \(16,\); use \.mean\(\)",
    why="The Hessian is that of one number, the mean loss.",
    instead="Hessian(lambda module, batch: losses(module, batch).mean(), model, batches)",
)
def _(model, batches):
    def losses(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1], reduction="none")

    spectrum(Hessian(losses, model, batches))


@wrong(
    "Spectra",
    "loss_fn returns the loss and the output",
    ValueError,
    r"a scalar tensor; got a tuple; return the loss alone",
    why="Which of several values is the loss is not guessed.",
    instead="Hessian(lambda module, batch: loss_and_output(module, batch)[0], model, batches)",
)
def _(model, batches):
    def loss_and_output(module, batch):
        output = module(batch[0])
        return F.cross_entropy(output, batch[1]), output

    spectrum(Hessian(loss_and_output, model, batches))


@wrong(
    "Spectra",
    "loss_fn ends with .item()",
    ValueError,
    r"got a float; leave out \.item\(\)",
    why="A Python number has no derivative.",
    instead="Hessian(loss_fn, model, batches)",
)
def _(model, batches):
    spectrum(Hessian(lambda module, batch: loss_fn(module, batch).item(), model, batches))


@wrong(
    "Spectra",
    "A detached loss, or one computed under no_grad",
    ValueError,
    r"the loss does not depend on the parameters .*no_grad or from detached tensors",
    why="Without a graph from the parameters to the loss there is nothing to differentiate.",
    instead="spectrum(Hessian(loss_fn, model, batches))",
)
def _(model, batches):
    spectrum(Hessian(torch.no_grad()(loss_fn), model, batches))


@wrong(
    "Spectra",
    "The batches are a generator",
    TypeError,
    r"read again for every product, got a generator that can be read only once; pass list\(batches\)",
    why="Each of some fifty products reads all batches, and a generator is exhausted after the first.",
    instead="Hessian(loss_fn, model, list(batches))",
)
def _(model, loader):
    Hessian(loss_fn, model, (batch for batch in loader))


@wrong(
    "Spectra",
    "One batch in place of a list of batches",
    TypeError,
    r"batches is a list of batches, got a tuple of tensors .* pass \[batch\]",
    why="Inputs and labels would be taken for two batches.",
    instead="Hessian(loss_fn, model, [(x, y)])",
)
def _(model, x, y):
    Hessian(loss_fn, model, (x, y))


@wrong(
    "Spectra",
    "An empty list of batches",
    ValueError,
    r"batches holds no example, so there is no loss to differentiate; pass at least one batch",
    why="The mean over no example is not defined.",
    instead="spectrum(Hessian(loss_fn, model, loader))",
)
def _(model):
    spectrum(Hessian(loss_fn, model, []))


@wrong(
    "Spectra",
    "A pattern that no parameter matches",
    ValueError,
    r"no trainable parameter matches 'fc\.\*'; the names start with net\.0\.weight",
    why="Patterns are those of a shell, compared with the names in model.named_parameters().",
    instead='Hessian(loss_fn, model, batches, parameters="net.2.*")',
)
def _(model, batches):
    Hessian(loss_fn, model, batches, parameters="fc.*")


@wrong(
    "Spectra",
    "All parameters are frozen",
    ValueError,
    r"Classifier has no trainable parameter; set requires_grad=True on some",
    why="Curvature is that of the parameters that train, and model.freeze() or a checkpoint for inference has none.",
    instead="model.requires_grad_(True)",
)
def _(model, batches):
    model.freeze()
    Hessian(loss_fn, model, batches)


@wrong(
    "Spectra",
    "An operation that PyTorch cannot differentiate twice",
    NoSecondDerivative,
    r"cannot differentiate twice: Clip is marked once_differentiable.*hvp=\"finite_differences\"",
    why="A Hessian-vector product is the derivative of a gradient.",
    instead='spectrum(Hessian(loss_fn, model, batches, hvp="finite_differences"))',
)
def _(model, batches):
    def clipped_loss(module, batch):
        return F.cross_entropy(Clip.apply(module(batch[0])), batch[1])

    spectrum(Hessian(clipped_loss, model, batches))


@wrong(
    "Spectra",
    "The loss is NaN",
    ValueError,
    r"the loss of batch 0 is nan at these parameters.*use the weights of an earlier step",
    why="The training has diverged, and NaN has no curvature.",
    instead='Classifier.load_from_checkpoint("last.ckpt")',
)
def _(model, batches):
    nn.init.constant_(model.net[0].weight, float("nan"))
    spectrum(Hessian(loss_fn, model, batches))


@wrong(
    "Spectra",
    "spectrum() of a model",
    TypeError,
    r"spectrum takes an operator, got a Classifier; pass Hessian\(loss_fn, module, batches\)",
    why="Eigenvalues are those of a matrix: the Hessian, the Gauss-Newton matrix or the Fisher matrix of a loss.",
    instead="spectrum(Hessian(loss_fn, model, batches))",
)
def _(model):
    spectrum(model)


@wrong(
    "Spectra",
    "More eigenvalues than products",
    ValueError,
    r"num_matvecs=10 products show at most 10 eigenvalues, asked for top_k=10 and bottom_k=3",
    why="Each product with the matrix adds one dimension to the space in which eigenvalues are looked for.",
    instead="spectrum(h, num_matvecs=96, top_k=10)",
)
def _(h):
    spectrum(h, num_matvecs=10, top_k=10)


@wrong(
    "Spectra",
    "top_k is a string",
    ValueError,
    r"need top_k >= 0, got '10'; pass a whole number",
    why="It came from a config file or the command line, where numbers in quotation marks are strings.",
    instead="spectrum(h, top_k=10)",
)
def _(h):
    spectrum(h, top_k="10")


@wrong(
    "Spectra",
    "A loss slice along three directions",
    ValueError,
    r"a slice has 1 or 2 directions, got 3; leave directions out",
    why="A slice is a curve or a surface, which can be drawn.",
    instead="loss_slice(h, directions=2)",
)
def _(h):
    loss_slice(h, directions=3)


@wrong(
    "Spectra",
    "loss_slice() of a loss function",
    TypeError,
    r"loss_slice takes an operator, got a function; pass Hessian\(loss_fn, module, batches\)",
    why="The operator has the loss, the module and the batches, so that slices and spectra are of the same loss.",
    instead="loss_slice(Hessian(loss_fn, model, batches))",
)
def _():
    loss_slice(loss_fn)


@wrong(
    "Spectra",
    "GGN of a module without forward",
    ValueError,
    r"TwoTowers has no forward.*model_fn=lambda",
    why="The Gauss-Newton matrix needs the output that the loss is computed from, and there are two candidates.",
    instead="GGN(TwoTowers(), batches, model_fn=lambda module, batch: module.images(batch[0]))",
)
def _(batches):
    spectrum(GGN(TwoTowers(), batches))


@wrong(
    "Spectra",
    "An unknown loss of the output",
    ValueError,
    r"output_loss_fn='mse' is not known; use one of 'cross_entropy', 'binary_cross_entropy', 'squared_error'",
    why="Three losses are known by name, any other is a function of the output and the batch.",
    instead='GGN(model, batches, output_loss_fn="squared_error")',
)
def _(model, batches):
    GGN(model, batches, output_loss_fn="mse")


@wrong(
    "Spectra",
    "load_spectrum() of a checkpoint",
    CorruptFile,
    r"last\.ckpt cannot be read .*it may be truncated, or no safetensors file",
    why="A checkpoint has weights, and no spectrum.",
    instead='Trainer(callbacks=[SpectrumMonitor(stages=["validate"])]).validate(model, loader, ckpt_path="last.ckpt")',
)
def _(model):
    load_spectrum("last.ckpt")


# Attribution


@wrong(
    "Attribution",
    "The sketch is of another size than the parameters",
    ValueError,
    r"the sketch takes n=1000 numbers, these parameters have 195; build it with n=195",
    why="n is the number of trainable parameters that match.",
    instead="sketch_gradients(model, loader, BlockSRHT(n=195, dim=64))",
)
def _(model, loader, sketch):
    sketch_gradients(model, loader, sketch)


@wrong(
    "Attribution",
    "The name of a sketch, or its dim, in place of a sketch",
    TypeError,
    r"takes a sketch, got a str; pass BlockSRHT\(n, dim\)",
    why="Rows can be compared only if they were made by one and the same map, so you make it.",
    instead="sketch_gradients(model, loader, BlockSRHT(n=195, dim=64))",
)
def _(model, loader):
    sketch_gradients(model, loader, "block_srht")


@wrong(
    "Attribution",
    "Module and batches exchanged",
    TypeError,
    r"takes a module, got a list; .*sketch_gradients\(module, batches\)",
    why="The module comes first.",
    instead="store.sketch_gradients(model, batches)",
)
def _(store, model, batches):
    store.sketch_gradients(batches, model)


@wrong(
    "Attribution",
    "A plain nn.Module without a loss",
    ValueError,
    r"Sequential has no training_step; pass loss_fn=lambda module, batch",
    why="Only a LightningModule says what its loss is.",
    instead="sketch_gradients(model.net, loader, BlockSRHT(n=195, dim=64), loss_fn)",
)
def _(model, loader):
    sketch_gradients(model.net, loader, BlockSRHT(n=195, dim=64))


@wrong(
    "Attribution",
    "One batch in place of a list of batches",
    TypeError,
    r"batches is a list of batches, got a tuple of tensors .* pass \[batch\]",
    why="Inputs and labels would be taken for two batches.",
    instead="store.sketch_gradients(model, [(x, y)])",
)
def _(store, model, x, y):
    store.sketch_gradients(model, (x, y))


@wrong(
    "Attribution",
    "A detached loss",
    ValueError,
    r"the loss does not depend on the parameters; .*without \.detach\(\)",
    why="Without a graph from the parameters to the loss there is no gradient.",
    instead="sketch_gradients(model, loader, BlockSRHT(n=195, dim=64), loss_fn)",
)
def _(model, batches):
    sketch_gradients(model, batches, BlockSRHT(n=195, dim=64), lambda module, batch: loss_fn(module, batch).detach())


@wrong(
    "Attribution",
    "A contrastive loss",
    ValueError,
    r"the loss of SimCLR couples the examples of a batch, as a contrastive loss does.*per='step'",
    why="A single example has no such loss, so that there is no gradient of its own to store.",
    instead="GradientSketchWriter()  # a row for each training step",
)
def _(loader):
    writer = GradientSketchWriter("contrastive")
    Trainer(callbacks=[writer]).validate(SimCLR(), loader)


@wrong(
    "Attribution",
    "k is not a positive whole number",
    ValueError,
    r"need k >= 1, got '5'; pass a whole number",
    why="k is how many examples to find for each query.",
    instead="rows.top_k(queries, 5)",
)
def _(rows, queries):
    rows.top_k(queries, k="5")


@wrong(
    "Attribution",
    "A misspelled method",
    ValueError,
    r"method='influnce' is not known; use one of dot, cosine, tracin, influence",
    why="There are four ways to score.",
    instead='rows.top_k(queries, 5, method="influence", curvature="fisher")',
)
def _(rows, queries):
    rows.top_k(queries, 5, method="influnce")


@wrong(
    "Attribution",
    "Influence before fit_curvature",
    FileNotFoundError,
    r"no curvature 'ggn' at weights [0-9a-f]{8} in .*; call store\.fit_curvature\(module, batches\) first",
    why="Influence divides by the Gauss-Newton matrix, which is fitted once to the training data and kept.",
    instead='store.fit_curvature(model, loader)\nrows.top_k(queries, 5, method="influence")',
)
def _(rows, queries):
    rows.top_k(queries, 5, method="influence")


@wrong(
    "Attribution",
    "An unknown curvature",
    ValueError,
    r"curvature='hessian' cannot be made from rows; margin, fisher, trak can, and 'ggn' is made by",
    why="A row has the gradient of an example, and no second derivatives.",
    instead='rows.top_k(queries, 5, method="influence", curvature="fisher")',
)
def _(rows, queries):
    rows.top_k(queries, 5, method="influence", curvature="hessian")


@wrong(
    "Attribution",
    "Damping is zero or negative",
    ValueError,
    r"damping is a positive number, got 0; .*'auto' is 0\.\d+ here",
    why="The smallest eigenvalues of a sketched curvature are noise, and their inverse would rule all scores.",
    instead='rows.top_k(queries, 5, method="influence", curvature="fisher", damping="auto")',
)
def _(rows, queries):
    rows.top_k(queries, 5, method="influence", curvature="fisher", damping=0)


@wrong(
    "Attribution",
    "Several dampings at once",
    ValueError,
    r"top_k takes one damping, got several; use scores\(\.\.\.\)",
    why="A list of dampings gives a table of scores for each, of which there is no one order.",
    instead='rows.scores(queries, method="influence", curvature="fisher", damping=[0.01, 0.1])',
)
def _(rows, queries):
    rows.top_k(queries, 5, method="influence", curvature="fisher", damping=[0.01, 0.1])


@wrong(
    "Attribution",
    "A batch, or the model, in place of queries",
    ValueError,
    r"takes queries taken at the rows' weights, as SketchedGradients, got a Tensor; .*store\.sketch_gradients",
    why="Scores compare gradients with gradients.",
    instead="rows.top_k(store.sketch_gradients(model, [(x, y)]), 5)",
)
def _(rows, x):
    rows.top_k(x, 5)


@wrong(
    "Attribution",
    "Queries of another sketch",
    ValueError,
    r"queries were made by BlockSRHT\(.*seed=1\), rows by BlockSRHT\(.*seed=0\)",
    why="Products of numbers from two random maps are noise.",
    instead="queries = store.sketch_gradients(model, batches)",
)
def _(rows, model, batches):
    queries = sketch_gradients(model, batches, BlockSRHT(n=195, dim=32, seed=1))
    rows.top_k(queries, 5)


@wrong(
    "Attribution",
    "Queries at other weights",
    ValueError,
    r"queries were taken at weights [0-9a-f]{8}, the rows at [0-9a-f]{8}; load the checkpoint",
    why="Gradients at other weights answer another question; the eight digits are a fingerprint of the weights.",
    instead='model = Classifier.load_from_checkpoint("last.ckpt")\nqueries = store.sketch_gradients(model, batches)',
)
def _(rows, new_model, batches):
    queries = rows.sketch_gradients(new_model, batches)
    rows.top_k(queries, 5)


@wrong(
    "Attribution",
    "A selection with no rows",
    ValueError,
    r"there are no rows to score: the selection is empty, or nothing was written",
    why="No row has these values.",
    instead='print(store.metadata()["epoch"].unique())',
)
def _(store, queries):
    store.where(stage="validate", epoch=7).top_k(queries, 5)


@wrong(
    "Attribution",
    "TracIn without checkpoints",
    ValueError,
    r"method='tracin' takes \{step of the checkpoint: queries\}.*pass \{int\(rows\.step\[0\]\): queries\}",
    why="TracIn sums over checkpoints, and needs the queries at each of them.",
    instead='rows.top_k({int(rows.metadata()["step"][0]): queries}, 5, method="tracin")',
)
def _(rows, queries):
    rows.top_k(queries, 5, method="tracin")


@wrong(
    "Attribution",
    "IndexedDataset of a stream",
    TypeError,
    r"takes a data set with a length, got a Lines, which has none.*index_key='hash'",
    why="The items of a stream have no index.",
    instead='GradientSketchWriter(index_key="hash")  # or the key of the ids in your batches',
)
def _():
    IndexedDataset(Lines())


@wrong(
    "Attribution",
    "IndexedDataset of a data loader",
    TypeError,
    r"takes a data set, got a DataLoader, .*DataLoader\(IndexedDataset\(dataset\), batch_size=\.\.\.\)",
    why="Only the data set knows the index of an item.",
    instead="DataLoader(IndexedDataset(data), batch_size=16, shuffle=True)",
)
def _(data):
    IndexedDataset(DataLoader(data, batch_size=16))


@wrong(
    "Attribution",
    "index_key is not in the batch",
    ValueError,
    r"index_key='id' is not in the batch, which is a list of 2 items; name the key or the position",
    why="The ids of the examples are read from the batch, by a key or a position.",
    instead="DataLoader(IndexedDataset(data), batch_size=16)  # or index_key='hash'",
)
def _(store, model, batches):
    store.sketch_gradients(model, batches, index_key="id")


@wrong(
    "Attribution",
    "fit_curvature without batches",
    ValueError,
    r"a curvature of no examples; pass a list of batches, or a data loader",
    why="The data loader was empty, or a generator that had been read before.",
    instead="store.fit_curvature(model, loader)",
)
def _(store, model):
    store.fit_curvature(model, [])


@wrong(
    "Attribution",
    "Reliability in percent",
    ValueError,
    r"reliability is a correlation between 0 and 1, got 90; 0\.9 is usual",
    why="It is the correlation of scores with those that a sketch of all numbers would give.",
    instead="suggest_dim(rows, reliability=0.9)",
)
def _(rows):
    suggest_dim(rows, reliability=90)


# Stores


@wrong(
    "Stores",
    "There is no store in this folder",
    FileNotFoundError,
    r"runs/sketches has no store, since there is no such folder .*; pass the writer's dirpath",
    why="The folder was moved, or has another name, or was the temporary one of fast_dev_run.",
    instead='GradientStore.open("sketches")  # or writer.dirpath',
)
def _():
    GradientStore.open("runs/sketches")


@wrong(
    "Stores",
    "A checkpoint in place of a store",
    FileNotFoundError,
    r"last\.ckpt has no store, since it is a file, and a store is a folder",
    why="Rows are in the writer's folder, not in the checkpoint.",
    instead='GradientStore.open("sketches")  # or writer.dirpath',
)
def _(model):
    GradientStore.open("last.ckpt")


@wrong(
    "Stores",
    "writer.dirpath before training",
    ValueError,
    r"got path=None, which a writer's dirpath is until it has written; run trainer\.fit first",
    why="The folder is chosen beside that of the logger or the checkpoints, when training begins.",
    instead="Trainer(max_epochs=1, callbacks=[writer]).fit(model, loader)\nGradientStore.open(writer.dirpath)",
)
def _():
    writer = GradientSketchWriter(name="steps")
    GradientStore.open(writer.dirpath)


@wrong(
    "Stores",
    "An unknown column in where()",
    ValueError,
    r"no column 'source'; there are example_id, stage, step",
    why="The columns of a row are those of every store and those of your columns_fn.",
    instead='GradientSketchWriter(columns_fn=lambda batch: {"source": batch["source"]})',
)
def _(store):
    store.where(source="wikipedia")


@wrong(
    "Stores",
    "An unknown stage in where()",
    ValueError,
    r"no stage 'train'; use one of fit, validate",
    why="A stage is what the Trainer ran: rows of training steps are of the stage fit.",
    instead='store.where(stage="fit")',
)
def _(store):
    store.where(stage="train")


@wrong(
    "Stores",
    "A value of another type in where()",
    ValueError,
    r"column 'epoch' has int64, where\(\) got 'last'; give a value of this type",
    why="A comparison with another type would select nothing, without a word.",
    instead='store.where(epoch=int(store.metadata()["epoch"].max()))',
)
def _(store):
    store.where(epoch="last")


@wrong(
    "Stores",
    "A function as a mask",
    ValueError,
    r"takes a mask of \d+ booleans, one per row, got a function",
    why="Rows are selected by whole columns, without reading the sketches.",
    instead='store.where(store.metadata()["loss"] > 1)',
)
def _(store):
    store.where(lambda row: row.loss > 1)


@wrong(
    "Stores",
    "An unknown fit",
    ValueError,
    r"lineage=7 is no fit of the store; its fits are \[1\]",
    why="Fits are counted from 1, in the order of their calls.",
    instead='GradientStore.open("sketches")  # the latest',
)
def _(store):
    GradientStore.open("sketches", lineage=7)


@wrong(
    "Stores",
    "Another dim in the folder of an old store",
    ValueError,
    r"another spec:\s+sketch:\s+in the store: .*'dim': 32.*\s+asked: .*'dim': 64.*overwrite=True",
    why="Rows of two sketches cannot be compared, so that they do not share a store.",
    instead='GradientSketchWriter("sketches", dim=64, overwrite=True)  # or another dirpath',
)
def _(store, model, loader):
    writer = GradientSketchWriter("sketches", dim=64)
    Trainer(max_epochs=1, callbacks=[writer]).fit(model, loader)


@wrong(
    "Stores",
    "Two writers with one dirpath",
    MisconfigurationException,
    r"two GradientSketchWriters write to .*both, where only the rows of one would be found; pass each its own",
    why="A store shows the rows of its latest fit, and each writer has a fit of its own.",
    instead='[GradientSketchWriter("steps"), GradientSketchWriter("heads", name="heads", parameters="net.2.*")]',
)
def _(new_model, loader):
    writers = [GradientSketchWriter("both"), GradientSketchWriter("both", name="second")]
    Trainer(max_epochs=1, callbacks=writers).fit(new_model, loader)


@wrong(
    "Stores",
    "columns_fn returns no dict",
    ValueError,
    r"columns_fn returned a list; return a dict",
    why="A column has a name, by which where() finds it.",
    instead='GradientSketchWriter(columns_fn=lambda batch: {"label": batch[1]})',
)
def _(new_model, loader):
    writer = GradientSketchWriter("labeled", columns_fn=lambda batch: [batch[1]])
    Trainer(max_epochs=1, callbacks=[writer]).fit(new_model, loader)


@wrong(
    "Stores",
    "An unknown format of export",
    ValueError,
    r"export\('csv'\) is not known; use 'npy', 'parquet' or 'lance'",
    why="Thousands of numbers per row are no table of text.",
    instead='rows.export("parquet", "rows.parquet")',
)
def _(rows):
    rows.export("csv", "rows.csv")


@wrong(
    "Stores",
    "An export to Lance that is there already",
    ValueError,
    r"rows\.lance is there; pass append=True to add what is new",
    why="Nothing is overwritten unless you say so.",
    instead='rows.export("lance", "rows.lance", append=True)',
)
def _(rows):
    rows.export("lance", "rows.lance")
    rows.export("lance", "rows.lance")


@wrong(
    "Stores",
    "LanceRows of nothing",
    FileNotFoundError,
    r"nothing\.lance has no Lance dataset; write one by store\.export\('lance', uri\)",
    why="LanceRows reads what an export has written.",
    instead='rows.export("lance", "new.lance")\nLanceRows("new.lance")',
)
def _():
    LanceRows("nothing.lance")


# Intrinsic dimension


@wrong(
    "Intrinsic dimension",
    "dim is 0, or larger than the number of weights",
    ValueError,
    r"a subspace of n=195 parameters needs 0 < dim <= n, got dim=0",
    why="dim is how many numbers are trained.",
    instead="SubspaceModule(model, 1)",
)
def _(model):
    SubspaceModule(model, 0)


@wrong(
    "Intrinsic dimension",
    "dim is a share of the parameters",
    ValueError,
    r"dim is a whole number, got 0\.1 \(float\); pass an int",
    why="dim is a number of coordinates, not a part of n.",
    instead="SubspaceModule(model, 20)",
)
def _(model):
    SubspaceModule(model, 0.1)


@wrong(
    "Intrinsic dimension",
    "SubspaceModule of a plain nn.Module",
    TypeError,
    r"wraps a LightningModule, got a Sequential; wrap another module by SubspaceModel",
    why="It runs the module's own training_step and optimizer.",
    instead="from lightning_sketch.subspace import SubspaceModel  # for a loop of your own\n\n"
    "SubspaceModel(model.net, 8)",
)
def _(model):
    SubspaceModule(model.net, 8)


@wrong(
    "Intrinsic dimension",
    "SubspaceModule of a class",
    TypeError,
    r"wraps a LightningModule, got the class Classifier",
    why="The subspace starts from the weights of a module.",
    instead="SubspaceModule(Classifier(), 8)",
)
def _():
    SubspaceModule(Classifier, 8)


@wrong(
    "Intrinsic dimension",
    "SubspaceModule of a SubspaceModule",
    TypeError,
    r"wraps a LightningModule, got a SubspaceModule; .*materialize\(\)",
    why="The weights inside follow w already.",
    instead="SubspaceModule(subspace.materialize(), 4)",
)
def _(model):
    subspace = SubspaceModule(model, 8)
    SubspaceModule(subspace, 4)


@wrong(
    "Intrinsic dimension",
    "One module in two subspaces",
    ValueError,
    r"no trainable parameters\. .*copy\.deepcopy\(module\)",
    why="A module in a subspace is frozen and moved by its w; two of them would move it at once.",
    instead="import copy\n\nfor dim in (8, 16):\n    SubspaceModule(copy.deepcopy(model), dim)",
)
def _(model):
    for dim in (8, 16):
        SubspaceModule(model, dim)


@wrong(
    "Intrinsic dimension",
    "A module with manual optimization",
    MisconfigurationException,
    r"GAN uses manual optimization.*use automatic optimization, or SubspaceModel",
    why="Its training step would step an optimizer of weights that are frozen.",
    instead="from lightning_sketch.subspace import SubspaceModel  # for a loop of your own\n\n"
    "SubspaceModel(GAN().net, 8)",
)
def _():
    SubspaceModule(GAN(), 8)


@wrong(
    "Intrinsic dimension",
    "A scale that is no positive number",
    ValueError,
    r"need a scale > 0, got 'auto'; 0\.3, 1 and 3 are usual",
    why="The scale is the length of the directions; IntrinsicDimensionTuner tries several by itself.",
    instead="SubspaceModule(model, 8, scale=3)",
)
def _(model):
    SubspaceModule(model, 8, scale="auto")


@wrong(
    "Intrinsic dimension",
    "SubspaceModule.load_from_checkpoint without the module",
    TypeError,
    r"has w, without the module that it moves; pass module=Model\(\.\.\.\)",
    why="A checkpoint of a subspace has dim numbers, which say how far to go from the initial weights.",
    instead="seed_everything(1)  # as before the training\n"
    'SubspaceModule.load_from_checkpoint("subspace.ckpt", module=Classifier())',
)
def _(model):
    SubspaceModule.load_from_checkpoint("subspace.ckpt")


@wrong(
    "Intrinsic dimension",
    "A checkpoint of a subspace with other initial weights",
    ValueError,
    r"trained from other initial weights:\s+checkpoint: fingerprint [0-9a-f]{8}\s.*save_theta0=True",
    why="w counts from the weights that training began with, which another seed changes.",
    instead="seed_everything(1)  # as before the training\n"
    'SubspaceModule.load_from_checkpoint("subspace.ckpt", module=Classifier())',
)
def _(model):
    SubspaceModule.load_from_checkpoint("subspace.ckpt", module=Classifier())


@wrong(
    "Intrinsic dimension",
    "Model.load_from_checkpoint of a subspace's checkpoint",
    RuntimeError,
    r"Missing key\(s\) in state_dict: \"net\.0\.weight\".*\s.*Unexpected key\(s\) in state_dict: .*\"w\"",
    why="The message is PyTorch's own, before any code of ours runs: the checkpoint has w in place of the weights.",
    instead="seed_everything(1)  # as before the training\n"
    'SubspaceModule.load_from_checkpoint("subspace.ckpt", module=Classifier()).materialize()',
)
def _(model):
    Classifier.load_from_checkpoint("subspace.ckpt")


@wrong(
    "Intrinsic dimension",
    "A metric that is not logged",
    MisconfigurationException,
    r"monitor='val_acc' is not logged in validation, which logs 'val_loss'; log it in validation_step",
    why="A dimension is enough if this metric is good enough, so that validation has to log it.",
    instead='tuner.find(model, loader, loader, monitor="val_loss", mode="min")',
)
def _(new_model, loader):
    tuner = IntrinsicDimensionTuner(lambda dim: Trainer(max_epochs=1))
    tuner.find(new_model, loader, loader, monitor="val_acc")


@wrong(
    "Intrinsic dimension",
    "A Trainer in place of a function that makes one",
    TypeError,
    r"makes a Trainer for each run.*got a Trainer; pass lambda dim: Trainer\(\.\.\.\)",
    why="Each dimension is a training of its own, with its own Trainer and logger.",
    instead="IntrinsicDimensionTuner(lambda dim: Trainer(max_epochs=1))",
)
def _():
    IntrinsicDimensionTuner(Trainer(max_epochs=1))


@wrong(
    "Intrinsic dimension",
    "A threshold in percent",
    ValueError,
    r"need a threshold in \(0, 1\], got 90; 0\.9 is usual",
    why="It is a part of what full training reaches.",
    instead='tuner.find(model, loader, loader, monitor="val_loss", mode="min", threshold=0.9)',
)
def _(new_model, loader):
    tuner = IntrinsicDimensionTuner(lambda dim: Trainer(max_epochs=1))
    tuner.find(new_model, loader, loader, monitor="val_loss", mode="min", threshold=90)


@wrong(
    "Intrinsic dimension",
    "One dimension in place of a list",
    TypeError,
    r"dims are the dimensions to try, got an int; pass a list, dims=\[64\]",
    why="The search compares several dimensions.",
    instead='tuner.find(model, loader, loader, monitor="val_loss", mode="min", dims=[16, 64])',
)
def _(new_model, loader):
    tuner = IntrinsicDimensionTuner(lambda dim: Trainer(max_epochs=1))
    tuner.find(new_model, loader, loader, monitor="val_loss", mode="min", dims=64)


@wrong(
    "Intrinsic dimension",
    "IntrinsicDimensionFinder without a subspace that can grow",
    MisconfigurationException,
    r"needs a SubspaceModule with max_dim, got Classifier; fit SubspaceModule\(module, 8, max_dim=4096\)",
    why="The finder doubles the dimension while the module trains.",
    instead="Trainer(max_epochs=1, callbacks=[finder]).fit(SubspaceModule(model, 8, max_dim=128), loader, loader)",
)
def _(new_model, loader):
    finder = IntrinsicDimensionFinder("val_loss", 0.5, mode="min")
    Trainer(callbacks=[finder]).fit(new_model, loader, loader)


# Trainer and callbacks


@wrong(
    "Trainer and callbacks",
    "num_batches='all'",
    ValueError,
    r"need num_batches >= 1, got 'all'; pass a whole number; 4 is usual",
    why="The monitor keeps copies of these batches, the same ones for all measurements.",
    instead="SpectrumMonitor(num_batches=16)",
)
def _():
    SpectrumMonitor(num_batches="all")


@wrong(
    "Trainer and callbacks",
    "top_k=0",
    ValueError,
    r"need top_k >= 1, got 0; pass a whole number; 10 is usual",
    why="The largest eigenvalue is what the log is about.",
    instead="SpectrumMonitor(top_k=1, bottom_k=0)",
)
def _():
    SpectrumMonitor(top_k=0)


@wrong(
    "Trainer and callbacks",
    "parameters is a number, or the parameters themselves",
    TypeError,
    r"parameters is a pattern of names, or a list of patterns, got 5; pass parameters='net\.\*'",
    why="Names say the same in logs, checkpoints and on all ranks.",
    instead='SpectrumMonitor(parameters="net.2.*")',
)
def _():
    SpectrumMonitor(parameters=5)


@wrong(
    "Trainer and callbacks",
    "The model as an argument of a callback",
    ValueError,
    r"curvature=a Classifier is not known; use 'hessian', 'ggn', 'fisher'",
    why="A callback gets the model from the Trainer; its first argument is which matrix to measure.",
    instead="Trainer(max_epochs=1, callbacks=[SpectrumMonitor()]).fit(model, loader)",
)
def _(model):
    SpectrumMonitor(model)


@wrong(
    "Trainer and callbacks",
    "A value of the loss as loss_fn",
    TypeError,
    r"loss_fn is a function that is called as loss_fn\(module, batch\), got a Tensor",
    why="The monitor evaluates the loss again, on its batches and at the weights of that time.",
    instead="SpectrumMonitor(loss_fn=loss_fn)",
)
def _(model, x, y):
    SpectrumMonitor(loss_fn=F.cross_entropy(model(x), y))


@wrong(
    "Trainer and callbacks",
    "Both intervals of a SpectrumMonitor",
    ValueError,
    r"set every_n_epochs or every_n_train_steps, got both \(1 and 100\); use two monitors with two names",
    why="Measurements have one interval, so that the curve has one axis.",
    instead="SpectrumMonitor(every_n_train_steps=100)",
)
def _():
    SpectrumMonitor(every_n_epochs=1, every_n_train_steps=100)


@wrong(
    "Trainer and callbacks",
    "stages is a string",
    ValueError,
    r"stages='validate'\) is not known; use a list",
    why="There may be several.",
    instead='SpectrumMonitor(stages=["validate"])',
)
def _():
    SpectrumMonitor(stages="validate")


@wrong(
    "Trainer and callbacks",
    "plot() before training",
    ValueError,
    r"nothing to plot: there is no measurement yet; run trainer\.fit first",
    why="The picture is of the measurements in monitor.history.",
    instead="Trainer(max_epochs=1, callbacks=[monitor]).fit(model, loader)\nmonitor.plot()",
)
def _():
    monitor = SpectrumMonitor()
    monitor.plot()


@wrong(
    "Trainer and callbacks",
    "Two monitors without names",
    RuntimeError,
    r"Found more than one stateful callback of type `SpectrumMonitor`.*`callback\.state_key` must be unique",
    why="The message is Lightning's own: both would have one place in the checkpoint, and one set of log keys.",
    instead='[SpectrumMonitor(), SpectrumMonitor(parameters="net.2.*", name="head")]',
)
def _():
    Trainer(callbacks=[SpectrumMonitor(), SpectrumMonitor(parameters="net.2.*")])


@wrong(
    "Trainer and callbacks",
    "SpectrumMonitor with manual optimization",
    MisconfigurationException,
    r"GAN uses manual optimization.*SpectrumMonitor\(loss_fn=lambda module, batch: \.\.\.\)",
    why="Such a step trains when it is called, and may have several losses.",
    instead="SpectrumMonitor(loss_fn=lambda module, batch: module.generator_loss(batch))",
)
def _(loader):
    Trainer(callbacks=[SpectrumMonitor()]).fit(GAN(), loader)


@wrong(
    "Trainer and callbacks",
    "A training step that returns no loss",
    ValueError,
    r"training_step of ReturnsNothing returned no loss for this batch; return a scalar, or pass loss_fn",
    why="Lightning skips such a batch in silence; a measurement has nothing to differentiate.",
    instead="def training_step(self, batch, batch_idx):\n    ...\n    return loss",
)
def _(loader):
    Trainer(max_epochs=1, callbacks=[SpectrumMonitor()]).fit(ReturnsNothing(), loader)


@wrong(
    "Trainer and callbacks",
    "EarlyStopping on an eigenvalue",
    MisconfigurationException,
    r"check_finite=True\) would stop training at the first eigenvalue that has not converged.*check_finite=False",
    why="An eigenvalue that has not converged is logged as NaN, which EarlyStopping takes for a divergence.",
    instead='EarlyStopping("hessian/lambda_max", check_finite=False)',
)
def _(new_model, loader):
    stopping = EarlyStopping("hessian/lambda_max")
    Trainer(callbacks=[SpectrumMonitor(), stopping]).fit(new_model, loader)


@wrong(
    "Trainer and callbacks",
    "An unknown value of per=",
    ValueError,
    r"GradientSketchWriter\(per='examples'\) is not known; use 'step', 'example'",
    why="A row is that of a step, or of one example.",
    instead='GradientSketchWriter(per="example")',
)
def _():
    GradientSketchWriter(per="examples")


@wrong(
    "Trainer and callbacks",
    "dim of a writer is no whole number",
    ValueError,
    r"need dim >= 1, got 'auto'; pass a whole number; 4096 is usual",
    why="dim is how many numbers a row has on the disk.",
    instead="GradientSketchWriter(dim=4096)",
)
def _():
    GradientSketchWriter(dim="auto")


@wrong(
    "Trainer and callbacks",
    "An unknown type of the stored numbers",
    ValueError,
    r"dtype=torch\.bfloat16\) is not known; use 'bfloat16', 'float16', 'float32'",
    why="It is given by name, so that a YAML file can have it.",
    instead='GradientSketchWriter(dtype="bfloat16")',
)
def _():
    GradientSketchWriter(dtype=torch.bfloat16)


@wrong(
    "Trainer and callbacks",
    "Rows of examples without ids",
    MisconfigurationException,
    r"per='example' needs an id for each example: pass index_key=.*IndexedDataset",
    why="A score without the example that it belongs to would be of no use.",
    instead="Trainer(max_epochs=1, callbacks=[writer]).fit(model, DataLoader(IndexedDataset(data), batch_size=16))",
)
def _(new_model, data):
    writer = GradientSketchWriter("by_example", per="example")
    Trainer(max_epochs=1, callbacks=[writer]).fit(new_model, DataLoader(data, batch_size=16))


@wrong(
    "Trainer and callbacks",
    "A dirpath that is a file",
    ValueError,
    r"last\.ckpt is a file, where the folder of a store is to be; pass another dirpath",
    why="A store is a folder of many files.",
    instead='GradientSketchWriter("sketches")',
)
def _(model, loader):
    writer = GradientSketchWriter("last.ckpt")
    Trainer(max_epochs=1, callbacks=[writer]).fit(model, loader)
