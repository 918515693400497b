"""Files that are broken or mean harm: every one ends in an error that names the file, soon and in little memory."""

import gzip
import os
import pickle
import resource
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from soundly.errors import ModelFileError, SoundlyError, UnsupportedOp
from soundly.graph import from_onnx as module
from soundly.graph import onnx_file
from soundly.graph.from_onnx import from_onnx

I64 = np.int64


def model(nodes: list[Any], constants: dict[str, Any], shape: Any = (1, 4), opset: int = 18) -> Any:
    rows = [helper.make_node(op, i, o, name=f"n{k}", **a) for k, (op, i, o, a) in enumerate(nodes)]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape), ("y", None))]
    graph = helper.make_graph(
        rows, "small", infos[:1], infos[1:], [numpy_helper.from_array(v, k) for k, v in constants.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def i(*numbers: int) -> Any:
    return np.array(numbers, I64)


def f(*numbers: float) -> Any:
    return np.array(numbers, np.float32)


def small() -> Any:
    rng = np.random.default_rng(1)
    nodes = [
        ("Conv", ["x", "w", "b"], ["c"], {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
        ("Relu", ["c"], ["r"], {}),
        ("MaxPool", ["r"], ["p"], {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("Reshape", ["p", "s"], ["flat"], {}),
        ("Gemm", ["flat", "m"], ["g"], {}),
        ("Softmax", ["g"], ["y"], {"axis": 1}),
    ]
    fixed = {
        "w": rng.normal(size=(2, 1, 3, 3)).astype(np.float32), "b": f(0, 1), "s": i(1, -1),
        "m": rng.normal(size=(8, 3)).astype(np.float32),
    }  # fmt: skip
    return model(nodes, fixed, (1, 1, 8, 8))


def refused(source: Any, match: str = "small", kind: type[SoundlyError] = ModelFileError, seconds: float = 5.0) -> None:
    """Reading ends in an error of this kind, within seconds, and without another GiB of memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(kind, match=match):
        from_onnx(source)
    assert time.process_time() - start < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


# -- not ONNX at all


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "empty"),
        (b"\x00" * 100, "bad.onnx"),
        (b"hello, this is not a model", "bad.onnx"),
        (os.urandom(1000), "bad.onnx"),
        (pickle.dumps({"weight": 1}), "pickle"),
        (b"\x1f\x8b" + b"junk" * 10, "gzip"),
        (gzip.compress(b"x" * 1000, mtime=0)[:-20], "gzip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ],
)
def test_other_content_under_the_name(content: bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    refused(path, match)


def test_a_checkpoint_under_the_name_is_never_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    torch.save({"a": torch.zeros(2)}, path)
    assert zipfile.is_zipfile(path)
    refused(path, "zip archive")

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    path.write_bytes(pickle.dumps(Bomb()))
    refused(path, "pickle")
    assert not (tmp_path / "executed").exists()


def test_missing_files_and_folders(tmp_path: Path) -> None:
    refused(tmp_path / "none.onnx", "not a file")
    refused(tmp_path, "not a file")
    refused("bad\0name.onnx", "not a file")


def test_truncated_files() -> None:
    data = small().SerializeToString()
    for n in range(1, len(data), 37):
        with pytest.raises(SoundlyError):
            from_onnx(data[:n])


def test_a_gzip_bomb_stops_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "UNPACKED_BYTES", 2**26)
    refused(gzip.compress(b"\0" * 2**28, 1), "unpacks to more")


# -- broken graphs


def relu(*names: str) -> Any:
    return ("Relu", [names[0]], [names[1]], {})


@pytest.mark.parametrize(
    ("nodes", "match"),
    [
        ([relu("a", "b"), relu("b", "a"), ("Add", ["x", "a"], ["y"], {})], "cycle"),
        ([relu("y", "y")], "cycle"),
        ([relu("nowhere", "y")], "'nowhere'"),
        ([relu("x", "z")], "output 'y'"),
        ([relu("x", "y"), ("Tanh", ["x"], ["y"], {})], "exists already"),
        ([relu("x", "x"), relu("x", "y")], "exists already"),
        ([("Add", ["x"], ["y"], {})], "malformed"),
        ([("Add", ["x", ""], ["y"], {})], "malformed"),
        ([("Relu", [], ["y"], {})], "malformed"),
        ([("Transpose", ["x"], ["y"], {"perm": [0, 0]})], "no order"),
        ([("Transpose", ["x"], ["y"], {"perm": [0, 7]})], "axis 7"),
        ([("Concat", ["x", "x"], ["y"], {"axis": 9})], "axis 9"),
        ([("Softmax", ["x"], ["y"], {"axis": "one"})], "malformed"),
        ([("Flatten", ["x"], ["y"], {"axis": 99})], "axis 99"),
        ([("MaxPool", ["x"], ["y"], {"kernel_shape": [0]})], "malformed"),
        ([("LeakyRelu", ["x"], ["y"], {"alpha": [1, 2]})], "malformed"),
    ],
)
def test_broken_graphs(nodes: list[Any], match: str) -> None:
    refused(model(nodes, {}), match)


@pytest.mark.parametrize(
    "node",
    [
        ("Conv", ["x", "w"], ["y"], {}),
        ("MatMul", ["x", "w"], ["y"], {}),
        ("Reshape", ["x", "s"], ["y"], {}),
        ("Gather", ["x", "s"], ["y"], {"axis": 1}),
        ("Unsqueeze", ["x", "s"], ["y"], {}),
        ("BatchNormalization", ["x", "w", "w", "w", "w"], ["y"], {}),
        ("Split", ["x", "s"], ["y", "z"], {"axis": 1}),
        ("LSTM", ["x", "w", "w"], ["y"], {}),
    ],
)
def test_operands_that_do_not_fit(node: Any) -> None:
    refused(model([node], {"w": np.ones((3, 3), np.float32), "s": i(7, 7)}))


def test_control_flow_and_foreign_operations() -> None:
    then = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["t"])], "then", [], [helper.make_empty_tensor_value_info("t")]
    )
    graph = model([("If", ["c"], ["y"], {"then_branch": then, "else_branch": then})], {"c": np.array(True)})
    refused(graph, "If is not supported", UnsupportedOp)
    foreign = model([relu("x", "y")], {})
    foreign.graph.node[0].domain = "com.example"
    refused(foreign, r"com\.example\.Relu", UnsupportedOp)
    hidden = model([relu("x", "y")], {})
    hidden.graph.node[0].attribute.append(helper.make_attribute("body", then))
    refused(hidden, "attribute 'body'", UnsupportedOp)


def test_element_types_that_are_no_real_numbers() -> None:
    texts = model([("Concat", ["x", "t"], ["y"], {"axis": 0})], {})
    texts.graph.initializer.append(helper.make_tensor("t", TensorProto.STRING, [1], [b"a"]))
    refused(texts, "element type 8", UnsupportedOp)
    tokens = model([relu("x", "y")], {})
    tokens.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    refused(tokens, "real numbers", UnsupportedOp)


# -- bombs: a few bytes that ask for much memory


def test_an_initialiser_that_claims_more_than_it_holds() -> None:
    bomb = model([("Add", ["x", "w"], ["y"], {})], {})
    bomb.graph.initializer.append(TensorProto(name="w", data_type=1, dims=[10**6, 10**6], raw_data=b"\0" * 8))
    refused(bomb, "'w' claims shape")
    bomb.graph.initializer[0].dims[:] = [-4]
    refused(bomb, "negative")
    bomb.graph.initializer[0].dims[:] = [2**40, 2**40, 0, 2]
    refused(bomb)


BIG = 10**12
BOMBS: dict[str, Any] = {
    "ConstantOfShape": [("ConstantOfShape", ["n"], ["c"], {}), ("Add", ["x", "c"], ["y"], {})],
    "Expand": [("Expand", ["x", "n"], ["y"], {})],
    "Expand constant": [("Expand", ["one", "n"], ["c"], {}), ("Add", ["x", "c"], ["y"], {})],
    "Tile": [("Tile", ["x", "nn"], ["y"], {})],
    "Pad": [("Pad", ["x", "pads"], ["y"], {})],
    "Pad reflect": [("Pad", ["x", "pads"], ["y"], {"mode": "reflect"})],
    "Range": [("Range", ["zero", "big", "step"], ["r"], {}), ("Cast", ["r"], ["c"], {"to": 1}), ("Add", ["x", "c"],
        ["y"], {})],
    "Range of nothing": [("Range", ["zero", "big", "zero"], ["r"], {}), ("Cast", ["r"], ["y"], {"to": 1})],
    "OneHot": [("ArgMax", ["x"], ["k"], {"axis": 1}), ("OneHot", ["k", "big1", "ends"], ["y"], {})],
    "broadcast": [
        ("ConstantOfShape", ["m"], ["a"], {}), ("Unsqueeze", ["a", "axis"], ["b"], {}), ("Add", ["a", "b"], ["c"], {}),
        ("ReduceSum", ["c"], ["s"], {"keepdims": 0}), ("Add", ["x", "s"], ["y"], {}),
    ],
    "doubling": [
        *[("Concat", ["x" if k == 0 else f"t{k}"] * 4, [f"t{k + 1}"], {"axis": 0}) for k in range(40)],
        ("ReduceSum", ["t40"], ["y"], {}),
    ],
    "doubling constants": [
        *[("Concat", ["one" if k == 0 else f"t{k}"] * 4, [f"t{k + 1}"], {"axis": 0}) for k in range(40)],
        ("Add", ["x", "t40"], ["y"], {}),
    ],
    "outer product": [
        ("ConstantOfShape", ["m"], ["a"], {}), ("Unsqueeze", ["a", "axis"], ["b"], {}), ("Unsqueeze", ["a", "zero1"],
        ["d"], {}),
        ("MatMul", ["b", "d"], ["c"], {}), ("ReduceSum", ["c"], ["s"], {"keepdims": 0}), ("Add", ["x", "s"], ["y"], {}),
    ],
}  # fmt: skip
FIXED = {
    "n": i(BIG), "nn": i(1, BIG), "pads": i(0, BIG, 0, 0), "zero": np.array(0, I64), "big": np.array(BIG, I64),
        "one": f(1),
    "step": np.array(1, I64), "big1": i(BIG), "ends": f(0, 1), "m": i(10**6), "axis": i(1), "zero1": i(0),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(bomb: str) -> None:
    refused(model(BOMBS[bomb], FIXED), kind=SoundlyError)


@pytest.mark.parametrize(
    ("node", "fixed"),
    [
        (("Resize", ["x", "", "f"], ["y"], {}), {"f": f(1, 1, 1e9, 1)}),
        (("Resize", ["x", "", "", "n"], ["y"], {"mode": "linear"}), {"n": i(1, 1, 10**9, 10**9)}),
        (("MaxPool", ["x"], ["y"], {"kernel_shape": [10**9, 1], "pads": [10**9, 0, 10**9, 0]}), {}),
        (("AveragePool", ["x"], ["y"], {"kernel_shape": [10**6, 1], "pads": [10**6, 0, 10**6, 0]}), {}),
        (("Conv", ["x", "w"], ["y"], {"pads": [10**6] * 4}), {"w": np.ones((1, 1, 1, 1), np.float32)}),
        (("Conv", ["x", "w"], ["y"], {"dilations": [0, 0]}), {"w": np.ones((1, 1, 2, 2), np.float32)}),
        (("ConvTranspose", ["x", "w"], ["y"], {"strides": [10**9, 1]}), {"w": np.ones((1, 1, 1, 1), np.float32)}),
        (("DepthToSpace", ["x"], ["y"], {"blocksize": 0}), {}),
        (("LRN", ["x"], ["y"], {"size": 10**9}), {}),
        (("Gather", ["x", "i"], ["y"], {"axis": 2}), {"i": np.zeros((2**12, 2**11), I64)}),
    ],
)
def test_bombs_of_layers(node: Any, fixed: Any) -> None:
    refused(model([node], fixed, (1, 1, 2**10, 4)), kind=SoundlyError)


def test_inputs_that_are_too_large() -> None:
    refused(model([relu("x", "y")], {}, (2**20, 2**20)), kind=SoundlyError)


def test_many_large_values_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ALL_ENTRIES", 10**6)
    chain = [relu("x" if k == 0 else f"t{k}", "y" if k == 199 else f"t{k + 1}") for k in range(200)]
    refused(model(chain, {}, (100, 100)), "too large")


def test_long_chains_do_not_exhaust_the_stack() -> None:
    chain = [relu("x" if k == 0 else f"t{k}", "y" if k == 2999 else f"t{k + 1}") for k in range(3000)]
    assert from_onnx(model(chain, {})).output.shape == (1, 4)


def test_numbers_that_are_not_finite() -> None:
    for value in (np.nan, np.inf):
        for node in (("Mul", ["x", "c"], ["y"], {}), ("Gemm", ["x", "x"], ["y"], {"alpha": float(value), "transB": 1})):
            network = from_onnx(model([node], {"c": f(value)}))
            assert not torch.isfinite(network(torch.ones(1, 4))).all()


# -- external data


@pytest.mark.parametrize(
    "location", ["../secret.bin", "sub/../../secret.bin", "ABSOLUTE", "link.bin", "", ".", "none.bin"]
)
def test_external_data_outside_the_folder_is_never_opened(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    secret = tmp_path / "secret.bin"
    secret.write_bytes(b"\0" * 16)
    (folder / "link.bin").symlink_to(secret)
    hostile = model([("Add", ["x", "w"], ["y"], {})], {})
    tensor = TensorProto(name="w", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=str(secret) if location == "ABSOLUTE" else location)
    hostile.graph.initializer.append(tensor)
    path = folder / "m.onnx"
    path.write_bytes(hostile.SerializeToString())
    refused(path, "no file inside the model's folder")
    refused(path.read_bytes(), "load the model from its path")


@pytest.mark.parametrize(("key", "value"), [("offset", "-4"), ("offset", "8"), ("length", "4"), ("offset", "many")])
def test_external_data_that_does_not_fit(key: str, value: str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"\0" * 16)
    hostile = model([("Add", ["x", "w"], ["y"], {})], {})
    tensor = TensorProto(name="w", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="w.bin")
    tensor.external_data.add(key=key, value=value)
    hostile.graph.initializer.append(tensor)
    (tmp_path / "m.onnx").write_bytes(hostile.SerializeToString())
    refused(tmp_path / "m.onnx", "'w'")


# -- fuzzing


def test_the_model_that_is_mutated_is_read() -> None:
    assert attempt(small())


def attempt(source: Any) -> bool:
    """Whether it is read; anything but a SoundlyError is a failure of the test."""
    try:
        from_onnx(source)
    except SoundlyError:
        return False
    return True


def test_mutated_bytes() -> None:
    data, rng, survivors = small().SerializeToString(), np.random.default_rng(0), 0
    for _ in range(200):
        mutant = bytearray(data)
        for _ in range(int(rng.integers(1, 6))):
            mutant[int(rng.integers(len(mutant)))] = int(rng.integers(256))
        survivors += attempt(bytes(mutant))
    assert 0 < survivors < 200  # neither everything nor nothing is read


def test_mutated_structure() -> None:
    rng = np.random.default_rng(0)
    numbers = [0, 1, -1, 2, 7, 2**31, 2**62, -(2**63), 10**12]
    names = ["", "x", "c", "r", "p", "flat", "g", "y", "w", "b", "s", "m"]
    ops = module.SUPPORTED
    survivors = 0
    for _ in range(300):
        mutant = small()
        for _ in range(int(rng.integers(1, 3))):
            node = mutant.graph.node[int(rng.integers(len(mutant.graph.node)))]
            tensor = mutant.graph.initializer[int(rng.integers(len(mutant.graph.initializer)))]
            number = numbers[int(rng.integers(len(numbers)))]
            match int(rng.integers(7)):
                case 0:
                    node.op_type = ops[int(rng.integers(len(ops)))]
                case 1 if node.input:
                    node.input[int(rng.integers(len(node.input)))] = names[int(rng.integers(len(names)))]
                case 2 if node.attribute:
                    attribute = node.attribute[int(rng.integers(len(node.attribute)))]
                    if attribute.ints:
                        attribute.ints[int(rng.integers(len(attribute.ints)))] = number
                    else:
                        attribute.i = number
                case 3 if tensor.dims:
                    tensor.dims[int(rng.integers(len(tensor.dims)))] = number
                case 4:
                    tensor.data_type = int(rng.integers(0, 20))
                case 5:
                    dims = mutant.graph.input[0].type.tensor_type.shape.dim
                    dims[int(rng.integers(len(dims)))].dim_value = number
                case _:
                    del mutant.graph.node[int(rng.integers(len(mutant.graph.node)))]
        survivors += attempt(mutant)
        onnx.ModelProto.FromString(mutant.SerializeToString())
    assert 0 < survivors < 200  # neither everything nor nothing is read
