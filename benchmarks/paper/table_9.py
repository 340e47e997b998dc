"""Table 9 of the paper: time and memory of a sketched product with the Hessian, explicit and implicit.

A cell is milliseconds / GB. Explicit is S H Sᵀ v, by a product with the Hessian between the two maps; implicit the
product with the Hessian by w at 0 of L(θ + Sᵀ w). The paper's are of GPT-2 in JAX on a V100 (it has a TPUv2 too); its
memory is all that is in use, and with FJL and FFD it ran out of it. Ours is another transformer (`costs.py`), dim 2^17,
memory beyond the model.

    python benchmarks/paper/table_9.py              # ten million parameters on a CPU, some minutes
    python benchmarks/paper/table_9.py --device cuda
"""

from costs import Sketched
from table_8 import print_compared

WAYS = "product", "implicit product"
THEIRS = {  # V100: explicit, implicit
    Sketched("affd", "hadamard"): ("397 / 2.8", "627 / 3.1"),
    Sketched("affd", "haar"): ("183 / 2.8", "238 / 3.1"),
    Sketched("affd", "fft"): ("111 / 3.3", "137 / 3.7"),
    Sketched("afjl", "hadamard"): ("230 / 2.7", "345 / 3.0"),
    Sketched("afjl", "haar"): ("121 / 2.7", "150 / 3.0"),
    Sketched("afjl", "fft"): ("92 / 3.3", "111 / 3.8"),
    Sketched("qk", "haar"): ("118 / 1.6", "146 / 1.9"),
}


if __name__ == "__main__":
    print_compared(__doc__, WAYS, THEIRS, "product")
