"""Curvature of a loss: its Hessian, Gauss-Newton and Fisher matrices as operators, and the spectrum of one."""

from lightning_sketch.curvature.deflated import Deflated as Deflated
from lightning_sketch.curvature.fisher import EmpiricalFisher as EmpiricalFisher
from lightning_sketch.curvature.ggn import GGN as GGN
from lightning_sketch.curvature.hessian import Hessian as Hessian
from lightning_sketch.curvature.output_loss import CrossEntropy as CrossEntropy
from lightning_sketch.curvature.output_loss import SquaredError as SquaredError
from lightning_sketch.curvature.result import Count as Count
from lightning_sketch.curvature.result import Spectrum as Spectrum
from lightning_sketch.curvature.saved import load_spectrum as load_spectrum
from lightning_sketch.curvature.saved import save_spectrum as save_spectrum
from lightning_sketch.curvature.spectrum import spectrum as spectrum
