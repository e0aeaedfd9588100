"""Test that several processes train and evaluate like one, and what happens when one dies."""

import copy
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import evaluate
import train
from attacks import pgd
from harness import checkpoints, distributed, errors
from harness.benchmark.config import parse_eval_config
from harness.training.config import parse_train_config
from harness.training.methods import METHODS
from mtlat import frozen, mtlat_loss
from tests.support.processes import SERVER, Job, environment, open_store, start_server
from tests.support.tiny import image_folder, normed, states_equal

ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def jobs() -> Iterator[dict[int, Job]]:
    """Start jobs of two, three and four processes."""
    made = {world: Job(world) for world in (2, 3, 4)}
    yield made
    for job in made.values():
        job.end()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images") / "set"
    image_folder(root / "train", each=11)
    image_folder(root / "val", each=10)
    return root


# ---------------------------------------------------------------- training


def arguments(folder: Path, out: Path, *flags: str) -> list[str]:
    """Return flags for a training on 33 images, in steps of 22 or 11, with two test batches."""
    return [
        "--data", str(folder), "--size", "12", "--batch-size", "22", "--device", "cpu",
        "--cache-dir", str(folder.parent / "cache"), "--output-dir", str(out), *flags,
    ]  # fmt: skip


def trained(out: Path) -> dict[str, Any]:
    return checkpoints.load_checkpoint(out / "last.pt")


@pytest.mark.parametrize("method", [
    *METHODS, "mtlat --mix-at input 2 4 --augment flip-crop --clip-grad 0.1 --ema 0.7",
])  # fmt: skip
def test_many_processes_train_what_one_trains(jobs, folder, tmp_path, method):
    """Check that the weights agree up to rounding in float64.

    The images of a batch do not affect each other in this network, so that only the order of sums
    differs. SGD adds gradients as they are. Adam divides them by their own size, and thereby
    enlarges the rounding of small ones, and hides a common factor.
    """
    flags = (
        "--method",
        *method.split(),
        "--arch",
        "tiny:smooth",
        "--opt",
        "sgd",
        "--epochs",
        "2",
        "--lr",
        "0.03",
    )
    train.main(arguments(folder, tmp_path / "one", *flags))
    one = trained(tmp_path / "one")
    for world, job in jobs.items():
        out = tmp_path / f"{world}"
        assert job(train.main, arguments(folder, out, *flags)) == [None] * world
        several = trained(out)
        assert one["model"]["1.weight"].dtype == torch.float64
        assert_close(several["model"], one["model"], rtol=0, atol=1e-12)
        assert several["optimizer"]["state"].keys() == one["optimizer"]["state"].keys()
        for ours, theirs in zip(several["log"], one["log"], strict=True):
            assert ours["loss1"] == pytest.approx(theirs["loss1"], abs=1e-6)  # summed in float32
            assert ours["clean_accuracy"] == theirs["clean_accuracy"]
        assert several["settings"]["processes"] == world


def sizes_tested(argv: list[str]) -> list[int]:
    """Train; return how many images each minibatch had that this process has tested."""
    sizes, count_correct = [], train.count_correct

    def count(model: nn.Module, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> int:
        kept = list(batches)
        sizes.extend(len(y) for _, y in kept)
        return count_correct(model, iter(kept))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "count_correct", count)
        train.main(argv)
    return sizes


def test_each_process_tests_its_share_of_a_batch(jobs, folder, tmp_path):
    """Check 30 test images in batches of 22: one process alone, and four of which none is idle."""
    flags = "--arch", "tiny:linear", "--epochs", "1"
    assert sizes_tested(arguments(folder, tmp_path / "one", *flags)) == [22, 8]
    found = jobs[4](sizes_tested, arguments(folder, tmp_path / "four", *flags))
    assert found == [[5, 5], [5, 5], [5], [5]]


def observe_dropout(argv: list[str]) -> tuple[int, list[list[float]]]:
    """Train two steps. Return the seed of the epoch, and each step's factors of dropout."""
    factors = []

    def forward(module: nn.Dropout, x: torch.Tensor) -> torch.Tensor:
        drawn = F.dropout(torch.ones_like(x), module.p, module.training)
        if module.training:
            factors.append(drawn.flatten().tolist())
        return x * drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Dropout, "forward", forward)
        train.main(argv)
    return torch.initial_seed(), factors[-2:]  # before them, the logits are checked


def test_each_process_has_dropout_of_its_own(jobs, folder, tmp_path):
    """Check two steps, in each of which every process has four images of 24 features."""
    flags = "--arch", "tiny:convnet", "--epochs", "1", "--method", "standard", "-b", "16"
    seed, _ = observe_dropout(arguments(folder, tmp_path / "one", *flags))
    found = jobs[4](observe_dropout, arguments(folder, tmp_path / "four", *flags))
    seeds, factors = zip(*found, strict=True)
    assert seeds[0] == seed and len(set(seeds)) == 4
    drawn = [step for process in factors for step in process]
    assert [len(step) for step in drawn] == [4 * 24] * 8
    assert all(set(step) == {0, 1.25} for step in drawn)
    assert len(set(map(tuple, drawn))) == 8


@pytest.mark.parametrize("more", [[], ["--ema", "0"]])
def test_the_checkpoint_holds_the_mean_of_the_running_statistics(jobs, folder, tmp_path, more):
    """Check two equal shards, where the average of the shard means is the mean of all images."""
    flags = (
        "--arch",
        "tiny:normed",
        "--epochs",
        "1",
        "--method",
        "standard",
        "-b",
        "24",
        *more,
    )
    train.main(arguments(folder, tmp_path / "one", *flags))
    jobs[2](train.main, arguments(folder, tmp_path / "two", *flags))
    one, two = (trained(tmp_path / out)["model"] for out in ("one", "two"))
    assert one["0.running_mean"].abs().min() > 0.01
    assert_close(two["0.running_mean"], one["0.running_mean"])
    assert not torch.equal(two["0.running_var"], one["0.running_var"])  # of one shard


def step_of_unequal_ranks(
    used: list[dict[int, float]],
) -> tuple[list[float | None], list[float]]:
    """Take a step in which each rank uses some of four weights: by their number, the gradients.

    Returns the gradients and the weights.
    """
    model = nn.ParameterList(torch.ones(1) for _ in range(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=1)
    sum(value * model[i].sum() for i, value in used[distributed.rank()].items()).backward()
    parts = {"model": model, "optimizer": optimizer, "average": None,
             "scaler": torch.amp.GradScaler("cpu", enabled=False)}  # fmt: skip
    train.update_weights(SimpleNamespace(clip_grad=None), SimpleNamespace(**parts))
    found = [None if w.grad is None else w.grad.item() for w in model]
    return found, [w.item() for w in model]


def test_processes_that_use_different_submodules_sum_the_same_gradients(jobs):
    """Check LayerDrop: a weight that one process alone has used, and one that none has."""
    (gradients, weights), others = jobs[2](step_of_unequal_ranks, [{0: 1, 1: 10}, {1: 1, 2: 10}])
    assert gradients == [1, 11, 10, None] and others == (gradients, weights)
    assert weights[3] == 1  # without weight decay
    (gradients, weights), others = jobs[2](
        step_of_unequal_ranks, [{0: 1, 1: 2, 2: 3, 3: 4}, {1: 5}]
    )
    assert gradients == [1, 7, 3, 4] and others == (gradients, weights)


def wrapped(options: dict[str, bool], nested: bool) -> list[tuple[torch.Tensor, ...]]:
    """Return weights after training steps through DDP, and with gradients averaged by hand."""
    outer = nn.parallel.DistributedDataParallel(normed(3), **options, broadcast_buffers=False)
    model = copy.deepcopy(outer.module)
    both = (nn.Sequential(outer) if nested else outer, outer.module), (model, model)
    optimizers = [torch.optim.SGD(inner.parameters(), lr=0.1) for _, inner in both]
    for step in range(3):
        for (called, inner), optimizer in zip(both, optimizers, strict=True):
            generator = torch.Generator().manual_seed(9 * step + distributed.rank())
            x = torch.rand(6, 3, 12, 12, generator=generator)
            y = torch.randint(3, (6,), generator=generator)
            optimizer.zero_grad()
            pgd(called, x, y, steps=1)  # an attack as in an evaluation
            mtlat_loss(called, x, y, num_classes=3, generator=generator).backward()
            if inner is model:
                distributed.all_reduce_sum([p.grad for p in model.parameters()])
                for p in model.parameters():
                    p.grad /= distributed.world_size()
            optimizer.step()
    assert "forward" not in vars(outer)  # the attack bypasses the wrapper, and restores it
    return [tuple(p.detach() for p in inner.parameters()) for _, inner in both]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("option", ["", "find_unused_parameters", "static_graph"])
def test_the_loss_works_through_distributed_data_parallel(jobs, option, nested):
    """Check DistributedDataParallel, also with a static graph, and inside another module.

    Attacks need no gradients of the weights, so that they must bypass the wrapper if its graph is
    static. Otherwise the processes end with different weights.
    """
    for by_torch, by_hand in jobs[2](wrapped, {option: True} if option else {}, nested):
        assert_close(by_torch, by_hand)


def test_sync_batchnorm_does_not_remember_the_attack():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(normed(3))
    assert isinstance(model[0], nn.SyncBatchNorm)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with frozen(model):
        model(torch.rand(4, 3, 12, 12))
    assert states_equal(model.state_dict(), before)
    model(torch.rand(4, 3, 12, 12))
    assert not states_equal(model.state_dict(), before)


@given(st.integers(1, 9), st.integers(0, 40))
def test_a_share_is_rows_in_order_in_pairs_and_about_equal(world, more):
    count = 2 * world + more
    parts = []
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(world):
            patch.setattr(distributed, "_job", distributed._Job(rank, world))
            parts.append(range(count)[distributed.shard_rows(count)])
    assert [row for rows in parts for row in rows] == [*range(count)]
    assert all(rows.start % 2 == 0 for rows in parts)
    assert min(map(len, parts)) >= 2 and max(map(len, parts)) - min(map(len, parts)) <= 3


def test_one_process_takes_all(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")  # of a job that this process is not in
    assert distributed.local_rank() == 0
    assert [range(n)[distributed.shard_rows(n)] for n in (1, 2, 7)] == [
        range(1),
        range(2),
        range(7),
    ]


def first_weights(argv: list[str], seed: int) -> torch.Tensor:
    """Return the first weights of a training, drawn from a different seed on each rank."""
    config, checkpoint = parse_train_config(argv)
    draw, rank = torch.manual_seed, distributed.rank()
    torch.manual_seed = lambda given: draw(given + seed * rank)
    try:
        return train.build(config, train.load_data(config), checkpoint).model[2].weight.detach()
    finally:
        torch.manual_seed = draw


def test_all_processes_start_from_the_weights_of_the_first(jobs, folder, tmp_path):
    argv = arguments(folder, tmp_path / "out", "--arch", "tiny:linear", "--epochs", "1")
    one, *others = jobs[3](first_weights, argv, 1)
    assert torch.equal(one, first_weights(argv, 0))
    assert all(torch.equal(other, one) for other in others)


def test_every_kind_of_number_is_broadcast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo has no int16, and the tensors of one process may be laid out in another way."""
    numbers = torch.arange(24).view(1, 2, 3, 4)
    kinds = torch.int16, torch.float8_e4m3fn, torch.complex64, torch.bool, torch.float32
    tensors = [numbers.to(kind) for kind in kinds] + [torch.tensor(3, dtype=torch.uint16)]
    tensors += [numbers.float().to(memory_format=torch.channels_last)]
    sent = []
    monkeypatch.setattr(distributed, "_job", distributed._job._replace(world_size=2))
    monkeypatch.setattr(distributed.dist, "broadcast", lambda x, _: sent.append(x.clone()))
    distributed.broadcast(tensors)
    assert {x.dtype for x in sent} == {torch.uint8}
    received = iter(sent)
    monkeypatch.setattr(distributed.dist, "broadcast", lambda x, _: x.copy_(next(received)))
    copies = [torch.zeros_like(x) for x in tensors]
    distributed.broadcast(copies)
    assert all(x.tolist() == y.tolist() for x, y in zip(tensors, copies, strict=True))


def refused(argv: list[str]) -> str:
    try:
        config, checkpoint = parse_train_config(argv)
        train.build(config, train.load_data(config), checkpoint)
    except errors.UserError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("flags, message", [
    ("-b 14", "--batch-size 14 makes minibatches of 7, and each of 4 processes needs 2 images"),
    ("-b 16", "accepted"),
    ("--device cuda:1", "--device cuda:1: 4 processes need cuda (one GPU each) or cpu"),
    ("--device mps", "--device mps: 4 processes need cuda (one GPU each) or cpu"),
    ("--sync-bn", "--sync-bn works on CUDA, not on cpu"),
])  # fmt: skip
def test_what_several_processes_cannot_do(jobs, folder, tmp_path, flags, message):
    argv = arguments(folder, tmp_path / "out", "--arch", "tiny:linear", *flags.split())
    for said in jobs[4](refused, argv):
        assert said.startswith(message)


def print_a_name() -> None:
    """Print a file name that UTF-8 cannot encode, except in rank 0, which prints to the tests."""
    if distributed.rank():
        print("caf\udce9")


def test_other_ranks_print_any_name_to_nowhere(jobs):
    assert jobs[2](print_a_name) == [None, None]


def prints_to_nowhere() -> list[bool]:
    return [getattr(stream, "name", "") == os.devnull for stream in (sys.stdout, sys.stderr)]


def test_rank_0_alone_prints(jobs):
    assert jobs[3](prints_to_nowhere) == [[False, False], [True, True], [True, True]]


def test_an_error_is_printed_once_and_where_the_store_is_gone(monkeypatch):
    class Store:
        asked = 0

        def add(self, key: str, more: int) -> int:
            self.asked += more
            return self.asked

    class Gone:
        def add(self, key: str, more: int) -> int:
            raise RuntimeError("Broken pipe")

    monkeypatch.setattr(distributed, "_job", distributed._Job(1, 2, Store()))
    assert [distributed.is_first_error() for _ in range(3)] == [True, False, False]
    monkeypatch.setattr(distributed, "_job", distributed._Job(1, 2, Gone()))
    assert distributed.is_first_error()


@pytest.mark.parametrize("nccl, backend", [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_gpus_exchange_by_gloo_where_torch_has_no_nccl(monkeypatch, nccl, backend):
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(None, 0, 2)]))
    monkeypatch.setattr(distributed, "_fresh_store", Mock())
    monkeypatch.setattr(dist, "init_process_group", started := Mock())
    monkeypatch.setattr(dist, "destroy_process_group", Mock())
    with distributed.process_group():
        assert started.call_args.args == (backend,)


def test_full_memory_in_an_exchange_is_not_blamed_on_another_process(monkeypatch):
    monkeypatch.setattr(distributed, "_job", distributed._Job(0, 2))
    closed = RuntimeError("[pair.cpp:1] Connection closed by peer. Is it up?")
    nccl = dist.DistBackendError("ncclUnhandledCudaError: Call to CUDA function failed")
    for error, shown in ((closed, distributed.PeerLostError("Connection closed by peer")),
                         (full := torch.OutOfMemoryError("no memory"), full),
                         (nccl, nccl)):  # fmt: skip
        monkeypatch.setattr(dist, "all_gather_object", Mock(side_effect=error))
        with pytest.raises(type(shown), match=f"^{shown}$"):
            distributed.all_gather(1)


def test_a_process_waits_for_the_first_one_of_its_own_machine(monkeypatch):
    """Check ranks 2 and 3 of four, on the second of two machines."""
    said, found = set(), []
    store = SimpleNamespace(
        set=lambda key, _: said.add(key), check=lambda keys: found.append({*keys} <= said) or True
    )
    for rank, local_rank in ((2, 0), (3, 1)):
        monkeypatch.setattr(distributed, "_job", distributed._Job(rank, 4, store))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        found.clear()
        with distributed.local_rank_zero_first():
            assert found == [True] * local_rank


def test_an_ignored_ctrl_c_stays_ignored_while_a_process_waits():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with distributed._deadly_signals():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def turn(seconds: float) -> tuple[float, float, float]:
    with distributed.local_rank_zero_first():
        entered = time.monotonic()
        time.sleep(seconds)
        done = time.monotonic()
    return entered, done, time.monotonic()


def test_one_process_of_a_machine_goes_first_at_every_start_of_a_job():
    """Check two starts of a job with one store, which torchrun keeps for a job and its restarts."""
    store = open_store()
    for _ in range(2):
        job = Job(2, store)
        try:
            (_, first, left), (second, last, _) = job(turn, 0.3)
            assert sorted(job(distributed.is_first_error)) == [False, True]
        finally:
            job.end()
        assert first <= second
        assert last <= left  # a machine that is ready waits for the others


def test_a_process_that_is_faster_than_the_first_waits_for_the_new_start():
    """Check a restart after rank 1 was killed before it had met rank 0 in the earlier start."""
    store = dist.HashStore()
    store.set("start", "of the earlier start")
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(distributed._fresh_store, store, rank, 3) for rank in (1, 2)]
        time.sleep(0.3)
        assert not any(other.done() for other in others)
        distributed._fresh_store(store, 0, 3).set("key", "value")
        assert all(other.result(30).get("key") == b"value" for other in others)


# ---------------------------------------------------------------- evaluation


def measured(argv: list[str]) -> None:
    """Run evaluate.py without its tables and figures."""
    torch.manual_seed(0)  # for networks without a checkpoint
    evaluate.write_results = lambda *_: None
    evaluate.main(argv)


def scores(out: Path) -> list[dict[str, Any]]:
    """Return the lines of cells.jsonl without times."""
    lines = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    times = {"seconds", "seconds_making", "crc"}
    return [{k: x[k] for k in x.keys() - times} for x in lines]


def test_many_processes_score_what_one_scores(jobs, tmp_path, monkeypatch):
    """Check that lines with all outcomes are identical, for five batches, one of them smaller."""
    monkeypatch.setattr(evaluate, "write_results", evaluate.write_results)
    monkeypatch.chdir(ROOT / "tests")
    images, cache = tmp_path / "images", str(tmp_path / "cache")
    image_folder(images / "val", each=9, side=16)
    image_folder(images / "train", each=4, side=16)
    for severity in range(1, 6):
        image_folder(tmp_path / "c" / "contrast" / str(severity), each=9, side=20)
    (tmp_path / "c" / "settings.json").write_text('{"size": 16}')
    train.main(["--data", str(images), "--size", "16", "--cache-dir", cache, "--device", "cpu",
                "--arch", "tiny:convnet", "--epochs", "1", "--batch-size", "6",
                "--output-dir", str(tmp_path / "run")])  # fmt: skip
    argv = [
        str(tmp_path / "run" / "last.pt"), "tiny:linear", "--surrogate", "tiny:smooth",
        "--only", "gaussian_noise", "contrast", "white-box", "mi_fgsm_0.08", "--skip", "checks",
        "--imagenet-c", str(tmp_path / "c"), "--cache-dir", cache, "--device", "cpu",
        "--batch-size", "6", "--limit", "25", "--output-dir",
    ]  # fmt: skip
    measured([*argv, str(tmp_path / "1")])
    one = scores(tmp_path / "1")
    assert len(one) == 2 * 16 and all("hits" in line for line in one)
    for world, job in jobs.items():
        assert job(measured, [*argv, str(tmp_path / f"{world}")]) == [None] * world
        assert scores(tmp_path / f"{world}") == one


def load_model(argv: list[str]) -> str:
    """Return the error of evaluate.py while it loads a model, or "none"."""
    torch.manual_seed(distributed.rank())
    try:
        evaluate.prepare(parse_eval_config(argv))
    except errors.UserError as error:
        return str(error)
    return "none"


def test_models_that_differ_between_the_processes_are_refused(jobs, folder):
    common = ["--data", str(folder), "--size", "16", "--device", "cpu",
              "--cache-dir", str(folder.parent / "cache")]  # fmt: skip
    for said in jobs[2](load_model, ["tiny:ranked", *common]):
        assert said.startswith("the processes of the job find different images or weights")
    assert jobs[2](load_model, ["tiny:linear", *common]) == ["none", "none"]  # drawn with --seed


# ---------------------------------------------------------------- failure of one process


def _script(rank: int, port: int, argv: list[str], said: Path) -> None:
    """Run train.py as one of two processes of torchrun, with its output in a file."""
    environment(rank, 2, port)
    with open(said, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
    errors.run_script(lambda: train.main(argv), "add --resume auto to go on")


@contextmanager
def started(
    folder: Path, tmp_path: Path, *flags: str, second: Sequence[str] = ()
) -> Iterator[tuple[list[Any], Path]]:
    """Start two processes of a training; yield them and the file that receives their output."""
    start_server()
    store, said = open_store(), tmp_path / "said"
    said.touch()
    argv = arguments(folder, tmp_path / "out", "--arch", "tiny:linear", *flags)
    both = [
        SERVER.Process(target=_script, args=(rank, store.port, [*argv, *own], said))
        for rank, own in enumerate(((), second))
    ]
    for process in both:
        process.start()
    try:
        yield both, said
    finally:
        for process in both:
            process.kill()


def ends(processes: list[Any], said: Path) -> tuple[list[int], list[str]]:
    """Wait for the processes; return their exit codes and the lines that give the reason."""
    for process in processes:
        process.join(30)
    text = said.read_text()
    assert "Traceback" not in text
    last = [line for line in text.splitlines() if line.startswith(("error", "stopped"))]
    return [process.exitcode for process in processes], last


@pytest.mark.parametrize("size, missing", [("2", "RANK"), ("abc", "RANK"), ("2", "LOCAL_RANK")])
def test_a_part_of_torchruns_environment_is_refused_in_one_line(monkeypatch, capsys, size, missing):
    place = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in {**place, "WORLD_SIZE": size}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=1))
    with pytest.raises(SystemExit) as ended:
        errors.run_script(lambda: pytest.fail("started"))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: WORLD_SIZE is {size}, but not all of torchrun's variables are set"
    )
    assert line.endswith(": start with torchrun, or unset WORLD_SIZE")


@pytest.mark.parametrize("second, message", [
    ("--data nowhere", "--data nowhere: no such folder"),
    ("--classes 2", "the processes of the job find different images or weights"),
])  # fmt: skip
def test_a_mistake_in_one_process_ends_the_job_in_one_line(folder, tmp_path, second, message):
    with started(folder, tmp_path, second=second.split()) as (both, said):
        codes, last = ends(both, said)
    assert codes == [2, 2]
    assert len(last) == 1 and last[0].startswith(f"error: {message}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_process_that_ends_ends_the_job_in_one_line(folder, tmp_path, number):
    with started(folder, tmp_path, "--epochs", "10000") as (both, said):
        while "loss1" not in said.read_text():
            time.sleep(0.05)
            assert both[0].is_alive() and both[1].is_alive()
        os.kill(both[1].pid, number)
        codes, last = ends(both, said)
    assert codes == [2, -9 if number == signal.SIGKILL else 128 + number]
    assert len(last) == 1 and last[0].endswith("is kept, add --resume auto to go on")
    if number == signal.SIGKILL:
        assert "another process of the job has ended or hangs (" in last[0]
    assert trained(tmp_path / "out")["log"]


@pytest.mark.slow
def test_torchrun_starts_a_killed_job_again_to_the_same_bits(folder, tmp_path):
    """Check SIGKILL of each of two processes, of which one writes the checkpoints."""

    def torchrun(out: str) -> subprocess.Popen:
        flags = "--arch", "tiny:linear", "--epochs", "60", "--resume", "auto"
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
             "--standalone", "--max-restarts=2", str(ROOT / "train.py"),
             *arguments(folder, tmp_path / out, *flags)],
            cwd=ROOT / "tests" / "support", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip

    with torchrun("straight") as straight:
        said = straight.stdout.read()
    assert straight.returncode == 0 and said.count("clean accuracy") == 61  # printed by one process
    said, kills = "", 0
    with torchrun("killed") as killed:
        for line in killed.stdout:
            said += line
            if line.startswith(f"epoch {10 * kills + 10}/") and kills < 2:
                children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text()
                workers = [pid for pid in map(int, children.split())
                           if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]  # fmt: skip
                os.kill(sorted(workers)[kills], signal.SIGKILL)
                kills += 1
    assert killed.returncode == 0 and kills == 2
    assert said.count("error: another process of the job has ended") <= 2
    assert said.count(f"output in {tmp_path / 'killed'}") == 3  # number of starts
    ours, theirs = (trained(tmp_path / out) for out in ("killed", "straight"))
    assert states_equal(ours["model"], theirs["model"])
    assert states_equal(ours["optimizer"], theirs["optimizer"])
    assert [row["loss1"] for row in ours["log"]] == [row["loss1"] for row in theirs["log"]]


def test_a_job_may_be_joined_in_another_thread() -> None:
    def join() -> Any:
        with distributed._deadly_signals():
            return signal.getsignal(signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(join).result() is signal.getsignal(signal.SIGINT) is not signal.SIG_DFL


def test_one_process_needs_no_torch_that_was_built_with_distributed(monkeypatch):
    """Some builds have an empty torch.distributed, as those for AMD's GPUs on Windows."""
    empty = ModuleType("torch.distributed")
    monkeypatch.setitem(sys.modules, "torch.distributed", empty)
    monkeypatch.setattr(torch, "distributed", empty)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    module = runpy.run_path(distributed.__file__)
    with module["process_group"]():
        assert module["all_gather"](3) == [3] and module["world_size"]() == 1
