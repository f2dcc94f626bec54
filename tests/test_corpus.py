"""Corpora: packed tokens spell the documents, splits are apart, interrupted builds lose nothing, damaged and foreign files are refused."""

import random
import shutil
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from krause_repro import cli, language_model_evaluation, tasks
from krause_repro import corpus as corpora
from krause_repro.corpus import (
    CORPORA,
    SPLITS,
    StreamSource,
    TextSource,
    build_corpus,
    document_digest,
    document_split,
    load_corpus,
    open_corpus,
    open_source,
    train_tokenizer,
)
from krause_repro.language_data import EOS, read_documents
from krause_repro.language_model_evaluation import ngram_baselines
from krause_repro.likelihood import KneserNey, ngram_hashes
from krause_repro.recipes import get_recipe
from krause_repro.records import read_json, write_json

VOCAB = 300


def texts(count=80, seed=0):
    "Documents of random words, not all of them English."
    draw = random.Random(seed)
    words = ["the", "attention", "window", "naïve", "σ²", "日本", f"{EOS}", "of", "and", "\tindented"]
    return [" ".join(draw.choices(words, k=draw.randint(5, 60))).strip() + f" {number}" for number in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder of text files, a file a document."
    found = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(texts()):
        (found / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def built(folder, tmp_path_factory):
    return load_corpus("text", VOCAB, folder, tmp_path_factory.mktemp("corpora"))


@pytest.fixture
def damaged(built, tmp_path):
    "A copy of the corpus, to be damaged."
    return shutil.copytree(built.path, tmp_path / "copy")


def by_split(documents, weights):
    return {split: [text for text in documents if document_split(document_digest(text), weights) == split] for split in SPLITS}


def test_packed_tokens_spell_the_documents_of_their_split(built):
    eos = built.tokenizer.eos_token_id
    for split, documents in by_split(texts(), CORPORA["text"].weights).items():
        tokens = np.asarray(built.tokens(split))
        ends = np.flatnonzero(tokens == eos)
        assert ends[-1] == len(tokens) - 1 and len(ends) == len(documents)  # the end token's name within a text is text
        spelled = [built.tokenizer.decode(part[:-1] if part[-1] == eos else part) for part in np.split(tokens, ends[:-1] + 1)]
        assert sorted(spelled) == sorted(documents)
        facts = built.manifest["splits"][split]
        assert (facts["documents"], facts["tokens"]) == (len(documents), len(tokens))
        assert facts["bytes"] == sum(len(text.encode()) for text in documents)
        assert built.bytes_per_token(split) == facts["bytes"] / len(tokens)


def test_a_split_depends_on_the_document_alone():
    digests = [document_digest(text) for text in texts(2000)]
    counts = [sum(document_split(digest, (18, 1, 1)) == split for digest in digests) for split in SPLITS]
    assert sum(counts) == 2000 and abs(counts[1] - 100) < 40 and abs(counts[2] - 100) < 40
    assert [document_split(digest, (18, 1, 1)) for digest in (37, 38, 39)] == ["train", "validation", "test"]


def test_blocks_are_consecutive_tokens(built):
    tokens = np.asarray(built.tokens("train"))
    for length, overlap in ((16, 0), (16, 1), (7, 6)):
        blocks, stride = built.blocks("train", length, overlap), length - overlap
        assert len(blocks) == (len(tokens) - overlap) // stride
        for index in (0, 1, len(blocks) - 1):
            assert blocks[index]["input_ids"].tolist() == tokens[index * stride:index * stride + length].tolist()
    with pytest.raises(IndexError):
        blocks[len(blocks)]


class Interrupted(Exception):
    "The end of a process."


def begin(path, stop):
    "Build a corpus of many parts until so many are written."
    write, left = corpora._write_part, [stop]

    def interrupted(*arguments):
        if not left[0]:
            raise Interrupted
        left[0] -= 1
        write(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(corpora, "_write_part", interrupted)
        build_in_parts(path)
    return path


def build_in_parts(path, documents=None):
    "Several batches a part."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "BATCH_CHARACTERS", 300)
        build_corpus(path, "text", TextSource(texts() if documents is None else documents, "t"), VOCAB, None, shard_tokens=400)


def test_an_interrupted_build_ends_with_the_same_bytes(tmp_path):
    def files(path):
        return {file.name: file.read_bytes() for file in sorted(path.glob("*.bin"))}

    build_in_parts(tmp_path / "whole")
    wanted = files(tmp_path / "whole")
    assert len(wanted) > 8
    for stop in (0, 1, 3):
        path = begin(tmp_path / f"stopped{stop}", stop)
        assert not (path / "manifest.json").exists()
        if stop:
            with pytest.raises(ValueError, match="was begun with the source"):
                build_in_parts(path, texts()[1:])
        build_in_parts(path)
        assert files(path) == wanted and read_json(path / "manifest.json") == read_json(tmp_path / "whole" / "manifest.json")
    blocks = open_corpus(path).blocks("train", 50)  # across the borders of shards
    tokens = np.asarray(open_corpus(path).tokens("train"))
    found = [token for index in range(len(blocks)) for token in blocks[index]["input_ids"].tolist()]
    assert found == tokens[:50 * len(blocks)].tolist()


def test_a_stream_continues_from_its_state(tmp_path):
    from datasets import Dataset

    first, again = (StreamSource(Dataset.from_list([{"text": text} for text in texts()]).to_iterable_dataset(), {}) for _ in range(2))
    assert list(islice(first, 30)) == texts()[:30]
    again.seek(first.state())
    assert list(again) == texts()[30:]
    with pytest.raises(ValueError, match="must have a column text of strings"):
        next(iter(StreamSource([{"content": "a"}], {})))


def test_damaged_parquet_files_are_named_before_the_build(tmp_path):
    from datasets import Dataset

    (tmp_path / "files").mkdir()
    for name in ("a", "b"):
        Dataset.from_dict({"text": texts(3000)}).to_parquet(tmp_path / "files" / f"{name}.parquet")
    train_tokenizer(texts(), VOCAB).save_pretrained(tmp_path / "tokenizer")
    options = {"source": tmp_path / "files", "folder": tmp_path / "corpora", "tokenizer": tmp_path / "tokenizer"}
    whole = (tmp_path / "files" / "b.parquet").read_bytes()
    for damaged, message in (
        (whole[:len(whole) // 2], "is not a whole parquet file"), (b"", "is not a whole parquet file"),
        (whole.replace(b"text", b"word"), "must have a column text, got word"),
    ):
        (tmp_path / "files" / "b.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match=f"b.parquet {message}"):
            load_corpus("fineweb_edu", **options)
        assert not list((tmp_path / "corpora").rglob("*.*"))
    (tmp_path / "files" / "b.parquet").write_bytes(whole)
    assert sum(facts["documents"] for facts in load_corpus("fineweb_edu", **options).manifest["splits"].values()) == 6000


@pytest.fixture
def streamed(tmp_path):
    "Options of a small FineWeb-Edu: two files of one name, and a tokenizer in a folder."
    from datasets import Dataset

    for number, name in enumerate(("x", "y")):
        Dataset.from_dict({"text": texts(3000, number)}).to_parquet(tmp_path / "files" / name / "000.parquet")
    train_tokenizer(texts(), VOCAB).save_pretrained(tmp_path / "tokenizer")
    return {"source": tmp_path / "files", "folder": tmp_path / "corpora", "tokenizer": tmp_path / "tokenizer"}


def test_a_stream_of_too_few_documents_leaves_nothing_and_a_larger_one_is_built(streamed, tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"text": texts(20)}).to_parquet(tmp_path / "few" / "000.parquet")
    with pytest.raises(ValueError, match=r"source has too few documents \(20\): none is left for \w+. Give more parquet files$"):
        load_corpus("fineweb_edu", **streamed | {"source": tmp_path / "few"})
    assert [path for path in (tmp_path / "corpora").rglob("*") if path.is_file()] == []
    assert sum(facts["documents"] for facts in load_corpus("fineweb_edu", **streamed).manifest["splits"].values()) == 6000


@pytest.mark.parametrize("is_text", [True, False])
def test_a_late_document_that_the_tokenizer_knows_leaves_nothing(is_text, tmp_path, monkeypatch):
    from datasets import Dataset

    held_out = by_split(texts(), CORPORA["text"].weights)["test"][-1]
    train_tokenizer(texts(), VOCAB).save_pretrained(tmp_path / "tokenizer")
    write_json(tmp_path / "tokenizer" / corpora.TRAINED_ON, {"sha256": "0", "documents": [f"{document_digest(held_out):016x}"]})
    rows = Dataset.from_list([{"text": text} for text in texts()]).to_iterable_dataset()
    source = TextSource(texts(), "t") if is_text else StreamSource(rows, {})
    written, write = [], corpora._write_part
    monkeypatch.setattr(corpora, "_write_part", lambda *arguments: written.append(0) or write(*arguments))
    monkeypatch.setattr(corpora, "BATCH_CHARACTERS", 300)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "notes.txt").touch()  # not of the build
    with pytest.raises(ValueError, match="tokenizer was trained on a test document"):
        build_corpus(tmp_path / "corpus", "text", source, None, tmp_path / "tokenizer", shard_tokens=400)
    assert bool(written) != is_text and list((tmp_path / "corpus").rglob("*")) == [tmp_path / "corpus" / "notes.txt"]


def of_earlier_version(path, name="manifest.json"):
    "Change the record of a corpus to that of a version that knew files by name and size, and tokenizers without a name."
    record = read_json(path / name)
    record["source"] = {"files": {file.rpartition("/")[2]: facts["bytes"] for file, facts in record["source"]["files"].items()}}
    del record["tokenizer"]["name"]
    write_json(path / name, corpora._sealed(record))


def test_parquet_files_are_known_by_place_and_content(streamed):
    corpus, files = load_corpus("fineweb_edu", **streamed), streamed["source"]
    assert list(corpus.manifest["source"]["files"]) == ["x/000.parquet", "y/000.parquet"]
    content = (files / "x" / "000.parquet").read_bytes()
    for where in (len(content) // 2, content.rindex(b"parquet-cpp")):  # in the texts, and in the footer
        other = bytearray(content)
        other[where] ^= 1
        (files / "x" / "000.parquet").write_bytes(other)
        with pytest.raises(ValueError, match="was built from .* but source is"):
            load_corpus("fineweb_edu", **streamed)
    (files / "x" / "000.parquet").write_bytes(content)
    assert load_corpus("fineweb_edu", **streamed).digest == corpus.digest
    (files / "x" / "000.parquet").rename(files / "000.parquet")
    with pytest.raises(ValueError, match="was built from .* but source is"):
        load_corpus("fineweb_edu", **streamed)
    (files / "000.parquet").unlink()
    with pytest.raises(ValueError, match="was built from .* but source is"):
        load_corpus("fineweb_edu", **streamed)


def test_a_streamed_corpus_of_an_earlier_version_is_read_and_continued(streamed, monkeypatch):
    (streamed["source"] / "y" / "000.parquet").rename(streamed["source"] / "y" / "001.parquet")
    whole = load_corpus("fineweb_edu", **streamed)
    of_earlier_version(whole.path)
    assert load_corpus("fineweb_edu", **streamed).digest == whole.digest
    (streamed["source"] / "y" / "000.parquet").write_bytes((streamed["source"] / "x" / "000.parquet").read_bytes())
    with pytest.raises(ValueError, match="was built from .* but source is"):  # of one name: they cannot be compared
        load_corpus("fineweb_edu", **streamed)
    (streamed["source"] / "y" / "000.parquet").unlink()
    write, left = corpora._write_part, [2]

    def interrupted(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted
        write(*arguments)

    monkeypatch.setattr(corpora, "BATCH_CHARACTERS", 20_000)
    path, source = streamed["folder"] / "begun", lambda: open_source("fineweb_edu", streamed["source"])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(corpora, "_write_part", interrupted)
        build_corpus(path, "fineweb_edu", source(), None, streamed["tokenizer"], shard_tokens=10_000)
    of_earlier_version(path, "progress.json")
    build_corpus(path, "fineweb_edu", source(), None, streamed["tokenizer"], shard_tokens=10_000)
    assert np.array_equal(open_corpus(path).tokens("train"), whole.tokens("train"))


@pytest.mark.filterwarnings("ignore:.*has no trained_on.json")
def test_a_corpus_of_another_tokenizer_is_not_taken_for_one_of_gpt2(streamed, monkeypatch):
    known, load = {"openai-community/gpt2": streamed["tokenizer"]}, corpora.read_tokenizer
    monkeypatch.setattr(corpora, "read_tokenizer", lambda name: load(known.get(str(name), name)))  # a hub
    other = load_corpus("fineweb_edu", **streamed).path
    message = "has another tokenizer, {} of 300 tokens, than openai-community/gpt2"
    for change in (lambda: None, lambda: of_earlier_version(other)):
        change()
        with pytest.raises(ValueError, match=message.format("one")):
            load_corpus("fineweb_edu", source=other)
    monkeypatch.setattr(corpora, "FINISHED_SIZES", {"openai-community/gpt2": VOCAB})
    assert load_corpus("fineweb_edu", source=other).vocab_size == VOCAB
    corpus = load_corpus("fineweb_edu", source=streamed["source"], folder=streamed["folder"])
    assert corpus.manifest["tokenizer"]["name"] == "openai-community/gpt2"
    assert load_corpus("fineweb_edu", source=corpus.path, tokenizer="openai-community/gpt2").digest == corpus.digest
    with pytest.raises(ValueError, match="has another tokenizer, openai-community/gpt2 of 300 tokens, than someone/else"):
        load_corpus("fineweb_edu", source=corpus.path, tokenizer="someone/else")


def test_shards_of_the_splits_in_use_are_verified_however_large(damaged, monkeypatch):
    monkeypatch.setattr(corpora, "VERIFIED_BYTES", 0)
    tokens = np.fromfile(damaged / "test-00000.bin", "<u2")
    tokens[100] += 1
    tokens.tofile(damaged / "test-00000.bin")
    corpus = open_corpus(damaged)
    assert corpus.verified("train", "validation") is corpus
    with pytest.raises(ValueError, match="test-00000.bin was altered"):
        corpus.verified("test")
    with pytest.raises(ValueError, match="split must be one of train, validation, test"):
        corpus.verified("held_out")


def test_a_tokenizer_of_held_out_documents_is_refused(folder, tmp_path):
    whole = train_tokenizer(texts(), VOCAB)
    whole.save_pretrained(tmp_path / "tokenizer")
    digests = [f"{document_digest(text):016x}" for text in texts()]
    corpora.write_json(tmp_path / "tokenizer" / corpora.TRAINED_ON, {"sha256": "0", "documents": digests})
    with pytest.raises(ValueError, match="tokenizer was trained on a (validation|test) document of this corpus"):
        load_corpus("text", source=folder, folder=tmp_path / "corpora", tokenizer=tmp_path / "tokenizer")
    assert not list((tmp_path / "corpora").rglob("*.bin")) and not list((tmp_path / "corpora").rglob("manifest.json"))


def test_a_tokenizer_whose_training_documents_are_unknown_is_marked(built, folder, tmp_path):
    train_tokenizer(texts(), VOCAB).save_pretrained(tmp_path / "tokenizer")
    with pytest.warns(UserWarning, match="tokenizer has no trained_on.json, so it is not known whether"):
        corpus = load_corpus("text", source=folder, folder=tmp_path / "corpora", tokenizer=tmp_path / "tokenizer")
    assert corpus.manifest["tokenizer"]["trained_on"] == "unknown" and len(built.manifest["tokenizer"]["trained_on"]) == 64


def word_tokenizer(path, vocabulary, unknown=None):
    "A tokenizer of whole words, separated by blanks."
    plain = Tokenizer(models.WordLevel(vocabulary, unknown))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<e>", unk_token=unknown).save_pretrained(path)


def in_lower_case(path):
    train_tokenizer(texts(), VOCAB).save_pretrained(path)
    change(path / "tokenizer.json", normalizer={"type": "Lowercase"})


@pytest.mark.filterwarnings("ignore:.*has no trained_on.json")
@pytest.mark.parametrize(("make", "message"), [
    (lambda path: word_tokenizer(path, {"[UNK]": 0, "the": 1, "<e>": 2}, "[UNK]"), "tokenizer must spell every text .* got '.*UNK"),
    (lambda path: word_tokenizer(path, {"the": 0, "<e>": 1}), "tokenizer must encode every text of this corpus .*Missing"),
    (lambda path: word_tokenizer(path, {"the": 0, "<e>": 1, "of": 70_000}), "must be a fast one .* numbered without a gap"),
    (in_lower_case, "tokenizer must spell every text .* got .*indented one' for .*INDENTED One'"),
])
def test_a_tokenizer_that_cannot_spell_the_text_is_refused(tmp_path, make, message):
    (tmp_path / "text").mkdir()
    for number, text in enumerate(texts()):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{text} INDENTED One", encoding="utf-8")
    make(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=message):
        load_corpus("text", source=tmp_path / "text", folder=tmp_path / "corpora", tokenizer=tmp_path / "tokenizer")
    assert not list((tmp_path / "corpora").rglob("*.*"))


def test_accents_may_be_composed_by_the_tokenizer():
    tokenizer = train_tokenizer(texts(), VOCAB)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert corpora.Packer(tokenizer, (18, 1, 1), None).encode(["cafe\u0301"]) == [tokenizer.backend_tokenizer.encode("café").ids]


@pytest.mark.parametrize("content", ["null", "5", '["a"]', '{"sha256": "x"}', *(f'{{"documents": {each}}}' for each in ("5", "[]", "[1]"))])
def test_a_damaged_list_of_training_documents_is_refused(built, folder, tmp_path, content):
    shutil.copytree(built.path / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / corpora.TRAINED_ON).write_text(content)
    with pytest.raises(ValueError, match="trained_on.json must be an object whose documents are digests"):
        load_corpus("text", source=folder, folder=tmp_path / "corpora", tokenizer=tmp_path / "tokenizer")
    assert not list((tmp_path / "corpora").rglob("*.bin"))


@pytest.mark.parametrize("fields", [{"state": 0}, {"state": -3}, {"state": ...}, {"weights": [18]}, {"splits": {}}, {"parts": 1},
                                    {"tokenizer": {}}, {"shard_tokens": 0}, {"empty_documents": ...}, {"sha256": ...}])
def test_a_build_goes_on_only_from_the_record_that_it_left(tmp_path, fields):
    path = begin(tmp_path / "corpus", 2)
    record = read_json(path / "progress.json") | fields
    write_json(path / "progress.json", {name: value for name, value in record.items() if value is not ...})
    before = {file.name: file.read_bytes() for file in path.glob("*.*")}
    with pytest.raises(ValueError, match="progress.json is damaged, or of an earlier version; delete"):
        build_in_parts(path)
    assert {file.name: file.read_bytes() for file in path.glob("*.*")} == before


def test_a_build_does_not_go_on_with_an_altered_shard(tmp_path):
    path = begin(tmp_path / "corpus", 2)
    shard = path / "train-00000.bin"
    shard.write_bytes(b"\1\0" + shard.read_bytes()[2:])
    before = sorted(path.rglob("*"))
    with pytest.raises(ValueError, match="train-00000.bin was altered"):
        build_in_parts(path)
    assert sorted(path.rglob("*")) == before


def change(path, **fields):
    write_json(path, read_json(path) | fields)


def train_as_test(path):
    "A manifest of an earlier version, without its own digest, whose test split has the shards of the training split."
    manifest = read_json(path / "manifest.json")
    del manifest["sha256"]
    manifest["splits"]["test"] = manifest["splits"]["train"]
    write_json(path / "manifest.json", manifest)


@pytest.mark.parametrize("content", ["{}", "[]", '{"source": {}}'])
def test_a_damaged_record_of_a_build_is_named(built, folder, tmp_path, content):
    path = tmp_path / "corpora" / built.path.name
    path.mkdir(parents=True)
    (path / "progress.json").write_text(content)
    with pytest.raises(ValueError, match=r"progress.json is damaged, or of an earlier version; delete .*text-[0-9a-f]{8}-bpe300"):
        load_corpus("text", VOCAB, folder, tmp_path / "corpora")
    with pytest.raises(ValueError, match="source must be a file or folder, got 5"):
        load_corpus("text", VOCAB, 5)


def test_two_texts_have_a_corpus_each(built, folder, tmp_path, monkeypatch):
    sources, corpora = [folder, tmp_path / "other"], tmp_path / "corpora"
    sources[1].mkdir()
    for number, text in enumerate(texts(seed=3)):
        (sources[1] / f"{number}.txt").write_text(text, encoding="utf-8")
    shutil.copytree(built.path, corpora / built.path.name)
    assert load_corpus("text", VOCAB, folder=corpora).digest == built.digest  # the only one
    both = [load_corpus("text", VOCAB, source, corpora) for source in sources]
    assert [each.path.name for each in both] == [f"text-{each.manifest['source']['sha256'][:8]}-bpe300" for each in both]
    assert both[0].digest == built.digest != both[1].digest
    with pytest.raises(ValueError, match="source must say which text: .*corpora has corpora of 2"):
        load_corpus("text", VOCAB, folder=corpora)
    shutil.copytree(sources[1], tmp_path / "renamed")
    assert load_corpus("text", VOCAB, tmp_path / "renamed", corpora).path == both[1].path
    shutil.rmtree(both[1].path)
    both[0].path.rename(corpora / "text-bpe300")  # of an earlier version
    assert load_corpus("text", VOCAB, folder=corpora).digest == built.digest
    opened = []
    monkeypatch.setattr("krause_repro.corpus.read_documents", lambda path: opened.append(path) or read_documents(path))
    assert load_corpus("text", VOCAB, sources[0], corpora).path.name == "text-bpe300"  # not built again
    assert len(opened) == 1
    (corpora / "text-bpe300" / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="text-bpe300/manifest.json is not the manifest of a corpus"):
        load_corpus("text", VOCAB, sources[0], corpora)


@pytest.mark.parametrize(("damage", "error", "message"), [
    (lambda path: (path / "test-00000.bin").unlink(), FileNotFoundError, "is missing; delete the corpus"),
    (lambda path: (path / "test-00000.bin").write_bytes(b"\0\0"), ValueError, "must have .* tokens of 2 bytes, got 2 bytes"),
    (lambda path: (path / "train-00000.bin").write_bytes(bytes((path / "train-00000.bin").stat().st_size)), ValueError, "was altered"),
    (lambda path: train_tokenizer(texts(seed=5), VOCAB - 1).save_pretrained(path / "tokenizer"), ValueError, "is not the tokenizer"),
    (lambda path: (path / "manifest.json").write_text("{}"), ValueError, "is not the manifest of a corpus"),
    (lambda path: (path / "manifest.json").write_text("{"), ValueError, "manifest.json"),
    (lambda path: change(path / "tokenizer" / "tokenizer.json", normalizer={"type": "Lowercase"}), ValueError, "is not the tokenizer"),
    (lambda path: change(path / "manifest.json", name="novels"), ValueError, "manifest.json was altered"),
    (lambda path: change(path / "manifest.json", empty_documents=7), ValueError, "manifest.json was altered"),
    (lambda path: train_as_test(path), ValueError, "must list shards of test with .* tokens in all"),
    (lambda path: (path / "tokenizer" / "tokenizer.json").write_text("{}"), ValueError, "/tokenizer is not a whole tokenizer"),
    (lambda path: (path / "tokenizer" / "tokenizer.json").write_text("{"), ValueError, "/tokenizer is not a whole tokenizer"),
    (lambda path: (path / "tokenizer" / "tokenizer.json").write_bytes(b"\xff"), ValueError, "/tokenizer is not a whole tokenizer"),
    (lambda path: (path / "tokenizer" / "tokenizer.json").unlink(), FileNotFoundError, "no tokenizer in .*/tokenizer"),
])
def test_a_damaged_corpus_is_refused(damaged, damage, error, message):
    open_corpus(damaged)
    damage(damaged)
    with pytest.raises(error, match=message):
        load_corpus("text", VOCAB, damaged)


@pytest.mark.parametrize(("content", "message"), [
    ({}, "must hold text files, but has no .txt file"),
    ({"a.txt": "a text", "b.txt": " \n"}, "b.txt is empty"),
])
def test_folders_without_text_are_refused(tmp_path, content, message):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path)
    (tmp_path / "a.txt").write_text("a text", encoding="utf-16-le")
    with pytest.raises(ValueError, match="a.txt is not text in UTF-8: it has NUL characters"):
        read_documents(tmp_path)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.txt").symlink_to(tmp_path / "no.txt")
    with pytest.raises(FileNotFoundError, match="a.txt"):
        read_documents(tmp_path)


def test_what_a_folder_of_texts_holds_beside_them(tmp_path):
    for name in ("b.TXT", "a.txt", "in/c.Txt", ".hidden.txt", ".git/d.txt", "e.md", "f"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    with pytest.warns(UserWarning, match=f"2 of 5 files in {tmp_path} are not read, such as e.md"):
        assert read_documents(tmp_path) == ["a.txt", "b.TXT", "in/c.Txt"]
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="loop is a link to a folder"):
        read_documents(tmp_path)


def test_marks_of_editors_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(f"one\n{EOS} \ntwo {EOS} \n{EOS}\t\r\nthree".encode("utf-8-sig"))
    (tmp_path / "b.txt").write_text("four", encoding="utf-8-sig")
    assert read_documents(tmp_path / "a.txt") == ["one", f"two {EOS}", "three"]
    assert read_documents(tmp_path)[1] == "four"


def test_texts_that_are_too_small_are_refused_and_nothing_is_written(tmp_path):
    (tmp_path / "one.txt").write_text(f"one\n{EOS}\ntwo\n{EOS}\n")
    assert read_documents(tmp_path / "one.txt") == ["one", "two"]
    with pytest.raises(ValueError, match="has too few documents"):
        load_corpus("text", VOCAB, tmp_path / "one.txt", tmp_path / "corpora")
    for size, message in ((200, "vocab_size must be"), (70_000, "vocab_size must be at most 65,536"), (60_000, "no more pairs to merge")):
        with pytest.raises(ValueError, match=message):
            train_tokenizer(texts(), size)
    assert not list((tmp_path / "corpora").rglob("*.*"))


def test_the_command_builds_a_corpus_of_a_small_text(no_downloads, folder, capsys):
    build = ["data", "text", "--source", str(folder)]
    assert cli.main(build) == 2 and "vocab_size must be at most" in capsys.readouterr().err
    assert cli.main([*build, "--vocab_size", str(VOCAB)]) == 0
    assert open_corpus(capsys.readouterr().out.strip()).vocab_size == VOCAB
    for name in ("fashion_mnist", "fineweb_edu"):
        assert cli.main(["data", name, "--vocab_size", "300"]) == 2
        assert f"trained on it, one of openstax, novels, shakespeare, text; got it with {name}" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    (("opentax",), "name must be one of .*openstax"),
    (("text",), "source must be a text file or a folder"),
    (("text", "300"), "vocab_size must be an integer ≥ 257, got '300'"), (("text", True), "vocab_size must be an integer"),
    (("text", None, 5), "source must be a file or folder, got 5"), (("text", None, None, 5), "folder must be a file or folder, got 5"),
    (("text", None, None, None, 5), "tokenizer must be a file or folder, got 5"),
])
def test_unknown_requests_are_refused(no_downloads, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(*arguments)


@pytest.mark.parametrize("name", ["openstax", "novels"])
def test_no_other_file_is_taken_for_a_known_text(no_downloads, name):
    place = no_downloads / "language" / "text"
    place.parent.mkdir()
    place.write_text("someone's text", encoding="utf-8")
    file = CORPORA[name].file
    with pytest.raises(FileNotFoundError, match=f"no {name} in {place.parent}/{file}, {place}/{file}; put {file} into {place.parent}"):
        open_source(name)


def test_without_a_hub_the_error_says_which_texts_need_none(no_downloads, monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(FileNotFoundError, match="fineweb-edu could not be loaded .*not known.*or use another text: openstax"):
        load_corpus("fineweb_edu")
    assert not list(no_downloads.rglob("*.*"))


def test_a_finished_corpus_is_only_what_it_was_built_as(built, folder, tmp_path):
    assert load_corpus("text", VOCAB, built.path).manifest == built.manifest
    with pytest.raises(ValueError, match="is the corpus text with 300 tokens, not novels"):
        load_corpus("novels", VOCAB, built.path)
    (tmp_path / "other").mkdir()
    for number, text in enumerate(texts(seed=3)):
        (tmp_path / "other" / f"{number:03}.txt").write_text(text, encoding="utf-8")
    built.tokenizer.save_pretrained(tmp_path / "same")
    train_tokenizer(texts(), VOCAB - 9).save_pretrained(tmp_path / "another")
    assert load_corpus("text", source=built.path, tokenizer=tmp_path / "same").digest == built.digest
    with pytest.raises(ValueError, match="has another tokenizer, one of 300 tokens, than .*another"):
        load_corpus("text", source=built.path, tokenizer=tmp_path / "another")
    other = built.path.parent / f"text-{TextSource(texts(seed=3), '').origin['sha256'][:8]}-bpe300"
    built.path.rename(other)
    try:
        with pytest.raises(ValueError, match="was built from"):
            load_corpus("text", VOCAB, tmp_path / "other", built.path.parent)
    finally:
        other.rename(built.path)
    with pytest.raises(ValueError, match="split must be one of train, validation, test"):
        built.tokens("held_out")
    with pytest.raises(ValueError, match="overlap must be less than length"):
        built.blocks("train", 8, 8)
    with pytest.raises(ValueError, match="length must be at most"):
        built.blocks("test", 10**6)


def test_of_a_short_text_training_takes_what_there_is(built, monkeypatch):
    recipe = replace(get_recipe("lm_krause_100m/text").at("smoke"), vocab_size=VOCAB)
    splits = tasks.corpus_splits(recipe, built.path)
    found = [len(built.blocks("train", 64)), len(built.blocks("validation", 64, 1))]
    assert found[0] < recipe.train_blocks and found[1] < recipe.held_out
    assert [len(splits.train), len(splits.held_out)] == [splits.counts[part]["items"] for part in ("train", "held_out")] == found
    for change, message in (({"batch_size": 4800}, "source must have at least 4800 training blocks of 64 tokens, one batch"),
                            ({"context": 4000}, "source must have at least one block of 4000 tokens in each split")):
        with pytest.raises(ValueError, match=message):
            tasks.corpus_splits(replace(recipe, **change), built.path)
    monkeypatch.setattr(tasks, "recipe_corpus", lambda *_: built)  # of FineWeb-Edu as many as the recipe says
    with pytest.raises(ValueError, match=f"held_out must be between 1 and {found[1]} blocks"):
        tasks.corpus_splits(replace(recipe, dataset="fineweb_edu"))


def test_with_a_document_mask_packed_documents_are_each_alone(built):
    recipe = replace(get_recipe("lm_krause_100m/text").at("smoke"), vocab_size=VOCAB, document_mask=True)
    task, eos = tasks.task_of(recipe), built.tokenizer.eos_token_id
    collate, _ = task.collators(recipe, tasks.TextSplits([], [], [], tokenizer=built.tokenizer), False)
    one, two = ([eos, *draw] for draw in np.random.default_rng(0).integers(10, VOCAB, (2, 20)).tolist())  # an end token opens the next one
    batch = collate([{"input_ids": torch.tensor(one + two)}])
    assert batch["position_ids"].tolist() == [[*range(21)] * 2] and batch["labels"].tolist() == [one + two]
    torch.manual_seed(0)
    model = task.build(recipe).eval()
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([each])).logits for each in (one, two)], 1)
        torch.testing.assert_close(model(**batch).logits, alone)
        assert not torch.allclose(model(batch["input_ids"]).logits, alone, atol=1e-3)


def test_the_ngram_baseline_counts_no_more_tokens_than_fit_and_says_what_both_splits_hold(built, monkeypatch):
    recipe = replace(get_recipe("lm_krause_100m/text").at("smoke"), vocab_size=VOCAB)
    whole, total = ngram_baselines(recipe, built.path), built.manifest["splits"]["train"]["tokens"]
    assert (whole["all"]["train_tokens"], whole["seen"]["train_tokens"]) == (total, total // 64 * 64)
    assert whole["overlap"] == built.manifest["overlap"] and whole["overlap"]["test"]["ngrams"] > 0
    monkeypatch.setattr(language_model_evaluation, "NGRAM_TOKENS", 1000)
    part = ngram_baselines(recipe, built.path)
    assert (part["all"]["train_tokens"], part["seen"]["train_tokens"]) == (1000, 960)
    bits = KneserNey(built.tokens("train")[:1000], VOCAB, 5).bits(built.tokens("test"))
    assert part["all"]["bits_per_token"] == bits[1:len(built.blocks("test", 64, 1)) * 63 + 1].mean() > whole["all"]["bits_per_token"]


def test_the_overlap_is_that_of_sets_and_reads_the_training_text_once(tmp_path, monkeypatch):
    calls, shared = [], texts()[0] * 2
    monkeypatch.setattr(corpora, "ngram_hashes", lambda tokens, eos: calls.append(len(tokens)) or ngram_hashes(tokens, eos))
    documents = [f"{text} {shared if number % 3 else ''} {text}" for number, text in enumerate(texts())]
    (tmp_path / "texts").write_text(f"\n{EOS}\n".join(documents), encoding="utf-8")
    corpus = load_corpus("text", VOCAB, tmp_path / "texts", tmp_path / "corpora")

    def grams(split):
        tokens, eos = corpus.tokens(split).tolist(), corpus.tokenizer.eos_token_id
        return [each for i in range(len(tokens) - 12) if eos not in (each := tuple(tokens[i:i + 13]))]

    seen = set(grams("train"))
    for split in ("validation", "test"):
        held_out, found = grams(split), corpus.manifest["overlap"][split]
        assert found == {"ngrams": len(held_out), "in_train": pytest.approx(sum(each in seen for each in held_out) / len(held_out))}
        assert 0 < found["in_train"] < 1
    assert sorted(calls) == sorted(len(corpus.tokens(split)) for split in SPLITS)


def test_only_a_corpus_with_a_finished_tokenizer_is_asked_for_without_a_size(monkeypatch):
    asked = []
    monkeypatch.setattr(tasks, "load_corpus", lambda name, size, source: asked.append((name, size)) or SimpleNamespace(vocab_size=50_257))
    for dataset in ("fineweb_edu", "text"):  # a text of the user may have GPT-2's tokenizer, too
        tasks.recipe_corpus(replace(get_recipe("lm_krause_100m/text"), dataset=dataset, vocab_size=50_257))
    assert asked == [("fineweb_edu", None), ("text", 50_257)]
