"""The tables of results/README.md: `python -m tools.results` writes the page from results/*.csv. A test compares them.

`python -m tools.results commands [TABLE]` prints one `unigrpo sweep` command per cell; `python -m tools.results collect
DIR COMMIT` copies what its runs measured from DIR/TABLE/CELL into results/TABLE.csv; COMMIT is that of their code, and
rows that are there already with the same scores keep theirs.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
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
CONTROL = "shuffled"
"""How the names of cells end whose advantages are permuted over episodes: they are not to rise."""
FIRST = ("cell", "seed", "steps", "samples", "train_seconds", "commit", "torch", "rise")
"""First columns of a table's CSV; scores before and after, and those of each prompt, follow."""


@dataclass(frozen=True)
class Claim:
    """A sentence that holds when the first cell is above the second, in the judged score or in the column `by`.

    Args:
        paired: runs of one seed have the same weights in both cells, so their seeds are drawn together.
    """

    says: str
    above: tuple[str, str]
    by: str = ""
    paired: bool = False


@dataclass(frozen=True)
class Table:
    """Cells that are compared.

    Args:
        reward: the trained rewards; the held-out scores of the last one are compared prompt by prompt.
        settings: `--set` texts of all cells; `cells` has those of each.
        before: commands that make what cells start from.
        figure: what is drawn: `curve`, the score over seconds of training, or a column, the score over it.
    """

    name: str
    title: str
    reward: str
    seeds: list[int]
    settings: list[str]
    cells: dict[str, list[str]]
    claims: list[Claim] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    figure: str = ""

    def texts(self, cell: str) -> list[str]:
        """All `--set` texts of a cell."""
        return [*self.settings, *self.cells[cell]]

    def command(self, cell: str) -> str:
        seeds = ",".join(map(str, self.seeds))
        sets = " ".join(f"--set {shlex.quote(text)}" for text in self.texts(cell))
        return f"unigrpo sweep --reward {self.reward} --seeds {seeds} {sets} --out {RUNS}/{self.name}/{cell}"

    @property
    def judged(self) -> str:
        return self.reward.split(",")[-1]

    @property
    def path(self) -> Path:
        return RESULTS / f"{self.name}.csv"


def tables() -> list[Table]:
    found = tomllib.loads((RESULTS / "tables.toml").read_text())["table"]
    return [Table(**table | {"claims": [Claim(**claim) for claim in table.get("claims", ())]}) for table in found]


# ----- from runs to CSV


def collect(table: Table, runs: Path, commit: str) -> str:
    """One row per finished run of a table, as CSV."""
    rows = [
        _row(table, cell, path.parent, commit)
        for cell in table.cells
        for path in sorted((runs / table.name / cell).glob("*/eval_after.json"))
    ]
    known = read(table) if table.path.is_file() else {}
    for row in rows:
        for before in known[row["cell"]].rows if row["cell"] in known else ():
            if before["seed"] == str(row["seed"]) and before["values"] == row["values"]:
                row["commit"] = before["commit"]
    columns = list(FIRST) + sorted({key for row in rows for key in row} - {*FIRST, "values"}) + ["values"]
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
    rise = summary["difference"][table.judged]
    low, high = rise["ci95"]
    row: dict[str, object] = {
        "cell": cell,
        "seed": config["seed"],
        "steps": summary["steps"],
        "samples": summary["steps"] * train["prompts_per_step"] * train["group_size"],
        "train_seconds": round(summary["train_seconds"], 1),
        "commit": commit,
        "torch": json.loads((run / "environment.json").read_text())["torch"].split("+")[0],
        "rise": f"{rise['mean']:.4f}:{low:.4f}:{high:.4f}",
    }
    for when, report in (("before", before), ("after", after)):
        row |= {f"{when}/{name}": round(score["mean"], 4) for name, score in report["scores"].items()}
    if config["eval"]["every"]:
        row["curve"] = " ".join(_curve(run, f"eval/{table.judged}"))
    return row | {"values": _written(values)}


def _written(values: list[float]) -> str:
    """A digit per prompt where all are verdicts of 0 and 1, else a decimal."""
    if set(values) <= {0.0, 1.0}:
        return "".join(str(int(value)) for value in values)
    return " ".join(f"{value:.3f}" for value in values)


def _values(text: str) -> list[float]:
    return [float(value) for value in (text.split() if "." in text else text)]


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
    """The runs of a cell: `values_SP` by seed and prompt, and the columns of its rows."""

    rows: list[dict[str, str]]
    values_SP: NDArray[np.float64]

    def of_seeds(self, seeds: set[str]) -> Cell:
        """The runs of these seeds."""
        kept = [k for k, row in enumerate(self.rows) if row["seed"] in seeds]
        return Cell([self.rows[k] for k in kept], self.values_SP[kept])

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
            found[name] = Cell(own, np.array([_values(row["values"]) for row in own]))
    return found


def interval(first: Cell, second: Cell | None = None, paired: bool = False) -> tuple[float, float, float]:
    """Mean of a cell, or of first - second, and its 95 % interval.

    Seeds are drawn with replacement, in each cell its own unless paired, and prompts, the same for both cells.
    """
    prompts_RP, seeds_RS = _drawn(0, first.values_SP.shape[1]), _drawn(1, len(first.values_SP))
    means_R = ((seeds_RS @ first.values_SP) * prompts_RP).sum(axis=1)
    if second is not None:
        if not paired:
            seeds_RS = _drawn(2, len(second.values_SP))
        means_R -= ((seeds_RS @ second.values_SP) * prompts_RP).sum(axis=1)
    mean = first.values_SP.mean() - (0.0 if second is None else second.values_SP.mean())
    low, high = np.percentile(means_R, [2.5, 97.5])
    return float(mean), float(low), float(high)


@cache
def _drawn(stream: int, count: int) -> NDArray[np.floating]:
    """Shares of `count` things in RESAMPLES draws of as many with replacement."""
    rng = np.random.default_rng(stream)
    return rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count


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


def _judged(claim: Claim, cells: dict[str, Cell]) -> tuple[str, str]:
    """The verdict on a claim over the seeds that both cells have, and by how much.

    On a column without values of each prompt it holds when each seed of the first cell is above each of the second.
    """
    found = [cells[name] for name in claim.above if name in cells]
    common = set.intersection(*({row["seed"] for row in cell.rows} for cell in found)) if len(found) == 2 else set()
    if len(common) < FEWEST:
        return f"fewer than {FEWEST} seeds", ""
    first, second = (cell.of_seeds(common) for cell in found)
    if claim.by:
        ours, theirs = (sorted(float(row[f"after/{claim.by}"]) for row in cell.rows) for cell in (first, second))
        ranges = f"{claim.by} {ours[0]:.3f} to {ours[-1]:.3f} against {theirs[0]:.3f} to {theirs[-1]:.3f}"
        return verdict(ours[0] - theirs[-1], ours[-1] - theirs[0]), f"{ranges}, {len(common)} seeds"
    mean, low, high = interval(first, second, claim.paired)
    return verdict(low, high), f"{mean:+.3f} [{low:+.3f}, {high:+.3f}], {len(common)} seeds"


def page() -> str:
    done = [table for table in tables() if table.path.is_file()]
    parts = [(RESULTS / "head.md").read_text().rstrip()]
    parts += ["\n".join(_section(table)) for table in done]
    parts.append(
        "\n".join(
            ["## What does not hold, or cannot be told\n", *(line for table in done for line in _failures(table))]
        )
    )
    return "\n\n".join(parts) + "\n"


def _failures(table: Table) -> Iterator[str]:
    """Claims that do not hold or cannot be told, cells in which not every run rises, a control in which one does."""
    cells = read(table)
    for claim in table.claims:
        found, amount = _judged(claim, cells)
        if amount and found != "holds":
            yield f"* {table.title}. {claim.says}: {found} ({amount})."
    for name, cell in cells.items():
        clear = _rising(cell)
        if clear > 0 if name.endswith(CONTROL) else clear < len(cell.rows):
            mean, low, high = interval(cell)
            change = f"{cell.mean(f'before/{table.judged}'):.3f} to {mean:.3f} [{low:.3f}, {high:.3f}]"
            yield f"* {table.title}. `{name}` rises clearly in {clear} of {len(cell.rows)} runs: {change}."


def _rising(cell: Cell) -> int:
    """Runs whose own rise has an interval over prompts above 0."""
    return sum(float(row["rise"].split(":")[1]) > 0 for row in cell.rows)


def _section(table: Table) -> Iterator[str]:
    cells = read(table)
    others = sorted(
        {key.removeprefix("after/") for row in cells.values() for key in row.rows[0] if key.startswith("after/")}
    )
    others = [name for name in others if name != table.judged and "/" not in name]
    yield f"## {table.title}\n"
    commits = ", ".join(sorted({row["commit"] for cell in cells.values() for row in cell.rows}))
    yield f"`results/{table.path.name}`, of {commits}; intervals (95 %) over seeds and prompts.\n"
    heads = ["cell", "runs", "steps", "samples", "minutes", "start", table.judged, "rises clearly", *others]
    timed = any(cell.rows[0].get("curve") for cell in cells.values())
    heads += [f"step of {GOAL} x start", "seconds until then"] if timed else []
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for name, cell in cells.items():
        mean, low, high = interval(cell)
        counts = [str(len(cell.rows)), f"{cell.mean('steps'):.0f}", f"{cell.mean('samples'):,.0f}"]
        minutes = f"{np.median([float(row['train_seconds']) for row in cell.rows]) / 60:.2f}"
        scores = [f"{cell.mean(f'before/{table.judged}'):.3f}", f"{mean:.3f} [{low:.3f}, {high:.3f}]"]
        scores += [f"{_rising(cell)} of {len(cell.rows)}"]
        more = [f"{cell.mean(f'after/{other}'):.3f}" if cell.rows[0].get(f"after/{other}") else "" for other in others]
        goals = [", ".join(column) for column in zip(*(goal(row, table.judged) for row in cell.rows), strict=True)]
        yield "| " + " | ".join([name, *counts, minutes, *scores, *more, *(goals if timed else [])]) + " |"
    yield ""
    for claim in table.claims:
        found, amount = _judged(claim, cells)
        yield f"* {claim.says}: **{found}**. {' - '.join(claim.above)}{amount and f': {amount}'}"
    if missing := [name for name in table.cells if name not in cells]:
        yield f"* Not run yet: {', '.join(missing)}."
    if table.figure:
        yield f"\n![{table.title}]({table.name}.png)"
    yield "\n```"
    yield from [*table.before, *(table.command(name) for name in cells)]
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
                    print(*table.before, *(table.command(cell) for cell in table.cells), sep="\n")
        case ["collect", runs, commit]:
            for table in tables():
                if any((Path(runs) / table.name).glob("*/*/eval_after.json")):
                    table.path.write_text(collect(table, Path(runs), commit))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
