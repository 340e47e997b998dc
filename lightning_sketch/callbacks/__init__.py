"""Lightning callbacks, one a file."""

from lightning_sketch.callbacks.spectrum_monitor import SpectrumMonitor as SpectrumMonitor
