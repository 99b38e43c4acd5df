"""Tests of checksums: every flipped byte in a file that lamoe wrote is noticed or harmless."""

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lamoe
from lamoe.backends.cpu import native, packed_file
from lamoe.checkpoints import checksums, hf, mapped, shards
from oracles import tiny
from tiny_engine import greedy, llm
from tiny_packed import pack

CONFIG = tiny.config("llama", num_key_value_heads=2, num_hidden_layers=1, eos_token_id=2)
needs_kernels = pytest.mark.skipif(not native.available(), reason="needs the compiled kernels")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Hugging Face folder."""
    folder = tmp_path_factory.mktemp("written") / "model"
    lamoe.save(tiny.model(CONFIG, seed=3, dtype=torch.float32), folder)
    return folder


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory) -> Path:
    """A packed folder, whose matrices have padding."""
    target = tmp_path_factory.mktemp("written") / "packed"
    pack(folder, target, "int8")
    return target


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    """A saved prefix."""
    file = tmp_path_factory.mktemp("written") / "c" / "rows"
    file.parent.mkdir()
    engine = llm("gqa")
    engine.generate([list(range(40))], greedy(1))
    assert engine.save_cache(file, list(range(40))) == 40
    return file.parent


def loaded(folder: Path) -> dict:
    """Load whatever a folder holds and return everything that was read from it."""
    if (folder / "rows").exists():
        engine = llm("gqa")
        engine.load_cache(folder / "rows")
        pages = sorted(engine.pool._page_of.items())
        content = [engine.cache.rows[:, 4 * page : 4 * page + 4] for _, page in pages]
        return {"hashes": [h for h, _ in pages], "rows": torch.stack(content)}
    if packed_file.is_packed(folder):
        backend = packed_file.load(folder, threads=1)
        scales = {f"{k}.scale": torch.tensor(s) for k, (_, s) in backend.packed.items()}
        return {"config": backend.config.to_dict(), **backend.tensors(), **scales}
    model = hf.load(folder)
    return {"config": model.config.to_dict(), **dict(model.named_parameters())}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items()
    )


def positions(file: Path) -> list[int]:
    """Choose bytes of every part of a file: length, header, metadata, padding, data, end."""
    raw, rng = file.read_bytes(), random.Random(file.name)
    if file.suffix == ".json":
        return rng.sample(range(len(raw)), min(10, len(raw)))
    start = 8 + int.from_bytes(raw[:8], "little")
    metadata = raw.index(checksums.KEY.encode())
    return [
        *range(8),
        *rng.sample(range(8, start), 14),
        *rng.sample(range(metadata, metadata + len(checksums.KEY) + 40), 8),
        start - 1,
        start,
        *rng.sample(range(start, len(raw)), 8),
        len(raw) - 1,
    ]


@pytest.mark.parametrize("kind", ["folder", pytest.param("packed", marks=needs_kernels), "prefix"])
def test_every_flipped_byte_is_noticed_or_harmless(kind, request, tmp_path, caplog):
    source = request.getfixturevalue(kind)
    copy = shutil.copytree(source, tmp_path / "copy")
    want, noticed, harmless = loaded(copy), 0, 0
    assert not caplog.records
    for file in sorted(copy.iterdir()):
        whole, rng = file.read_bytes(), random.Random(7)
        for at in positions(file):
            flipped = whole[at] ^ (1 << rng.randrange(8))
            file.write_bytes(whole[:at] + bytes([flipped]) + whole[at + 1 :])
            caplog.clear()
            try:
                found = loaded(copy)
            except ValueError as e:
                assert str(copy) in str(e)
                noticed += 1
                continue
            if caplog.records:
                noticed += 1
            else:
                assert same(found, want), f"byte {at} of {file.name} changed what is read"
                harmless += 1
        file.write_bytes(whole)
    assert same(loaded(copy), want)
    assert noticed > 30 and harmless < noticed / 5


@pytest.mark.parametrize("kind", ["folder", pytest.param("packed", marks=needs_kernels), "prefix"])
def test_a_flipped_byte_of_data_names_file_and_tensor(kind, request, tmp_path, monkeypatch):
    copy = shutil.copytree(request.getfixturevalue(kind), tmp_path / "copy")
    file = max(copy.iterdir(), key=lambda p: p.stat().st_size)
    name, tensor = next((n, t) for n, t in shards.read_header(file).items() if t.checksum)
    raw = bytearray(file.read_bytes())
    raw[8 + int.from_bytes(raw[:8], "little") + tensor.begin] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=f"{file.name} is damaged: the tensor '{name}'"):
        loaded(copy)
    if kind == "folder" and native.available():
        with pytest.raises(ValueError, match=f"{file.name} is damaged: the tensor '{name}'"):
            pack(copy, tmp_path / "packed")
    monkeypatch.setenv("LAMOE_VERIFY", "0")
    loaded(copy)


def test_files_without_checksums_load(folder, tmp_path):
    """Folders of other programs and of earlier versions have no checksums."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / checksums.FILE).unlink()
    tensors = load_file(copy / shards.SINGLE)
    save_file(tensors, copy / shards.SINGLE, {"format": "pt"})
    assert same(loaded(copy), loaded(folder))
    assert not any(t.checksum for t in shards.scan(copy).values())


@needs_kernels
def test_a_packed_folder_of_an_earlier_version_loads(packed, tmp_path):
    copy = shutil.copytree(packed, tmp_path / "copy")
    (copy / checksums.FILE).unlink()
    for file in copy.glob("packed-*"):
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        del header["__metadata__"]
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % 64)
        file.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])
    assert same(loaded(copy), loaded(packed))


def test_files_are_those_of_the_library_with_more_metadata(folder, tmp_path):
    file = folder / shards.SINGLE
    with safe_open(file, "pt") as f:
        metadata = f.metadata()
    assert metadata.keys() == {"format", checksums.KEY} and metadata["format"] == "pt"
    for i in range(64):  # the library writes the two keys of the metadata in a random order
        save_file(load_file(file), tmp_path / str(i), metadata)
        if (tmp_path / str(i)).read_bytes() == file.read_bytes():
            return
    raise AssertionError("no file of the library has the same bytes")


def test_equal_models_give_equal_files(folder, tmp_path):
    for i in range(8):
        lamoe.save(lamoe.load(folder), tmp_path / str(i))
        for file in folder.iterdir():
            assert (tmp_path / str(i) / file.name).read_bytes() == file.read_bytes()


def test_stale_checksums_are_refused(folder, tmp_path):
    """Another program may change tensors and copy the old metadata."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copy / shards.SINGLE)
    with safe_open(copy / shards.SINGLE, "pt") as file:
        metadata = file.metadata()
    save_file({n: t + 1 for n, t in tensors.items()}, copy / shards.SINGLE, metadata)
    with pytest.raises(ValueError, match="kept the old checksums, LAMOE_VERIFY=0"):
        loaded(copy)
    del tensors["model.norm.weight"]
    save_file(tensors, copy / shards.SINGLE, metadata)
    with pytest.raises(ValueError, match="do not belong to its"):
        loaded(copy)


def test_an_edited_config_loads_with_a_warning(folder, tmp_path, caplog):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 500.0}))
    (copy / "generation_config.json").unlink()
    assert loaded(copy)["config"]["rope_theta"] == 500.0
    [record, *more] = caplog.records
    assert record.levelno == logging.WARNING and len(more) == 1
    assert "config.json has changed since it was written" in record.getMessage()
    assert "generation_config.json is missing" in more[0].getMessage()


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"files": {"../x": {"bytes": 1, "xxh3": ""}}}', '{"files": {"a": 3}}', "[" * 9999],
)
def test_hostile_checksum_files_only_warn(folder, tmp_path, content, caplog):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / checksums.FILE).write_text(content)
    loaded(copy)
    assert len(caplog.records) == 1 and checksums.FILE in caplog.text


@needs_kernels
def test_a_large_packed_model_is_verified_in_the_background(packed, tmp_path, monkeypatch):
    copy = shutil.copytree(packed, tmp_path / "copy")
    file = copy / "packed-00001.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 64
    file.write_bytes(raw)
    monkeypatch.setattr(packed_file, "_VERIFY_FIRST_BYTES", 0)
    verified = []
    verify = mapped.verify
    monkeypatch.setattr(mapped, "verify", lambda *a: verified.append(a[0].name) or verify(*a))
    packed_file.load(copy, 1, available=0).check()  # larger than memory: `lamoe doctor` verifies it
    assert verified == []
    backend = packed_file.load(copy, 1, available=1 << 40)
    for thread in mapped.threading.enumerate():
        if thread.name == "lamoe-verify":
            thread.join()
    with pytest.raises(mapped.FileChanged, match=r"packed-00001.safetensors is damaged: .*scale'"):
        backend.check()
