"""Table 3 of the paper: time and memory of a sketched gradient, by kinds of sketches with Hadamard matrices.

A cell is milliseconds / GB, of the gradient and its sketch together. The paper's are of GPT-2 in JAX with dims 2^17 to
2^22, on a V100 and on a TPUv2, with signs and normal numbers stored; its memory is all that is in use. Ours is another
transformer (`costs.py`), sketched to dim 2^17, memory beyond the model; "published" is the paper's formula in plain
PyTorch (`published.py`), "ours" the operators of lightning_sketch.

    python benchmarks/paper/table_3.py                                  # ten million parameters on a CPU, a minute
    python benchmarks/paper/table_3.py --device cuda --size 1.5B --dtype bfloat16
"""

from costs import OURS, Sketched, arguments, problem_of, show

THEIRS = {  # V100, TPUv2
    "fjl": ("123 / 6.9", "8997 / 3.0"),
    "affd": ("205 / 3.2", "134 / 2.8"),
    "ffd": ("197 / 4.1", "8694 / 4.3"),
    "afjl": ("116 / 2.9", "89 / 2.7"),
    "qk": ("82 / 1.7", "64 / 1.1"),
}
PUBLISHED = [Sketched("affd", "hadamard"), Sketched("afjl", "hadamard"), Sketched("qk", "haar")]


def main():
    asked = arguments(__doc__)
    problem = problem_of(asked)
    dim = 1 << (6 if asked.small else 17)
    lines = [["no sketch", "", "", problem.plain(["gradient"])["gradient"]]]
    for sketched, _, found in problem.costs(PUBLISHED + OURS, [dim], ["gradient"]):
        lines.append([sketched, *THEIRS.get(sketched.kind, ("", "")), found["gradient"]])
    show(["sketch", "theirs, V100", "theirs, TPUv2", "here"], lines)


if __name__ == "__main__":
    main()
