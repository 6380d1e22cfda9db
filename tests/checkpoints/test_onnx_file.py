"""A stranger's model.onnx: told by its content, and refused for every reason before anything of it is run or written."""

import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qsparse_export as qs
from qsparse_export.errors import CheckpointError, QSparseError, UsageError
from qsparse_export.loader import load

WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3)


def model(nodes=None, opset=23, initializers=None, **options) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes or [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "n"])],
        [numpy_helper.from_array(WEIGHTS, "w")] if initializers is None else initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10, **options)


def external(folder, location="data.bin", offset=0, length=48, **keys):
    """A file whose weights are said to lie in ``location``."""
    (folder / "data.bin").write_bytes(WEIGHTS.tobytes())
    proto = model()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": offset, "length": length, **keys}.items():
        if value is not None:
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
    return save(folder, proto)


def save(folder, proto):
    path = folder / "model.onnx"
    path.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
    return path


def refused(path, reason):
    with pytest.raises(CheckpointError, match=reason):
        load(path)
    out = path.parent / "bundle"
    with pytest.raises(QSparseError):
        qs.export(load(path), out=out)
    assert [entry for entry in os.listdir(path.parent) if "bundle" in entry] == []


@pytest.mark.parametrize("name", ["model.onnx", "weights.bin", "model.pt"])
def test_a_file_is_told_by_its_content_not_its_name(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(model().SerializeToString())
    loaded = load(path)
    assert (loaded.source_format, loaded.config, loaded.onnx.path) == ("onnx", None, path)
    assert loaded.name == {"model.onnx": "model", "weights.bin": "weights", "model.pt": "model"}[name]
    assert [node.op_type for node in loaded.onnx.read().graph] == ["MatMul"]


def test_external_data_beside_the_model_is_taken_and_counts_for_the_checksum(tmp_path):
    path = external(tmp_path)
    loaded = load(path)
    tensor = loaded.onnx.read().graph.initializers["w"].const_value
    np.testing.assert_array_equal(tensor.numpy(), WEIGHTS)
    before = loaded.source_sha256
    (tmp_path / "data.bin").write_bytes((WEIGHTS + 1).tobytes())
    assert load(path).source_sha256 != before


def test_external_data_in_a_folder_below_is_taken(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w.bin").write_bytes(WEIGHTS.tobytes())
    assert load(external(tmp_path, "weights/w.bin")).onnx is not None


def test_a_sparsity_for_a_graph_is_refused(tmp_path):
    from qsparse_export.sparsity import parse_sparsity

    with pytest.raises(UsageError, match="exported graph"):
        load(save(tmp_path, model()), sparsity=parse_sparsity(["0.5"]))


@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../data.bin", "sub/../../data.bin", "", "..\\data.bin", "C:data.bin"],
)
def test_data_outside_the_folder(tmp_path, location):
    refused(external(tmp_path, location), "outside the model's folder")


def test_links_out_of_the_folder(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_bytes(WEIGHTS.tobytes())
    path = external(inside, "link.bin")
    (inside / "link.bin").symlink_to(tmp_path / "secret")
    refused(path, "is a link to")


def test_data_that_is_missing_or_no_file(tmp_path):
    refused(external(tmp_path, "nothing.bin"), "cannot be opened")
    os.mkfifo(tmp_path / "pipe.bin")
    refused(external(tmp_path, "pipe.bin"), "not a regular file")


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"offset": 8}, "do not belong together or are truncated"),
        ({"length": 1 << 40}, "valid|truncated|belong"),
        ({"length": 4}, "do not belong together"),
        ({"offset": -4}, "do not belong together"),
        ({"offset": "x"}, "does not say where"),
        ({"location": None}, "does not say where"),
    ],
)
def test_external_data_of_another_size(tmp_path, keys, reason):
    if keys == {"length": 1 << 40}:
        (tmp_path / "short").mkdir()
        path = external(tmp_path / "short", **keys)
        (path.parent / "data.bin").write_bytes(b"\0" * 8)
    else:
        path = external(tmp_path, **keys)
    refused(path, reason)


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_truncated_files(tmp_path, cut):
    whole = model().SerializeToString()
    refused(save(tmp_path, whole[: len(whole) - cut]), "truncated|damaged|without a graph")


def test_fields_that_promise_more_than_there_is(tmp_path):
    forged = b"\x08\x0a" + b"\x3a" + b"\xff\xff\xff\xff\x0f" + b"\0" * 64  # a graph of 4 GiB
    refused(save(tmp_path, forged), "truncated: the field at byte 2 has 4294967295 bytes")
    endless = b"\x08\x0a\x3a" + b"\xff" * 32
    refused(save(tmp_path, endless), "longer than 64 bits")


def test_files_over_two_gibibytes(tmp_path):
    path = save(tmp_path, model())
    with path.open("r+b") as file:
        file.truncate((1 << 31) + 10)  # sparse: takes no room
    refused(path, "less than 2 GiB")


def test_foreign_bytes_behind_a_good_start(tmp_path):
    refused(save(tmp_path, b"\x08\x0a\x12\x01a" + b"\x0b" * 20), "not an ONNX model")
    refused(save(tmp_path, b"\x08\x0a\x12\x01a\x08\x01"), "without a graph")
    refused(save(tmp_path, b"\x08\x0a\x3a\x04\xff\xff\xff\xff"), "damaged ONNX")


def test_tensors_that_lie_about_their_size(tmp_path):
    proto = model()
    proto.graph.initializer[0].dims[0] = 1 << 40
    refused(save(tmp_path, proto), "its shape and type take")
    proto.graph.initializer[0].dims[0] = -1
    refused(save(tmp_path, proto), "sizes of 0 or more")
    proto = model()
    proto.graph.initializer[0].ClearField("raw_data")
    proto.graph.initializer[0].float_data.extend([1.0, 2.0])
    refused(save(tmp_path, proto), "is damaged")


def test_unknown_domains_and_the_library_that_a_model_names(tmp_path):
    library = tmp_path / "evil.so"
    library.write_bytes(b"\x7fELF")
    proto = model([helper.make_node("Steal", ["x"], ["y"], domain="com.evil")])
    helper.set_model_props(proto, {"custom_ops_library": str(library), "ort_config": '{"custom_ops": "evil.so"}'})
    refused(save(tmp_path, proto), "com.evil::Steal.* is never loaded")


def test_unknown_ops_of_the_standard_domain(tmp_path):
    refused(save(tmp_path, model([helper.make_node("Nonsense", ["x"], ["y"])])), "not valid ONNX")
    refused(save(tmp_path, model([helper.make_node("MatMul", ["x", "nowhere"], ["y"])])), "not valid ONNX")


@pytest.mark.parametrize("opset", [7, 16, 26])
def test_opsets_out_of_range(tmp_path, opset):
    refused(save(tmp_path, model(opset=opset)), f"has opset {opset}; expected 17 to 25")


def function(domain, name, nodes):
    return helper.make_function(domain, name, ["a"], ["b"], nodes, [helper.make_opsetid("", 23)])


def test_functions_that_call_themselves(tmp_path):
    proto = model([helper.make_node("Loop", ["x"], ["y"], domain="local")])
    proto.functions.append(function("local", "Loop", [helper.make_node("Loop", ["a"], ["b"], domain="local")]))
    proto.opset_import.append(helper.make_opsetid("local", 1))
    refused(save(tmp_path, proto), "call themselves")


def test_a_function_under_the_name_of_an_op_of_ours(tmp_path):
    proto = model([helper.make_node("TopKSparsify", ["x"], ["y"], domain="ai.qsparse", k=1, block=0, rescale="none")])
    proto.functions.append(function("ai.qsparse", "TopKSparsify", [helper.make_node("Neg", ["a"], ["b"])]))
    proto.opset_import.append(helper.make_opsetid("ai.qsparse", 1))
    refused(save(tmp_path, proto), "is not this project's")


def test_functions_of_the_model_are_inlined(tmp_path):
    proto = model([helper.make_node("Twice", ["x"], ["y"], domain="local")])
    proto.functions.append(function("local", "Twice", [helper.make_node("Add", ["a", "a"], ["b"])]))
    proto.opset_import.append(helper.make_opsetid("local", 1))
    bundle = qs.export(load(save(tmp_path, proto)), out=tmp_path / "bundle", portable=True)
    made = onnx.load(bundle.path / "model.onnx")
    assert [node.op_type for node in made.graph.node] == ["Add"] and not made.functions


def test_an_op_that_only_a_newer_opset_has_is_named(tmp_path):
    proto = model([helper.make_node("Swish", ["x"], ["y"])], opset=24, initializers=[])
    with pytest.raises(QSparseError, match=r"Swish .* came with opset 24"):
        qs.export(load(save(tmp_path, proto)), out=tmp_path / "bundle")
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_what_is_no_tensor(tmp_path):
    proto = model([helper.make_node("SequenceConstruct", ["x"], ["y"])], initializers=[])
    proto.graph.output[0].CopyFrom(helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None))
    refused(save(tmp_path, proto), "no tensor")


def test_notes_that_a_file_brings_are_not_believed(tmp_path):
    proto = model()
    entry = proto.graph.node[0].metadata_props.add()
    entry.key, entry.value = "ai.qsparse.original", '[{"scaled": "x", "q": "x"}]'
    assert not load(save(tmp_path, proto)).onnx.read().graph.node(0).metadata_props
