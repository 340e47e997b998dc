"""Installs a wheel into an environment of its own, elsewhere, and runs the README's first block there.

Usage: python .ci/try_wheel.py dist/*.whl
"""

import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What the README's block takes from its reader.
BEFORE = """
import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(256, 8), torch.randint(3, (256,))), batch_size=64)


torch.manual_seed(0)
model, data = Model(), Data()
"""
AFTER = f"""
import lightning_sketch
assert not lightning_sketch.__file__.startswith({str(ROOT)!r}), lightning_sketch.__file__
assert len(monitor.history) == 10
assert all(m.converged[0] for m in monitor.history)
"""


def main(wheel: str) -> None:
    """Exit with an error if the wheel does not install, or the block does not run."""
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder) / "env", with_pip=True)
        python = Path(folder) / "env" / "bin" / "python"
        # -I: nothing of this checkout or of the caller's environment is on the path
        run = [str(python), "-I"]
        install = ["-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
        subprocess.run([*run, *install, f"{Path(wheel).resolve()}[wandb,plots,cli]"], check=True)
        (Path(folder) / "first.py").write_text(BEFORE + block + AFTER)
        offline = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "MPLBACKEND": "agg"}
        done = subprocess.run([*run, "first.py"], cwd=folder, env=offline, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the README's first block failed:\n{done.stderr[-3000:]}")
        if not (Path(folder) / "spectrum.png").stat().st_size > 10_000:
            raise SystemExit("the README's first block has written no picture.")
        command = Path(folder) / "env" / "bin" / "lightning-sketch"
        print(subprocess.run([command, "info"], cwd=folder, check=True, capture_output=True, text=True).stdout)
    print(f"{wheel} installs, and runs the README's first block.")


if __name__ == "__main__":
    main(sys.argv[1])
