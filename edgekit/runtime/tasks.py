"""What a bundle can do: TASKS names the pipeline of each task, `load` opens a bundle and gives that pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args, overload

from edgekit.bundle.manifest import FewStepTask
from edgekit.bundle.store import read_bundle
from edgekit.errors import BadRequest

if TYPE_CHECKING:
    from os import PathLike

    from typing_extensions import Unpack

    from edgekit.runtime.diffusion.pipeline import FewStepPipeline
    from edgekit.runtime.llm.pipeline import TextPipeline
    from edgekit.runtime.llm.prefix import PrefixStore


class TextSetup(TypedDict, total=False):
    """How a text pipeline speculates and remembers; see `TextPipeline`."""

    draft: str
    speculative_config: Mapping[str, Any] | None
    exact: bool
    prefixes: PrefixStore | None
    report: Callable[[str], None]


TASKS = {
    "text-generation": ("edgekit.runtime.llm.pipeline", "TextPipeline"),
    **dict.fromkeys(get_args(FewStepTask), ("edgekit.runtime.diffusion.pipeline", "FewStepPipeline")),
}


@overload
def load(
    path: str | PathLike[str],
    *,
    task: Literal["text-generation"],
    device: str = ...,
    threads: int = ...,
    verify: bool = ...,
    **text: Unpack[TextSetup],
) -> TextPipeline: ...


@overload
def load(
    path: str | PathLike[str],
    *,
    task: FewStepTask,
    device: str = ...,
    threads: int = ...,
    verify: bool = ...,
    max_memory: int | None = ...,
) -> FewStepPipeline: ...


@overload
def load(
    path: str | PathLike[str],
    *,
    task: None = None,
    device: str = ...,
    threads: int = ...,
    verify: bool = ...,
    max_memory: int | None = ...,
    **text: Unpack[TextSetup],
) -> TextPipeline | FewStepPipeline: ...


def load(
    path: str | PathLike[str],
    *,
    task: str | None = None,
    device: str = "cpu",
    threads: int = 0,
    verify: bool = True,
    max_memory: int | None = None,
    **text: Unpack[TextSetup],
) -> TextPipeline | FewStepPipeline:
    """Open a bundle and return the pipeline of its task.

    Args:
        path: the bundle's folder or `.zip`.
        task: what the caller needs; a bundle of another task is refused. None takes the bundle's own.
        device: `cpu`, or `cuda` with an optional index.
        threads: of the inference engine; 0 leaves the choice to it.
        verify: check every file's sha256 first. Sizes, paths and signatures are checked either way.
        max_memory: bytes this process may take, of a few-step pipeline; see `FewStepPipeline`.
        text: `draft`, `speculative_config`, `exact`, `prefixes` and `report` of a text pipeline.

    Raises:
        BundleError: the bundle is not what it says it is; nothing was loaded.
        DeviceError: the device is not there.
        BadRequest: the bundle has another task, or is given options of another.
    """
    bundle = read_bundle(Path(path), verify=verify)
    found = bundle.manifest.task
    if task is not None and task != found:
        raise BadRequest(f"{path} is a {found} bundle; {task} was asked for")
    if found not in TASKS:
        raise BadRequest(f"{path}: this edgekit has no runtime for task {found!r}; it has {', '.join(TASKS)}")
    if text and found != "text-generation":
        raise BadRequest(f"{path} is a {found} bundle; {', '.join(text)} is for text-generation")
    if max_memory is not None and found == "text-generation":
        raise BadRequest(f"{path} is a {found} bundle; max_memory is for the others")
    module, name = TASKS[found]
    more = text if found == "text-generation" else {"max_memory": max_memory}
    pipeline: TextPipeline | FewStepPipeline = getattr(import_module(module), name)(
        bundle, device=device, threads=threads, **more
    )
    return pipeline
