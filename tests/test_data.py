"""Real images, whole and unchanged; every damaged or missing file named; augmentation that does what it says."""

import gzip
import io
import shutil
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image

from krause_repro import image_data, image_files
from krause_repro.image_data import (
    PHOTOGRAPH_CROP,
    PHOTOGRAPH_PLACES,
    Collator,
    ImageFolderSet,
    ImageSet,
    fetch,
    imagenet_transform,
    load,
    load_splits,
    photograph_folder,
    random_crop_flip,
    read_image,
    split_held_out,
)
from krause_repro.image_files import (
    DATA,
    FASHION_MNIST_FILES,
    arrangement,
    data_origin,
    find_source,
    read_idx,
)
from krause_repro.image_recipes import AUGMENTATIONS, FOLDER_DATASETS, IMAGE_DATASETS, PIXELS
from krause_repro.recipes import RECIPES, get_recipe
from krause_repro.records import cache_folder, file_digest
from krause_repro.runs import check_data, check_same_data

STEMS = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"), "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}


def write_idx(path, array):
    "A valid IDX file of bytes, packed if the name says so."
    raw = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.numpy().tobytes()
    path.write_bytes(gzip.compress(raw, 1) if path.suffix == ".gz" else raw)
    return raw


@pytest.fixture
def small(source, tmp_path):
    "A copy of Fashion-MNIST's test files, to be damaged."
    for stem in STEMS["test"]:
        shutil.copyfile(source / stem, tmp_path / stem)
    return tmp_path


# Fashion-MNIST


def test_fashion_mnist_is_the_published_one(source):
    for split, count in (("train", 60_000), ("test", 10_000)):
        found = load("fashion_mnist", split, source)
        assert found.images.shape == (count, 1, 28, 28) and found.images.dtype == torch.uint8
        assert len(found) == count and found.labels.dtype == torch.int64
        assert found.labels.bincount().tolist() == [count // 10] * 10
        if split == "train":
            pixels = found.images[:20_000].float() / 255
            assert [pixels.mean().item(), pixels.std().item()] == pytest.approx([x[0] for x in PIXELS["fashion_mnist"]], abs=2e-3)


def test_packed_files_serve_as_well(small):
    plain = load("fashion_mnist", "test", small)
    for stem in STEMS["test"]:
        (small / f"{stem}.gz").write_bytes(gzip.compress((small / stem).read_bytes(), 1))
        (small / stem).unlink()
    packed = load("fashion_mnist", "test", small)
    assert torch.equal(packed.images, plain.images) and torch.equal(packed.labels, plain.labels)


def test_torchvisions_layout_is_found(small, source, no_downloads, monkeypatch):
    monkeypatch.setitem(DATA, "fashion_mnist", replace(DATA["fashion_mnist"], package_folder=None))
    raw = no_downloads / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for stem in FASHION_MNIST_FILES:
        (raw / stem).symlink_to(source / stem)
    assert find_source("fashion_mnist") == find_source("fashion_mnist", no_downloads) == fetch("fashion_mnist") == raw
    assert find_source("fashion_mnist", raw.parent) == raw
    assert len(load("fashion_mnist", "test")) == 10_000


def test_a_missing_data_set_names_every_place(tmp_path, no_downloads, monkeypatch):
    package = str(tmp_path / "package")
    monkeypatch.setitem(DATA, "fashion_mnist", replace(DATA["fashion_mnist"], package_folder=package))
    with pytest.raises(FileNotFoundError) as error:
        load("fashion_mnist", "train")
    for place in (package, no_downloads, no_downloads / "FashionMNIST" / "raw"):
        assert str(place) in str(error.value)
    assert "krause-repro data fashion_mnist" in str(error.value)


def test_a_folder_that_is_given_is_the_only_place(tmp_path):
    for name in (name for name, spec in DATA.items() if not spec.bundled):
        for missing in (tmp_path / "nowhere", tmp_path):
            with pytest.raises(FileNotFoundError, match=f"no {name} in {missing}") as error:
                fetch(name, missing)
            assert "/usr/share" not in str(error.value) and ".cache" not in str(error.value)


def test_cifar_and_imagenet_say_where_they_were_looked_for(no_downloads):
    for name in ("cifar10", "cifar100"):
        with pytest.raises(FileNotFoundError, match=f"{no_downloads}, {no_downloads / name}; download it with: krause-repro data {name}"):
            load(name, "test")
    with pytest.raises(FileNotFoundError, match="name the folder that holds train/ and val/ by --source or KRAUSE_REPRO_DATA"):
        fetch("imagenet")


def test_images_are_kept_in_the_download_folder(monkeypatch, tmp_path, no_downloads):
    assert fetch("photographs") == no_downloads / "photographs" == cache_folder() / "photographs"
    (tmp_path / "file").touch()
    monkeypatch.setenv("KRAUSE_REPRO_DATA", str(tmp_path / "file"))
    for ask in (cache_folder, lambda: fetch("cifar10"), lambda: load("mnist", "test")):
        with pytest.raises(ValueError, match=f"^KRAUSE_REPRO_DATA must name a folder, got the file {tmp_path}/file$"):
            ask()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("damage", ["cut", "empty", "one byte", "another file"])
@pytest.mark.parametrize("which", [0, 1])
def test_damaged_files_are_named(small, which, damage, packed):
    path = small / STEMS["test"][which]
    raw = path.read_bytes()
    if packed:
        path.unlink()
        path = path.with_name(f"{path.name}.gz")
    content = gzip.compress(raw, 1) if packed else raw
    middle = len(content) // 2
    path.write_bytes({
        "cut": content[:middle], "empty": b"", "one byte": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:],
        "another file": gzip.compress(b"hello") if packed else b"hello",
    }[damage])
    with pytest.raises(ValueError, match=f"{path} (is (truncated|not)|does not have the expected SHA-256)"):
        load("fashion_mnist", "test", small)


def test_a_byte_changed_before_packing_is_noticed(small):
    path = small / STEMS["test"][0]
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 1
    path.unlink()
    path = path.with_name(f"{path.name}.gz")
    path.write_bytes(gzip.compress(raw, 1))
    with pytest.raises(ValueError, match=f"{path} does not have the expected SHA-256"):
        load("fashion_mnist", "test", small)


def test_another_data_set_of_the_same_form_is_refused(small):
    write_idx(small / STEMS["test"][0], torch.zeros(10_000, 28, 28, dtype=torch.uint8))
    with pytest.raises(ValueError, match="does not have the expected SHA-256: it is another data set"):
        load("fashion_mnist", "test", small)


@pytest.mark.parametrize("which", [0, 1])
def test_images_without_labels(small, which):
    missing = STEMS["test"][which]
    (small / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{small} lacks {missing}"):
        load("fashion_mnist", "test", small)
    with pytest.raises(FileNotFoundError, match=f"{small} lacks train-images"):
        load("fashion_mnist", "train", small)


@pytest.mark.parametrize(("name", "split", "message"), [
    ("svhn", "train", "dataset must be one of fashion_mnist, cifar10, cifar100, imagenet, photographs, mnist, digits, photograph_tiles"),
    ("fashion_mnist", "validation", "split must be 'train' or 'test', got 'validation'"),
])
def test_wrong_name_and_split(source, name, split, message):
    with pytest.raises(ValueError, match=message):
        load(name, split, source)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_cifar_that_is_not_whole_is_refused(tmp_path, damage):
    for name, file in (("cifar10", "cifar-10-batches-py/data_batch_1"), ("cifar100", "cifar-100-python/train")):
        (tmp_path / file).parent.mkdir()
        if damage == "truncated":
            (tmp_path / file).write_bytes(b"cut")
        what = "is missing" if damage == "missing" else "does not have the expected MD5: it is truncated, changed or of another data set"
        with pytest.raises(ValueError, match=f"{tmp_path} holds an incomplete or damaged {name}: {tmp_path / file} {what}; delete it"):
            load(name, "train", tmp_path)


def test_mnist_must_be_the_original(tmp_path):
    for stem, shape in zip(STEMS["test"], ((10_000, 28, 28), (10_000,)), strict=True):
        write_idx(tmp_path / stem, torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte does not have the expected SHA-256"):
        load("mnist", "test", tmp_path)


def test_read_idx(tmp_path):
    array = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
    for name in ("plain", "packed.gz"):
        write_idx(tmp_path / name, array)
        found = read_idx(tmp_path / name)
        assert torch.equal(found, array)
        found += 1  # may be written to
    raw = write_idx(tmp_path / "longer", array)
    (tmp_path / "longer").write_bytes(raw + b"\0")
    with pytest.raises(ValueError, match="its header says 24 values, it holds 25"):
        read_idx(tmp_path / "longer")
    (tmp_path / "header").write_bytes(raw[:6])
    with pytest.raises(ValueError, match="header is truncated"):
        read_idx(tmp_path / "header")


def test_recipes_and_data_know_the_same_sets():
    assert tuple(DATA) == IMAGE_DATASETS and tuple(name for name, spec in DATA.items() if spec.folders) == FOLDER_DATASETS


def test_image_set():
    images, labels = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8), torch.arange(5)
    found = ImageSet(images, labels).subset(torch.tensor([3, 1]))
    assert len(found) == 2 and torch.equal(found[0]["pixel_values"], images[3]) and found[1]["labels"] == 1
    for wrong in ((images.float(), labels), (images[0], labels), (images, labels[:4]), (images, labels[:, None])):
        with pytest.raises(ValueError, match="images must be uint8"):
            ImageSet(*wrong)


# Parquet files


def write_mnist(folder, images, kind="PNG"):
    "Parquet files of MNIST's test part, with the classes in turn."
    rows = []
    for image in images:
        Image.fromarray(image.squeeze(0).numpy()).save(buffer := io.BytesIO(), kind)
        rows.append({"bytes": buffer.getvalue(), "path": None})
    (folder / "mnist").mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": rows, "label": [i % 10 for i in range(len(images))]})
    pq.write_table(table, path := folder / "mnist" / "test-00000-of-00001.parquet")
    return path


@pytest.fixture
def digits(monkeypatch):
    "Twenty images that are the test part of a small MNIST, in which each quadrant has another mean."
    images = torch.randint(0, 40, (20, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images += torch.arange(0, 56, 2, dtype=torch.uint8) + torch.arange(0, 112, 4, dtype=torch.uint8)[:, None]
    monkeypatch.setitem(DATA, "mnist", replace(DATA["mnist"], train=20, test=20))
    monkeypatch.setattr(image_files, "MNIST_CLASSES", dict.fromkeys(("train", "test"), (2,) * 10))
    monkeypatch.setattr(image_files, "CLASS_MEANS", {})
    monkeypatch.setattr(image_files, "ARRANGEMENT", {("mnist", "test"): tuple(arrangement(images).tolist())})
    return images


def blurred(images):
    return torch.nn.functional.avg_pool2d(images.float(), 2).repeat_interleave(2, 2).repeat_interleave(2, 3).to(torch.uint8)


@pytest.mark.parametrize("change", [
    lambda images: images.flip(2), lambda images: images.flip(3), lambda images: images.flip(2, 3), lambda images: images.mT,
    lambda images: images.roll(3, 3), blurred,
], ids=("upside-down", "mirrored", "turned", "transposed", "shifted", "blurred"))
def test_images_changed_in_space_are_refused(digits, tmp_path, change):
    write_mnist(tmp_path, digits)
    assert torch.equal(load("mnist", "test", tmp_path).images, digits)
    path = write_mnist(tmp_path, change(digits).contiguous())
    with pytest.raises(ValueError, match=f"{path}: column image must hold the images of mnist upright and unchanged: means of the quad"):
        load("mnist", "test", tmp_path)


def test_the_arrangement_is_of_quadrants_and_neighbours():
    picture = torch.tensor([[0, 0, 51, 51], [0, 0, 51, 51], [102, 102, 255, 255], [102, 102, 255, 255]], dtype=torch.uint8)
    found = arrangement(picture.expand(1500, 2, 4, 4))
    assert found.tolist() == pytest.approx([0, 0.2, 0.4, 1, (0.2 + 0.6) / 6, (0.4 + 0.8) / 6], abs=1e-5)
    for (name, split), means in image_files.CLASS_MEANS.items():  # the same images in both tables
        counts = image_files.MNIST_CLASSES[split] if name == "mnist" else (1,) * 10
        mean = np.average(np.mean(means, 1), weights=counts)
        assert np.mean(image_files.ARRANGEMENT[name, split][:4]) == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize("place", ["default/test/0000", "mnist/test/0000", "test/0000", "snapshots/8f1b/mnist/test-00000-of-00001",
                                   "snapshots/8f1b/data/test-00000-of-00001", "snapshots/8f1b/default/test/0000"])
def test_the_hubs_cache_and_its_conversions_are_found(digits, tmp_path, place):
    path = write_mnist(tmp_path, digits).rename(tmp_path / "file")
    (tmp_path / f"{place}.parquet").parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / f"{place}.parquet").symlink_to(path)
    assert torch.equal(load("mnist", "test", tmp_path).images, digits)
    if place.endswith("/0000"):
        (tmp_path / f"{place}.parquet").rename(tmp_path / f"{place[:-4]}0001.parquet")
        with pytest.raises(FileNotFoundError, match=f"{(tmp_path / place).parent} lacks 0000.parquet"):
            load("mnist", "test", tmp_path)


def test_what_is_expected_and_what_lies_there_is_said(small, digits):
    "And nothing is to be downloaded if the user named the place."
    expected = "expected cifar-10-batches-py, or the hub.s train-00000-of-00001.parquet or train/0000.parquet, also in .*; found "
    path, empty = small / STEMS["test"][0], small / "empty"
    empty.mkdir()
    for place, found in ((small, "files in the layout of fashion_mnist$"), (path, "a file; name the folder"), (empty, "nothing")):
        with pytest.raises(FileNotFoundError, match=f"no cifar10 in {place}, {place}/cifar10; {expected}{found}") as error:
            fetch("cifar10", place)
        assert "download" not in str(error.value)
    (empty / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match="expected IDX files such as train-images-idx3-ubyte .*; found notes.txt"):
        load("mnist", "test", empty)
    with pytest.raises(FileNotFoundError, match="expected train and val with a folder of images for each class; found files in the layout"):
        load("imagenet", "test", write_mnist(small / "other", digits).parent)


def test_how_many_images_are_altered_is_unknown_unless_something_tells(digits, tmp_path):
    shutil.copy(write_mnist(tmp_path, digits), tmp_path / "mnist" / "train-00000-of-00001.parquet")
    shutil.copy(write_mnist(tmp_path, digits, "JPEG"), tmp_path / "jpeg.parquet")
    write_mnist(tmp_path, digits)
    assert [part["altered"] for part in data_origin("mnist", tmp_path).values()] == [None, None]
    shutil.copy(tmp_path / "jpeg.parquet", tmp_path / "mnist" / "test-00000-of-00001.parquet")
    assert [part["altered"] for part in data_origin("mnist", tmp_path).values()] == [None, 20]
    (tmp_path / "mnist" / "lossless.json").write_text('{"train": [], "test": [1]}')
    assert [part["altered"] for part in data_origin("mnist", tmp_path).values()] == [0, 1]


def test_original_files_are_recorded_by_their_published_checksums(finished, source, tmp_path):
    origin = finished.environment()["data"]
    assert origin == data_origin("fashion_mnist", source) and [part["altered"] for part in origin.values()] == [0, 0]
    for split, stems in STEMS.items():
        assert origin[split]["files"] == {stem: file_digest(source / stem) for stem in stems}
    assert (origin["train"]["images"], origin["test"]["images"]) == (60_000, 10_000)
    (tmp_path / "cifar-10-batches-py").mkdir()
    files = {split: part["files"] for split, part in data_origin("cifar10", tmp_path).items()}
    assert list(files["train"]) == [f"data_batch_{number}" for number in range(1, 6)] and list(files["test"]) == ["test_batch"]
    assert files["test"]["test_batch"] == f"md5:{torchvision.datasets.CIFAR10.test_list[0][1]}"
    assert data_origin("digits") == data_origin("imagenet") == {}
    check_same_data(finished, source)
    with pytest.raises(ValueError, match="source must be the data of the run .*, got other files of fashion_mnist"):
        check_data(finished, data_origin("cifar10", tmp_path))
    earlier = replace(finished, path=tmp_path)  # of a version that recorded no data
    (tmp_path / "environment.json").write_text('{"commit": null, "device": "CPU", "versions": {}}')
    check_data(earlier, origin)


# Splits


def test_held_out_images_are_fixed_and_apart():
    kept, held_out = split_held_out(1000, 150)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(1000)) and len(held_out) == 150
    torch.manual_seed(1)
    again = split_held_out(1000, 150)
    assert torch.equal(again[0], kept) and torch.equal(again[1], held_out)
    few, same = split_held_out(1000, 150, 20)
    assert torch.equal(few, kept[:20]) and torch.equal(same, held_out)
    assert held_out.tolist() != sorted(held_out.tolist())
    assert split_held_out(10, 3)[1].tolist() == torch.randperm(10, generator=torch.Generator().manual_seed(3407))[:3].tolist()


@pytest.mark.parametrize("held_out", [0, -1, 10, 11, 2.0, True])
def test_held_out_must_leave_something(held_out):
    with pytest.raises(ValueError, match=f"held_out must be (between 1 and 9|an integer ≥ 1), got {held_out}"):
        split_held_out(10, held_out)


@pytest.mark.parametrize("limit", [0, -1, 8, 2.0, True])
def test_a_limit_must_be_possible(limit):
    with pytest.raises(ValueError, match=f"limit must be (between 1 and 7, or None.*|an integer ≥ 1), got {limit}"):
        split_held_out(10, 3, limit)


def test_splits_of_a_recipe(source, recipe):
    splits = load_splits(recipe, source)
    assert (len(splits.train), len(splits.held_out), len(splits.test)) == (32, 64, 64)
    whole, test = load("fashion_mnist", "train", source), load("fashion_mnist", "test", source)
    kept, held_out = split_held_out(60_000, 64, 32)
    assert torch.equal(splits.train.images, whole.images[kept]) and torch.equal(splits.held_out.labels, whole.labels[held_out])
    chosen, every = ([image.numpy().tobytes() for image in images] for images in (splits.test.images, test.images))
    assert len(set(chosen)) == 64 and set(chosen) <= set(every)
    again = load_splits(replace(recipe, test_images=None), source)
    assert torch.equal(again.test.images, test.images) and torch.equal(again.train.images, splits.train.images)


@pytest.mark.parametrize(("change", "message"), [
    ({"classes": 11}, "classes must be 10, as fashion_mnist has it, got 11"), ({"channels": 3}, "channels must be 1, as"),
    ({"image_size": 32}, "image_size must be 28, as"), ({"train_images": 59_990}, "train_images must be at most 59936, since 64 of 60000"),
    ({"held_out": 60_000}, "held_out must be between 1 and 59999"), ({"test_images": 10_000}, "test_images must be between 1 and 9999"),
])
def test_a_recipe_that_does_not_fit_its_data_is_refused(source, recipe, change, message):
    with pytest.raises(ValueError, match=message):
        load_splits(replace(recipe, **change), source)


@pytest.fixture
def folder(tmp_path):
    "A tiny ImageNet: two classes, pictures of several sizes, one of them without colour."
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 5), ("val", 2)):
        for label in ("ant", "bee"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                shape = (20 + 4 * i, 24) if i == 0 else (20 + 4 * i, 24, 3)
                noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
                Image.fromarray(noise.numpy()).save(tmp_path / split / label / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("augmentation", ["imagenet", "imagenet_jitter"])
def test_folder_of_images(folder, augmentation):
    recipe = replace(
        get_recipe("kvit_s16/imagenet").at("smoke"), image_size=16, patch_size=4, classes=2, train_images=None, held_out=3, test_images=3,
        augmentation=augmentation,
    )
    splits = load_splits(recipe, folder)
    assert (len(splits.train), len(splits.held_out), len(splits.test)) == (7, 3, 3)
    assert not set(splits.train.indices) & set(splits.held_out.indices)
    whole = load_splits(replace(recipe, test_images=None), folder).test
    assert [int(whole[i]["labels"]) for i in range(len(whole))] == [0, 0, 1, 1]
    for part in (splits.train, splits.held_out, splits.test):
        for i in range(len(part)):
            assert part[i]["pixel_values"].shape == (3, 16, 16) and part[i]["pixel_values"].dtype == torch.uint8
    torch.manual_seed(0)
    assert any(not torch.equal(splits.train[0]["pixel_values"], splits.train[0]["pixel_values"]) for _ in range(5))
    assert torch.equal(splits.held_out[0]["pixel_values"], splits.held_out[0]["pixel_values"])
    batch = Collator(recipe, training=True)([splits.train[i] for i in range(4)])
    assert batch["pixel_values"].shape == (4, 3, 16, 16) and batch["labels"].shape == (4, 2)


def test_folders_must_have_the_same_classes(folder):
    "A class that is missing on one side would shift the numbers of all that follow it."
    recipe = replace(get_recipe("kvit_s16/imagenet").at("smoke"), image_size=16, classes=2, train_images=None, held_out=3, test_images=None)
    shutil.rmtree(folder / "val" / "ant")
    with pytest.raises(ValueError, match="val.*classes"):
        load_splits(recipe, folder)
    shutil.rmtree(folder / "val")
    with pytest.raises(FileNotFoundError, match="val"):
        load_splits(recipe, folder)


@pytest.mark.parametrize(("change", "message"), [
    (lambda folder: ((folder / "val").rename(folder / "old"), (folder / "val").symlink_to(folder / "train")), "val must hold other images"),
    (lambda folder: (shutil.rmtree(folder / "val/ant"), (folder / "val/ant").symlink_to(folder / "train/bee")), "val/ant must hold other"),
    (lambda folder: (shutil.rmtree(folder / "val"), shutil.copytree(folder / "train", folder / "val")), "10 of 10 are in both parts of"),
    (lambda folder: shutil.copy(folder / "val/ant/0.png", folder / "val/bee"), "1 of 4 are in the test part of imagenet twice"),
])
def test_images_in_both_parts_are_refused(folder, change, message):
    change(folder)
    with pytest.raises(ValueError, match=message):
        load_splits(photographs(), folder)


@pytest.mark.parametrize("wrong", [5, b"data", ["data"]])
def test_a_source_that_is_no_path_is_refused(wrong):
    with pytest.raises(ValueError, match="source must be a file or folder, got"):
        load("mnist", "test", wrong)


# Images that cannot be read


def photographs(**changes):
    "A recipe for the `folder` of ants and bees."
    changes = {"image_size": 16, "patch_size": 4, "classes": 2, "train_images": None, "held_out": 3, "test_images": None} | changes
    return replace(get_recipe("kvit_s16/imagenet").at("smoke"), **changes)


@pytest.fixture
def damaged(folder):
    "The same folder with a JPEG that is cut short, a text and an empty file among its images."
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).numpy()
    Image.fromarray(noise).save(folder / "train" / "ant" / "cut.jpg")
    whole = (folder / "train" / "ant" / "cut.jpg").read_bytes()
    (folder / "train" / "ant" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "train" / "bee" / "text.jpg").write_text("not an image", encoding="utf-8")
    (folder / "val" / "bee" / "empty.jpeg").write_bytes(b"")
    return folder


DAMAGED = {"train/ant/cut.jpg", "train/bee/text.jpg", "val/bee/empty.jpeg"}


@pytest.mark.parametrize("name", sorted(DAMAGED))
def test_an_image_that_cannot_be_decoded_is_named_with_the_other_choice(damaged, name):
    message = f"{damaged / name} is not a readable image .*unreadable='skip' .krause-repro train --unreadable skip"
    with pytest.raises(ValueError, match=message):
        read_image(damaged / name)


RAMP = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)


@pytest.mark.parametrize(("name", "picture"), [
    ("16.png", Image.fromarray(RAMP)), ("16.tif", Image.fromarray(RAMP)), ("big_endian.tif", Image.fromarray(RAMP.astype(">u2"))),
    ("16.pgm", Image.fromarray(RAMP.astype(np.int32))), ("8.png", Image.fromarray((RAMP // 257).astype(np.uint8))),
])
def test_levels_of_16_bits_are_scaled(tmp_path, name, picture):
    picture.save(tmp_path / name)
    assert np.array_equal(np.asarray(read_image(tmp_path / name)), np.arange(256).reshape(16, 16, 1).repeat(3, 2))


def test_levels_of_12_bits_and_white_at_zero_are_as_the_file_says():
    grey = Image.fromarray(np.array([[0, 4095]], dtype=np.uint16))
    grey.tag_v2 = {258: (12,)}
    assert np.asarray(image_data.to_rgb(grey))[0, :, 0].tolist() == [0, 255]
    grey.tag_v2 = {258: (12,), 262: 0}
    assert np.asarray(image_data.to_rgb(grey))[0, :, 0].tolist() == [255, 0]


def test_signed_levels_of_a_tiff_are_refused():
    grey = Image.fromarray(np.array([[0, 200]], dtype=np.uint8))
    grey.tag_v2 = {339: (2,)}  # Pillow shows −56 as 200
    with pytest.raises(ValueError, match="signed integers"):
        image_data.to_rgb(grey)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_without_a_known_range_are_refused_by_file_and_mode(folder, mode):
    path = folder / "train" / "ant" / "numbers.tif"
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).convert(mode).save(path)
    for ask in (lambda: read_image(path), lambda: load_splits(photographs(), folder)):
        with pytest.raises(ValueError, match=f"numbers.tif.*its mode is {mode}, 32-bit values of unknown range"):
            ask()
    assert load_splits(photographs(), folder, "skip").left_out == ("train/ant/numbers.tif",)


def test_damaged_images_stop_before_training(damaged):
    message = f"2 of 12 images in {damaged}/train cannot be decoded; the first: {damaged}/train/ant/cut.jpg is not .*--unreadable skip"
    with pytest.raises(ValueError, match=message):
        load_splits(photographs(), damaged)
    with pytest.raises(ValueError, match=f"1 of 5 images in {damaged}/val cannot be decoded; the first: .*empty.jpeg is not"):
        load("imagenet", "test", damaged)


def test_in_a_large_folder_a_damaged_image_stops_when_it_is_met(damaged, monkeypatch):
    monkeypatch.setattr(image_data, "SMALL_FOLDER", 0)
    found = load("imagenet", "test", damaged)
    for i, (path, _) in enumerate(found.data.samples):
        if path.endswith("empty.jpeg"):
            with pytest.raises(ValueError, match="empty.jpeg is not a readable image"):
                found[i]
        else:
            assert found[i]["pixel_values"].shape == (3, 224, 224)


def test_damaged_images_are_skipped_and_told(damaged, folder):
    splits = load_splits(photographs(), damaged, "skip")
    assert (len(splits.train), len(splits.held_out), len(splits.test)) == (7, 3, 4)
    assert set(splits.left_out) == DAMAGED and len(splits.left_out) == 3
    for name in DAMAGED:
        (folder / name).unlink()
    clean = load_splits(photographs(), folder, "skip")
    assert clean.left_out == () and load_splits(photographs(), folder).left_out == ()
    for part in ("held_out", "test"):
        for one, other in zip(getattr(splits, part), getattr(clean, part), strict=True):
            assert torch.equal(one["pixel_values"], other["pixel_values"]) and one["labels"] == other["labels"]
    assert splits.train.indices == clean.train.indices


def test_a_whole_data_set_of_folders_has_its_number_of_images(damaged, monkeypatch):
    for test in (5, 6):  # those left out are counted
        monkeypatch.setitem(DATA, "imagenet", replace(DATA["imagenet"], classes=2, train=12, test=test))
        with nullcontext() if test == 5 else pytest.raises(ValueError, match="val must have the 6 images of imagenet, got 5"):
            load_splits(photographs(), damaged, "skip")


def test_a_large_folder_is_decoded_once_until_it_changes(damaged, no_downloads, monkeypatch):
    monkeypatch.setattr(image_data, "SMALL_FOLDER", 0)
    calls, works = [], image_data.damaged_images
    monkeypatch.setattr(image_data, "damaged_images", lambda paths: calls.append(len(paths)) or works(paths))
    first, again = (load("imagenet", "train", damaged, unreadable="skip") for _ in range(2))
    assert calls == [12] and first.left_out == again.left_out == ["train/ant/cut.jpg", "train/bee/text.jpg"]
    (damaged / "train" / "bee" / "1.png").write_bytes(b"no more")
    assert load("imagenet", "train", damaged, unreadable="skip").left_out == [*first.left_out[:1], "train/bee/1.png", *first.left_out[1:]]
    assert calls == [12, 12] and len(list((no_downloads / "scans").iterdir())) == 2


@pytest.mark.parametrize("large", [False, True])
def test_a_broken_link_is_a_damaged_image(folder, no_downloads, monkeypatch, large):
    (folder / "val" / "ant" / "9.png").symlink_to(folder / "gone.png")
    with pytest.raises(ValueError, match="9.png is not a readable image .*No such file"):
        load("imagenet", "test", folder)
    if large:
        monkeypatch.setattr(image_data, "SMALL_FOLDER", 0)
    assert load("imagenet", "test", folder, unreadable="skip").left_out == ["val/ant/9.png"]


def test_trouble_of_the_disk_is_never_skipped(damaged, monkeypatch):
    with pytest.raises(FileNotFoundError):
        read_image(damaged / "train" / "ant" / "gone.png")
    with pytest.raises(IsADirectoryError):
        read_image(damaged / "train" / "ant")

    def broken(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(image_data.Image, "open", broken)
    with pytest.raises(OSError, match="Input/output error"):
        load("imagenet", "train", damaged, unreadable="skip")


def test_a_class_without_images_is_named(folder):
    for path in (folder / "train" / "bee").iterdir():
        path.write_text("no image", encoding="utf-8")
    with pytest.raises(ValueError, match="train has no readable image of class bee"):
        load_splits(photographs(), folder, "skip")
    shutil.rmtree(folder / "train" / "bee")
    (folder / "train" / "bee").mkdir()
    for unreadable in ("stop", "skip"):
        with pytest.raises(FileNotFoundError, match=f"{folder}/train must hold one folder of images for each class: .* bee"):
            load_splits(photographs(), folder, unreadable)


def test_a_class_only_in_val_is_named(folder):
    shutil.copytree(folder / "val" / "bee", folder / "val" / "wasp")
    for unreadable in ("stop", "skip"):
        with pytest.raises(ValueError, match="must have the same classes .*1 are in only one of them: wasp"):
            load_splits(photographs(), folder, unreadable)


@pytest.mark.parametrize("wrong", ["ignore", "", None, True])
def test_another_word_for_unreadable_is_refused(folder, source, wrong):
    for name, place in (("imagenet", folder), ("fashion_mnist", source)):
        with pytest.raises(ValueError, match=f"unreadable must be one of stop, skip, got {wrong!r}"):
            load(name, "test", place, unreadable=wrong)


# Two photographs


def test_photographs_are_cut_from_places_apart(tmp_path):
    seen = {split: torch.zeros(427, 640, dtype=torch.bool) for split in PHOTOGRAPH_PLACES}
    for split, places in PHOTOGRAPH_PLACES.items():
        for top, left in places:
            assert 0 <= top <= 427 - PHOTOGRAPH_CROP and 0 <= left <= 640 - PHOTOGRAPH_CROP
            seen[split][top: top + PHOTOGRAPH_CROP, left: left + PHOTOGRAPH_CROP] = True
    assert not (seen["train"] & seen["val"]).any() and seen["train"].sum() > 0.9 * 427 * 400 and seen["val"].sum() > 0.9 * 427 * 240
    folder = photograph_folder(tmp_path / "made" / "photographs")
    assert [path.name for path in folder.parent.iterdir()] == ["photographs"]
    assert "no measure of anything" in (folder / "README.txt").read_text(encoding="utf-8")
    for split, count in (("train", DATA["photographs"].train), ("test", DATA["photographs"].test)):
        found = load("photographs", split, folder)
        assert found.data.classes == ["china", "flower"] and found.data.targets == [0] * (count // 2) + [1] * (count // 2)
        assert {read_image(path).size for path, _ in found.data.samples} == {(240, 240)}


def test_photographs_are_those_of_scikit_learn_and_the_same_each_time(tmp_path):
    from sklearn.datasets import load_sample_image

    one, two = (photograph_folder(tmp_path / name) for name in ("one", "two"))
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(files) == 1 + 48 + 16 and all((one / name).read_bytes() == (two / name).read_bytes() for name in files)
    crop = np.asarray(read_image(one / "val" / "flower" / "026_400.jpg")).astype(int)
    assert np.abs(crop - load_sample_image("flower.jpg")[26:266, 400:640]).mean() < 3
    (one / "train" / "china" / "mine.txt").write_text("kept", encoding="utf-8")
    assert photograph_folder(one) == one and (one / "train" / "china" / "mine.txt").exists()


def test_photographs_are_made_on_demand(no_downloads, folder):
    place = no_downloads / "photographs"
    with pytest.raises(FileNotFoundError, match=f"no photographs in {place}; download it with: krause-repro data photographs"):
        find_source("photographs")
    recipe = get_recipe("kvit_s16/photographs").at("smoke")
    splits = load_splits(recipe)
    assert (len(splits.train), len(splits.held_out), len(splits.test)) == (40, 8, 16)
    assert find_source("photographs") == fetch("photographs") == place
    assert splits.train[0]["pixel_values"].shape == (3, 224, 224)
    with pytest.raises(FileNotFoundError, match=f"no photographs in {no_downloads}; expected train and val"):
        load("photographs", "train", no_downloads)
    shutil.rmtree(place)
    for part in ("train", "val"):  # someone's ImageNet is not taken for them
        shutil.copytree(folder / part, no_downloads / part)
    assert find_source("imagenet") == no_downloads and fetch("photographs") == place


def test_imagenet_evaluation_is_resize_and_centre_crop(folder):
    wide = Image.fromarray(torch.arange(0, 240, dtype=torch.uint8).reshape(10, 24).repeat_interleave(2, 0).numpy()).convert("RGB")
    out = imagenet_transform(False, 14)(wide)  # the short side, 20, becomes 16
    expected = wide.resize((19, 16), Image.Resampling.BILINEAR)
    left = round((19 - 14) / 2)
    crop = torch.from_numpy(np.array(expected.crop((left, 1, left + 14, 15)))).int().permute(2, 0, 1)
    assert (out.int() - crop).abs().max() <= 1
    found = load("imagenet", "test", folder)
    assert isinstance(found, ImageFolderSet) and found[0]["pixel_values"].shape == (3, 224, 224)


# Augmentation


def crops(image, padding):
    "Every crop of the padded image, and its mirror image, as bytes."
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=image.dtype)
    padded[:, padding: padding + height, padding: padding + width] = image
    found = set()
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[:, top: top + height, left: left + width]
            found |= {tuple(crop.flatten().tolist()), tuple(crop.flip(2).flatten().tolist())}
    return found


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_each_output_is_a_crop_or_its_mirror_image(dtype):
    torch.manual_seed(0)
    image = torch.arange(1, 25).reshape(2, 3, 4).to(dtype)
    possible = crops(image, 1)
    assert len(possible) == 18
    batch = random_crop_flip(image.expand(400, -1, -1, -1), 1)
    assert batch.shape == (400, 2, 3, 4) and batch.dtype == dtype
    seen = [tuple(one.flatten().tolist()) for one in batch]
    assert set(seen) == possible  # all of them, and nothing else
    assert max(seen.count(one) for one in possible) < 3 * 400 / 18


def test_each_image_is_cropped_by_itself():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (16, 1, 5, 5), dtype=torch.uint8)
    for one, image in zip(random_crop_flip(images, 2), images, strict=True):
        assert tuple(one.flatten().tolist()) in crops(image, 2)


def test_without_padding_only_the_mirror_is_left():
    torch.manual_seed(0)
    image = torch.arange(12).reshape(1, 3, 4)
    batch = random_crop_flip(image.expand(200, -1, -1, -1), 0)
    same, mirrored = (batch == image).flatten(1).all(1), (batch == image.flip(2)).flatten(1).all(1)
    assert (same ^ mirrored).all() and 70 < same.sum() < 130


def examples(count, recipe, image=None):
    "Examples of random bytes, or of one image each."
    generator = torch.Generator().manual_seed(0)
    shape = (recipe.channels, recipe.image_size, recipe.image_size)
    return [
        {"pixel_values": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) if image is None else image(i),
         "labels": torch.tensor(i % recipe.classes)}
        for i in range(count)
    ]


def test_augmentation_must_be_known():
    assert {recipe.augmentation for recipe in RECIPES.values() if hasattr(recipe, "augmentation")} == set(AUGMENTATIONS)
    for training in (True, False):
        with pytest.raises(ValueError, match="augmentation must be one of none, crop_flip, crop_flip_erase, .*got 'crop'"):
            Collator(replace(get_recipe("kvit_s/cifar10"), augmentation="crop"), training)


def test_erasing_is_in_a_quarter_of_the_images():
    recipe = replace(get_recipe("kswin_t/cifar10"), cutmix_probability=None, crop_padding=0)
    given = examples(400, recipe, lambda i: torch.full((3, 32, 32), 250, dtype=torch.uint8))
    torch.manual_seed(0)
    batch = Collator(recipe, training=True)(given)
    shown = (batch["pixel_values"] != batch["pixel_values"].amax((2, 3), keepdim=True)).any(1)  # (B, 32, 32)
    assert 70 < shown.flatten(1).any(1).sum() < 130
    plain = Collator(replace(recipe, augmentation="crop_flip"), training=True)(given)["pixel_values"]
    assert (plain == plain[0, :, :1, :1]).all()
    for area in shown[shown.flatten(1).any(1)]:
        rows, columns = area.any(1).nonzero().flatten(), area.any(0).nonzero().flatten()
        assert area[rows[0]: rows[-1] + 1, columns[0]: columns[-1] + 1].all()  # one rectangle


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["kvit_s/cifar10", "kvit_s16/imagenet"])
def test_channels_last_changes_the_layout_alone(name, training):
    recipe = replace(get_recipe(name), image_size=12)
    batches = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        batches.append(Collator(recipe, training, channels_last)(examples(6, recipe)))
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"]) and torch.equal(batches[0]["labels"], batches[1]["labels"])
    assert batches[1]["pixel_values"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["kvit_t/fashion_mnist", "kvit_s/cifar10", "kvit_s16/imagenet"])
def test_evaluation_is_normalised_and_nothing_else(name):
    recipe = replace(get_recipe(name), image_size=12)
    given = examples(6, recipe)
    batch = Collator(recipe, training=False)(given)
    mean, std = PIXELS[recipe.dataset]
    for i, example in enumerate(given):
        for channel in range(recipe.channels):
            expected = (example["pixel_values"][channel].double() / 255 - mean[channel]) / std[channel]
            torch.testing.assert_close(batch["pixel_values"][i, channel].double(), expected, rtol=0, atol=1e-5)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == [example["labels"].item() for example in given]


def test_training_without_mixing_smooths_the_labels_exactly():
    recipe = replace(get_recipe("kvit_s/cifar10"), cutmix_probability=None, image_size=4, crop_padding=1)
    given = examples(20, recipe)
    torch.manual_seed(0)
    batch = Collator(recipe, training=True)(given)
    for row, example in zip(batch["labels"], given, strict=True):
        expected = [0.01] * 10
        expected[example["labels"]] = 0.91
        assert row.tolist() == pytest.approx(expected, abs=1e-6)
    mean, std = (torch.tensor(x)[:, None, None] for x in PIXELS["cifar10"])
    for pixels, example in zip(batch["pixel_values"], given, strict=True):
        back = ((pixels * std + mean) * 255).round().to(torch.uint8)
        assert tuple(back.flatten().tolist()) in crops(example["pixel_values"], 1)


def test_every_batch_is_mixed_by_cutmix_or_mixup_in_the_recipes_share():
    recipe = replace(get_recipe("kvit_s/cifar10"), crop_padding=0)
    given = examples(2, recipe, lambda i: torch.full((3, 32, 32), 250 * i, dtype=torch.uint8))
    collate = Collator(recipe, training=True)
    (mean, *_), (std, *_) = PIXELS["cifar10"]
    dark, bright = ((i * 250 / 255 - mean) / std for i in range(2))
    torch.manual_seed(0)
    kinds = {"cut": 0, "mixed": 0, "neither": 0}
    for _ in range(300):
        batch = collate(given)
        shown = (batch["pixel_values"][:, 0].double() - dark) / (bright - dark)  # (2, 32, 32), 0 is dark and 1 is bright
        share = shown.mean((1, 2))
        pure = ((shown - shown.round()).abs() < 1e-4).all()
        kinds["neither" if pure and (shown.std((1, 2)) < 1e-4).all() else "cut" if pure else "mixed"] += 1
        assert batch["labels"].shape == (2, 10) and batch["labels"].dtype == torch.float32
        torch.testing.assert_close(batch["labels"].sum(1), torch.ones(2))
        torch.testing.assert_close(batch["labels"][:, 1].double(), 0.9 * share + 0.01, rtol=0, atol=1e-4)
        torch.testing.assert_close(batch["labels"][:, 0].double(), 0.9 * (1 - share) + 0.01, rtol=0, atol=1e-4)
        torch.testing.assert_close(batch["labels"][:, 2:], torch.full((2, 8), 0.01))
    assert kinds["neither"] < 15
    assert 0.73 < kinds["cut"] / (kinds["cut"] + kinds["mixed"]) < 0.87


def test_imagenet_training_erases_a_quarter_of_the_images():
    recipe = replace(get_recipe("kvit_s16/imagenet"), image_size=32, cutmix_probability=None)
    given = examples(400, recipe, lambda i: torch.full((3, 32, 32), 255, dtype=torch.uint8))
    torch.manual_seed(0)
    batch = Collator(recipe, training=True)(given)
    erased = (batch["pixel_values"] == 0).flatten(1).any(1)
    assert 0.15 < erased.double().mean() < 0.35
    assert not (Collator(recipe, training=False)(given)["pixel_values"] == 0).any()


def test_collator_names_an_unknown_data_set(recipe):
    with pytest.raises(ValueError, match="dataset must be one of"):
        Collator(replace(recipe, dataset="svhn"), training=True)


def test_no_package_manager_and_no_network_says_what_to_do_by_hand(no_downloads, tmp_path, monkeypatch):
    "Without apt-get, and with a download that fails, the error tells all that was tried."
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(DATA, "fashion_mnist", replace(DATA["fashion_mnist"], package_folder=str(tmp_path / "package")))

    def unreachable(name):
        raise OSError("network is unreachable")

    monkeypatch.setattr(image_data, "download_dataset", unreachable)
    with pytest.raises(FileNotFoundError) as error:
        fetch("fashion_mnist")
    for part in (str(tmp_path / "package"), "network is unreachable", "apt-get install dataset-fashion-mnist", str(no_downloads)):
        assert part in str(error.value)


@pytest.fixture
def commands(tmp_path, source, no_downloads, monkeypatch):
    "apt-get, dpkg-deb and sudo that note how they were called; the package holds Fashion-MNIST."
    monkeypatch.setitem(DATA, "fashion_mnist", replace(DATA["fashion_mnist"], package_folder="/usr/share/datasets/fashion-mnist-here"))
    tools, said = tmp_path / "tools", tmp_path / "said"
    tools.mkdir()
    for name, does in {
        "apt-get": 'case "$*" in *download*) touch a.deb;; esac', "sudo": "exit 1",
        "dpkg-deb": f"mkdir -p root/usr/share/datasets/fashion-mnist-here; ln -s {source}/* root/usr/share/datasets/fashion-mnist-here",
    }.items():
        (tools / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {said}\n{does}\n')
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return said


def test_a_package_is_unpacked_without_privileges(commands, no_downloads):
    assert fetch("fashion_mnist") == no_downloads / "FashionMNIST" / "raw"
    called = commands.read_text(encoding="utf-8").splitlines()
    assert [line.split()[0] for line in called] == ["apt-get", "apt-get", "dpkg-deb"]
    assert all(f"Dir::State::lists={no_downloads}/.scratch." in line and " install" not in line for line in called[:2])
    assert [path.name for path in no_downloads.iterdir()] == ["FashionMNIST"]


def test_damaged_downloads_are_got_again(commands, no_downloads):
    damaged = no_downloads / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"cut")
    fetch("fashion_mnist")
    assert len(load("fashion_mnist", "train")) == 60_000 and commands.exists()
    damaged.unlink()
    damaged.write_bytes(b"cut")
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is not an IDX file"):  # the user's folder is left alone
        fetch("fashion_mnist", damaged.parent)
    assert damaged.read_bytes() == b"cut"


def test_a_failed_package_is_told_with_its_last_words(commands, no_downloads, monkeypatch):
    tool = commands.parent / "tools" / "apt-get"
    tool.write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
    monkeypatch.setattr(image_data, "download_dataset", lambda name: (_ for _ in ()).throw(RuntimeError("no mirror")))
    with pytest.raises(FileNotFoundError, match="apt-get: E: Unable to locate package; no mirror. By hand: install .*sudo apt-get install"):
        fetch("fashion_mnist")
    assert not any(no_downloads.rglob("*ubyte*"))
