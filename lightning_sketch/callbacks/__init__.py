"""Lightning callbacks, each in a package of its own."""

from lightning_sketch.callbacks.gradient_sketch_writer import GradientSketchWriter
from lightning_sketch.callbacks.spectrum_monitor import SpectrumMonitor

__all__ = ["GradientSketchWriter", "SpectrumMonitor"]
