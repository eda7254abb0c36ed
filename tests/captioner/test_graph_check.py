import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from captioner.graph_check import MAX_CONSTANT, MAX_NODES, OPERATORS, WEIGHTS, GraphError, check_graph

SHAPES = {"w": (3, 4), "v": (4,)}


def weight(name, dims, **source):
    tensor = TensorProto(name=name, dims=dims, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in ({"location": WEIGHTS} | source).items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def build():
    """Return a graph as they are exported: two weights, one constant."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "v"], ["sum"]),
        helper.make_node("Transpose", ["sum"], ["turned"], perm=[1, 0]),
        helper.make_node("Reshape", ["turned", "shape"], ["y"]),
    ]
    shape = TensorProto(name="shape", dims=[1], data_type=TensorProto.INT64, raw_data=b"\xff" * 8)
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["L"])],
        [weight("w", (3, 4)), weight("v", (4,)), shape],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_an_exported_graph_names_its_weights():
    assert check_graph(build().SerializeToString(), SHAPES) == ("w", "v")


def add_node(**fields):
    return lambda model: model.graph.node.add(**fields)


def add_attribute(**fields):
    return lambda model: model.graph.node[0].attribute.add(name="a", **fields)


def add_tensor(tensor, **fields):
    def change(model):
        for name, value in fields.items():
            setattr(tensor, name, value)
        model.graph.initializer.append(tensor)

    return change


def change_weight(**fields):
    def change(model):
        for name, value in fields.items():
            setattr(model.graph.initializer[0], name, value)

    return change


def forget(field):
    return lambda model: model.graph.initializer[0].ClearField(field)


GRAPH = onnx.GraphProto(name="g")
SPARSE = onnx.SparseTensorProto(dims=[1 << 40])
OUTSIDE = "refers to an external file"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # operators
        (add_node(op_type="Loop"), "operator 'Loop'"),
        (add_node(op_type="If"), "operator 'If'"),
        (add_node(), "operator ''"),
        (add_node(op_type="MatMul", domain="com.microsoft"), "domain 'com.microsoft'"),
        (add_node(op_type="MatMul", domain="ai.onnx.ml"), "domain 'ai.onnx.ml'"),
        (add_node(op_type="MatMul", overload="o"), "field 8 of node"),
        (lambda model: model.opset_import.add(domain="com.microsoft", version=1), "domain 'com.microsoft'"),
        (lambda model: model.functions.add(name="MatMul"), "field 25 of the model"),
        (lambda model: model.training_info.add(), "field 20 of the model"),
        (lambda model: model.metadata_props.add(key="ort_config", value="{}"), "field 14 of the model"),
        (lambda model: model.graph.node.extend([onnx.NodeProto(op_type="Relu")] * MAX_NODES), "at most 10,000"),
        (
            lambda model: model.graph.node.append(helper.make_node("Split", ["x"], ["a", "b"], num_outputs=1)),
            "a Split with 2 outputs declares 1",
        ),
        # attributes
        (add_attribute(g=GRAPH), "field 6 of attribute"),
        (add_attribute(graphs=[GRAPH]), "field 11 of attribute"),
        (add_attribute(t=weight("w", (3, 4))), "field 13 of t"),
        (add_attribute(t=TensorProto(dims=[1 << 40])), "'' has more than 65,536"),
        (add_attribute(tensors=[TensorProto()]), "field 10 of attribute"),
        (add_attribute(sparse_tensor=SPARSE), "field 22 of attribute"),
        (add_attribute(sparse_tensors=[SPARSE]), "field 23 of attribute"),
        (add_attribute(tp=onnx.TypeProto()), "field 14 of attribute"),
        (add_attribute(strings=[b"s"]), "field 9 of attribute"),
        # types
        (
            lambda model: model.graph.input.append(
                helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [1 << 40])
            ),
            "field 4 of type",
        ),
        (lambda model: model.graph.value_info.add(name="v"), "field 13 of graph"),
        (lambda model: model.graph.quantization_annotation.add(tensor_name="w"), "field 14 of graph"),
        (lambda model: model.graph.sparse_initializer.append(SPARSE), "field 15 of graph"),
        # tensors that are in other files, or anywhere in memory
        (lambda model: setattr(model.graph.initializer[0].external_data[0], "value", "/etc/passwd"), OUTSIDE),
        (lambda model: setattr(model.graph.initializer[0].external_data[0], "value", "../weights"), OUTSIDE),
        (lambda model: setattr(model.graph.initializer[0].external_data[0], "key", "place"), OUTSIDE),
        (lambda model: model.graph.initializer[0].external_data.add(key="location", value="/etc/passwd"), OUTSIDE),
        (lambda model: model.graph.initializer[0].external_data.add(key="offset", value="8"), OUTSIDE),
        (add_tensor(weight("m", (4,), location="*/_ORT_MEM_ADDR_/*", offset="4096", length="16")), OUTSIDE),
        (forget("external_data"), OUTSIDE),
        (forget("data_location"), OUTSIDE),
        (change_weight(data_location=TensorProto.DEFAULT), OUTSIDE),
        # weights
        (add_tensor(weight("u", (3,))), "'u' is not in the model file"),
        (add_tensor(weight("w", (3, 4))), "the same name"),
        (add_tensor(TensorProto(name="w", dims=[1], data_type=1, raw_data=bytes(4))), "the same name"),
        (change_weight(data_type=TensorProto.INT64), r"'w' is \(3, 4\)"),
        (change_weight(data_type=TensorProto.BFLOAT16), r"'w' is \(3, 4\)"),
        (lambda model: model.graph.initializer[0].dims.append(1), r"expects \[3, 4, 1\]"),
        # constants
        (add_tensor(TensorProto(name="c", dims=[MAX_CONSTANT + 1], data_type=1)), "'c' has more than 65,536"),
        (add_tensor(TensorProto(name="c", dims=[1 << 62, 1 << 62], data_type=1)), "'c' has more than 65,536"),
        (add_tensor(TensorProto(name="c", dims=[-1], data_type=1)), "'c' has more than 65,536"),
        (add_tensor(TensorProto(name="c", dims=[1], data_type=8, string_data=[b"s"])), "field 6 of initializer"),
        (add_tensor(TensorProto(name="c", dims=[1], segment=TensorProto.Segment(begin=0))), "field 3 of init"),
    ],
)
def test_invalid_graphs_are_refused(change, message):
    model = build()
    change(model)
    with pytest.raises(GraphError, match=message):
        check_graph(model.SerializeToString(), SHAPES)


def varint(number):
    data = bytearray()
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes([*data, number])


def field(number, wire, value):
    return varint(number << 3 | wire) + (varint(len(value)) + value if wire == 2 else value)


def in_graph(data):
    return build().SerializeToString() + field(7, 2, data)


def in_tensor(data):
    """Return a model whose only tensor is the weight `w`, with more fields."""
    tensor = build().graph.initializer[0].SerializeToString() + data
    return field(7, 2, field(5, 2, tensor))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        # protobuf merges a message that comes twice, and takes the last of numbers and strings
        (in_graph(b""), "the model has a duplicate graph"),
        (in_tensor(field(2, 0, varint(7))), "initializer has a duplicate data_type"),
        (in_tensor(field(8, 2, b"v")), "initializer has a duplicate name"),
        (in_tensor(field(14, 0, varint(0))), "initializer has a duplicate data_location"),
        (in_tensor(field(1, 0, varint(3))), r"expects \[3, 4, 3\]"),
        (in_tensor(field(1, 2, varint(3) + varint(5))), r"expects \[3, 4, 3, 5\]"),  # packed
        # protobuf skips fields of another wire type
        (in_tensor(field(1, 1, bytes(8))), "wire type 1"),
        (in_tensor(field(13, 0, varint(1))), "external_data of initializer has the wire type 0"),
        (field(7, 0, varint(1)), "graph of the model has the wire type 0"),
        (field(7, 5, bytes(4)), "graph of the model has the wire type 5"),
        (field(7, 3, b"") + field(7, 4, b""), "wire type 3"),
        (field(7, 6, b""), "wire type 6"),
        (field(7, 7, b""), "wire type 7"),
        # it keeps 32 bits of a field's key
        (varint(1 << 32 | 7 << 3 | 2) + varint(0), "field 536870919 of the model"),
        (field(0, 0, varint(0)), "field 0 of the model"),
        (varint(7 << 3 | 2) + varint(1 << 63), "truncated field"),
        (varint(7 << 3 | 2) + b"\x80" * 11, "truncated integer"),
        (b"\x80", "truncated integer"),
    ],
)
def test_ambiguous_encodings_are_refused(data, message):
    with pytest.raises(GraphError, match=message):
        check_graph(data, SHAPES)


def test_overlong_varints_are_read():
    data = build().SerializeToString()
    assert data[:2] == b"\x08\x0a"  # ir_version: 10
    longer = b"\x88\x80\x00\x8a\x80\x80\x00" + data[2:]
    assert onnx.ModelProto.FromString(longer) == build()
    assert check_graph(longer, SHAPES) == ("w", "v")


def test_a_truncated_graph_is_an_error_or_a_smaller_graph():
    data = build().SerializeToString()
    refused = 0
    for size in range(len(data)):
        try:
            check_graph(data[:size], SHAPES)
        except GraphError:
            refused += 1
    assert refused > 0.9 * len(data)


HARMLESS = set(
    """
    ir_version producer_name producer_version opset_import domain version graph name node input output op_type
    attribute type f i s ints initializer dims data_type data_location external_data key value raw_data tensor_type
    elem_type shape dim dim_value dim_param metadata_props
    """.split()  # noqa: SIM905
)
"""Fields that cannot name other files, code or memory, or are checked below."""


def walk(message):
    """Yield the name of every field that protobuf found in a message."""
    for descriptor, value in message.ListFields():
        yield descriptor.name
        if descriptor.message_type is not None:
            for item in [value] if hasattr(value, "ListFields") else value:
                yield from walk(item)


ORIGINAL = build().SerializeToString()


def test_graphs_with_changed_bytes_that_are_accepted_are_harmless_as_protobuf_reads_them():
    """Protobuf, which ONNX Runtime uses, finds nothing else in them."""
    accepted = 0

    @settings(max_examples=1500, derandomize=True, deadline=None, database=None)
    @given(st.lists(st.tuples(st.integers(0, len(ORIGINAL) - 1), st.integers(0, 255)), min_size=1, max_size=2))
    def check(changes):
        nonlocal accepted
        data = bytearray(ORIGINAL)
        for index, value in changes:
            data[index] = value
        try:
            check_graph(bytes(data), SHAPES)
            model = onnx.ModelProto.FromString(bytes(data))
        except (GraphError, DecodeError):
            return
        accepted += 1
        assert set(walk(model)) <= HARMLESS
        assert all(node.op_type in OPERATORS and node.domain == "" for node in model.graph.node)
        assert all(opset.domain == "" for opset in model.opset_import)
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
                assert tuple(tensor.dims) == SHAPES[tensor.name]
                assert [(entry.key, entry.value) for entry in tensor.external_data] == [("location", WEIGHTS)]

    check()
    assert accepted > 100
