"""Symmetric matrices of known eigenvalues."""

import torch


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def symmetric(eigenvalues, dtype=torch.float64):
    q, _ = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues)))
    matrix = (q * torch.as_tensor(eigenvalues, dtype=torch.float64)) @ q.T
    return ((matrix + matrix.T) / 2).to(dtype)
