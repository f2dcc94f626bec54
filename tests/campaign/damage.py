"""Checkpoints, weights, results and data that are cut short, altered or gone: an error that names the file, or the same bits in the end."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from krause_repro.image_files import FASHION_MNIST_FILES, find_source
from krause_repro.records import write_json
from krause_repro.results import load_result
from krause_repro.runs import checkpoints
from krause_repro.tasks import task_of
from tests.campaign.common import JOBS, Command, is_told, prepared, problem, run_of, table, undisturbed


def cut(path: Path) -> None:
    "Half a file."
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    "A file without content."
    path.write_bytes(b"")


def alter(path: Path) -> None:
    "One bit in the middle of a file, whose size and time stay."
    raw, state = bytearray(path.read_bytes()), path.stat()
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


HARMS = {"cut": cut, "empty": empty, "gone": Path.unlink, "altered": alter}
NO_DIGEST = ("recipe.json", "finished.json", "digests.json")  # of a finished run: only their form is checked


def interrupted(work: Path, name: str) -> tuple[Path, object]:
    "A project whose run has all its checkpoints, but no model yet, and the outcome it should come to."
    before = prepared(work, name)
    _, expected, _ = undisturbed(work, name, before)
    project = Path(shutil.copytree(work / f"{name.replace(' ', '-')}-undisturbed", work / f"{name.replace(' ', '-')}-interrupted"))
    run = run_of(project, JOBS[name].arguments[1])
    for file in ("finished.json", "digests.json", *task_of(run.recipe).files):
        (run.path / file).unlink()
    return project, expected


def try_file(project: Path, name: str, place: Callable[[Path], Path], how: str, expected: object) -> tuple:
    "Damage a file and give the command again."
    copy = Path(shutil.copytree(project, project.with_name("damaged")))
    path = place(copy)
    HARMS[how](path)
    command = Command(copy, *JOBS[name].arguments)
    code, told = command.wait(), command.said
    listed = path.parent.name if path.name == "digests.json" and how == "altered" else path.name  # then a file that it lists is named
    what, named = "/".join(path.parts[-2:]), listed in told
    if code == 0:
        came, good = "the same bits", named and JOBS[name].outcome(copy) == expected
        came = came if good else "OTHER BITS" if named else "NOT A WORD"
    else:
        came, good = f"error: {problem(told)}".replace(str(copy.parent), "…"), code == 2 and named and is_told(problem(told))
    shutil.rmtree(copy)
    return name, what, how, came, good


def checkpoint_rows(work: Path, name: str) -> list[tuple]:
    "Every file of the newest checkpoint of a run."
    project, expected = interrupted(work, name)
    inside = run_of(project, JOBS[name].arguments[1]).path.relative_to(project) / "checkpoints"
    newest = checkpoints(project / inside)[0]
    return [try_file(project, name, lambda copy, file=file: copy / inside / newest.name / file.name, how, expected)
            for file in sorted(newest.iterdir()) if file.name not in ("training_args.bin", "README.md") for how in HARMS]


def finished_rows(work: Path, name: str) -> list[tuple]:
    "Every file of a finished run that decides."
    project = work / f"{name.replace(' ', '-')}-undisturbed"
    run = run_of(project, JOBS[name].arguments[1])
    inside, expected = run.path.relative_to(project), JOBS[name].outcome(project)
    return [try_file(project, name, lambda copy, file=file: copy / inside / file, how, expected)
            for file in (*task_of(run.recipe).files, *NO_DIGEST) for how in HARMS
            if (file, how) not in (("finished.json", "gone"), ("digests.json", "gone"))  # an unfinished run, and one of an earlier version
            and (how != "altered" or file not in NO_DIGEST)]


def result_rows(work: Path) -> list[tuple]:
    "A file of results."
    rows = []
    for how in ("cut", "empty", "gone"):
        path = write_json(work / "results" / "smoke" / "example.json", {"profile": "smoke", "numbers": [1, 2]})
        HARMS[how](path)
        try:
            load_result("example", "smoke", work)
            came, good = "READ", False
        except (ValueError, FileNotFoundError) as error:
            came, good = f"error: {error}".replace(str(work), "…"), str(path) in str(error)
        rows.append(("results", path.name, how, came, good))
    return rows


def data_rows(work: Path) -> list[tuple]:
    "Files of Fashion-MNIST, for which each command has a recipe."
    project, found, rows = prepared(work / "damaged data", "train image"), find_source("fashion_mnist"), []
    for stem in FASHION_MNIST_FILES:
        for how in HARMS:
            folder = Path(shutil.copytree(found, work / "data", dirs_exist_ok=True))
            path = next(path for path in folder.iterdir() if path.name.removesuffix(".gz") == stem)
            HARMS[how](path)
            command = Command(project, "train", "kvit_t/fashion_mnist", "--profile", "smoke", "--source", str(folder))
            code, told = command.wait(), problem(command.said)
            good = code == 2 and stem in told and is_told(told) and not (project / "runs").exists()
            rows.append(("data", path.name, how, f"error: {told}".replace(str(work), "…"), good))
            shutil.rmtree(folder)
    return rows


def campaign(work: Path) -> tuple[str, bool]:
    "The table of damages, and whether each was told or made good."
    rows = []
    for name in ("train image", "train generator", "train language"):
        rows += checkpoint_rows(work, name) + finished_rows(work, name)
        print(f"  {name}", flush=True)
    rows += result_rows(work) + data_rows(work)
    return table(("of", "file", "damage", "what came", "as it should be"), rows) + json.dumps({"cases": len(rows)}) + "\n", all(
        row[-1] for row in rows)
