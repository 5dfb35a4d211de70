"""What a bundle must know of an ONNX file before any engine sees it, read straight from the protobuf wire format.

The runtime has no `onnx` package, and a checker should not trust the parser it guards. This one knows only what can
name a tensor, a subgraph or a file, skips everything else unread, follows no pointer out of its message, and does not
recurse. Field numbers are those of onnx.proto (ONNX IR specification); the encoding is Protocol Buffers' wire format.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgekit.bundle.files import open_regular
from edgekit.errors import BadGraph

MAX_DEPTH = 100  # nested messages, protobuf's own limit
MAX_MESSAGES = 4_000_000  # nodes, attributes, tensors and subgraphs of one file

ELEMENT_TYPES = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string"}
ELEMENT_TYPES |= {9: "bool", 10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16"}

# message -> field -> the message it holds, for every way down to a tensor
NESTED = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Function": {7: "Node", 11: "Attribute"},
}
# Fields that may stand once. A parser would merge two of them, so a check of each by itself would prove nothing.
ONCE = {("Model", 7), ("Attribute", 5), ("Attribute", 6), ("Attribute", 22), ("SparseTensor", 1), ("SparseTensor", 2)}
ONCE |= {("TrainingInfo", 1), ("TrainingInfo", 2)}

Field = tuple[int, "int | memoryview"]


@dataclass(frozen=True, slots=True)
class GraphTensor:
    """One graph input or output. A dimension is a size, an axis name, or None (unnamed); shape None: any rank."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True, slots=True)
class ExternalData:
    """Where one tensor's bytes lie outside the graph file; `length` None: to the end of the file."""

    tensor: str
    location: str
    offset: int
    length: int | None


@dataclass(frozen=True, slots=True)
class GraphFile:
    """The signature of a graph, the operators it calls (`domain::Op`), and every byte it takes from elsewhere.

    `opsets` are the versions it imports, by domain, the standard one as `ai.onnx`.
    """

    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    operators: frozenset[str]
    external: tuple[ExternalData, ...]
    opsets: Mapping[str, int]


def read_graph(path: Path) -> GraphFile:
    """Read one ONNX file; tensors are passed over, so the cost is that of the nodes.

    Graph inputs that an initializer of the same name backs are not inputs: nobody has to feed them.

    Raises:
        BadGraph: truncated, malformed, nested too deeply, or with a tensor placed ambiguously.
        UnsafePath: not a regular file.
    """
    with open_regular(path) as file:
        if not file.seek(0, 2):
            raise BadGraph(f"{path.name} is empty, so it holds no graph. Export the model again.")
        model = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))  # unmapped with its last slice
    try:
        return _read_model(model)
    except _Malformed as why:
        raise BadGraph(f"{path.name}: {why}. Export the model again, or fetch the bundle anew.") from why


class _Malformed(Exception):
    """What is wrong, without the file's name."""


def _read_model(model: memoryview) -> GraphFile:
    operators: set[str] = set()
    external: list[ExternalData] = []
    for kind, message in _walk(model):
        if kind == "Node":
            operators.add(_operator(message))
        elif kind == "Tensor":
            external += _external_data(message)
    graph = _only(model, 7)
    if graph is None:
        raise _Malformed("it holds no graph")
    backed = {_text(tensor, 8) for tensor in _messages(graph, 5)}
    backed |= {_text(values, 8) for sparse in _messages(graph, 15) if (values := _only(sparse, 1)) is not None}
    inputs = [_tensor(info) for info in _messages(graph, 11)]
    outputs = tuple(_tensor(info) for info in _messages(graph, 12))
    free = tuple(tensor for tensor in inputs if tensor.name not in backed)
    for names in ([tensor.name for tensor in inputs], [tensor.name for tensor in outputs]):
        if len(set(names)) != len(names):
            raise _Malformed("two graph inputs or two outputs share a name")
    opsets = {_text(entry, 1) or "ai.onnx": _number(entry, 2) or 0 for entry in _messages(model, 8)}
    return GraphFile(free, outputs, frozenset(operators), tuple(external), opsets)


def _walk(model: memoryview) -> Iterator[tuple[str, memoryview]]:
    """Every message below the model that can hold a tensor, each once, without recursion."""
    pending = [("Model", model, 0)]
    count = 0
    while pending:
        kind, message, depth = pending.pop()
        yield kind, message
        children = NESTED.get(kind)
        if children is None:
            continue
        if depth >= MAX_DEPTH:
            raise _Malformed(f"messages nest more than {MAX_DEPTH} deep")
        once: set[int] = set()
        for field, value in _fields(message):
            if field not in children:
                continue
            if (kind, field) in ONCE and field in once:
                raise _Malformed(f"field {field} of {kind} stands twice")
            once.add(field)
            pending.append((children[field], _bytes(value), depth + 1))
            count += 1
            if count > MAX_MESSAGES:
                raise _Malformed(f"more than {MAX_MESSAGES:,} nodes, attributes and tensors")


def _fields(message: memoryview) -> Iterator[Field]:
    """Number and value of each field, in wire order; fixed-width values are passed over."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        field, wire = key >> 3, key & 7
        if not 1 <= field < 2**29:
            raise _Malformed(f"field number {field} does not exist")
        if wire == 0:
            value, at = _varint(message, at)
            yield field, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _Malformed(f"wire type {wire} is not used by ONNX")
        if size > len(message) - at:
            raise _Malformed(f"a field of {size:,} bytes where {len(message) - at:,} are left (truncated?)")
        if wire == 2:
            yield field, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """An unsigned base-128 number of at most ten bytes, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise _Malformed("it ends in the middle of a number (truncated?)")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    if byte >= 0x80 or value >= 2**64:
        raise _Malformed("a number is longer than 64 bits")
    return value, at


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise _Malformed("a number stands where a message or text belongs")
    return value


def _messages(message: memoryview, field: int) -> Iterator[memoryview]:
    return (_bytes(value) for number, value in _fields(message) if number == field)


def _only(message: memoryview, field: int) -> memoryview | None:
    """A field that may stand once, None where it does not."""
    found = list(_messages(message, field))
    if len(found) > 1:
        raise _Malformed(f"field {field} stands twice where one is allowed")
    return found[0] if found else None


def _text(message: memoryview, field: int) -> str:
    raw = _only(message, field)
    try:
        return "" if raw is None else str(raw, "utf-8")
    except UnicodeDecodeError:
        raise _Malformed("a name is not UTF-8") from None


def _number(message: memoryview, field: int) -> int | None:
    """A varint field; of several the last counts, as in every protobuf parser."""
    last = None
    for number, value in _fields(message):
        if number == field:
            if not isinstance(value, int):
                raise _Malformed("bytes stand where a number belongs")
            last = value
    return last


def _operator(node: memoryview) -> str:
    return f"{_text(node, 7) or 'ai.onnx'}::{_text(node, 4)}"


def _tensor(info: memoryview) -> GraphTensor:
    """A ValueInfoProto: name and, for dense tensors, element type and shape."""
    name = _text(info, 1)
    kind = _only(info, 2)
    dense = None if kind is None else _only(kind, 1)
    if dense is None:
        raise _Malformed(f"input or output {name!r} is not a dense tensor")
    element = _number(dense, 1) or 0
    dtype = ELEMENT_TYPES.get(element)
    if dtype is None:
        raise _Malformed(f"input or output {name!r} has element type {element}, which bundles do not carry")
    shape = _only(dense, 2)
    return GraphTensor(name, dtype, None if shape is None else tuple(_dim(dim) for dim in _messages(shape, 1)))


def _dim(dim: memoryview) -> int | str | None:
    size = _number(dim, 1)
    if size is not None:
        return size if size < 2**63 else None  # older exporters write -1 for "any"
    return _text(dim, 2) or None


def _external_data(tensor: memoryview) -> list[ExternalData]:
    """The tensor's place outside the file, if it has one, whether or not `data_location` admits to it."""
    name = _text(tensor, 8)
    entries: dict[str, str] = {}
    for entry in _messages(tensor, 13):
        key = _text(entry, 1)
        if key in entries or key not in ("location", "offset", "length", "checksum"):
            raise _Malformed(f"tensor {name!r} has the external-data key {key!r} twice, or one that bundles do not use")
        entries[key] = _text(entry, 2)
    if not entries and _number(tensor, 14) != 1:
        return []
    if "location" not in entries:
        raise _Malformed(f"tensor {name!r} lies outside the file, but no location says where")
    length = entries.get("length")
    offset = _decimal(name, entries.get("offset", "0"))
    return [ExternalData(name, entries["location"], offset, None if length is None else _decimal(name, length))]


def _decimal(tensor: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise _Malformed(f"tensor {tensor!r} has the offset or length {text[:40]!r}")
    return int(text)
