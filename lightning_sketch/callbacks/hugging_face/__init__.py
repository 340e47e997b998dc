"""Callbacks for the Trainer of Hugging Face: spectra of the curvature, and sketched gradients of its steps.

They are made of the parts of `SpectrumMonitor` and `GradientSketchWriter`. Both take the Trainer, which alone knows the
loss that is trained: label smoothing, `compute_loss_func`, a `compute_loss` of your own.
"""

try:
    import transformers as _transformers  # noqa: F401
except ImportError as missing:
    raise ImportError(
        "callbacks for the Trainer of Hugging Face need transformers: pip install 'lightning-sketch[transformers]'."
    ) from missing

from lightning_sketch.callbacks.hugging_face.gradient_sketch_callback import GradientSketchCallback
from lightning_sketch.callbacks.hugging_face.spectrum_callback import SpectrumCallback

__all__ = ["GradientSketchCallback", "SpectrumCallback"]
