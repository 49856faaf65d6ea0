"""The tables of a run on a device, in Markdown, from what its file holds: the screen and data/gpu show the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from minilora.memory import format_bytes
from minilora.storage.files import naming, read_json

Row = dict[str, Any]
GOAL = 0.03  # how far the simulation may be off


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def checks_table(rows: list[Row]) -> str:
    """One line for each path, both dtypes beside each other."""
    paths: dict[str, list[Row]] = {}
    for row in rows:
        paths.setdefault(row["path"], []).append(row)

    def cell(row: Row) -> str:
        off = "not finite" if row["deviation"] is None else f"{row['deviation']:.1e}"
        return f"{off} of {row['limit']:.0e}" + ("" if row["held"] else f", **no**: {row['worst']}")

    dtypes = [row["dtype"] for row in next(iter(paths.values()))]
    return table(["fast path", *dtypes], [[path, *map(cell, found)] for path, found in paths.items()])


def times_table(rows: list[Row]) -> str:
    def cells(row: Row) -> list[str]:
        name = f"{row['name']}, batch {row['rows']}" if "rows" in row else row["name"]
        ratio = f"{row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
        return [name, f"{1000 * row['seconds']:,.1f}", f"{row['tokens_per_second']:,.0f}", ratio]

    return table(["", "ms", "tokens/s", f"ratio to {rows[0]['over']}"], [cells(row) for row in rows])


def memory_table(rows: list[Row]) -> str:
    kinds = ("simulated", "metered", "workspaces", "requested", "allocated", "reserved")
    names = [name for name in kinds if name in rows[0]]

    def cells(row: Row) -> list[str]:
        ways = ", checkpointing" if row["checkpointing"] else ""
        what = f"{row['method']}{ways}, {row['parameters'] / 1e9:.2f}B, {row['batch_size']} x {row['tokens']}"
        verdict = "" if abs(row["deviation"]) <= GOAL else f", above {GOAL:.0%}"
        return [what, *(format_bytes(row[name]) for name in names), f"{row['deviation']:+.1%}{verdict}"]

    return table(["step, bfloat16", *names, "off"], [cells(row) for row in rows])


def ratios_table(rows: list[Row]) -> str:
    cells = [[row["claim"], f"{row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"] for row in rows]
    return table(["over the base alone", "ratio"], cells)


TABLES: dict[str, Callable[[list[Row]], str]] = {  # by a column that rows of no other kind have
    "path": checks_table,
    "over": times_table,
    "simulated": memory_table,
    "claim": ratios_table,
}


def section_text(name: str, section: dict[str, Any]) -> str:
    """The heading, the table of the rows that there are, and the error if there is one."""
    rows, lines = section["rows"], [f"**{name}** ({section['seconds']:.0f} s)"]
    if rows:
        lines.append(next(make for column, make in TABLES.items() if column in rows[0])(rows))
    elif "error" not in section:
        lines.append("Nothing measured: transformers and PEFT are not installed.")
    if "error" in section:
        lines.append(f"Failed: {section['error']}")
    return "\n\n".join(lines) + "\n"


def failed(record: dict[str, Any]) -> bool:
    """Whether a section failed or a fast path is wrong. A simulation that is off, or a high ratio, is a finding."""
    sections = record["sections"].values()
    return any("error" in section or not all(row.get("held", True) for row in section["rows"]) for section in sections)


def markdown(record: dict[str, Any]) -> str:
    """Every table, below the machine and the versions."""
    place, settings = record["machine"], record["settings"]
    memory = f" ({format_bytes(place['memory'])}, driver {place.get('driver', 'unknown')})" if "memory" in place else ""
    versions = [f"{name} {place[name]}" for name in ("torch", "python", "transformers", "peft") if name in place]
    shape = (
        f"{settings['num_hidden_layers']} layers, {settings['hidden_size']} wide, vocabulary {settings['vocab_size']}, "
        f"batch {settings['batch_size']} x {settings['sequence_length']}, r={settings['r']}, "
        f"median of {settings['rounds']} rounds in turn, float32 products at precision {place['float32_products']!r}"
    )
    head = f"{place['name']}{memory}, {', '.join(versions)}, {record['date']}. {shape}."
    return "\n".join([head, "", *(section_text(name, found) for name, found in record["sections"].items())]).rstrip()


def show(path: Path) -> str:
    """The tables of a file. FileNotFoundError for none, ValueError for a file of something else."""
    record = read_json(path)
    with naming(f"{path} is not the file of a run of bench on a device"):
        try:
            return markdown(record)
        except (KeyError, TypeError, AttributeError, StopIteration) as error:
            raise ValueError(f"{type(error).__name__} {error}") from None
