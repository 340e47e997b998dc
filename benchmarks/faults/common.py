"""Stores for the fault benchmarks, whose rows depend on nothing but their place, and what is read from them."""

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_sketch.attribution import Curvature, GradientStore
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators import BlockSRHT
from lightning_sketch.store.sketched_gradients import STAGES, SketchedGradients, Strings
from lightning_sketch.store.spec import StoreSpec

LAYOUT = Layout(("weight", "bias"), (torch.Size([9, 10]), torch.Size([10])))
SKETCH = BlockSRHT(100, 16, seed=3)
WEIGHTS = 11, -22  # fingerprints at which a curvature is saved


def spec(dtype: str = "float32") -> StoreSpec:
    return StoreSpec.of(SKETCH, LAYOUT, dtype=dtype)


def rows(steps: Iterable[int], stage: str = "fit", fingerprint: int = 0, salt: float = 0.0) -> SketchedGradients:
    """Rows whose numbers depend on the step and the salt, with columns of strings, of numbers and of lists."""
    listed = list(steps)
    step = torch.tensor(listed)
    columns = {
        "step": step,
        "stage": torch.full_like(step, STAGES.index(stage)),
        "fingerprint": torch.full_like(step, fingerprint),
        "example_id": [f"example {number} of {stage}" for number in listed],
        "example_ids": torch.stack([step, step + 1], 1),
        "loss": 1 / (step + 2.0 + salt),
        "source": [f"book {number % 3}" for number in listed],
        "difficulty": torch.cos(step + salt),
    }
    sketches = torch.sin(step[:, None] * 16.0 + torch.arange(16.0) + 7 * salt)
    return SketchedGradients(sketches, SKETCH, columns)


def curvature(fingerprint: int, salt: float = 0.0) -> Curvature:
    root = torch.sin(torch.arange(16.0 * 16).double() * (fingerprint + salt + 0.5)).view(16, 16)
    sizes = {"examples": 16, "mean_square": float(root.square().sum()), "effective_samples": 9.5}
    return Curvature(kind="fisher", fingerprint=fingerprint, matrix=root.T @ root, **sizes)


def table(columns: Mapping[str, Any], sketches: torch.Tensor | None = None) -> list[frozenset[Any]]:
    """Return rows as sets of values; unknown ones are left out, since a table that lacks a column means the same."""
    values: dict[str, list[Any]] = {}
    if sketches is not None:
        values["sketch"] = [row.numpy().tobytes() for row in sketches.float()]
    for name, column in columns.items():
        if isinstance(column, Strings):
            values[name] = [text or None for text in column.tolist()]
        elif column.ndim == 2:
            values[name] = [tuple(value for value in row if value != -1) or None for row in column.tolist()]
        else:
            values[name] = [None if value != value or value == -1 else value for value in column.tolist()]
    return [
        frozenset((name, value) for name, value in zip(values, row, strict=True) if value is not None)
        for row in zip(*values.values(), strict=True)
    ]


def all_rows(store: GradientStore) -> dict[str, list[frozenset[Any]]]:
    """Read the rows of a store, and its queries by step."""
    parts = {"rows": store.read()} | {f"queries {step}": part for step, part in store.queries().items()}
    return {name: table(part.columns, part.sketches) for name, part in parts.items()}


def numbers(found: Curvature) -> tuple[Any, ...]:
    return found.kind, found.fingerprint, found.examples, found.mean_square, found.dense().numpy().tobytes()


def copied(source: Path, target: Path) -> Path:
    """Copy a folder of small files; as shutil.copytree does, but without modes and times, which take most of it."""
    target.mkdir(parents=True)
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            copied(entry, target / entry.name)
        else:
            (target / entry.name).write_bytes(entry.read_bytes())
    return target


def arguments(text: str, trials: int, *extra: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=trials)
    parser.add_argument("--seed", type=int, default=0)
    for name in extra:
        parser.add_argument(f"--{name}", type=int, default=0)
    return parser.parse_args()


def show(title: str, columns: Sequence[str], lines: Iterable[tuple[str, Counter[str]]]) -> None:
    """Print counts, one line each, with their sums."""
    total: Counter[str] = Counter()
    print(f"\n{title:44s}" + "".join(f"{column:>10s}" for column in columns))
    for name, counts in lines:
        total.update(counts)
        print(f"{name:44s}" + "".join(f"{counts[column] or '.':>10}" for column in columns))
    print(f"{'all':44s}" + "".join(f"{total[column]:>10}" for column in columns), flush=True)
