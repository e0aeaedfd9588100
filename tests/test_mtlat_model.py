"""Test the method's side effects on the model, its numerical limits, and invalid input.

As in test_mtlat.py, Hypothesis draws every argument of these tests.
"""

import math
import warnings
from types import SimpleNamespace

import numpy
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close
from torchvision.transforms import v2

import attacks
import mtlat
from tests.support.method import batches, images, network, seeded, seeds, soft_labels
from tests.support.tiny import Wrapped, states_equal

# ---------------------------------------------------------------- side effects


class Recorder(nn.Module):
    """A network that records its state at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network(4)
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        weights = any(p.requires_grad for p in self.parameters())
        self.calls.append((weights, self.training))
        return self.body(x)


def test_the_attack_leaves_the_model_alone():
    model = Recorder()
    model.body[0].bias.requires_grad_(False)
    model.body[4].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
    frozen = [p.requires_grad for p in model.parameters()]
    marker = torch.ones_like(model.body[4].bias)
    model.body[4].bias.grad = marker.clone()
    x, target = images(0, 5), torch.tensor([0, 1, 2, 3, 0])
    with torch.no_grad():
        quiet = mtlat.targeted_fgsm(model, x, target, 0.1, steps=2)
    loud = mtlat.targeted_fgsm(model, x, target, 0.1, steps=2)
    assert_close(quiet, loud, rtol=0, atol=0)
    assert model.calls == [(False, True)] * 4  # no weight requires a gradient; the mode is kept
    assert [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert_close(model.body[4].bias.grad, marker, rtol=0, atol=0)
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    with pytest.raises(RuntimeError):
        mtlat.targeted_fgsm(model, images(0, 5)[:, :2], target, 0.1)
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert model.body[1].track_running_stats


def test_draws_do_not_depend_on_the_default_dtype():
    x, y, model = images(0, 6), torch.tensor([0, 1, 2, 3, 0, 1]), network(4)

    def compute() -> tuple[Tensor, ...]:
        generator = seeded(3)
        draws = mtlat.draw(6, 4, alpha=0.4, epsilon_max=0.1, generator=generator)
        loss = mtlat.mtlat_loss(model, x, y, num_classes=4, generator=generator)
        return *draws, loss.detach()

    wanted, usual = compute(), torch.get_default_dtype()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        torch.set_default_dtype(dtype)
        try:
            found = compute()
        finally:
            torch.set_default_dtype(usual)
        assert_close(found, wanted, rtol=0, atol=0)


def test_the_attack_uses_the_mode_of_the_caller():
    model, x, target = network(4), images(0, 6), torch.tensor([0, 1, 2, 3, 0, 1])
    model[1].running_mean.fill_(0.7)
    model[1].running_var.fill_(9.0)
    seen = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output.mean().item()))
    mtlat.targeted_fgsm(model, x, target, 0.1)
    mtlat.targeted_fgsm(model.eval(), x, target, 0.1)
    assert abs(seen[0]) < 1e-5 < 0.05 < abs(seen[1])


def test_the_losses_move_batchnorm_twice_and_reach_every_weight():
    model = network(4)
    mtlat.mtlat_loss(model, images(0, 5), torch.tensor([0, 1, 2, 3, 0]), num_classes=4).backward()
    assert model[1].num_batches_tracked == 2
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_model_may_return_an_object_with_logits_or_a_sequence():
    x, y = images(0, 5), torch.tensor([0, 1, 2, 3, 0])

    def loss(model):
        return mtlat.mtlat_loss(model, x, y, num_classes=4, generator=seeded(1))

    expected = loss(network(4))
    for pack in (lambda z: SimpleNamespace(logits=z), lambda z: (z, x), lambda z: [z]):
        model = Wrapped(network(4), pack)
        assert_close(loss(model), expected, rtol=0, atol=0)
        assert model.network[1].num_batches_tracked == 2
    for pack, made in ((lambda z: {"out": z}, "dict"), (lambda z: (), "tuple"), (str, "str")):
        with pytest.raises(TypeError, match=rf"the model returns {made}; give logits \(5, N\)"):
            loss(Wrapped(network(4), pack))


class Guarded(nn.Module):
    """Raise in the backward passes of others, as Lightning Fabric does in mixed precision."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.own = body, False

    def forward(self, x: Tensor) -> Tensor:
        output = self.body(x)
        self._register_backward_hook(output)
        return output

    def _register_backward_hook(self, output: Tensor) -> None:
        output.register_hook(self.check)

    def check(self, gradient: Tensor) -> None:
        if not self.own:
            raise RuntimeError("call fabric.backward")


def test_the_attack_passes_the_guard_of_lightning_fabric():
    x, y, guarded = images(0, 5), torch.tensor([0, 1, 2, 3, 0]), Guarded(network(4))
    loss, expected = (
        mtlat.mtlat_loss(model, x, y, num_classes=4, generator=seeded(1))
        for model in (guarded, network(4))
    )
    assert_close(loss, expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"call fabric\.backward"):
        loss.backward(retain_graph=True)
    guarded.own = True
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in guarded.parameters())
    guarded._register_backward_hook = own = lambda output: output  # of the model, not of its class
    mtlat.targeted_fgsm(guarded, x, y, 0.1)
    assert guarded._register_backward_hook is own


def test_a_function_must_not_hide_what_the_attack_freezes():
    """Check that a model inside a function does not train differently without a word."""
    x, y, model = images(0, 5), torch.tensor([0, 1, 2, 3, 0]), network(4)

    def loss(model):
        return mtlat.mtlat_loss(model, x, y, num_classes=4, generator=seeded(1))

    with pytest.raises(TypeError, match=r"function that hides BatchNorm2d.*give an nn\.Module"):
        loss(lambda z: model(z))
    for harmless in (model.eval(), network(4, norm=False).train()):
        assert_close(loss(lambda z, net=harmless: net(z)), loss(harmless), rtol=0, atol=0)
    model.train()(x)  # the refusal ends with the attack


@given(seeds, batches)
def test_inputs_are_untouched_and_x_adv_is_a_constant(seed, batch):
    x = images(seed, batch).requires_grad_()
    y, target = soft_labels(seed, batch, 4), torch.zeros(batch, dtype=torch.int64)
    copies, versions = (x.clone(), y.clone()), (x._version, y._version)
    x_adv = mtlat.targeted_fgsm(network(4), x, target, 0.1)
    y_adv = mtlat.target_labels(y, target, 0.1)
    assert not x_adv.requires_grad and x.grad is None
    mtlat.mtlat_loss(network(4), x.detach(), y, num_classes=4)
    assert (x._version, y._version) == versions
    assert_close((x, y), copies, rtol=0, atol=0)
    assert x_adv.data_ptr() != x.data_ptr() and y_adv.data_ptr() != y.data_ptr()


# ---------------------------------------------------------------- numerics


def test_attack_loss_has_the_direction_of_cross_entropy_and_survives_confidence():
    z = 5 * torch.randn(64, 5, generator=seeded(0), dtype=torch.float64)
    y = torch.arange(64) % 5
    one_hot = torch.eye(5, dtype=torch.float64)[y]
    soft = soft_labels(0, 64, 5, torch.float64)
    both = torch.cat([one_hot[:32], soft[32:]])
    logits = z.requires_grad_()
    for labels, exact in ((y, one_hot), (one_hot, one_hot), (soft, soft), (both, both)):
        (gradient,) = torch.autograd.grad(mtlat.attack_loss(logits, labels), logits)
        expected = z.detach().softmax(1) - exact  # the gradient of cross-entropy
        assert_close(gradient / gradient.norm(), expected / expected.norm())
    (gradient,) = torch.autograd.grad(mtlat.log_odds_against(logits, y).sum(), logits)
    expected = z.detach().softmax(1) - one_hot
    assert_close(gradient, expected / expected[one_hot == 1, None].abs())
    model = network(4, norm=False)
    with torch.no_grad():
        for weight in model[4].parameters():
            weight.mul_(3000)
    x = images(0, 16)
    y = model(x).argmax(1)  # so certain that float32 cross-entropy has no gradient
    x.requires_grad_()
    lost = torch.autograd.grad(nn.functional.cross_entropy(model(x), y, reduction="sum"), x)[0]
    assert (lost.flatten(1) == 0).all(1).sum() > 8
    for target in (y, torch.eye(4)[y]):
        x_adv = mtlat.targeted_fgsm(model, x.detach(), target, 0.1)
        assert ((x_adv - x).abs() > 0.09).float().mean() > 0.99


def test_the_loss_is_float32_or_wider_and_its_gradients_are_finite():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = network(4).to(dtype)
        x, y = images(0, 5, torch.float64).to(dtype), torch.tensor([0, 1, 2, 3, 0])
        loss = mtlat.mtlat_loss(model, x, y, num_classes=4, generator=seeded(0))
        loss.backward()
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_soft_labels_in_half_precision_are_mixed_in_float32():
    """Their sums round to 1 before they are mixed, and not after."""
    model, x = network(10), images(0, 32)
    hard = nn.functional.one_hot(torch.arange(32) % 10, 10)
    for soft in (0.9 * hard + 0.01, 0.7 * hard + 0.3 * hard.roll(1, 0)):
        wanted = mtlat.mtlat_loss(model, x, soft, num_classes=10, generator=seeded(0))
        for dtype in (torch.bfloat16, torch.float16):
            found = mtlat.mtlat_loss(model, x, soft.to(dtype), num_classes=10, generator=seeded(0))
            assert_close(found, wanted, rtol=0, atol=0.02)


def test_autocast_gives_nearly_the_same_gradient():
    gradients = []
    x, y = images(0, 32), torch.arange(32) % 4
    for enabled in (False, True):
        model = network(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = mtlat.mtlat_loss(model, x, y, num_classes=4, generator=seeded(0))
        loss.backward()
        assert loss.dtype == torch.float32
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98
    assert not torch.equal(*gradients)


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_a_compiled_model_gives_the_same_and_is_compiled_for_attack_and_loss_only():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(network(4), backend=backend, fullgraph=True)
    x, y = images(0, 6), torch.arange(6) % 4
    plain, losses = network(4), []
    for step in range(3):
        losses.append(mtlat.mtlat_loss(compiled, x, y, num_classes=4, generator=seeded(step)))
        expected = mtlat.mtlat_loss(plain, x, y, num_classes=4, generator=seeded(step))
        assert_close(losses[-1], expected)
        losses[-1].backward()
    assert len(graphs) == 2
    torch._dynamo.reset()


# ---------------------------------------------------------------- invalid input


def test_bad_input_names_the_value_the_rule_and_the_fix():
    x, y, model = images(0, 4), torch.tensor([0, 1, 2, 3]), network(4)
    soft = soft_labels(0, 4, 4)
    knobs = {"alpha": 0.4, "epsilon_max": 0.1}

    def loss(x=x, y=y, **options):
        return mtlat.mtlat_loss(model, x, y, **{"num_classes": 4, **options})

    cases = [
        (
            lambda: loss(x * 2 - 1),
            ValueError,
            r"pixels: -0\.\d+ to 0\.\d+; rule: \[0, 1\].*Normalize",
        ),
        (lambda: loss(x * 255), ValueError, "pixels: .* to 25.*divide by 255, or put"),
        (lambda: loss(x * math.nan), ValueError, "pixels: nan to nan"),
        (lambda: loss((x * 255).byte()), TypeError, r"torch\.uint8.*x\.float\(\) / 255"),
        (lambda: loss(y=y - 1), ValueError, r"class indices: -1 to 2; rule: \[0, 3\]"),
        (lambda: loss(y=y + 1), ValueError, r"class indices: 1 to 4; rule: \[0, 3\]"),
        (lambda: loss(y=y.int()), TypeError, r"torch\.int32; give int64"),
        (
            lambda: loss(y=torch.eye(4).long()),
            TypeError,
            r"torch\.int64; give int64 indices \(B,\), or float \(B, N\)",
        ),
        (
            lambda: loss(y=y[:3]),
            ValueError,
            r"labels have shape \(3,\); .* need \(4,\) or \(4, 4\)",
        ),
        (lambda: loss(y=soft[:, :3]), ValueError, r"shape \(4, 3\)"),
        (lambda: loss(y=soft * 0.9), ValueError, "sums of labels: 0.9 to 0.9"),
        (lambda: loss(y=soft * 4 - 0.75), ValueError, "label weights: .*not logits"),
        (lambda: loss(alpha=0), ValueError, "alpha is 0"),
        (lambda: loss(alpha=math.nan), ValueError, "alpha is nan"),
        (lambda: loss(epsilon_max=8), ValueError, r"epsilon_max is 8; it must lie in \[0, 1\]"),
        (lambda: loss(epsilon_max=-0.1), ValueError, "epsilon_max is -0.1"),
        (lambda: loss(num_classes=1), ValueError, "4 images, 1 classes"),
        (lambda: loss(num_classes=3), ValueError, "class indices: 0 to 3"),
        (lambda: loss(steps=0), ValueError, "steps is 0"),
        (lambda: loss(step=2), TypeError, "unexpected keyword argument 'step'"),
        (
            lambda: mtlat.mixup(x, y, x, y, 0.5),
            ValueError,
            r"need \(4, N\).*Indices become F\.one_hot\(y, N\)",
        ),
        (lambda: mtlat.mixup(x, soft, x, soft[:, :3], 0.5), ValueError, r"shape \(4, 3\)"),
        (
            lambda: mtlat.mixup(x, soft, x[:3], soft, 0.5),
            ValueError,
            r"images \(4, 3, 8, 8\) do not match \(3, 3, 8, 8\)",
        ),
        (lambda: mtlat.mixup(x, soft, x, soft, 1.5), ValueError, "lam: 1.5 to 1.5"),
        (lambda: mtlat.mixup(x, soft, x, soft, torch.rand(3)), ValueError, r"lam has shape \(3,\)"),
        (lambda: mtlat.target_labels(soft, y, -0.1), ValueError, "epsilon: -0.1"),
        (
            lambda: mtlat.targeted_fgsm(model, x, y, torch.rand(4, 1)),
            ValueError,
            "epsilon has shape",
        ),
        (lambda: mtlat.draw(0, 4, **knobs), ValueError, "0 images, 4 classes"),
        (lambda: mtlat.draw(4, 1, **knobs), ValueError, "4 images, 1 classes"),
        (
            lambda: mtlat.cross_entropy(soft, y + 1),
            ValueError,
            r"class indices: 1 to 4; rule: \[0, 3\]",
        ),
        (
            lambda: mtlat.cross_entropy(soft, 1.5 * torch.eye(4)),
            ValueError,
            "label weights: 0 to 1.5",
        ),
        (
            lambda: mtlat.target_labels(soft, y[:, None], 0.1),
            ValueError,
            r"labels have shape \(4, 1\); .* need \(4,\) or \(4, 4\)",
        ),
        (lambda: mtlat.Normalize([1.001], [0.5]), ValueError, "divide by 255"),
        (lambda: mtlat.Normalize([-0.001], [0.5]), ValueError, "divide by 255"),
        (lambda: mtlat.Normalize([0.5], [0.0]), ValueError, "every std > 0"),
        (lambda: mtlat.Normalize([0.5, 0.5], [1.0]), ValueError, "one of each per channel"),
    ]
    arguments = x, y, soft, *model.parameters()
    before = [t.clone() for t in arguments]
    for call, error, pattern in cases:
        with pytest.raises(error, match=pattern) as raised:
            call()
        assert raised.type is error and "\n" not in str(raised.value)
    assert all(map(torch.equal, before, arguments))


def test_images_that_no_gradient_reaches_are_named():
    """A backbone under no_grad is a frequent way to train the head alone."""

    class Model(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.how, self.backbone, self.head = how, nn.Linear(192, 8), nn.Linear(8, 4)

        def forward(self, x):
            with torch.set_grad_enabled(self.how != "no_grad"):
                z = self.backbone(x.flatten(1))
            return self.head(z.detach() if self.how == "detach" else z)

    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    for how in ("no_grad", "detach", "inference_mode"):
        for model in (Model(how), Model(how).forward):  # of a function, weights are not frozen
            inference = torch.inference_mode(how == "inference_mode")
            with inference, pytest.raises(TypeError, match="no gradient reaches the images"):
                mtlat.mtlat_loss(model, x, y, num_classes=4)


class Preparing(nn.Module):
    """A network that normalizes its input, in place and without a gradient if asked to."""

    def __init__(self, in_place):
        super().__init__()
        torch.manual_seed(0)
        self.in_place, self.head = in_place, nn.Sequential(nn.Flatten(), nn.Linear(192, 4))

    def forward(self, x):
        if not self.in_place:
            return self.head((x - 0.4) / 0.2)
        with torch.no_grad():
            x.sub_(0.4).div_(0.2)
        return self.head(x)


def test_a_model_that_changes_its_input_changes_no_image():
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    kept, found = x.clone(), []
    for in_place in (False, True):
        model = Preparing(in_place)
        found.append([
            mtlat.mtlat_loss(model, x.clone(), y, num_classes=4, generator=seeded(1), steps=2),
            mtlat.targeted_fgsm(model, x, y, 0.02, steps=3),
            attacks.pgd(model, x, y, restarts=2, generator=seeded(1)), attacks.mi_fgsm(model, x, y),
        ])  # fmt: skip
        assert torch.equal(x, kept)
    # The gradient is of the prepared pixels, which are a fifth apart: its signs are the same.
    assert all(map(torch.equal, *found))


def test_the_attack_leaves_instancenorms_statistics_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True),
                          nn.Flatten(), nn.Linear(144, 4))  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mtlat.targeted_fgsm(model, torch.rand(4, 3, 8, 8), torch.arange(4), 0.1)
    assert states_equal(model.state_dict(), before)
    model(torch.rand(4, 3, 8, 8))
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


def test_a_batchnorm_may_be_the_node_of_a_tree():
    class Node(nn.BatchNorm2d):
        is_leaf = False  # a name that tensors have, too

    model = nn.Sequential(Node(3), nn.Flatten(), nn.Linear(192, 4))
    mtlat.targeted_fgsm(model, torch.rand(4, 3, 8, 8), torch.arange(4), 0.1)
    assert torch.equal(model[0].running_mean, torch.zeros(3))


def test_computed_weights_get_the_gradients_of_the_weights():
    """Check weights that are no leaves, as in meta-learning."""

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))

        def forward(self, x, y):
            generator = torch.Generator().manual_seed(0)
            return mtlat.mtlat_loss(self.model, x, y, num_classes=4, generator=generator)

    step, given = Step(), (torch.rand(4, 3, 8, 8), torch.arange(4))
    step(*given).backward()
    wanted = [p.grad.clone() for p in step.parameters()]
    step.zero_grad()
    functional_call(step, {k: 1 * p for k, p in step.named_parameters()}, given).backward()
    for p, gradient in zip(step.parameters(), wanted, strict=True):
        assert torch.equal(p.grad, gradient) and p.requires_grad


def test_rounding_passes_and_more_does_not():
    for value in (-0.0005, 1.0005):
        mtlat.check_values("shares", torch.tensor([0.5, value]), 0, 1, "clamp them")
    for value in (-0.0015, 1.0015):
        with pytest.raises(ValueError, match=r"shares: .*rule: \[0, 1\]; fix: clamp them"):
            mtlat.check_values("shares", torch.tensor([0.5, value]), 0, 1, "clamp them")


def test_normalize():
    normalize = mtlat.Normalize([0.0, 0.2, 1.0], [0.5, 1.0, 2.0])
    x = images(0, 2)
    expected = v2.functional.normalize(x, [0.0, 0.2, 1.0], [0.5, 1.0, 2.0])
    assert_close(normalize(x), expected)
    assert set(normalize.state_dict()) == {"mean", "std"}
    halves = numpy.array([0.0, 0.5, 1.0])
    for numbers in (halves, list(halves), (0, 0, 1)):
        state = mtlat.Normalize(numbers, [1, 1, 2]).state_dict()
        assert {value.dtype for value in state.values()} == {torch.float32}


class OfTheHead(nn.Module):
    """A network whose `parameters`, for the optimizer, are those of its last layer."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(192, 8), nn.Linear(8, 4)

    def parameters(self):
        return self.head.parameters()

    def forward(self, x):
        return self.head(self.body(x.flatten(1)).relu())


def test_a_model_may_override_parameters():
    model, x, y = OfTheHead(), images(0, 5), torch.arange(5) % 4
    seen = []
    model.body.register_forward_hook(lambda m, *_: seen.append(m.weight.requires_grad))
    mtlat.mtlat_loss(model, x, y, num_classes=4).backward()
    assert seen == [True, False, True] and model.body.weight.grad is not None


class Changing(nn.Module):
    """A network that registers a weight without a value, sets it, and drops another."""

    def __init__(self):
        super().__init__()
        self.body, self.dropped = nn.Linear(192, 4), nn.Parameter(torch.ones(4))
        self.register_parameter("scale", None)

    def forward(self, x):
        self.dropped = None
        if self.scale is None:
            self.scale = nn.Parameter(torch.ones(4))
        return self.scale * self.body(x.flatten(1))


def test_weights_may_come_and_go_and_a_script_may_be_attacked():
    x, y = images(0, 5), torch.arange(5) % 4
    with warnings.catch_warnings(action="ignore"):  # that torch.jit.script is old
        script = torch.jit.script(network(4).eval())
    for model in (Changing(), script):
        x_adv = attacks.pgd(model, x, y, steps=2)
        assert x_adv.shape == x.shape and not torch.equal(x_adv, x)
        assert all(p.requires_grad for p in model.parameters())
