#!/usr/bin/env python3
"""plot.py - bench_scale's JSON as pictures.

bench/scale/plot.py scale.json PREFIX     PREFIX-strong.svg, -weak.svg, -exchange.svg, -mla.svg; also as .png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

Result = dict[str, Any]


def by_case(results: list[Result], table: str) -> dict[str, list[Result]]:
    cases: dict[str, list[Result]] = {}
    for result in results:
        if result["table"] == table:
            cases.setdefault(result["case"], []).append(result)
    return {name: sorted(rows, key=lambda row: row["ranks"]) for name, rows in cases.items()}


def curve(axes: Axes, name: str, rows: list[Result]) -> None:
    """Ratio to one rank; bars: from the slowest to the fastest tenth of the steps."""
    one = next((row["device_us"]["p50"] for row in rows if row["ranks"] == 1), None)
    if one is None:
        return
    ranks = [row["ranks"] for row in rows]
    ratio = [one / row["device_us"]["p50"] for row in rows]
    low = [r - one / row["device_us"]["p90"] for r, row in zip(ratio, rows, strict=True)]
    high = [one / row["device_us"]["p10"] - r for r, row in zip(ratio, rows, strict=True)]
    axes.errorbar(ranks, ratio, yerr=[low, high], marker="o", capsize=3, label=name)


def scaling(data: dict[str, Any], table: str, title: str, unit: str) -> plt.Figure | None:
    cases = by_case(data["results"], table)
    if not cases:
        return None
    figure, axes = plt.subplots(figsize=(7.5, 5))
    for name, rows in cases.items():
        curve(axes, name, rows)
    ranks = sorted({row["ranks"] for rows in cases.values() for row in rows})
    ideal = ranks if table == "strong" else [1.0] * len(ranks)
    axes.plot(ranks, ideal, "k--", linewidth=1, label="ideal")
    axes.set_xticks(ranks, [str(n) for n in ranks])
    axes.set(xlabel="ranks", ylabel=unit, title=title, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def exchange(data: dict[str, Any]) -> plt.Figure | None:
    rows = [row for row in data["results"] if row["table"] == "exchange" and row["ranks"] > 1]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(7.5, 5))
    for n in sorted({row["ranks"] for row in rows}):
        mine = sorted((row for row in rows if row["ranks"] == n), key=lambda row: row["sent_bytes_per_rank"])
        sizes = [row["sent_bytes_per_rank"] for row in mine]
        axes.plot(
            sizes,
            [row["exchange_us"]["p50"] for row in mine],
            marker="o",
            label=f"{n} ranks: exchange + merge",
        )
        axes.plot(
            sizes,
            [row["us_over_one_rank"] for row in mine],
            ":",
            marker=".",
            label=f"{n}: over one rank",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="bytes sent by a rank", ylabel="us", title="Exchange and merge of partial states")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return figure


def latents(data: dict[str, Any]) -> plt.Figure | None:
    """Tokens a second of each mode, with the largest batch that it has room for."""
    cases = by_case(data["results"], "mla")
    if not cases:
        return None
    figure, axes = plt.subplots(figsize=(7.5, 5))
    for name, rows in cases.items():
        ranks = [row["ranks"] for row in rows]
        axes.plot(ranks, [row["tokens_per_second"] for row in rows], marker="o", label=name)
        for row in rows:
            axes.annotate(
                f"{row['items']} x, {row['kv_bytes_per_token']:.0f} B",
                (row["ranks"], row["tokens_per_second"]),
                fontsize=6,
                xytext=(4, 4),
                textcoords="offset points",
            )
    axes.set_xticks(sorted({row["ranks"] for rows in cases.values() for row in rows}))
    axes.set(
        xlabel="ranks",
        ylabel="tokens/s",
        title="MLA, 128 heads, 61 layers: batch that fits, bytes a token and device",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    data = json.loads(Path(sys.argv[1]).read_text())
    where = f"{data['ranks']} ranks, {data['device']}, {data['exchange'].split(',')[0]}"
    figures = {
        "strong": scaling(
            data, "strong", f"Strong scaling, a decode step ({where})", "speed-up over one rank"
        ),
        "weak": scaling(data, "weak", f"Weak scaling, a decode step ({where})", "time of one rank / time"),
        "exchange": exchange(data),
        "mla": latents(data),
    }
    for name, figure in figures.items():
        for kind in ("svg", "png"):
            if figure is not None:
                figure.savefig(f"{sys.argv[2]}-{name}.{kind}", dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
