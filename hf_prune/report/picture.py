"""A picture of a plan: which heads and experts stay, and how many neurons, layer by layer."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from hf_prune.plan import Plan, SitePlan

_KEPT, _GONE = "#2a6f97", "#e9e4d8"


_TITLES = {
    "heads": "Heads kept",
    "experts": "Experts kept",
    "neurons": "Neurons kept",
    "expert_neurons": "Neurons of experts kept",
}
"""What is drawn, from left to right; the first two unit by unit."""


def _draw_each(axes: Axes, sites: list[SitePlan]) -> None:
    """A square for each unit: where there are few."""
    for layer, site in enumerate(sites):
        colours = [_KEPT if unit in site.kept else _GONE for unit in range(site.units)]
        axes.scatter(range(site.units), [layer] * site.units, c=colours, marker="s", s=60)


def _draw_counts(axes: Axes, sites: list[SitePlan]) -> None:
    """A bar for each site: where there are many."""
    layers = range(len(sites))
    axes.barh(layers, [site.units for site in sites], color=_GONE)
    axes.barh(layers, [len(site.kept) for site in sites], color=_KEPT)


def draw_plan(plan: Plan, path: Path) -> None:
    """Write an SVG of what a plan keeps, without dates, so that equal plans give equal files."""
    kinds = {kind: [site for site in plan.sites.values() if site.kind == kind] for kind in _TITLES}
    shown = {kind: sites for kind, sites in kinds.items() if sites}
    figure = Figure(figsize=(5 * max(len(shown), 1), 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    for place, (kind, sites) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(1, len(shown), place)
        few = kind in ("heads", "experts")
        (_draw_each if few else _draw_counts)(axes, sites)
        unit = kind.removesuffix("s") if few else "neurons"
        axes.set(title=_TITLES[kind], xlabel=unit, ylabel="layer", yticks=range(len(sites)))
        axes.invert_yaxis()
    if not shown:
        figure.text(0.5, 0.5, "Single weights only: all units stay", ha="center")
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": "hf_prune"})
