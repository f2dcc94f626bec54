"""What the parts of the campaign share: a project folder of its own, tiny recipes, and commands in processes of their own."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from krause_repro.cli import main
from krause_repro.recipe_base import Recipe
from krause_repro.recipes import RECIPES, get_recipe
from krause_repro.runs import Run, run_path
from krause_repro.tasks import task_of
from tests.test_language_data import byte_tokenizer

ROOT = Path(__file__).parents[2]  # of the repository
SMALL = {"train_images": 99, "held_out": 40, "test_images": 30, "batch_size": 16, "epochs": 6}
LLAMA = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256}


def register() -> dict[str, Recipe]:
    "Let the commands know three tiny recipes; the base of the language model is in the project's folder, where they run."
    language = replace(get_recipe("krause_smollm2/questions").at("smoke"), base="base", base_layers=None, dataset="flan",
                       train_items=19, held_out=4, epochs=2, max_length=64, window=8, top_k=4, lora_dropout=0.0)
    tiny = {
        "tiny/image": replace(get_recipe("vit_t/digits").at("smoke"), score="krause", radius=1, norm="post", drop_path=0.0, **SMALL),
        "tiny/generator": replace(get_recipe("karm/digits").at("smoke"), dropout=0.0, **SMALL),
        "tiny/language": language,
    }
    tiny = {name: replace(recipe, name=name) for name, recipe in tiny.items()}
    RECIPES.update(tiny)
    return tiny


def notebook(title: str, *cells: str) -> dict:
    "A page of the book; its second cell holds parameters."
    code = [{"cell_type": "code", "execution_count": None, "id": f"0000000{place}", "outputs": [], "source": cell.splitlines(keepends=True),
             "metadata": {"tags": ["parameters"]} if place == 1 else {}} for place, cell in enumerate(cells, 1)]
    head = {"cell_type": "markdown", "id": "00000000", "metadata": {}, "source": [f"# {title}\n", "\n", "> A page of the campaign."]}
    metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    return {"cells": [head, *code], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


PAGES = {
    "20_first": notebook("First", "", "import time\nfrom krause_repro.statistics import summarise",
                         "time.sleep(0.5)\nsummarise([1, 2, 4])"),
    "61_second": notebook(
        "Second", 'profile = "desk"\ntrain = "never"', "from krause_repro.results import load_or_compute",
        'load_or_compute("second", profile, train, [], lambda: {"numbers": list(range(1000))})["numbers"][:3]'),
}


def new_project(folder: Path) -> Path:
    "A project with a language model, items to tune it on, and two pages."
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "settings.ini", folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    lines = [{"inputs": f"{i} + {i}?", "targets": str(2 * i) * (1 + i % 3)} for i in range(24)]
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "nbs").mkdir()
    for stem, page in PAGES.items():
        (folder / "nbs" / f"{stem}.ipynb").write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    return folder


# Commands


class Command:
    "`krause-repro` with some arguments, in a process that has everything imported already."

    def __init__(self, project: Path, *arguments: str):
        self.log = project.with_name(f"{project.name}-{time.monotonic_ns()}.log")
        self.start, self.pid, self.code = time.monotonic(), os.fork(), None
        if self.pid == 0:
            self._run(project, arguments)

    def _run(self, project, arguments):
        with open(self.log, "w", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
        code = 70  # not one of the command's own
        try:
            os.chdir(project)
            register()
            code = main(list(arguments))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float = 600.0) -> int | None:
        "The exit code, or None if it still runs after so many seconds; killed by a signal: its number below 0."
        deadline = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code, self.seconds = os.waitstatus_to_exitcode(status), time.monotonic() - self.start
            elif time.monotonic() > deadline:
                return None
            else:
                time.sleep(0.002)
        return self.code

    def kill(self) -> bool:
        "Kill it as the operating system would for want of memory; False if it has ended by itself."
        if self.wait(0) is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.wait() == -signal.SIGKILL

    @property
    def said(self) -> str:
        "All it has written."
        return self.log.read_text(encoding="utf-8", errors="replace")


def shell(project: Path, *arguments: str, launcher: tuple[str, ...] = (), **variables: str | None) -> tuple[int, str]:
    "The same in a new interpreter with other environment variables (None: without), and its exit code and output."
    wanted = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", **variables}
    environment = {name: value for name, value in (os.environ | wanted).items() if value is not None}
    command = [sys.executable, *launcher, "-m", "tests.campaign.command", *arguments]
    done = subprocess.run(command, cwd=project, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    return done.returncode, (done.stdout + done.stderr).decode("utf-8", "replace")


def problem(said: str) -> str:
    "The one line of an error, if it is one line and no traceback; else what is wrong."
    errors = [line for line in said.splitlines() if line.startswith("krause-repro: error: ")]
    if "Traceback" in said or len(errors) != 1:
        return "TRACEBACK" if "Traceback" in said else f"{len(errors)} ERRORS"
    return errors[0].removeprefix("krause-repro: error: ")


def is_told(said: str) -> bool:
    "Is it an error in one line, as `problem` returns it?"
    return said.isprintable() and not said.endswith(("TRACEBACK", "ERRORS"))


# Jobs


def run_of(project: Path, name: str) -> Run:
    "The run of a tiny recipe."
    recipe = register()[name]
    return Run(run_path(recipe, 0, project / "runs"), recipe, 0)


def weights_of(project: Path, name: str) -> object:
    "Digest of a run's weights, and what was logged, without what depends on the clock."
    run = run_of(project, name)
    file = next(run.path / each for each in task_of(run.recipe).files if each.endswith(".safetensors"))
    chosen = {k: v for k, v in run.summary().items() if k.startswith(("held_out", "chosen", "steps"))}
    told = {(line["step"], k): v for line in run.metrics() for k, v in line.items() if k.startswith("eval_") or k == "loss"}
    told = {key: value for key, value in told.items() if not key[1].endswith(("runtime", "_per_second"))}
    return hashlib.sha256(file.read_bytes()).hexdigest(), chosen, told


def images_of(project: Path) -> object:
    "Digest of the images of a run, in order."
    files = sorted((run_of(project, "tiny/generator").path / "samples").rglob("images-*.safetensors"))
    return hashlib.sha256(torch.cat([load_file(file)["images"] for file in files])[:24].numpy().tobytes()).hexdigest()


def pages_of(folder: Path) -> object:
    "Sources and outputs of executed pages."
    books = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.ipynb"))}
    return {name: [(cell["source"], [{**each, "metadata": {}} for each in cell.get("outputs", [])]) for cell in book["cells"]]
            for name, book in books.items()}


def run_results(project: Path) -> object:
    "What a run of the book leaves: pages and results, without clock and commit."
    result = json.loads((project / "results" / "smoke" / "second.json").read_text(encoding="utf-8"))
    site = project / "runs" / "smoke" / "site"
    return pages_of(site / "notebooks"), result["numbers"], sorted(path.name for path in site.glob("*.html"))


@dataclass(frozen=True)
class Job:
    "A command, what comes out of it, and what has to be there before."

    arguments: tuple[str, ...]
    outcome: Callable[[Path], object]
    before: tuple[tuple[str, ...], ...] = ()


def train_job(name: str, *more: str) -> Job:
    "Training of a tiny recipe."
    return Job(("train", name, "--profile", "smoke", *more), lambda project: weights_of(project, name))


JOBS = {
    "train image": train_job("tiny/image"), "train generator": train_job("tiny/generator"),
    "train language": train_job("tiny/language", "--source", "items.jsonl"),
    "sample": Job(("sample", "tiny/generator", "--profile", "smoke", "--images", "24", "--batch", "3"), images_of,
                  (("train", "tiny/generator", "--profile", "smoke"),)),
    "run": Job(("run", "--profile", "smoke"), run_results),
    "book": Job(("book", "--only", "20"), lambda project: (project / "nbs" / "20_first.ipynb").read_bytes()),
}


def files_in(project: Path) -> set[str]:
    "Names of all files of a project, without those of Python."
    return {path.relative_to(project).as_posix() for path in project.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def prepared(work: Path, name: str) -> Path:
    "A project in which a job can begin."
    project = new_project(work / f"{name.replace(' ', '-')}-before")
    for arguments in JOBS[name].before:
        command = Command(project, *arguments)
        assert command.wait() == 0, command.said
    return project


def undisturbed(work: Path, name: str, before: Path) -> tuple[float, object, set[str]]:
    "Seconds, outcome and files of a job that nothing disturbs."
    project = Path(shutil.copytree(before, work / f"{name.replace(' ', '-')}-undisturbed"))
    command = Command(project, *JOBS[name].arguments)
    assert command.wait() == 0, command.said
    return command.seconds, JOBS[name].outcome(project), files_in(project)


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    "Rows as a table in Markdown."
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines) + "\n"
