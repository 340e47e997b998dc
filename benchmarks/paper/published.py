"""The paper's AFFD, AFJL and QK as its listings have them, in plain PyTorch: a yardstick for ours, not for use.

    AFFD  R sqrt(N/D) T₂ G T₁ B x        AFJL  R sqrt(N/D) G T₁ B x        QK  R sqrt(N/D) T₁ x

QK takes whole factors and keeps the first D numbers, where the formula takes D_i rows of the i-th factor: that is more
work, and no sketch of vectors with few large numbers (`lightning_sketch.operators.QK` is as the formula). B and G,
signs and normal numbers, are stored, N numbers each; x is padded with zeros to the next power of two, N; R keeps the
first D numbers. T is an orthogonal transform, the preconditioner:

hadamard  a Kronecker product of Hadamard matrices of up to 1024 rows, whose rows are permuted
haar      a Kronecker product of random orthogonal matrices; then there is no B
fft       the real and imaginary parts of the Fourier transform, by torch.fft
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 1024  # rows of a Kronecker factor


def factor_sizes(n: int) -> list[int]:
    """Return the sizes of Kronecker factors, of powers of two up to `LARGEST`, whose product is n."""
    sizes = []
    while n > 1:
        sizes.append(min(n, LARGEST))
        n //= sizes[-1]
    return sizes[::-1]


def hadamard(n: int, device: str) -> Tensor:
    """Return a Hadamard matrix over sqrt(n), with its rows permuted."""
    matrix = torch.ones(1, 1)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / math.sqrt(n))[torch.randperm(n)].to(device)


def haar(n: int, device: str) -> Tensor:
    """Return a random orthogonal matrix."""
    q, r = torch.linalg.qr(torch.randn(n, n, device=device))
    return q * r.diagonal().sign()


class Kronecker:
    """A Kronecker product of square matrices, applied one axis after the other."""

    def __init__(self, n: int, made, device: str):
        self.factors = [made(size, device) for size in factor_sizes(n)]

    def forward(self, x: Tensor) -> Tensor:
        return self._apply(x, [factor.to(x.dtype) for factor in self.factors])

    def adjoint(self, x: Tensor) -> Tensor:
        return self._apply(x, [factor.T.to(x.dtype) for factor in self.factors])

    @staticmethod
    def _apply(x: Tensor, factors: list[Tensor]) -> Tensor:
        y = x.view([len(factor) for factor in factors])
        for axis, factor in enumerate(factors):
            y = torch.tensordot(factor, y, dims=([1], [axis])).movedim(0, axis)
        return y.reshape(-1)


class Fourier:
    """The Fourier transform of n real numbers as n real numbers, an orthogonal map."""

    def __init__(self, n: int, device: str):
        self.n, self.scale = n, torch.full((n,), math.sqrt(2), device=device)
        self.scale[:2] = 1

    def forward(self, x: Tensor) -> Tensor:
        found = torch.fft.rfft(x.float(), norm="ortho")
        parts = torch.view_as_real(found[:-1])  # the imaginary part of the first is 0, and makes room for the last
        first = torch.stack([found[:1].real, found[-1:].real], -1)
        return (torch.cat([first, parts[1:]]).view(-1) * self.scale).to(x.dtype)

    def adjoint(self, x: Tensor) -> Tensor:
        parts = torch.view_as_complex((x.float() / self.scale).view(-1, 2))
        first, last = (torch.complex(part, torch.zeros_like(part)) for part in (parts[:1].real, parts[:1].imag))
        return torch.fft.irfft(torch.cat([first, parts[1:], last]), self.n, norm="ortho").to(x.dtype)


class Published:
    """A sketch of the paper.

    Args:
        kind: "affd", "afjl" or "qk".
        transform: "hadamard", "haar" or "fft".
        n: The size of vectors.
        dim: The size of their sketches.
        device: Where it is stored.
    """

    def __init__(self, kind: str, transform: str, n: int, dim: int, device: str = "cpu"):
        torch.manual_seed(0)
        self.n, self.dim, self.size = n, dim, 1 << (n - 1).bit_length()
        made = {"hadamard": hadamard, "haar": haar}.get(transform)
        count = 2 if kind == "affd" else 1
        self.transforms = [
            Fourier(self.size, device) if made is None else Kronecker(self.size, made, device) for _ in range(count)
        ]
        signed, normal = kind != "qk" and transform != "haar", kind != "qk"
        self.signs = torch.randint(0, 2, (self.size,), dtype=torch.int8, device=device) * 2 - 1 if signed else None
        self.normals = torch.randn(self.size, device=device) if normal else None

    @property
    def nbytes(self) -> int:
        """The bytes of what is stored."""
        factors = [factor for of in self.transforms for factor in getattr(of, "factors", [])]
        return sum(tensor.nbytes for tensor in (self.signs, self.normals, *factors) if tensor is not None)

    def matvec(self, x: Tensor) -> Tensor:
        y = F.pad(x, (0, self.size - self.n))
        y = self.transforms[0].forward(y if self.signs is None else y * self.signs)
        y = y if self.normals is None else y * self.normals.to(y.dtype)
        y = y if len(self.transforms) == 1 else self.transforms[1].forward(y)
        return y[: self.dim] * math.sqrt(self.size / self.dim)

    def rmatvec(self, y: Tensor) -> Tensor:
        x = F.pad(y, (0, self.size - self.dim)) * math.sqrt(self.size / self.dim)
        x = x if len(self.transforms) == 1 else self.transforms[1].adjoint(x)
        x = self.transforms[0].adjoint(x if self.normals is None else x * self.normals.to(x.dtype))
        return (x if self.signs is None else x * self.signs)[: self.n]
