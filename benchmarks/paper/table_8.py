"""Table 8 of the paper: time and memory of a sketched gradient, explicit and implicit, by preconditioner.

A cell is milliseconds / GB. Explicit is S ∇L(θ); implicit the gradient by w at 0 of L(θ + Sᵀ w). The paper's are of
GPT-2 in JAX on a V100 (it has a TPUv2 too, and FJL and FFD by the Fourier transform), dims 2^17 to 2^22; its memory is
all that is in use. Ours is another transformer (`costs.py`), dim 2^17, memory beyond the model. Preconditioners are a
choice of the paper's formula only (`published.py`): ours takes the one way of its kernel.

    python benchmarks/paper/table_8.py              # ten million parameters on a CPU, some minutes
    python benchmarks/paper/table_8.py --device cuda
"""

from costs import OURS, PUBLISHED, Sketched, arguments, problem_of, show

WAYS = "gradient", "implicit gradient"
THEIRS = {  # V100: explicit, implicit
    Sketched("affd", "hadamard"): ("205 / 3.2", "454 / 3.2"),
    Sketched("affd", "haar"): ("142 / 3.2", "237 / 3.2"),
    Sketched("affd", "fft"): ("104 / 4.2", "126 / 4.2"),
    Sketched("afjl", "hadamard"): ("116 / 2.9", "231 / 3.0"),
    Sketched("afjl", "haar"): ("81 / 2.9", "121 / 3.1"),
    Sketched("afjl", "fft"): ("71 / 3.8", "88 / 4.1"),
    Sketched("qk", "haar"): ("82 / 1.7", "116 / 1.7"),
    Sketched("fjl"): ("123 / 6.9", "244 / 6.7"),
    Sketched("ffd"): ("197 / 4.1", "352 / 4.2"),
}


def compared(problem, dim, ways, theirs, plain):
    """Yield the lines of the table: theirs and ours, each way."""
    yield ["no sketch", "", "", problem.plain([plain])[plain], ""]
    for sketched, _, found in problem.costs(PUBLISHED + OURS, [dim], ways):
        yield [sketched, *theirs.get(sketched, ("", "")), *found.values()]


def print_compared(doc, ways, theirs, plain):
    asked = arguments(doc)
    problem = problem_of(asked)
    header = ["sketch", "theirs, explicit", "theirs, implicit", "here, explicit", "here, implicit"]
    show(header, compared(problem, 1 << (6 if asked.small else 17), ways, theirs, plain))


if __name__ == "__main__":
    print_compared(__doc__, WAYS, THEIRS, "gradient")
