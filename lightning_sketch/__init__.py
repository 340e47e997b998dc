"""Random sketches of gradients and Hessians for PyTorch Lightning.

The public names are found on first use: importing the package imports neither torch nor Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_sketch.attribution import GradientStore as GradientStore
    from lightning_sketch.attribution import IndexedDataset as IndexedDataset
    from lightning_sketch.attribution import sketch_gradients as sketch_gradients
    from lightning_sketch.autodiff import num_labels as num_labels
    from lightning_sketch.callbacks import GradientSketchWriter as GradientSketchWriter
    from lightning_sketch.callbacks import SpectrumMonitor as SpectrumMonitor
    from lightning_sketch.curvature import GGN as GGN
    from lightning_sketch.curvature import EmpiricalFisher as EmpiricalFisher
    from lightning_sketch.curvature import Hessian as Hessian
    from lightning_sketch.curvature import load_spectrum as load_spectrum
    from lightning_sketch.curvature.spectrum import spectrum as spectrum
    from lightning_sketch.operators import AFFD as AFFD
    from lightning_sketch.operators import AFJL as AFJL
    from lightning_sketch.operators import FFD as FFD
    from lightning_sketch.operators import FJL as FJL
    from lightning_sketch.operators import QK as QK
    from lightning_sketch.operators import BlockSRHT as BlockSRHT
    from lightning_sketch.operators import CountSketch as CountSketch
    from lightning_sketch.operators import Gaussian as Gaussian
    from lightning_sketch.operators import make_sketch as make_sketch
    from lightning_sketch.subspace import IntrinsicDimensionFinder as IntrinsicDimensionFinder
    from lightning_sketch.subspace import IntrinsicDimensionTuner as IntrinsicDimensionTuner
    from lightning_sketch.subspace import SubspaceModule as SubspaceModule

_ROOMS = {
    "attribution": ["GradientStore", "IndexedDataset", "sketch_gradients"],
    "autodiff": ["num_labels"],
    "callbacks": ["GradientSketchWriter", "SpectrumMonitor"],
    "curvature": ["GGN", "EmpiricalFisher", "Hessian", "load_spectrum", "spectrum"],
    "operators": ["AFFD", "AFJL", "FFD", "FJL", "QK", "BlockSRHT", "CountSketch", "Gaussian", "make_sketch"],
    "subspace": ["IntrinsicDimensionFinder", "IntrinsicDimensionTuner", "SubspaceModule"],
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted(_ROOM_OF)


def __getattr__(name: str):
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
