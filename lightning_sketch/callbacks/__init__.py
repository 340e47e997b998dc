"""Lightning callbacks, one a file."""

from lightning_sketch.callbacks.gradient_sketch_writer import GradientSketchWriter as GradientSketchWriter
from lightning_sketch.callbacks.spectrum_monitor import SpectrumMonitor as SpectrumMonitor
