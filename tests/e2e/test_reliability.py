"""The chaos of `benchmarks/chaos.py`, shortened: nothing is lost, doubled or left behind, whatever happens."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEED = int(os.environ.get("CHAOS_SEED", random.randrange(2**32)))


def run(fault: str, path: Path, seconds: float = 10) -> dict[str, Any]:
    """What was seen under a fault."""
    args = ["--seconds", str(seconds), "--seed", str(SEED), "--json", str(path / "seen.json"), fault]
    subprocess.run([sys.executable, ROOT / "benchmarks" / "chaos.py", *args], check=False, timeout=280)
    (seen,) = json.loads((path / "seen.json").read_text())
    print(f"CHAOS_SEED={SEED}: {seen}")
    assert isinstance(seen, dict)
    return seen


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", ["kill", "rolling", "freeze", "frontend", "leave", "gone", "flood"])
def test_nothing_is_lost_or_left_behind(fault: str, tmp_path: Path) -> None:
    seen = run(fault, tmp_path)
    assert seen["answers"] > 0
    assert (seen["wrong"], seen["failed"], seen["left_behind"]) == ([], [], [])
    if fault == "kill":
        assert seen["moved"] > 0
    if fault == "flood":
        assert seen["refused"] > 0
        assert seen["figures"]["refused_2_s_after"] == 0
    else:
        assert seen["refused"] == 0
