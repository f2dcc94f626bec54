"""The hub's Parquet layout, read and checked."""

import io
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from krause_repro import evaluation, image_files
from krause_repro.evaluation import evaluate_runs, learned_sigma, nearest_neighbours, test_accuracy
from krause_repro.image_data import load, load_splits
from krause_repro.image_files import (
    CIFAR,
    CLASS_MEANS,
    COARSE,
    DATA,
    IDX_FILES,
    LABEL_COLUMNS,
    SIDES,
    data_origin,
    find_source,
    read_parquet,
)
from krause_repro.recipes import get_recipe
from krause_repro.training import train

COUNTS = {"train": 40, "test": 20}


def encode(image, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def columns(name, split, total=None):
    "Images in the mean colour of their class but for one pixel that makes them distinct, and the classes in turn."
    labels = [i % 10 for i in range(total or COUNTS[split])]
    means = torch.tensor(CLASS_MEANS.get((name, split), CLASS_MEANS["cifar10", split]))
    pixels = (means * 255).round().to(torch.uint8)[:, None, None, :].expand(10, SIDES[name], SIDES[name], -1)
    images = []
    for number, label in enumerate(labels):
        image = pixels[label].clone()
        image[divmod(number, SIDES[name])] += 1 if split == "train" else 255  # which is one less
        images.append({"bytes": encode(image.squeeze(-1).numpy()), "path": None})
    return {"image" if name == "mnist" else "img": images, LABEL_COLUMNS[name]: labels}


def write(folder, split, table, parts=1):
    table, folder = pa.table(table) if isinstance(table, dict) else table, folder / "plain_text"
    folder.mkdir(exist_ok=True, parents=True)
    for part in range(parts):
        start, stop = (len(table) * each // parts for each in (part, part + 1))
        path = folder / f"{split}-{part:05}-of-{parts:05}.parquet"
        pq.write_table(table.slice(start, stop - start), path, row_group_size=10, compression="none")
    return path


@pytest.fixture
def small(monkeypatch):
    "Data sets of few images."
    for name in LABEL_COLUMNS:
        monkeypatch.setitem(DATA, name, replace(DATA[name], classes=10, **COUNTS))
    monkeypatch.setattr(image_files, "MNIST_CLASSES", {split: (count // 10,) * 10 for split, count in COUNTS.items()})
    monkeypatch.setattr(image_files, "ARRANGEMENT", {})  # images of one colour have no neighbours that differ


@pytest.fixture
def cifar(tmp_path, small):
    for split in COUNTS:
        write(tmp_path, split, columns("cifar10", split))
    return tmp_path


@pytest.mark.parametrize("name", sorted(LABEL_COLUMNS))
@pytest.mark.parametrize("parts", [1, 3])
def test_a_data_set_is_read_in_order(tmp_path, small, name, parts):
    for split, count in COUNTS.items():
        table = columns(name, split)
        write(tmp_path, split, table, parts)
        found = load(name, split, tmp_path)
        assert found.labels.tolist() == table[LABEL_COLUMNS[name]] and len(found) == count
        assert tuple(found.images.shape[1:]) == (DATA[name].channels, SIDES[name], SIDES[name]) and found.images.is_contiguous()
        first = torch.tensor(CLASS_MEANS.get((name, split), CLASS_MEANS["cifar10", split])[3]) * 255
        assert torch.equal(found.images[3, :, 5, 7], first.round().to(torch.uint8))


def test_it_is_found_where_downloads_go(cifar, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "plain_text").rename(tmp_path / "base" / "cifar10")
    monkeypatch.setenv("KRAUSE_REPRO_DATA", str(tmp_path / "base"))
    assert len(load("cifar10", "test")) == COUNTS["test"] and find_source("cifar10", tmp_path / "base") == tmp_path / "base" / "cifar10"


def test_another_data_set_beside_it_does_not_hide_it(cifar, tmp_path):
    (tmp_path / "plain_text").rename(tmp_path / "cifar10")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(b"of something else")
    assert len(load("cifar10", "test", source=tmp_path)) == COUNTS["test"]


@pytest.mark.parametrize("name", sorted(LABEL_COLUMNS))
def test_the_environments_folder_is_searched_as_the_users_is(tmp_path, small, monkeypatch, name):
    for split in COUNTS:
        write(tmp_path, split, columns(name, split))
    monkeypatch.setenv("KRAUSE_REPRO_DATA", str(tmp_path / "plain_text"))
    assert find_source(name) == find_source(name, tmp_path / "plain_text") == tmp_path / "plain_text"
    assert len(load(name, "test")) == COUNTS["test"]


@pytest.mark.parametrize("name", sorted(IDX_FILES))
def test_so_is_it_for_original_files(tmp_path, monkeypatch, name):
    monkeypatch.setitem(DATA, name, replace(DATA[name], package_folder=None))
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "train-images-idx3-ubyte").touch()
    for folder in (raw, tmp_path):
        monkeypatch.setenv("KRAUSE_REPRO_DATA", str(folder))
        assert find_source(name) == find_source(name, folder) == raw


def test_another_data_set_where_downloads_go_is_not_taken_for_one(cifar, source, monkeypatch):
    monkeypatch.setitem(DATA, "mnist", replace(DATA["mnist"], train=50))
    for folder in (cifar, source):
        monkeypatch.setenv("KRAUSE_REPRO_DATA", str(folder))
        with pytest.raises(FileNotFoundError, match=f"no mnist in {folder}, .*; download it with: krause-repro data mnist"):
            load("mnist", "test")
        with pytest.raises(FileNotFoundError, match=f"found files in the layout of {'cifar10' if folder == cifar else 'fashion_mnist'}$"):
            load("mnist", "test", folder)


def test_of_several_copies_the_most_complete_is_read(cifar):
    (cifar / "cifar-10-batches-py").mkdir()
    assert len(load("cifar10", "test", cifar)) == COUNTS["test"] and "pixels" not in data_origin("cifar10", cifar)["test"]
    path = write(cifar / "cifar10", "test", columns("cifar10", "test"))
    assert find_source("cifar10", cifar) == cifar
    (cifar / "plain_text" / path.name).rename(cifar / path.name)  # one split here, the other there
    assert len(load("cifar10", "test", cifar)) == COUNTS["test"]
    for each in (path, cifar / path.name):
        each.unlink()
    with pytest.raises(FileNotFoundError, match="lacks test-00000-of-00001.parquet; the data set cifar10 is incomplete"):
        load("cifar10", "test", cifar)
    kind = CIFAR["cifar10"]
    for stem in [stem for stem, _ in (*kind.train_list, *kind.test_list)] + [kind.meta["filename"]]:
        (cifar / "cifar-10-batches-py" / stem).touch()
    with pytest.raises(ValueError, match="data_batch_1 does not have the expected MD5"):
        load("cifar10", "test", cifar)


def test_of_two_data_sets_in_a_folder_each_is_found_by_its_columns(cifar):
    (cifar / "plain_text").rename(cifar / "cifar10s")
    for split in COUNTS:
        write(cifar, split, columns("cifar100", split))
    (cifar / "plain_text").rename(cifar / "data")
    (cifar / "cifar10s").rename(cifar / "plain_text")
    for name, place in (("cifar10", "plain_text"), ("cifar100", "data")):
        assert find_source(name, cifar) == cifar and len(load(name, "train", cifar)) == COUNTS["train"]
        assert [path.parent.name for path in image_files.parquet_files(name, cifar, "test")] == [place]


SUPERCLASSES = """beaver dolphin otter seal whale, aquarium_fish flatfish ray shark trout, orchid poppy rose sunflower tulip,
bottle bowl can cup plate, apple mushroom orange pear sweet_pepper, clock keyboard lamp telephone television,
bed chair couch table wardrobe, bee beetle butterfly caterpillar cockroach, bear leopard lion tiger wolf,
bridge castle house road skyscraper, cloud forest mountain plain sea, camel cattle chimpanzee elephant kangaroo,
fox porcupine possum raccoon skunk, crab lobster snail spider worm, baby boy girl man woman, crocodile dinosaur lizard snake turtle,
hamster mouse rabbit shrew squirrel, maple_tree oak_tree palm_tree pine_tree willow_tree,
bicycle bus motorcycle pickup_truck train, lawn_mower rocket streetcar tank tractor"""


def test_the_superclasses_are_the_published_ones():
    found = {name: number for number, names in enumerate(SUPERCLASSES.split(",")) for name in names.split()}
    assert COARSE == tuple(found[name] for name in sorted(found)) and [COARSE.count(each) for each in range(20)] == [5] * 20


def test_classes_of_cifar100_belong_to_their_superclasses(tmp_path, small):
    for split in COUNTS:
        table = columns("cifar100", split)
        path = write(tmp_path, split, table | {"coarse_label": [COARSE[each] for each in table["fine_label"]]})
    assert len(load("cifar100", "test", tmp_path)) == COUNTS["test"]
    fine = table["fine_label"]
    write(tmp_path, "test", table | {"coarse_label": [COARSE[each] for each in [*fine[:13], fine[14], fine[13], *fine[15:]]]})
    with pytest.raises(ValueError, match=f"^{path}: column coarse_label, row 13: must be 8, the superclass of fine_label 3, got 0$"):
        load("cifar100", "test", tmp_path)
    write(tmp_path, "test", table | {"coarse_label": [None, *(COARSE[each] for each in fine[1:])]})
    with pytest.raises(ValueError, match="row 0: must be 4, the superclass of fine_label 0, got None"):
        load("cifar100", "test", tmp_path)
    write(tmp_path, "test", table)  # without the column
    assert [part["pixels"] for part in data_origin("cifar100", tmp_path).values()] == ["not compared with the published ones"] * 2


def schema(table, **changes):
    return {key: value for key, value in {**table, **changes}.items() if value is not None}


TRAIN = columns("cifar10", "train")
CHANGED = bytearray(TRAIN["img"][5]["bytes"])
CHANGED[-14] ^= 1  # of the checksum of the pixels
BAD = {  # what is wrong with the training part, and what the message says of it
    "a column of another name": (schema(TRAIN, img=None, picture=TRAIN["img"]), r"picture .*a column img or image is expected"),
    "images that are no structs": (schema(TRAIN, img=[row["bytes"] for row in TRAIN["img"]]), "column img must have the fields bytes"),
    "images that are texts": (schema(TRAIN, img=[{"bytes": "x", "path": ""}] * 40), r"column img must have the fields bytes \(binary"),
    "no labels": (schema(TRAIN, label=None), "an integer column label is expected"),
    "labels of CIFAR-100": (schema(TRAIN, label=None, fine_label=TRAIN["label"]), "fine_label .*an integer column label is expected"),
    "labels in words": (schema(TRAIN, label=[str(each) for each in TRAIN["label"]]), "an integer column label is expected"),
    "fewer images": ({k: v[:-1] for k, v in TRAIN.items()}, "column img must hold the 40 images of the train part of cifar10, got 39"),
    "a class too many": (schema(TRAIN, label=[each + 1 for each in TRAIN["label"]]), "column label, row 9: must be from 0 to 9, got 10"),
    "a class too often": (schema(TRAIN, label=[1, 1, *TRAIN["label"][2:]]), "column label must hold class 0 4 times .*got 3"),
    "shifted labels": (schema(TRAIN, label=[(each + 1) % 10 for each in TRAIN["label"]]), "column label does not fit the images"),
    "no label": (schema(TRAIN, label=[*TRAIN["label"][:13], None, *TRAIN["label"][14:]]), "label, row 13: must be from 0 to 9, got None"),
    "no image": (schema(TRAIN, img=[*TRAIN["img"][:12], None, *TRAIN["img"][13:]]), "column img, row 12: must be an image of 32×32"),
    "a path alone": (schema(TRAIN, img=[{"bytes": None, "path": "a.png"}, *TRAIN["img"][1:]]), "column img, row 0: .*no bytes"),
    "bytes that are no image": (schema(TRAIN, img=[*TRAIN["img"][:-1], {"bytes": b"x" * 99, "path": ""}]), "column img, row 39: must be"),
    "a changed byte": (schema(TRAIN, img=[*TRAIN["img"][:5], {"bytes": bytes(CHANGED), "path": ""}, *TRAIN["img"][6:]]),
                       "column img, row 5: must"),
    "images of MNIST": (schema(TRAIN, img=columns("mnist", "train")["image"]), r"column img, row 0: must be .*its size \(28, 28\)"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_named(cifar, what):
    table, message = BAD[what]
    path = write(cifar, "train", table)
    with pytest.raises(ValueError, match=message) as raised:
        load("cifar10", "train", cifar)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("where", ["footer", "row group", "empty"])
def test_a_damaged_file_is_named(cifar, where):
    path = cifar / "plain_text" / "train-00000-of-00001.parquet"
    raw = bytearray(path.read_bytes())
    raw = {"footer": raw[:-200], "row group": raw[:4] + b"\xff" * 400 + raw[404:], "empty": b""}[where]
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="column img" if where == "row group" else "is not a Parquet file, or is damaged") as raised:
        load("cifar10", "train", cifar)
    assert str(path) in str(raised.value)


def test_files_may_end_with_a_digest_but_have_no_other_name(cifar):
    folder = cifar / "plain_text"
    (folder / "test-00000-of-00001.parquet").rename(folder / "test-00000-of-00001-b42a775f407cee45.parquet")
    assert len(load("cifar10", "test", cifar)) == COUNTS["test"]
    (folder / "test-00000-of-00001-b42a775f407cee45.parquet").rename(folder / "test-0-of-all.parquet")
    with pytest.raises(ValueError, match="must hold test-00000-of-00001.parquet, .* got test-0-of-all.parquet"):
        load("cifar10", "test", cifar)


@pytest.mark.parametrize("split", COUNTS)
def test_a_missing_part_is_named(cifar, split):
    (cifar / "plain_text" / f"{split}-00000-of-00001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {split}-00000-of-00001.parquet"):
        load_splits(replace(get_recipe("kvit_s/cifar10").at("smoke"), train_images=20, test_images=10, held_out=10), cifar)
    write(cifar, split, columns("cifar10", split), 2)
    (cifar / "plain_text" / f"{split}-00001-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {split}-00001-of-00002.parquet"):
        read_parquet("cifar10", cifar, split)


def test_a_run_and_its_result_keep_the_origin_of_the_data(cifar, tmp_path, monkeypatch):
    (cifar / "lossless.json").write_text(json.dumps({"train": [3], "test": []}), encoding="utf-8")
    small = {"train_images": 20, "test_images": 10, "held_out": 10, "epochs": 1, "batch_size": 10}
    recipe = replace(get_recipe("softmax_regression/cifar10").at("smoke"), **small)
    run = train(recipe, runs=tmp_path / "runs", progress=False, source=cifar)
    assert run.environment()["data"] == data_origin("cifar10", cifar) == evaluate_runs([run], cifar)["data"]
    assert learned_sigma(run) is None and run.environment()["data"]["train"]["altered"] == 1
    monkeypatch.setattr(evaluation, "NEIGHBOURS", (1, 20))
    found = nearest_neighbours(replace(recipe, train_images=None), cifar)  # images of a class are equal here
    assert found["k"] == 1 and found["held_out_by_k"]["1"] == 1 > found["held_out_by_k"]["20"]
    assert found["accuracy"] == 0.9  # the mean colour of one class of test images is nearer to that of another class for training


def test_copies_are_refused(cifar, monkeypatch):
    monkeypatch.setattr(image_files, "MEANS_WITHIN", 1.0)  # of the two parts the classes have other means
    recipe = replace(get_recipe("kvit_s/cifar10").at("smoke"), train_images=20, test_images=10, held_out=10)
    train, test = (columns("cifar10", split) for split in COUNTS)
    write(cifar, "train", train | {"img": train["img"][:30] + train["img"][:10]})
    with pytest.raises(ValueError, match="10 of 40 are in the train part of cifar10 twice"):
        load_splits(recipe, cifar)
    write(cifar, "train", train)
    write(cifar, "test", test | {"img": train["img"][:10] + test["img"][10:]})
    with pytest.raises(ValueError, match="10 of 20 are in both parts of cifar10"):
        load_splits(recipe, cifar)


def test_a_run_belongs_to_its_images(cifar, tmp_path):
    small = {"train_images": 20, "test_images": 10, "held_out": 10, "epochs": 1, "batch_size": 10}
    recipe, other = replace(get_recipe("softmax_regression/cifar10").at("smoke"), **small), tmp_path / "other"
    for split in COUNTS:
        write(other, split, {key: list(reversed(column)) for key, column in columns("cifar10", split).items()})
    run = train(recipe, runs=tmp_path / "runs", progress=False, source=cifar)
    assert test_accuracy(run, cifar) == test_accuracy(run)  # from the cache
    for attempt in (lambda: test_accuracy(run, other), lambda: train(recipe, runs=tmp_path / "runs", source=other)):
        with pytest.raises(ValueError, match="source must be the data of the run .*, got other files of cifar10"):
            attempt()
    (run.path / "finished.json").unlink()
    with pytest.raises(ValueError, match="got other files of cifar10"):
        train(recipe, runs=tmp_path / "runs", progress=False, source=other)
    assert train(recipe, runs=tmp_path / "runs", progress=False, source=cifar).finished


def test_a_run_knows_its_files_and_how_many_images_are_altered(cifar):
    recipe = replace(get_recipe("kvit_s/cifar10").at("smoke"), train_images=20, test_images=10, held_out=10)
    assert load_splits(recipe, cifar).origin["train"]["altered"] is None
    (cifar / "lossless.json").write_text(json.dumps({"train": [3, 17, 3], "test": []}), encoding="utf-8")
    origin = load_splits(recipe, cifar).origin
    assert {split: (origin[split]["images"], origin[split]["altered"]) for split in COUNTS} == {"train": (40, 2), "test": (20, 0)}
    before = origin["train"]["files"]["train-00000-of-00001.parquet"]
    write(cifar, "train", columns("cifar10", "train"), 2)
    (cifar / "plain_text" / "train-00000-of-00001.parquet").unlink()
    names = [f"train-0000{part}-of-00002.parquet" for part in (0, 1)]
    assert len(before) == 64 and list(data_origin("cifar10", cifar)["train"]["files"]) == names
    (cifar / "lossless.json").unlink()
    table = columns("cifar10", "test")
    jpeg = [{"bytes": encode(np.asarray(Image.open(io.BytesIO(row["bytes"]))), "JPEG"), "path": None} for row in table["img"][:7]]
    write(cifar, "test", table | {"img": jpeg + table["img"][7:]})
    assert [part["altered"] for part in data_origin("cifar10", cifar).values()] == [None, 7]
    for wrong in ({"train": [40], "test": []}, {"test": []}, [1]):
        (cifar / "lossless.json").write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(ValueError, match=r"lossless.json: train must be a list of indices from 0 to 39"):
            load_splits(recipe, cifar)
