"""The results as JSON, with all rounds, and as a Markdown table."""

import json
import statistics

from benchmarks import rows

HEADER = "| what | backend | of | beside | median | spread | to reach | reached |"


def write(folder, about, items):
    results = {**about, "rows": [], "curves": []}
    for item in items:
        results["rows" if item["kind"] == "row" else "curves"].append(item)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "results.md").write_text(_page(about, results["rows"]))


def _page(about, table):
    aimed = [row for row in table if row["target"] is not None]
    others = [row for row in table if row["target"] is None]
    kept = sum(bool(rows.reached(row)) for row in aimed)
    versions = ", ".join(
        f"{name} {version}" for name, version in about["versions"].items() if version
    )
    lines = [
        f"Measured on {about['date']} at commit {about['commit']}, in {about['rounds']} rounds, on "
        f"{about['cores']} cores of {about['cpu']} with {about['memory']}; Python {about['python']}, {versions}.",
        "",
        "A ratio below 1 means that what is in the third column took less. The spread is from the smallest to the "
        "largest of all rounds.",
        "",
        f"Figures with a target, of which {kept} of {len(aimed)} are reached:",
        "",
        *_table(aimed),
        "",
        "What else was measured:",
        "",
        *_table(others),
    ]
    return "\n".join(lines) + "\n"


def _table(table):
    lines = [HEADER, "| --- " * (HEADER.count("|") - 1) + "|"]
    for row in table:
        cells = [row["what"], row["backend"], row["subject"], row["rival"] or "-", *_numbers(row)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def _numbers(row):
    reached = {None: "-", True: "yes", False: "no"}[rows.reached(row)]
    if not row["values"]:
        return [row["note"], "-", _target(row), reached]
    unit = row["unit"] if row["unit"] == "x" else f" {row['unit']}".rstrip()
    low, high = min(row["values"]), max(row["values"])
    spread = "-" if len(row["values"]) == 1 else f"{_number(low)} to {_number(high)}"
    middle = statistics.median(row["values"])
    return [f"{_number(middle)}{unit}", spread, _target(row), reached]


def _target(row):
    if row["target"] is None:
        return "-"
    low, high = row["target"]
    if low is None:
        return f"<= {high}"
    return f"{high}" if low == high else f"{low} to {high}"


def _number(value):
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
