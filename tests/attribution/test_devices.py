"""Rows are multiplied on a device, block by block, with the same scores."""

import pytest
import torch
from engines import QUERIES, a_store

from lightning_sketch.attribution import scores, top_k


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "options",
    [{}, {"method": "cosine"}, {"method": "influence", "curvature": "fisher", "damping": 1.0, "normalize": True}],
    ids=str,
)
def test_a_device_multiplies_the_same_blocks(tmp_path, device, options):
    """In float32 there and here: equal on one device, and up to the order of sums on another."""
    store = a_store(tmp_path / "store")
    own, there = scores(QUERIES, store, **options), scores(QUERIES, store, device=device, **options)
    assert there.device.type == "cpu"
    torch.testing.assert_close(there, own, rtol=1e-5, atol=1e-5)
    assert device != "cpu" or torch.equal(own, there)
    best = store.top_k(QUERIES, 5, device=device, batch_rows=30, **options)
    assert torch.equal(best.example_ids, top_k(QUERIES, store, 5, **options).example_ids)
