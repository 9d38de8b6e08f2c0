"""The back end `dali`: what it does with one batch, with bad samples, with a sequential pass, and with its memory."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from loaders import dali
from loaders.beton import JPEG, RAW, Beton
from loaders.build import build_eval_loader
from loaders.dali import DALIDecoder, memory_hints
from loaders.decoder import CHECKSUM, CORRUPT, OK, OUTSIDE, WRONG_SIZE
from loaders.errors import DataError
from loaders.order import shard
from loaders.shards import Shards
from loaders.torchvision import TorchvisionDecoder
from tests.loaders.stored import SPEC, OneMachine, decode, jpeg, picture, samples, write

pytestmark = [
    pytest.mark.skipif(bool(dali.load()), reason=str(dali.load())),
    pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning"),
]
CPU = torch.device("cpu")


def open_beton(folder, stored=None, workers: int = 2) -> DALIDecoder:
    return DALIDecoder(Beton.open(write(folder / "train.beton", stored or samples(raw=True))), workers, CPU)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Shards:
    """50 samples in five tars."""
    path = write(tmp_path_factory.mktemp("shards") / "train.json", samples(raw=False))
    return Shards.open(path.parent, "train")


# ------------------------------------------------------------------------------------------------ one batch


def test_batches_of_any_length_in_any_order(tmp_path):
    decoder = open_beton(tmp_path)
    reference, _ = decode(TorchvisionDecoder(decoder.samples, 1), range(50))
    rng = np.random.default_rng(0)
    first: dict[int, np.ndarray] = {}
    for count in (3, 50, 1, 7, 20):  # it grows, and takes fewer than it has room for
        ids = rng.permutation(50)[:count]
        images, status = decode(decoder, ids, gap=11)
        assert (status == OK).all()
        for i, image in zip(ids, images, strict=True):
            assert np.array_equal(image, first.setdefault(int(i), image))
            assert np.abs(image.astype(int) - reference[i]).mean() < 1


def test_raw_samples_go_past_the_decoder(tmp_path, monkeypatch):
    decoder = open_beton(tmp_path)
    raw = np.flatnonzero(decoder.samples.mode == RAW)
    monkeypatch.setattr(DALIDecoder, "_decode", lambda self, ids: pytest.fail("there is nothing to decode"))
    images, status = decode(decoder, raw)
    assert len(raw) > 4 and (status == OK).all()
    assert all(np.array_equal(image, picture(int(i))) for i, image in zip(raw, images, strict=True))


def test_exif_does_not_turn_an_image(tmp_path):
    pixels = picture(1)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    stored = [(jpeg(pixels, exif=exif.tobytes()), JPEG, *pixels.shape[:2]), (jpeg(pixels), JPEG, *pixels.shape[:2])]
    (turned, plain), status = decode(open_beton(tmp_path, stored), [0, 1])
    assert (status == OK).all() and np.array_equal(turned, plain)


def test_bad_samples_are_found_and_the_others_decoded(tmp_path):
    stored = samples(raw=True)
    expected, _ = decode(open_beton(tmp_path), range(50))
    content, mode, height, width = stored[5]
    stored[5] = (content[: len(content) // 2], mode, height, width)
    content, mode, height, width = stored[16]
    stored[16] = (content[:2] + bytes(len(content) - 2), mode, height, width)
    content, mode, height, width = stored[9]
    stored[9] = (content, mode, height, width + 8)
    (tmp_path / "bad").mkdir()
    decoder = open_beton(tmp_path / "bad", stored)
    with open(decoder.path, "r+b") as f:  # the map shows it
        f.seek(int(decoder.samples.ptr[20]) + 300)
        f.write(b"\x00\x01")
    wanted = np.full(50, OK)
    wanted[[5, 16, 9, 20]] = CORRUPT, CORRUPT, WRONG_SIZE, CHECKSUM
    for _ in range(2):
        images, status = decode(decoder, range(50))
        assert status.tolist() == wanted.tolist()
        assert all(np.array_equal(images[i], expected[i]) for i in range(50) if wanted[i] == OK)
    images, status = decode(decoder, range(4))  # it works on
    assert (status == OK).all() and all(np.array_equal(a, b) for a, b in zip(images, expected, strict=False))
    _, status = decode(decoder, [16])
    assert status.tolist() == [CORRUPT]


@pytest.mark.slow
def test_damage_without_checksums_neither_crashes_nor_harms_the_others(tmp_path):
    """1,500 JPEGs cut, or with changed, flipped or missing bytes, header included, in batches with whole ones; no sidecar."""
    rng = np.random.default_rng(0)
    whole = [s for s in samples(raw=False) if s[2] > 8]
    found: set[int] = set()
    for n in range(30):
        stored = [whole[int(rng.integers(len(whole)))] for _ in range(75)]
        (tmp_path / str(n)).mkdir()
        expected, _ = decode(open_beton(tmp_path / str(n), stored), range(0, 75, 3))
        for i in (i for i in range(75) if i % 3):
            stored[i] = (damaged(bytearray(stored[i][0]), rng), *stored[i][1:])
        path = write(tmp_path / str(n) / "damaged.beton", stored)
        path.with_name("damaged.beton.json").unlink()
        images, status = decode(DALIDecoder(Beton.open(path), 2, CPU), range(75))
        assert not status[::3].any() and all(np.array_equal(a, b) for a, b in zip(images[::3], expected, strict=True))
        found |= set(status.tolist())
    assert found == {OK, CORRUPT, WRONG_SIZE}


def damaged(content: bytearray, rng: np.random.Generator) -> bytes:
    kind, at = rng.integers(4), int(rng.integers(len(content)))
    if kind == 0:
        del content[max(at, 1) :]
    elif kind == 1:
        content[int(rng.integers(min(700, len(content))))] = int(rng.integers(256))  # tables and header
    elif kind == 2:
        content[at] ^= 1 << int(rng.integers(8))
    else:
        del content[max(at, 1) : at + int(rng.integers(1, 40))]
    return bytes(content)


def test_an_error_that_is_no_samples_fault_is_raised(tmp_path, monkeypatch):
    decoder = open_beton(tmp_path)

    def fail(self, ids):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(DALIDecoder, "_decode", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        decode(decoder, range(8))


def test_a_place_outside_of_the_buffer_is_refused(tmp_path):
    decoder = open_beton(tmp_path)
    ids, offsets = np.array([0, 1]), np.array([-1, 0])
    heights, widths = decoder.sizes(ids)
    buffer = np.zeros(3 * 64 * 48, np.uint8)
    assert decoder.decode_into(ids, heights, widths, offsets, buffer).tolist() == [OUTSIDE, OK]


def test_the_device_path_with_the_cpu_in_its_place(tmp_path):
    decoder = open_beton(tmp_path)
    expected, _ = decode(decoder, range(50), gap=3)
    decoder.on_device = True
    images, status = decode(decoder, range(50), gap=3)
    assert (status == OK).all() and all(np.array_equal(a, b) for a, b in zip(images, expected, strict=True))


# ------------------------------------------------------------------------------------------------ DALI's own reader


def test_a_sequential_pass_is_read_by_dali(shards):
    decoder = DALIDecoder(shards, 2, CPU)
    expected, _ = decode(DALIDecoder(shards, 1, CPU), range(50))
    readers = []
    for _ in range(2):
        for first in range(0, 50, 8):
            ids = range(first, min(first + 8, 50))
            images, status = decode(decoder, ids)
            assert (status == OK).all() and all(np.array_equal(image, expected[i]) for i, image in zip(ids, images, strict=True))
            readers.append(decoder._reader)
    # Fed the first batch; then one reader for the rest of the pass, which the shorter last batch ends.
    assert readers[0] is None and readers[1] is not None and readers[1] is readers[5] and readers[6] is None
    assert readers[7] is None and readers[8] is not readers[1]


def test_any_other_order_is_fed(shards, tmp_path):
    decoder = DALIDecoder(shards, 1, CPU)
    expected, _ = decode(DALIDecoder(shards, 1, CPU), range(50))
    for ids in ([0, 1, 2, 3], [8, 9, 10, 11], [12, 14, 13, 15], [16, 18], [19], [20], [46, 47], [48, 49, 0, 1]):
        images, _ = decode(decoder, ids)
        assert decoder._reader is None and all(np.array_equal(image, expected[i]) for i, image in zip(ids, images, strict=True))
    decode(decoder, [2, 3, 4])
    reader = decoder._reader
    images, _ = decode(decoder, [5, 6, 7, 8])  # more than it has room for
    assert reader is not None and decoder._reader is None and np.array_equal(images[3], expected[8])
    beton = open_beton(tmp_path)
    decode(beton, range(8))
    decode(beton, range(8, 16))
    assert beton._reader is None


@pytest.mark.parametrize(("batch", "bad"), [(6, 13), (32, 95), (32, 64), (48, 199)])
def test_a_bad_sample_in_a_sequential_pass_is_named(tmp_path, batch, bad):
    """DALI's reader decodes ahead, and a header that DALI cannot parse may take the process with it."""
    stored = samples(raw=False, count=200)
    content, mode, height, width = stored[bad]
    stored[bad] = (content[:2] + bytes(len(content) - 2), mode, height, width)
    write(tmp_path / "val.json", stored)
    loader = build_eval_loader(str(tmp_path), "val", SPEC, dist=OneMachine(), batch=batch, backend="dali")
    name = rf"val-{bad // 11:06}\.tar is damaged: sample {bad} \(class{bad % 3}/{bad}\.jpg\).*not a complete JPEG"
    seen = []
    with pytest.raises(DataError, match=name):
        for found in loader:
            seen += found.index.tolist()
    assert seen == list(range(bad // batch * batch))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_dali_splits_a_data_set_as_we_do(shards, world):
    """Its reader for rank r of `world` begins with the sample that our rank r begins with."""
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    for rank in range(world):
        pipeline = Pipeline(1, 1, None, prefetch_queue_depth=1)
        with pipeline:
            tars = [str(tar) for tar in shards.tars]
            indices = [str(tar.with_suffix(".idx")) for tar in shards.tars]
            pipeline.set_outputs(fn.readers.webdataset(paths=tars, index_paths=indices, ext=["jpg"], shard_id=rank, num_shards=world))
        (encoded,) = pipeline.run()
        assert np.array_equal(np.asarray(encoded[0]), shards.sample(shard(50, rank, world).start))


# ------------------------------------------------------------------------------------------------ what it needs


def test_memory_hints_come_from_the_table(tmp_path):
    hints = memory_hints(open_beton(tmp_path).samples)
    assert (hints["preallocate_height_hint"], hints["preallocate_width_hint"]) == (90, 120)
    assert hints["device_memory_padding"] == 44_550 and hints["host_memory_padding"] == 29_970  # 90 x 90 pixels
    raw_only = [s for s in samples(raw=True) if s[1] == RAW]
    (tmp_path / "raw").mkdir()
    assert memory_hints(open_beton(tmp_path / "raw", raw_only).samples)["preallocate_height_hint"] == 1


def test_dali_knows_the_memory_hints(tmp_path):
    """Without a GPU the operator cannot be built, but its arguments are checked."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    hints = memory_hints(open_beton(tmp_path).samples)
    with Pipeline(4, 1, 0):
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        fn.decoders.image(encoded, device="mixed", output_type=types.RGB, adjust_orientation=False, **hints)
        with pytest.raises(Exception, match="no_such_hint"):
            fn.decoders.image(encoded, device="mixed", no_such_hint=1)


def test_without_dali_the_next_step_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert dali.load.__wrapped__() == "DALI is not installed"
    monkeypatch.setattr(dali, "load", dali.load.__wrapped__)
    with pytest.raises(DataError, match=r"The loader dali cannot be used here: DALI is not installed\. Run `make setup`"):
        open_beton(tmp_path)
