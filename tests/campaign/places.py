"""Disks that are full or read-only, no home, the C locale, names with spaces and other letters, and variables that make no sense."""

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.campaign.common import JOBS, Command, files_in, is_told, prepared, problem, shell, table, undisturbed


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[str]:
    "A file system of so many bytes at a folder; where that is not allowed, files of at most as many."
    folder.mkdir(parents=True, exist_ok=True)
    mounted = os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]).returncode == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield "full disk" if mounted else "limit on files"
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def full_disk(work: Path, name: str, size: int) -> tuple:
    "A job whose runs are on a disk that is too small, and its end when there is room again."
    before = prepared(work / str(size), name)
    _, expected, files = undisturbed(work / str(size), name, before)
    project = new = Path(shutil.copytree(before, work / str(size) / "full"))
    with small_disk(project / "runs", size) as how:
        shutil.copytree(before / "runs", project / "runs", dirs_exist_ok=True) if (before / "runs").is_dir() else None
        command = Command(project, *JOBS[name].arguments)
        code, said = command.wait(), command.said
        new = Path(shutil.copytree(project, work / str(size) / "room"))
    again = Command(new, *JOBS[name].arguments)
    same = again.wait() == 0 and JOBS[name].outcome(new) == expected and files_in(new) == files
    told = problem(said) if code else "there was room"
    return f"{name}, {how}, {size // 1024} KiB", code, told.replace(str(work), "…"), same, code in (0, 2) and is_told(told) and same


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    "A folder that cannot be written to, for root neither."
    folder.mkdir(parents=True, exist_ok=True)
    root = os.geteuid() == 0
    if root:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], check=True)
    else:
        folder.chmod(0o555)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True) if root else folder.chmod(0o755)


def read_only_folder(work: Path, name: str) -> tuple:
    "A job whose runs cannot be written."
    project = prepared(work / "read-only", name)
    shutil.rmtree(project / "runs", ignore_errors=True)
    with read_only(project / "runs"):
        command = Command(project, *JOBS[name].arguments)
        code = command.wait()
    told = problem(command.said)
    return f"{name}, read-only runs/", code, told.replace(str(work), "…"), "", code == 2 and is_told(told)


SURROUNDINGS = {  # variables of the environment (None: unset), and the exit code that is right
    "no HOME": ({"HOME": None}, 0), "HOME that is not there": ({"HOME": "/nonexistent"}, 0), "LC_ALL=C": ({"LC_ALL": "C", "LANG": None}, 0),
    "LC_ALL=C, no UTF-8": ({"LC_ALL": "C", "LANG": None, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, 0),
    "KRAUSE_REPRO_DATA is a file": ({"KRAUSE_REPRO_DATA": "settings.ini"}, 0), "WORLD_SIZE=abc": ({"WORLD_SIZE": "abc"}, 2),
    "RANK=x": ({"RANK": "x"}, 2), "WORLD_SIZE=2 alone": ({"WORLD_SIZE": "2"}, 2),
}


def surrounded(before: Path, work: Path, expected: object, title: str) -> tuple:
    "Training in other surroundings."
    variables, right = SURROUNDINGS[title]
    project = Path(shutil.copytree(before, work / title.replace(" ", "_").replace("=", "_")))
    code, said = shell(project, *JOBS["train image"].arguments, **variables)
    same = code == 0 and JOBS["train image"].outcome(project) == expected
    told = problem(said) if code else "trained"
    return title, code, told.replace(str(work), "…"), same if right == 0 else "", code == right and is_told(told) and (same or right != 0)


def campaign(work: Path) -> tuple[str, bool]:
    "The table of places, and whether each went as it should."
    rows = [full_disk(work / name.replace(" ", "-"), name, size) for name, sizes in {
        "train image": (8_192, 65_536, 262_144, 524_288), "train generator": (65_536, 262_144), "train language": (131_072, 524_288),
        "sample": (1_048_576,), "run": (65_536,)}.items() for size in sizes]
    rows += [read_only_folder(work / name.replace(" ", "-"), name) for name in ("train image", "train language", "run")]
    before = prepared(work, "train image")
    _, expected, _ = undisturbed(work, "train image", before)
    rows += [surrounded(before, work, expected, title) for title in SURROUNDINGS]
    odd = prepared(work / "a b  c" / "Größe 模型 'x'", "train image")
    code, said = shell(odd, *JOBS["train image"].arguments)
    same = code == 0 and JOBS["train image"].outcome(odd) == expected
    rows.append(("a path with spaces, quotes and letters of other alphabets", code, "trained" if code == 0 else problem(said), same, same))
    code, said = shell(odd, "data", "mnist", KRAUSE_REPRO_DATA="settings.ini")
    rows.append(("data mnist, KRAUSE_REPRO_DATA is a file", code, problem(said), "", code == 2 and is_told(problem(said))))
    head = ("place", "exit status", "told", "identical in the end", "as it should be")
    return table(head, rows), all(row[-1] for row in rows)
