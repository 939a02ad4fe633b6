"""The Markdown tables of kvaes.py, and the file that they are put into."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cells import Problem

from mixdist.report.metrics import table


def likelihoods(problems: Sequence[Problem], found: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of likelihoods of problems with the same columns."""
    columns, lines, names = problems[0].columns(), [], [problem.name for problem in problems]
    found = [known for known in found if known["problem"] in names]
    exact = any("exact_log_likelihood" in known["figures"]["test"] for known in found)
    digits = 3 if exact else 2
    for problem in problems:
        for seed in problem.seeds:
            own = {k["column"]: k for k in found if (k["problem"], k["seed"]) == (problem.name, seed)}
            first, title = own["kVAEs"], problem.title + (f", seed {seed}" if len(problem.seeds) > 1 else "")
            bar, nmi = "exact_log_likelihood", pair(first, 3, "nmi")
            units = [(title, 0.0), ("in units of rows as stored", first["add_for_stored_units"])]
            for name, add in units:
                if add is not None:
                    known = [pair(first, digits, bar, add)] if exact else []
                    lines.append([name, *known, *(pair(own[c], digits, add=add) for c in columns), "" if add else nmi])
    return markdown(["train / test", *(["exact density"] if exact else []), *columns, "NMI of kVAEs"], lines)


def costs(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of what cells took."""
    lines = []
    for known in found:
        counts = [f"{known[name]:,}" for name in ("parameters", "done")]
        lines.append([known["name"], *counts, f"{known['rate']:g}", *map(shown_seconds, known["seconds"].values())])
    headers = ["cell", "parameters", "sample-gradients", "learning rate", "s of training", "s of evaluation"]
    return markdown(headers, lines)


def markdown(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rows = [headers, ["---"] * len(headers), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def tuned(found: Sequence[Mapping[str, Any]]) -> str:
    """Return training likelihoods over learning rates, the best of each model marked."""
    rates = sorted({known["rate"] for known in found})
    lines = []
    for name in dict.fromkeys((known["problem"], known["column"]) for known in found):
        own = {k["rate"]: k["figures"]["train"]["log_likelihood"] for k in found if (k["problem"], k["column"]) == name}
        best = max(own, key=lambda rate: own[rate])
        lines.append([*name, *(f"{own[rate]:.3f}{'*' if rate == best else ''}" for rate in rates)])
    return table(["problem", "model", *(f"{rate:g}" for rate in rates)], lines)


def put(text: str, tables: Mapping[str, str]) -> str:
    """Put tables between their marks, ``<!-- NAME -->`` and ``<!-- end of NAME -->``.

    Raises:
        ValueError: a mark is missing.
    """
    for name, inner in tables.items():
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if not between.search(text):
            raise ValueError(f"the marks <!-- {name} --> and <!-- end of {name} --> are missing: add them")
        text = between.sub(lambda found, inner=inner: f"{found[1]}{inner}\n{found[2]}", text)  # type: ignore[misc]
    return text


def shown_seconds(seconds: float | None) -> str:
    """Return whole seconds; a dash where they are not known."""
    return "-" if seconds is None else f"{seconds:.0f}"


def pair(known: Mapping[str, Any], digits: int, name: str = "log_likelihood", add: float = 0.0) -> str:
    """Return the training and test figure."""
    of = [known["figures"][split][name] + add for split in ("train", "test") if split in known["figures"]]
    return " / ".join(f"{value:.{digits}f}" for value in of)
