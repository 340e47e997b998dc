"""LightningCLI makes the writer from a YAML file, and its help lists the choices of both callbacks."""

import pytest
import torch
from test_writer_per_example import Still, data

from lightning_sketch import GradientSketchWriter, GradientStore, SubspaceModule

pytest.importorskip("jsonargparse")


def equal(batch):
    """Return the weight of a batch, the same for all."""
    return 1.0


CONFIG = """
seed_everything: 3
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {folder}
  callbacks:
    - class_path: lightning_sketch.GradientSketchWriter
      init_args:
        dirpath: {folder}/store
        dim: 32
        per: example
        fallback: loop
        weight_fn: test_writer_cli.equal
        index_key: null
        seed: 5
"""


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
def test_a_fit_from_yaml(tmp_path):
    from pytorch_lightning.cli import LightningCLI

    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    options = {"args": [f"--config={tmp_path / 'config.yaml'}"], "run": False, "save_config_callback": None}
    cli = LightningCLI(Still, **options)
    (writer,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, GradientSketchWriter))
    assert (writer.per, writer.fallback, writer.weight_fn.__name__) == ("example", "loop", "equal")
    cli.trainer.fit(cli.model, data())
    store = GradientStore.open(tmp_path / "store")
    assert torch.equal(store.metadata()["example_id"].sort()[0], torch.arange(128))
    assert (store.sketch.dim, store.sketch.seed) == (32, 5)


CHOICES = {
    "SpectrumMonitor": {
        "curvature": "{hessian,ggn,fisher}",
        "method": "{lanczos,projected}",
        "on_error": "{warn,raise}",
        "hvp": "{auto,double_backward,forward_over_reverse,finite_differences}",
    },
    "GradientSketchWriter": {
        "per": "{step,example}",
        "dtype": "{bfloat16,float16,float32}",
        "engine": "{auto,hooks,loop,vmap}",
    },
}


def shown(capsys, model, *args):
    """Return what LightningCLI prints with these arguments, then exits."""
    from pytorch_lightning.cli import LightningCLI

    with pytest.raises(SystemExit) as stopped:
        LightningCLI(model, args=list(args), run=False, save_config_callback=None)
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
@pytest.mark.parametrize("callback", CHOICES)
def test_help_lists_the_choices_of_a_callback(capsys, callback):
    text = shown(capsys, Still, f"--trainer.callbacks.help=lightning_sketch.{callback}")
    for argument, choices in CHOICES[callback].items():
        names = (
            f"--trainer.callbacks.{argument}",
            f"--trainer.callbacks.init_args.{argument}",
        )  # by jsonargparse's version
        assert any(f"{name} {choices}" in text for name in names)
    if callback == "GradientSketchWriter":  # choices that may be None
        assert "Optional[Literal['val']]" in text
        assert "Optional[Literal['loop', 'vmap']]" in text
        assert "Optional[Literal['mean', 'sum']]" in text


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
def test_help_lists_the_choices_of_a_subspace(capsys):
    assert "--model.others {frozen,full}" in shown(capsys, SubspaceModule, "--help")
