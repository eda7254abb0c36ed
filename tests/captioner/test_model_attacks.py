"""Damaged and malicious model files: each costs one clear error, and neither memory, time nor the process."""

import hashlib
import itertools
import json
import os
import random
import re
import select
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import helper

from captioner.captioning import load
from captioner.errors import CheckpointError
from captioner.graph_check import OPERATORS
from captioner.model_file import KEY
from captioner.settings import WIDEST

ENGINES = ("onnx", "torch")

MEMORY = 1 << 28
"""Limit of ONNX Runtime's intermediate results in `VICTIM`, in bytes."""

VICTIM = f"""
import json, resource, sys, time, traceback
import numpy as np
from captioner import CaptionerError, onnx
from captioner.captioning import load

onnx.MAX_MEMORY = {MEMORY}
picture = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)

def caption(path):
    load(path, device="cpu", engine=sys.argv[1], threads=1).caption(picture)

caption(sys.argv[2])  # imports everything, so that memory grows no more
for line in sys.stdin:
    memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    kind = message = ""
    try:
        caption(line.strip())
    except CaptionerError as error:
        kind, message = type(error).__name__, str(error)
    except BaseException as error:
        kind, message = "traceback", traceback.format_exc()
    seconds = time.process_time() - started
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    print(json.dumps([kind, message, seconds, megabytes]), flush=True)
"""


class Victim:
    """A process that loads model files and captions a small picture with each; after a crash, a new process."""

    def __init__(self, engine, intact, folder):
        self._command = [sys.executable, "-W", "error", "-c", VICTIM, engine, str(intact)]
        self._stderr = (folder / f"stderr-{engine}").open("w+")
        self._start()

    def _start(self):
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True
        )

    def load(self, path):
        """Return the kind of error and its message, empty for none, the seconds and the megabytes that it took."""
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], 120)
        answer = self._process.stdout.readline() if ready else ""
        if answer:
            return json.loads(answer)
        self._process.kill()
        status = self._process.wait()
        self._start()
        return ("crash" if ready else "hang"), f"status {status}: {self.printed()}", 0, 0

    def printed(self):
        """Return what the process printed beside its answers."""
        self._stderr.seek(0)
        return self._stderr.read()

    def end(self):
        self._process.kill()
        self._process.communicate()
        self._stderr.close()


@pytest.fixture(scope="module")
def victims(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("victims")
    victims = {engine: Victim(engine, tiny_checkpoint, folder) for engine in ENGINES}
    yield victims
    for victim in victims.values():
        victim.end()


class Parts:
    """A model file taken apart."""

    def __init__(self, data):
        size = 8 + int.from_bytes(data[:8], "little")
        self.data = data
        self.tensors = json.loads(data[8:size])
        self.header = json.loads(self.tensors.pop("__metadata__")[KEY])
        for tensor in self.tensors.values():
            begin, end = tensor.pop("data_offsets")
            tensor["values"] = data[size + begin : size + end]

    def pack(self, header=None):
        """Return the file put together again, with another text for a header."""
        values, tensors = b"", {"__metadata__": {KEY: json.dumps(self.header) if header is None else header}}
        for name, tensor in self.tensors.items():
            offsets = tensor.get("data_offsets", [len(values), len(values) + len(tensor["values"])])
            tensors[name] = {"dtype": tensor["dtype"], "shape": tensor["shape"], "data_offsets": offsets}
            values += tensor["values"]
        text = json.dumps(tensors).encode()
        return len(text).to_bytes(8, "little") + text + values

    def replace_graph(self, name, data):
        """Replace a graph and its checksum."""
        self.tensors[f"graph.{name}"] |= {"values": data, "shape": [len(data)]}
        self.header["graphs"][name] = hashlib.sha256(data).hexdigest()

    def change_graph(self, change, name="start"):
        model = onnx.load_from_string(self.tensors[f"graph.{name}"]["values"])
        change(model.graph)
        self.replace_graph(name, model.SerializeToString())


def replace_bytes(change):
    return lambda parts: change(parts.data)


def header_text(change):
    """Change the text of the header."""
    return lambda parts: parts.pack(change(json.dumps(parts.header)))


def header(**values):
    """Replace values of the header, `a__b` for `b` in `a`."""

    def change(parts):
        for path, value in values.items():
            *tables, name = path.split("__")
            table = parts.header
            for part in tables:
                table = table[part]
            table[name] = value
        return parts.pack()

    return change


def tensor(name, **values):
    def change(parts):
        parts.tensors[name] |= values
        return parts.pack()

    return change


def graph(change):
    def attack(parts):
        parts.change_graph(change)
        return parts.pack()

    return attack


def graph_bytes(data):
    def change(parts):
        parts.replace_graph("start", data)
        return parts.pack()

    return change


def fold(convolution, norm):
    return header(graphs__folds=[{"convolution": convolution, "norm": norm, "epsilon": 1e-5}])


def overlap(parts):
    first, second = list(parts.tensors.values())[:2]
    second |= {"data_offsets": [0, len(first["values"])], "shape": first["shape"], "dtype": first["dtype"]}
    return parts.pack()


def amplify(nodes, **constants):
    """Return an attack by nodes that make a tensor "big", whose sum is added to a state."""

    def change(graph):
        old = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
        state = next(node for node in old if node.output[0].startswith("row."))
        state.op_type = "Add"
        state.input.append("sum")
        del graph.node[:]
        graph.node.extend([*nodes, helper.make_node("ReduceSum", ["big"], ["sum"], keepdims=0), *old])
        for name, values in constants.items():
            raw = np.array(values)
            kind = helper.np_dtype_to_tensor_dtype(raw.dtype)
            graph.initializer.add(name=name, dims=raw.shape, data_type=kind, raw_data=raw.tobytes())

    return graph(change)


def double(graph_input, times):
    names = [graph_input, *(f"double{number}" for number in range(times - 1)), "big"]
    return [
        helper.make_node("Concat", [before, before], [after], axis=0) for before, after in itertools.pairwise(names)
    ]


def empty_constant(graph):
    next(tensor for tensor in graph.initializer if tensor.raw_data).ClearField("raw_data")


def repeat_state(graph):
    state = next(node for node in graph.node if node.output[0].startswith("row."))
    state.CopyFrom(helper.make_node("Concat", [state.input[0]] * 2, state.output, axis=1))


NESTED = "[" * 100_000
DIGITS = "9" * 5000
HUGE = 10**15

ATTACKS = {
    # the file
    "header of 2 GB": (
        replace_bytes(lambda data: (2 << 30).to_bytes(8, "little") + data[8:]),
        "2,147,483,648 bytes",
    ),
    "header of 2^64 bytes": (replace_bytes(lambda data: b"\xff" * 8 + data[8:]), "header of"),
    "no header": (replace_bytes(lambda data: bytes(8) + data[8:]), "damaged"),
    "nested": (replace_bytes(lambda data: len(NESTED).to_bytes(8, "little") + NESTED.encode()), "damaged"),
    "digits": (replace_bytes(lambda data: len(DIGITS).to_bytes(8, "little") + DIGITS.encode()), "damaged"),
    "overlapping tensors": (overlap, "damaged"),
    "tensor beyond the end": (tensor("decoder.gate.bias", data_offsets=[0, 1 << 40], shape=[1 << 38]), "damaged"),
    "tensor of negative size": (tensor("decoder.gate.bias", shape=[-1]), "damaged"),
    "shape that overflows": (tensor("decoder.gate.bias", shape=[1 << 63, 1 << 63]), "damaged"),
    "unknown type": (tensor("decoder.gate.bias", dtype="F31"), "damaged"),
    "trailing bytes": (replace_bytes(lambda data: data + bytes(100)), "damaged"),
    # the header of the captioner
    "header that is nested": (header_text(lambda text: NESTED), "header cannot be read"),
    "header with a nested value": (
        header_text(lambda text: text.replace('"card": {', '"card": {"deep": ' + NESTED + "]" * 100_000 + ", ")),
        "header cannot be read",
    ),
    "header with long digits": (
        header_text(lambda text: text.replace('"size": 64', f'"size": {DIGITS}')),
        "header",
    ),
    "header that is a list": (header_text(lambda text: "[]"), "header cannot be read"),
    "header that is empty": (header_text(lambda text: ""), "header cannot be read"),
    "old header with a card that is text": (header(format=1, card="text"), "header cannot be read"),
    "format 0": (header(format=0), "header cannot be read"),
    "format of a million": (header(format=10**6), "Upgrade: "),
    "100,000 unknown keys": (header(card={}, **{f"key{n}": n for n in range(100_000)}), "and 99999 more problems"),
    "100,000 words that are numbers": (header(words=list(range(100_000))), r"words\[0\].* more problems"),
    "words with line ends": (header(words=["<pad>", "<start>", "<end>", "<unk>", "a\nb"]), "control characters"),
    "words with surrogates": (header(words=["<pad>", "<start>", "<end>", "<unk>", "\ud800"]), "surrogates"),
    "long word": (header(words=["<pad>", "<start>", "<end>", "<unk>", "a" * 10**6]), "words|weights|graphs"),
    "huge hidden size": (header(model__decoder__hidden_size=HUGE), "decoder.hidden_size"),
    "huge attention": (header(model__attention__size=HUGE), "attention.size"),
    "huge number of layers": (header(model__decoder__layers=HUGE), "decoder.layers"),
    "huge grid": (header(model__encoder__grid=[HUGE, HUGE]), "encoder.grid"),
    "large grid": (header(model__encoder__grid=[1000, 1000]), "grid"),
    "huge images": (header(images__size=10**6), "images.size"),
    "infinite images": (header(images__std=[float("inf")] * 3), "images.std"),
    "huge beam": (header(search={"beam_size": 10**9}), "search.beam_size"),
}
"""What both engines refuse: changes of an intact file, and what the message says."""

TORCH_ATTACKS = {
    "largest network": (
        header(
            model__decoder__hidden_size=WIDEST,
            model__decoder__embedding_size=WIDEST,
            model__decoder__layers=100,
            model__attention__size=WIDEST,
        ),
        "its weights do not match its header",
    ),
    "largest transformer": (
        header(
            model__decoder={"kind": "transformer", "hidden_size": WIDEST, "layers": 100},
            model__attention={"kind": "multi_head", "size": WIDEST},
        ),
        "its weights do not match its header",
    ),
    "missing weight": (lambda parts: (parts.tensors.pop("decoder.gate.bias"), parts.pack())[1], "is missing"),
    "weight of whole numbers": (tensor("decoder.gate.bias", dtype="I32"), "must be float"),
    "weight of another shape": (tensor("decoder.gate.bias", shape=[1, 1]), r"must be float \(1,\)"),
}
"""What PyTorch refuses, which looks at all weights and at no graph."""

ONNX_ATTACKS = {
    # the graphs as tensors
    "checksum": (tensor("graph.start", values=bytes(64), shape=[64]), "checksum mismatch of the graph 'start'"),
    "missing graph": (lambda parts: (parts.tensors.pop("graph.step"), parts.pack())[1], "'step' is missing"),
    "graph with two axes": (tensor("graph.step", shape=[1, 64], values=bytes(64)), "not a list of at most"),
    "graph of floats": (tensor("graph.step", dtype="F32", shape=[16], values=bytes(64)), "not a list of at most"),
    "long graph": (graph_bytes(bytes(3 << 20)), "not a list of at most"),
    "empty graph": (graph_bytes(b""), "graphs cannot be used"),
    "no protocol buffer": (graph_bytes(b"\x7fELF" * 20), "graphs cannot be used"),
    # weights and batch norms
    "weight of whole numbers": (tensor("decoder.gate.bias", dtype="I32"), "'decoder.gate.bias' is not in"),
    "weight of two bytes": (
        tensor("decoder.gate.bias", dtype="BF16", shape=[2]),
        "'decoder.gate.bias' is not in the model file, or not of type F16, F32 or F64",
    ),
    "weight of another shape": (tensor("decoder.gate.bias", shape=[1, 1]), r"is \(1, 1\), and the graph expects"),
    "fold without a convolution": (fold("nowhere", "encoder.features.1.1"), "nowhere cannot be folded"),
    "fold without a norm": (fold("encoder.features.1.0", "nowhere"), "expected nowhere.weight of"),
    "fold of another shape": (fold("encoder.features.1.0", "encoder.features.2.1"), "cannot be folded"),
    "fold of a matrix": (fold("decoder.gate", "encoder.features.1.1"), "expected a 4-dimensional weight"),
    # graphs with what none of ours has; tests/captioner/test_graph_check.py has more
    "control flow": (graph(lambda graph: setattr(graph.node[0], "op_type", "Loop")), "'Loop' is not allowed"),
    "weights of another file": (
        graph(lambda graph: setattr(graph.initializer[0].external_data[0], "value", "/etc/passwd")),
        "refers to an external file",
    ),
    "constant without values": (graph(empty_constant), "ONNX Runtime refuses the graph"),
    "input of others": (graph(lambda graph: graph.input.add(name="more")), "graphs cannot be used"),
    "output of others": (graph(lambda graph: setattr(graph.output[0], "name", "x")), "graphs cannot be used"),
    "states of two rows": (graph(repeat_state), "its graph returned row"),
    # memory
    "constant shape": (
        amplify([helper.make_node("ConstantOfShape", ["shape"], ["big"])], shape=[1 << 18, 1 << 18]),
        "cannot run the graph",
    ),
    "computed shape": (
        amplify(
            [
                helper.make_node("Shape", ["pixels"], ["size"]),
                helper.make_node("Mul", ["size", "factor"], ["large"]),
                helper.make_node("Expand", ["zero", "large"], ["big"]),
            ],
            factor=[1 << 10, 1 << 4, 1 << 4, 1 << 4],
            zero=np.zeros(1, np.float32),
        ),
        "cannot run the graph",
    ),
    "range": (
        amplify(
            [helper.make_node("Range", ["low", "high", "by"], ["big"])],
            low=np.float32(0),
            high=np.float32(1e10),
            by=np.float32(1),
        ),
        "cannot run the graph",
    ),
    "broadcast": (
        amplify(
            [helper.make_node("Add", ["column", "line"], ["big"])],
            column=np.zeros((20_000, 1), np.float32),
            line=np.zeros(20_000, np.float32),
        ),
        "cannot run the graph",
    ),
    "doubled constants": (amplify(double("line", 20), line=np.zeros(1000, np.float32)), "cannot run the graph"),
    "doubled inputs": (amplify(double("pixels", 20)), "cannot run the graph"),
}
"""What ONNX Runtime, or the check before it, refuses."""

ALL = [
    *((engine, name, *attack) for engine in ENGINES for name, attack in ATTACKS.items()),
    *(("torch", name, *attack) for name, attack in TORCH_ATTACKS.items()),
    *(("onnx", name, *attack) for name, attack in ONNX_ATTACKS.items()),
]


@pytest.fixture(scope="module")
def intact(tiny_checkpoint):
    return tiny_checkpoint.read_bytes()


@pytest.mark.parametrize(
    ("engine", "name", "attack", "message"), ALL, ids=[f"{engine}-{name}" for engine, name, *_ in ALL]
)
def test_a_malicious_file_raises_one_error(engine, name, attack, message, victims, intact, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(attack(Parts(intact)))
    kind, said, seconds, megabytes = victims[engine].load(path)
    assert kind == "CheckpointError", said
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    assert len(said) < 1000
    assert re.search(message, said), said
    assert seconds < 10
    assert megabytes < 200 + MEMORY / 2**20 * ("ONNX Runtime cannot run" in said)
    assert victims[engine].printed() == ""


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rebuilt_file_is_valid(engine, victims, intact, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(Parts(intact).pack())
    kind, said, *_ = victims[engine].load(path)
    assert (kind, said) == ("", "")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_huge_header_needs_no_memory(engine, victims, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((2 << 30).to_bytes(8, "little"))
    os.truncate(path, 3 << 30)  # a sparse file
    kind, said, _, megabytes = victims[engine].load(path)
    assert kind == "CheckpointError"
    assert "header of 2,147,483,648 bytes" in said
    assert megabytes < 50


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_truncated_at_any_boundary_is_refused(engine, intact, tmp_path):
    start = 8 + int.from_bytes(intact[:8], "little")
    tables = json.loads(intact[8:start])
    ends = {start + end for name in tables if name != "__metadata__" for end in tables[name]["data_offsets"]}
    assert len(intact) in ends
    path = tmp_path / "model.safetensors"
    for boundary in {0, 1, 8, *ends}:
        for size in {max(0, boundary - 1), boundary, boundary + 1} - {*range(len(intact), len(intact) + 2)}:
            path.write_bytes(intact[:size])
            with pytest.raises(
                CheckpointError, match=r"model\.safetensors: .* Check that it was copied or downloaded completely"
            ):
                load(path, device="cpu", engine=engine)


@pytest.mark.parametrize("name", ["header of 2 GB", "header that is nested", "checksum", "control flow"])
def test_the_command_reports_a_malicious_file_in_one_line(name, run, intact, pictures, tmp_path):
    path = tmp_path / "model.safetensors"
    attack, message = (ATTACKS | ONNX_ATTACKS)[name]
    path.write_bytes(attack(Parts(intact)))
    code, output, errors = run("-m", path, pictures[0])
    assert (code, output) == (2, "")
    assert errors.startswith("caption: ")
    assert errors.count("\n") == 1
    assert re.search(message, errors)


def test_a_graph_that_looks_like_the_other_format_of_onnx_runtime_is_read_as_onnx(intact, tiny, pictures, tmp_path):
    """Its files have the letters ORTM at the fifth byte. It is a flat buffer, which no check here reads."""
    parts = Parts(intact)
    data = parts.tensors["graph.start"]["values"]
    assert data[:2] == b"\x08\x0a"  # ir_version: 10
    model = onnx.load_from_string(data)
    model.producer_name = "ORTM"
    model.ClearField("producer_version")
    data = model.SerializeToString()
    assert data[4:8] == b"ORTM"
    parts.replace_graph("start", data)
    path = tmp_path / "model.safetensors"
    path.write_bytes(parts.pack())
    captioner = load(path, device="cpu", engine="onnx")
    assert captioner.caption(pictures[0]).text == tiny.caption(pictures[0]).text


# Random changes.

WEIRD = (None, True, False, -1, 0, 1, 2, 7, 1000, 2**31, 2**63, 10**30, -0.5, 1e308, "", "x", "\n", [], {}, [1, 2])


def change_bytes(data, numbers):
    """Change, remove, insert or repeat bytes."""
    data = bytearray(data)
    at = numbers.randrange(len(data))
    size = numbers.choice((1, 2, 4, 8, 100, 1000))
    kind = numbers.choice((0, 0, 0, 1, 2, 3))
    if kind == 0:
        for _ in range(numbers.choice((1, 1, 4))):
            data[numbers.randrange(len(data))] = numbers.randrange(256)
    elif kind == 1:
        del data[at : at + size]
    elif kind == 2:
        data[at:at] = numbers.randbytes(size)
    else:
        data[at:at] = data[at : at + size]
    return bytes(data)


def change_file(parts, numbers):
    return change_bytes(parts.data, numbers)


def change_start_of_file(parts, numbers):
    size = 8 + int.from_bytes(parts.data[:8], "little")
    return change_bytes(parts.data[:size], numbers) + parts.data[size:]


def change_tensor(parts, numbers):
    """Change the type, shape or place of a tensor."""
    changed = numbers.choice(list(parts.tensors.values()))
    kind = numbers.choice(("dtype", "shape", "data_offsets", "values"))
    if kind == "dtype":
        changed["dtype"] = numbers.choice(("F16", "BF16", "F32", "F64", "I64", "I8", "U8", "BOOL"))
    elif kind == "shape":
        changed["shape"] = numbers.choice(([], [0], [1], [1 << 40], changed["shape"][::-1], [*changed["shape"], 1]))
    elif kind == "data_offsets":
        changed["data_offsets"] = [numbers.randrange(10_000), numbers.randrange(10_000)]
    else:
        changed["values"] = numbers.randbytes(len(changed["values"]))  # also infinities and NaN
    return parts.pack()


def change_header(parts, numbers):
    """Replace a random value of the header."""
    table = parts.header
    while True:
        key = numbers.choice(range(len(table)) if isinstance(table, list) else list(table))
        if not (isinstance(table[key], (dict, list)) and table[key]) or numbers.random() < 0.1:
            break
        table = table[key]
    if isinstance(table, dict) and numbers.random() < 0.1:
        del table[key]
    else:
        table[key] = numbers.choice(WEIRD)
    return parts.pack()


def change_graph_bytes(parts, numbers):
    name = numbers.choice(("start", "step"))
    parts.replace_graph(name, change_bytes(parts.tensors[f"graph.{name}"]["values"], numbers))
    return parts.pack()


def change_graph(parts, numbers):
    """Change a node, a constant or a type of a graph, so that it is still a graph of allowed operators."""

    def change(graph):
        for _ in range(numbers.choice((1, 1, 1, 2, 4))):
            node = numbers.choice(graph.node)
            values = [name for other in graph.node for name in (*other.input, *other.output)]
            kind = numbers.randrange(7)
            if kind == 0:
                node.op_type = numbers.choice(sorted(OPERATORS))
            elif kind == 1 and node.input:
                node.input[numbers.randrange(len(node.input))] = numbers.choice(values)
            elif kind == 2 and node.attribute:
                attribute = numbers.choice(node.attribute)
                attribute.i = numbers.choice((-5, -1, 0, 1, 2, 3, 7, 1 << 40))
                attribute.ints[:] = [numbers.choice((-1, 0, 1, 2, 1 << 33)) for _ in attribute.ints]
            elif kind == 3:
                graph.node.remove(node)
            elif kind == 4:
                constant = numbers.choice([item for item in graph.initializer if item.raw_data])
                size = len(constant.raw_data) // 8
                raw = np.array([numbers.choice((-9, -1, 0, 1, 3, 1 << 20, 1 << 40)) for _ in range(size)]).tobytes()
                constant.raw_data = raw + constant.raw_data[len(raw) :]
            elif kind == 5:
                value = numbers.choice([*graph.input, *graph.output]).type.tensor_type
                value.elem_type = numbers.randrange(1, 17)
            else:
                value = numbers.choice([*graph.input, *graph.output]).type.tensor_type
                if value.shape.dim:
                    numbers.choice(value.shape.dim).dim_value = numbers.choice((0, 1, 3, 1 << 40))

    parts.change_graph(change, numbers.choice(("start", "step")))
    return parts.pack()


CHANGES = {
    change_file: ENGINES,
    change_start_of_file: ENGINES,
    change_tensor: ENGINES,
    change_header: ENGINES,
    change_graph_bytes: ["onnx"],
    change_graph: ["onnx"],
}


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_random_changes_of_a_model_file_raise_at_most_an_error(count, victims, intact, tmp_path):
    path = tmp_path / "model.safetensors"
    outcomes = Counter()
    for seed in range(count):
        numbers = random.Random(seed)
        change = list(CHANGES)[seed % len(CHANGES)]
        path.write_bytes(change(Parts(intact), numbers))
        engine = numbers.choice(CHANGES[change])
        kind, said, seconds, megabytes = victims[engine].load(path)
        where = f"seed {seed}, {change.__name__}, {engine}: {kind} {said}"
        assert kind in ("", "CheckpointError", "CaptionerError"), where
        assert "\n" not in said, where
        assert seconds < 10, where
        assert megabytes < 200 + MEMORY / 2**20, where
        outcomes[change.__name__, engine, kind or "caption"] += 1
    for (name, engine, kind), number in sorted(outcomes.items()):
        print(f"{name:22} {engine:6} {kind:16} {number:5}")
    assert {kind for _, _, kind in outcomes} >= {"caption", "CheckpointError"}
    assert all(victim.printed() == "" for victim in victims.values())
