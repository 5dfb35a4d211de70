"""The page of families is complete and true."""

from __future__ import annotations

import pytest

from edgekit.bundle import catalogue
from edgekit.export.families import FAMILIES
from tests.house.families_page import NOT_YET, PAGE, renewed, rows_of, table

TEXT = PAGE.read_text(encoding="utf-8")
STATES = rows_of(TEXT)

# Every family this project set out to run, by the names of their papers.
PUBLISHED = """
LCM, LCM-LoRA, PixArt-δ, RG-LCD, RLCM, PSO, Hyper-SD, InstaFlow, SlimFlow, Simple ReFlow, SwiftBrush, SIM, BOOT,
Guided distillation, SpeedUpNet, iCD, Zero-SNR, Time-Shift, Timestep Aligner, AutoDiffusion, MMD-DDM, AdaDiff, ReDi,
Adaptive teacher-student, Hybrid SD, HarmoniCa, TSD-SR, OSDFace, TDDSR, ConsisSR, ResShift, ITER, aMUSEd, Paella,
MAGNeT, ReMDM, SDTT, FlexVAR, NBP, SJD, OSV, AnimateLCM-SVD, AnimateLCM, AnimateDiff-Lightning, MarDini, RIVER,
Efficient-vDiT, Streamlined Inference, CoMoSpeech, WaveGrad, PeriodWave-Turbo, StableVC, Presto, Diffusion Policy,
SRPO, OGD, ReQFlow, DiffDock, Pixelsmith, Self-Cascade, SAR-to-optical ACD, ASBM, CatVTON, PatchRefiner V2, UniMatch
"""


def test_the_page_is_what_there_is() -> None:
    """The table is that of the catalogue and the exporters now; python -m tests.house.families_page renews it."""
    assert renewed(TEXT) == TEXT


@pytest.mark.parametrize("family", " ".join(PUBLISHED.split()).split(", "))
def test_every_published_family_has_a_row(family: str) -> None:
    """None was forgotten, and each is in one of the three states."""
    assert STATES[family].startswith(("runs with reference parity: ", "recipe only: ", "not yet: "))


@pytest.mark.parametrize("name", catalogue.names())
def test_every_recipe_is_in_its_family_and_in_its_state(name: str) -> None:
    """An entry with an exporter says parity and names one there is; one without says that it is a recipe only."""
    entry = catalogue.entry(name)
    assert f"`{name}`" in TEXT
    assert entry.family not in NOT_YET
    assert entry.exporter is None or entry.exporter in FAMILIES
    expected = f"[`{entry.exporter}`]" if entry.exporter else "recipe only: "
    assert expected in STATES[entry.family]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_exporter_is_on_the_page(name: str) -> None:
    """By the row of a family it exports, or by one of its own."""
    assert f"runs with reference parity: [`{name}`]" in TEXT or f", [`{name}`]" in TEXT


def test_a_page_is_renewed_between_its_words() -> None:
    """What stands before and after the table stays, also where the table is empty or old."""
    old = "before\n\n| family | task | rule | recipes | state |\n|---|---|---|---|---|\n| x | y | | | z |\n\nafter\n"
    assert renewed(old) == f"before\n\n{table()}\nafter\n"
    assert rows_of(old) == {"x": "z"}
