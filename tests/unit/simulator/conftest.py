import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def testbed_traces() -> Path:
    """The folder with PIAS's testbed traces and results (GPL-2.0, not part of this project)."""
    given = os.environ.get("FABRICPILOT_TRACES")
    folder = Path(given) if given else Path(__file__).parents[3] / "../shared/data/pias-testbed"
    if not (folder / "websearch_7_trace.txt").is_file():
        pytest.skip(f"PIAS testbed traces: none in {folder}; set FABRICPILOT_TRACES")
    return folder
