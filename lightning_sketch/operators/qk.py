"""QK: a sketch by a Kronecker product of small orthogonal matrices.

    S x = √(N / dim) R_dim (Q_1 ⊗ ... ⊗ Q_K) pad(x)

Q_i     the first D_i rows of a random (Haar) orthogonal matrix of size B_i, with Π B_i = N and Π D_i = D
N, D    the powers of two at or above n and dim; pad fills with zeros
R_dim   the first dim coordinates
K       the fewest factors with every B_i <= 2^10; the exponents of B_i, and those of D_i, differ by at
        most one ("balanced"). This rule is a fixed part of the map.

E[SᵀS] = I; the rows are orthogonal. O(N max D_i) time, no signs and no normals of size N.

**When not to use it.** It does not mix between the axes: on a vector that is itself a Kronecker product
of vectors (a rank-one matrix aligned with the factors; gradients of linear layers are sums of few)
||S x||² is a product of K squared norms of only D_i numbers each, so that its variance is about
sum_i 2 / D_i instead of 2 / dim. Prefer `BlockSRHT`.

The Q_i are drawn by a QR decomposition in float64 on the CPU, with the signs of R's diagonal divided
out: equal on every machine up to rounding, not to the bit. N numbers of scratch.

Source: Schioppa, NeurIPS 2024, arXiv:2402.03994, section 3 and Theorem 3.3.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators._precision import full_precision
from lightning_sketch.operators.random import normals
from lightning_sketch.operators.sketch import Sketch


@dataclass(frozen=True)
class QK(Sketch):
    """The QK sketch: maps vectors of size `n` to `dim` numbers by small orthogonal matrices, as in the paper.

    >>> import torch
    >>> QK(n=1000, dim=64, seed=0).matvec(torch.ones(8, 1000)).shape
    torch.Size([8, 64])
    """

    kind = "qk"
    streams = False

    @property
    def factors(self) -> list[tuple[int, int]]:
        """The sizes (D_i, B_i) of each factor."""
        n_bits, dim_bits = (self.n - 1).bit_length(), (self.dim - 1).bit_length()
        count = max(1, -(-n_bits // 10))
        return [(1 << (dim_bits + i) // count, 1 << (n_bits + i) // count) for i in range(count)]

    @property
    def scale(self) -> float:
        """The factor √(N / dim)."""
        return math.sqrt(math.prod(size for _, size in self.factors) / self.dim)

    def forward(self, x: Float[Tensor, "rows size"], start: int) -> Float[Tensor, "rows dim"]:
        """Return S[:, start : start + size] x."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        padded = math.prod(size for _, size in self.factors)
        out = x.new_empty(len(x), self.dim)
        qs = self._orthogonal(x)
        with full_precision(x.device):
            for row, vector in zip(out, x, strict=True):
                y = F.pad(vector, (start, padded - start - len(vector)))
                done = 1
                for q in qs:
                    y = q @ y.view(done, q.shape[1], -1)
                    done *= q.shape[0]
                row[:] = y.view(-1)[: self.dim]
        return out.mul_(self.scale)

    def adjoint(self, y: Float[Tensor, "rows dim"], start: int, stop: int) -> Float[Tensor, "rows size"]:
        """Return S[:, start : stop]ᵀ y."""
        y = self.scale * y.to(torch.promote_types(y.dtype, torch.float32))
        out = y.new_empty(len(y), stop - start)
        qs = self._orthogonal(y)
        with full_precision(y.device):
            for row, vector in zip(out, y, strict=True):
                x = F.pad(vector, (0, self.width - self.dim))
                done = 1
                for q in reversed(qs):
                    x = q.T @ x.view(-1, q.shape[0], done)
                    done *= q.shape[1]
                row[:] = x.view(-1)[start:stop]
        return out

    def _orthogonal(self, like: Tensor) -> list[Float[Tensor, "D_i B_i"]]:
        """Return the factors Q_i, in the type and on the device of `like`."""
        qs = []
        for i, (dim, size) in enumerate(self.factors):
            gaussian = normals(self.key(f"factor {i}"), 0, size * dim, torch.float64, "cpu").view(size, dim)
            q, r = torch.linalg.qr(gaussian)
            qs.append((q * r.diagonal().sign()).T.to(like))
        return qs
