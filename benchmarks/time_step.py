r"""Time a training step of each method against a plain step, and measure or count its memory.

    python benchmarks/time_step.py                             # ResNet-50, 64 px, 32 images, CPU
    python benchmarks/time_step.py --size 224 --batch 256 --device cuda --amp bf16 --channels-last \
        --compile

The methods alternate step by step on one model. Each method has its own images and optimizer state.
Times are medians over repeats. "plain steps" is the measured cost, "counted" is the expected cost,
both in units of a plain step, and "ratio" is their quotient. Let F be the cost of a forward pass.
The gradients of the input and of the weights cost one F each. A plain step on a minibatch costs
3 F, and a step with two losses, one of them on attacked images, costs 8 F. `mtlat joined` is M-TLAT
with both halves in one forward pass.

On CUDA the memory is the peak of the allocator. Elsewhere it is counted: 16 bytes per weight (its
value, gradient and Adam's two moments), plus the tensors that autograd keeps for the largest
backward pass of the step.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from clock import seconds
from torch import Tensor, nn
from torch.nn.functional import one_hot

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.cli import Parser, number
from harness.devices import resolve_device
from harness.errors import run_script
from harness.models import build_model
from harness.training.methods import METHODS
from mtlat import (
    ALPHA,
    EPSILON_MAX,
    Draws,
    Model,
    Pair,
    cross_entropy,
    draw,
    mixup,
    target_labels,
    targeted_fgsm,
)

Step = Callable[[], None]


def mtlat_joined(model: Model, pairs: list[Pair], draws: Draws, steps: int) -> Iterator[Tensor]:
    """Compute the losses of M-TLAT in one forward pass. BatchNorm sees both halves as one batch."""
    x_mix1, y_mix1 = mixup(*pairs[0], *pairs[1], draws.lam1)
    x_mix2, y_mix2 = mixup(*pairs[2], *pairs[3], draws.lam2)
    x_mtlat = targeted_fgsm(model, x_mix2, draws.target, draws.epsilon, steps=steps)
    y_mtlat = target_labels(y_mix2, draws.target, draws.epsilon)
    logits = model(torch.cat([x_mix1, x_mtlat]))
    yield 2 * cross_entropy(logits, torch.cat([y_mix1, y_mtlat]))


JOINED = METHODS["mtlat"]._replace(losses=mtlat_joined, terms=1)  # one forward pass for both
TRAININGS = {**METHODS, "mtlat joined": JOINED}


def counted_passes(name: str) -> int:
    """Return the cost of a step in units of F: 3 for each loss and 2 for the attack."""
    return 3 if name in ("standard", "mixup") else 8


def make_step(args: argparse.Namespace, name: str, model: nn.Module) -> Step:
    """Return a function that runs one training step: losses, backward passes, optimizer.

    Args:
        args: the parsed command line.
        name: a key of `TRAININGS`.
        model: the network to train. All steps use the same random images and labels.
    """
    method, classes, device = TRAININGS[name], args.classes, torch.device(args.device)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, fused=device.type != "mps")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    pairs = []
    for _ in range(method.minibatches):
        x = torch.rand(args.batch, 3, args.size, args.size, device=device)
        y = torch.randint(classes, (args.batch,), device=device)
        pairs.append((x.to(memory_format=layout), one_hot(y, classes).float()))

    def step() -> None:
        draws = draw(args.batch, classes, alpha=ALPHA, epsilon_max=EPSILON_MAX, device=device)
        optimizer.zero_grad()
        losses = method.losses(model, pairs, draws, 1)
        for _ in range(method.terms):
            with autocast:
                loss = next(losses)
            loss.backward()
        optimizer.step()

    return step


def kept_bytes(step: Step, model: nn.Module) -> int:
    """Return the peak number of bytes that autograd keeps during a step, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    peaks: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def unpack(tensor: Tensor) -> Tensor:  # called by a backward pass, so the peak is over
        if kept:
            peaks.append(sum(kept.values()))
            kept.clear()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        step()
    return max(peaks)


def peak_gib(args: argparse.Namespace, name: str, model: nn.Module) -> float:
    """Return the peak memory of a step in GiB.

    On CUDA it is measured. Elsewhere it is counted on at most four images and scaled.
    """
    if args.device.startswith("cuda"):
        step = make_step(args, name, model)
        step()
        torch.cuda.reset_peak_memory_stats(args.device)
        step()
        return torch.cuda.max_memory_allocated(args.device) / 2**30
    few = argparse.Namespace(**{**vars(args), "batch": min(args.batch, 4)})
    kept = kept_bytes(make_step(few, name, model), model) * args.batch / few.batch
    return (kept + 16 * sum(p.numel() for p in model.parameters())) / 2**30


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = Parser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--arch", default="resnet50", help="torchvision classifier (resnet50)")
    add("--batch", type=number(int, 1), default=32, help="images per minibatch of each loss (32)")
    add("--size", type=number(int, 1), default=64, help="side in pixels (64)")
    add("--classes", type=number(int, 2), default=100, help="number of classes (100)")
    add("--device", type=resolve_device, default="cpu", help="torch device (cpu)")
    add("--amp", choices=("no", "bf16", "fp16"), default="no", help="autocast dtype (no)")
    add("--channels-last", action="store_true", help="use the channels-last memory format")
    add("--compile", action="store_true", help="compile the model")
    add(
        "--repeats",
        type=number(int, 1),
        default=10,
        help="timed steps per method, after two warm-ups (10)",
    )
    add("--only", nargs="+", choices=TRAININGS, default=list(TRAININGS), metavar="NAME",
        help="methods to time besides standard (all)")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    args = build_parser().parse_args(argv)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    model = build_model(args.arch, args.classes).to(args.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    names = list(dict.fromkeys(["standard", *args.only]))
    device = torch.device(args.device)
    if args.compile and device.type == "cuda":
        model.compile()
    memory = {name: peak_gib(args, name, model) for name in names}
    if args.compile and device.type != "cuda":  # after the count, which does not see compiled code
        model.compile()
    steps = {name: make_step(args, name, model) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(args.repeats + 2):
        for name, step in steps.items():
            took = seconds(step, device, torch.get_num_threads())
            times[name] += [took] if repeat > 1 else []
    threads = f"{torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    layout = " channels-last" * args.channels_last + " compiled" * args.compile
    print(f"torch {torch.__version__}, {args.device} ({where}), {args.arch}, {args.batch} images at"
          f" {args.size} px, amp {args.amp}{layout}")  # fmt: skip
    print(
        f"{'':14}{'ms':>9}{'images/s':>10}{'plain steps':>13}{'counted':>9}{'ratio':>7}{'GiB':>8}"
    )
    plain = statistics.median(times["standard"])
    for name in names:
        took, limit = statistics.median(times[name]), counted_passes(name) / 3
        seen = args.batch * (1 if limit == 1 else 2)  # images in the losses of a step
        print(f"{name:14}{1e3 * took:9.1f}{seen / took:10.1f}{took / plain:13.2f}{limit:9.2f}"
              f"{took / plain / limit:7.2f}{memory[name]:8.2f}")  # fmt: skip


if __name__ == "__main__":
    run_script(main, "run it again")
