"""The command `lightning-sketch`: what is done to a store after a run, and what a bug report needs."""

import contextlib
import csv
import json
import math
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from lightning_sketch._arguments import whole_number
from lightning_sketch._example_files import example_of, read_examples

_PACKAGES = ["torch", "pytorch-lightning", "lightning", "torchmetrics", "safetensors", "numpy", "numba", "triton"]
_PACKAGES += ["transformers", "wandb", "pandas", "pyarrow", "pylance", "ray"]
_PATIENCE = 2.0  # seconds until a terminal sees progress

Stage = Literal["fit", "validate", "test", "predict"]
Method = Literal["dot", "cosine", "influence"]
Curvature = Literal["ggn", "margin", "fisher", "trak"]


def info(store: Path | None = None) -> dict[str, Any]:
    """Print versions, devices and the kernels in use, for a bug report; or what a store has.

    Args:
        store: The folder of a store, whose rows, stages and columns are printed.
    """
    if store is not None:
        return _described(store)
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
    opened = _open(store)
    with _progress("verify", _files(store)) as file_done:
        return {"rows": opened.verify(file_done)}


def compact(store: Path, accept_loss: bool = False) -> dict[str, Any]:
    """Delete the rows of a store that are not visible, and merge small files.

    Args:
        store: The folder of the store.
        accept_loss: Go on although files are missing, whose rows are lost then.
    """
    with _reading("compact", store) as opened:
        return {"rows": len(opened.compact(accept_loss=accept_loss))}


def export(
    store: Path,
    kind: Literal["npy", "parquet", "lance"],
    path: str,
    append: bool = False,
    neighbors: int | None = None,
    stage: Stage | None = None,
) -> dict[str, Any]:
    """Export the rows of a store for other tools.

    Args:
        store: The folder of the store.
        kind: npy, a folder of arrays; parquet, one file; or lance, a dataset, which may be in an object store.
        path: The folder, file or dataset.
        append: Add what a Lance dataset lacks.
        neighbors: Of a Parquet file, how many rows each row names as its nearest, for embedding-atlas.
        stage: Use rows of this stage only.
    """
    with _reading("export", store) as opened:
        rows = _of_stage(opened, stage)
        rows.export(kind, path, append=append, neighbors=neighbors)
        return {"rows": len(rows), "path": path}


def top_k(
    store: Path,
    query_ids: str,
    k: int = 10,
    method: Method = "cosine",
    curvature: Curvature = "ggn",
    stage: Stage | None = None,
    largest: bool = True,
) -> dict[str, Any]:
    """Find the other examples of a store that help or hurt examples of the same store most, with their scores.

    Args:
        store: The folder of the store.
        query_ids: The ids of the examples that are asked about, separated by commas; one that has a comma itself goes
            into double quotes.
        k: How many examples to find.
        method: How rows are compared.
        curvature: The curvature for influence.
        stage: Use rows of this stage only.
        largest: False for those that hurt most.
    """
    whole_number(k, "k", usual=10)
    with _reading("top-k", store) as opened:
        rows = _examples_of(opened, stage)
        asked = _asked(rows, query_ids)
        found = rows.top_k(asked, k + 1, method=method, curvature=curvature, largest=largest)
    examples = found.example_ids.tolist() if hasattr(found.example_ids, "tolist") else found.example_ids
    answers = {}
    for name, ids, scores in zip(asked.columns["example_id"].tolist(), examples, found.scores.tolist(), strict=True):
        others = [[str(id), score] for id, score in zip(ids, scores, strict=True) if id != name]  # itself is no news
        answers[str(name)] = others[:k]
    return answers


def report(
    store: Path,
    path: Path,
    query_ids: str,
    train: Path | None = None,
    k: int = 10,
    method: Method = "dot",
    curvature: Curvature = "ggn",
    stage: Stage | None = None,
    title: str = "Which examples taught what",
) -> dict[str, Any]:
    """Write a page to browse: which other examples helped and hurt some examples of the same store.

    Args:
        store: The folder of the store.
        path: The HTML file.
        query_ids: The ids of the examples that are asked about, separated by commas; one that has a comma itself goes
            into double quotes.
        train: The training examples in the order of their ids: a .txt file with a text on each line, a .jsonl file with
            a text or an object with a `text` on each line, a .json file with a list, or with an object by ids, or a
            .npy file of images. Only ids are shown if it is left out.
        k: How many examples to show on each side.
        method: How rows are compared; scores are divided by the lengths of rows.
        curvature: The curvature for influence.
        stage: Use rows of this stage only.
        title: The title of the page.
    """
    with _reading("report", store) as opened:
        rows = _examples_of(opened, stage)
        asked = _asked(rows, query_ids)
        ids = asked.columns["example_id"].tolist()
        others = ~sum(rows.metadata()["example_id"] == id for id in ids).bool()
        rows = rows.where(others)
        examples = None if train is None else read_examples(train, type(ids[0]))
        shown = [f"example {id}" if examples is None else example_of(examples, id, train) for id in ids]
        rows.report(path, asked, train=examples, queries_of=shown, k=k, method=method, curvature=curvature, title=title)
    return {"path": str(path), "queries": len(ids), "rows": len(rows)}


def spectrum(
    config: Path,
    ckpt: str | None = None,
    model: str | None = None,
    data: str | None = None,
    curvature: Literal["hessian", "ggn", "fisher"] = "hessian",
    top_k: int = 10,
    bottom_k: int = 3,
    num_matvecs: int = 96,
    num_batches: int = 4,
    save: Path | None = None,
) -> dict[str, Any]:
    """Compute the largest and smallest eigenvalues of the curvature of a checkpoint, on batches of its training data.

    They are printed with bounds on their errors, and a ? where they have not converged.

    Args:
        config: The YAML file of LightningCLI that made the run, such as the config.yaml beside its checkpoints.
        ckpt: The checkpoint; the initial weights if it is left out.
        model: The class of the model, package.module.Class, if the file does not say it.
        data: The class of the data module, if there is one and the file does not say it.
        curvature: The Hessian, the Gauss-Newton matrix, or the empirical Fisher matrix.
        top_k: How many of the largest eigenvalues to compute.
        bottom_k: How many of the smallest.
        num_matvecs: The maximal number of products.
        num_batches: How many batches of the training data to use.
        save: Save the spectrum to this file, which `lightning_sketch.load_spectrum` reads.
    """
    from lightning_sketch.callbacks.spectrum_monitor.spectrum_of_run import spectrum_of_run
    from lightning_sketch.curvature import save_spectrum

    options: dict[str, Any] = {"curvature": curvature, "top_k": top_k, "bottom_k": bottom_k}
    found = spectrum_of_run(config, ckpt, model, data, num_matvecs=num_matvecs, num_batches=num_batches, **options)
    if save is not None:
        save_spectrum(found, save)
    return {
        "eigenvalues": _ends(found.eigenvalues.tolist(), top_k, bottom_k),
        "residuals": _ends(found.residuals.tolist(), top_k, bottom_k),
        "converged": _ends(found.converged.tolist(), top_k, bottom_k),
        "trace": found.trace,
        "trace_sem": found.trace_sem,
        "loss": found.loss,
        "parameters": found.n,
        "products": found.num_products,
        "seconds": found.seconds,
        **({} if save is None else {"path": str(save)}),
    }


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "info": info,
    "verify": verify,
    "compact": compact,
    "export": export,
    "top-k": top_k,
    "report": report,
    "spectrum": spectrum,
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
        own.add_function_arguments(function, as_positional=name != "spectrum")
        own.add_argument("--json", action="store_true", help="Print JSON, for other programs.")
        commands.add_subcommand(name, own, help=(function.__doc__ or "").partition("\n")[0])
    chosen = parser.instantiate_classes(parser.parse_args(arguments))
    options = vars(chosen[chosen.subcommand]).copy()
    as_json = options.pop("json")
    try:
        # what others print meanwhile is not of the answer
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            found = COMMANDS[chosen.subcommand](**options)
    except Exception as error:
        expected = isinstance(error, ValueError | OSError | RuntimeError | ImportError | KeyError)
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        if isinstance(error, FileNotFoundError) and error.filename:
            text = f"there is no {error.filename}"
        if "fit_curvature" in text:
            text += " Without it --curvature fisher takes the curvature of the rows."
        kind = "" if expected and text else f"{type(error).__name__}: "
        print(f"lightning-sketch {chosen.subcommand}: {kind}{text}", file=sys.stderr)
        sys.exit(1)
    for text in dict.fromkeys(str(warning.message) for warning in said):
        print(f"warning: {text}", file=sys.stderr)
    print(json.dumps(_finite(found), indent=2, allow_nan=False) if as_json else _plain(found))


def _open(store: Path) -> Any:
    from lightning_sketch.attribution import GradientStore

    return GradientStore.open(store)


def _files(store: Path) -> int:
    """Return about how many files of rows a store has."""
    return sum(1 for _ in store.glob("rows*/r*/a*/*.safetensors"))


@contextlib.contextmanager
def _progress(verb: str, files: int) -> Iterator[Callable[[], object]]:
    """Yield what is called after each file; a bar is shown in a terminal after some seconds, and goes at the end."""
    from tqdm import tqdm

    shown = sys.stderr.isatty()
    with tqdm(
        desc=verb, total=files, unit=" files", delay=_PATIENCE, leave=False, disable=not shown, file=sys.stderr
    ) as bar:
        yield bar.update


@contextlib.contextmanager
def _reading(verb: str, store: Path) -> Iterator[Any]:
    """Yield an opened store that shows how many of its files were read."""
    from lightning_sketch.attribution import GradientStore

    with _progress(verb, _files(store)) as file_done:

        class Watched(GradientStore):
            def _open_shard(self, name: Any) -> Any:
                shard = super()._open_shard(name)
                file_done()
                return shard

        yield Watched.open(store)


def _of_stage(store: Any, stage: Stage | None) -> Any:
    return store if stage is None else store.where(stage=stage)


def _examples_of(store: Any, stage: Stage | None) -> Any:
    """Return the rows of examples with ids, without those of steps."""
    from lightning_sketch.store.sketched_gradients import keys_of

    rows = _of_stage(store, stage)
    return rows.where(keys_of(rows.metadata()["example_id"]) != -1)


def _asked(rows: Any, query_ids: str) -> Any:
    """Return the last row of each of the examples that are asked about, in the order in which they are asked."""
    import torch

    from lightning_sketch.store import STAGES, SketchedGradients

    try:
        lines = csv.reader(query_ids.splitlines(), skipinitialspace=True, strict=True)
        asked: list[Any] = [id.strip() for line in lines for id in line if id.strip()]
    except csv.Error as error:
        raise ValueError(
            f'the ids {query_ids} cannot be told apart ({error}); write a,b for two, and """a"" b" for one with quotes.'
        ) from error
    if not len(rows):
        raise ValueError("the store has no rows of examples with ids; trainer.validate(model, loader) makes them.")
    stages = rows.metadata()["stage"].unique().tolist()
    if len(stages) > 1:
        names = [STAGES[stage] for stage in stages]
        raise ValueError(
            f"the store has examples of the stages {', '.join(names)}, whose ids may be of different data; pass "
            f"--stage {names[-1]}."
        )
    if isinstance(rows.metadata()["example_id"], torch.Tensor):
        wrong = [id for id in asked if not re.fullmatch("-?[0-9]+", id)]
        if wrong:
            raise ValueError(f"the ids of this store are numbers, got {wrong[0]!r}; write 3,17 for two of them.")
        asked = [int(id) for id in asked]
    found = rows.where(example_id=asked).read()
    place = {id: row for row, id in enumerate(found.columns["example_id"].tolist())}
    if missing := [str(id) for id in asked if id not in place]:
        raise ValueError(
            f"the store has no rows of the examples {', '.join(missing)}; `info --store STORE` says which it has."
        )
    order = torch.tensor([place[id] for id in asked])
    columns = {name: column[order] for name, column in found.columns.items()}
    return SketchedGradients(found.sketches[order], found.sketch, columns)


def _described(store: Path) -> dict[str, Any]:
    """Return what a store has, without a read of its sketches."""
    from lightning_sketch.store import STAGES

    opened = _open(store)
    columns, spec = opened.metadata(), opened.spec
    ids = columns["example_id"].tolist()
    shown = sorted({str(id) for id in ids if id not in (-1, "")}, key=lambda id: (len(id), id))
    return {
        "rows": len(opened),
        "sketch": spec.sketch,
        "dtype": str(spec.dtype),
        "parameters": f"{len(spec.parameters.names)} tensors, {spec.parameters.n:,} numbers",
        "stages": {name: count for i, name in enumerate(STAGES) if (count := columns["stage"].tolist().count(i))},
        "examples": f"{len(shown):,}: {', '.join(shown[:5])}{', ...' if len(shown) > 5 else ''}" if shown else "no ids",
        "columns": sorted(columns),
        "files": _files(store),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _finite(value: Any) -> Any:
    """Return an answer with None in place of NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ends(values: list[Any], top_k: int, bottom_k: int) -> list[Any]:
    """Return the first and the last of all values."""
    return values[:top_k] + values[max(top_k, len(values) - bottom_k) :]


def _plain(found: dict[str, Any]) -> str:
    lines = []
    if "eigenvalues" in found:
        found = found.copy()
        each = zip(*(found.pop(name) for name in ("eigenvalues", "residuals", "converged")), strict=True)
        lines += ["eigenvalues:"]
        lines += [f"    {value:12.5g} ± {error:.1g}{'' if known else ' ?'}" for value, error, known in each]
    for name, value in found.items():
        if isinstance(value, dict):
            lines += [f"{name}:", *(f"    {key}: {each}" for key, each in value.items())]
        elif isinstance(value, list) and value and isinstance(value[0], list):
            lines += [f"{name}:", *(f"    {score:12.5g}  {id}" for id, score in value)]
        elif isinstance(value, list):
            lines.append(f"{name}: {', '.join(map(_short, value))}")
        else:
            lines.append(f"{name}: {_short(value)}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
