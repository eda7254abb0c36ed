"""Checks of an ONNX graph from a model file, before ONNX Runtime reads it: only known operators, nothing outside.

A graph is a protocol buffer (onnx.proto). ONNX Runtime reads all of that format: references to other files and to
memory, functions, subgraphs, operators of other libraries. This accepts the few fields that exported graphs have,
each at most as often as the format says and in its wire type, and refuses every other field. So there is nothing
that protobuf could understand in another way, such as two halves of a message that it would merge.

https://protobuf.dev/programming-guides/encoding
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

WEIGHTS = "weights"
"""The location that weights of a graph name: the tensors of the model file."""

MAX_CONSTANT = 1 << 16
"""Maximum number of elements of a tensor whose values are in the graph itself."""

IMAGE, ROW, NEXT = "image.", "row.", "next."
"""Prefixes of the names of a graph's tensors: of images, of rows, and of rows after the step."""

MAX_NODES = 10_000
"""Maximum number of nodes of a graph. ONNX Runtime spends kilobytes on each."""

OWN_OPERATORS = frozenset(
    """
    Add ArgMax AveragePool BatchNormalization Cast Clip Concat ConstantOfShape Conv Cos CumSum Div Expand Floor
    Gather GatherND Gelu HardSigmoid HardSwish Identity InstanceNormalization IsNaN LayerNormalization
    LessOrEqual LogSoftmax MatMul MaxPool Mod Mul Pow Range ReduceMax ReduceMean ReduceSum Relu Reshape Round
    ScatterElements Shape Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Tanh TopK Transpose Unsqueeze Where
    """.split()  # noqa: SIM905 (a list would take a line an operator)
)
"""Operators of the networks of this package."""

FURTHER_OPERATORS = frozenset(
    """
    Abs And Equal Exp Greater GreaterOrEqual Less Log Max Min Neg Not Or Reciprocal ReduceL2 ReduceMin Sign Softplus
    """.split()  # noqa: SIM905
)
"""Further operators, for mechanisms outside of this package: of each element or along an axis, as `Add` and
`ReduceSum` are, with outputs no larger than theirs."""

OPERATORS = OWN_OPERATORS | FURTHER_OPERATORS
"""Operators that graphs may use: of the standard domain, without subgraphs."""

FLOAT32 = 1
"""`TensorProto.DataType.FLOAT`."""

EXTERNAL = 1
"""`TensorProto.DataLocation.EXTERNAL`."""

# Messages of onnx.proto: name and type of each accepted field by its number. A list is a repeated field, and a
# dictionary is a message.
_INTEGER, _BYTES, _FLOAT = "integer", "bytes", "float"
_ENTRY = {1: ("key", _BYTES), 2: ("value", _BYTES)}
_CONSTANT = {1: ("dims", [_INTEGER]), 2: ("data_type", _INTEGER), 8: ("name", _BYTES), 9: ("raw_data", _BYTES)}
_INITIALIZER = {**_CONSTANT, 13: ("external_data", [_ENTRY]), 14: ("data_location", _INTEGER)}
_ATTRIBUTE = {
    1: ("name", _BYTES),
    2: ("f", _FLOAT),
    3: ("i", _INTEGER),
    4: ("s", _BYTES),
    5: ("t", _CONSTANT),
    8: ("ints", [_INTEGER]),
    20: ("type", _INTEGER),
}
_NODE = {
    1: ("input", [_BYTES]),
    2: ("output", [_BYTES]),
    3: ("name", _BYTES),
    4: ("op_type", _BYTES),
    5: ("attribute", [_ATTRIBUTE]),
    7: ("domain", _BYTES),
}
_DIMENSION = {1: ("dim_value", _INTEGER), 2: ("dim_param", _BYTES)}
_TENSOR_TYPE = {1: ("elem_type", _INTEGER), 2: ("shape", {1: ("dim", [_DIMENSION])})}
_VALUE = {1: ("name", _BYTES), 2: ("type", {1: ("tensor_type", _TENSOR_TYPE)}), 4: ("metadata_props", [_ENTRY])}
_GRAPH = {
    1: ("node", [_NODE]),
    2: ("name", _BYTES),
    5: ("initializer", [_INITIALIZER]),
    11: ("input", [_VALUE]),
    12: ("output", [_VALUE]),
}
_MODEL = {
    1: ("ir_version", _INTEGER),
    2: ("producer_name", _BYTES),
    3: ("producer_version", _BYTES),
    7: ("graph", _GRAPH),
    8: ("opset_import", [{1: ("domain", _BYTES), 2: ("version", _INTEGER)}]),
}


class GraphError(ValueError):
    """A graph that is damaged, or that holds what no exported graph does."""


def check_graph(data: bytes, weights: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Return the names of the weights that a graph uses.

    Args:
        data: a serialised `ModelProto`.
        weights: shape of each tensor that it may use, by name.

    Raises:
        GraphError: if it is not such a protocol buffer, or must not be run.
    """
    model = _parse(data, _MODEL, "the model")
    graph = model.get("graph", {})
    for opset in model.get("opset_import", []):
        _check_domain(opset)
    nodes = graph.get("node", [])
    if len(nodes) > MAX_NODES:
        raise GraphError(f"expected at most {MAX_NODES:,} nodes, got {len(nodes):,}")
    for node in nodes:
        _check_domain(node)
        if (operator := _text(node, "op_type")) not in OPERATORS:
            raise GraphError(f"the operator {operator!r} is not allowed")
        if operator == "Split":
            _check_split(node)
        for attribute in node.get("attribute", []):
            _check_size(attribute.get("t", {}))
    initializers = graph.get("initializer", [])
    if len({tensor.get("name") for tensor in initializers}) < len(initializers):
        raise GraphError("several initializers have the same name")
    used = []
    for tensor in initializers:
        if "external_data" in tensor or "data_location" in tensor:
            used.append(_check_weight(tensor, weights))
        else:
            _check_size(tensor)
    return tuple(used)


def _check_domain(message: dict[str, Any]) -> None:
    if domain := _text(message, "domain"):
        raise GraphError(f"operators of the domain {domain!r} are not allowed, only those of ONNX itself")


def _check_split(node: dict[str, Any]) -> None:
    """Check that a Split has as many outputs as it says: if not, ONNX Runtime 1.32 ends the process."""
    outputs = len(node.get("output", []))
    for attribute in node.get("attribute", []):
        if _text(attribute, "name") == "num_outputs" and attribute.get("i") != outputs:
            raise GraphError(f"a Split with {outputs} outputs says that it has {attribute.get('i')}")


def _check_size(constant: dict[str, Any]) -> None:
    dims = constant.get("dims", [])
    if any(size < 0 for size in dims) or math.prod(dims) > MAX_CONSTANT:
        raise GraphError(f"the constant {_text(constant, 'name')!r} has more than {MAX_CONSTANT:,} elements")


def _check_weight(tensor: dict[str, Any], weights: Mapping[str, tuple[int, ...]]) -> str:
    """Return the name of a tensor whose values are in the model file."""
    name = _text(tensor, "name")
    source = [(_text(entry, "key"), _text(entry, "value")) for entry in tensor.get("external_data", [])]
    if source != [("location", WEIGHTS)] or tensor.get("data_location") != EXTERNAL:
        raise GraphError(f"the tensor {name!r} refers to a file outside of the model file")
    shape = weights.get(name)
    if shape is None:
        raise GraphError(f"the weight {name!r} is not in the model file, or not of type F16, F32 or F64")
    if tensor.get("data_type") != FLOAT32 or tuple(tensor.get("dims", [])) != shape:
        raise GraphError(f"the weight {name!r} is {shape}, and the graph expects {tensor.get('dims', [])[:8]}")
    return name


def _text(message: dict[str, Any], name: str) -> str:
    value: bytes = message.get(name, b"")
    return value[:200].decode("utf-8", "replace")


def _parse(data: bytes, schema: Mapping[int, tuple[str, Any]], where: str) -> dict[str, Any]:
    """Return the fields of a message by name; those that it lacks are left out.

    Raises:
        GraphError: if there is a field that the schema lacks, one of another wire type, or one too often.
    """
    message: dict[str, Any] = {}
    for number, wire, value in _fields(data):
        if number not in schema:
            raise GraphError(f"the field {number} of {where} is not allowed")
        name, kind = schema[number]
        is_repeated = isinstance(kind, list)
        if is_repeated:
            (kind,) = kind
            if kind == _INTEGER and wire == 2:  # packed
                message.setdefault(name, []).extend(_integers(value))
                continue
        if wire != (0 if kind == _INTEGER else 5 if kind == _FLOAT else 2):
            raise GraphError(f"it is damaged: {name} of {where} has the wire type {wire}")
        if isinstance(kind, dict):
            value = _parse(value, kind, name)
        elif kind == _INTEGER:
            value -= (value >> 63) << 64
        if is_repeated:
            message.setdefault(name, []).append(value)
        elif name in message:
            raise GraphError(f"it is damaged: {where} has {name} twice")
        else:
            message[name] = value
    return message


def _fields(data: bytes) -> Iterator[tuple[int, int, Any]]:
    """Yield number, wire type and value of each field of a message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, wire, value
            continue
        if wire not in (2, 5):
            raise GraphError(f"it is damaged, or has the wire type {wire}, which no field of a graph has")
        size, at = _varint(data, at) if wire == 2 else (4, at)
        if at + size > len(data):
            raise GraphError("it is damaged: it ends within a field")
        yield key >> 3, wire, data[at : at + size]
        at += size


def _integers(data: bytes) -> Iterator[int]:
    """Yield the numbers of a packed field."""
    at = 0
    while at < len(data):
        number, at = _varint(data, at)
        yield number - ((number >> 63) << 64)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins at a byte, unsigned, and where the next begins."""
    if at < len(data) and data[at] < 128:
        return data[at], at + 1
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, at
    raise GraphError("it is damaged: a number does not end")
