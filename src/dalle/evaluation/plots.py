"""Charts for offline pages, as plotly.js takes them, and those of several results: each where the results
have what it shows.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from dalle.evaluation.page import Chart, label
from dalle.evaluation.results import Result, flat
from dalle.metrics.judge import ATTRIBUTES

MOST_BARS = 8  # results beside each other; of more the best
COLOURS = ("#3b82d0", "#e07b39", "#3f9e6b", "#c94f7c", "#8b6fc9", "#b59a2b", "#2f9fb0", "#8f8f8f")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
NUMBER = ".4~g"  # how plotly.js writes a value that is pointed at


def chart(
    title: str,
    traces: Sequence[dict[str, Any]],
    x: dict[str, Any],
    y: dict[str, Any],
    height: int = 280,
    scale: str = "",
    log: bool = False,
    **layout: Any,
) -> Chart:
    """
    Args:
        x, y: axes; numbers on them are written out.
        height: of the drawing in pixels; the legend below it comes on top.
        scale: the axis with a button for a logarithmic scale; `log`: it begins so.
    """
    entries = sum(trace.get("showlegend", True) for trace in traces)
    axis = {"automargin": True, "exponentformat": "e", "minexponent": 5, "separatethousands": True}
    axis |= {"hoverformat": NUMBER}
    axes = {"xaxis": {**axis, **x}, "yaxis": {**axis, **y}}
    if log:
        axes[scale]["type"] = "log"
    layout |= {
        **axes,
        "height": height + (20 * entries + 20 if entries > 1 else 0),
        "margin": {"l": 12, "r": 12, "t": 12, "b": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 12},
        "hoverlabel": {"namelength": -1, "align": "left"},
        "showlegend": entries > 1,
        "legend": {"x": 0, "y": 0, "yref": "container", "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
    }
    return {
        "title": title,
        "data": list(traces),
        "layout": layout,
        "scale": scale,
        "log": log,
        "broad": False,
    }


def charts(results: Sequence[Result], names: Sequence[str], signs: Sequence[str]) -> list[Chart]:
    """The charts there are. What bears a sign was measured otherwise, and is hollow."""
    made = [draw(results, names, signs) for draw in (over_guidance, over_time, attributes)]
    return [some for some in made if some is not None]


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


def over_guidance(results: Sequence[Result], names: Sequence[str], signs: Sequence[str]) -> Chart | None:
    """A line for each setting, through its scales of guidance."""
    distance = distance_of(results)
    curves: defaultdict[str, list[tuple[float, Result, str]]] = defaultdict(list)
    for result, sign in zip(results, signs, strict=True):
        scale = guidance_of(result)
        if distance and isinstance(scale, int | float) and "clip_score" in result.figures:
            options = flat(result.target.get("options", {}))
            rest = {k: v for k, v in options.items() if not k.endswith(".guidance") and v is not None}
            curves[f"{result.target['kind']} {rest} {sign}"].append((scale, result, sign))
    lines = [sorted(points, key=lambda point: point[0]) for points in curves.values() if len(points) > 1]
    if not distance or not lines:
        return None
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers+text",
            "name": label(curve_name(points[0][1], points[0][2])),
            "x": [result.figures["clip_score"].value for _, result, _ in points],
            "y": [result.figures[distance].value for _, result, _ in points],
            "text": [f"{scale:g}" for scale, _, _ in points],
            "textposition": "top right",
            "marker": {"size": 8, "symbol": "circle-open" if points[0][2] else "circle"},
            "line": {"color": COLOURS[k % len(COLOURS)]},
            "hovertemplate": f"guidance %{{text}}<br>CLIP score %{{x:{NUMBER}}}<br>distance %{{y:{NUMBER}}}",
        }
        for k, points in enumerate(lines)
    ]
    x, y = named("CLIP score (higher is better)"), named(f"{distance} (lower is better)")
    return chart("Distance and CLIP score over guidance", traces, x, y, height=340, hovermode="closest")


def named(title: str) -> dict[str, Any]:
    """An axis with its title."""
    return {"title": {"text": label(title), "standoff": 8}}


def curve_name(result: Result, sign: str) -> str:
    """Kind, sampler and steps of what draws the pictures."""
    nodes = [node for name, node in result.target.get("options", {}).items() if name != "prior"]
    sampler = next((node["sampler"] for node in nodes if "sampler" in node), {})
    settings = [f"{sampler[k]}{unit}" for k, unit in (("method", ""), ("steps", " steps")) if k in sampler]
    return " ".join([result.target["kind"], *settings, sign]).strip()


def over_time(results: Sequence[Result], names: Sequence[str], signs: Sequence[str]) -> Chart | None:
    """Each result as a point with its number; those that no other beats in both are on the Pareto front."""
    quality = distance_of(results)
    lower = quality is not None
    for name in ("judge/all", "clip_score"):
        if quality is None and all(name in result.figures for result in results):
            quality = name
    timed = all("seconds_per_image" in result.figures for result in results)
    if quality is None or not timed or len(results) < 2:
        return None
    points = [(r.figures["seconds_per_image"].value, r.figures[quality].value) for r in results]
    better = [(x, y if lower else -y) for x, y in points]
    comparable = [k for k, sign in enumerate(signs) if not sign]
    front = {comparable[k] for k in pareto([better[k] for k in comparable])}
    groups = {
        "Pareto front: no other is better in both": sorted(front, key=lambda k: points[k]),
        "others": [k for k in comparable if k not in front],
        "measured by another protocol": [k for k, sign in enumerate(signs) if sign],
    }
    traces = []
    for k, (name, members) in enumerate(groups.items()):
        figures = [results[m].figures[quality] for m in members]
        traces.append({
            "type": "scatter",
            "mode": "lines+markers+text" if k == 0 else "markers+text",
            "name": name,
            "x": [points[m][0] for m in members],
            "y": [points[m][1] for m in members],
            "error_y": {
                "array": [f.high - f.value for f in figures],
                "arrayminus": [f.value - f.low for f in figures],
                "thickness": 1,
            },
            "text": [str(m + 1) for m in members],
            "textposition": "top right",
            "hovertext": [label(names[m]) for m in members],
            "marker": {"size": 8, "symbol": "circle-open" if k == 2 else "circle", "color": COLOURS[1 - k]},
            "line": {"color": COLOURS[1], "width": 1},
            "hovertemplate": f"%{{hovertext}}<br>%{{x:{NUMBER}}} s<br>%{{y:{NUMBER}}}<extra></extra>",
        })  # fmt: skip
    traces = [trace for trace in traces if trace["x"]]
    x, y = named("seconds per image"), named(f"{quality} ({'lower' if lower else 'higher'} is better)")
    return chart(
        "Quality and time", traces, x, y, height=340, scale="xaxis", log=True, hovermode="closest"
    )  # fmt: skip


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other beats: none is as low in both, and lower in one."""
    return [
        k
        for k, (x, y) in enumerate(points)
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
    ]


def attributes(results: Sequence[Result], names: Sequence[str], signs: Sequence[str]) -> Chart | None:
    """Bars for each attribute; unseen compositions as lines across the bars."""
    judged = [(r, name) for r, name in zip(results, names, strict=True) if "judge/all" in r.figures]
    judged = sorted(judged, key=lambda pair: -pair[0].figures["judge/all"].value)[:MOST_BARS]
    shown = [
        key
        for key in (*ATTRIBUTES, "count", "sound", "all")
        if any(f"judge/{key}" in r.figures for r, _ in judged)
    ]
    if not judged:
        return None
    traces = []
    for k, (result, name) in enumerate(judged):
        there = [key for key in shown if f"judge/{key}" in result.figures]
        figures = [result.figures[f"judge/{key}"] for key in there]
        own = {"legendgroup": str(k), "offsetgroup": str(k), "name": label(name)}
        traces.append({
            **own,
            "type": "bar",
            "x": there,
            "y": [f.value for f in figures],
            "error_y": {
                "array": [f.high - f.value for f in figures],
                "arrayminus": [f.value - f.low for f in figures],
                "thickness": 1,
                "width": 2,
            },
            "marker": {"color": COLOURS[k % len(COLOURS)]},
        })  # fmt: skip
        unseen = [key for key in there if f"judge/unseen/{key}" in result.figures]
        if unseen:
            traces.append({
                **own,
                "type": "scatter",
                "mode": "markers",
                "x": unseen,
                "y": [result.figures[f"judge/unseen/{key}"].value for key in unseen],
                "marker": {"symbol": "diamond", "size": 7, "color": "#fff",
                           "line": {"width": 1.5, "color": "#000"}},
                "hovertemplate": f"unseen pairs: %{{y:{NUMBER}}}<extra></extra>",
                "showlegend": False,
            })  # fmt: skip
    title = "What captions say, attribute by attribute (diamonds: pairs not seen in training)"
    x, y = {"type": "category"}, {**named("share of pictures that are right"), "range": [0, 1.05]}
    made = chart(title, traces, x, y, height=340, barmode="group", scattermode="group", hovermode="closest")
    return {**made, "broad": True}
