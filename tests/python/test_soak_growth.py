"""What tests/soak/soak.py calls growth, of made-up samples of half an hour."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def soak() -> Any:
    path = Path(__file__).resolve().parents[1] / "soak" / "soak.py"
    spec = importlib.util.spec_from_file_location("soak", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def samples(soak: Any, store_kib: Any = lambda s: 200_000, private_kib: Any = lambda s: 9_000) -> list[Any]:
    return [
        soak.Sample(
            seconds=9.0 * i,
            private_kib=[private_kib(9 * i)] * 3,
            resident_kib=[90_000] * 3,
            n_fds=[22] * 3,
            n_threads=[4] * 3,
            store_kib=store_kib(9 * i),
        )
        for i in range(200)
    ]


def test_what_stays(soak: Any) -> None:
    assert soak.growth(samples(soak)) == []


@pytest.mark.parametrize("period_s", [100, 700, 1900])
def test_journals_that_are_written_anew(soak: Any, period_s: int) -> None:
    height = 3 * soak.TOOTH_KIB + soak.LEDGER_TOOTH_KIB
    assert soak.growth(samples(soak, lambda s: 200_000 + height * (s % period_s) // period_s)) == []


def test_journals_that_are_not(soak: Any) -> None:
    problems = soak.growth(samples(soak, lambda s: 200_000 + 170 * s))  # KiB a second, as measured
    assert len(problems) == 1 and problems[0].startswith("store_kib grew from")


def test_private_memory(soak: Any) -> None:
    problems = soak.growth(samples(soak, private_kib=lambda s: 9_000 + 10 * s))
    assert [p.split(" grew")[0] for p in problems] == [f"rank {r}: private_kib" for r in range(3)]
