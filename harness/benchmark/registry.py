"""The one list of what the benchmark measures: the perturbations, their groups and their tables."""

import difflib
import re
from collections.abc import Iterable
from typing import NamedTuple

from corruptions import ALL_CORRUPTIONS, CORRUPTIONS, VALIDATION_CORRUPTIONS
from harness.benchmark.attack_registry import ATTACKS, Attack, load_attack
from harness.benchmark.checks import CHECKS, broken_gradients
from harness.errors import UserError

CHECK = "check_"  # prefix of the attack checks' names
SUPPLEMENT = "cw2_0"  # CW2 at confidence 0, the smallest step; --attack and --epsilon add others
SUPPLEMENT_ROUNDS = 4  # of its bisection, which finds a step of about the smallest length
SAMPLE = 200  # images that the attack checks and the supplement take


class Perturbation(NamedTuple):
    """A row of the registry."""

    group: str  # a name for --only and --skip
    severities: tuple[int | None, ...] = (None,)
    column: str = ""  # heading in `TABLES`; empty for what stands in none of them
    attack: Attack | None = None  # None for corruptions and clean images
    sampled: bool = False  # whether it is measured on `SAMPLE` images instead of all

    @property
    def box(self) -> str:
        """White-box (by the model's own gradient), black-box (by the surrogate's), or empty."""
        return self.attack.box if self.attack else ""


def _register() -> dict[str, Perturbation]:
    """List all perturbations in the order in which they are measured; clean images come first."""
    rows = {"clean": Perturbation("clean")}
    for name, corruption in ALL_CORRUPTIONS.items():
        # The paper draws the strength of its own four corruptions for every image.
        severities = (None,) if corruption.family == "paper" else corruption.severities
        rows[name] = Perturbation(corruption.family, severities, corruption.column)
    for name, attack in ATTACKS.items():
        if name == "cw2":
            # For an accuracy it need not search the nearest image: one round tells what it reaches.
            attack = attack._replace(keywords=attack.keywords | {"rounds": 1})
        rows[name] = Perturbation(attack.box, column=attack.column, attack=attack)
    for name, attack in {"clean": Attack(broken_gradients, {}, random=False), **CHECKS}.items():
        rows[CHECK + name] = Perturbation("checks", attack=attack, sampled=True)
    settings = ATTACKS["cw2"].keywords | {"confidence": 0.0, "rounds": SUPPLEMENT_ROUNDS}
    smallest = ATTACKS["cw2"]._replace(keywords=settings)
    rows[SUPPLEMENT] = Perturbation("supplement", attack=smallest, sampled=True)
    return rows


PERTURBATIONS = _register()
GROUPS: dict[str, list[str]] = {}  # what --only and --skip can name, in the order of the work
for _name, _entry in PERTURBATIONS.items():
    GROUPS.setdefault(_entry.group, []).append(_name)
del GROUPS["clean"]  # always measured
TABLES = {  # title -> perturbations, in the paper's order
    "ImageNet-C's corruptions": [n for n, c in CORRUPTIONS.items() if c.family != "paper"],
    "The paper's corruptions": [n for n, c in CORRUPTIONS.items() if c.family == "paper"],
    "Adversarial attacks": list(ATTACKS),
    "ImageNet-C's validation corruptions": list(VALIDATION_CORRUPTIONS),
}
COLUMNS = {name: PERTURBATIONS[name].column for names in TABLES.values() for name in names}


def supplementary(attacks: list[str], epsilons: list[float], seed: int) -> dict[str, Perturbation]:
    """List what --attack and --epsilon add to the paper's attacks.

    Args:
        attacks: `NAME=module:callable` each, see `load_attack`.
        epsilons: values of epsilon for PGD, PGD LL and MI-FGSM. They name the rows, as 0.02 names
            pgd_0.02: the paper's epsilon gives the name of the paper's row.
        seed: for the attacks of others.

    Raises:
        UserError: a name is taken or malformed, or the attack cannot be imported.
    """
    rows = {}
    for epsilon in epsilons:
        for name, attack in ATTACKS.items():
            if "epsilon" in attack.keywords:
                attack = attack._replace(keywords=attack.keywords | {"epsilon": epsilon})
                name = f"{name.rpartition('_')[0]}_{epsilon}"
                rows[name] = Perturbation("supplementary", attack=attack)
    for text in attacks:
        name, _, spec = text.partition("=")
        if not re.fullmatch(r"[\w.+-]+", name) or not re.fullmatch(r"[^:]+:[^:]+", spec):
            raise UserError(f"--attack {text}: write NAME=module:callable")
        if name in PERTURBATIONS or name in GROUPS or name in rows or name.startswith(CHECK):
            raise UserError(f"--attack {text}: the name {name} is taken; choose another")
        rows[name] = Perturbation("supplementary", attack=load_attack(name, spec, seed))
    return rows


def _similar(word: str, known: Iterable[str]) -> str:
    """List the names that contain a word, also in their headings, or else similar ones."""
    plain = word.lower().replace("-", "_").replace(" ", "_")
    titles = {name: COLUMNS.get(name, "").lower().replace(" ", "_") for name in known}
    found = [name for name, title in titles.items() if plain in name or plain in title]
    found = found[:5] or difflib.get_close_matches(plain, titles, 3)
    return f"close names: {', '.join(found)}" if found else f"groups: {', '.join(GROUPS)}"


def choose_perturbations(only: list[str], skip: list[str]) -> list[str]:
    """Choose what to measure, in order; clean images are always the first.

    Args:
        only: names and groups to measure; empty for all but the validation corruptions, on which
            hyper-parameters may be tuned. "clean" measures clean accuracy alone. A white-box
            attack brings the attack checks with it, and CW2 the supplement.
        skip: names and groups to leave out; the checks go with the last white-box attack, and the
            supplement with CW2.

    Raises:
        UserError: an unknown name, or nothing is left.
    """
    known = {**GROUPS, **{name: [name] for names in GROUPS.values() for name in names}}
    known["clean"] = ["clean"]
    for word in [*only, *skip]:
        if word not in known:
            raise UserError(f"{word!r} is not a perturbation or a group; {_similar(word, known)}")
    if "clean" in skip:
        raise UserError("--skip clean: R is relative to clean accuracy, which is always measured")
    named = {name for word in only for name in known[word]}
    left_out = {name for word in skip for name in known[word]}
    default = {name for group in GROUPS if group != "validation" for name in GROUPS[group]}
    wanted = (named or default) - left_out
    for attacks, group in ((GROUPS["white-box"], "checks"), (["cw2"], "supplement")):
        added = set(GROUPS[group])
        if wanted & set(attacks):
            wanted |= added
        else:
            wanted -= added - named
    wanted -= left_out
    if not wanted:
        raise UserError(
            "--only and --skip leave nothing to measure: skip less, or give --only clean for clean"
            " accuracy alone"
        )
    return [name for name in PERTURBATIONS if name in wanted | {"clean"}]
