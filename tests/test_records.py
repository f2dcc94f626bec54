"""Files are whole or absent, results know what they were made with, and nothing is made in silence."""

import csv
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import krause_repro
from krause_repro.checks import UserError, check_train
from krause_repro.recipes import get_recipe
from krause_repro.records import (
    InUse,
    atomic_write,
    cache_folder,
    check_unlocked,
    check_writable,
    damage,
    disk_error,
    environment,
    git_state,
    lock_path,
    locked,
    machine,
    package_versions,
    project_root,
    read_json,
    remove_leftovers,
    scratch_folder,
    write_digests,
    write_json,
)
from krause_repro.results import (
    load_or_compute,
    load_result,
    result_path,
    save_result,
    stale_recipes,
    table_lines,
    write_table,
)
from krause_repro.statistics import summarise, summarise_curves

ROOT = Path(__file__).resolve().parents[1]
FORK = multiprocessing.get_context("fork")  # a process that has everything imported already
SMOKE = [get_recipe(name).at("smoke") for name in ("kvit_t/fashion_mnist", "vit_t/fashion_mnist")]


class Maker:
    "Makes a new number each time it is called."

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"number": self.calls}


def obtain(train, make, root, recipes=SMOKE):
    "The result of an experiment named `example` under smoke."
    return load_or_compute("example", "smoke", train, recipes, make, root)


def fail(*_, **__):
    raise OSError(28, "No space left on device")


# Whole or absent


def test_json_goes_round(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": {"text": "σ ≈ 2,5\n"}}
    path = write_json(tmp_path / "new" / "folder" / "file.json", value)
    assert path == tmp_path / "new" / "folder" / "file.json" and read_json(str(path)) == value
    assert path.read_text(encoding="utf-8").endswith("}\n") and path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]
    assert len(write_json(path, value, indent=None).read_text(encoding="utf-8").splitlines()) == 1


@pytest.mark.parametrize("earlier", [None, {"number": 1}])
@pytest.mark.parametrize("breaks", ["replace", "chmod", "write_text"])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, earlier, breaks):
    path = tmp_path / "file.json"
    if earlier:
        write_json(path, earlier)
    monkeypatch.setattr(Path if breaks == "write_text" else os, breaks, fail)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"number": 2})
    assert [p.name for p in tmp_path.iterdir()] == (["file.json"] if earlier else [])
    assert not earlier or read_json(path) == earlier


@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": [1, -math.inf]}, {"a": object()}, {"a": {1, 2}}])
def test_what_json_cannot_say_is_refused(tmp_path, value):
    path = write_json(tmp_path / "file.json", 1)
    with pytest.raises((ValueError, TypeError), match="JSON"):
        write_json(path, value)
    assert read_json(path) == 1 and len(list(tmp_path.iterdir())) == 1


def test_replacing_cleans_up_whatever_happens(tmp_path):
    path = tmp_path / "file.txt"
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(path) as temporary:
            temporary.write_text("half", encoding="utf-8")
            assert temporary.parent == tmp_path and not path.exists()
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with atomic_write(path) as temporary:
        temporary.write_text("whole", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "whole" and list(tmp_path.iterdir()) == [path]


def dead_process():
    "The number of a process that is no more."
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_killed_processes_left_is_removed_by_the_next_write(tmp_path):
    ours = f"{os.getpid()}"
    with atomic_write(tmp_path / "a.json") as temporary:
        mark = temporary.name.removeprefix(".a.json.").partition(".")[0]
    names = {"left": f".a.json.{mark}.{dead_process()}.abc.json", "alive": f".a.json.{mark}.{ours}.abc.json",
             "elsewhere": f".a.json.00000000.{dead_process()}.abc.json", "another": f".b.json.{mark}.{dead_process()}.abc.json"}
    for name in names.values():
        (tmp_path / name).touch()
    write_json(tmp_path / "a.json", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", *(names[key] for key in ("alive", "elsewhere", "another"))}


def test_scratch_folders_of_killed_processes_are_removed(tmp_path):
    with scratch_folder(tmp_path / "in") as work:
        mark = work.name.removeprefix(".scratch.").partition(".")[0]
        (work / "file").touch()
    assert list((tmp_path / "in").iterdir()) == []
    left = tmp_path / "in" / f".scratch.{mark}.{dead_process()}.abc"
    left.mkdir()
    with scratch_folder(tmp_path / "in") as work:
        assert work.is_dir() and not left.exists()


def test_all_leftovers_of_a_folder_are_removed_and_nothing_else(tmp_path):
    kept = [".hidden", ".gitignore", ".nfs0001", "metrics.jsonl", ".a.b.txt"]
    left = [".metrics.jsonl.x1.jsonl", ".recipe.json.0a1b2c3d.12.xyz.json", ".images-000.safetensors.tmp_1.safetensors"]
    for name in kept + left:
        (tmp_path / name).touch()
    (tmp_path / ".scratch.0a1b2c3d.1.x" / "deep").mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def full_disk(path):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("write", [full_disk, lambda path: save_file({"a": torch.zeros(9)}, path / "no" / "folder")])
def test_what_the_disk_refuses_names_the_file_in_one_line(tmp_path, write):
    with pytest.raises(OSError, match=rf"^\[Errno \d+\] [^\n]*: '{tmp_path}/a.bin'$"):
        with atomic_write(tmp_path / "a.bin") as temporary:
            write(temporary)
    assert list(tmp_path.iterdir()) == []


def test_disk_errors_are_told_from_others(tmp_path):
    written = RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/0: file write failed")
    assert isinstance(disk_error(written, tmp_path / "optimizer.pt"), OSError)
    other = RuntimeError("CUDA out of memory")
    assert disk_error(other, tmp_path / "optimizer.pt") is other


# One process a folder

def hold(folder, pipe, orphan=False):
    "Lock a folder and wait; or leave the lock to a child that lives a little longer."
    with locked(folder):
        pipe.send("locked")
        if orphan and os.fork():
            os.kill(os.getpid(), 9)
        time.sleep(0.5 if orphan else 60)
    os._exit(0)


def start_holder(folder, **options):
    "A process that has locked a folder."
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=hold, args=(folder, theirs), kwargs=options)
    process.start()
    assert ours.poll(20) and ours.recv() == "locked"
    return process


@pytest.fixture
def holder(tmp_path):
    "A process that has locked the folder `run`."
    process = start_holder(tmp_path / "run")
    yield process
    process.kill()
    process.join()


def test_a_second_process_is_refused_by_pid_and_host_until_the_first_is_dead(holder, tmp_path):
    for ask in (lambda: check_unlocked(tmp_path / "run"), lambda: locked(tmp_path / "run").__enter__()):
        with pytest.raises(InUse, match=f"^{tmp_path}/run is in use by process {holder.pid} on {machine()} .lock file .*run.lock.; wait"):
            ask()
    holder.kill()
    holder.join()
    check_unlocked(tmp_path / "run")
    with locked(tmp_path / "run"):
        assert json.loads(lock_path(tmp_path / "run").read_text()) == {"pid": os.getpid(), "host": machine()}
        with pytest.raises(InUse, match=f"process {os.getpid()} on"):
            locked(tmp_path / "run").__enter__()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ['{"pid": 1, "host": "another-host"}', "", "{", '{"pid": "x"}'])
def test_a_lock_that_was_left_behind(tmp_path, content):
    lock_path(tmp_path / "run").write_text(content)
    if "another" in content:
        with pytest.raises(InUse, match=f"process 1 on another-host, another machine.*if it has ended, remove {tmp_path}/.run.lock"):
            locked(tmp_path / "run").__enter__()
        assert lock_path(tmp_path / "run").read_text() == content
    else:
        with locked(tmp_path / "run"):
            pass
        assert list(tmp_path.iterdir()) == []


def test_children_of_a_killed_process_are_waited_for(tmp_path):
    process, start = start_holder(tmp_path / "run", orphan=True), time.monotonic()
    process.join()
    with locked(tmp_path / "run"):
        assert 0.3 < time.monotonic() - start < 8


def test_where_files_cannot_be_locked_the_content_decides(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("krause_repro.records.fcntl.flock", refuse)
    lock_path(tmp_path / "run").write_text(json.dumps({"pid": os.getppid(), "host": machine()}))
    for ask in (lambda: check_unlocked(tmp_path / "run"), lambda: locked(tmp_path / "run").__enter__()):
        with pytest.raises(InUse, match=f"in use by process {os.getppid()}"):
            ask()
    lock_path(tmp_path / "run").write_text(json.dumps({"pid": dead_process(), "host": machine()}))
    with locked(tmp_path / "run"):
        pass


# Digests and places


def test_digests_tell_what_is_wrong(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("a", "inner/b"):
        (tmp_path / name).write_bytes(b"12345")
    assert damage(tmp_path) == f"{tmp_path}/digests.json is missing"
    write_digests(tmp_path)
    assert damage(tmp_path) is None
    for content, what in ((b"1234", "has 4 bytes instead of 5"), (b"12354", "is not the file that was written")):
        (tmp_path / "inner/b").write_bytes(content)
        assert f"{tmp_path}/inner/b {what}" in damage(tmp_path)
    (tmp_path / "inner/b").unlink()
    assert damage(tmp_path) == f"{tmp_path}/inner/b is missing"
    write_digests(tmp_path, ("a",))
    assert damage(tmp_path) is None
    for content in ("", "{", "[]", '{"a": 1}'):
        (tmp_path / "digests.json").write_text(content)
        assert damage(tmp_path) == f"{tmp_path}/digests.json is damaged"


def test_places_that_cannot_be_written_are_told_before(tmp_path, monkeypatch):
    check_writable(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=f"{tmp_path}/file/a cannot be made, since this is no folder: '{tmp_path}/file'"):
        check_writable(tmp_path / "file" / "a")
    monkeypatch.setattr(os, "access", lambda place, how: False)
    with pytest.raises(PermissionError, match=f"a/b cannot be written to, since this is not writable: '{tmp_path}'"):
        check_writable(tmp_path / "a" / "b")


def test_downloads_without_a_home(tmp_path, monkeypatch):
    for name in ("HOME", "KRAUSE_REPRO_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("krause_repro.records.pwd.getpwuid", lambda uid: type("entry", (), {"pw_dir": str(tmp_path)}))
    assert cache_folder() == tmp_path / ".cache" / "krause_repro"
    monkeypatch.setattr("krause_repro.records.pwd.getpwuid", lambda uid: {}[uid])
    assert cache_folder().name == "krause_repro" and f"user-{os.getuid()}" in cache_folder().parts
    monkeypatch.setenv("KRAUSE_REPRO_DATA", str(tmp_path / "é ü"))
    assert cache_folder() == tmp_path / "é ü"


def test_damaged_json_is_named(tmp_path):
    for content in (b'{"a": ', b'"\xf6"', b"[" * 99_999):
        (tmp_path / "file.json").write_bytes(content)
        with pytest.raises(ValueError, match="file.json is not valid JSON .*; delete it and make it again"):
            read_json(tmp_path / "file.json")
        with pytest.raises(ValueError, match="file.json is not valid JSON .*; restore it"):
            read_json(tmp_path / "file.json", "restore it")


# Where and with what


def test_project_root_is_found_from_inside_and_nowhere_else(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = krause_repro\n", encoding="utf-8")
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "settings.ini").write_text("[DEFAULT]\nlib_name = größer\n", encoding="latin-1")
    (deep.parent / "settings.ini").mkdir()
    monkeypatch.chdir(deep)
    assert project_root() == tmp_path
    (tmp_path / "settings.ini").unlink()
    assert project_root() == deep


def git(folder, *arguments):
    "Run git without the user's settings."
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"GIT_CONFIG_GLOBAL": os.devnull}
    who = ("-c", "user.name=A", "-c", "user.email=a@example.invalid", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *who, *arguments], cwd=folder, env=clean, check=True, capture_output=True, text=True).stdout.strip()


def test_git_state(tmp_path, monkeypatch):
    assert git_state(tmp_path) == {"commit": None, "dirty": None}
    git(tmp_path, "init", "-q")
    file = tmp_path / "file"
    file.write_text("1", encoding="utf-8")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "untracked").write_text("1", encoding="utf-8")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    file.write_text("2", encoding="utf-8")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("git") is None and git_state(tmp_path) == {"commit": None, "dirty": None}


def test_environment_says_what_can_change_a_number():
    found = environment()
    assert set(found) == {"commit", "dirty", "device", "threads", "versions"}
    assert found["versions"] == package_versions() and {"python", "torch", "transformers", "krause_repro"} <= set(found["versions"])
    assert json.loads(json.dumps(found)) == found


def test_commit_and_version_are_those_of_the_imported_code(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n", encoding="utf-8")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "another project")
    monkeypatch.chdir(tmp_path)
    found = environment()
    assert found["commit"] != git_state()["commit"] == git(tmp_path, "rev-parse", "HEAD")
    assert found["versions"]["krause_repro"] == krause_repro.__version__
    installed = tmp_path / "lib" / "krause_repro" / "__init__.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    monkeypatch.setattr(krause_repro, "__file__", str(installed))
    assert environment()["commit"] is environment()["dirty"] is None


# Sums


def test_summarise():
    assert summarise([3]) == {"values": [3.0], "mean": 3.0, "sd": None, "n": 1}
    summary = summarise([1, 2, 4])
    assert summary["values"] == [1.0, 2.0, 4.0] and summary["n"] == 3
    assert summary["mean"] == pytest.approx(7 / 3)
    assert summary["sd"] == pytest.approx(math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2))
    with pytest.raises(ValueError, match="values is empty"):
        summarise([])
    for bad in (math.nan, math.inf, "2", None, True):
        with pytest.raises(UserError, match=re.escape(f"values must be finite numbers, got {bad!r}")):
            summarise([1.0, bad])


def test_summarise_curves():
    curves = summarise_curves([[1, 10], [3, 10], [5, 40]])
    assert curves["mean"] == pytest.approx([3, 20]) and curves["sd"] == pytest.approx([2, math.sqrt(300)])
    assert summarise_curves([[1, 2]]) == {"mean": [1, 2], "sd": [0, 0]}
    for wrong in ([[1, 2], [1]], []):
        with pytest.raises(ValueError, match="curves differ in length or are missing"):
            summarise_curves(wrong)


# Results


def test_saved_results_carry_their_circumstances(tmp_path):
    path = save_result("example", {"number": 1}, "smoke", tmp_path)
    assert path == result_path("example", "smoke", tmp_path) == tmp_path / "results" / "smoke" / "example.json"
    loaded = load_result("example", "smoke", tmp_path)
    assert (loaded["name"], loaded["profile"], loaded["number"]) == ("example", "smoke", 1)
    assert set(environment()) <= set(loaded)


def test_missing_results_name_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no results of 'example'.*desk.*make figures PROFILE=desk .*TRAIN=missing"):
        load_result("example", "desk", tmp_path)
    make = Maker()
    with pytest.raises(FileNotFoundError, match="make figures PROFILE=smoke"):
        obtain("never", make, tmp_path)
    assert make.calls == 0 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "profile", "message"), [
    ("n", "smoek", "profile must be one of smoke, desk, paper, got 'smoek'; did you mean smoke"), ("n", None, "profile must be one of"),
    *((name, "smoke", f"name must be a path such as image_classification/kvit_s, got {name!r}")
      for name in ("", "../n", "/n", "a//n", "a/", 5)),
])
def test_results_are_below_the_folder_of_a_known_profile(tmp_path, name, profile, message):
    for use in (lambda: save_result(name, {"a": 1}, profile, tmp_path / "x"), lambda: load_result(name, profile, tmp_path / "x")):
        with pytest.raises(UserError, match=re.escape(message)):
            use()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("fields", "message"), [
    ({"seeds": [0, 0]}, r"seeds must be a list of different integers, got \[0, 0\]"),
    ({"seeds": [0.5]}, "seeds must be a list of different integers"),
    ({"seeds": [0, 1], "threads": [2, 2, 2]}, r"an entry for each of the seeds \[0, 1\] in its lists, got .*'threads': 3"),
    ({"test_accuracy": summarise([5.0, 6.0])}, "test_accuracy must be a summary in 0…1"),
    ({"accuracy": 1.5}, "accuracy must be a number in 0…1"),
    ({"curves": {"loss": {"mean": [1.0], "sd": [-1.0]}}}, r"curves.loss.sd must be a number ≥ 0 or a list of numbers ≥ 0 or null"),
    ({"versions": None}, "versions must be an object"),
    ({"recipes": None}, "recipes must be an object"),
    ({"recipes": []}, "recipes must be an object"),
])
def test_a_result_edited_by_hand_is_refused_and_in_no_table(tmp_path, fields, message):
    path = write_json(result_path("a/edited", "smoke", tmp_path), {"profile": "smoke", "mean": 1, **fields})
    for use in (lambda: load_result("a/edited", "smoke", tmp_path), lambda: save_result("another", {"a": 1}, "smoke", tmp_path)):
        with pytest.raises(UserError, match=f"^{path}.* {message}.*; delete it and make it again with: make figures PROFILE=smoke"):
            use()
    assert not (tmp_path / "results" / "smoke" / "another.json").exists()


def test_results_of_another_profile_are_refused(tmp_path):
    write_json(result_path("example", "desk", tmp_path), {"profile": "smoke"})
    with pytest.raises(ValueError, match="example.json holds results of profile 'smoke', not 'desk'"):
        load_result("example", "desk", tmp_path)


def test_a_result_is_made_once_and_then_loaded(tmp_path):
    make = Maker()
    first = obtain("missing", make, tmp_path)
    assert first["number"] == 1 and set(first["recipes"]) == {recipe.name for recipe in SMOKE}
    assert obtain("missing", make, tmp_path) == obtain("never", make, tmp_path) == first
    assert make.calls == 1
    assert obtain("always", make, tmp_path)["number"] == make.calls == 2
    assert obtain("never", make, tmp_path)["number"] == 2


STALE = {
    "another setting": [replace(SMOKE[0], lr=0.5), SMOKE[1]],
    "other seeds": [replace(SMOKE[0], seeds=(5,)), SMOKE[1]],
    "a recipe more": [*SMOKE, get_recipe("vit_t_post/fashion_mnist").at("smoke")],
    "a recipe less": SMOKE[:1],
}


@pytest.mark.parametrize("why", STALE)
def test_stale_results_are_refused_or_made_again(tmp_path, why):
    make = Maker()
    obtain("missing", make, tmp_path)
    with pytest.raises(ValueError, match=r"example.json is stale: .*fashion_mnist.*make figures PROFILE=smoke TRAIN=missing"):
        obtain("never", make, tmp_path, STALE[why])
    assert make.calls == 1
    assert obtain("missing", make, tmp_path, STALE[why])["number"] == 2
    assert obtain("never", make, tmp_path, STALE[why])["number"] == 2


def test_stale_recipes_are_named_and_remarks_do_not_count():
    result = {"recipes": {recipe.name: recipe.to_dict() for recipe in SMOKE}}
    assert stale_recipes(result, SMOKE) == []
    assert stale_recipes(result, [replace(recipe, published={}, unpublished=()) for recipe in SMOKE]) == []
    assert stale_recipes(result, [replace(SMOKE[0], sigma=1.0), SMOKE[1]]) == ["kvit_t/fashion_mnist"]
    assert stale_recipes({}, SMOKE) == ["kvit_t/fashion_mnist", "vit_t/fashion_mnist"]


def test_a_failed_making_keeps_the_earlier_result(tmp_path):
    obtain("missing", Maker(), tmp_path)
    with pytest.raises(OSError, match="No space left"):
        obtain("always", fail, tmp_path)
    with pytest.raises(ValueError, match="number is nan, not a finite number; nothing was written"):
        obtain("always", lambda: {"number": math.nan}, tmp_path)
    assert obtain("never", fail, tmp_path)["number"] == 1


@pytest.mark.parametrize("train", ["sometimes", "", None, True])
def test_train_is_one_of_three(tmp_path, train):
    message = re.escape(f"train must be one of never, missing, always, got {train!r}")
    with pytest.raises(ValueError, match=message):
        check_train(train)
    with pytest.raises(ValueError, match=message):
        obtain(train, Maker(), tmp_path)


def test_recipes_must_be_of_the_profile(tmp_path):
    make = Maker()
    with pytest.raises(ValueError, match="recipes must be under profile 'smoke', got .*'paper'"):
        obtain("always", make, tmp_path, [SMOKE[0], get_recipe("vit_t/fashion_mnist")])
    assert make.calls == 0 and list(tmp_path.iterdir()) == []


def test_the_table_has_every_summary_with_its_origin(tmp_path):
    found = {"mean": 0.75, "sd": 0.125**0.5, "n": 2, "values": [0.5, 1.0]}
    curve = {"mean": [0.1, 0.2], "sd": [0.0, 0.0]}
    result = {"test_accuracy": found, "curves": {"loss": curve}, "recipes": {"m/d": {"lr": found}}, "seeds": [0, 1]}
    save_result("b", result, "smoke", tmp_path)
    save_result("a/one", {"parts": [{"loss": {"mean": 2.0, "sd": None, "n": 1}}]}, "smoke", tmp_path)
    with (tmp_path / "results" / "smoke" / "results.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["result"], line["quantity"], line["mean"]) for line in lines] == [
        ("a/one", "parts.0.loss", "2.0"), ("b", "test_accuracy", "0.75")]
    assert lines[1] | {"values": "0.5 1.0", "recipes": "m/d", "seeds": "0 1", "sd": str(0.125**0.5), "n": "2"} == lines[1]
    saved = load_result("b", "smoke", tmp_path)
    origin = {"commit": saved["commit"], "device": saved["device"], "torch": saved["versions"]["torch"]}
    assert lines[1] | origin == lines[1]
    (tmp_path / "results" / "smoke" / "c.json").write_text("null", encoding="utf-8")  # no result: told when it is loaded
    assert len(list(table_lines(tmp_path / "results" / "smoke"))) == len(lines)


def test_the_committed_table_is_that_of_the_results(tmp_path):
    folder = ROOT / "results" / "desk"
    shutil.copytree(folder, tmp_path / "results" / "desk")
    written = write_table("desk", tmp_path).read_text(encoding="utf-8")
    assert len(list(table_lines(folder))) > 200
    assert (folder / "results.csv").read_text(encoding="utf-8") == written
