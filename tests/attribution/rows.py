"""Random rows for tests."""

import torch

from lightning_sketch.operators import BlockSRHT
from lightning_sketch.store.sketched_gradients import STAGES, SketchedGradients

DIM = 16
SKETCH = BlockSRHT(200, DIM)


def random_rows(count, seed=0, dim=DIM, sketches=None, **columns):
    """Normal float32 rows of dim 16; a column may be one value for all rows, and a stage its name."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, dim, generator=generator) if sketches is None else sketches
    if isinstance(columns.get("stage"), str):
        columns["stage"] = STAGES.index(columns["stage"])
    full = {k: v if isinstance(v, torch.Tensor) else torch.full((count,), v) for k, v in columns.items()}
    return SketchedGradients(values, BlockSRHT(200, dim), full)
