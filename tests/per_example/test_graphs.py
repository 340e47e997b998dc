"""Batches of PyTorch Geometric split into their graphs without being told how."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_sketch import sketch_gradients
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators import BlockSRHT


def test_rows_are_the_gradients_of_the_graphs_alone():
    geometric = pytest.importorskip("torch_geometric.data", reason="no torch_geometric")
    torch.manual_seed(0)
    graphs = [geometric.Data(x=torch.randn(2 + i % 3, 4), y=torch.tensor([i % 3])) for i in range(7)]
    module = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 3)])

    def loss(module, batch):
        nodes = module[0](batch.x).tanh()
        return F.cross_entropy(
            module[1](nodes.new_zeros(batch.num_graphs, 6).index_add(0, batch.batch, nodes)), batch.y
        )

    sketch = BlockSRHT(Layout.of(module).n, 16)
    batches = [geometric.Batch.from_data_list(part) for part in (graphs[:4], graphs[4:])]
    with pytest.warns(UserWarning, match="the first axis is not that of the 4 examples"):
        rows = sketch_gradients(module, batches, sketch, loss)
    truth = []
    for graph in graphs:
        gradients = torch.autograd.grad(
            loss(module, geometric.Batch.from_data_list([graph])), list(module.parameters())
        )
        truth.append(sketch.matvec(torch.cat([g.flatten() for g in gradients])))
    torch.testing.assert_close(rows.sketches, torch.stack(truth))
