"""Test how models are named, built and started from weights."""

import json
import math
import re
import sys
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

import evaluate
import train
from harness import models
from harness.benchmark.config import parse_eval_config
from harness.benchmark.subjects import expected_images, resampling_warnings
from harness.checkpoints import adapt_state, load_checkpoint, load_weights
from harness.errors import UserError
from harness.training.checks import check_trainable
from mtlat import Normalize
from tests.support.libraries import library
from tests.support.tiny import Wrapped, convnet, image_folder, normed, states_equal

TIMM = "timm:test_resnet"  # 0.5 million weights; timm names weights of it
HALF = [0.5, 0.5, 0.5]  # its mean and standard deviation


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import timm, whose weights are random ones of its own instead of a download."""
    imported = library("timm")
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: None)
    return imported


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return image_folder(tmp_path / "images", side=32)


def options(folder: Path, *more: str) -> list[str]:
    return ["--data", str(folder), "--cache-dir", "cache", "--device", "cpu", *more]


def test_a_model_of_timm_is_trained_and_evaluated(timm: Any, folder: Path) -> None:
    train.main(
        ["--arch", TIMM, *options(folder, "--size", "32", "--epochs", "1", "--batch-size", "12")]
    )
    path = Path("runs/timm-test_resnet-mtlat/last.pt")
    checkpoint = load_checkpoint(path)
    assert checkpoint["arch"] == TIMM and checkpoint["normalize"] == (HALF, HALF)
    model = models.restore_model(checkpoint).eval()
    like = timm.create_model("test_resnet", num_classes=3)
    like.load_state_dict({k[2:]: v for k, v in model.state_dict().items() if k[:2] == "1."})
    x = torch.rand(2, 3, 32, 32)
    assert_close(model(x), like.eval()((x - 0.5) / 0.5))
    evaluate.main([str(path), *options(folder, "--only", "clean", "--output-dir", "out")])
    results = json.loads(Path("out/results.json").read_text())
    share = results["rows"][0]["scores"]["clean"]["accuracy"]
    assert share == checkpoint["log"][-1]["clean_accuracy"]


def test_weights_of_timm_bring_their_images_and_classes(timm: Any, folder: Path) -> None:
    published = models.find_weights(TIMM, "DEFAULT")
    assert (published.size, published.crop, published.resampling) == (160, (168, 160), "bilinear")
    model, normalize = models.create_model(TIMM, None, "DEFAULT")
    assert normalize == (HALF, HALF) and model(torch.rand(2, 3, 32, 32)).shape == (2, 1000)
    models._timm_config.cache_clear()
    random = []
    for _ in range(2):  # what timm's configuration says is known at the second time
        torch.manual_seed(0)
        random.append(models.create_model(TIMM, list("abc"))[0].state_dict())
    assert states_equal(*random)
    tuned, _ = models.create_model(TIMM, list("abc"), "DEFAULT")
    assert tuned(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    config = parse_eval_config([TIMM, "timm:test_vit2", "timm:resnet10t", "--weights", "DEFAULT"])
    assert expected_images(config, {})[TIMM] == (160, (168, 160))
    assert expected_images(config, {})["timm:resnet10t"] == (224, (235, 224))  # of timm's test
    (said,) = [w for w in resampling_warnings(config) if "resnet10t" in w]
    assert "timm:resnet10t expect bicubic resizing" in said
    with pytest.raises(UserError, match=r"timm:test_resnet has 1000 outputs, and .* 3 classes"):
        argv = ["--weights", "DEFAULT", "--size", "32", "--only", "clean"]
        evaluate.main([TIMM, *options(folder / "..", *argv), "--data", str(folder)])


def test_the_head_of_timms_weights_is_new_if_the_classes_differ(
    timm: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, make = timm.create_model("test_resnet"), timm.create_model

    def create(name: str, pretrained: bool = False, **keywords: Any) -> Any:
        assert name == "test_resnet"
        return source if pretrained else make(name, **keywords)

    monkeypatch.setattr(timm, "create_model", create)
    model, _ = models.create_model(TIMM, list("abc"), "DEFAULT")
    state = source.state_dict()
    assert torch.equal(model[1].conv1[0].weight, state["conv1.0.weight"])
    assert model[1].fc.weight.shape[0] == 3
    assert "weights from DEFAULT; new: fc.bias, fc.weight\n" in capsys.readouterr().out


def test_names_that_timm_does_not_have(timm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        "timm:resnet5": r"timm:resnet5: timm has no such classifier; close names: .*resnet50",
        "timm:resnet18.a9_in1k": r"timm has no such classifier; close names: .*resnet18\.a1_in1k",
        "timm:local-dir:/nowhere": "timm cannot create it",
    }
    for arch, message in wrong.items():
        with pytest.raises(UserError, match=message):
            models.build_model(arch, 3)
    with pytest.raises(UserError, match=r"timm's weights are --weights DEFAULT, or .*resnet\.TAG"):
        models.find_weights(TIMM, "V1")
    with pytest.raises(UserError, match="timm has no weights for --arch timm:test_coatnet"):
        models.find_weights("timm:test_coatnet", "DEFAULT")

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("cannot reach the Hub\nmore")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"hf-hub:a/b: timm cannot create it \(cannot .* Hub\)$"):
        models.build_model("timm:hf-hub:a/b", 3)


def test_without_timm_only_its_own_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    models.build_model("squeezenet1_1", 3)
    with pytest.raises(UserError, match=r"^--arch timm:resnet18: run pip install timm"):
        train.main(["--arch", "timm:resnet18", "--size", "16"])
    with pytest.raises(UserError, match=r"^--arch timm:resnet18: run pip install timm"):
        evaluate.main(["timm:resnet18", "--weights", "DEFAULT", "--data", "shapes"])


def test_weights_are_downloaded_only_where_they_are_asked_for(
    timm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def load(*_: Any, **__: Any) -> Any:
        asked.append("torchvision")
        return torchvision.models.squeezenet1_1().state_dict()

    monkeypatch.setattr(
        "timm.models._builder.load_pretrained", lambda *_, **__: asked.append("timm")
    )
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", load)
    models._timm_config.cache_clear()  # of what another test asked for
    for arch, source in ((TIMM, "timm"), ("squeezenet1_1", "torchvision")):
        models.create_model(arch, list("abc"), None)
        models.build_model(arch, 3)
        assert not asked
        models.create_model(arch, list("abc"), "DEFAULT")
        assert asked == [source]
        asked.clear()


def test_logits_are_found_in_objects_tuples_and_lists() -> None:
    network, x, y = convnet(3).eval(), torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    broken = Wrapped(network, lambda z: z * torch.nan)
    assert models.count_correct(broken, iter([(x, torch.zeros_like(y))])) == 0
    expected, correct = network(x).detach(), models.count_correct(network, iter([(x, y)]))
    wraps = (lambda z: SimpleNamespace(logits=z)), (lambda z: (z, x)), (lambda z: [z])
    for wrap in wraps:
        model = Wrapped(network, wrap)
        assert torch.equal(models.check_logits("m", model, x, 3), expected)
        assert models.count_correct(model, iter([(x, y)])) == correct
        with pytest.raises(UserError, match=r"^m returns \(4, 3\); .* must return logits \(4, 5\)"):
            models.check_logits("m", model, x, 5)
    with pytest.raises(UserError, match=r"^m fails on .*: the model returns dict; give logits"):
        models.check_logits("m", Wrapped(network, lambda z: {"out": z}), x, 3)
    models.check_logits("m", training := normed(3), x, 3)
    assert states_equal(training[0].state_dict(), normed(3)[0].state_dict())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_logit_that_is_not_finite_is_refused(value: float) -> None:
    place = torch.zeros(4, 3, dtype=torch.bool)
    place[1, 2] = True
    model = Wrapped(convnet(3).eval(), lambda z: z.masked_fill(place, value))
    with pytest.raises(UserError, match=r"^m returns logits that are not finite$"):
        models.check_logits("m", model, torch.rand(4, 3, 16, 16), 3)


def test_an_image_with_a_nan_logit_is_wrong_whatever_argmax_chooses() -> None:
    nan, inf = math.nan, math.inf
    logits = [[0, 1, -1], [0, nan, 1], [nan, 9, 0], [nan, nan, nan], [0, inf, 1], [-inf, 0, -inf],
              [inf, 9, 0]]  # fmt: skip
    right = models.is_right(torch.tensor(logits), torch.ones(7, dtype=torch.int64))
    assert right.tolist() == [True, False, False, False, True, True, False]


def test_full_memory_is_not_taken_for_a_faulty_network() -> None:
    def fill(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model, x = Wrapped(convnet(3), fill), torch.rand(2, 3, 16, 16)
    with pytest.raises(torch.OutOfMemoryError):
        models.check_logits("m", model, x, 3)
    network = convnet(3)

    def fill_in_the_attack(z: torch.Tensor) -> torch.Tensor:
        attacked = z.requires_grad and not network[0].weight.requires_grad
        return fill(z) if attacked else z

    later = Wrapped(network, fill_in_the_attack)
    assert models.check_logits("m", later, x, 3).shape == (2, 3)
    with pytest.raises(torch.OutOfMemoryError):
        check_trainable("m", later, x, 3, "mtlat")


def in_front(num_classes: int) -> nn.Module:
    return nn.Sequential(Normalize(HALF, HALF), convnet(num_classes))


def test_weights_saved_with_normalize_need_a_function_that_builds_it(tmp_path: Path) -> None:
    saved, path = in_front(3), str(tmp_path / "saved.pt")
    torch.save({f"model.{k}": v for k, v in saved.state_dict().items()}, path)
    message = (
        r"; no name fits, such as model.0.mean: if layers around .* let --arch build them, too$"
    )
    with pytest.raises(UserError, match=message):
        models.create_model("tests.support.tiny:convnet", list("abc"), path)
    loaded, normalize = models.create_model(f"{__name__}:in_front", list("abc"), path)
    assert normalize is None and states_equal(loaded.state_dict(), saved.state_dict())
    torch.save(saved[1].state_dict(), path)
    with pytest.raises(
        UserError, match=r"its 0.bias is .*, and must be missing; no name fits, such as 0.bias"
    ):
        models.create_model(f"{__name__}:in_front", list("abc"), path)


@pytest.mark.parametrize(
    ("key", "advice"),
    [("6.bias", "; .* --imagenet-classes$"), ("6.weight", "$"), ("0.bias", "$")],
)
def test_weights_of_other_outputs_are_told_how_to_name_them(
    tmp_path: Path, key: str, advice: str
) -> None:
    state, path = convnet(3).state_dict(), str(tmp_path / "saved.pt")
    torch.save({**state, key: torch.zeros(8)}, path)
    with pytest.raises(UserError, match=rf"its {key} is \(8,\), and must be \(.*\){advice}"):
        models.create_model("tests.support.tiny:convnet", list("abc"), path, new_head=False)


def test_a_network_called_model_keeps_its_names() -> None:
    own = {"model.weight": torch.zeros(1), "bn.num_batches_tracked": torch.tensor(0)}
    state = {"model.weight": torch.ones(1)}
    assert adapt_state(state, own).keys() == own.keys()
    lightning = {f"model.{key}": value for key, value in own.items()}
    assert adapt_state(lightning, own).keys() == own.keys()
    other = {"model.weight": torch.ones(1), "criterion.weight": torch.ones(1)}
    assert adapt_state(other, {"weight": torch.ones(1)}) == other
    counted = {"bn.num_batches_tracked": torch.tensor(5), "n_averaged": torch.tensor(2)}
    assert adapt_state(counted, dict.fromkeys(counted, torch.tensor(0))) == counted


def test_wrappers_are_removed_unless_the_network_has_their_names() -> None:
    network = nn.Sequential(OrderedDict(module=nn.Linear(2, 2)))
    state = network.state_dict()
    for wrapped in (
        network, nn.DataParallel(network), AveragedModel(network), torch.compile(network),
        torch.compile(nn.DataParallel(network)), nn.DataParallel(torch.compile(network)),
        Wrapped(network, len), Wrapped(Wrapped(torch.compile(nn.DataParallel(network)), len), len),
    ):  # fmt: skip
        assert states_equal(adapt_state(wrapped.state_dict(), state), dict(state))


def test_a_state_dict_is_found_among_what_training_scripts_save(tmp_path: Path) -> None:
    path, first, second = tmp_path / "saved.pt", {"a": torch.ones(1)}, {"a": torch.zeros(1)}
    other = {"args": Namespace(lr=0.1), "optimizer": {"state": {0: {"step": torch.ones(1)}}}}
    for name in ("state_dict", "model", "model_state_dict", "net", "ema"):
        torch.save({**other, name: first}, path)
        assert states_equal(load_weights(path)["model"], first)
    for name in ("state_dict", "model"):  # the weights themselves, and not their average
        torch.save({f"{name}_ema": second, name: first}, path)
        assert states_equal(load_weights(path)["model"], first)
    torch.save({"generator": first, "discriminator": second}, path)
    with pytest.raises(UserError, match=r"nor a state dict: save model\.state_dict"):
        load_weights(path)


@pytest.mark.parametrize("name", ["1", "network.1", "1.network"])
def test_a_network_behind_another_layer_is_not_taken_for_a_wrapped_one(name: str) -> None:
    state = {f"{name}.a.weight": torch.ones(1), f"{name}.b.weight": torch.ones(1)}
    own = {"a.weight": torch.zeros(1), "b.weight": torch.zeros(1)}
    assert adapt_state(state, own) == state
    assert adapt_state(state, dict.fromkeys(state, torch.zeros(1))) == state


def test_a_network_that_returns_an_object_is_trained(folder: Path) -> None:
    train.main(
        ["--arch", "tiny:Dressed", *options(folder, "--epochs", "1", "-b", "8", "--size", "16")]
    )
    assert load_checkpoint("runs/tiny-Dressed-mtlat/last.pt")["log"]


def test_torchvisions_models_have_one_name_in_all_scripts() -> None:
    names = "squeezenet1_1", "torchvision:squeezenet1_1"
    one, other = (models.build_model(name, 3).state_dict().keys() for name in names)
    assert one == other
    with pytest.raises(UserError, match=r"torchvision:resnet5: torchvision has no .* resnet50"):
        models.build_model("torchvision:resnet5", 3)


@pytest.mark.parametrize("arch", ["inception_v3", "googlenet", "densenet121"])
def test_weights_that_torchvision_does_not_load_as_they_are(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare with torchvision's own network, which keeps or renames what is published."""
    torch.manual_seed(0)
    extra = {} if arch == "densenet121" else {"aux_logits": True, "init_weights": False}
    state = torchvision.models.get_model(arch, **extra).state_dict()
    for key in [key for key in state if "denselayer" in key]:  # as published: norm.1, no counters
        value = state.pop(key)
        if not key.endswith("num_batches_tracked"):
            state[re.sub(r"(norm|conv)([12])", r"\1.\2", key)] = value
    monkeypatch.setattr(
        torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: state.copy()
    )
    theirs = torchvision.models.get_model(arch, weights="DEFAULT").eval()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    x = torch.rand(2, 3, 96, 96)
    model, normalize = models.create_model(arch, None, "DEFAULT", new_head=False)
    assert_close(model.eval()(x), theirs((x - mean) / std), rtol=1e-4, atol=1e-5)
    # The logits of random weights hardly depend on the images: what the network sees must agree.
    seen = getattr(theirs, "_transform_input", lambda z: z)((x - mean) / std)
    assert_close(model[0](x), seen)
    before = torch.get_rng_state()
    models.find_weights(arch, "DEFAULT").state()
    assert torch.equal(torch.get_rng_state(), before)
    tuned, _ = models.create_model(arch, list("abc"), "DEFAULT")
    first = next(iter(theirs.state_dict()))
    assert torch.equal(tuned[1].state_dict()[first], state[first])
    assert tuned.train()(x).shape == (2, 3)
    checkpoint = {"arch": arch, "classes": list("abc"), "normalize": normalize}
    restored = models.restore_model({**checkpoint, "model": tuned.state_dict()})
    assert torch.equal(restored.eval()(x), tuned.eval()(x))
