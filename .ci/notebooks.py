"""Executes the committed notebooks, cell by cell as they are. The results are thrown away: it only has to work."""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

folder = Path(__file__).parents[1] / "notebooks"
failed = []
for path in sorted(folder.glob("*.ipynb")):
    began = time.perf_counter()
    client = NotebookClient(
        nbformat.read(path, as_version=4),
        timeout=900,  # seconds a cell
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    try:
        client.execute()
        outcome = "passed"
    except CellExecutionError as error:
        outcome = f"FAILED\n{error}"
        failed.append(path.name)
    print(f"{path.name}: {outcome} after {time.perf_counter() - began:.0f} s", flush=True)
sys.exit(1 if failed else 0)
