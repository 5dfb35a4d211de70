"""Constants that come from another part are taken from that part as it will ship."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from edgekit.bundle.store import Bundle
from edgekit.quant.graph import load_graph, normalised
from edgekit.quant.pictures import PictureWorkload
from edgekit.quant.prepare import Prepared
from edgekit.quant.rewrite import Constants, apply_rewrites, find_constant_rows
from edgekit.quant.verify import Made
from edgekit.runtime.backends import open_session


def refreshed(bundle: Bundle, workload: PictureWorkload, part: Prepared, made: Sequence[Made], work: Path) -> Prepared:
    """A part whose constant token rows are those of the quantized text encoder, if it has any.

    The first token of a quantized encoder is a little off from that of the float one, and the guard would say so.
    """
    inputs = {each.input for each in part.rewrites if each.kind == "bos"}
    if not inputs or not made:
        return part
    sessions = {each.part.part: open_session(each.path, "cpu", planned=False) for each in made}
    calls = workload.record([part.part], replaced=sessions)[part.part]
    rows = {name: find_constant_rows([call.feeds[name] for call in calls]) for name in inputs}
    constants = Constants(rows=rows, factors=part.constants.factors)
    model = normalised(load_graph(bundle.graph(part.part)))
    apply_rewrites(model, part.rewrites, constants)
    path = work / f"{part.part}.ships.onnx"
    ir.save(model, path, external_data=f"{path.name}.data")
    return replace(part, path=path, constants=constants)
