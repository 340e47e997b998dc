"""Processes that measure together fail together: none waits for one that has failed, wherever it failed."""

import sys
import time

import pytest
import torch
from forks import Started

from lightning_sketch.curvature import Hessian, spectrum

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def squares(module, x):
    return module(x).tanh().square().mean()


def one_of_two(rank, folder, where):
    """Measure with another process; rank 1 fails in its fifth product, between two, or after the last."""
    store = torch.distributed.FileStore(f"{folder}/meet", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    calls = []

    def loss_fn(module, x):
        calls.append(1)
        if where == "inside" and rank == 1 and len(calls) > 20:
            raise RuntimeError("cannot")
        return squares(module, x)

    def on_product(done, most):
        if where == "between" and rank == 1 and done == 5:
            raise RuntimeError("cannot")

    h = Hessian(loss_fn, torch.nn.Linear(3, 2).double(), [X[rank::4], X[rank + 2 :: 4]], distributed=True)
    begin = time.perf_counter()
    try:
        with h.hold():
            sp = spectrum(h, top_k=2, bottom_k=1, on_product=on_product)
            if where == "after" and rank == 1:
                raise RuntimeError("cannot")
        print("FOUND", sp.lambda_max)
    except RuntimeError as error:
        print("FAILED", error, time.perf_counter() - begin < 60)
    again = Hessian(squares, h.module, [X[rank::2]], distributed=True)
    print("AGAIN", spectrum(again, top_k=2, bottom_k=1).lambda_max)  # the ranks still agree on what comes next
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["inside", "between", "after", "nowhere"])
def test_the_other_rank_fails_too_and_both_go_on(where, tmp_path):
    running = [Started(__file__, rank, tmp_path, where) for rank in range(2)]
    printed = [process.communicate(timeout=300)[0].splitlines() for process in running]
    if where == "nowhere":
        assert printed[0] == printed[1]
        assert printed[0][0].startswith("FOUND")
    else:
        assert printed[0][0].startswith("FAILED another rank could not take its part")
        assert printed[1][0].startswith("FAILED cannot")
        assert all(lines[0].endswith("True") for lines in printed)
    assert printed[0][-1] == printed[1][-1]
    torch.manual_seed(0)
    whole = spectrum(Hessian(squares, torch.nn.Linear(3, 2).double(), [X]), top_k=2, bottom_k=1).lambda_max
    assert float(printed[0][-1].split()[1]) == pytest.approx(whole, rel=1e-9)


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_of_two(int(sys.argv[1]), *sys.argv[2:])
