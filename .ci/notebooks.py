"""Executes the committed notebooks, cell by cell as they are. The results are thrown away: it only has to work.

One process for each processor, each notebook with one thread: small models gain little from a second one.
"""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parents[1] / "notebooks"
LONGEST = "06_a_real_model"


def execute(path: Path) -> bool:
    began = time.perf_counter()
    client = NotebookClient(
        nbformat.read(path, as_version=4),
        timeout=1800,  # seconds a cell
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
    )
    try:
        client.execute()
        outcome = "passed"
    except CellExecutionError as error:
        outcome = f"FAILED\n{error}"
    print(f"{path.name}: {outcome} after {time.perf_counter() - began:.0f} s", flush=True)
    return outcome == "passed"


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # of the kernels
    with ProcessPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        # The longest, begun first, leaves no processor idle at the end.
        books = sorted(sorted(FOLDER.glob("*.ipynb")), key=lambda path: path.stem != LONGEST)
        sys.exit(not all(list(pool.map(execute, books))))
