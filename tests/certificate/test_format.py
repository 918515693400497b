"""The file format: exact round trips, canonical bytes, and nothing but CertificateError from a damaged file."""

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soundly.certificate import Certificate, check, head_edit
from soundly.certificate.format import MAX_HEADER, canonical_json
from soundly.errors import CertificateError, InvalidInput

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs pipes, /dev and /proc")


def example(**changes: Any) -> Certificate:
    arguments: dict[str, Any] = {
        "vectors": np.array([[1, 2, 1], [3, 4, 1]], np.float32),
        "value_vector": np.array([0, 1]),
        "value_class": np.array([0, 1]),
        "classes": np.array([7, 9]),
        "weights": np.array([[1, 0, 0.5], [0, 1, -0.5]], np.float32),
        "row_start": np.array([0, 1, 3]),
        "row_value": np.array([0, 0, 1]),
        "row_coefficient": np.array([1.0, 1, -1]),
        "lower": np.array([1.0, -np.inf]),
        "upper": np.array([2.0, 0]),
        "margin": np.array([1e-9, 1e-9]),
        "error": np.array([1e-15, 1e-15]),
        "claims": [{"name": "größer", "rows": [0, 1]}, {"name": "smaller", "rows": [1, 2]}],
        "model": {"before": "0" * 64, "after": "1" * 64, "layer": "fc", "dtype": "float32"},
        "made_with": {"soundly": "0.1", "settings": {"norm": "l2", "threads": 1}},
    }
    return head_edit(**{**arguments, **changes})


def sealed(data: bytes) -> bytes:
    return data + hashlib.sha256(data).digest()


def with_header(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, honest everywhere else."""
    raw = header if isinstance(header, bytes) else canonical_json(header)
    start = b"\x89soundly" + struct.pack("<II", 1, len(raw) if length is None else length) + raw
    return sealed(start + (bytes(-len(start) % 64) + body if body else b""))


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and arrays of a file, by an independent reading."""
    data = path.read_bytes()
    length = struct.unpack_from("<I", data, 12)[0]
    return json.loads(data[16 : 16 + length]), data[-(-(16 + length) // 64) * 64 : -32]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "edit.cert"


@pytest.fixture
def refused(path):
    def refused(data: bytes, message: str) -> None:
        path.write_bytes(data)
        with pytest.raises(CertificateError, match=message) as caught:
            Certificate.load(path)
        assert str(path) in str(caught.value)

    return refused


@pytest.mark.parametrize("vectors", [np.float32, np.float64])
@pytest.mark.parametrize("weights", [np.float32, np.float64, np.uint16])
def test_round_trip_is_exact(path, vectors, weights):
    rng = np.random.default_rng(0)
    stored = (rng.standard_normal((2, 3)) * 100).astype(weights)
    c = example(vectors=rng.standard_normal((2, 3)).astype(vectors), weights=stored, bf16=weights == np.uint16)
    c.save(path)
    back = Certificate.load(path)
    assert dict(back.header) == dict(c.header) and back.kind == "head edit"
    assert list(back.arrays) == sorted(c.arrays)
    for name, array in c.arrays.items():
        assert back.arrays[name].dtype == array.dtype and back.arrays[name].shape == array.shape
        assert back.arrays[name].tobytes() == array.tobytes()
    again = path.with_name("again.cert")
    back.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_the_layout_is_the_documented_one(path):
    """Read with struct and json alone, as docs/certificates.md describes it."""
    c = example()
    c.save(path)
    data = path.read_bytes()
    header, body = parts(path)
    table = header.pop("arrays")
    assert data[:8] == b"\x89soundly" and struct.unpack_from("<I", data, 8) == (1,)
    assert data[-32:] == hashlib.sha256(data[:-32]).digest()
    assert header == dict(c.header)
    assert all(entry["offset"] % 64 == 0 for entry in table.values())
    lower = np.frombuffer(body, "<f8", count=2, offset=table["lower"]["offset"])
    assert table["lower"] == {"dtype": "f8", "offset": table["lower"]["offset"], "shape": [2]}
    assert lower.tolist() == [1.0, -np.inf]
    assert header["edit"] == hashlib.sha256(c.arrays["weights"].tobytes()).hexdigest()


def test_equal_inputs_give_equal_bytes_in_any_process(path):
    """Another hash seed, another order of keys, big-endian and strided arrays: the same file."""
    example().save(path)
    c = example()
    arrays: dict[str, Any] = {
        name: np.repeat(array, 2, axis=0)[::2].astype(array.dtype.newbyteorder(">"))
        for name, array in reversed(c.arrays.items())
    }
    other = path.with_name("other.cert")
    Certificate(dict(reversed(c.header.items())), arrays).save(other)
    assert other.read_bytes() == path.read_bytes()
    code = "import sys; from soundly.certificate import Certificate as C; C.load(sys.argv[1]).save(sys.argv[2])"
    third = path.with_name("third.cert")
    subprocess.run([sys.executable, "-c", code, path, third], check=True, env=environment(PYTHONHASHSEED="77"))
    assert third.read_bytes() == path.read_bytes()


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), **more}


def test_the_editors_arrays_are_not_copied():
    """Contiguous arrays of the stored dtypes, as torch's `numpy()` gives them, are kept as they are and checked so."""
    names = ("vectors", "value_vector", "value_class", "classes", "weights", "row_start", "row_value",
             "row_coefficient", "lower", "upper", "margin", "error")  # fmt: skip
    given = {name: array.copy() for name, array in example().arrays.items()}
    c = example(**given)
    assert sorted(names) == list(c.arrays) and all(np.shares_memory(c.arrays[name], given[name]) for name in names)
    assert check(c).accepted and all(given[name].flags.writeable for name in names)


def test_a_certificate_cannot_be_changed_in_place(path):
    c = example()
    c.save(path)
    for one in (c, Certificate.load(path)):
        with pytest.raises(ValueError, match="read-only"):
            one.arrays["lower"][0] = -9
        with pytest.raises(TypeError):
            one.header["kind"] = "other"  # type: ignore[index]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not replace a file that is mapped")
def test_saving_over_a_loaded_file_leaves_the_loaded_one_intact(path):
    example().save(path)
    first = Certificate.load(path)
    example(upper=np.array([5.0, 5.0])).save(path)
    assert first.arrays["upper"].tolist() == [2.0, 0.0]
    assert Certificate.load(path).arrays["upper"].tolist() == [5.0, 5.0]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    example().save(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        example(upper=np.array([5.0, 5.0])).save(path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": np.ones((2, 3), np.float16)},
        {"weights": np.ones((2, 3), np.uint16)},
        {"bf16": True},
        {"vectors": np.ones((2, 3), np.int32)},
        {"lower": np.ones(2, np.longdouble)},
        {"row_start": np.array([0.0, 1, 3])},
        {"row_value": np.array([0, 0, 1], np.uint64)},
        {"value_vector": np.array([0.0, 1])},
        {"value_class": np.array(["0", "1"])},
        {"made_with": {"eps": 0.1}},
        {"made_with": {"count": np.int64(3)}},
        {"made_with": {"count": 2**70}},
        {"made_with": {3: "x"}},
        {"claims": [{"name": "half a pair \ud800", "rows": [0, 2]}]},
    ],
    ids=str,
)
def test_what_cannot_be_stored_exactly_is_refused(changes):
    with pytest.raises(InvalidInput):
        example(**changes)


@pytest.mark.parametrize("header", [{}, {"format": "npz"}, {"version": 2}, {"arrays": {}}], ids=str)
def test_a_header_of_another_format_is_refused(header):
    c = example()
    with pytest.raises(InvalidInput, match="needs format"):
        Certificate({**c.header, **header} if header else {}, c.arrays)


def test_a_header_too_large_is_refused_on_both_sides(path, refused):
    with pytest.raises(InvalidInput, match="fewer claims"):
        example(made_with={"x": "y" * MAX_HEADER}).save(path)
    assert not path.exists()
    refused(with_header(b" " * (MAX_HEADER + 1)), "no room")


def test_damage_is_named(path, refused):
    example().save(path)
    data = path.read_bytes()
    header, body = parts(path)
    refused(b"", "empty")
    refused(data[:40], "too few")
    refused(b"PK\x03\x04" + data[4:], "byte 0")
    refused(sealed(data[:8] + struct.pack("<I", 2) + data[12:-32]), "version 2; this soundly reads version 1")
    refused(data[:-1], "truncated")
    refused(data + b"\0", "extended")
    refused(data[:-1] + bytes([data[-1] ^ 1]), "digest")
    refused(data[:16] + b"[" + data[17:], "header")
    refused(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:], "digest")
    refused(with_header(header, body, length=2**32 - 1), "no room")
    refused(with_header(header, b"\0" * 64 + body), "extended")
    gap = body.index(b"\0" * 8, header["arrays"]["classes"]["offset"] + 16)
    refused(with_header(header, body[:gap] + b"hidden" + body[gap + 6 :]), "padding")
    refused(with_header({**header, "version": 2}, body), "'version' 1")
    refused(with_header({**header, "version": True}, body), "'version' 1")
    refused(with_header({**header, "format": "npz"}, body), "'format'")
    refused(with_header({k: v for k, v in header.items() if k != "arrays"}, body), "table 'arrays'")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"offset": 0}, "layout has"),
        ({"offset": -64}, "layout has"),
        ({"offset": 2**62}, "layout has"),
        ({"offset": "0"}, "impossible"),
        ({"offset": True}, "impossible"),
        ({"shape": [2**62]}, "impossible"),
        ({"shape": [2**40]}, "truncated|layout"),
        ({"shape": [2**62, 0, 2**62]}, "impossible"),
        ({"shape": [-1]}, "impossible"),
        ({"shape": [2, -1, -1]}, "impossible"),
        ({"shape": [True, 2]}, "impossible"),
        ({"shape": 2}, "impossible"),
        ({"shape": None}, "impossible"),
        ({"shape": [1, 1, 1, 1, 2]}, "impossible"),
        ({"shape": [20]}, "layout has"),
        ({"dtype": "O"}, "dtype 'O'"),
        ({"dtype": "f2"}, "dtype 'f2'"),
        ({"dtype": ["f8"]}, "dtype"),
        ({"dtype": None}, "dtype"),
        ({"more": 1}, "exactly dtype, offset and shape"),
    ],
    ids=str,
)
def test_a_lying_table_is_refused_before_anything_is_allocated(path, refused, entry, message):
    example().save(path)
    header, body = parts(path)
    header["arrays"]["upper"].update(entry)
    refused(with_header(header, body), message)
    for wrong in (None, [], "f8", 3, {}):
        header["arrays"]["upper"] = wrong
        refused(with_header(header, body), "entry needs")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "header"),
        (b"[]", "not a JSON object"),
        (b"3", "not a JSON object"),
        (b"{", "header"),
        (b'{"a":1,"a":1}', "twice"),
        (b'{"a":{"b":1,"b":2}}', "twice"),
        (b'{"a":1.5}', "not an integer"),
        (b'{"a":1e400}', "not an integer"),
        (b'{"a":NaN}', "not an integer"),
        (b'{"a":-Infinity}', "not an integer"),
        (b'{"a":' + b"9" * 5000 + b"}", "header"),
        (b'{"a":' + b"9" * 30 + b"}", "64 bits"),
        (b'{"a":"\\ud800"}', "surrogates"),
        (b'{"a":"\xff"}', "header"),
        (b'{"a": 1}', "canonical"),
        (b'{"b":1,"a":1}', "canonical"),
        (b'{"a":"\xc3\xa9"}', "canonical"),
        (b'{"a":"\\u0041"}', "canonical"),
        (b'{"a":-0}', "canonical"),
        (b"[" * 100000, "nested"),
        (b'{"a":' * 100000, "nested"),
        (b'{"a":' + b"[" * 40 + b"]" * 40 + b"}", "nested"),
        (b"{}", "'format'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_hostile_header_is_refused(refused, raw, message):
    refused(with_header(raw), message)


@linux
def test_files_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "absent", loop, tmp_path / ("x" * 5000), "/dev/zero", "a\0b"):
        with pytest.raises(CertificateError, match="cannot be read"):
            Certificate.load(path)


def test_a_thousand_damaged_files_raise_only_certificate_errors(path):
    """Flipped, removed, repeated and inserted bytes; half of the files are sealed again with a fresh digest."""
    rng = np.random.default_rng(0)
    example().save(path)
    original, opened = path.read_bytes(), 0
    for i in range(1000):
        data = bytearray(original[:-32] if i % 2 else original)
        at, size = int(rng.integers(0, len(data))), int(rng.choice([1, 2, 4, 8, 64]))
        match i // 2 % 5:
            case 0:
                data[at] ^= 1 << int(rng.integers(0, 8))
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = data[at : at + size]
            case 3:
                data[at : at + size] = rng.bytes(size)
            case 4:
                data[8 + int(rng.integers(0, 8))] = int(rng.integers(0, 256))  # version and header length
        path.write_bytes(sealed(bytes(data)) if i % 2 else data)
        try:
            check(path)
        except CertificateError:
            continue
        opened += 1
        assert i % 2 or data == original, "an altered file passed its digest"
    assert opened > 20  # else nothing was tested beyond the digest


wild = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.text(max_size=5),
    st.lists(st.integers(-2, 3), max_size=5),
    st.dictionaries(st.sampled_from(["name", "rows", "dtype", "shape", "offset"]), st.integers(-1, 2), max_size=3),
)  # fmt: skip


@settings(max_examples=300)
@given(data=st.data())
def test_edited_headers_raise_only_certificate_errors(tmp_path_factory, data):
    """Any value of the header, however deep, exchanged for any other, with lengths and digest made to fit."""
    path, plain = (tmp_path_factory.getbasetemp() / name for name in ("wild.cert", "plain.cert"))
    if not plain.exists():
        example().save(plain)
    header, body = parts(plain)
    place: Any = header
    while isinstance(place, dict | list) and place:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.integers(0, 2)) == 0:
            break
        place = place[key]
    place[key] = data.draw(wild)
    path.write_bytes(with_header(header, body))
    try:
        check(path)
    except CertificateError as error:
        assert str(path) in str(error)


@settings(max_examples=200)
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_raise_only_certificate_errors(tmp_path_factory, noise, framed):
    path = tmp_path_factory.getbasetemp() / "noise.cert"
    path.write_bytes(with_header(noise) if framed else noise)
    with pytest.raises(CertificateError):
        Certificate.load(path)


@linux
def test_hostile_headers_stay_within_bounded_memory(path):
    """The worst header of 4 MiB, in a process that may not use 400 MB more than Python with numpy needs."""
    path.write_bytes(with_header(b'{"a":[' + b"[],[]," * (MAX_HEADER // 6 - 4) + b"[]]}"))
    code = (
        "import sys, resource, numpy; from soundly.certificate import Certificate, format; from soundly import errors\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000,) * 2)\n"
        "try: Certificate.load(sys.argv[1])\n"
        "except errors.CertificateError: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, env=environment())
    assert done.stdout == "refused\n", done.stderr
