"""Linear maps that are never stored as matrices: their base class, and the random sketches R^n -> R^dim."""

from lightning_sketch.operators.affd import AFFD
from lightning_sketch.operators.afjl import AFJL
from lightning_sketch.operators.base import LinearOperator
from lightning_sketch.operators.block_srht import BlockSRHT
from lightning_sketch.operators.count_sketch import CountSketch
from lightning_sketch.operators.ffd import FFD
from lightning_sketch.operators.fjl import FJL
from lightning_sketch.operators.gaussian import Gaussian
from lightning_sketch.operators.kernels import kernel_in_use
from lightning_sketch.operators.kinds import make_sketch
from lightning_sketch.operators.qk import QK
from lightning_sketch.operators.sketch import Sketch

__all__ = [
    "AFFD",
    "AFJL",
    "FFD",
    "FJL",
    "QK",
    "BlockSRHT",
    "CountSketch",
    "Gaussian",
    "LinearOperator",
    "Sketch",
    "kernel_in_use",
    "make_sketch",
]
