"""Construction of a sketch from the name of its kind, or from a spec that was read from a file."""

from lightning_sketch.operators.affd import AFFD
from lightning_sketch.operators.afjl import AFJL
from lightning_sketch.operators.block_srht import BlockSRHT
from lightning_sketch.operators.count_sketch import CountSketch
from lightning_sketch.operators.ffd import FFD
from lightning_sketch.operators.fjl import FJL
from lightning_sketch.operators.gaussian import Gaussian
from lightning_sketch.operators.qk import QK
from lightning_sketch.operators.random import RNG
from lightning_sketch.operators.sketch import KINDS, Sketch

__all__ = ["AFFD", "AFJL", "FFD", "FJL", "KINDS", "QK", "BlockSRHT", "CountSketch", "Gaussian", "make_sketch"]


def make_sketch(kind: str, *, n: int, dim: int, seed: int = 0, rng: str = RNG) -> Sketch:
    """Make the sketch of a kind; `make_sketch(**sketch.spec()) == sketch`.

    Args:
        kind: "block_srht", "affd", "afjl", "qk", "ffd", "fjl", "gaussian", "count_sketch", or the `kind` of a
            subclass of `Sketch` of your own.
        n: The size of the vectors to sketch.
        dim: The size of a sketch, 0 < dim <= n.
        seed: The seed of the random map, 0 <= seed < 2^63.
        rng: The version of the random bits that the sketch was made with.

    Raises:
        ValueError: If the kind or the version of the random bits is unknown, or a number is out of its range.

    >>> make_sketch("affd", n=1000, dim=64, seed=0)
    AFFD(n=1000, dim=64, seed=0)
    """
    if kind not in KINDS:
        raise ValueError(
            f"unknown kind of sketch {kind!r}; choose one of {', '.join(KINDS)}, "
            "or import the module that defines it first."
        )
    if rng != RNG:
        raise ValueError(
            f"the sketch was made with random bits {rng!r}, this version of lightning_sketch makes {RNG!r}; "
            f"install the version that wrote it."
        )
    return KINDS[kind](n=n, dim=dim, seed=seed)
