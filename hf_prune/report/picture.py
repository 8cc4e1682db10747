"""A picture of a plan: which heads stay, and how many neurons, layer by layer."""

from pathlib import Path

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from hf_prune.plan import Plan, SitePlan

_KEPT, _GONE = "#2a6f97", "#e9e4d8"


def _draw_heads(figure: Figure, sites: list[SitePlan], rows: int) -> None:
    axes = figure.add_subplot(1, rows, 1)
    for layer, site in enumerate(sites):
        colours = [_KEPT if unit in site.kept else _GONE for unit in range(site.units)]
        axes.scatter(range(site.units), [layer] * site.units, c=colours, marker="s", s=60)
    axes.set(title="Heads kept", xlabel="head", ylabel="layer", yticks=range(len(sites)))
    axes.invert_yaxis()


def _draw_neurons(figure: Figure, sites: list[SitePlan], rows: int) -> None:
    axes = figure.add_subplot(1, rows, rows)
    layers = range(len(sites))
    axes.barh(layers, [site.units for site in sites], color=_GONE)
    axes.barh(layers, [len(site.kept) for site in sites], color=_KEPT)
    axes.set(title="Neurons kept", xlabel="neurons", ylabel="layer", yticks=layers)
    axes.invert_yaxis()


def draw_plan(plan: Plan, path: Path) -> None:
    """Write an SVG of what a plan keeps, without dates, so that equal plans give equal files."""
    kinds = {
        kind: [site for site in plan.sites.values() if site.kind == kind]
        for kind in ("heads", "neurons")
    }
    shown = {kind: sites for kind, sites in kinds.items() if sites}
    figure = Figure(figsize=(5 * max(len(shown), 1), 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    if "heads" in shown:
        _draw_heads(figure, shown["heads"], len(shown))
    if "neurons" in shown:
        _draw_neurons(figure, shown["neurons"], len(shown))
    if not shown:
        figure.text(0.5, 0.5, "Single weights only: all units stay", ha="center")
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": "hf_prune"})
