"""What a lowered graph really runs: the kernels in ONNX Runtime's optimised graph, and whether a plan's are among them.

An operator that is written for a kernel and not fused runs as float32 between conversions, slower than before. Nothing
says so when it happens; so a graph is opened as it will be, and the graph that the engine made of it is read.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgekit.errors import DeviceMissing, KernelsMissing, SessionFailed, UnknownDevice
from edgekit.quant.choices import get_choice
from edgekit.quant.graph import Unit
from edgekit.runtime.backends.devices import PROVIDER_OF, engine

INTEGER_PRODUCTS = frozenset(
    {"MatMulIntegerToFloat", "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulInteger", "QGemm"}
)
KERNELS = {  # name of a kernel family -> the operators that are it
    "QLinearConv": frozenset({"QLinearConv"}),
    "integer MatMul": INTEGER_PRODUCTS,
    "MatMulNBits": frozenset({"MatMulNBits"}),
    "GatherBlockQuantized": frozenset({"GatherBlockQuantized"}),
}
NAMED = 6  # units in a message


@dataclass(frozen=True)
class Fused:
    """Kernels by family: how many units were planned to run as such, and how many nodes do."""

    planned: dict[str, int]
    found: dict[str, int]


def kernels(graph: Path, device: str = "cpu") -> Counter[str]:
    """Operators of the graph that ONNX Runtime makes of `graph` when it is opened for `device`.

    Raises:
        UnknownDevice: ONNX Runtime has no such device.
        DeviceMissing: its wheel here is not built for it.
        SessionFailed: it refused the graph.
    """
    return Counter(op for op, _ in _optimised(graph, device))


def check_fused(graph: Path, units: Sequence[Unit], choices: Mapping[str, str], device: str = "cpu") -> Fused:
    """Whether every unit that was to run on integers does.

    Args:
        graph: a lowered graph's file.
        units: of `find_units`, before it was lowered.
        choices: by unit id, as it was lowered.
        device: where it is opened.

    Raises:
        KernelsMissing: of one kernel there are fewer than planned; it says how many, and which units, where the engine
            kept their names.
        UnknownDevice, DeviceMissing, SessionFailed: see `kernels`.
    """
    wanted = {unit.id: family for unit in units if (family := _family(unit, choices.get(unit.id, "fp32")))}
    nodes = _optimised(graph, device)
    ops = Counter(op for op, _ in nodes)
    planned = Counter(wanted.values())
    found = {family: sum(ops[op] for op in KERNELS[family]) for family in planned}
    short = [
        f"{found[family]} of {planned[family]} planned {family} nodes{_names(family, wanted, nodes)}"
        for family in planned
        if found[family] < planned[family]
    ]
    if short:
        raise KernelsMissing(
            f"{graph.name} on {device} has {'; '.join(short)}. The others run as floats between conversions, slower "
            "than unquantized: choose fp32 or fp16 for them."
        )
    return Fused(dict(planned), found)


def _family(unit: Unit, name: str) -> str:
    """The kernel that a choice is meant for; "" for floats."""
    choice = get_choice(name)
    if choice.is_float:
        return ""
    if choice.activation == "float":
        return "GatherBlockQuantized" if unit.op == "Gather" else "MatMulNBits"
    return "QLinearConv" if unit.op == "Conv" else "integer MatMul"


def _names(family: str, wanted: Mapping[str, str], nodes: Sequence[tuple[str, str]]) -> str:
    """The units whose name no kernel of the family has. The engine appends `_token_N` where it changes the layout."""
    named = {name.partition("_token_")[0] for op, name in nodes if op in KERNELS[family]}
    lost = [unit for unit, kernel in wanted.items() if kernel == family and unit not in named]
    if not lost:
        return ""
    more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
    return f" (not {', '.join(lost[:NAMED])}{more})"


def _optimised(graph: Path, device: str) -> list[tuple[str, str]]:
    """(operator, node name) of the engine's graph, bodies of control flow included."""
    kind = device.partition(":")[0]
    if kind not in PROVIDER_OF:
        raise UnknownDevice(f"ONNX Runtime has no device {device!r}; write {' or '.join(PROVIDER_OF)}")
    found = engine()
    if kind not in found.devices:
        raise DeviceMissing(f"{found.wheel} {found.version} is built for {', '.join(found.devices)}, not for {kind}")
    with tempfile.TemporaryDirectory(prefix="edgekit-kernels-") as folder:
        written = Path(folder) / "optimised.onnx"
        _open(graph, kind, written)
        return [(node.op_type, node.name or "") for node in ir.load(written).graph.all_nodes()]


def _open(graph: Path, kind: str, written: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it warns that the graph it writes is this machine's alone
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(written)
    # Weights go to a file of their own: one protobuf holds no more than 2 GB.
    prefix = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{prefix}_file_name", f"{written.name}.data")
    options.add_session_config_entry(f"{prefix}_min_size_in_bytes", "1024")
    providers: list[Any] = list(dict.fromkeys((PROVIDER_OF[kind], PROVIDER_OF["cpu"])))
    try:
        onnxruntime.InferenceSession(str(graph), options, providers=providers, enable_fallback=0)
    except Exception as why:  # the engine's classes derive from Exception alone
        raise SessionFailed(f"{graph.name} on {kind} failed: {why}") from why
