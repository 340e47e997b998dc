"""Which rows count, after whatever interruptions.

Each run of a Trainer that writes is an attempt: (number, parent, parent_step). A fit that resumes from a checkpoint is
a child of the attempt that was writing when the checkpoint was taken, at the checkpoint's step. A row of an attempt is
live if its step is not beyond the steps at which its descendants in the line left:

    live(row) = row.step <= min over later attempts a of the line of a.parent_step

so each step of a line has its rows exactly once. Attempts that measure a checkpoint (validate, test, predict) stand
alone: of several that did so with the same weights in the same stage, the last counts. Numbers, not clocks, order them.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_sketch._files import write_once
from lightning_sketch.store.manifest import kept_steps
from lightning_sketch.store.sketched_gradients import STAGES

FOREVER = 1 << 62


@dataclass(frozen=True)
class Run:
    """One run that writes rows.

    Args:
        number: 1, 2, ... in the order of beginning.
        stage: "fit", "validate", "test" or "predict".
        parent: number of the attempt that it goes on from, if any.
        parent_step: optimizer steps that were done at the checkpoint it goes on from.
        world_size: number of processes that write.
    """

    number: int
    stage: str = "fit"
    parent: int | None = None
    parent_step: int | None = None
    world_size: int = 1


def begin_run(
    folder: Path, stage: str, parent: int | None = None, parent_step: int | None = None, world_size: int = 1
) -> Run:
    """Take the next number and write the attempt down; of several processes each gets its own.

    Raises:
        ValueError: if the stage or the parent is unknown, or compaction has dropped what the parent did.
    """
    if stage not in STAGES or stage == "queries":
        raise ValueError(f"stage={stage!r} writes no attempt; use one of {', '.join(STAGES[:-1])}.")
    known = {attempt.number for attempt in read_runs(folder)}
    if parent is not None and parent not in known:
        raise ValueError(
            f"the checkpoint goes on from attempt {parent}, which {folder} does not hold (it has {sorted(known)}); "
            "use the folder that was written when the checkpoint was taken, or an empty one."
        )
    kept = kept_steps(folder).get(parent, FOREVER)
    if parent_step is not None and parent_step > kept:
        raise ValueError(
            f"the checkpoint goes on from step {parent_step} of attempt {parent}, of which compact() has kept the "
            f"first {kept} steps, those that the latest fit went on from; use a later checkpoint, or another folder."
        )
    number = max(known, default=0)
    while True:
        number += 1
        attempt = Run(number, stage, parent, parent_step, world_size)
        if write_once(_path(folder, number), json.dumps(asdict(attempt)).encode()):
            return attempt


def read_runs(folder: Path) -> list[Run]:
    """All attempts of a store, in order."""
    return [Run(**json.loads(path.read_text())) for path in sorted((folder / "attempts").glob("*.json"))]


def lineage_of(attempts: Sequence[Run], last: int | None = None) -> dict[int, int]:
    """The attempts of a line, in order, each with the last of its steps that counts.

    Args:
        attempts: all of a store.
        last: the fit that the line ends with; the latest if None.

    Raises:
        ValueError: if there is no such fit.

    >>> lineage_of([Run(1), Run(2, parent=1, parent_step=50), Run(3, parent=1, parent_step=20)])[1]
    20
    """
    by_number = {attempt.number: attempt for attempt in attempts}
    fits = [attempt.number for attempt in attempts if attempt.stage == "fit"]
    if last is not None and last not in fits:
        raise ValueError(f"lineage={last} is no fit of the store; its fits are {fits}.")
    current = last if last is not None else max(fits, default=None)
    line, until = {}, FOREVER
    while current is not None:
        line[current] = until
        attempt = by_number[current]
        until = min(until, FOREVER if attempt.parent_step is None else attempt.parent_step)
        current = attempt.parent
    return dict(sorted(line.items()))


def _path(folder: Path, number: int) -> Path:
    return folder / "attempts" / f"{number:08d}.json"
