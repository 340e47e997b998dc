"""The number by which a row is known, and sums over rows of one number."""

from collections.abc import Mapping

from jaxtyping import Float, Int
from torch import Tensor

from lightning_sketch.store.sketched_gradients import STAGES, UNKNOWN_ID

GROUPS = ("example_id", None)


def example_ids(columns: Mapping[str, Tensor], positions: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """The ids of the rows at these positions. Without ids: of a training step its number, else the position.

    Raises:
        ValueError: if some rows have ids and others do not.
    """
    ids = columns["example_id"][positions].long()
    unknown = ids == UNKNOWN_ID
    if not unknown.any():
        return ids
    if not unknown.all():
        raise ValueError(
            f"{int(unknown.sum())} of {len(ids)} rows have no example_id, the others have one; choose with "
            ".where(mask), or take the rows anew with an index_key."
        )
    steps = (columns["stage"][positions] == STAGES.index("fit")).all()
    return columns["step"][positions].long() if steps else positions


def sum_by_id(
    values: Float[Tensor, "*leading rows"], ids: Int[Tensor, " rows"]
) -> tuple[Float[Tensor, "*leading ids"], Int[Tensor, " ids"]]:
    """Sums over the last axis of what has one id; ids in rising order.

    >>> import torch
    >>> sum_by_id(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([7, 5, 7]))
    (tensor([2., 4.]), tensor([5, 7]))
    """
    unique, inverse = ids.unique(return_inverse=True)
    return values.new_zeros(*values.shape[:-1], len(unique)).index_add_(-1, inverse, values), unique


def check_group(group: str | None) -> None:
    """Refuse an unknown group."""
    if group not in GROUPS:
        raise ValueError(f"group={group!r} is not known; 'example_id' sums over rows of one example, None does not.")
