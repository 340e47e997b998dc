"""A fingerprint is the sum that its module states, in whole numbers modulo 2^64, however it is computed."""

import importlib

import numpy as np
import pytest
import torch

from lightning_sketch.autodiff.fingerprint import fingerprint
from lightning_sketch.operators.random import Key, words

W, M = 4096, 0x9E3779B97F4A7C15


def by_definition(tensors):
    multipliers = [int(word) | 1 for word in words(Key(0, "fingerprint"), 0, W)]
    total = 0
    for tensor in tensors:
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        numbers = np.frombuffer(data + bytes(-len(data) % 8), dtype="<u8").tolist()
        own = sum(multipliers[i % W] * number for i, number in enumerate(numbers)) + tensor.numel()
        total = (total * M + own) % (1 << 64)
    return (total - (1 << 64) if total >= 1 << 63 else total) or 1


def tensors(device="cpu"):
    """Of all sizes about those of one and two runs of words, of several types, one that begins anywhere."""
    found = [
        torch.arange(n, dtype=torch.float64).sin().to(dtype)
        for n, dtype in [
            (1, torch.float32), (8191, torch.float32), (8192, torch.float32), (8193, torch.float32),
            (20_000, torch.float64), (33_000, torch.bfloat16), (7, torch.float16), (0, torch.float32),
        ]
    ]  # fmt: skip
    found += [torch.arange(300, dtype=torch.uint8)[3:], torch.arange(12.0).view(3, 4).T, torch.tensor(5)]
    return [tensor.to(device) for tensor in found]


def test_the_sum_is_as_defined():
    assert fingerprint(tensors()) == by_definition(tensors())
    assert fingerprint([]) == by_definition([]) == 1


@pytest.mark.parametrize("most", [1, 1 << 15, 1 << 17])
def test_sums_of_a_few_tensors_at_once_are_the_same(monkeypatch, most):
    monkeypatch.setattr(importlib.import_module("lightning_sketch.autodiff.fingerprint"), "_TOGETHER", most)
    assert fingerprint(tensors()) == by_definition(tensors())


@pytest.mark.gpu
@pytest.mark.parametrize("most", [1, 1 << 15, 1 << 26])
def test_the_device_changes_nothing(monkeypatch, most):
    monkeypatch.setattr(importlib.import_module("lightning_sketch.autodiff.fingerprint"), "_TOGETHER", most)
    assert fingerprint(tensors("cuda")) == by_definition(tensors())
