"""Mutation testing: change the source code in one place at a time, and check that a test fails.

    python tests/mutate.py                                # 40 mutants of each file; takes hours
    python tests/mutate.py mtlat.py --sample 0            # all mutants of one file
    python tests/mutate.py attacks.py --only 17 130       # two mutants of one file, by number

A mutant is a file with one changed operator, comparison, constant, condition or statement.
Annotations, strings, decorators and raise statements are not changed.

The tool copies the project and writes each mutant into the copy. There the tests of the file run
until one fails. They run in a fork of this process, which has imported the slow packages already.
A mutant is killed if a test fails, or if the tests take ten times as long as for the original file.

The tool prints the mutants that survive. For each of them, add a test. If the change has no effect
that a test could observe, add a line to results/mutation.md.
"""

import argparse
import ast
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORRUPTED = ["corruptions/test_corrupt.py", "corruptions/test_statistics.py"]
PIXELS = [
    "corruptions/test_parameters.py",
    "corruptions/test_oracle_noise_digital.py",
    *CORRUPTED,
]
SCENES = [
    "corruptions/test_parameters.py",
    "corruptions/test_blur_weather.py",
    "corruptions/test_oracle_blur_weather.py",
]
BENCHMARK = ["test_evaluate_cli.py", "test_evaluate.py"]
TABLES = ["harness/benchmark/test_tables.py", *BENCHMARK]
DATASETS = ["harness/images/test_datasets.py", "test_bad_input.py", *BENCHMARK]
TRAINING = ["test_train.py", "test_train_resume.py", "test_bad_input.py"]
PAPER = ["harness/reproduction/test_comparison.py", "test_reproduce.py"]
# The tests of each file, relative to tests/. Those that usually fail first come first.
TESTS = {
    "mtlat.py": ["test_mtlat.py", "test_mtlat_model.py", "test_bad_calls.py"],
    "attacks.py": ["test_attacks.py", "test_attacks_contract.py"],
    "train.py": TRAINING,
    "evaluate.py": BENCHMARK,
    "reproduce.py": ["test_reproduce.py", "test_bad_input.py"],
    "corruptions/__main__.py": ["corruptions/test_cli.py", "test_bad_input.py"],
    "corruptions/apply.py": CORRUPTED,
    "corruptions/registry.py": CORRUPTED,
    "corruptions/rng.py": ["corruptions/test_rng.py", *CORRUPTED],
    "corruptions/noise.py": PIXELS,
    "corruptions/digital.py": PIXELS,
    "corruptions/jpeg.py": PIXELS,
    "corruptions/blur.py": SCENES,
    "corruptions/weather.py": SCENES,
    "corruptions/frost.py": [*SCENES, "test_bad_input.py"],
    "corruptions/geometric.py": ["corruptions/test_geometric.py", *CORRUPTED],
    "corruptions/calibration.py": ["corruptions/test_geometric.py"],
    "corruptions/transform.py": ["corruptions/test_transform.py", "test_odd_images.py", *DATASETS],
    "harness/checkpoints.py": [
        "harness/test_files.py",
        "harness/test_damaged_files.py",
        "harness/test_models.py",
        *TRAINING,
        "test_evaluate_cli.py",
    ],
    "harness/cli.py": ["harness/test_cli.py", "test_bad_input.py"],
    "harness/cnn.py": ["harness/test_cnn.py", "test_train.py"],
    "harness/devices.py": ["harness/test_devices.py", "test_environment.py", *TRAINING],
    "harness/distributed.py": ["test_environment.py", "harness/test_distributed.py"],
    "harness/errors.py": [
        "harness/test_files.py",
        "harness/test_damaged_files.py",
        *TRAINING,
        "test_evaluate_cli.py",
        "harness/test_distributed.py",
    ],
    "harness/files.py": ["harness/test_files.py", *DATASETS, "test_evaluate.py"],
    "harness/models.py": ["harness/test_models.py", *TRAINING],
    "harness/benchmark/attack_registry.py": [
        "harness/benchmark/test_attack_registry.py",
        "test_integrations.py",
    ],
    "harness/benchmark/checks.py": [
        "harness/benchmark/test_checks.py",
        "test_attacks_contract.py",
        *BENCHMARK,
    ],
    "harness/benchmark/config.py": ["test_bad_input.py", *BENCHMARK],
    "harness/benchmark/fusion.py": ["harness/benchmark/test_fusion.py", *BENCHMARK],
    "harness/benchmark/mce.py": TABLES,
    "harness/benchmark/measure.py": BENCHMARK,
    "harness/benchmark/metrics.py": TABLES,
    "harness/benchmark/paired.py": ["harness/benchmark/test_paired.py", *TABLES],
    "harness/benchmark/plots.py": [*TABLES, "harness/reproduction/test_page.py"],
    "harness/benchmark/registry.py": ["harness/benchmark/test_attack_registry.py", *BENCHMARK],
    "harness/benchmark/store.py": ["harness/benchmark/test_store.py", "harness/test_files.py"],
    "harness/benchmark/subjects.py": [*BENCHMARK, "harness/test_models.py"],
    "harness/benchmark/tables.py": TABLES,
    "harness/images/cache.py": [
        "harness/images/test_cache.py",
        *DATASETS,
        "harness/images/test_preprocess.py",
    ],
    "harness/images/corrupted.py": ["harness/images/test_corrupted.py", *BENCHMARK],
    "harness/images/datasets.py": DATASETS,
    "harness/images/embedded.py": [
        "harness/images/test_datasets.py",
        "harness/reproduction/test_mechanism.py",
    ],
    "harness/images/folders.py": DATASETS,
    "harness/images/loader.py": [*DATASETS, "test_devices.py"],
    "harness/images/preprocess.py": ["harness/images/test_preprocess.py", "test_evaluate_cli.py"],
    "harness/reproduction/comparison.py": PAPER,
    "harness/reproduction/estimate.py": PAPER,
    "harness/reproduction/mechanism.py": ["harness/reproduction/test_mechanism.py", *PAPER],
    "harness/reproduction/page.py": ["harness/reproduction/test_page.py", *PAPER],
    "harness/reproduction/paper.py": PAPER,
    "harness/reproduction/plan.py": [*PAPER, "test_bad_input.py"],
    "harness/reproduction/report.py": PAPER,
    "harness/training/augment.py": ["harness/training/test_augment.py", "test_train.py"],
    "harness/training/average.py": ["harness/training/test_average.py", *TRAINING],
    "harness/training/checks.py": ["harness/training/test_checks.py", *TRAINING],
    "harness/training/config.py": TRAINING,
    "harness/training/log.py": ["harness/training/test_log.py", *TRAINING],
    "harness/training/manifold.py": ["harness/training/test_manifold.py", "test_train.py"],
    "harness/training/methods.py": ["test_train.py", "test_batchnorm.py", "test_devices.py"],
}

SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Div, ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.MatMult: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


class Mutator(ast.NodeTransformer):
    """Change the place of a tree with the index `wanted`; count the places if it is None."""

    def __init__(self, wanted: int | None = None) -> None:
        self.wanted, self.count, self.said = wanted, 0, ""

    def here(self, node: ast.AST, what: str) -> bool:
        found = self.count == self.wanted
        self.count += 1
        if found:
            self.said = f"line {getattr(node, 'lineno', 0)}: {what}"
        return found

    def skip(self, node: ast.AST) -> ast.AST:
        return node

    visit_JoinedStr = visit_Raise = skip  # other tests check the messages

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.args.defaults = [self.visit(d) for d in node.args.defaults]
        node.args.kw_defaults = [d and self.visit(d) for d in node.args.kw_defaults]
        node.body = self.statements(node.body)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.value = node.value and self.visit(node.value)
        return node

    def statements(self, body: list[ast.stmt]) -> list[ast.stmt]:
        kept: list[ast.stmt] = []
        for statement in body:
            deletable = isinstance(statement, ast.AugAssign) or (
                isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
            )
            if deletable and self.here(statement, f"{ast.unparse(statement)[:60]!r} deleted"):
                kept.append(ast.Pass())
            else:
                kept.append(self.visit(statement))
        return kept

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for field in ("body", "orelse", "finalbody"):
            if isinstance(body := getattr(node, field, None), list):
                setattr(node, field, self.statements(body))
        for field, value in ast.iter_fields(node):
            if field in ("body", "orelse", "finalbody") and isinstance(value, list):
                continue
            if isinstance(value, list):
                setattr(
                    node, field, [self.visit(v) if isinstance(v, ast.AST) else v for v in value]
                )
            elif isinstance(value, ast.AST):
                setattr(node, field, self.visit(value))
        return node

    def swap(self, node: ast.AST, operator: ast.AST) -> ast.AST:
        other = SWAPS[type(operator)]
        old = type(operator).__name__
        return other() if self.here(node, f"{old} replaced by {other.__name__}") else operator

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        node.op = self.swap(node, node.op)
        return self.generic_visit(node)

    visit_AugAssign = visit_BoolOp = visit_BinOp

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        node.ops = [self.swap(node, operator) for operator in node.ops]
        return self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        if self.here(node, f"{type(node.op).__name__} removed"):
            return node.operand
        return self.generic_visit(node)

    def visit_If(self, node: ast.If | ast.IfExp) -> ast.AST:
        if self.here(node, f"{ast.unparse(node.test)[:60]!r} negated"):
            node.test = ast.UnaryOp(ast.Not(), node.test)
        return self.generic_visit(node)

    visit_IfExp = visit_If

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, bool):
            what = f"{node.value} replaced by {not node.value}"
            return ast.Constant(not node.value) if self.here(node, what) else node
        if isinstance(node.value, int | float):
            changed = node.value + 1 if isinstance(node.value, int) else 1.1 * node.value + 1e-3
            what = f"{node.value} replaced by {changed:g}"
            return ast.Constant(changed) if self.here(node, what) else node
        return node


def mutants(path: Path) -> int:
    """Return the number of places of a file that can be changed."""
    counter = Mutator()
    counter.visit(ast.parse(path.read_text()))
    return counter.count


def mutate(path: Path, number: int) -> tuple[str, str]:
    """Return the source code of a mutant, and a description of its change."""
    mutator = Mutator(number)
    tree = mutator.visit(ast.parse(path.read_text()))
    return ast.unparse(ast.fix_missing_locations(tree)), mutator.said


def run_tests(copy: Path, tests: list[str], limit: float) -> bool:
    """Run tests of the copy in a fork; return whether all pass within `limit` seconds."""
    pid = os.fork()
    if not pid:
        os.setsid()
        os.chdir(copy)
        sys.path.remove(str(ROOT / "tests"))  # import test modules from the copy only
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        import pytest

        code = 1
        with contextlib.suppress(BaseException):
            flags = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
            code = pytest.main([*flags, *(f"tests/{test}" for test in tests)])
        os._exit(int(code))
    end = time.monotonic() + limit
    try:
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                pid = 0
                return status == 0
            time.sleep(0.05)
        return False
    finally:
        if pid:  # too slow, or interrupted
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def survivors(name: str, numbers: list[int], copy: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and the description of each mutant that no test detects."""
    target, source = copy / name, ROOT / name
    start = time.monotonic()
    if not run_tests(copy, TESTS[name], 600):
        raise SystemExit(f"{name}: the tests of the unchanged file fail")
    limit = 10 * (time.monotonic() - start) + 10
    for number in numbers:
        text, said = mutate(source, number)
        target.write_text(text)
        if run_tests(copy, TESTS[name], limit):
            yield number, said
    shutil.copy(source, target)


def main() -> None:
    known = ", ".join(TESTS)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", default=list(TESTS), help=f"default: all of {known}")
    parser.add_argument(
        "--sample", type=int, default=40, help="mutants per file, 0 for all (default: 40)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: 0)")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of mutants of one file")
    args = parser.parse_args()
    if unknown := set(args.files) - TESTS.keys():
        parser.error(f"no tests are listed for {', '.join(sorted(unknown))} (choose from {known})")
    import scipy.stats  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    torch.set_num_threads(1)
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = tempfile.gettempdir()
    sys.dont_write_bytecode = True
    total = lost = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "project")
        skipped = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*cache", "results")
        shutil.copytree(ROOT, copy, ignore=skipped)
        for name in args.files:
            count = mutants(ROOT / name)
            numbers = args.only or list(range(count))
            if max(numbers, default=-1) >= count:
                parser.error(f"{name} has the mutants 0 to {count - 1}")
            if args.sample and not args.only and args.sample < count:
                numbers = sorted(random.Random(f"{args.seed} {name}").sample(numbers, args.sample))
            alive = list(survivors(name, numbers, copy))
            total, lost = total + len(numbers), lost + len(alive)
            print(
                f"{name}: {len(numbers) - len(alive)} of {len(numbers)} mutants killed", flush=True
            )
            for number, said in alive:
                print(f"    {number:4} {said}", flush=True)
    print(f"{total - lost} of {total} mutants killed: {100 * (total - lost) / total:.1f} %")


if __name__ == "__main__":
    main()
