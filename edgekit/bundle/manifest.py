"""`edgekit.json` as frozen, validated values; docs/bundle.md is the page of prose behind them."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import msgspec

from edgekit.bundle.recipe import Name, Recipe, Table, Value
from edgekit.errors import BadManifest, UnknownFormat, UnsafePath, WrongSize

FORMAT = 1
MANIFEST_FILE = "edgekit.json"
MAX_MANIFEST = 64 * 2**20  # bytes
MAX_NESTING = 32  # brackets; a manifest of this format needs ten
GUARD = "guard."  # an output `guard.<input>` says how far that input is from the one the graph was quantized with
GUARD_LIMIT = 1e-3  # of such an output; half precision rounds by 5e-4

DType = Literal["float32", "float16", "bfloat16", "int64", "int32", "uint8", "int8", "bool", "float64", "uint16"]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
Dim = Annotated[int, msgspec.Meta(ge=0, le=2**40)] | Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_][\w+*/ -]{0,63}$")]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**48)]
Text = Annotated[str, msgspec.Meta(max_length=1 << 20)]


class FileEntry(Value, frozen=True):
    """One file of the bundle; `path` is relative, with forward slashes, and stays inside."""

    path: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    bytes: Count
    sha256: Sha256

    def __post_init__(self) -> None:
        check_path(self.path)


class TensorSpec(Value, frozen=True):
    """A graph input or output: integers are fixed sizes, names are dynamic axes."""

    name: str
    dtype: DType
    shape: tuple[Dim, ...]


class AxisRange(Value, frozen=True):
    """Legal sizes of a dynamic axis."""

    min: Count = 1
    max: Count = 2**31


class Part(Value, frozen=True):
    """One graph, the data files its weights lie in, and its signature."""

    graph: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    data: tuple[str, ...] = ()
    precision: str = "fp32"
    parameters: Count = 0

    def __post_init__(self) -> None:
        for path in (self.graph, *self.data):
            check_path(path)

    @property
    def answers(self) -> tuple[str, ...]:
        """Names of the outputs that others may read: all but guards."""
        return tuple(spec.name for spec in self.outputs if not spec.name.startswith(GUARD))


class KVCacheLayout(Value, frozen=True):
    """Shape of one layer's key (and value) buffer: (batch, heads, capacity, head_dim)."""

    layers: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    heads: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    head_dim: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    dtype: Literal["float32", "float16"] = "float32"


class SamplingDefaults(Value, frozen=True):
    """What `generation_config.json` recommends; `temperature` 0 is greedy decoding."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class Decoding(Value, frozen=True):
    """The language-model contract. `dialect` says which inputs the graph has (docs/bundle.md lists them)."""

    part: Name
    dialect: Literal["ort", "std", "concat"]
    context_length: Annotated[int, msgspec.Meta(ge=1, le=2**31)]
    vocab_size: Annotated[int, msgspec.Meta(ge=2, le=2**31)]
    kv: KVCacheLayout
    eos: tuple[int, ...] = ()
    bos: int | None = None
    sliding_window: int | None = None
    defaults: SamplingDefaults = SamplingDefaults()


class Tokenizer(Value, frozen=True):
    """A `tokenizer.json`, its content hash, and how a prompt becomes ids.

    `length` pads or cuts to a fixed number of ids with `pad` (text encoders); None leaves the length free.
    `chat_template` is the path of a jinja2 file, run in a sandbox. A text encoder's prompt is put into `template` in
    place of its one `{}` (an instruction, a chat's turns), with `lower` first stripped and put into lower case.
    """

    file: str
    fingerprint: Sha256
    length: int | None = None
    pad: int | None = None
    chat_template: str | None = None
    special: dict[str, str] = {}
    template: Annotated[str, msgspec.Meta(max_length=1 << 16, pattern=r"^[^{}]*\{\}[^{}]*$")] | None = None
    lower: bool = False

    def __post_init__(self) -> None:
        check_path(self.file)
        if self.chat_template is not None:
            check_path(self.chat_template)


class Gate(Value, frozen=True):
    """One measured check the bundle passed: `value` against `limit`, in the words of `what`."""

    what: str
    value: float
    limit: float


class PrecisionRecord(Value, frozen=True):
    """What was asked, and the checks it passed. Per-part precision stands with the part."""

    requested: str = "fp32"
    gates: tuple[Gate, ...] = ()


class Provenance(Value, frozen=True):
    """Where the weights came from and what made the bundle.

    `request` is the hash of source, options and version: an equal request finds its work already done.
    """

    source: str
    source_sha256: Sha256
    request: str = ""
    licence: str = "unknown"
    tools: dict[str, str] = {}
    loras: tuple[str, ...] = ()
    created: str = ""


FewStepTask = Literal[
    "text-to-image",
    "image-to-image",
    "super-resolution",
    "unconditional-image",
    "text-to-video",
    "image-to-video",
    "text-to-audio",
    "arrays",  # anything else: arrays in, arrays out
]
Task = Literal["text-generation", FewStepTask]


class Manifest(Value, frozen=True):
    """The whole of `edgekit.json`."""

    format: int
    task: Task
    family: str
    parts: dict[Name, Part]
    files: tuple[FileEntry, ...]
    provenance: Provenance
    precision: PrecisionRecord = PrecisionRecord()
    axes: dict[str, AxisRange] = {}
    tokenizers: dict[Name, Tokenizer] = {}
    recipe: Recipe | None = None
    tables: tuple[Table, ...] = ()
    decoding: Decoding | None = None
    notes: dict[str, Text] = {}


def check_path(path: str) -> None:
    """Refuse a path that could name anything outside its bundle.

    Raises:
        UnsafePath: absolute, with `..`, a drive, a backslash or an unprintable character, or a name over 255 bytes.
    """
    pure = PurePosixPath(path)
    bad = not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in path or ":" in path or str(pure) != path
    if bad or not path.isprintable() or any(len(name.encode()) > 255 for name in pure.parts):
        raise UnsafePath(f"{path!r} is not a plain path inside the bundle; bundles name files by relative path only")


def parse(raw: bytes) -> Manifest:
    """Bytes to values; structure only, meaning is `validate`'s.

    Raises:
        WrongSize: more than MAX_MANIFEST bytes.
        UnknownFormat: another format version.
        BadManifest: not JSON, nested too deeply, a key twice, an unknown field, a missing field or a wrong type.
        UnsafePath: a path that could leave the bundle.
    """
    if len(raw) > MAX_MANIFEST:
        raise WrongSize(f"{MANIFEST_FILE} has {len(raw):,} bytes; the limit is {MAX_MANIFEST:,}. Is this a bundle?")
    if nesting(raw) > MAX_NESTING:
        raise BadManifest(f"{MANIFEST_FILE} nests brackets more than {MAX_NESTING} deep; no manifest does")
    try:
        version = msgspec.json.decode(raw, type=_Head).format
        if version != FORMAT:
            raise UnknownFormat(f"bundle format {version!r}; this edgekit reads {FORMAT}. Export the model again.")
        manifest = msgspec.json.decode(raw, type=Manifest)
        json.loads(raw, object_pairs_hook=_unique_keys)
    except (msgspec.DecodeError, ValueError, RecursionError) as why:
        raise BadManifest(f"{MANIFEST_FILE}: {why}. Export the model again, or fetch the bundle anew.") from why
    return manifest


class _Head(msgspec.Struct):
    """The one field every format version has; the rest is skipped unread."""

    format: Any = None


def nesting(raw: bytes) -> int:
    """How deep the brackets of a JSON text go, in time linear in its length and without recursion."""
    outside = b"".join(raw.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    brackets = outside.translate(None, delete=bytes(set(range(256)) - set(b"[]{}")))
    return max(accumulate(1 if bracket in b"[{" else -1 for bracket in brackets), default=0)


def _unique_keys(pairs: list[tuple[str, Any]]) -> None:
    """JSON leaves open which of two equal keys counts (RFC 8259, section 4), so neither does."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"the key {key!r} stands twice in one object")
        seen.add(key)


def encode_manifest(manifest: Manifest) -> bytes:
    """Canonical bytes: indented, keys in declaration order."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def json_schema() -> bytes:
    """JSON Schema of `edgekit.json`, generated from these classes: the content of docs/bundle.schema.json."""
    return msgspec.json.format(msgspec.json.encode(msgspec.json.schema(Manifest), order="sorted"), indent=1) + b"\n"
