"""Pictures of results. matplotlib is imported when one is drawn: it takes two seconds."""

from collections.abc import Mapping, Sequence
from pathlib import Path

_WIDTH = 0.8  # of a group of bars


def grouped_bars(
    file: Path, title: str, unit: str, series: Mapping[str, Sequence[float]], groups: Sequence[str]
) -> None:
    """A bar for each series in each group, on a logarithmic axis, with its figure on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(1.6 * len(groups) + 2, 5), layout="constrained")
    width = _WIDTH / len(series)
    for number, (name, values) in enumerate(series.items()):
        middles = [group - _WIDTH / 2 + (number + 0.5) * width for group in range(len(groups))]
        bars = axes.bar(middles, values, width, label=name)
        axes.bar_label(bars, fmt="{:.0f}", fontsize=7)
    axes.set_yscale("log")
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(unit)
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
