"""The campaign: kills and faults that a maintainer tries by hand, from the repository's folder.

    python -m tests.campaign [kills] [rivals] [places] [damage] [processes] [--kills 10] [--seed 0]

Each part prints a table; the exit status is 1 if anything was lost. Everything happens in a temporary folder. Root may mount small disks
for `places`; others get limits on the size of files instead. All of it takes about half an hour on two cores. Not part of `make test`.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    "What is to be tried."
    parser = argparse.ArgumentParser("python -m tests.campaign", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="kills, rivals, places, damage or processes; all if none is named")
    parser.add_argument("--kills", type=int, default=10, help="SIGKILLs of each of six commands")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args(arguments)
    known = ("kills", "rivals", "places", "damage", "processes")
    if unknown := [part for part in given.parts if part not in known]:
        parser.error(f"unknown part {unknown[0]!r}; known: {', '.join(known)}")
    given.parts = given.parts or list(known)
    return given


def run(given: argparse.Namespace) -> int:
    "Try it, and print the tables."
    sys.path.insert(0, str(Path(__file__).parents[1]))  # where the tests find one another's helpers, as under pytest
    from tests.campaign import damage, kills, places, processes, rivals

    torch.set_num_threads(1)  # before any work: the processes are forks of this one
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    campaigns = {"kills": lambda work: kills.campaign(work, given.kills, given.seed), "rivals": rivals.campaign, "places": places.campaign,
                 "damage": damage.campaign, "processes": processes.campaign}
    whole = True
    for part in given.parts:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="campaign-") as work:
            found, good = campaigns[part](Path(work))
        how = "as it should be" if good else "NOT AS IT SHOULD BE"
        print(f"\n## {part}: {how}, {time.monotonic() - start:.0f} s\n\n{found}", flush=True)
        whole &= good
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(run(parse()))
