"""Figures 3 and 4 of the paper: time and memory of FJL and AFJL against dim.

A cell is milliseconds / GB of S x alone, a vector of 2^24 numbers (2^27 on a GPU), memory beyond the vector. The paper
draws curves, of GPT-2's gradient on a V100, without numbers: FJL's time and memory grow with dim, and beyond 2^20 it
runs out of memory; AFJL's do neither. FJL stores its sparse normal matrix there. Ours makes it anew in each product, so
that its time grows and its memory does not.

    python benchmarks/paper/figures_3_4.py          # a CPU, two minutes
    python benchmarks/paper/figures_3_4.py --device cuda
"""

import torch
from costs import Problem, arguments, show

from lightning_sketch import make_sketch

KINDS = "fjl", "afjl", "block_srht"


def main():
    asked = arguments(__doc__)
    log_n, logs = (12, range(4, 8, 2)) if asked.small else (27 if asked.device == "cuda" else 24, range(8, 23, 2))
    x = torch.randn(1 << log_n, device=asked.device, dtype=getattr(torch, asked.dtype))
    meter = Problem("tiny", asked.device)
    lines = []
    for log in logs:
        sketches = [make_sketch(kind, n=len(x), dim=1 << log, seed=0) for kind in KINDS]
        lines.append([f"2^{log}", *(meter.cost(lambda s=s: s.matvec(x)) for s in sketches)])
    print(f"n = 2^{log_n}\n")
    show(["dim", *KINDS], lines)


if __name__ == "__main__":
    main()
