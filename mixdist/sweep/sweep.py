"""Running the cells of a sweep, choosing settings on valid rows, and what is told of it all."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mixdist.config.parsing import RESOLVED, read_config
from mixdist.sweep.cells import Cells, Record
from mixdist.sweep.grid import Variant
from mixdist.sweep.headlines import headlines
from mixdist.sweep.plan import Plan
from mixdist.sweep.processes import Stopped
from mixdist.sweep.table import Spread, Table, describe, difference, figure_table, shared_figures, spread, with_error
from mixdist.training.checkpoint import checkpoints_in
from mixdist.training.selection import check_choice, implied_mode

Task = tuple[Variant, int, Sequence[str]]
"""A variant, a seed, and the splits to evaluate."""


@dataclass
class Sweep:
    """What became of a sweep's cells.

    Args:
        plan: what was to be run.
        cells: where it is run.
        records: of each finished cell, by variant and seed.
        failed: why a cell failed, by its name.
        chosen: the setting of each system that the table is of; None where no setting could be chosen.
    """

    plan: Plan
    cells: Cells
    records: dict[str, dict[int, Record]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, Variant | None] = field(default_factory=dict)

    def run(self, jobs: int) -> None:
        """Run all cells: first all that is trained, then chosen settings on the rows of the table.

        Raises:
            KeyboardInterrupt: everything that ran has ended.
        """
        plan, seeds = self.plan, range(self.plan.seeds)
        splits = {one.folder: ("valid",) if plan.chooses(one) else plan.splits for one in plan.variants()}
        self._run([(one, seed, splits[one.folder]) for one in plan.variants() for seed in seeds], jobs)
        for name, variants in plan.systems.items():
            self.chosen[name] = self._choose(variants) if len(variants) > 1 else variants[0]
        late = [one for one in self.chosen.values() if one and plan.chooses(one)]
        self._run([(one, seed, plan.splits) for one in late for seed in seeds], jobs)

    def _run(self, tasks: Sequence[Task], jobs: int) -> None:
        with ThreadPoolExecutor(jobs) as pool:
            futures = {pool.submit(self.cells.finish, *task): task for task in tasks}
            try:
                for number, future in enumerate(as_completed(futures), start=1):
                    self._keep(future, futures[future], f"[{number}/{len(tasks)}]")
            except BaseException:
                for future in futures:
                    future.cancel()
                self.cells.processes.end()
                raise

    def _keep(self, future: Future[Record], task: Task, count: str) -> None:
        """Take what came of a cell, and tell it."""
        variant, seed, splits = task
        name = variant.run(seed)
        try:
            record = future.result()
        except Stopped:
            return
        except (ValueError, OSError) as error:
            self.failed[name] = str(error)
            self.cells.tell(f"{count} {name} failed: {error}")
            return
        self.records.setdefault(variant.folder, {})[seed] = record
        seconds = record["seconds"]
        took = [f"{s:.0f} s" for s in (seconds["train"], *seconds["evaluate"].values()) if s is not None]
        figures = record["figures"].get(splits[0], {})
        shown = [f"{figure} {figures[figure]:.4g}" for figure in headlines(list(figures))[:1]]
        self.cells.tell(f"{count} {name}: {', '.join([*shown, ' + '.join(took)])}")

    def _choose(self, variants: Sequence[Variant]) -> Variant | None:
        """Return the setting with the best mean on valid rows, the first of equals; None where none can be chosen."""
        try:
            return self._best(variants, self.select(variants))
        except ValueError as why:
            self.failed[variants[0].system] = str(why)
            return None

    def _best(self, variants: Sequence[Variant], figure: str | None) -> Variant:
        found = [(one, own) for one in variants if figure and (own := self.on_valid(one, figure))]
        if figure is None or not found:
            known = ", ".join(shared_figures(self._of(variants), "valid"))
            raise ValueError(
                f"none of its settings has {figure or 'a figure'} on valid rows for all seeds"
                + (f": choose another with --select, of {known}" if known else "")
            )
        first = found[0][0]
        for one, _ in found[1:]:
            key = difference(self.records[one.folder], self.records[first.folder], "valid", figure)
            if isinstance(key, str):
                raise ValueError(f"{first.name} and {one.name} cannot be compared by {figure}: {key} differs")
        check_choice(figure, self.plan.mode, "--select", "--mode")
        mode = self.plan.mode or implied_mode(figure)
        if mode is None:
            raise ValueError(f"{figure} may be to be small or large: say which, as --mode min")
        return (min if mode == "min" else max)(found, key=lambda pair: pair[1].mean)[0]

    def select(self, variants: Sequence[Variant]) -> str | None:
        """Return the figure by which a setting is chosen."""
        if self.plan.select:
            return self.plan.select
        return next(iter(headlines(shared_figures(self._of(variants), "valid"))), None)

    def on_valid(self, variant: Variant, figure: str) -> Spread | None:
        """Return a figure of a setting on valid rows; None where some seed lacks it."""
        found = spread(self.records.get(variant.folder, {}), "valid", figure)
        return found if found and len(found.values) == self.plan.seeds else None

    def _of(self, variants: Sequence[Variant]) -> dict[str, dict[int, Record]]:
        return {one.name: self.records[one.folder] for one in variants if one.folder in self.records}

    @property
    def rows(self) -> dict[str, dict[int, Record]]:
        """The records of each row of the table, by its name and by seed."""
        chosen = {name: one for name, one in self.chosen.items() if one}
        found = {name: self.records.get(one.folder, {}) for name, one in chosen.items()}
        return found | {one.name: self.records.get(one.folder, {}) for one in self.plan.baselines}

    def gradients(self) -> dict[str, float]:
        """Return, by row, how often a training row is in the gradient of an expert, as its runs' config has it."""
        found = {}
        for name, records in self.rows.items():
            runs = [self.cells.folder / record["name"] for record in records.values()]
            for path in [run / RESOLVED for run in runs if checkpoints_in(run / "checkpoints")][:1]:
                with suppress(ValueError):  # a class that is no longer there
                    config = read_config(path)
                    found[name] = sum(config.mixture.gradients([*config.pretrain, config.train]))
        return found

    def tables(self, figures: Sequence[str] | None, against: str | None) -> list[Table]:
        """Return the tables to show: the settings on valid rows, then each figure of each split.

        Args:
            figures: to show; None for those that tables usually show.
            against: the row that others are compared with; None for the first.

        Raises:
            ValueError: no two rows have a figure in common, or none has one that is asked for.
        """
        shown = [table for variants in self.plan.systems.values() if (table := self._settings_table(variants))]
        rows = self.rows
        for split in self.plan.splits:
            own = {name: shared_figures({name: records}, split) for name, records in rows.items() if records}
            there = ", ".join(dict.fromkeys(figure for names in own.values() for figure in names))
            for figure in figures or ():
                if not any(figure in names for names in own.values()):
                    raise ValueError(f"--figures {figure} is no figure of {split} rows: choose from {there}")
            wanted = figures or headlines(shared_figures(rows, split))
            if own and not wanted:
                raise ValueError(f"{', '.join(own)} have no figures in common on {split} rows: there are {there}")
            shown += [figure_table(rows, split, figure, against) for figure in wanted]
        return shown

    def _settings_table(self, variants: Sequence[Variant]) -> Table | None:
        figure = self.select(variants) if len(variants) > 1 else None
        if not figure:
            return None
        chosen, lines = self.chosen[variants[0].system], []
        for one in variants:
            setting = " ".join(f"{keys}={value}" for keys, value in one.setting.items())
            found = spread(self.records.get(one.folder, {}), "valid", figure)
            mean, number = (with_error(found), len(found.values)) if found else ("-", 0)
            lines.append([setting, str(number), mean, "chosen" if one is chosen else ""])
        title = f"{variants[0].system}: settings by {figure}, valid rows"
        return Table(title, ["setting", "seeds", "mean ± s.e.", ""], lines)

    def describe(self, against: str | None) -> dict[str, Any]:
        """Return, as JSON, all that is known."""
        systems = self.plan.systems.items()
        return {
            "sweep": self.plan.describe(),
            "figures": {split: describe(self.rows, split, against) for split in self.plan.splits},
            "gradients_a_row": self.gradients(),
            "settings": {name: self._settings(variants) for name, variants in systems if len(variants) > 1},
            "cells": {r["name"]: r for records in self.records.values() for _, r in sorted(records.items())},
            "failed": self.failed,
        }

    def _settings(self, variants: Sequence[Variant]) -> dict[str, Any]:
        chosen, figure = self.chosen[variants[0].system], self.select(variants)
        of = {one.name: describe(self._of([one]), "valid", None) for one in variants}
        return {"chosen": chosen and dict(chosen.setting), "by": figure, "valid": of}
