"""Where the shared data is: real tokenizers, small real models and real data files.

The one place that computes the folder. Tests use the fixture `shared`; a module that needs the data
while its tests are collected uses `SHARED_DATA` and the marker `needs_shared_data`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
SHARED = Path(os.environ.get("QLORA_SHARED", ROOT.parent / "shared"))
"""$QLORA_SHARED, or the folder `shared` next to the checkout. It may be absent."""
SHARED_DATA = SHARED / "data"
MISSING = f"no shared data in {SHARED}; set QLORA_SHARED"
"""Why a test that needs the data is skipped."""

needs_shared_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=MISSING)
