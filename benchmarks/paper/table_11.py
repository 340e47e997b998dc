"""Table 11 of the paper: time of a sketched gradient against dim, beside dense matrices.

A cell is milliseconds, the gradient included. The paper's are of GPT-2 on a V100, dense by TRAK's CUDA kernel and by
one in Triton of its author. Here it is another transformer (`costs.py`). Dense is `gaussian`, a normal matrix that is
made anew in every product, block by block, as TRAK makes one on a CPU; it is measured up to the first dim at which it
takes five seconds.

    python benchmarks/paper/table_11.py             # ten million parameters on a CPU, some minutes
    python benchmarks/paper/table_11.py --device cuda
"""

from costs import Sketched, arguments, problem_of, show

LONG = 5e3  # ms of a dense sketch, after which no larger one is measured
THEIRS = {  # V100, dims 2^12 to 2^18
    "TRAK, CUDA": (359, 594, 1078, 2047, 3969, 7812, 15500),
    "TRAK, Triton": (879, 2885, 6073, 12900),
    "AFFD": (213, 207, 207, 215, 219, 210, 209),
    "QK": (84, 87, 91, 82, 82, 91, 90),
}
KINDS = "block_srht", "count_sketch", "qk", "afjl", "affd", "gaussian"


def main():
    asked = arguments(__doc__)
    problem = problem_of(asked)
    print(f"The gradient alone takes {problem.plain(['gradient'])['gradient'].ms:.0f} ms.\n")
    lines, dense = [], 0.0
    for log in range(4, 7) if asked.small else (6, 7, 8, 10, *range(12, 19)):
        line = [f"2^{log}", *(times[log - 12] if 12 <= log < 12 + len(times) else "-" for times in THEIRS.values())]
        for kind in KINDS:
            if kind == "gaussian" and dense > LONG:
                line.append("-")
                continue
            repeats = 1 if kind == "gaussian" else 3
            ((_, _, found),) = problem.costs([Sketched(kind)], [1 << log], ["gradient"], repeats)
            line.append(f"{found['gradient'].ms:.0f}")
            dense = found["gradient"].ms if kind == "gaussian" else dense
        lines.append(line)
    show(["dim", *(f"theirs, {name}" for name in THEIRS), *KINDS], lines)


if __name__ == "__main__":
    main()
