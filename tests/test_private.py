"""Every private name that the package uses exists in the installed versions."""

import importlib
import importlib.resources

import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_sketch._private import NAMES, required
from lightning_sketch.autodiff.shards import fsdp_groups

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, g):
        return g


def node(function):
    return lambda: function(torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)).grad_fn


def trainer():
    return pl.Trainer(accelerator="cpu", **QUIET)


def sharded():
    return fully_shard(nn.Linear(1, 1), mesh=init_device_mesh("cpu", (1,)))


INSTANCES = {
    "fully_shard(Module())": sharded,
    "a group of FSDP": lambda: fsdp_groups(sharded())[0],
    "a parameter of FSDP": lambda: fsdp_groups(sharded())[0].fsdp_params[0],
    "Trainer()": trainer,
    "Trainer().fit_loop": lambda: trainer().fit_loop,
    "Trainer().fit_loop.epoch_loop": lambda: trainer().fit_loop.epoch_loop,
    "Trainer().validate_loop": lambda: trainer().validate_loop,
    "Trainer().strategy": lambda: trainer().strategy,
    "DDPStrategy()": DDPStrategy,
    "LightningModule()": pl.LightningModule,
    "CSVLogger()": lambda: CSVLogger("unused"),
    "WandbLogger()": lambda: WandbLogger(offline=True),
    "TQDMProgressBar()": TQDMProgressBar,
    "RichProgressBar()": RichProgressBar,
    "torchmetrics.MeanMetric()": torchmetrics.MeanMetric,
    "torch.nn.Module()": nn.Module,
    "torch.nn.Parameter()": lambda: nn.Parameter(torch.ones(2)),
    "torch.nn.Conv2d()": lambda: nn.Conv2d(1, 1, 3),
    "torch.compile(Module())": lambda: torch.compile(nn.Linear(1, 1), backend="eager"),
    "torch.optim.Adam(fused=True)": lambda: torch.optim.Adam([nn.Parameter(torch.ones(2))], fused=True),
    "torch.optim.SGD(fused=True)": lambda: torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0, fused=True),
    "custom autograd.Function": lambda: Square.apply(torch.ones(2, requires_grad=True)).grad_fn,
    "AddBackward0": node(lambda x, y: x + y),
    "SubBackward0": node(lambda x, y: x - y),
    "MulBackward0": node(lambda x, y: x * y),
    "RepeatBackward0": node(lambda x, y: x.repeat(2)),
    "ViewBackward0": node(lambda x, y: x.view(2, 1)),
}


@pytest.fixture
def one_process():
    """A process group of this process alone, where parameters are sharded."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def owner_of(path):
    """Return the owner: an instance made here, a module, an attribute of a module, or a constant that is the name."""
    if path in INSTANCES:
        return INSTANCES[path]()
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"{path} cannot be imported")


@pytest.mark.parametrize(("owner", "name", "where", "breaks"), NAMES, ids=[f"{row[0]}.{row[1]}" for row in NAMES])
def test_the_name_exists(owner, name, where, breaks, monkeypatch, tmp_path, request):
    if "FSDP" in owner or "fully_shard" in owner:
        request.getfixturevalue("one_process")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    found = owner_of(owner)
    assert found == name if isinstance(found, str) else hasattr(found, name), f"{where} needs it: {breaks}"
    if owner.endswith("Backward0"):
        assert found.name() == owner


def test_a_missing_name_is_an_error_that_names_it():
    with pytest.raises(RuntimeError, match=r"Linear has no _gone in the version that is installed, .* report this"):
        required(nn.Linear(1, 1), "_gone")
    with pytest.raises(RuntimeError, match=r"torch.autograd.forward_ad has no _gone"):
        required(torch.autograd.forward_ad, "_gone")


def test_the_table_names_existing_files():
    import lightning_sketch

    root = importlib.resources.files(lightning_sketch)
    for _, name, where, _ in NAMES:
        for file in where.split(", ") if where != "several" else ():
            assert (root / file).exists(), f"{name}: {file}"
