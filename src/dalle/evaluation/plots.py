"""Plots of several results, each where the results have what it shows."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from dalle.evaluation.results import Result, flat
from dalle.metrics.judge import ATTRIBUTES

MOST_BARS = 8  # results beside each other; of more the best


def draw_plots(
    results: Sequence[Result], names: Sequence[str], signs: Sequence[str], folder: Path
) -> dict[str, Path]:
    """Titles and files of the plots there are. What bears a sign was measured otherwise, and is hollow."""
    plots: dict[str, tuple[str, Callable[..., bool]]] = {
        "Distance and CLIP score over guidance": ("guidance.png", over_guidance),
        "Quality and time": ("speed.png", over_time),
        "What captions say, attribute by attribute": ("attributes.png", attributes),
    }
    made, names = {}, [plain(name) for name in names]
    for title, (file, draw) in plots.items():
        canvas = Canvas(figsize=(11, 5), layout="constrained")
        if draw(canvas.subplots(), results, names, signs):
            canvas.legend(loc="outside right upper", fontsize=8)
            canvas.savefig(folder / file, dpi=120)
            made[title] = folder / file
    return made


def plain(text: str) -> str:
    """A text as matplotlib is to write it: between two dollar signs it would look for a formula."""
    return text.replace("$", r"\$")


def distance_of(results: Sequence[Result]) -> str | None:
    """The Frechet distance that all results have."""
    names = [name for name in results[0].figures if name == "fid" or name.startswith("fid_")]
    return next((name for name in names if all(name in result.figures for result in results)), None)


def guidance_of(result: Result) -> Any:
    """The scale of what draws the pictures; None: what it was trained with."""
    options = result.target.get("options", {})
    return next(
        (node["guidance"] for name, node in options.items() if "guidance" in node and name != "prior"), None
    )


def over_guidance(axes: Axes, results: Sequence[Result], names: Sequence[str], signs: Sequence[str]) -> bool:
    """A line for each setting, through its scales of guidance."""
    distance = distance_of(results)
    curves: defaultdict[str, list[tuple[float, Result, str]]] = defaultdict(list)
    for result, sign in zip(results, signs, strict=True):
        scale = guidance_of(result)
        if distance and scale is not None and "clip_score" in result.figures:
            options = flat(result.target.get("options", {}))
            rest = {k: v for k, v in options.items() if not k.endswith(".guidance") and v is not None}
            curves[f"{result.target['kind']} {rest} {sign}"].append((scale, result, sign))
    curves = defaultdict(list, {key: points for key, points in curves.items() if len(points) > 1})
    if not distance or not curves:
        return False
    for points in curves.values():
        points.sort(key=lambda point: point[0])
        x = [result.figures["clip_score"].value for _, result, _ in points]
        y = [result.figures[distance].value for _, result, _ in points]
        (line,) = axes.plot(x, y, marker="o", label=curve_name(points[0][1], points[0][2]))
        if points[0][2]:
            line.set_markerfacecolor("white")
        for (scale, _, _), a, b in zip(points, x, y, strict=True):
            axes.annotate(f"{scale:g}", (a, b), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set(xlabel="CLIP score (higher is better)", ylabel=plain(f"{distance} (lower is better)"))
    return True


def curve_name(result: Result, sign: str) -> str:
    """Kind, sampler and steps of what draws the pictures."""
    nodes = [node for name, node in result.target.get("options", {}).items() if name != "prior"]
    sampler = next((node["sampler"] for node in nodes if "sampler" in node), {})
    settings = [str(sampler[k]) for k in ("method", "steps") if k in sampler]
    return plain(" ".join([result.target["kind"], *settings, sign]))


def over_time(axes: Axes, results: Sequence[Result], names: Sequence[str], signs: Sequence[str]) -> bool:
    """Each result as a point; those that no other beats in both are on the Pareto front."""
    quality = distance_of(results)
    lower = quality is not None
    for name in ("judge/all", "clip_score"):
        if quality is None and all(name in result.figures for result in results):
            quality = name
    timed = all("seconds_per_image" in result.figures for result in results)
    if quality is None or not timed or len(results) < 2:
        return False
    points = [(r.figures["seconds_per_image"].value, r.figures[quality].value) for r in results]
    better = [(x, y if lower else -y) for x, y in points]
    comparable = [k for k, sign in enumerate(signs) if not sign]
    front = {comparable[k] for k in pareto([better[k] for k in comparable])}
    axes.plot(*zip(*sorted(points[k] for k in front), strict=True), color="tab:red", linewidth=1, zorder=1)
    for k, ((x, y), result) in enumerate(zip(points, results, strict=True)):
        figure, colour = result.figures[quality], "tab:red" if k in front else "tab:blue"
        label = f"{k + 1}: {names[k]}" + (" (Pareto front)" if k in front else "")
        error = [[y - figure.low], [figure.high - y]]
        face = "white" if signs[k] else colour
        axes.errorbar(x, y, error, fmt="o", color=colour, capsize=2, markerfacecolor=face, label=label)
        axes.annotate(str(k + 1), (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
    best = "lower" if lower else "higher"
    axes.set(xscale="log", xlabel="seconds per image", ylabel=f"{quality} ({best} is better)")
    return True


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other beats: none is as low in both, and lower in one."""
    return [
        k
        for k, (x, y) in enumerate(points)
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
    ]


def attributes(axes: Axes, results: Sequence[Result], names: Sequence[str], signs: Sequence[str]) -> bool:
    """Bars for each attribute; unseen compositions as lines across the bars."""
    judged = [(r, name) for r, name in zip(results, names, strict=True) if "judge/all" in r.figures]
    judged = sorted(judged, key=lambda pair: -pair[0].figures["judge/all"].value)[:MOST_BARS]
    shown = [
        key
        for key in (*ATTRIBUTES, "count", "sound", "all")
        if any(f"judge/{key}" in r.figures for r, _ in judged)
    ]
    if not judged:
        return False
    width = 0.8 / len(judged)
    for k, (result, name) in enumerate(judged):
        there = [(i, f"judge/{key}") for i, key in enumerate(shown) if f"judge/{key}" in result.figures]
        figures = [result.figures[key] for _, key in there]
        x = [i + (k - (len(judged) - 1) / 2) * width for i, _ in there]
        errors = [[f.value - f.low for f in figures], [f.high - f.value for f in figures]]
        axes.bar(x, [f.value for f in figures], width, yerr=errors, label=name, error_kw={"linewidth": 0.7})
        for place, (_, key) in zip(x, there, strict=True):
            if unseen := result.figures.get(key.replace("judge/", "judge/unseen/")):
                axes.hlines(unseen.value, place - width / 2, place + width / 2, color="black", linewidth=1.5)
    axes.set_xticks(range(len(shown)), shown)
    axes.set(ylim=(0, 1.05), ylabel="share of pictures that are right (black: unseen pairs)")
    return True
