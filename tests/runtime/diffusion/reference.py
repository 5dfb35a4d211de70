"""The other side of the cases: diffusers' schedulers in their textbook loop. Run as a module, it freezes the vectors.

python -m tests.runtime.diffusion.reference
"""

from __future__ import annotations

import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.runtime.diffusion.cases import GOLDEN, SEED, SHAPE, Case, net, picture
from tests.runtime.diffusion.closed_forms import CLOSED_FORMS, closed_form
from tests.runtime.diffusion.sampler_cases import CASES

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
    if case.scheduler == "SCMScheduler":  # as its pipelines do: the last angle is where the last step goes
        timesteps, noise = timesteps[:-1], noise * scheduler.config.sigma_data
    x = _start(scheduler, case, timesteps, noise)
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        m = torch.from_numpy(case.sampler.sign * net(scaled.numpy(), float(t)))
        x, *clean = scheduler.step(m, t, x, **extra, **case.step, return_dict=False)
    last = clean[0] if case.scheduler == "LCMScheduler" else x
    return last.numpy(), [float(t) for t in timesteps]


def _start(scheduler: Any, case: Case, timesteps: Any, noise: Any) -> Any:
    """Scaled noise, or the picture at the first level."""
    import torch

    if case.strength is None:
        return noise * getattr(scheduler, "init_noise_sigma", 1.0)
    clean, at = torch.from_numpy(picture()), timesteps[:1].repeat(SHAPE[0])
    if case.scheduler == "SCMScheduler":
        return torch.cos(timesteps[0]) * clean + torch.sin(timesteps[0]) * noise
    if case.scheduler == "FlowMatchHeunDiscreteScheduler":
        return scheduler.scale_noise(clean, timesteps[0], noise)
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(clean, at, noise).to(torch.float32)
    return scheduler.add_noise(clean, noise, at)


def freeze() -> None:
    """Write the vectors of every case."""
    drawn = [closed_form(case)[0] if case.scheduler in CLOSED_FORMS else reference(case)[0] for case in CASES.values()]
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, names=np.array(list(CASES)), samples=np.stack(drawn).astype(np.float32))


if __name__ == "__main__":
    freeze()
