"""The callback that logs the spectrum of the loss's curvature during training."""

from lightning_sketch.callbacks.spectrum_monitor._measurement import Measurement
from lightning_sketch.callbacks.spectrum_monitor.monitor import SpectrumMonitor

__all__ = ["Measurement", "SpectrumMonitor"]
