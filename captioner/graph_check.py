"""Validate the ONNX graphs of a model file before ONNX Runtime reads them: known operators, no external references.

A graph is a protocol buffer (onnx.proto). ONNX Runtime supports all of that format: references to files and memory,
functions, subgraphs, operators of other libraries. This module accepts only the fields of exported graphs, with the
wire type and multiplicity of the format, and refuses all others. So protobuf cannot interpret a graph differently,
for instance by merging two parts of a message.

https://protobuf.dev/programming-guides/encoding
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

WEIGHTS = "weights"
"""Location of the weights of a graph: the tensors of the model file."""

MAX_CONSTANT = 1 << 16
"""Maximum number of elements of a constant in the graph."""

IMAGE, ROW, NEXT = "image.", "row.", "next."
"""Prefixes of the names of tensors: of images, of rows, and of rows after the step."""

MAX_NODES = 10_000
"""Maximum number of nodes of a graph. ONNX Runtime needs kilobytes for each."""

OWN_OPERATORS = frozenset(
    """
    Add ArgMax AveragePool BatchNormalization Cast Clip Concat ConstantOfShape Conv Cos CumSum Div Expand Floor
    Gather GatherND Gelu HardSigmoid HardSwish Identity InstanceNormalization IsNaN LayerNormalization
    LessOrEqual LogSoftmax MatMul MaxPool Mod Mul Pow Range ReduceMax ReduceMean ReduceSum Relu Reshape Round
    ScatterElements Shape Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Tanh TopK Transpose Unsqueeze Where
    """.split()  # noqa: SIM905 (shorter than a list)
)
"""Operators of the networks of this package."""

FURTHER_OPERATORS = frozenset(
    """
    Abs And Equal Exp Greater GreaterOrEqual Less Log Max Min Neg Not Or Reciprocal ReduceL2 ReduceMin Sign Softplus
    """.split()  # noqa: SIM905
)
"""Further operators for custom mechanisms: elementwise or along an axis, as `Add` and `ReduceSum`, with outputs of
the same size."""

OPERATORS = OWN_OPERATORS | FURTHER_OPERATORS
"""Allowed operators: of the standard domain, without subgraphs."""

FLOAT32 = 1
"""`TensorProto.DataType.FLOAT`."""

EXTERNAL = 1
"""`TensorProto.DataLocation.EXTERNAL`."""

# Messages of onnx.proto: name and type of each accepted field by its number. A list is a repeated field, a
# dictionary a message.
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
    """A damaged graph, or one that is not allowed."""


def check_graph(data: bytes, weights: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Return the names of the weights that a graph, a serialised `ModelProto`, uses, checked against their shapes.

    Raises:
        GraphError: if it is damaged or not allowed.
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
    """Check the number of outputs of a Split: if it is wrong, ONNX Runtime 1.32 aborts the process."""
    outputs = len(node.get("output", []))
    for attribute in node.get("attribute", []):
        if _text(attribute, "name") == "num_outputs" and attribute.get("i") != outputs:
            raise GraphError(f"a Split with {outputs} outputs declares {attribute.get('i')}")


def _check_size(constant: dict[str, Any]) -> None:
    dims = constant.get("dims", [])
    if any(size < 0 for size in dims) or math.prod(dims) > MAX_CONSTANT:
        raise GraphError(f"the constant {_text(constant, 'name')!r} has more than {MAX_CONSTANT:,} elements")


def _check_weight(tensor: dict[str, Any], weights: Mapping[str, tuple[int, ...]]) -> str:
    """Check a tensor whose values are in the model file, and return its name."""
    name = _text(tensor, "name")
    source = [(_text(entry, "key"), _text(entry, "value")) for entry in tensor.get("external_data", [])]
    if source != [("location", WEIGHTS)] or tensor.get("data_location") != EXTERNAL:
        raise GraphError(f"the tensor {name!r} refers to an external file")
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
    """Return the fields of a message by name, which are in the schema, of its wire type, and not duplicates."""
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
            raise GraphError(f"it is damaged: {where} has a duplicate {name}")
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
            raise GraphError(f"it is damaged, or has the unsupported wire type {wire}")
        size, at = _varint(data, at) if wire == 2 else (4, at)
        if at + size > len(data):
            raise GraphError("it is damaged: truncated field")
        yield key >> 3, wire, data[at : at + size]
        at += size


def _integers(data: bytes) -> Iterator[int]:
    """Yield the integers of a packed field."""
    at = 0
    while at < len(data):
        number, at = _varint(data, at)
        yield number - ((number >> 63) << 64)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the unsigned varint at a position, and the next position."""
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
    raise GraphError("it is damaged: truncated integer")
