"""What a Lance dataset of rows has beside their columns, for those who write and read it."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sketch._arguments import whole_number
from lightning_sketch.store.export import SKETCH

# Columns beside those of the rows: the scale of a sketch in float16, and where the row is in its store.
SCALE, PLACE = "scale", ("file", "place")

_MOST = 1 << 20  # rows of a batch

SPEC, COMPLETE = "lightning_sketch", "complete"  # a key of the metadata, and the tag of the last complete export


def import_lance() -> Any:
    """Return the module `lance`, or say what to install."""
    try:
        import lance  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ImportError("Lance datasets need pylance: pip install 'lightning-sketch[lance]'.") from error
    return lance


def complete_version(uri: str, storage_options: Mapping[str, str] | None) -> int:
    """Return the version that the last complete export has left.

    Raises:
        FileNotFoundError: if there is no dataset.
        ValueError: if no export has been completed.
    """
    lance = import_lance()
    try:
        tags = lance.dataset(uri, storage_options=storage_options).tags.list()
    except (ValueError, OSError) as error:
        if "not found" not in str(error).lower():
            raise
        raise FileNotFoundError(
            f"{uri} has no Lance dataset; write one by store.export('lance', uri), or open a store by "
            "GradientStore.open(path)."
        ) from error
    if COMPLETE not in tags:
        raise ValueError(f"{uri} has no rows that an export has completed; see store.export('lance', uri).")
    return int(tags[COMPLETE]["version"])


def columns_of(dataset: Any, **options: Any) -> Any:
    """Read the columns of the rows as a table of Arrow."""
    names = [name for name in dataset.schema.names if name not in (SKETCH, SCALE, *PLACE)]
    return dataset.to_table(columns=names, **options)


def sketches_of(batch: Any, kept: np.ndarray, dim: int) -> Tensor:
    """Return some sketches of a batch of Arrow, (rows, dim), in float32."""
    found = torch.from_numpy(batch[SKETCH].flatten().to_numpy().reshape(-1, dim)[kept])
    if SCALE not in batch.schema.names:
        return found
    return found.float() * torch.from_numpy(batch[SCALE].to_numpy()[kept])[:, None]


def batches_of(
    dataset: Any, ids: np.ndarray, condition: str | None, batch_rows: int
) -> Iterator[tuple[Any, np.ndarray]]:
    """Yield batches of Arrow with sketches, and which of their rows have one of the ids, in the order of these.

    Ids rise within a fragment, and fragments have any order once Lance has compacted them.
    """
    options = {
        "columns": [name for name in (SKETCH, SCALE) if name in dataset.schema.names],
        "batch_size": min(whole_number(batch_rows, "batch_rows"), _MOST),
        "filter": condition,
    }
    (jumps,) = np.nonzero(np.diff(ids >> 32))
    for part in np.split(ids, jumps + 1) if len(ids) else ():
        fragment = dataset.get_fragment(int(part[0]) >> 32)
        scanner = dataset.scanner(**options, fragments=[fragment], scan_in_order=True, with_row_id=True)
        for batch in scanner.to_batches():
            own = batch["_rowid"].to_numpy().astype(np.int64)
            if len(own):
                first, last = np.searchsorted(part, own[0]), np.searchsorted(part, own[-1], side="right")
                kept = np.isin(own, part[first:last], kind="sort")
                if kept.any():
                    yield batch, kept


def check_names(names: Iterable[str]) -> None:
    """Refuse columns that Lance, or this format, has another use for."""
    reserved = [n for n in names if n in (SKETCH, SCALE, *PLACE) or n.startswith("_") or set(n) & set("./`")]
    if reserved:
        raise ValueError(
            f"a Lance dataset cannot have the columns {', '.join(reserved)}: names with '.', '/' or '`', those that "
            f"begin with '_', and {', '.join((SKETCH, SCALE, *PLACE))} are taken; rename them."
        )


def check_types(own: Any, there: Any) -> None:
    """Refuse columns that a dataset does not have, or has with other types, to which Lance would convert them."""
    mine, its = ({field.name: str(field.type) for field in schema if field.name != SKETCH} for schema in (own, there))
    differ = [name for name in sorted({*mine, *its}) if mine.get(name) != its.get(name)]
    if differ:
        named = "; ".join(f"{name}: {its.get(name, 'none')}, {mine.get(name, 'none')}" for name in differ)
        raise ValueError(f"the dataset and the store differ in columns ({named}); export to another uri.")


def tell_optimizers(store: Any, dataset: Any) -> None:
    """Add the optimizers of a store's rows to what a dataset says of its own."""
    about = json.loads(dataset.schema.metadata[SPEC.encode()])
    if extra := store.optimizers - set(about["optimizers"]):
        about["optimizers"] = sorted({*about["optimizers"], *extra})
        dataset.update_schema_metadata({SPEC: json.dumps(about)})
