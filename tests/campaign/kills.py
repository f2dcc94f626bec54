"""SIGKILL at random moments, again and again; continued, a command must end with the same bits as one that was never disturbed."""

import random
import shutil
from pathlib import Path

from tests.campaign.common import JOBS, Command, files_in, prepared, table, undisturbed


def kill_job(work: Path, name: str, wanted: int, draw: random.Random) -> tuple:
    "Kill a job so many times, in rounds of one to four kills, and continue it at the end of each round."
    before = prepared(work, name)
    seconds, expected, files = undisturbed(work, name, before)
    kills = rounds = resumed = same = 0
    leftovers, lost = set(), []
    while kills < wanted:
        project, rounds = Path(shutil.copytree(before, work / f"{name.replace(' ', '-')}-{rounds}")), rounds + 1
        for _ in range(draw.randint(1, 4)):
            command = Command(project, *JOBS[name].arguments)
            command.wait(draw.uniform(0, 1.1 * seconds))
            kills += command.kill()
        command = Command(project, *JOBS[name].arguments)
        resumed += command.wait() == 0
        same += command.code == 0 and JOBS[name].outcome(project) == expected
        if command.code != 0 or JOBS[name].outcome(project) != expected:
            lost.append(command.said)
        leftovers |= files_in(project) - files
        shutil.rmtree(project)
    for said in lost:
        print(said)
    return name, kills, rounds, f"{resumed} of {rounds}", f"{same} of {rounds}", len(leftovers), ", ".join(sorted(leftovers)[:3]), not lost


def campaign(work: Path, kills: int, seed: int) -> tuple[str, bool]:
    "The table of all jobs, and whether nothing was lost."
    rows = []
    for name in JOBS:
        rows.append(kill_job(work, name, kills, random.Random(f"{seed} {name}")))
        print(f"  {name}: {rows[-1][1]} kills", flush=True)
    head = ("command", "kills", "rounds", "resumed", "identical", "files left over", "such as")
    return table(head, [row[:-1] for row in rows]), all(row[-1] and not row[5] for row in rows)
