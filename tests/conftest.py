"""Shared by all tests: quiet libraries, repeatable properties, the data in a quick form, and one finished run.

PyTorch and the package are imported by what needs them: the process that only hands the tests to workers does without.
"""

import gc
import gzip
import os
import shutil
from dataclasses import replace

import pytest
from hypothesis import settings

gc.disable()  # while all is imported; `libraries` enables it
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # before torch is imported: some tests fork
if not os.path.exists("/dev/nvidiactl"):  # before triton is imported: without a GPU it interprets its kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")
THOROUGH = int(os.environ.get("KRAUSE_TEST_EXAMPLES", "1"))  # how many times the usual number of examples, then drawn anew at each run
settings.register_profile("krause_repro", deadline=None, derandomize=THOROUGH == 1, database=None, max_examples=40 * THOROUGH)
settings.load_profile("krause_repro")


@pytest.fixture(scope="session", autouse=True)
def libraries():
    "Quiet, and left out of garbage collection: a full one, such as after each training, would go through all that is imported."
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.ones(1, requires_grad=True).sum().backward()  # tests that fork may use autograd if its first use was before any compiler's
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)  # cycles are few: to look for them at every 700 new objects slows all that compiles or exports
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def what_is_imported_is_not_garbage(libraries):
    "Nor what the modules before this one imported and compiled; unused cycles among that stay until the end."
    gc.collect(1)
    gc.freeze()


@pytest.fixture
def no_downloads(tmp_path, monkeypatch):
    "An empty folder in the place of the user's downloads."
    folder = tmp_path / "downloads"
    folder.mkdir()
    monkeypatch.setenv("KRAUSE_REPRO_DATA", str(folder))
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    "A folder of Fashion-MNIST without compression: a run then spends its time on training, not on unpacking."
    from krause_repro.image_data import fetch
    from krause_repro.image_files import FASHION_MNIST_FILES

    found, folder = fetch("fashion_mnist"), tmp_path_factory.mktemp("fashion-mnist")
    for stem in FASHION_MNIST_FILES:
        packed = found / f"{stem}.gz"
        with gzip.open(packed) if packed.is_file() else (found / stem).open("rb") as file, (folder / stem).open("wb") as plain:
            shutil.copyfileobj(file, plain)
    return folder


@pytest.fixture(scope="session")
def recipe():
    "Two epochs of four steps each."
    from krause_repro.recipes import get_recipe

    smoke = get_recipe("kvit_t/fashion_mnist").at("smoke")
    return replace(smoke, train_images=32, held_out=64, test_images=64, epochs=2, batch_size=8)


@pytest.fixture(scope="session")
def finished(source, recipe, tmp_path_factory):
    "A finished run of `recipe` with seed 0; do not change its directory."
    from krause_repro.training import train

    return train(recipe, 0, runs=tmp_path_factory.mktemp("runs"), progress=False, source=source)
