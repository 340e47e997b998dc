"""A forward pass that writes into trainable weights is measured at what it writes, and the weights are restored."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_sketch.curvature import GGN, Hessian, spectrum

IDS = torch.arange(30).view(10, 3) % 11


class Words(nn.Module):
    """An embedding whose rows are written into by the forward pass, in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.table = (nn.EmbeddingBag if way == "bag" else nn.Embedding)(11, 4, max_norm=0.5 if way != "norm" else None)
        self.out = nn.Linear(4, 11, bias=False)
        with torch.no_grad():
            self.table.weight.normal_().mul_(3)
        if way == "tied":
            self.out.weight = self.table.weight

    def forward(self, ids):
        if self.way == "bag":
            return self.out(self.table(ids).tanh())
        if self.way == "norm":
            rows = F.embedding(ids, self.table.weight, max_norm=0.5)
        else:
            rows = self.table(ids)
        if self.way == "clamped":
            with torch.no_grad():
                self.out.weight.clamp_(-0.2, 0.2)
        if self.way == "data":
            self.out.weight.data.clamp_(-0.2, 0.2)
        return self.out(rows.mean(1).tanh())


def squares(module, ids):
    return module(ids).square().mean()


WAYS = ["module", "norm", "bag", "tied", "clamped", "data"]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("way", WAYS)
def test_they_are_restored_to_the_bit_and_the_matrix_is_that_at_what_is_written(way):
    torch.manual_seed(0)
    module = Words(way).double()
    before = [p.clone() for p in module.parameters()]
    h = Hessian(squares, module, [IDS[:6], IDS[6:]])
    matrix = h.as_matrix()
    sp = spectrum(h, top_k=2, bottom_k=1)
    GGN(module, [(IDS, IDS[:, 0])], output_loss_fn="cross_entropy").loss()
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    for batch in (IDS[:6], IDS[6:], IDS):
        module(batch)  # writes as training does
    written = Hessian(squares, module, [IDS[:6], IDS[6:]])
    torch.testing.assert_close(matrix, written.as_matrix(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(sp.top(2), torch.linalg.eigvalsh(matrix).flip(0)[:2], rtol=1e-6, atol=0)


def test_weights_that_shrink_at_every_call_have_no_fixed_matrix():
    class Shrinking(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.mul_(0.9)
            return super().forward(x)

    module = Shrinking(3, 2).double()
    before = module.weight.clone()
    with pytest.raises(ValueError, match=r"at one call and .* at the next"):
        Hessian(lambda m, x: m(x).square().mean(), module, [torch.ones(4, 3).double()]).matvec(torch.ones(8).double())
    assert torch.equal(module.weight, before)
