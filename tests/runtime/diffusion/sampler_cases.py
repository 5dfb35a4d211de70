"""Every sampler beside the reference it stands for: one table of configurations."""

from __future__ import annotations

from tests.runtime.diffusion.cases import Case
from tests.runtime.diffusion.cases_flow import flow_cases
from tests.runtime.diffusion.cases_sigma import sigma_cases
from tests.runtime.diffusion.cases_vp import vp_cases

CASES: dict[str, Case] = {case.name: case for cases in (vp_cases(), sigma_cases(), flow_cases()) for case in cases}
