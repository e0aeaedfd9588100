"""Break the project's mathematics in one place at a time, and see whether a test fails.

    python tests/mutate.py                                # 40 mutants of each file: hours
    python tests/mutate.py mtlat.py --sample 0            # every mutant of one file
    python tests/mutate.py attacks.py --only 17 130       # these two again

A mutant has one operator, comparison, constant, condition or statement changed; not in an
annotation, a string, a decorator or an error. It is written into a copy of the project, where the
file's own tests run until one fails, in a process forked from this one, which has imported what
takes long. A mutant that runs for ten times as long as the unbroken file counts as found. What
survives is printed, to be answered by a test or, where nothing is changed that can be seen, by a
line in results/mutation.md.
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
CORRUPTION_TESTS = ["test_corruptions.py", "test_corruptions_statistics.py"]
PIXEL_TESTS = ["test_parameters.py", "test_oracle_noise_digital.py", *CORRUPTION_TESTS]
SCENE_TESTS = ["test_parameters.py", "test_blur_weather.py", "test_oracle_blur_weather.py"]
TESTS = {  # of each file, the quickest to find a fault first
    "mtlat.py": ["test_mtlat.py", "test_mtlat_model.py"],
    "methods.py": ["test_train.py"],
    "attacks.py": ["test_attacks.py", "test_attacks_contract.py"],
    "sanity.py": ["test_sanity.py", "test_evaluate.py"],
    "report.py": ["test_report.py", "test_evaluate_cli.py"],
    "corruptions/__init__.py": CORRUPTION_TESTS,
    "corruptions/rng.py": ["test_rng.py", *CORRUPTION_TESTS],
    "corruptions/noise.py": PIXEL_TESTS,
    "corruptions/digital.py": PIXEL_TESTS,
    "corruptions/jpeg.py": PIXEL_TESTS,
    "corruptions/blur.py": SCENE_TESTS,
    "corruptions/weather.py": SCENE_TESTS,
    "corruptions/frost.py": SCENE_TESTS,
    "corruptions/geometric.py": ["test_geometric.py", *CORRUPTION_TESTS],
    "corruptions/calibration.py": ["test_geometric.py"],
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
    """Changes the `wanted`th place of a tree; with None, counts the places."""

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

    visit_JoinedStr = visit_Raise = skip  # messages have tests of their own

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
            if deletable and self.here(statement, f"without {ast.unparse(statement)[:60]!r}"):
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
        return other() if self.here(node, f"{old} to {other.__name__}") else operator

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        node.op = self.swap(node, node.op)
        return self.generic_visit(node)

    visit_AugAssign = visit_BoolOp = visit_BinOp

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        node.ops = [self.swap(node, operator) for operator in node.ops]
        return self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        if self.here(node, f"without {type(node.op).__name__}"):
            return node.operand
        return self.generic_visit(node)

    def visit_If(self, node: ast.If | ast.IfExp) -> ast.AST:
        if self.here(node, f"not {ast.unparse(node.test)[:60]}"):
            node.test = ast.UnaryOp(ast.Not(), node.test)
        return self.generic_visit(node)

    visit_IfExp = visit_If

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, bool):
            return ast.Constant(not node.value) if self.here(node, f"not {node.value}") else node
        if isinstance(node.value, int | float):
            changed = node.value + 1 if isinstance(node.value, int) else 1.1 * node.value + 1e-3
            return (
                ast.Constant(changed) if self.here(node, f"{node.value} to {changed:g}") else node
            )
        return node


def mutants(path: Path) -> int:
    """How many places of a file can be changed."""
    counter = Mutator()
    counter.visit(ast.parse(path.read_text()))
    return counter.count


def mutate(path: Path, number: int) -> tuple[str, str]:
    """The text of a mutant, and what is different in it."""
    mutator = Mutator(number)
    tree = mutator.visit(ast.parse(path.read_text()))
    return ast.unparse(ast.fix_missing_locations(tree)), mutator.said


def run_tests(copy: Path, tests: list[str], limit: float) -> bool:
    """Whether these tests pass in the copy, in a forked process that ends after `limit` seconds."""
    pid = os.fork()
    if not pid:
        os.setsid()
        os.chdir(copy)
        sys.path.remove(str(ROOT / "tests"))  # whose modules are to come from the copy
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
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def survivors(name: str, numbers: list[int], copy: Path) -> Iterator[tuple[int, str]]:
    """The mutants of a file that no test notices."""
    target, source = copy / name, ROOT / name
    start = time.monotonic()
    if not run_tests(copy, TESTS[name], 600):
        raise SystemExit(f"{name}: its tests fail without any change")
    limit = 10 * (time.monotonic() - start) + 10
    for number in numbers:
        text, said = mutate(source, number)
        target.write_text(text)
        if run_tests(copy, TESTS[name], limit):
            yield number, said
    shutil.copy(source, target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", default=list(TESTS), help=", ".join(TESTS))
    parser.add_argument("--sample", type=int, default=40, help="mutants of each file; 0: all (40)")
    parser.add_argument("--seed", type=int, default=0, help="that draws the sample (0)")
    parser.add_argument("--only", type=int, nargs="+", help="these mutants of one file")
    args = parser.parse_args()
    if unknown := set(args.files) - TESTS.keys():
        parser.error(f"no tests are known for {', '.join(unknown)}; known: {', '.join(TESTS)}")
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
            if args.sample and not args.only and args.sample < count:
                numbers = sorted(random.Random(f"{args.seed} {name}").sample(numbers, args.sample))
            alive = list(survivors(name, numbers, copy))
            total, lost = total + len(numbers), lost + len(alive)
            print(f"{name}: {len(numbers) - len(alive)} of {len(numbers)} found", flush=True)
            for number, said in alive:
                print(f"    {number:4} {said}", flush=True)
    print(f"{total - lost} of {total} mutants found: {100 * (total - lost) / total:.1f} %")


if __name__ == "__main__":
    main()
