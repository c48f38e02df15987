# SPDX-License-Identifier: Apache-2.0
"""Files of weights that somebody made: none runs code, and each is one clear error."""

import argparse
import collections
import contextlib
import importlib.util
import io
import json
import os
import pathlib
import pickle
import sys
import tracemalloc
import types
import zipfile

import numpy as np
import pytest
from foreign_models import FOLDER
from safetensors.numpy import save_file

from mim_jax import weights
from mim_jax.interop import foreign, pickles, reading
from mim_jax.schema import ConfigError

READERS = {"ours": pickles._by_ourselves, "torch": pickles._by_torch}
if importlib.util.find_spec("torch") is None:
    del READERS["torch"]
FOUR = np.arange(4, dtype="<f4")


class Calls:
    """Pickled, a call of any function."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


class Storage:
    """Pickled by `Pickler`, a reference to an entry of the zip file."""

    def __init__(self, key="0", count=4, kind="FloatStorage", of=None):
        of = Named("torch", kind) if of is None else of
        self.reference = ("storage", of, key, "cpu", count)


class Named:
    """Pickled by `Pickler`, a global name that need not be importable here."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Array:
    """Pickled by `Pickler`, an array as torch pickles it."""

    def __init__(self, storage, offset=0, shape=(2, 2), strides=(2, 1)):
        self.arguments = (
            storage,
            offset,
            shape,
            strides,
            False,
            collections.OrderedDict(),
        )


class Pickler(pickle._Pickler):
    """Writes what torch.save writes, and what it does not."""

    def persistent_id(self, value):
        return value.reference if isinstance(value, Storage) else None

    def save(self, value, *more, **named):
        if isinstance(value, Named):
            self.write(f"c{value.module}\n{value.name}\n".encode())
            return
        if isinstance(value, Array):
            self.save(Named("torch._utils", "_rebuild_tensor_v2"))
            self.save(value.arguments)
            self.write(pickle.REDUCE)
            return
        super().save(value, *more, **named)


def written(path: pathlib.Path, value, entries=None, how=zipfile.ZIP_STORED):
    """A zip file as torch.save has it."""
    text = io.BytesIO()
    Pickler(text, protocol=2).dump(value)
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr("archive/data.pkl", text.getvalue())
        archive.writestr("archive/version", "3\n")
        for name, data in (entries or {"data/0": FOUR.tobytes()}).items():
            archive.writestr(f"archive/{name}", data)
    return path


def plain(path: pathlib.Path, reader="ours"):
    return READERS[reader](path, lambda shape, kind, read: (shape, kind, read()))


def test_arrays_and_plain_values_are_read(tmp_path):
    args = argparse.Namespace(model="vit", betas=[0.9, 0.95], none=None)
    value = collections.OrderedDict(
        a=Array(Storage()),
        t=Array(Storage(), 1, (3,), (1,)),
        n=(1, 2.5, True),
        args=args,
    )
    found = plain(written(tmp_path / "x.pth", value))
    assert list(found) == ["a", "t", "n", "args"] and found["n"] == (1, 2.5, True)
    assert found["args"] == {"model": "vit", "betas": [0.9, 0.95], "none": None}
    (shape, kind, array) = found["a"]
    assert (shape, kind) == ((2, 2), "float32") and (array == [[0, 1], [2, 3]]).all()
    assert (found["t"][2] == [1, 2, 3]).all()


def test_both_readers_agree():
    if "torch" not in READERS:
        pytest.skip("torch is not installed")
    for path in sorted(FOLDER.glob("*.pth*")):
        if path.suffix == ".npz":
            continue
        one, two = (plain(path, reader) for reader in READERS)
        assert same(one, two), path


def same(one, two) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, tuple) and isinstance(one[-1], np.ndarray):
        return one[:2] == two[:2] and one[2].tobytes() == two[2].tobytes()
    return one == two


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "call, name",
    [
        (lambda mark: Calls(os.mkdir, mark), "posix.mkdir"),
        (lambda mark: Calls(eval, f"__import__('os').mkdir({mark!r})"), "eval"),
        (lambda mark: Calls(getattr, Calls(open, mark, "w"), "write"), "getattr"),
        (lambda mark: Calls(np.save, mark, FOUR), "numpy"),
    ],
)
def test_a_malicious_pickle_runs_nothing(reader, call, name, tmp_path, monkeypatch):
    mark, path = str(tmp_path / "mark"), tmp_path / "x.pth"
    value = {"model": {"w": Array(Storage())}, "args": call(mark)}
    written(path, value)
    spec = object() if reader == "torch" else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    with pytest.raises(ConfigError) as caught:
        pickles.load(path, reading.Tensor)
    assert str(caught.value).startswith(f"{path} names '") and name in str(caught.value)
    assert str(caught.value).endswith("want a file of arrays, numbers and texts alone")
    assert "\n" not in str(caught.value)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["x.pth"]


def test_the_same_pickle_would_have_run(tmp_path):
    # So that the test above is one: Python's own reader makes the folder.
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Calls(os.mkdir, str(mark))))
    assert mark.is_dir()


def test_a_pickle_changes_no_class_for_those_read_later(tmp_path):
    class Sets:
        def __init__(self, target):
            self.target = target

    before = dict(vars(collections.OrderedDict))
    text = b"\x80\x02cargparse\nNamespace\nq\x00}X\x01\x00\x00\x00aK\x01sb."
    path = written(tmp_path / "x.pth", {})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", text)
    try:
        plain(path)
    except Exception:
        pass
    assert dict(vars(collections.OrderedDict)) == before
    later = plain(written(tmp_path / "y.pth", argparse.Namespace(b=2)))
    assert later == {"b": 2} and not hasattr(type(later), "a")


WHOLE = {"w": Array(Storage())}
BAD = {
    "more than there is": ({"w": Array(Storage(count=1000))}, {}),
    "no such storage": ({"w": Array(Storage("../../etc/passwd"))}, {}),
    "outside": ({"w": Array(Storage(), 3)}, {}),
    "negative": ({"w": Array(Storage(), -1)}, {}),
    "negative strides": ({"w": Array(Storage(), 3, (2, 2), (-1, -1))}, {}),
    "one number, huge array": ({"w": Array(Storage(), 0, (10**6, 10**6), (0, 0))}, {}),
    "huge": ({"w": Array(Storage(count=2**60), 0, (2**60,), (1,))}, {}),
    "packed": (WHOLE, {"how": zipfile.ZIP_DEFLATED}),
    "no numbers": ({"w": Array(Storage(of=object))}, {}),
    "text for a type": ({"w": Array(Storage(of="S4"))}, {}),
    "unknown numbers": ({"w": Array(Storage(kind="QInt8Storage"))}, {}),
    "big-endian": (WHOLE, {"entries": {"data/0": FOUR.tobytes(), "byteorder": "big"}}),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_claims_what_is_not_there(what, tmp_path, monkeypatch):
    value, how = BAD[what]
    path = written(tmp_path / "x.pth", value, **how)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError) as caught:
        pickles.load(path, reading.Tensor)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_large_pickle_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "_MOST", 10)
    with pytest.raises(ValueError, match="data.pkl has .* bytes: more than 10"):
        plain(written(tmp_path / "x.pth", WHOLE))


@pytest.mark.parametrize("put", [b"r\x00\x00\x00\x01", b"p16777216\n"])
def test_a_short_pickle_takes_little_memory(put, tmp_path):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}" + put + b".")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="remembers number 16777216"):
            plain(path)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_dicts_within_dicts_are_not_copied_for_each_place(tmp_path, monkeypatch):
    """Of 60 dicts, each twice in the next one, there would be 2**60."""
    nested = {}
    for _ in range(60):
        nested = {"a": nested, "b": nested}
    torch = types.ModuleType("torch")
    allowed = types.SimpleNamespace(safe_globals=lambda _: contextlib.nullcontext())
    torch.__dict__.update(
        Tensor=np.ndarray, serialization=allowed, load=lambda *_, **__: nested
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    found = pickles._by_torch(tmp_path / "x.pth", reading.Tensor)
    for _ in range(60):
        assert list(found) == ["a", "b"] and found["a"] is found["b"]
        found = found["a"]
    assert found == {}


# The command says each of these in one line.


def test_a_damaged_number_is_one_line(tmp_path, capfd):
    whole = (FOLDER / "mae_encoder.pth").read_bytes()
    with zipfile.ZipFile(FOLDER / "mae_encoder.pth") as archive:
        (entry, *_) = (one for one in archive.infolist() if one.filename[-2:] == "/1")
    place = entry.header_offset + 30 + len(entry.filename) + entry.file_size
    path = tmp_path / "x.pth"
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert "cannot be read (BadZipFile: Bad CRC-32" in refused(path, capfd)


def test_every_cut_of_a_file_is_one_line(tmp_path, capfd):
    for name in ("mae_encoder.pth", "timm.safetensors"):
        whole = (FOLDER / name).read_bytes()
        path = tmp_path / name
        for share in (0, 0.001, 0.1, 0.5, 0.9, 0.999):
            path.write_bytes(whole[: int(share * len(whole))])
            refused(path, capfd)


@pytest.mark.parametrize(
    "content",
    [b"", b"no weights", b"\x89PNG\r\n\x1a\n" + bytes(99), b"PK\x03\x04" + bytes(99)],
)
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_foreign_file_is_one_line(content, name, tmp_path, capfd):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, capfd)


def refused(path: pathlib.Path, capfd) -> str:
    run = path.parent / "runs" / "r"
    for command in (["inspect", str(path)], ["import", str(path), str(run)]):
        assert weights.main([*command, "--heads=2"]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"error: {path}")
    assert not run.exists()
    return line


def test_a_network_of_another_kind_is_said(tmp_path, capfd):
    path = tmp_path / "x.safetensors"
    save_file({"conv1.weight": FOUR, "\x1b[2J": FOUR}, path)
    line = refused(path, capfd)
    assert "is no vision transformer that is known: it has 2 arrays" in line
    assert "conv1.weight" in line and "\x1b" not in line and "MoCo v3" in line


def test_a_folder_without_weights_and_one_that_leads_out(tmp_path, capfd):
    assert "has no weights: want model.safetensors or" in refused(tmp_path, capfd)
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "want names of files beside it" in refused(tmp_path, capfd)
    (tmp_path / "model.safetensors.index.json").write_text("[1]")
    assert "is list: want a dict" in refused_at(tmp_path, capfd)


def refused_at(path: pathlib.Path, capfd) -> str:
    assert weights.main(["inspect", str(path)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


# What a network lacks, has too much of, or has in another shape is listed in full.


def tensors() -> dict[str, reading.Tensor]:
    return dict(reading.read(FOLDER / "timm.safetensors").tensors)


def said(found: dict[str, reading.Tensor], **more) -> str:
    with pytest.raises(ConfigError) as caught:
        foreign.convert(
            reading.Source("x", found), foreign.Said(**({"heads": 2} | more))
        )
    return str(caught.value)


def test_all_that_is_missing_too_much_or_misshaped_is_listed():
    found = tensors()
    for name in ("blocks.1.norm1.bias", "norm.weight"):
        del found[name]
    for name in ("blocks.0.attn.q_norm.weight", "dist_token"):
        found[name] = found["norm.bias"]
    for name in ("blocks.0.mlp.fc2.weight", "head.bias"):
        found[name] = reading.Tensor((3, 7), "float32", lambda: FOUR)
    text = said(found)
    assert [line.strip() for line in text.splitlines()[1:]] == [
        "2 missing:",
        "blocks.1.norm1.bias [16]",
        "norm.weight [16]",
        "2 of the wrong shape:",
        "blocks.0.mlp.fc2.weight [3, 7], want [16, 32]",
        "head.bias [3, 7], want [5]",
        "2 that this network has no place for:",
        "blocks.0.attn.q_norm.weight [16]",
        "dist_token [16]",
    ]


def test_what_nothing_tells_is_asked_for():
    assert "want --heads=N" in said(tensors(), heads=None)
    wide = tensors()
    wide["pos_embed"] = reading.Tensor((1, 13, 16), "float32", lambda: FOUR)
    assert "positions for 12 patches, which is no square" in said(wide)
    oblong = tensors()
    shape = (16, 3, 4, 2)
    oblong["patch_embed.proj.weight"] = reading.Tensor(shape, "float32", lambda: FOUR)
    assert "patches of 4 x 2 pixels: want square ones" in said(oblong)
    assert "multiple of the number of heads" in said(tensors(), heads=3)
    infinite = tensors()
    full = np.full((16,), np.inf, np.float32)
    infinite["norm.bias"] = reading.Tensor((16,), "float32", lambda: full)
    assert said(infinite) == "x: norm.bias: not finite"


@pytest.mark.parametrize(
    "width, heads", [(192, 3), (384, 6), (768, 12), (1280, 16), (640, 10)]
)
def test_heads_of_the_sizes_that_have_names(width, heads):
    source = reading.Source("x", {"cls_token": tensors()["cls_token"]})
    facts = foreign._Facts.__new__(foreign._Facts)
    facts._source, facts.notes = source, []
    assert facts._heads(None, width, "num_attention_heads") == heads
    assert facts.notes == [
        f"encoder: {heads} heads, as usual at this width; --heads=N says otherwise"
    ]
    assert facts._heads(3, width, "num_attention_heads") == 3


def test_a_small_moco_has_narrow_heads():
    small = {"module.base_encoder.cls_token": tensors()["cls_token"]}
    facts = foreign._Facts.__new__(foreign._Facts)
    facts.notes = []
    for arch, heads in (("vit_small", 12), ("vit_base", 6)):
        facts._source = reading.Source("x", small, args={"arch": arch})
        assert facts._heads(None, 384, "num_attention_heads") == heads


@pytest.mark.parametrize("heads", ["0", "-1", "two", "99999999"])
def test_a_number_of_heads_that_is_none_is_one_line(heads, capfd):
    with pytest.raises(SystemExit) as caught:
        weights.main(["inspect", "x", f"--heads={heads}"])
    assert caught.value.code == 2
    assert f"'{heads}': want a number of 1 to 32768" in capfd.readouterr().err
