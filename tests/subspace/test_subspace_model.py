"""SubspaceModel: w is trained by any loop, as by a dense D in float64."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from marks import slow
from nets import digits
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_sketch import Hessian
from lightning_sketch.curvature import GGN
from lightning_sketch.subspace import SubspaceModel, generalization_bound


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))


class Checkpointed(nn.Module):
    """Recompute the first layers in the backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        self.net, self.reentrant = net(), reentrant

    def forward(self, images):
        hidden = checkpoint(self.net[:2], images.requires_grad_(), use_reentrant=self.reentrant)
        return self.net[2](hidden)


def dense(model, images, labels):
    """Return the loss at w, and its gradient by autograd through θ₀ + Dᵀ w, in float64."""
    d = model.directions.as_matrix(dtype=torch.float64)
    w = model.w.detach().double().requires_grad_()
    theta0 = torch.cat([start.flatten() for start in model.weights.start]).double()
    parts = dict(zip(model.weights.layout.names, model.weights.layout.unflatten(theta0 + d.T @ w), strict=True))
    prefix = "net." if "net.0.weight" in parts else ""
    hidden = torch.tanh(F.linear(images.double(), parts[f"{prefix}0.weight"], parts[f"{prefix}0.bias"]))
    loss = F.cross_entropy(F.linear(hidden, parts[f"{prefix}2.weight"], parts[f"{prefix}2.bias"]), labels)
    return loss, torch.autograd.grad(loss, w)[0]


@pytest.mark.parametrize(
    "make", [net, lambda: Checkpointed(True), lambda: Checkpointed(False)], ids=["plain", "reentrant", "not"]
)
def test_the_gradient_is_that_of_the_loss_through_the_directions(make):
    """To a few roundings of float32, at w other than zero; the weights have no gradients of their own."""
    model = SubspaceModel(make(), 20, scale=3)
    images, labels = digits(slice(0, 50))
    model.w.data.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    loss = F.cross_entropy(model(images / 16), labels)
    loss.backward()
    true, gradient = dense(model, (images / 16).detach(), labels)
    assert torch.allclose(loss.double(), true, rtol=1e-5)
    assert torch.allclose(model.w.grad.double(), gradient, rtol=1e-4, atol=1e-5 * float(gradient.norm()))
    assert all(p.grad is None and not p.requires_grad for p in model.module.parameters())


def test_a_loop_of_ones_own_is_training_of_w():
    """Ten steps of Adam over `parameters()`, as on the dense function in float64."""
    model = SubspaceModel(net(), 20)
    images, labels = digits(slice(0, 64))
    images = images / 16
    twin = copy.deepcopy(model)
    optimizer, true = torch.optim.Adam(model.parameters(), lr=0.03), torch.zeros(20, dtype=torch.float64)
    truth = torch.optim.Adam([true], lr=0.03)
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        twin.w.data.copy_(true)
        true.grad = dense(twin, images, labels)[1]
        truth.step()
    assert [name for name, _ in model.named_parameters()] == ["w"]
    assert torch.allclose(model.w.double(), true, rtol=1e-3, atol=1e-5)


def test_several_outputs_in_a_nested_structure_depend_on_w():
    """The gradient of a sum over outputs is the sum of their gradients; an output that is not used has no part."""

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return {"a": self.net(x), "rest": (self.net[0](x).sum(), 3, x.argmax())}

    model = SubspaceModel(Nested(), 8)
    images, _ = digits(slice(0, 5))
    gradients = []
    for weigh in (lambda o: o["a"].sum(), lambda o: o["rest"][0], lambda o: o["a"].sum() + 2 * o["rest"][0]):
        model.zero_grad()
        output = model(images)
        weigh(output).backward()
        gradients.append(model.w.grad.clone())
    assert output["rest"][1] == 3
    assert torch.allclose(gradients[0] + 2 * gradients[1], gradients[2], rtol=1e-4, atol=1e-3)


def test_a_head_is_trained_as_usual_and_the_rest_along_w():
    model = SubspaceModel(net(), 8, head="2.*")
    assert sorted(name for name, p in model.named_parameters() if p.requires_grad) == [
        "module.2.bias",
        "module.2.weight",
        "w",
    ]
    assert model.n == 64 * 12 + 12
    images, labels = digits(slice(0, 20))
    F.cross_entropy(model(images), labels).backward()
    plain = net()
    F.cross_entropy(plain(images), labels).backward()
    assert torch.allclose(model.module[2].weight.grad, plain[2].weight.grad)
    assert model.w.grad.norm() > 0


def test_the_curvature_is_that_of_w():
    """Hessian and GGN of w are D H Dᵀ and D G Dᵀ, H and G by autograd through the dense function."""
    model = SubspaceModel(net(), 6)
    batch = digits(slice(0, 30))
    batch = (batch[0] / 16, batch[1])

    def loss_fn(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1])

    found = Hessian(loss_fn, model, [batch]).as_matrix()

    def gradient(w):
        twin = copy.deepcopy(model)
        twin.w.data.copy_(w)
        return dense(twin, *batch)[1]

    h = 1e-3  # central differences of an exact gradient in float64: off by h² times a third derivative of order 1
    axes = h * torch.eye(6)
    true = torch.stack([(gradient(axis) - gradient(-axis)) / (2 * h) for axis in axes])
    assert torch.allclose(found.double(), true, rtol=1e-2, atol=1e-3 * float(true.norm()))
    ggn = GGN(model, [batch], output_loss_fn="cross_entropy").as_matrix()
    assert float(torch.linalg.eigvalsh(ggn.double())[0]) > -1e-5
    assert float((ggn - found).norm()) < float(found.norm())  # equal at a perfect fit only


def test_attributes_and_the_signature_are_those_of_the_module():
    model = SubspaceModel(net(), 4)
    assert str(inspect.signature(model.forward)) == str(inspect.signature(model.module.forward))
    assert model.append.__self__ is model.module  # a method of nn.Sequential
    with pytest.raises(AttributeError, match="nowhere"):
        _ = model.nowhere


def test_what_reads_the_module_after_a_step_finds_the_weights_at_w():
    model = SubspaceModel(net(), 4)
    model.w.data.add_(0.5)
    assert model.append is not None  # an attribute of the module inside
    assert not torch.equal(model.module[0].weight, model.theta0()["0.weight"])


def test_a_state_dict_has_w_and_goes_into_a_module_of_the_same_start():
    model, other = SubspaceModel(net(), 4), SubspaceModel(net(), 4)
    model.w.data.normal_()
    state = model.state_dict()
    assert set(state) == {"w", "_extra_state"}
    assert all(isinstance(value, torch.Tensor) for value in state.values())  # as safetensors asks for
    other.load_state_dict(state)
    model.ready()
    assert torch.equal(model.module[0].weight, other.module[0].weight)
    changed = net()
    changed[0].weight.data.add_(1)
    with pytest.raises(ValueError, match="other initial weights"):
        SubspaceModel(changed, 4).load_state_dict(state)


def test_weights_that_were_written_to_are_taken_over_first_and_refused_later(caplog):
    model = SubspaceModel(net(), 4)
    other = {name: tensor + 1 for name, tensor in net().state_dict().items()}
    model.module.load_state_dict(other)
    model(torch.ones(1, 64))
    assert torch.equal(model.theta0()["0.weight"], other["0.weight"])
    model.w.data.add_(1)
    model(torch.ones(1, 64))
    model.module[2].weight.data.clamp_(-0.01, 0.01)
    with pytest.raises(RuntimeError, match=r"1 weights were written to after training began: 2\.weight"):
        model(torch.ones(1, 64))


def test_an_output_whose_tensors_cannot_be_found_is_refused():
    """The gradient through a distribution would be lost; inside `following()` it is that of the dense function."""

    class Stochastic(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return torch.distributions.Categorical(logits=self.net(x))

    model = SubspaceModel(Stochastic(), 20)
    images, labels = digits(slice(0, 30))
    with pytest.raises(TypeError, match=r"has a Categorical.*model\.following"):
        model(images / 16)
    with model.following():
        loss = -model(images / 16).log_prob(labels).mean()
    loss.backward()
    assert torch.allclose(model.w.grad.double(), dense(model, images / 16, labels)[1], rtol=1e-4, atol=1e-5)


def test_a_frozen_w_lets_gradients_through_to_the_inputs():
    """As a discriminator does, while the generator before it is trained."""
    model, plain = SubspaceModel(net(), 8), net()
    model.w.requires_grad_(False)
    found = []
    for one in (model, plain):
        images = (digits(slice(0, 4))[0] / 16).requires_grad_()
        one(images).square().sum().backward()
        found.append(images.grad)
    assert torch.equal(*found)


def test_another_scale_leaves_frozen_layers_where_they_are():
    """Both w and what is remembered of it change by the same factor."""
    model = SubspaceModel(net(), 8, scale=3)
    model.w.data.normal_(generator=torch.Generator().manual_seed(0))
    model(torch.ones(1, 64))
    for parameter in model.module[2].parameters():
        parameter.requires_grad_(True)  # as during a fit, where the first layer is frozen now
    model.weights.follow_flags(model.w.detach())
    model.w.data.add_(1)
    model(torch.ones(1, 64))
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    model.set_scale(0.5)
    model.ready()
    for name, parameter in model.module.named_parameters():
        assert torch.allclose(parameter, before[name], rtol=1e-5, atol=1e-6), name


def test_a_hook_on_w_counts_and_attributes_are_set_on_the_module():
    model = SubspaceModel(net(), 8)
    model.w.register_hook(lambda gradient: 0 * gradient)
    model(torch.ones(3, 64)).sum().backward()
    assert not model.w.grad.any()
    model.module.temperature = 1.0
    model.temperature = 100.0
    assert model.module.temperature == 100.0


def test_a_w_that_is_computed_cannot_be_written_to():
    model = SubspaceModel(net(), 8)
    model.w.data.normal_()
    nn.utils.parametrize.register_parametrization(model, "w", nn.Tanh())
    with pytest.raises(RuntimeError, match="computed by a parametrization"):
        model.set_scale(2.0)
    data = torch.utils.data.TensorDataset(*digits(slice(0, 20)))
    with pytest.raises(RuntimeError, match="computed by a parametrization"):
        generalization_bound(model, data, epochs=0)


def test_data_parallel_is_refused():
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        SubspaceModel(net(), 8)._replicate_for_data_parallel()


def test_weights_that_are_loaded_again_at_their_start_stay_along_w():
    """As by a `setup()` that loads pretrained weights for each stage."""
    model = SubspaceModel(net(), 8)
    model.w.data.add_(0.3)
    output = model(torch.ones(1, 64))
    model.module.load_state_dict(net().state_dict())
    assert torch.equal(model(torch.ones(1, 64)), output)


@slow
def test_the_trainer_of_hugging_face_trains_it(tmp_path):
    """A tiny GPT-2 with gradient checkpointing: the loss falls, a checkpoint has w alone, and training resumes."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    tokens = torch.randint(0, 8, (64, 16), generator=torch.Generator().manual_seed(0))

    def trainer(epochs, **options):
        torch.manual_seed(0)
        model = SubspaceModel(transformers.GPT2LMHeadModel(config), 32, scale=3)
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            num_train_epochs=epochs,
            lr_scheduler_type="constant",
            learning_rate=1e-2,
            save_strategy="epoch",
            logging_strategy="epoch",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        return transformers.Trainer(model, arguments, train_dataset=[{"input_ids": r, "labels": r} for r in tokens])

    whole = trainer(3, gradient_checkpointing=True)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert float(losses[-1]) < float(losses[0]) - 0.3
    saved = tmp_path / "checkpoint-8" / "model.safetensors"
    assert saved.stat().st_size < 2000  # w and what describes D, not the 20,000 weights
    resumed = trainer(3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    assert torch.allclose(resumed.model.w, whole.model.w, atol=1e-6)
