"""The network of a stage as a function of sample and row: fed, carried, tiled, guided."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from edgekit.bundle.recipe import Call, Guidance, Stage
from edgekit.errors import BadManifest
from edgekit.runtime.backends import Array
from edgekit.runtime.diffusion.guidance import classifier_free, dynamic_scale, w_embedding
from edgekit.runtime.diffusion.networks import Meter, Networks
from edgekit.runtime.diffusion.sources import Sources
from edgekit.runtime.diffusion.tiles import Box, needed, tiled

F32 = npt.NDArray[np.float32]

SPATIAL = ("@x", "@start", "@image", "@previous", "@control", "@inpaint_mask", "@masked_image")  # cut with a tile


class Predictor:
    """Called with (sample, row number), gives the guided prediction, (batch, ...).

    Args:
        stage: whose network it is.
        times: what each row's network is fed as time; one per row.
        nets: the part of each row, empty where all are `stage.denoise.part`.
        scale: the guidance scale.
        sources: everything that is the same for all rows.
        networks, meter: where parts run.
        random: (name, row, shape) to unit noise, for @random sources.
        axis: the axis of the sample that counts frames, for a ramp over them.
        retime: (row, sample) to another time per picture (batch,), or None (Time-Shift).
    """

    def __init__(
        self,
        stage: Stage,
        times: Sequence[float],
        nets: Sequence[str],
        scale: float,
        sources: Sources,
        networks: Networks,
        meter: Meter,
        random: Callable[[str, int, tuple[int, ...]], F32],
        axis: int | None = None,
        retime: Callable[[int, F32], F32 | None] | None = None,
    ) -> None:
        self._stage, self._times, self._nets, self._scale = stage, times, nets, scale
        self._networks, self._meter, self._random = networks, meter, random
        self._axis, self._retime = axis, retime
        self._carried: dict[str, Array] = {}
        self._sources = sources
        guidance = stage.guidance
        self._joins = guidance.kind == "concat_tokens" and sources.lines > 1
        self._guided = guidance.kind == "cfg" and sources.lines > 1
        self._copies = sources.lines if self._guided else 1
        self._fixed: dict[str, Array] = {}
        self._more: dict[str, Array] = {}

    def __call__(self, x: Array, row: int, more: Mapping[str, Array] | None = None) -> F32:
        """The prediction for one row; `more` are sources (batch, ...) of this row alone, @t among them if it is told.

        Raises:
            SessionFailed, BadRequest, BadManifest: as of any part.
        """
        net = self._stage.denoise
        self._more = {source: np.concatenate([value] * self._copies) for source, value in (more or {}).items()}
        if not needed(x, net.tiles):
            return self._predict(x, row, None)
        assert net.tiles is not None, "tiles that are needed are there"
        if net.carry:
            raise BadManifest(f"stage {self._stage.name!r} carries tensors from row to row, so it cannot be tiled")
        return tiled(x, net.tiles, lambda box: self._predict(x, row, box))

    def _predict(self, x: Array, row: int, box: Box | None) -> F32:
        net, guidance = self._stage.denoise, self._stage.guidance
        now = self._now(x, row) | self._more
        for call in net.before:
            outputs = self._run(call.part, call.feeds, now, row, box, x.shape)
            now |= {f"{call.part}.{name}": value for name, value in outputs.items()}
        part = self._nets[row] if self._nets else net.part
        outputs = self._run(part, net.feeds, now, row, box, x.shape, net.carry)
        self._carried |= {name: outputs[name] for name in net.carry if name in outputs}
        m: F32 = outputs[net.output]
        if net.keep_channels is not None:
            m = m[:, : net.keep_channels]
        if not self._guided:
            return m
        negative, positive = np.split(m, 2)
        return classifier_free(negative, positive, self._ramped(guidance, row, positive.shape), guidance.rescale)

    def _now(self, x: Array, row: int) -> dict[str, Array]:
        """The sources of this row."""
        copies, batch = self._copies, len(x)
        count = copies * batch
        t = np.full(batch, self._times[row], np.float32)
        shifted = self._retime(row, x) if self._retime is not None else None
        t = t if shifted is None else shifted
        sampler = self._stage.sampler
        end = sampler.time_scale if sampler.time == "one_minus_sigma" else 0.0  # the clean end, as the network counts
        later = self._times[row + 1] if row + 1 < len(self._times) else end
        now: dict[str, Array] = {
            "@x": np.concatenate([x] * copies) if copies > 1 else x,
            "@t": np.tile(t, copies),
            "@r": np.full(count, later, np.float32),
            "@row": np.full(count, row, np.int64),
        }
        guidance = self._stage.guidance
        if guidance.kind == "w_embedding":
            embedding = w_embedding(float(self._row_scale(guidance, row)), guidance.dim, guidance.shift)
            now["@w_embedding"] = np.tile(embedding, (count, 1))
        if guidance.kind == "embedded":
            now["@guidance"] = np.full(count, self._row_scale(guidance, row) * guidance.factor, np.float32)
        return now

    def _row_scale(self, guidance: Guidance, row: int) -> float:
        """The guidance scale of a row: constant, ramped over the rows, or faded with the noise."""
        scale, last = self._scale, len(self._times) - 1
        if guidance.ramp == "rows" and last:
            scale = guidance.start + (scale - guidance.start) * row / last
        if guidance.dynamic is not None:
            scale = dynamic_scale(self._times[row], scale, guidance.dynamic)
        return scale

    def _ramped(self, guidance: Guidance, row: int, shape: tuple[int, ...]) -> float | F32:
        """The scale as classifier-free guidance takes it: a number, or one per frame."""
        if guidance.ramp != "frames":
            return self._row_scale(guidance, row)
        if self._axis is None:
            raise BadManifest(f"stage {self._stage.name!r}: guidance ramps over frames and the sample has none")
        places = [1] * len(shape)
        places[self._axis] = shape[self._axis]
        return np.linspace(guidance.start, self._scale, shape[self._axis], dtype=np.float32).reshape(places)

    def _run(
        self,
        part: str,
        feeds: dict[str, str],
        now: dict[str, Array],
        row: int,
        box: Box | None,
        sample: tuple[int, ...],
        carry: tuple[str, ...] = (),
    ) -> dict[str, Array]:
        inputs = self._networks.inputs(part)
        values: dict[str, Array] = {}
        for name, source in feeds.items():
            if name in inputs and not source.startswith("@random."):
                values[name] = self._fed(source, now)
        if box is not None:
            values = {name: _cut(value, feeds[name], box, sample) for name, value in values.items()}
        unfed = {name: spec for name, spec in inputs.items() if name not in values}
        for name in unfed:
            shape = self._networks.shape_like(part, name, values)
            if name in carry:
                values[name] = self._carried.get(name, np.zeros(shape, np.float32))
            else:
                noise = self._random(feeds[name].partition(".")[2], row, (shape[0] // self._copies, *shape[1:]))
                values[name] = np.concatenate([noise] * self._copies)
        return self._networks.run(part, values, self._meter)

    def _fed(self, source: str, now: dict[str, Array]) -> Array:
        if source in now:
            return now[source]
        if source not in self._fixed:
            given = self._sources
            if self._joins and source in self._stage.guidance.joined:
                value = np.concatenate([given.images(source, -1), given.images(source, 0)], axis=1)
            else:
                value = given.rows(source) if self._guided else given.images(source)
            self._fixed[source] = value
        return self._fixed[source]


def _cut(value: Array, source: str, box: Box, sample: tuple[int, ...]) -> Array:
    """A tile of a value that lies over the sample, at whatever scale; other values whole."""
    if source not in SPATIAL:
        return value
    top, left, bottom, right = box
    scale = value.shape[-1] // sample[-1]
    return value[..., scale * top : scale * bottom, scale * left : scale * right]


def once(call: Call, sources: Sources, networks: Networks, meter: Meter) -> None:
    """Run a condition and put its outputs among the sources. Raises SessionFailed, BadRequest, BadManifest."""
    kind, feeds = sources.feeds(call.feeds)
    for name, value in networks.run(call.part, feeds, meter).items():
        sources.put(f"{call.part}.{name}", kind, value)
