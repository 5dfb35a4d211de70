"""Which devices this machine offers, and the one to take when the user says `auto`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version

from edgekit.errors import DeviceMissing

WHEELS = ("onnxruntime", "onnxruntime-gpu")
PROVIDER_OF = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}  # in order of preference


@dataclass(frozen=True)
class Engine:
    """One installed inference engine: its wheel, version, and the devices its build lists (listing is not working)."""

    wheel: str
    version: str
    devices: tuple[str, ...]


def installed_wheels() -> dict[str, str]:
    """Installed onnxruntime wheels and versions; more than one breaks the module they share."""
    found = {}
    for wheel in WHEELS:
        try:
            found[wheel] = version(wheel)
        except PackageNotFoundError:
            continue
    return found


def engine() -> Engine:
    """The inference engine of this environment.

    Raises:
        DeviceMissing: none is installed, or two that overwrite each other.
    """
    wheels = installed_wheels()
    if not wheels:
        raise DeviceMissing("onnxruntime is not installed; install edgekit[cpu] (or edgekit[gpu] for CUDA, never both)")
    if len(wheels) > 1:
        raise DeviceMissing(
            f"{' and '.join(wheels)} are both installed and overwrite each other; "
            f"uninstall both, then install edgekit[cpu] or edgekit[gpu] alone"
        )
    import onnxruntime

    listed = set(onnxruntime.get_available_providers())
    devices = tuple(device for device, provider in PROVIDER_OF.items() if provider in listed)
    (wheel, number) = next(iter(wheels.items()))
    return Engine(wheel, number, devices)


def choose(wanted: str) -> str:
    """`auto` becomes the first listed device the engine found hardware for; other names are taken at their word."""
    if wanted != "auto":
        return wanted
    for device in engine().devices:
        if device == "cpu" or _found(device):
            return device
    raise DeviceMissing("the installed onnxruntime lists no device edgekit knows; run `edgekit doctor`")


def _found(device: str) -> bool:
    """Whether the engine itself reports hardware for the device: a listed provider may lack its libraries."""
    import onnxruntime

    try:
        found = onnxruntime.get_ep_devices()
    except AttributeError:  # older than the plug-in interface
        return False
    return any(entry.ep_name == PROVIDER_OF[device] for entry in found)


def packages(names: tuple[str, ...]) -> dict[str, str | None]:
    """Versions of the named distributions, None where one is not installed."""
    present = {dist.name.lower().replace("_", "-"): dist.version for dist in distributions() if dist.name}
    return {name: present.get(name) for name in names}
