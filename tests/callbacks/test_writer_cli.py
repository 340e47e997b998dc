"""The writer out of a YAML file: all of its arguments are plain values or names of functions."""

import pytest
import torch
from test_writer_per_example import Still, data

from lightning_sketch import GradientSketchWriter, GradientStore

pytest.importorskip("jsonargparse")


def equal(batch):
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
    made = LightningCLI(Still, **options)
    (writer,) = (one for one in made.trainer.callbacks if isinstance(one, GradientSketchWriter))
    assert (writer.per, writer.fallback, writer.weight_fn.__name__) == ("example", "loop", "equal")
    made.trainer.fit(made.model, data())
    store = GradientStore.open(tmp_path / "store")
    assert torch.equal(store.metadata()["example_id"].sort()[0], torch.arange(128))
    assert (store.sketch.dim, store.sketch.seed) == (32, 5)
