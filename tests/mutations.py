"""Faults that the tests must find: each is put into a copy of the project, and the tests named beside it are run. Not part of `make test`.

    python -m tests.mutations [--project FOLDER] [--only WORD] [--processes 2]

Prints which faults were found, by which test; the exit status is 1 if one was not. Takes about ten minutes on two cores.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Fault:
    "A change of the source, once in the whole package, and the test files that should notice."

    name: str
    old: str
    new: str
    tests: str  # stems of files in tests/


FAULTS = [
    Fault("window one token too long", "return (age >= 0) & (age < window)", "return (age >= 0) & (age <= window)", "attention"),
    Fault("band lets the next token through", "return (age >= 0) & (age < window)", "return (age >= -1) & (age < window)", "attention"),
    Fault("ties at the k-th place dropped", "survivors = candidates <= candidates.topk(", "survivors = candidates < candidates.topk(",
          "attention"),
    Fault("top-k before the window", "candidates = energy if allowed is None else energy.masked_fill(~allowed, torch.inf)",
          "candidates = energy",
          "attention"),
    Fault("sigma instead of sigma squared", "return sigma.square().clamp_min(smallest)", "return sigma.clamp_min(smallest)", "attention"),
    Fault("softmax scale dropped", "return head_dim**0.5", "return 1.0", "attention"),
    Fault("padding not masked", "return padding if allowed is None else allowed & padding", "return allowed", "attention"),
    Fault("packed sequences see each other", "same = (segment_ids[:, -queries:, None] == segment_ids[:, None])",
          "same = (segment_ids[:, -queries:, None] >= segment_ids[:, None])", "attention"),
    Fault("C++: packed sequences see each other", "starts ? starts[i + offset] : 0", "0", "fast_attention"),
    Fault("ring off by one", "return length - 1 - (length - 1 - slot) % window", "return length - 1 - (length - slot) % window",
          "ring_cache"),
    Fault("gate swapped", "return torch.lerp(krause, standard, share)", "return torch.lerp(standard, krause, share)", "llm_branch"),
    Fault("gate starts the other way", "torch.tensor([math.log(share / (1 - share)), 0.0])",
          "torch.tensor([0.0, math.log(share / (1 - share))])",
          "llm_branch"),
    Fault("seed of the split ignored", "order = torch.randperm(total, generator=torch.Generator().manual_seed(SPLIT_SEED))\n    kept",
          "order = torch.randperm(total)\n    kept", "data"),
    Fault("held-out images trained on", "kept = order[held_out:]", "kept = order", "data"),
    Fault("seed of images ignored", "words = [(int(seed), *map(int, np.atleast_1d(number))) for number in numbers]",
          "words = [(0, *map(int, np.atleast_1d(number))) for number in numbers]", "sampling"),
    Fault("top-k schedule not linear", "round(first + (last - first) * i / max(layers - 1, 1))",
          "round(first + (last - first) * i / layers)",
          "vision_transformer"),
    Fault("post-norm left out", "x = self.norm1(x) if self.post else x", "x = x", "vision_transformer parity"),
    Fault("shift mask left out", "region.unsqueeze(2) != region.unsqueeze(1), -100.0, 0.0",
          "region.unsqueeze(2) != region.unsqueeze(1), 0.0, 0.0",
          "swin parity"),
    Fault("linear attention sees the future", "scores = (query @ key.mT).tril()", "scores = query @ key.mT", "image_transformer"),
    Fault("start token counted twice", "(sums[1:].sum() / (images * (tokens - 1))).item()", "(sums[1:].sum() / (images * tokens)).item()",
          "likelihood"),
    Fault("nats instead of bits", "return nats.cpu() / math.log(2)", "return nats.cpu()", "likelihood"),
    Fault("labels not shifted", "logits, labels = logits[:, :-1], labels[:, 1:]", "logits, labels = logits[:, 1:], labels[:, 1:]",
          "fine_tuning"),
    Fault("a process trains on another's part", "slice(count * rank // processes, count * (rank + 1) // processes)",
          "slice(0, count // processes)", "training"),
    Fault("confidence radius strict", "attended = (distances(x) <= reach)", "attended = (distances(x) < reach)", "dynamics"),
    Fault("cross term of the Fréchet distance", "- 2 * inner).item()", "- inner).item()", "image_generation"),
    Fault("entropy of the wrong sign", "return -torch.xlogy(weights, weights).sum(-1)",
          "return torch.xlogy(weights, weights).sum(-1)", "analysis"),
    Fault("difference the other way round", "[values[0][seed] - values[1][seed] for seed in seeds]",
          "[values[1][seed] - values[0][seed] for seed in seeds]",
          "evaluation"),
    Fault("C++: ties at the k-th place dropped", "const vec weight = x <= row.threshold ?", "const vec weight = x < row.threshold ?",
          "fast_attention"),
]


def place_of(project: Path, fault: Fault) -> Path:
    "The file of the package that has the text of the fault once. Raises `ValueError` if there is none, or more than one."
    places = [path for path in sorted((project / "krause_repro").rglob("*")) if path.suffix in (".py", ".h", ".cpp")
              and path.name != "_modidx.py" and fault.old in path.read_text(encoding="utf-8")]
    if len(places) != 1 or places[0].read_text(encoding="utf-8").count(fault.old) != 1:
        raise ValueError(f"{fault.name}: {fault.old!r} must be in the package once, found in {[path.name for path in places]}")
    return places[0]


def finds(source: Path, fault: Fault) -> str | None:
    "The first test that fails with the fault; None if all pass."
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        project = Path(folder) / "project"
        shutil.copytree(source, project, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "_docs", "_proc", "__pycache__"))
        path = place_of(project, fault)
        path.write_text(path.read_text(encoding="utf-8").replace(fault.old, fault.new), encoding="utf-8")
        files = [f"tests/test_{stem}.py" for stem in fault.tests.split() if (project / f"tests/test_{stem}.py").is_file()]
        environment = os.environ | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        if fault.name.startswith("C++"):  # the changed kernels are compiled into a cache of their own
            environment["XDG_CACHE_HOME"] = folder
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        if done.returncode == 0:
            return None
        if found := re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE):
            return found[1]
        raise RuntimeError(f"{fault.name}: pytest did not run: {(done.stdout + done.stderr)[-500:]}")


def main() -> int:
    "Print a line for each fault, and how many were found."
    parser = argparse.ArgumentParser("python -m tests.mutations", description=__doc__.splitlines()[0])
    parser.add_argument("--project", type=Path, default=ROOT, help="whose package and tests; this project by default")
    parser.add_argument("--only", default="", help="faults with this word in their name")
    parser.add_argument("--processes", type=int, default=2, help="faults tried at the same time")
    given = parser.parse_args()
    faults, missed = [fault for fault in FAULTS if given.only in fault.name], 0
    with ThreadPoolExecutor(given.processes) as pool:
        for fault, test in zip(faults, pool.map(lambda fault: finds(given.project, fault), faults), strict=True):
            print(f"{fault.name:<45} {test or 'NOT FOUND'}", flush=True)
            missed += test is None
    print(f"{len(faults) - missed} of {len(faults)} faults found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
