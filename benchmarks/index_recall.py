"""Measure what share of the best rows an index finds, on sketched gradients of a language model and on random ones.

A GPT learns, byte by byte, to continue the sources of Python's standard library (`paper/language_model.py`). Rows are
the gradients of sequences of those files by BlockSRHT, queries those of 64 sequences of others; then both are of normal
numbers, which have no neighbors at all. The rows go through a store into a Lance dataset.

recall     of the 10 largest products (or cosines) of a query, the share that the index finds; mean of 64 queries
index, ms  a query by the index
top_k, ms  a query by `top_k`, exact, of all 64 queries at once, and by the index with `approximate=True`
built, s   the making of the index

    python benchmarks/index_recall.py [rows] [dim]               # needs transformers and lightning-sketch[lance]
"""

import contextlib
import io
import re
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent / "paper"))
from language_model import HALF, SMALL, pieces, trained
from sketch_speed import machine, print_table

from lightning_sketch import GradientStore, make_sketch, sketch_gradients
from lightning_sketch.attribution import top_k
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.store import LanceRows, SketchedGradients, StoreSpec, build_index

ROWS, DIM, BATCH = 20_000, 1024, 64
KINDS = ("IVF_FLAT", "IVF_PQ", "IVF_RQ")


def of_model(count: int, dim: int) -> tuple[SketchedGradients, SketchedGradients, Layout]:
    """Return rows and queries of a trained GPT."""
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    train, others = [path for i, path in enumerate(files) if i % 8], files[::8]
    module = trained(SMALL, pieces(train, SMALL.tokens, SMALL.steps * SMALL.batch), "cpu")
    layout = Layout.of(module)
    sketch = make_sketch("block_srht", n=layout.n, dim=dim)

    def rows(sequences):
        return sketch_gradients(
            module, list(sequences.split(BATCH)), sketch, loss_fn=lambda module, batch: module.training_step([batch])
        )

    return rows(pieces(train, SMALL.tokens, count)), rows(pieces(others, SMALL.tokens, HALF)), layout


def measure(name: str, rows: SketchedGradients, queries: SketchedGradients, layout: Layout) -> list[list[str]]:
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        store = GradientStore.create(f"{folder}/store", StoreSpec.of(rows.sketch, layout, dtype="float32"))
        with store.appender(store.begin_run("predict")) as appender:
            appender.put(rows)
        GradientStore.open(f"{folder}/store").export("lance", f"{folder}/rows.lance")
        for metric in ("dot", "cosine"):
            for kind in KINDS:
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    _, recall = build_index(
                        LanceRows(f"{folder}/rows.lance"), metric=metric, index=kind, queries=queries
                    )
                said = re.search(r"in (\d+) s.*in ([\d.]+) ms a query", printed.getvalue())
                built, by_index = said.groups()
                times = []
                for approximate in (False, True):
                    start = time.perf_counter()
                    top_k(queries, LanceRows(f"{folder}/rows.lance"), method=metric, approximate=approximate)
                    times.append(f"{1e3 * (time.perf_counter() - start) / len(queries):.1f}")
                lines.append([name, metric, kind, f"{recall:.0%}", by_index, " / ".join(times), built])
                print(*lines[-1], file=sys.stderr, flush=True)
    return lines


def main():
    given = [int(argument) for argument in sys.argv[1:]]
    count, dim = given + [ROWS, DIM][len(given) :]
    torch.manual_seed(0)
    rows, queries, layout = of_model(count, dim)
    print(f"{machine()}; {len(rows):,} rows of dim {dim}, {layout.n:,} parameters\n")
    lines = measure("GPT", rows, queries, layout)
    normal = [SketchedGradients(torch.randn(n, dim), rows.sketch) for n in (len(rows), len(queries))]
    lines += measure("normal", *normal, layout)
    print_table(["gradients", "metric", "index", "recall", "index, ms", "top_k, ms", "built, s"], lines)


if __name__ == "__main__":
    main()
