r"""Time one training step of each method beside the plain step, and count its memory.

    python benchmarks/step.py                                  # ResNet-50, 64 px, 32 images, CPU
    python benchmarks/step.py --size 224 --batch 256 --device cuda --amp bf16 --channels-last \
        --compile

The methods alternate, step by step, on one model, images and optimizer state each; medians over the
repeats. With F a forward pass, and one F each for the gradients of the input and of the weights, a
plain step on a minibatch is counted as 3 F and a step of two losses, one of them attacked, as 8 F.
`mtlat joined` is M-TLAT with both halves in one forward pass.

Memory: on CUDA the peak of the allocator. Elsewhere it is counted: 16 bytes a weight (itself, its
gradient, Adam's two moments) and what autograd keeps for the largest backward pass of the step.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torchvision
from timing import seconds
from torch import Tensor, nn
from torch.nn.functional import one_hot

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import keep_freed_memory
from methods import METHODS, Method
from mtlat import Draws, Model, Pair, cross_entropy, draw, mixup, tlat

Step = Callable[[], None]


def mtlat_joined(model: Model, pairs: list[Pair], draws: Draws, steps: int) -> Iterator[Tensor]:
    """M-TLAT with one forward pass for both losses: BatchNorm sees both halves as one batch."""
    x_mix1, y_mix1 = mixup(*pairs[0], *pairs[1], draws.lam1)
    x_mix2, y_mix2 = mixup(*pairs[2], *pairs[3], draws.lam2)
    x_mtlat, y_mtlat = tlat(model, x_mix2, y_mix2, draws.target, draws.epsilon, steps=steps)
    logits = model(torch.cat([x_mix1, x_mtlat]))
    yield 2 * cross_entropy(logits, torch.cat([y_mix1, y_mtlat]))


TRAININGS = {**METHODS, "mtlat joined": Method(mtlat_joined, 4, 1, "one forward pass for both")}


def counted_passes(name: str) -> int:
    """Passes of a step in units of F: 3 for each loss, and 2 for the attack."""
    return 3 if name in ("standard", "mixup") else 8


def make_step(args: argparse.Namespace, name: str, model: nn.Module) -> Step:
    """One whole step on images and labels that stay: losses, backward passes, optimizer."""
    method, classes, device = TRAININGS[name], args.classes, torch.device(args.device)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, fused=device.type != "mps")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    pairs = []
    for _ in range(method.couples):
        x = torch.rand(args.batch, 3, args.size, args.size, device=device)
        y = torch.randint(classes, (args.batch,), device=device)
        pairs.append((x.to(memory_format=layout), one_hot(y, classes).float()))

    def step() -> None:
        draws = draw(args.batch, classes, alpha=0.4, epsilon_max=0.025, device=device)
        optimizer.zero_grad()
        losses = method.losses(model, pairs, draws, 1)
        for _ in range(method.terms):
            with autocast:
                loss = next(losses)
            loss.backward()
        optimizer.step()

    return step


def kept_bytes(step: Step, model: nn.Module) -> int:
    """The most that autograd keeps at one time during a step, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    peaks: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def unpack(tensor: Tensor) -> Tensor:  # a backward pass has begun: the peak is behind it
        if kept:
            peaks.append(sum(kept.values()))
            kept.clear()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        step()
    return max(peaks)


def peak_gib(args: argparse.Namespace, name: str, model: nn.Module) -> float:
    """Peak memory of a step: measured on CUDA, elsewhere counted at few images and scaled."""
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
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--arch", default="resnet50", help="a torchvision classifier (resnet50)")
    add("--batch", type=int, default=32, help="images in a minibatch, of each loss (32)")
    add("--size", type=int, default=64, help="side in pixels (64)")
    add("--classes", type=int, default=100, help="(100)")
    add("--device", default="cpu", help="cpu, cuda, ... (cpu)")
    add("--amp", choices=("no", "bf16", "fp16"), default="no")
    add("--channels-last", action="store_true")
    add("--compile", action="store_true")
    add("--repeats", type=int, default=10, help="steps of each method, after two to warm up (10)")
    add("--only", nargs="+", choices=TRAININGS, default=list(TRAININGS), metavar="NAME")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    keep_freed_memory()  # as train.py does
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    model = torchvision.models.get_model(args.arch, num_classes=args.classes).to(args.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    names = list(dict.fromkeys(["standard", *args.only]))
    device = torch.device(args.device)
    if args.compile and device.type == "cuda":
        model.compile()
    memory = {name: peak_gib(args, name, model) for name in names}
    if args.compile and device.type != "cuda":  # only now: what a compiler keeps is not counted
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
        f"{'':14}{'ms':>9}{'images/s':>10}{'plain steps':>13}{'counted':>9}{'of it':>7}{'GiB':>8}"
    )
    plain = statistics.median(times["standard"])
    for name in names:
        took, limit = statistics.median(times[name]), counted_passes(name) / 3
        seen = args.batch * (1 if limit == 1 else 2)  # images that a step's losses see
        print(f"{name:14}{1e3 * took:9.1f}{seen / took:10.1f}{took / plain:13.2f}{limit:9.2f}"
              f"{took / plain / limit:7.2f}{memory[name]:8.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
