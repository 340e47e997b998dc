"""Work on the parts of a scorer's rows by Ray Data: what is sent, in what order it comes back, what is warned of."""

import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from lightning_sketch.attribution._scorer import Scorer

_TOGETHER, _AT_ONCE = 1 << 13, 1024  # rows of a part, unless one file has more; parts in flight


def by_workers(scorer: Scorer, work: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """Yield work([scorer of a part], its ids, *arguments) for each part, in order; pickled, as Ray itself would."""
    try:
        import ray.data  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ImportError("ray_top_k and ray_scores need Ray: pip install 'lightning-sketch[ray]'.") from error
    done = partial(_worked, work=work, queries=(scorer.queries, scorer.length, scorer.halves), arguments=arguments)
    parts = enumerate(scorer.split(_TOGETHER))
    while items := [{"number": number, "part": pickle.dumps(part)} for number, part in islice(parts, _AT_ONCE)]:
        data = ray.data.from_items(items, override_num_blocks=len(items))
        data.context.op_resource_reservation_enabled = False  # half of all CPUs would wait for a second operation
        for row in sorted(data.map(done).take_all(), key=lambda row: row["number"]):
            found, said = pickle.loads(row["found"])
            for text in said:
                warnings.warn(f"{text} (in a part of them)", stacklevel=4)
            yield found


def _worked(item: dict[str, Any], work: Any, queries: Any, arguments: Any) -> dict[str, Any]:
    rows, ids = pickle.loads(item["part"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = work([Scorer(rows, rows.source, *queries)], ids, *arguments)
    return {"number": item["number"], "found": pickle.dumps((found, [str(warning.message) for warning in said]))}
