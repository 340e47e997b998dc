"""What a Lance dataset of rows has beside their columns, for those who write and read it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sketch.store.export import SKETCH

# Columns beside those of the rows: the scale of a sketch in float16, and where the row is in its store.
SCALE, PLACE = "scale", ("file", "place")

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


def sketches_of(batch: Any, kept: np.ndarray, dim: int) -> Tensor:
    """Return some sketches of a batch of Arrow, (rows, dim), in float32."""
    found = torch.from_numpy(batch[SKETCH].flatten().to_numpy().reshape(-1, dim)[kept])
    if SCALE not in batch.schema.names:
        return found
    return found.float() * torch.from_numpy(batch[SCALE].to_numpy()[kept])[:, None]
