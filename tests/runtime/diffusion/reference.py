"""The other side of cases.py: diffusers' schedulers in their textbook loop. Run as a module, it freezes the vectors.

python -m tests.runtime.diffusion.reference
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.runtime.diffusion.cases import CASES, GOLDEN, SEED, SHAPE, Case, net, picture

F32 = npt.NDArray[np.float32]


def from_diffusers(name: str) -> Any:
    """A class of diffusers, which imports on first use, without the warnings of the packages it looks for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        return getattr(diffusers, name)


def reference(case: Case) -> tuple[F32, list[float]]:
    """The sample a diffusers scheduler ends with, and the timesteps it visited.

    Of LCM that is the clean estimate, which is what its pipelines decode: where a list of timesteps is cut, the
    scheduler takes its last step for an inner one and renoises.
    """
    import torch

    scheduler = from_diffusers(case.scheduler)(**case.config)
    generator = torch.Generator("cpu").manual_seed(SEED)
    scheduler.set_timesteps(**case.set_timesteps)
    timesteps = scheduler.timesteps
    if case.tail is not None:
        cut = from_diffusers(case.tail).get_timesteps
        timesteps, _ = cut(SimpleNamespace(scheduler=scheduler), case.steps, case.strength, "cpu")
    noise = torch.randn(SHAPE, generator=generator)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    if case.strength is not None:
        bring = scheduler.scale_noise if hasattr(scheduler, "scale_noise") else scheduler.add_noise
        clean, at = torch.from_numpy(picture()), timesteps[:1].repeat(SHAPE[0])
        x = bring(clean, at, noise) if hasattr(scheduler, "scale_noise") else bring(clean, noise, at)
    for t in timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        m = torch.from_numpy(net(scaled.numpy(), float(t)))
        x, *clean = scheduler.step(m, t, x, generator=generator, **case.step, return_dict=False)
    last = clean[0] if case.scheduler == "LCMScheduler" else x
    return last.numpy(), [float(t) for t in timesteps]


def freeze() -> None:
    """Write the vectors of every case."""
    frozen = np.stack([reference(case)[0] for case in CASES.values()])
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, names=np.array(list(CASES)), samples=frozen)


if __name__ == "__main__":
    freeze()
