"""Rows on their way from the device that computes them to the host, which goes on meanwhile.

Copies are made on a stream of their own, behind what was launched before. So the host does not wait for the device, and
what the device computes next does not wait for the copies.
"""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.store.sketched_gradients import Column, SketchedGradients


class ArrivingRows:
    """Rows whose numbers are being copied to the host; from a CPU they are there at once.

    Args:
        sketches: The sketches, (rows, dim).
        sketch: The sketch that made them.
        columns: The columns, each on any device.
    """

    def __init__(self, sketches: Tensor, sketch: Sketch, columns: Mapping[str, Column]):
        self.sketch, self.sketches = sketch, _to_host(sketches)
        self.columns = {name: _to_host(c) if isinstance(c, Tensor) else c for name, c in columns.items()}
        devices = {t.device for t in (sketches, *columns.values()) if isinstance(t, Tensor) and t.is_cuda}
        self._copied = [_side_stream(device).record_event() for device in devices]

    @property
    def are_here(self) -> bool:
        """Whether all copies are done."""
        return all(event.query() for event in self._copied)

    def get(self) -> SketchedGradients:
        """Return the rows, as soon as they are here."""
        for event in self._copied:
            event.synchronize()
        return SketchedGradients(self.sketches, self.sketch, self.columns)


def _to_host(tensor: Tensor) -> Tensor:
    """Return where a tensor is being copied to; who owns it may write to it at once."""
    tensor = tensor.detach().clone()
    if not tensor.is_cuda:
        return tensor if tensor.device.type == "cpu" else tensor.cpu()
    stream = _side_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)  # so that its memory is not used again before
    return copy


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
