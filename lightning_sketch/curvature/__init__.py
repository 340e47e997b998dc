"""Curvature of a loss: its Hessian as an operator, and the spectrum of one."""

from lightning_sketch.curvature.hessian import Hessian as Hessian
from lightning_sketch.curvature.result import Count as Count
from lightning_sketch.curvature.result import Spectrum as Spectrum
from lightning_sketch.curvature.spectrum import spectrum as spectrum
