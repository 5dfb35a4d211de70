"""edgekit: few-step generators and small language models, compiled and run on the device.

    import edgekit

    model = edgekit.load("emoji.bundle", task="text-to-image")
    model.generate("red apple").images[0].save("apple.png")

Importing this package is cheap: numpy and the inference engine load with the first bundle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgekit.runtime.tasks import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> object:
    """`edgekit.load` resolves on first use (PEP 562)."""
    if name == "load":
        from edgekit.runtime.tasks import load

        return load
    raise AttributeError(f"module 'edgekit' has no attribute {name!r}")
