"""Conversion of a spectrum to plain tensors and numbers, and to and from a safetensors file."""

import json
import os
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_sketch._files import CorruptFile, TensorFile, write_tensors
from lightning_sketch.curvature.result import Spectrum
from lightning_sketch.linalg.krylov import Krylov, SketchedRun
from lightning_sketch.linalg.quadrature import Quadrature
from lightning_sketch.operators.kinds import make_sketch

_S = TypeVar("_S", bound=Spectrum)


def to_plain(spectrum: Spectrum) -> dict[str, Any]:
    """Return all fields but the Krylov vectors, as tensors, numbers, strings, tuples and dicts."""
    plain: dict[str, Any] = {f.name: getattr(spectrum, f.name) for f in fields(spectrum) if f.name != "krylov"}
    plain["quadrature"] = tuple(spectrum.quadrature) if spectrum.quadrature else None
    plain["sketch"] = spectrum.sketch.spec() if spectrum.sketch else None
    return plain


def from_plain(plain: dict[str, Any], kind: type[_S]) -> _S:
    """Return the spectrum, or the subclass `kind` of it, whose fields `to_plain` returned."""
    plain = dict(plain)
    plain["quadrature"] = Quadrature(*plain["quadrature"]) if plain["quadrature"] else None
    plain["sketch"] = make_sketch(**plain["sketch"]) if plain["sketch"] else None
    plain["known"] = tuple(plain["known"]) if plain["known"] else None
    return kind(**plain)


def save_spectrum(spectrum: Spectrum, path: str | os.PathLike) -> None:
    """Write a spectrum to a safetensors file, atomically, with its Krylov vectors.

    Args:
        spectrum: The spectrum to write.
        path: The path of the file, which is replaced if it exists.
    """
    plain = to_plain(spectrum)
    if spectrum.quadrature:
        plain["nodes"], plain["weights"] = plain.pop("quadrature")
    if spectrum.krylov:
        plain["seed"], plain["runs"] = spectrum.krylov.seed, len(spectrum.krylov.runs)
        for i, run in enumerate(spectrum.krylov.runs):
            plain[f"columns.{i}"] = torch.stack(run.columns)
            for name in ("alpha", "beta", "dots"):
                plain[f"{name}.{i}"] = torch.tensor(getattr(run, name), dtype=torch.float64)
            if any(run.errors):
                plain[f"errors.{i}"] = torch.tensor(run.errors, dtype=torch.float64)
    tensors = {name: value for name, value in plain.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in plain.items() if not isinstance(value, Tensor)}
    write_tensors(Path(path), tensors, {"spectrum": json.dumps(rest, default=_plain)})


def _plain(value: Any) -> Any:
    """Return a tensor as a list, and a dataclass as a dict, for JSON."""
    return value.tolist() if isinstance(value, Tensor) else asdict(value)


def load_spectrum(path: str | os.PathLike) -> Spectrum:
    """Read a file written by `save_spectrum`; of a saved `Measurement`, the fields of a spectrum.

    Args:
        path: The path of the file.

    A file of the first version has no checksum: it is read with a warning, since a change of a digit would not be seen.

    Raises:
        CorruptFile: If the file is not what was written.
        ValueError: If the file contains no spectrum.

    >>> import tempfile
    >>> from lightning_sketch import BlockSRHT, spectrum
    >>> s = BlockSRHT(n=64, dim=8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_spectrum(spectrum(s.T @ s, top_k=2, bottom_k=0), f"{folder}/spectrum.safetensors")
    ...     load_spectrum(f"{folder}/spectrum.safetensors").top(2)
    tensor([8.0000, 8.0000], dtype=torch.float64)
    """
    try:
        file = TensorFile(Path(path), sealed=False)  # the first version wrote no checksum
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} does not exist; save_spectrum writes such files, and SpectrumMonitor those in hessian_spectra/ "
            "beside a CSV log."
        ) from error
    if "spectrum" not in file.header:
        raise ValueError(
            f"{path} contains no spectrum; such files are written by save_spectrum, and by SpectrumMonitor beside a "
            "CSV log."
        )
    file.check()
    if not file.sealed:
        if file.header.keys() != {"spectrum"}:  # a newer file, of which the names of both checksums are changed
            raise CorruptFile(f"{path}: its header is not what was written; restore it from a copy.")
        warnings.warn(
            f"{path} has no checksum, as the first version wrote it, so a changed byte would not be noticed; "
            "save_spectrum(load_spectrum(path), path) adds one.",
            stacklevel=2,
        )
    try:
        return _of_file(file)
    except Exception as error:
        if file.sealed:
            raise
        raise CorruptFile(
            f"{path}: its contents are not those of a spectrum ({error}); restore it from a copy."
        ) from error


def _of_file(file: TensorFile) -> Spectrum:
    """Return the spectrum that a file contains."""
    plain = json.loads(file.header["spectrum"])
    plain |= {name: file.tensor(name) for name in file.shapes}
    runs = [
        SketchedRun(
            list(plain.pop(f"columns.{i}")),
            *(plain.pop(f"{n}.{i}", torch.empty(0)).tolist() for n in ("alpha", "beta", "dots", "errors")),
        )
        for i in range(plain.pop("runs", 0))
    ]
    plain["quadrature"] = (plain.pop("nodes"), plain.pop("weights")) if "nodes" in plain else None
    seed = plain.pop("seed", None)
    known = {f.name for f in fields(Spectrum)}
    found = from_plain({name: value for name, value in plain.items() if name in known}, Spectrum)
    return found if seed is None else replace(found, krylov=Krylov(seed, found.sketch, runs))
