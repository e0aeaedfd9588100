"""The settings of a training: its command line, its defaults, and what a resumed run may change."""

import argparse
from pathlib import Path
from typing import Any

import data
from common import Parser, UserError, find_device, load_checkpoint, number
from methods import METHODS

# The paper's recipe, and the one for the embedded set, whose network must learn on two CPU cores
# in minutes and so keeps its first learning rate for longer.
PAPER = {"epochs": 90, "batch_size": 256, "lr": 0.002, "milestones": (30, 60, 80)}
SHAPES = {"epochs": 3, "batch_size": 32, "lr": 0.0007, "milestones": (2, 2.67)}

# What a resumed run may change: where it runs and what it prints, never what it computes.
MAY_MOVE = {"data", "cache_dir", "output_dir"}
MAY_CHANGE = MAY_MOVE | {"resume", "device", "print_freq", "download"}

on_off = argparse.BooleanOptionalAction


def both(name: str) -> str:
    return f"(default: {PAPER[name]}, the paper's; for shapes {SHAPES[name]})"


def add_experiment_flags(parser: Parser) -> None:
    """What is trained on what."""
    # fmt: off
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="mtlat",
        help="; ".join(f"{name}: {m.description}" for name, m in METHODS.items()))
    add("--alpha", type=number(float, 0, above=True), default=0.4,
        help="lambda ~ Beta(alpha, alpha)")
    add("--epsilon-max", "--eps-max", type=number(float, 0, 1), default=0.025,
        help="epsilon ~ U[0, epsilon_max], in pixels of [0, 1]")
    add("--attack-steps", type=number(int, 1), default=1,
        help="iterations of the attack; the paper takes one")

    add = parser.add_argument_group("data").add_argument
    add("--data", "--data-dir", default="shapes", metavar="SET",
        help="shapes (embedded), cifar10, cifar100, or a folder with train/CLASS/*.jpg and"
        " val/CLASS/*.jpg; of one with CLASS/*.jpg alone ten percent are held out as test set")
    add("--size", type=number(int, 8, data.MAX_SIDE),
        help="side of the square that images are resized to (default: 224, the paper's; for shapes"
        " 64, for CIFAR 32)")
    add("--classes", type=number(int, 2), metavar="K",
        help="keep K classes, drawn with --data-seed (default: all)")
    add("--data-seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N",
        help="of the classes kept, the test part of CLASS/*.jpg, and the shapes; apart from --seed,"
        " so that several trainings can see the same images")
    add("--download", action=on_off, default=False, help="fetch CIFAR if it is not there")
    add("--skip-bad-images", action=on_off, default=False,
        help="leave out and count the files that are no images, instead of stopping")
    add("--cache-dir", default=str(data.default_cache_dir()), metavar="DIR",
        help="where decoded folders are kept, and CIFAR")

    add = parser.add_argument_group("model").add_argument
    add("-a", "--arch", "--model", default="resnet50",
        help="a torchvision classifier, or your own as module:callable, which runs its code")
    add("--weights", metavar="NAME_OR_PATH",
        help="start from a checkpoint, or from torchvision's weights of that name (downloaded), the"
        " head being new if the number of classes differs (default: random weights)")
    # fmt: on


def add_training_flags(parser: Parser) -> None:
    """How it is trained, and where."""
    # fmt: off
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=number(int, 1), help=f"passes over the training set {both('epochs')}")
    add("-b", "--batch-size", type=number(int, 1),
        help="images that the losses of a step see together, in all processes together: two losses"
        f" share them, 128 + 128 of 256, see --whole-batches {both('batch_size')}")
    add("--whole-batches", action=on_off, default=False,
        help="give each of two losses a whole batch, 256 + 256: the other reading of the paper")
    add("--opt", choices=("adam", "adamw", "sgd"), default="adam", help="optimizer")
    add("--lr", "--learning-rate", type=number(float, 0, above=True),
        help=f"learning rate {both('lr')}")
    add("--wd", "--weight-decay", type=number(float, 0), default=1e-4, help="weight decay")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="of --opt sgd")
    add("--milestones", type=number(float, 0), nargs="*", metavar="EPOCH",
        help="epochs after which the learning rate is multiplied by --gamma; the defaults move in"
        f" proportion with --epochs {both('milestones')}")
    add("--gamma", type=number(float, 0, 1), default=0.1, help="see --milestones")

    add = parser.add_argument_group("running").add_argument
    add("--seed", type=number(int, 0, 2**32 - 1), default=0,
        help="of the weights, the orders and the draws")
    add("--deterministic", action=on_off, default=False,
        help="the same bits on a GPU too, but slower (a CPU repeats itself anyway)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--amp", choices=("no", "bf16", "fp16"), default="no", help="mixed precision")
    add("--compile", action=on_off, default=False, help="torch.compile the model")
    add("--channels-last", action=on_off, default=False, help="memory layout of images and weights")
    add("--sync-bn", action=on_off, default=False,
        help="let BatchNorm see the images of all processes (on CUDA; default: each sees its own)")
    add("--resume", metavar="PATH",
        help="go on from this checkpoint; auto: from last.pt of --output-dir, if there is one")
    add("--output-dir", metavar="DIR", help="(default: runs/METHOD)")
    add("-p", "--print-freq", type=number(int, 1), default=10, metavar="STEPS",
        help="how often the losses are read and shown")
    # fmt: on


def build_parser(description: str | None = None) -> Parser:
    parser = Parser(description)
    add_experiment_flags(parser)
    add_training_flags(parser)
    return parser


def parse_args(
    argv: list[str] | None = None, description: str | None = None
) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The settings with every default filled in, and the checkpoint to go on from, if any."""
    parser = build_parser(description)
    args = parser.parse_args(argv)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    given = vars(parser.parse_args(argv))  # without defaults: what the user typed
    path = Path(args.resume or "")
    if args.resume == "auto":
        path = Path(args.output_dir or f"runs/{args.method}") / "last.pt"
    if args.resume and (args.resume != "auto" or path.exists()):
        checkpoint = load_checkpoint(path)
        saved = checkpoint["settings"]
        for name in given.keys() - MAY_CHANGE:
            if given[name] != saved.get(name):
                raise UserError(
                    f"--{name.replace('_', '-')} is {given[name]}, but {path} was trained with"
                    f" {saved.get(name)}: leave it out, or start anew in another --output-dir"
                )
        kept = (vars(args).keys() - MAY_CHANGE) | (MAY_MOVE - given.keys())
        if lacking := sorted(kept - saved.keys()):
            raise UserError(f"{path} says nothing of {lacking[0]}: another version of train.py made"
                            " it, and can go on with it")  # fmt: skip
        vars(args).update({name: saved[name] for name in kept})
        args.output_dir = args.output_dir if "output_dir" in given else str(path.parent)
        args.resume = str(path)
    else:
        checkpoint = None
        recipe: dict[str, Any] = SHAPES if args.data == "shapes" else PAPER
        for name in ("epochs", "batch_size", "lr"):
            if getattr(args, name) is None:
                setattr(args, name, recipe[name])
        if args.milestones is None:
            shares = [milestone / recipe["epochs"] for milestone in recipe["milestones"]]
            args.milestones = [args.epochs * share for share in shares]
        args.size = args.size or data.SIZES.get(args.data, 224)
        args.output_dir = args.output_dir or f"runs/{args.method}"
    refuse_overwriting(args, checkpoint)
    args.device = find_device(args.device)
    if args.sync_bn and not args.device.startswith("cuda"):
        raise UserError(f"--sync-bn works on CUDA, not on {args.device}: leave it out")
    return args, checkpoint


def refuse_overwriting(args: argparse.Namespace, checkpoint: dict[str, Any] | None) -> None:
    last = Path(args.output_dir) / "last.pt"
    if last.exists() and not (checkpoint and last.samefile(args.resume)):
        raise UserError(
            f"{args.output_dir} holds an earlier run: add --resume auto to go on with it, or choose"
            " another --output-dir"
        )
