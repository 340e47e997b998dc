"""The command `lightning-sketch`: what is done to a store after a run, and what a bug report needs."""

import json
import platform
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

_PACKAGES = ["torch", "pytorch-lightning", "lightning", "torchmetrics", "safetensors", "numpy", "numba", "triton"]
_PACKAGES += ["transformers", "wandb", "pandas", "pyarrow", "pylance", "ray"]


def info() -> dict[str, Any]:
    """Print versions, devices and the kernels in use, for a bug report."""
    import torch

    from lightning_sketch.operators import BlockSRHT, CountSketch, kernel_in_use

    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    sketches = BlockSRHT(n=1 << 20, dim=4096), CountSketch(n=1 << 20, dim=4096)
    return {
        "lightning-sketch": _version("lightning-sketch"),
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: found for name in _PACKAGES if (found := _version(name))},
        "devices": [device if device == "cpu" else torch.cuda.get_device_name(device) for device in devices],
        "kernels": {
            f"{sketch.kind} on {device}": kernel_in_use(sketch, torch.device(device))
            for device in devices
            for sketch in sketches
        },
    }


def verify(store: Path) -> dict[str, Any]:
    """Read all files of a store and compare their checksums; exit with 1 if one is not what was written.

    Args:
        store: The folder of the store, the writer's `dirpath`.
    """
    return {"rows": _open(store).verify()}


def compact(store: Path, accept_loss: bool = False) -> dict[str, Any]:
    """Delete the rows of a store that are not visible, and merge small files.

    Args:
        store: The folder of the store.
        accept_loss: Go on although files are missing, whose rows are lost then.
    """
    before = _open(store)
    return {"rows": len(before.compact(accept_loss=accept_loss))}


def export(store: Path, kind: Literal["npy", "parquet", "lance"], path: str, append: bool = False) -> dict[str, Any]:
    """Export the rows of a store for other tools.

    Args:
        store: The folder of the store.
        kind: npy, a folder of arrays; parquet, one file; or lance, a dataset, which may be in an object store.
        path: The folder, file or dataset.
        append: Add what a Lance dataset lacks.
    """
    opened = _open(store)
    opened.export(kind, path, append=append)
    return {"rows": len(opened), "path": path}


def top_k(
    store: Path,
    query_ids: str,
    k: int = 10,
    method: Literal["dot", "cosine", "influence"] = "cosine",
    curvature: Literal["ggn", "margin", "fisher", "trak"] = "ggn",
    stage: Literal["fit", "validate", "test", "predict"] | None = None,
    largest: bool = True,
) -> dict[str, Any]:
    """Find the examples of a store that help or hurt examples of the same store most.

    Args:
        store: The folder of the store.
        query_ids: The ids of the examples that are asked about, separated by commas.
        k: How many examples to find.
        method: How rows are compared.
        curvature: The curvature for influence.
        stage: Use rows of this stage only.
        largest: False for those that hurt most.
    """
    import torch

    opened = _open(store)
    rows = opened if stage is None else opened.where(stage=stage)
    ids = rows.metadata()["example_id"]
    asked: list[Any] = query_ids.split(",")
    if isinstance(ids, torch.Tensor):
        asked = [int(id) for id in asked]
    if not len(rows.where(example_id=asked)):
        raise ValueError(f"the store has no rows of the examples {query_ids}; info on its ids: store.metadata().")
    found = rows.top_k(rows.where(example_id=asked).read(), k, method=method, curvature=curvature, largest=largest)
    examples = found.example_ids.tolist() if hasattr(found.example_ids, "tolist") else found.example_ids
    names = rows.where(example_id=asked).metadata()["example_id"].tolist()
    return {
        str(name): [[str(id), score] for id, score in zip(each, scores, strict=True)]
        for name, each, scores in zip(names, examples, found.scores.tolist(), strict=True)
    }


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "info": info,
    "verify": verify,
    "compact": compact,
    "export": export,
    "top-k": top_k,
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command; exit with 0, with 1 if it failed, with 2 if it was not understood."""
    try:
        from jsonargparse import ArgumentParser
    except ImportError:
        sys.exit("lightning-sketch needs jsonargparse: pip install 'lightning-sketch[cli]'.")
    parser = ArgumentParser(prog="lightning-sketch", description="Look after stores of sketched gradients.")
    commands = parser.add_subcommands(required=True)
    for name, function in COMMANDS.items():
        own = ArgumentParser(description=(function.__doc__ or "").partition("\n")[0])
        own.add_function_arguments(function, as_positional=True)
        own.add_argument("--json", action="store_true", help="Print JSON, for other programs.")
        commands.add_subcommand(name, own, help=(function.__doc__ or "").partition("\n")[0])
    chosen = parser.instantiate_classes(parser.parse_args(arguments))
    options = vars(chosen[chosen.subcommand]).copy()
    as_json = options.pop("json")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            found = COMMANDS[chosen.subcommand](**options)
    except (ValueError, OSError, RuntimeError, ImportError, KeyError) as error:
        print(f"lightning-sketch {chosen.subcommand}: {error}", file=sys.stderr)
        sys.exit(1)
    for warning in said:
        print(f"warning: {warning.message}", file=sys.stderr)
    print(json.dumps(found, indent=2) if as_json else _plain(found))


def _open(store: Path) -> Any:
    from lightning_sketch.attribution import GradientStore

    return GradientStore.open(store)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _plain(found: dict[str, Any]) -> str:
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            lines += [f"{name}:", *(f"    {key}: {each}" for key, each in value.items())]
        elif isinstance(value, list) and value and isinstance(value[0], list):
            lines += [f"{name}:", *(f"    {score:12.5g}  {id}" for id, score in value)]
        else:
            lines.append(f"{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return "\n".join(lines)
