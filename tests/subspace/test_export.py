"""A subspace in a file: it gives the module bit for bit, or rounded, and refuses other weights and damaged files."""

import itertools

import pytest
import pytorch_lightning as pl
import torch
from marks import slow
from nets import Classifier, Convolutional, Late, Tied, train_loader, trainer
from safetensors.torch import save_file
from torch import nn

from lightning_sketch._files import CorruptFile
from lightning_sketch.subspace import SubspaceModel, SubspaceModule
from lightning_sketch.subspace.export import Quantized, load_subspace, quantize, save_subspace


def made(kind=Classifier, seed=0):
    pl.seed_everything(seed, verbose=False)
    return kind()


def fitted(kind=Classifier, dim=16, steps=12, **options):
    sub = SubspaceModule(made(kind), dim, **options)
    trainer(max_steps=steps).fit(sub, train_loader())
    return sub


def tensors(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def different(one, other):
    """Return the names of parameters and buffers that differ in any bit."""
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Classifier, {}),
        slow(Classifier, {"dim": 1}),
        slow(Classifier, {"dim": 64 * 16 + 16 + 160 + 10}),
        (Classifier, {"scale": 3.0, "seed": 7}),
        slow(Classifier, {"sketch": "gaussian"}),
        (Classifier, {"parameters": "net.0.*"}),
        (Classifier, {"parameters": "net.0.*", "others": "full"}),
        (Classifier, {"head": "net.2.*"}),
        (Classifier, {"max_dim": 48, "scale": 0.3}),
        (Classifier, {"structure": "layers"}),
        slow(Classifier, {"save_theta0": True}),
        (Convolutional, {}),
        slow(Tied, {}),
        slow(Late, {}),
    ],
)
def test_the_file_gives_the_module_bit_for_bit(kind, options, tmp_path):
    """All parameters and buffers, on another copy of the module, trainable as before."""
    sub = fitted(kind, **options)
    sizes = save_subspace(sub, tmp_path / "w.safetensors")
    module = made(kind)
    if kind is Late:
        module.configure_model()
    assert different(module, sub.module)
    before = [p.requires_grad for p in module.parameters()]
    assert load_subspace(tmp_path / "w.safetensors", module) is module
    assert not different(module, sub.module)
    assert [p.requires_grad for p in module.parameters()] == before == [True] * len(before)
    assert sizes["w"] == 4 * options.get("dim", 16)
    assert sizes["file"] == (tmp_path / "w.safetensors").stat().st_size > sum(sizes.values()) - sizes["file"]


def test_after_the_dimension_was_doubled(tmp_path):
    sub = fitted(max_dim=64)
    sub.double_dim()
    sub.w[1].data.normal_()
    save_subspace(sub, tmp_path / "w.safetensors")
    assert not different(load_subspace(tmp_path / "w.safetensors", made()), sub.materialize())


def plain_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.Linear(20, 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_plain_module_in_its_own_precision(dtype, tmp_path):
    sub = SubspaceModel(plain_net().to(dtype), 8)
    sub.w.data.normal_()
    sizes = save_subspace(sub, tmp_path / "w.safetensors")
    assert sizes["w"] == 8 * sub.w.itemsize
    module = load_subspace(tmp_path / "w.safetensors", plain_net().to(dtype))
    assert type(module) is nn.Sequential
    assert not different(module, sub.materialize())


@pytest.mark.parametrize("levels", [1, 2, 5, 256])
def test_a_rounded_w_takes_the_bits_of_its_levels(levels, tmp_path):
    """The file gives the module at the rounded w; the subspace that was saved stays as it is."""
    sub = SubspaceModel(plain_net(), 300)
    w = sub.w.data.normal_().clone()
    quantized = quantize(w, levels)
    sizes = save_subspace(sub, tmp_path / "w.safetensors", levels=levels)
    assert torch.equal(sub.w, w)
    assert "w" not in sizes
    assert sizes["codebook"] == 4 * levels
    assert sizes["indices"] == -(-300 * (levels - 1).bit_length() // 8)
    module = load_subspace(tmp_path / "w.safetensors", plain_net())
    assert different(module, sub.materialize())
    sub.w.data.copy_(quantized.w)
    assert not different(module, sub.materialize())


def test_the_quantizer_finds_clusters_and_more_levels_are_closer():
    centers = torch.tensor([-2.0, 0.5, 3.0])
    w = centers.repeat(50) + 1e-3 * torch.randn(150, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(quantize(w, 3).codebook, centers, atol=1e-3)
    noise = torch.randn(500, generator=torch.Generator().manual_seed(0))
    errors = [float((quantize(noise, levels).w - noise).square().mean()) for levels in (2, 4, 8, 16)]
    assert all(more < less / 2 for less, more in itertools.pairwise(errors))
    assert torch.equal(quantize(torch.tensor([1.0, 2.0, 1.0]), 16).w, torch.tensor([1.0, 2.0, 1.0]))
    with pytest.raises(ValueError, match="1 <= levels <= 256"):
        quantize(noise, 257)
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.tensor([1.0, torch.nan]), 2)


def test_other_weights_are_refused_by_name_and_left_as_they_are(tmp_path):
    save_subspace(fitted(), tmp_path / "w.safetensors")
    other = made()
    with torch.no_grad():
        other.net[2].bias[0] += 1e-7
    before = {name: tensor.clone() for name, tensor in tensors(other).items()}
    with pytest.raises(ValueError, match=r"in 1 of 4 parameters: net\.2\.bias\. Make it with the same seed"):
        load_subspace(tmp_path / "w.safetensors", other)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(other).items())
    assert all(p.requires_grad for p in other.parameters())
    with pytest.raises(ValueError, match=r"has 2 parameters, the one in .* had 4"):
        load_subspace(tmp_path / "w.safetensors", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="in 4 of 4 parameters"):
        load_subspace(tmp_path / "w.safetensors", made(seed=1))


def test_a_file_is_loaded_once(tmp_path):
    """A module that has the weights of one file is at no θ₀ any more."""
    save_subspace(fitted(), tmp_path / "w.safetensors")
    module = load_subspace(tmp_path / "w.safetensors", made())
    with pytest.raises(ValueError, match="other initial weights"):
        load_subspace(tmp_path / "w.safetensors", module)


def test_no_byte_of_a_file_can_be_changed_unseen(tmp_path):
    """Every third byte, since a file is small; a truncated one and another kind of file are named too."""
    sub = SubspaceModel(plain_net(), 8)
    sub.w.data.normal_()
    path = tmp_path / "w.safetensors"
    save_subspace(sub, path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"w\.safetensors"):
            load_subspace(path, plain_net())
    path.write_bytes(whole[:-1])
    with pytest.raises(CorruptFile, match=r"w\.safetensors"):
        load_subspace(path, plain_net())
    save_file({"w": torch.zeros(8)}, path)
    with pytest.raises(ValueError, match=r"w\.safetensors is .* none of save_subspace"):
        load_subspace(path, plain_net())
    with pytest.raises(FileNotFoundError):
        load_subspace(tmp_path / "none", plain_net())


def test_a_rounded_w_of_another_subspace_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has 1 numbers, this subspace 8"):
        save_subspace(
            SubspaceModel(plain_net(), 8),
            tmp_path / "w.safetensors",
            Quantized(torch.zeros(1), torch.zeros(1, dtype=torch.uint8)),
        )


def test_a_training_in_which_layers_were_frozen_is_refused(tmp_path):
    class Freezes(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 4:
                self.net[0].requires_grad_(False)

    with pytest.raises(ValueError, match="frozen in the middle of this training"):
        save_subspace(fitted(Freezes), tmp_path / "w.safetensors")


def test_a_subspace_exports_itself(tmp_path):
    torch.manual_seed(0)
    sub = SubspaceModel(nn.Linear(30, 10), 8)
    sub.w.data.normal_()
    assert sub.export(tmp_path / "w.safetensors", levels=3)["file"] == (tmp_path / "w.safetensors").stat().st_size
    torch.manual_seed(0)
    assert load_subspace(tmp_path / "w.safetensors", nn.Linear(30, 10)).weight.shape == (10, 30)
