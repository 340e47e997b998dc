"""The Hessian, Gauss-Newton and empirical Fisher matrices of a loss as operators, and the spectrum of an operator."""

from lightning_sketch.autodiff.losses import BinaryCrossEntropy, CrossEntropy, SquaredError
from lightning_sketch.curvature.critical_learning_rate import (
    CriticalLearningRate,
    copy_weights,
    critical_learning_rate,
)
from lightning_sketch.curvature.fisher import EmpiricalFisher
from lightning_sketch.curvature.ggn import GGN
from lightning_sketch.curvature.hessian import Hessian
from lightning_sketch.curvature.loss_slice import LossSlice, keskar_sharpness, loss_slice
from lightning_sketch.curvature.preconditioned import Preconditioned
from lightning_sketch.curvature.result import Count, Spectrum
from lightning_sketch.curvature.serialization import load_spectrum, save_spectrum
from lightning_sketch.curvature.spectrum import spectrum
from lightning_sketch.curvature.stability import Stability, stability_edge, verdict
from lightning_sketch.linalg.deflated import Deflated
from lightning_sketch.linalg.diagonal import Diagonal, diagonal

__all__ = [
    "GGN",
    "BinaryCrossEntropy",
    "Count",
    "CriticalLearningRate",
    "CrossEntropy",
    "Deflated",
    "Diagonal",
    "EmpiricalFisher",
    "Hessian",
    "LossSlice",
    "Preconditioned",
    "Spectrum",
    "SquaredError",
    "Stability",
    "copy_weights",
    "critical_learning_rate",
    "diagonal",
    "keskar_sharpness",
    "load_spectrum",
    "loss_slice",
    "save_spectrum",
    "spectrum",
    "stability_edge",
    "verdict",
]
