"""A store of several runs, for the tests of engines that read its rows."""

import torch

from lightning_sketch import GradientStore
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators import BlockSRHT
from lightning_sketch.store import SketchedGradients, StoreSpec

LAYOUT = Layout(("weight", "bias"), (torch.Size([100, 20]), torch.Size([48])))
SKETCH = BlockSRHT(LAYOUT.n, 64, seed=3)


def examples(ids, seed=0, fingerprint=7, stage="validate", **columns):
    """A row for each id, with every type of column."""
    draw, ids = torch.Generator().manual_seed(seed), torch.as_tensor(list(ids))
    stages = ("fit", "validate", "test", "predict", "queries")
    columns = {
        "example_id": ids,
        "fingerprint": torch.full_like(ids, fingerprint),
        "stage": torch.full_like(ids, stages.index(stage)),
        "prob_true": torch.rand(len(ids), generator=draw),
        "weight": 1 + torch.rand(len(ids), generator=draw),
        "source": [("wiki", "it's", "")[i % 3] for i in ids.tolist()],
        "even": ids % 2 == 0,
        **columns,
    }
    return SketchedGradients(torch.randn(len(ids), 64, generator=draw), SKETCH, columns)


QUERIES = examples(range(4), seed=99)


def put(path, *parts, stage="validate", dtype="bfloat16", **options):
    """The store, after a run more: a file for each part."""
    store = GradientStore.create(path, StoreSpec.of(SKETCH, LAYOUT, dtype=dtype))
    with store.appender(store.begin_run(stage, **options)) as appender:
        for part in parts:
            appender.put(part)
            appender.flush()
    return GradientStore.open(path)


def a_store(path, dtype="bfloat16"):
    return put(path, *(examples(range(start, start + 50), seed=start) for start in range(0, 400, 50)), dtype=dtype)
