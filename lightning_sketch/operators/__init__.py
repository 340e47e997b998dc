"""Linear maps R^n -> R^dim that store nothing: the sketches, and what they have in common."""

from lightning_sketch.operators.affd import AFFD as AFFD
from lightning_sketch.operators.afjl import AFJL as AFJL
from lightning_sketch.operators.base import LinearOperator as LinearOperator
from lightning_sketch.operators.block_srht import BlockSRHT as BlockSRHT
from lightning_sketch.operators.count_sketch import CountSketch as CountSketch
from lightning_sketch.operators.ffd import FFD as FFD
from lightning_sketch.operators.fjl import FJL as FJL
from lightning_sketch.operators.gaussian import Gaussian as Gaussian
from lightning_sketch.operators.kinds import make_sketch as make_sketch
from lightning_sketch.operators.qk import QK as QK
from lightning_sketch.operators.sketch import Sketch as Sketch
