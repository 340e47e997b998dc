"""The kernels in Triton: the theorems of all kernels, and that their plans are sound.

Run by `test_triton.py` in a process of its own, in Triton's interpreter or on a CUDA device, as the environment
variable KERNELS_ON says: the interpreter is chosen when Triton is imported, and checkers of types would wrap its
functions.
"""

import itertools
import os

import pytest
from kernel_theorems import KernelTheorems, relative

from lightning_sketch.operators import BlockSRHT, kernel_in_use


class TestTriton(KernelTheorems):
    kernel = "triton"
    device = os.environ.get("KERNELS_ON", "cpu")

    @pytest.fixture
    def launches(self):
        from lightning_sketch.operators.kernels.triton import launches

        return launches

    @pytest.fixture
    def plans(self):
        from lightning_sketch.operators.kernels.triton import plans

        return plans

    def test_larger_chunks_are_left_to_the_reference(self):
        assert kernel_in_use(BlockSRHT(n=1 << 16, dim=(1 << 15) + 1), self.device) == "torch"

    @pytest.mark.parametrize("backward", [False, True])
    @pytest.mark.parametrize("bytes_each", [2, 4])
    @pytest.mark.parametrize("log_chunk", range(16))
    def test_a_plan_transforms_each_bit_of_a_chunk_once(self, plans, log_chunk, bytes_each, backward):
        plan = plans.plan_of(1 << log_chunk, bytes_each, backward)
        constants = plans.constants(plan, 1 << log_chunk)
        masks = [constants[f"BITS_{stage}"] for stage in "ABC"]
        assert sum(masks) == (1 << min(log_chunk, plan.bits)) - 1
        assert not any(a & b for a, b in itertools.combinations(masks, 2))
        for held in plan.stages:
            assert len(set(held)) + 5 + plan.warps.bit_length() - 1 == plan.bits

    @pytest.mark.parametrize("dim", [256, 1 << 15])
    def test_other_plans_give_the_same(self, launches, plans, dim, vectors):
        """Larger and smaller tiles, with a tile loaded ahead; a chunk may be a part of a tile or several of them."""
        sketch, x, y = BlockSRHT(n=70_000, dim=dim, seed=3), vectors(2, 70_000).float(), vectors(2, dim).float()
        for bits, prefetch in itertools.product((13, 14), (False, True)):
            plan = plans.Plan(bits, 1 << bits - 10, plans.stages_of(bits, 4), 2, prefetch)
            there = launches.block_srht_forward(sketch, x, 0, plan)
            back = launches.block_srht_adjoint(sketch, y, 0, 70_000, plan)
            assert relative(there, sketch.forward(x.double(), 0)) < 1e-6
            assert relative(back, sketch.adjoint(y.double(), 0, 70_000)) < 1e-6
