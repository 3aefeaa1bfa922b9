"""The report: a table of bars met and missed, tables of the underlying figures, and plots.

Depends on the names of the figures only, so that a report can be made of any results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from benchmarks.figures import Figure, Figures
from benchmarks.peers import PEERS

mpl.use("Agg")
from matplotlib import pyplot as plt

WORKLOADS = {
    "shipped": "the shipped model",
    "flow": "the shipped transformer",
    "sd15": "Stable Diffusion 1.5's size, random weights",
}
LEVELS = (1, 2, 4, 8, 16, 32)
_SHORT_BEHIND_LONG = "p95_short_behind_long_hypergen_over_ours"


@dataclass(frozen=True)
class Bar:
    """The lowest value that a figure must reach, or the highest if less is better."""

    name: str
    words: str
    bar: float
    at_most: bool = False

    def verdict(self, figures: Figures) -> str:
        """`met`, `missed`, or why it was not measured."""
        value = figures.get(self.name)
        if not isinstance(value, (int, float)):
            return _cell(figures.get(f"{self.name}_failed", "not measured"))
        return "met" if (value <= self.bar if self.at_most else value >= self.bar) else "**missed**"


BARS = (
    Bar("floor_over_ours_one_image_shipped", "floor ÷ ours, one image, shipped", 0.85),
    Bar("floor_over_ours_one_image_sd15", "floor ÷ ours, one image, SD 1.5-sized", 0.97),
    Bar("hypergen_over_ours_one_image_shipped", "HyperGen 0.1.0 ÷ ours, one image, shipped", 4),
    Bar("hypergen_over_ours_one_image_sd15", "HyperGen 0.1.0 ÷ ours, one image, SD 1.5-sized", 4),
    Bar("hypergen_over_ours_one_image_shipped_one_core_busy", "the same, one core busy, shipped", 4),
    Bar("hypergen_over_ours_one_image_sd15_one_core_busy", "the same, one core busy, SD 1.5-sized", 4),
    Bar("throughput_ours_over_hypergen_8_in_flight_shipped", "throughput ours ÷ HyperGen, 8 in flight", 3),
    Bar("p95_short_behind_long_hypergen_over_ours_shipped", "p95 of 4 steps behind eight of 50, HyperGen ÷ ours", 8),
    Bar("openvino_genai_over_ours_one_image_shipped", "OpenVINO GenAI ÷ ours, one image, shipped", 0.95),
    Bar("openvino_genai_over_ours_one_image_sd15", "OpenVINO GenAI ÷ ours, one image, SD 1.5-sized", 0.95),
    Bar(
        "throughput_ours_over_openvino_genai_8_in_flight_shipped", "throughput ours ÷ OpenVINO GenAI, 8 in flight", 1.1
    ),
    Bar("stable_diffusion_cpp_over_ours_one_image_sd15", "stable-diffusion.cpp ÷ ours, SD 1.5-sized", 1.5),
    Bar("throughput_32_in_flight_over_best_shipped", "throughput at 32 in flight ÷ our best", 0.9),
    Bar("models_per_second_ours_over_hypergen", "`/v1/models` per second, ours ÷ HyperGen", 2),
    Bar("gateway_share_ms", "the gateway's own share of an image, ms", 3, at_most=True),
)


def write_report(folder: Path, figures: Figures) -> Path:
    """Markdown and its plots; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = [
        "# Side by side",
        _circumstances(figures),
        "## Bars",
        bars_table(figures),
        *(
            section
            for workload in WORKLOADS
            for section in (f"## One image, {WORKLOADS[workload]}", _images(figures, workload))
        ),
        "## How close to the processor",
        _hardware(figures),
        *(
            section
            for workload in ("shipped", "flow")
            for section in (
                f"## Many requests at once, {WORKLOADS[workload]}",
                _throughput(figures, workload),
                _plot_throughput(folder, figures, workload),
            )
        ),
        "## As a server",
        _server(figures),
        "## How it grows",
        _growth(figures),
        _plot_growth(folder, figures),
    ]
    report = folder / "report.md"
    report.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")
    return report


def bars_table(figures: Figures) -> str:
    """One row per bar: the required value, the measured one, its extremes and the verdict."""
    rows = []
    for bar in BARS:
        wanted = f"≤ {bar.bar:g}" if bar.at_most else f"{bar.bar:g}"
        rows.append(
            (bar.words, wanted, _number(figures.get(bar.name)), _spread(figures, bar.name), bar.verdict(figures))
        )
    return _table(("measure", "at least", "measured", "lowest to highest, pairs", ""), rows)


def _circumstances(figures: Figures) -> str:
    lines = [
        f"{name.removeprefix('circumstances_').replace('_', ' ')}: {figures[name]}"
        for name in sorted(figures)
        if name.startswith("circumstances_")
    ]
    legend = [f"`{peer.name}`: {peer.about}" for peer in PEERS.values()]
    return "\n".join(f"- {line}" for line in [*lines, *legend])


def _images(figures: Figures, workload: str) -> str:
    rows = []
    for peer in PEERS:
        name = f"{peer}_over_ours_one_image_{workload}"
        values = [
            _number(figures.get(f"{name}_{side}_{what}_ms")) for side in ("ours", peer) for what in ("median", "p95")
        ]
        memory = _number(figures.get(f"memory_{workload}_{peer}_proportional_mb"))
        why_not = _cell(figures.get(f"{name}_failed", ""))
        rows.append((f"`{peer}`", _number(figures.get(name)), _spread(figures, name), *values, memory, why_not))
    heads = ("", "theirs ÷ ours", "lowest to highest, pairs", "ours, ms", "p95", "theirs, ms", "p95", "memory, MB", "")
    ours = _number(figures.get(f"memory_{workload}_ours_proportional_mb"))
    return f"{_table(heads, rows)}\n\nMemory counts shared pages once; ours is {ours} MB, all processes together."


def _hardware(figures: Figures) -> str:
    columns = (
        "unet_gflop",
        "unet_gflop_per_second",
        "matrix_product_bfloat16_gflop_per_second",
        "matrix_product_float32_gflop_per_second",
        "unet_share_of_matrix_product",
    )
    rows = [
        (words, *(_number(figures.get(f"hardware_{workload}_{column}")) for column in columns))
        for workload, words in WORKLOADS.items()
    ]
    heads = ("UNet, a guided step", "GFLOP", "GFLOP/s", "a matrix product, bfloat16", "float32", "UNet ÷ product")
    return _table(heads, rows)


def _throughput(figures: Figures, workload: str) -> str:
    rows = []
    for level in LEVELS:
        name = f"throughput_ours_over_hypergen_{level}_in_flight_{workload}"
        rates = [_number(figures.get(f"{name}_{side}_per_second")) for side in ("ours", "hypergen")]
        rows.append((str(level), *rates, _number(figures.get(name)), _spread(figures, name)))
    heads = ("in flight", "ours, images/s", "HyperGen 0.1.0", "ours ÷ theirs", "lowest to highest, pairs")
    others = [
        (
            "OpenVINO GenAI, eight requests in turn or by two pipelines",
            f"throughput_ours_over_openvino_genai_8_in_flight_{workload}",
        ),
        (
            "OpenVINO GenAI, eight of one prompt in one call",
            f"throughput_ours_over_openvino_genai_8_images_of_one_prompt_{workload}",
        ),
        ("HyperGen 0.1.0, sizes mixed", f"throughput_ours_over_hypergen_8_in_flight_mixed_sizes_{workload}"),
    ]
    more = [(words, _number(figures.get(name)), _spread(figures, name)) for words, name in others]
    return f"{_table(heads, rows)}\n\n{_table(('ours at 8 in flight ÷', 'ratio', 'lowest to highest, pairs'), more)}"


def _server(figures: Figures) -> str:
    entries = [
        ("start to first image, files cached, ms", "start_warm_shipped_hypergen_over_ours", "median_ms"),
        ("start to first image, files not cached, ms", "start_cold_shipped_hypergen_over_ours", "median_ms"),
        *(
            (
                f"a 4-step job behind eight of 50, {WORKLOADS[workload]}, p95, ms",
                f"{_SHORT_BEHIND_LONG}_{workload}",
                "p95_ms",
            )
            for workload in ("shipped", "flow")
        ),
        ("`/v1/models` per second", "models_per_second_ours_over_hypergen", "per_second"),
    ]
    rows = [
        (
            words,
            *(_number(figures.get(f"{name}_{side}_{what}")) for side in ("ours", "hypergen")),
            _number(figures.get(name)),
        )
        for words, name, what in entries
    ]
    rows += [
        ("first start ever, with export and checks, s", _number(figures.get("start_first_shipped_ours_s")), "", ""),
        ("HTTP less gRPC, one image, ms", _number(figures.get("gateway_share_ms")), "", ""),
        ("the same, an image of one step, ms", _number(figures.get("gateway_share_one_step_ms")), "", ""),
        ("by the server's own clock, ms", _number(figures.get("gateway_share_ms_by_its_own_timings")), "", ""),
    ]
    return _table(("", "ours", "HyperGen 0.1.0", "ratio"), rows)


def _growth(figures: Figures) -> str:
    rows = [
        (
            f"{number} {unit}",
            *(
                _number(figures.get(f"growth_shipped_{number}_{unit}_{who}_ms"))
                for who in ("ours", "floor", "hypergen")
            ),
        )
        for unit in ("steps", "pixels")
        for number in _grown(figures, unit)
    ]
    return _table(("one image, ms", "ours", "floor", "HyperGen 0.1.0"), rows)


def _grown(figures: Figures, unit: str) -> list[int]:
    names = [name.split("_") for name in figures if name.startswith("growth_shipped_") and name.endswith("_ours_ms")]
    return sorted(int(parts[2]) for parts in names if parts[3] == unit)


def _plot_throughput(folder: Path, figures: Figures, workload: str) -> str:
    """Of the levels that were measured; nothing where none was."""
    names = {level: f"throughput_ours_over_hypergen_{level}_in_flight_{workload}" for level in LEVELS}
    levels = [level for level, name in names.items() if name in figures]
    if not levels:
        return ""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for side, label in (("ours", "ours"), ("hypergen", "HyperGen 0.1.0")):
        rates = [float(figures[f"{names[level]}_{side}_per_second"]) for level in levels]
        axes.plot(levels, rates, marker="o", label=label)
    axes.set(xlabel="requests in flight", ylabel="images per second", title=f"Throughput, {WORKLOADS[workload]}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(levels, labels=[str(level) for level in levels])
    return _save(figure, axes, folder / f"throughput-{workload}.png")


def _plot_growth(folder: Path, figures: Figures) -> str:
    """Of the steps and sizes that were measured; nothing where none was."""
    if not _grown(figures, "steps"):
        return ""
    figure, both = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, unit in zip(both, ("steps", "pixels"), strict=True):
        numbers = _grown(figures, unit)
        for who, label in (("ours", "ours"), ("floor", "floor"), ("hypergen", "HyperGen 0.1.0")):
            taken = [float(figures[f"growth_shipped_{number}_{unit}_{who}_ms"]) for number in numbers]
            axes.plot(numbers, taken, marker="o", label=label)
        axes.set(xlabel=unit if unit == "steps" else "pixels a side", ylabel="ms", title="One image")
        axes.set_ylim(0, None)
        axes.grid(alpha=0.3)
    return _save(figure, both[-1], folder / "growth.png")


def _save(figure: Canvas, axes: Axes, path: Path) -> str:
    axes.set_ylim(0, None)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return f"![]({path.name})"


def _spread(figures: Figures, name: str) -> str:
    if f"{name}_lowest" not in figures:
        return ""
    return f"{_number(figures[f'{name}_lowest'])} to {_number(figures[f'{name}_highest'])}, {figures[f'{name}_pairs']}"


def _number(value: Figure | None) -> str:
    if not isinstance(value, (int, float)):
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _cell(text: Figure) -> str:
    return str(text).replace("|", "/").replace("\n", " ")[:200]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
