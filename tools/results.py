"""The tables of results/README.md: `python -m tools.results` writes the page from results/*.csv. A test compares them.

`python -m tools.results commands [TABLE]` prints one `unigrpo sweep` command per cell; `python -m tools.results collect
DIR COMMIT` copies what its runs measured from DIR/TABLE/CELL into results/TABLE.csv; COMMIT is that of their code.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
RUNS = "runs"
RESAMPLES = 4000
GOAL = 1.4
"""A leaderboard's goal: this many times the score before training."""
FEWEST = 3
"""Seeds without which a claim gets no verdict."""
FIRST = ("cell", "seed", "steps", "samples", "train_seconds", "commit", "torch")
"""First columns of a table's CSV; scores before and after, and the verdicts of each prompt, follow."""


@dataclass(frozen=True)
class Table:
    """Cells that are compared.

    Args:
        reward: the trained rewards; the held-out verdicts of 0 or 1 of the last one are compared prompt by prompt.
        settings: `--set` texts of all cells; `cells` has those of each.
        figure: what is drawn: `curve`, the score over seconds of training, or a column, the score over it.
        claims: pairs of cells: the first scores above the second, or is above it in the column that is named third.
    """

    name: str
    title: str
    reward: str
    seeds: list[int]
    settings: list[str]
    claims: list[list[str]]
    cells: dict[str, list[str]]
    figure: str = ""

    def texts(self, cell: str) -> list[str]:
        """All `--set` texts of a cell."""
        return [*self.settings, *self.cells[cell]]

    def command(self, cell: str) -> str:
        seeds = ",".join(map(str, self.seeds))
        sets = " ".join(f"--set {text}" for text in self.texts(cell))
        return f"unigrpo sweep --reward {self.reward} --seeds {seeds} {sets} --out {RUNS}/{self.name}/{cell}"

    @property
    def judged(self) -> str:
        return self.reward.split(",")[-1]

    @property
    def path(self) -> Path:
        return RESULTS / f"{self.name}.csv"


def tables() -> list[Table]:
    return [Table(**table) for table in tomllib.loads((RESULTS / "tables.toml").read_text())["table"]]


# ----- from runs to CSV


def collect(table: Table, runs: Path, commit: str) -> str:
    """One row per finished run of a table, as CSV."""
    rows = [
        _row(table, cell, path.parent, commit)
        for cell in table.cells
        for path in sorted((runs / table.name / cell).glob("*/eval_after.json"))
    ]
    columns = list(FIRST) + sorted({key for row in rows for key in row} - {*FIRST, "verdicts"}) + ["verdicts"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: (list(table.cells).index(row["cell"]), row["seed"])))
    return text.getvalue()


def _row(table: Table, cell: str, run: Path, commit: str) -> dict[str, object]:
    summary = json.loads((run / "summary.json").read_text())
    config = tomllib.loads((run / "config.toml").read_text())
    before, after = (json.loads((run / f"eval_{when}.json").read_text()) for when in ("before", "after"))
    train, values = config["train"], after["values"][table.judged]
    assert set(values) <= {0.0, 1.0}, f"{run}: {table.judged} gives more than verdicts of 0 and 1"
    row: dict[str, object] = {
        "cell": cell,
        "seed": config["seed"],
        "steps": summary["steps"],
        "samples": summary["steps"] * train["prompts_per_step"] * train["group_size"],
        "train_seconds": round(summary["train_seconds"], 1),
        "commit": commit,
        "torch": json.loads((run / "environment.json").read_text())["torch"].split("+")[0],
    }
    for when, report in (("before", before), ("after", after)):
        row |= {f"{when}/{name}": round(score["mean"], 4) for name, score in report["scores"].items()}
    if config["eval"]["every"]:
        row["curve"] = " ".join(_curve(run, f"eval/{table.judged}"))
    return row | {"verdicts": "".join(str(int(value)) for value in values)}


def _curve(run: Path, metric: str) -> Iterator[str]:
    """Step, seconds of training until then and held-out score of each evaluation during training."""
    seconds = 0.0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        seconds += sum(value for key, value in row.items() if key.startswith("seconds/"))
        if metric in row:
            yield f"{row['step']}:{seconds:.1f}:{row[metric]:.4f}"


# ----- from CSV to the page


@dataclass(frozen=True)
class Cell:
    """The runs of a cell: `verdicts_SP` by seed and prompt, and the columns of its rows."""

    rows: list[dict[str, str]]
    verdicts_SP: NDArray[np.float64]

    def mean(self, column: str) -> float:
        return float(np.mean([float(row[column]) for row in self.rows]))


def read(table: Table, path: Path | None = None) -> dict[str, Cell]:
    """The cells that have rows in the table's CSV, or in another one."""
    with (path or table.path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for name in table.cells:
        own = [row for row in rows if row["cell"] == name]
        if own:
            found[name] = Cell(own, np.array([[float(v) for v in row["verdicts"]] for row in own]))
    return found


def interval(first: Cell, second: Cell | None = None) -> tuple[float, float, float]:
    """Mean of a cell, or of first - second, and its 95 % interval.

    Seeds are drawn with replacement, in each cell its own, and prompts, the same for both cells.
    """
    rng = np.random.default_rng(0)
    prompts = first.verdicts_SP.shape[1]
    means = np.empty(RESAMPLES)
    for k in range(RESAMPLES):
        chosen = rng.integers(prompts, size=prompts)
        means[k] = _drawn(first, chosen, rng) - (0.0 if second is None else _drawn(second, chosen, rng))
    mean = first.verdicts_SP.mean() - (0.0 if second is None else second.verdicts_SP.mean())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(mean), float(low), float(high)


def _drawn(cell: Cell, prompts: NDArray[np.int64], rng: np.random.Generator) -> float:
    seeds = rng.integers(len(cell.verdicts_SP), size=len(cell.verdicts_SP))
    return float(cell.verdicts_SP[seeds][:, prompts].mean())


def goal(row: dict[str, str], judged: str) -> tuple[str, str]:
    """The first evaluated step whose score is at least GOAL times the start, and the seconds of training until then."""
    for point in row.get("curve", "").split():
        step, seconds, score = point.split(":")
        if float(score) >= GOAL * float(row[f"before/{judged}"]):
            return step, seconds
    return "never", "never"


def verdict(low: float, high: float) -> str:
    """What a difference's interval says of the claim that it is positive."""
    return "holds" if low > 0 else "does not hold" if high < 0 else "cannot be told"


def _by_seed(first: str, second: str, cells: dict[str, Cell], column: str) -> str:
    """A claim on a mean without verdicts: it holds when each seed of the first cell is above each of the second."""
    ours, theirs = (sorted(float(row[f"after/{column}"]) for row in cells[name].rows) for name in (first, second))
    found = verdict(ours[0] - theirs[-1], ours[-1] - theirs[0])
    return (
        f"* {first} above {second} in {column}: {found} "
        f"({ours[0]:.3f} to {ours[-1]:.3f} against {theirs[0]:.3f} to {theirs[-1]:.3f})."
    )


def page() -> str:
    parts = [(RESULTS / "head.md").read_text().rstrip()]
    for table in tables():
        if table.path.is_file():
            parts.append("\n".join(_section(table)))
    return "\n\n".join(parts) + "\n"


def _section(table: Table) -> Iterator[str]:
    cells = read(table)
    others = sorted(
        {key.removeprefix("after/") for row in cells.values() for key in row.rows[0] if key.startswith("after/")}
    )
    others = [name for name in others if name != table.judged and "/" not in name]
    yield f"## {table.title}\n"
    yield f"`results/{table.path.name}`; intervals (95 %) over seeds and prompts.\n"
    heads = ["cell", "runs", "steps", "samples", "minutes", "start", table.judged, *others]
    timed = any(cell.rows[0].get("curve") for cell in cells.values())
    heads += [f"step of {GOAL} x start", "seconds until then"] if timed else []
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for name, cell in cells.items():
        mean, low, high = interval(cell)
        counts = [str(len(cell.rows)), f"{cell.mean('steps'):.0f}", f"{cell.mean('samples'):,.0f}"]
        minutes = f"{cell.mean('train_seconds') / 60:.2f}"
        scores = [f"{cell.mean(f'before/{table.judged}'):.3f}", f"{mean:.3f} [{low:.3f}, {high:.3f}]"]
        more = [f"{cell.mean(f'after/{other}'):.3f}" for other in others]
        goals = [", ".join(column) for column in zip(*(goal(row, table.judged) for row in cell.rows), strict=True)]
        yield "| " + " | ".join([name, *counts, minutes, *scores, *more, *(goals if timed else [])]) + " |"
    yield ""
    for first, second, *column in table.claims:
        if min(len(cells[name].rows) if name in cells else 0 for name in (first, second)) < FEWEST:
            yield f"* {first} above {second}: fewer than {FEWEST} seeds."
        elif column:
            yield _by_seed(first, second, cells, column[0])
        else:
            mean, low, high = interval(cells[first], cells[second])
            yield f"* {first} above {second}: {verdict(low, high)} ({mean:+.3f} [{low:+.3f}, {high:+.3f}])."
    if missing := [name for name in table.cells if name not in cells]:
        yield f"* Not run yet: {', '.join(missing)}."
    if table.figure:
        yield f"\n![{table.title}]({table.name}.png)"
    yield "\n```"
    yield from (table.command(name) for name in cells)
    yield "```"


# ----- figures


def figure_of(table: Table) -> Figure:
    """A line per run: its curve over seconds of training, or a point, its score over one of the columns."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes, curves = figure.subplots(), table.figure == "curve"
    for k, (name, cell) in enumerate(read(table).items()):
        for row in cell.rows:
            x, y = [0.0], [float(row[f"before/{table.judged}"])]
            for point in row.get("curve", "").split():
                _, seconds, score = point.split(":")
                x, y = [*x, float(seconds)], [*y, float(score)]
            if not curves:
                x, y = [float(row[f"after/{table.figure}"])], [float(row[f"after/{table.judged}"])]
            label = None if row is not cell.rows[0] else name
            axes.plot(x, y, "-" if curves else "o", color=f"C{k}", markersize=5, label=label)
    axes.set_xlabel("seconds of training" if curves else table.figure)
    axes.set_ylabel(f"held-out {table.judged}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def main(arguments: list[str]) -> None:
    match arguments:
        case []:
            for table in tables():
                if table.figure and table.path.is_file():
                    figure_of(table).savefig(table.path.with_suffix(".png"), dpi=110, metadata={"Software": None})
            (RESULTS / "README.md").write_text(page())
        case ["commands", *names]:
            for table in tables():
                if not names or table.name in names:
                    print(*(table.command(cell) for cell in table.cells), sep="\n")
        case ["collect", runs, commit]:
            for table in tables():
                if any((Path(runs) / table.name).glob("*/*/eval_after.json")):
                    table.path.write_text(collect(table, Path(runs), commit))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
