"""Two processes of a launcher must come to the weights of one, whether batches can be divided or not.

They train in float64. Two processes add up a batch in another order, and Adam divides by the size of a gradient: where that is almost
zero, float32 rounding alone moves a weight by 3e-6 in a few steps. In float64 only a wrong weight of an example could.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from krause_repro.recipes import RECIPES
from krause_repro.runs import run_path
from krause_repro.tasks import TASKS, task_of
from tests.campaign.common import new_project, register, shell, table

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
COUNTS = {"tiny/image": (96, 99, 97), "tiny/generator": (96, 99, 97), "tiny/language": (16, 18, 17)}  # a batch has 16, or 4


def compare(work: Path, name: str, count: int) -> tuple:
    "Train with so many examples by one process and by two."
    projects, codes = [], []
    for processes in (1, 2):
        projects.append(new_project(work / f"{name.replace('/', '-')}-{count}-{processes}"))
        more = ("--source", "items.jsonl") if "language" in name else ()
        launcher = LAUNCHER if processes > 1 else ()
        code, said = shell(projects[-1], "train", name, "--profile", "smoke", *more, launcher=launcher, CAMPAIGN_EXAMPLES=str(count),
                           CAMPAIGN_DOUBLE="1")
        codes.append(code)
        if code:
            print(said)
    recipe = sized(register(), count)[name]
    file = next(each for each in task_of(recipe).files if each.endswith(".safetensors"))
    found = [load_file(run_path(recipe, 0, project / "runs") / file) for project in projects] if codes == [0, 0] else [{}, {}]
    apart = max(((found[0][key] - found[1][key]).abs().max().item() for key in found[0]), default=float("nan"))
    return name, count, recipe.batch_size, codes, f"{apart:.1e}", apart <= 1e-9


def sized(recipes: dict, count: int) -> dict:
    "The tiny recipes with so many examples to train on, in place of those that are registered."
    fields = {name: "train_items" if "language" in name else "train_images" for name in recipes}
    changed = {name: replace(recipe, **{fields[name]: count}) for name, recipe in recipes.items()}
    RECIPES.update(changed)
    return changed


class DoubleCollator:
    "A collator whose real numbers are float64."

    def __init__(self, collator: Callable):
        self.collator = collator

    def __call__(self, examples: list) -> dict[str, Tensor]:
        return {name: each.double() if each.is_floating_point() else each for name, each in self.collator(examples).items()}


def in_double() -> None:
    "Let every task train in float64."
    for kind, task in TASKS.items():
        TASKS[kind] = replace(
            task, build=lambda recipe, build=task.build: build(recipe).double(),
            collators=lambda *given, collators=task.collators: tuple(map(DoubleCollator, collators(*given))))


def campaign(work: Path) -> tuple[str, bool]:
    "The table of distances, and whether all are small."
    rows = [compare(work, name, count) for name, counts in COUNTS.items() for count in counts]
    return table(("recipe", "examples", "global batch", "exit status", "largest distance of a weight", "as it should be"), rows), all(
        row[-1] for row in rows)
