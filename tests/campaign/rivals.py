"""Several processes on one directory: one works, the others are told which, and the outcome is that of one process alone."""

import shutil
from pathlib import Path

from krause_repro.records import machine
from tests.campaign.common import JOBS, Command, files_in, prepared, problem, table, undisturbed


def rival_job(work: Path, name: str, count: int) -> tuple:
    "Start a job several times at once."
    before = prepared(work, name)
    _, expected, files = undisturbed(work, name, before)
    project = Path(shutil.copytree(before, work / f"{name.replace(' ', '-')}-rivals"))
    commands = [Command(project, *JOBS[name].arguments) for _ in range(count)]
    codes = [command.wait() for command in commands]
    pids = {command.pid for command in commands}
    told = [problem(command.said) for command in commands if command.code == 2]
    named = sum(f"on {machine()}" in each and any(f"process {pid} " in each for pid in pids) for each in told)
    late = sum("finished by another process" in each for each in told)
    same = JOBS[name].outcome(project) == expected
    good = same and codes.count(0) >= 1 and named + late == codes.count(2) == count - codes.count(0) and files_in(project) == files
    return name, count, codes.count(0), codes.count(2), named + late, same, len(files_in(project) - files), good


def campaign(work: Path, count: int = 3) -> tuple[str, bool]:
    "The table of jobs that write to a directory of their own, and whether all went well."
    rows = [rival_job(work, name, count) for name in JOBS if name.startswith(("train", "sample"))]
    head = ("command", "processes", "worked", "refused", "refused with process and host", "identical", "files left over")
    return table(head, [row[:-1] for row in rows]), all(row[-1] for row in rows)
