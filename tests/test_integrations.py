"""Run every block of docs/integrations.md, with the library that it is about."""

import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import attacks
import mtlat
from harness.benchmark.attack_registry import load_attack
from harness.checkpoints import save_checkpoint
from harness.models import build_model
from tests.support.libraries import library
from tests.support.method import images, network

PAGE = (Path(mtlat.__file__).parent / "docs" / "integrations.md").read_text()
BLOCKS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", PAGE, re.M | re.S))
TITLES = re.findall(r"^## (.+)$", PAGE, re.M)
TESTED: list[str] = []  # the titles whose blocks the tests run
N, STEPS = 4, 2
pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries

Run = Callable[..., SimpleNamespace]


def runs(*titles: str) -> pytest.MarkDecorator:
    """Let the fixture `run` of a test run the block of each title in turn."""
    TESTED.extend(titles)
    return pytest.mark.parametrize("run", titles, indirect=True)


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs the test's block in a new folder, and returns its names."""
    monkeypatch.chdir(tmp_path)
    title = request.param

    def run(**names: Any) -> SimpleNamespace:
        model = network(N)
        data = TensorDataset(images(0, 8 * STEPS), torch.arange(8 * STEPS) % N)
        names = {
            "torch": torch, "N": N, "model": model, "loader": DataLoader(data, 8), "device": "cpu",
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "original": model, **names,
        }  # fmt: skip
        exec(compile(BLOCKS[title], f"docs/integrations.md: {title}", "exec"), names)
        return SimpleNamespace(**names)

    return run


def check_trained(model: nn.Module) -> None:
    """Check that `model` was trained, and that the attacks did not move its BatchNorm."""
    for (name, new), old in zip(model.named_parameters(), network(N).parameters(), strict=True):
        assert new.isfinite().all() and not torch.equal(new, old), name
    assert model[1].num_batches_tracked == 2 * STEPS


def test_every_block_is_tested() -> None:
    assert list(BLOCKS) == TITLES
    assert set(TESTED) == set(TITLES)


@runs(
    "Gradient accumulation", "Less memory",
    "Mixed precision with a gradient scaler, and gradient clipping",
)  # fmt: skip
def test_plain_loops(run: Run) -> None:
    check_trained(run().model)


@runs("Exponential moving average of the weights")
def test_an_average_of_the_weights(run: Run) -> None:
    made = run()
    check_trained(made.model)
    assert made.ema.module[1].running_mean.abs().sum() > 0
    assert not torch.equal(made.ema.module[1].running_mean, made.model[1].running_mean)


@runs("torch.compile")
def test_a_compiled_model_has_two_graphs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, compile_model = [], torch.compile

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model: compile_model(model, backend=backend))
    torch._dynamo.reset()
    check_trained(run().model)
    assert len(graphs) == 2


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@runs("DistributedDataParallel")
def test_distributed_data_parallel(run: Run) -> None:
    check_trained(run().model)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("attack", ["targeted_fgsm", "pgd", "cw2", "an error"])
def test_an_attack_leaves_the_weights_of_fully_shard_trainable(attack: str) -> None:
    model, x, y = network(4), images(0, 6), torch.arange(6) % 4
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    if attack == "targeted_fgsm":
        mtlat.targeted_fgsm(model, x, y, 0.1)
    elif attack == "an error":
        with pytest.raises(RuntimeError):
            mtlat.targeted_fgsm(model, x[:, :2], y, 0.1)
    else:  # the last forward pass has no backward pass
        more = {"restarts": 2} if attack == "pgd" else {}
        getattr(attacks, attack)(model, x, y, steps=3, **more)
    assert all(p.requires_grad for p in model.parameters())
    nn.functional.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None for p in model.parameters())


@runs("Accelerate")
def test_accelerate(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = library("accelerate")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerate.state.AcceleratorState._reset_state(True)
    check_trained(run().original)
    accelerate.state.AcceleratorState._reset_state(True)


@runs("Lightning Fabric")
def test_fabric(run: Run) -> None:
    library("lightning")
    made = run()
    check_trained(made.original)
    x, y = images(0, 8), torch.arange(8) % N
    losses = []
    for precision in ("bf16-true", "bf16-mixed", "32-true"):
        fabric = made.Fabric(accelerator="cpu", devices=1, precision=precision)
        generator = torch.Generator().manual_seed(0)
        loss = mtlat.mtlat_loss(fabric.setup(network(N)), x, y, num_classes=N, generator=generator)
        losses.append(loss.item())
    assert len(set(losses)) == 3  # each has its precision
    assert_close(losses, [losses[2]] * 3, rtol=0.02, atol=0)


@runs("Lightning")
def test_lightning(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    library("lightning")
    weak_pgd = partial(attacks.pgd, epsilon=0.01, random_start=False)
    monkeypatch.setattr(attacks, "pgd", weak_pgd)
    made = run()
    check_trained(made.original)
    x, y = images(0, 8 * STEPS), torch.arange(8 * STEPS) % N
    model = made.original.eval()
    clean, robust = ((model(z).argmax(1) == y).float().mean() for z in (x, weak_pgd(model, x, y)))
    assert 0 < robust < clean
    assert made.trainer.callback_metrics["val_pgd"] == robust
    with torch.inference_mode(), pytest.raises(TypeError, match="no inference_mode"):
        mtlat.targeted_fgsm(network(N), images(0, 2), torch.tensor([0, 1]), 0.1)


def gradients_of_sgd(monkeypatch: pytest.MonkeyPatch) -> list[dict[Tensor, Tensor]]:
    """Return a list that gets the gradients of each step of SGD, by parameter."""
    steps: list[dict[Tensor, Tensor]] = []
    step = torch.optim.SGD.step

    def recorded(self: torch.optim.SGD, *args: Any) -> Any:
        steps.append({p: p.grad.clone() for g in self.param_groups for p in g["params"]})
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    return steps


@runs("Hugging Face Trainer")
@pytest.mark.parametrize("case", ["in Sequential", "divides", "does not divide"])
def test_hugging_face(run: Run, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Check the gradient of two accumulated minibatches against that of their mean loss."""
    transformers = library("transformers")
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        image_size=8, patch_size=4, num_labels=N, hidden_dropout_prob=0.0,
    ))  # fmt: skip
    title, steps = "Hugging Face Trainer", gradients_of_sgd(monkeypatch)
    if case != "in Sequential":
        flag = "trainer.model_accepts_loss_kwargs = False\n" if case == "divides" else ""
        block = BLOCKS[title].replace("nn.Sequential(Normalize(mean, std), network)", "network")
        monkeypatch.setitem(
            BLOCKS, title, block.replace("trainer.train()", flag + "trainer.train()")
        )
    x, y = images(0, 8 * STEPS), torch.arange(8 * STEPS) % N
    losses: list[Tensor] = []

    def loss(model: nn.Module, x: Tensor, y: Tensor, *, num_classes: int) -> Tensor:
        assert mtlat_loss(model, x, y, num_classes=num_classes).isfinite()
        losses.append(mtlat.cross_entropy(model(x), y))
        return losses[-1]

    mtlat_loss = mtlat.mtlat_loss
    monkeypatch.setattr(mtlat, "mtlat_loss", loss)
    made = run(
        network=vit, mean=[0.5] * 3, std=[0.25] * 3, output_dir="out",
        dataset=[{"pixel_values": x[i], "labels": y[i]} for i in range(len(x))],
        options={
            "per_device_train_batch_size": 8, "optim": "sgd", "max_grad_norm": 0.0, "use_cpu": True,
            "report_to": "none", "num_train_epochs": 1, "save_strategy": "no",
            "disable_tqdm": True, "learning_rate": 0.0,
        },
    )  # fmt: skip
    made.model.zero_grad()
    mtlat.cross_entropy(made.model(x), y).backward()
    assert len(losses) == 2 and len(steps) == 1
    for parameter, gradient in steps[0].items():
        assert_close(gradient, parameter.grad * (2 if case == "does not divide" else 1))
    scores = made.trainer.evaluate([{"pixel_values": x[0], "labels": y[0]}])
    assert scores["eval_loss"] > 0 and len(losses) == 2


@runs("timm")
def test_timm(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    library("timm")
    monkeypatch.setitem(BLOCKS, "timm", BLOCKS["timm"].replace("resnet18", "test_resnet"))
    data = TensorDataset((255 * images(0, 16)).byte(), torch.arange(16) % N)
    made = run(loader=DataLoader(data, 8))
    assert made.network.bn1.num_batches_tracked == 2 * STEPS
    assert not torch.equal(made.network.fc.weight, made.ema.module[1].fc.weight)
    assert set(made.ema.module.state_dict()) == set(made.model.state_dict())
    image = made.transform(Image.new("RGB", (300, 300), (255, 9, 0)))
    assert image.dtype == torch.uint8 and image.shape == (3, 160, 160) and image.max() > 99


@runs("Attacks of other libraries")
@pytest.mark.parametrize("name", ["autoattack", "foolbox", "torchattacks"])
def test_attacks_of_other_libraries(run: Run, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library(name)
    made = run()
    Path("others.py").write_text(BLOCKS["Attacks of other libraries"])
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.delitem(sys.modules, "others", raising=False)
    x, y = images(0, 6), made.model(images(0, 6)).argmax(1)
    x_adv = load_attack(name, f"others:{name}", 0).function(made.model, x, y)
    assert 0.03 < (x_adv - x).abs().max() < 0.0401
    moved = (x_adv - x).abs().flatten(1).mean(1)
    assert moved.max() > 0.03  # to the end of the ball, and not by a third of it
    assert (made.model.eval()(x_adv).argmax(1) == y).sum() < 6


@runs("Loading last.pt elsewhere")
@pytest.mark.parametrize("normalize", [None, ([0.4] * 3, [0.2] * 3)])
def test_a_checkpoint_is_loaded_elsewhere(run: Run, normalize: Any) -> None:
    model = build_model("squeezenet1_1", N, normalize).eval()
    save_checkpoint(
        [Path("last.pt")], model=model.state_dict(), arch="squeezenet1_1", size=64,
        classes=list("abcd"), normalize=normalize,
    )  # fmt: skip
    made = run()
    x = torch.rand(2, 3, 64, 64)
    assert_close(made.model(x), model(x), rtol=0, atol=0)
