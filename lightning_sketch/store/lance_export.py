"""Rows of a store in a Lance dataset: each visible row exactly once, whenever an export is killed and repeated."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_sketch.store.export import to_arrow
from lightning_sketch.store.format import narrowed
from lightning_sketch.store.lance_format import (
    COMPLETE,
    PLACE,
    SCALE,
    SPEC,
    check_names,
    check_types,
    import_lance,
    tell_optimizers,
)
from lightning_sketch.store.spec import StoreSpec

_ROWS_PER_FRAGMENT = 1 << 18  # which a worker of Ray reads: gigabytes


def to_lance(
    store: Any, uri: str, *, append: bool = False, dtype: Literal["float16", "float32"] | None = None, **options: Any
) -> tuple[int, int]:
    """Write the visible rows of a store to a Lance dataset, each exactly once; return how many were added and removed.

    A row is known by its store, file and place, so that only new ones are added; those that are not visible any more
    are removed. Whoever reads `COMPLETE` sees the rows as before until all of that is done, whenever it is killed.

    Args:
        store: The `RowStore`.
        uri: Where the dataset is, or will be.
        append: Whether it may be there.
        dtype: The type of the sketches; that of the store if that is "float16" and the dataset is new, else "float32".
        **options: `storage_options` of Lance.

    Raises:
        ImportError: if pylance is missing.
        ValueError: if there is a dataset and `append` is False, or it is of another sketch or program.
    """
    lance = import_lance()
    if dtype not in (None, "float16", "float32"):
        raise ValueError(f"dtype={dtype!r} is not known; use 'float16' or 'float32', or leave it out.")
    check_names(store.rows.columns)
    dataset = _existing(lance, uri, options)
    if dataset is not None and not append:
        raise ValueError(f"{uri} is there; pass append=True to add what is new, or another uri.")
    half = (dtype or store.spec.dtype) == "float16" if dataset is None else SCALE in dataset.schema.names
    if dataset is not None:
        _check_same(store, dataset, uri, dtype, half)
    if not len(store):
        raise ValueError("the store has no rows to export.")
    mask, stale = _changes(store, dataset)
    added = int(mask.sum())
    if added:
        batches, schema = _batches(store, mask, half, dataset)
        mode: Any = "create" if dataset is None else "append"
        dataset = lance.write_dataset(
            batches, uri, schema=schema, mode=mode, max_rows_per_file=_ROWS_PER_FRAGMENT, **options
        )
    for start in range(0, len(stale), 10_000):
        dataset.delete(f"_rowid IN ({', '.join(map(str, stale[start : start + 10_000]))})")
    tell_optimizers(store, dataset)
    tag = dataset.tags.list().get(COMPLETE)
    if tag is None:
        dataset.tags.create(COMPLETE, dataset.version)
    elif tag["version"] < dataset.version:  # another export may have been faster, whose version has these rows too
        dataset.tags.update(COMPLETE, dataset.version)
    logging.getLogger("lightning_sketch").info(f"{added} rows added to {uri}, {len(stale)} removed.")
    return added, len(stale)


def _existing(lance: Any, uri: str, options: Mapping[str, Any]) -> Any:
    try:
        return lance.dataset(uri, **options)
    except ValueError as error:
        if "not found" in str(error):
            return None
        raise


def _check_same(store: Any, dataset: Any, uri: str, dtype: str | None, half: bool) -> None:
    """Refuse a dataset of other rows, or of another type than is asked for."""
    about = (dataset.schema.metadata or {}).get(SPEC.encode())
    if about is None:
        raise ValueError(f"{uri} is a dataset of another program; export to another uri.")
    other = StoreSpec(**json.loads(about)["spec"])
    if other.id != store.spec.id:
        raise ValueError(f"{uri} has rows of {other},\nthe store has {store.spec}; export to another uri.")
    if dtype is not None and (dtype == "float16") != half:
        raise ValueError(f"{uri} has {'float16' if half else 'float32'}, dtype={dtype!r} was asked for; leave it out.")


def _changes(store: Any, dataset: Any) -> tuple[Tensor, list[int]]:
    """Return which rows of a store are to be added to a dataset, as a mask, and the ids of those to be removed."""
    rows, own = store.rows, f"{store.snapshot.store}/"
    if dataset is None:
        return torch.ones(len(rows), dtype=torch.bool), []
    table = dataset.to_table(columns=list(PLACE), filter=f"starts_with(file, '{own}')", with_row_id=True)
    now, numbers = store.visible_places(), {name: i for i, name in enumerate(rows.files)}
    for name in now:  # of runs that began since the store was opened
        numbers.setdefault(name, len(numbers))
    by_key = {_key(store, name): number for name, number in numbers.items()}
    files = torch.tensor([by_key.get(file, -1) for file in table["file"].to_pylist()], dtype=torch.int64)
    there, wanted = (files << 32) + torch.tensor(table["place"].to_numpy()), (rows.file << 32) + rows.place
    visible = torch.cat([(numbers[name] << 32) + places for name, places in now.items()])
    if not torch.isin(wanted, visible).all():
        raise ValueError(
            "these rows are not those of the latest lineage now; open the store again, or export to a new uri."
        )
    stale = ~torch.isin(there, visible)  # and what `where` has left out stays
    return ~torch.isin(wanted, there), table["_rowid"].to_numpy()[stale.numpy()].tolist()


def _key(store: Any, name: Any) -> str:
    """Return the name of a file of rows, which no other file ever has."""
    return f"{store.snapshot.store}/{store.snapshot.folder.name}/{name.path}"


def _batches(store: Any, mask: Tensor, half: bool, dataset: Any) -> tuple[Iterator[Any], Any]:
    """Return rows as batches of Arrow, and their schema."""
    import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]

    chosen = store.where(mask)

    def tables() -> Iterator[Any]:
        start = 0
        for block in chosen.blocks():
            table = to_arrow(narrowed(block, "float16") if half else block)
            place = chosen.rows.place[start : start + len(block)]
            file = _key(store, chosen.rows.files[int(chosen.rows.file[start])])
            start += len(block)
            for name, values in zip(PLACE, (pa.array([file] * len(block)), pa.array(place.numpy())), strict=True):
                table = table.append_column(name, values)
            yield table

    first = next(tables())
    about = json.dumps({"spec": asdict(store.spec), "optimizers": sorted(store.optimizers)})
    schema = first.schema.with_metadata({SPEC: about}) if dataset is None else dataset.schema
    check_types(first.schema, schema)
    aligned = (table.select(schema.names).cast(schema) for table in tables())
    return (batch for table in aligned for batch in table.to_batches()), schema
