"""A bundle that draws: `generate` for people, `stream` for programs that show what happens.

with FewStepPipeline(read_bundle(Path("emoji.bundle"))) as model:
    model.generate("red apple", steps=4, seed=3).save("apple.png")
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgekit.bundle.store import Bundle
from edgekit.errors import BadManifest
from edgekit.runtime.backends import open_session
from edgekit.runtime.diffusion.contract import Contract
from edgekit.runtime.diffusion.drawing import Drawing
from edgekit.runtime.diffusion.image import open_image
from edgekit.runtime.diffusion.networks import Networks, OpenSession
from edgekit.runtime.diffusion.prompts import Prompts
from edgekit.runtime.diffusion.request import DrawRequest
from edgekit.runtime.diffusion.result import DrawResult, StepEvent
from edgekit.runtime.diffusion.tables import check_tables

__all__ = ["DrawRequest", "DrawResult", "FewStepPipeline", "StepEvent"]

open_unplanned: OpenSession = partial(open_session, planned=False)  # the activations of pictures are large


class FewStepPipeline:
    """A bundle of any few-step task. Parts open on first use; `close`, or the end of a `with`, lets go.

    Args:
        bundle: what `read_bundle` gave.
        device: a device name of edgekit.runtime.backends.
        threads: of the inference engine; 0 leaves the choice to it.
        max_memory: bytes this process may take: parts are loaded and let go of in order, decoders draw in tiles.
        open_session: the backend seam, `(graph, device, threads=) -> Session`.

    Raises:
        BadManifest: the recipe asks for something this runtime does not define.
        TableMismatch: the shipped tables are not what the recipe compiles to.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        *,
        threads: int = 0,
        max_memory: int | None = None,
        open_session: OpenSession = open_unplanned,
    ) -> None:
        manifest = bundle.manifest
        check_tables(manifest)
        if manifest.recipe is None:
            raise BadManifest(f"a {manifest.task} bundle has no recipe, so there is nothing to draw by")
        self.bundle, self.device, self.task = bundle, device, manifest.task
        self.contract = Contract.of(manifest.recipe)
        self._prompts = Prompts(bundle.root, manifest.tokenizers)
        self._networks = Networks(bundle.root, manifest, device, threads, open_session, max_memory)

    def __enter__(self) -> FewStepPipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, why: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of every session; a later call opens them again."""
        self._networks.close()

    def generate(
        self,
        prompt: str = "",
        *,
        negative: str = "",
        steps: int | None = None,
        guidance: float | None = None,
        width: int | None = None,
        height: int | None = None,
        batch: int = 1,
        seed: int = 0,
        seed_mode: str = "philox",
        image: Image.Image | str | os.PathLike[str] | None = None,
        strength: float | None = None,
        latents: npt.NDArray[np.float32] | None = None,
        first_image: int = 0,
        mask: Image.Image | str | os.PathLike[str] | None = None,
        control: Image.Image | str | os.PathLike[str] | None = None,
        control_scale: float | None = None,
        reference: Image.Image | str | os.PathLike[str] | None = None,
        reference_scale: float | None = None,
        frames: int | None = None,
        seconds: float | None = None,
        inputs: Mapping[str, npt.NDArray[Any]] | None = None,
        tiny: bool = False,
        tile: int | None = None,
        on_step: Callable[[StepEvent], object] | None = None,
    ) -> DrawResult:
        """Draw `batch` of them. Options are those of DrawRequest; pictures may be paths; `on_step` sees every row.

        Raises:
            IllegalSteps, BadRequest: the request is outside the bundle's contract; nothing has run.
            SessionFailed: the inference engine refused, or the answer is not finite.
        """
        request = DrawRequest(
            prompt=prompt,
            negative=negative,
            steps=steps,
            guidance=guidance,
            width=width,
            height=height,
            batch=batch,
            seed=seed,
            seed_mode=seed_mode,
            image=_opened(image),
            strength=strength,
            latents=latents,
            first_image=first_image,
            mask=_opened(mask),
            control=_opened(control),
            control_scale=control_scale,
            reference=_opened(reference),
            reference_scale=reference_scale,
            frames=frames,
            seconds=seconds,
            inputs=inputs or {},
            tiny=tiny,
            tile=tile,
        )
        for event in self.stream(request):
            if isinstance(event, DrawResult):
                return event
            if on_step is not None:
                on_step(event)
        raise AssertionError("a stream ends with its result")

    def stream(self, request: DrawRequest) -> Iterator[StepEvent | DrawResult]:
        """A StepEvent after every row, the DrawResult last. The request is checked now, not at the first event.

        Raises:
            As `generate`.
        """
        return Drawing(self.bundle, self.contract, self._prompts, self._networks, request).events()


def _opened(image: Image.Image | str | os.PathLike[str] | None) -> Image.Image | None:
    return image if image is None or isinstance(image, Image.Image) else open_image(image)
