"""Charts as Vega-Lite specifications: interactive in the report, SVG and PNG for a README.

Both are drawn by Vega: in the browser by the bundle that vl-convert carries, on disk by vl-convert itself. A
specification holds its own data and no colour; colours come from the theme it is drawn with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from smolmlx.errors import BackendError
from smolmlx.evals.headlines import Metric
from smolmlx.reports.boards import Board
from smolmlx.reports.folders import RunView, Tree
from smolmlx.reports.sweeps import Figure, SweepView
from smolmlx.reports.weights import Change
from smolmlx.sweeps.findings import NOT_SHOWN, TOO_FEW

Spec = dict[str, Any]

MAX_POINTS = 400
"""Points drawn of one curve; more are averaged in bins, which a screen cannot tell apart."""
_LABELLED_RUNS = 8
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"


def theme(ink: str, soft: str, line: str, series: Sequence[str], heat: Sequence[str]) -> Spec:
    """Return a Vega-Lite config."""
    text = {"labelColor": soft, "titleColor": soft, "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal"}  # fmt: skip
    return {
        "background": "transparent",
        "font": _FONT,
        "view": {"stroke": None},
        "axis": {**text, "gridColor": line, "domainColor": line, "tickColor": line, "labelLimit": 220},
        "legend": {
            **text,
            "labelColor": ink,
            "orient": "top",
            "offset": 4,
            "symbolType": "circle",
            "symbolOpacity": 1,
            "labelLimit": 260,
        },
        "title": {"color": ink, "subtitleColor": soft, "anchor": "start", "fontSize": 13, "fontWeight": 600},
        "range": {"category": list(series), "heatmap": list(heat), "ramp": list(heat)},
        "rule": {"color": soft},
    }


LIGHT = theme(
    "#1c2430", "#5b6675", "#e3e7ec",
    ("#2563eb", "#d9660a", "#0f8a5f", "#9a3fc0", "#c2304f", "#7b6b00", "#0e7f95", "#5b6675"),
    ("#eef3fb", "#a9c4f5", "#5b8def", "#2456c8", "#12306f"),
)  # fmt: skip
DARK = theme(
    "#e8ecf2", "#9aa6b5", "#2b333e",
    ("#7aa7ff", "#ffa552", "#4fd1a1", "#d59bf3", "#ff8aa0", "#d8c650", "#5cc8dc", "#9aa6b5"),
    ("#1a2230", "#24407a", "#3f6fd6", "#8ab2ff", "#e2ecff"),
)  # fmt: skip


def load_vega() -> ModuleType:
    """Import vl-convert.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise BackendError("charts need vl-convert: pip install 'smolmlx[report]'") from error
    module: ModuleType = vl_convert
    return module


def browser_bundle() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script that names no remote address but the W3C's XML name spaces.

    vega-embed carries the address of an online editor for a menu that the report switches off.
    """
    script: str = load_vega().javascript_bundle()
    return re.sub(r"https?://(?!www\.w3\.org/)[\w./-]+", "", script).replace("</script", "<\\/script")


def to_svg(spec: Spec, width: int = 640) -> str:
    """Draw a chart as SVG on white, in the light theme."""
    drawn: str = load_vega().vegalite_to_svg(_still(spec, width), config=LIGHT)
    return drawn


def to_png(spec: Spec, width: int = 640) -> bytes:
    """Draw a chart as PNG on white, in the light theme, at twice its size in pixels."""
    drawn: bytes = load_vega().vegalite_to_png(_still(spec, width), config=LIGHT, scale=2)
    return drawn


def _still(spec: Spec, width: int) -> Spec:
    return {**spec, "width": width, "background": "white", "padding": 12}


def _chart(layers: Sequence[Spec], **more: Any) -> Spec:
    return {
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "layer": list(layers),
        **more,
    }


def curve_points(
    views: Sequence[RunView], labels: Mapping[str, str], step_key: str, eval_key: str | None
) -> list[dict[str, Any]]:
    """Return the points of one figure over all runs: every step (binned), a running mean, and evaluations.

    Runs of one setting of a sweep share a colour; single steps of many runs would hide each other and are left out.
    """
    points: list[dict[str, Any]] = []
    for view in views:
        run = {"run": view.setting or labels[str(view.path)], "line": labels[str(view.path)]}
        steps = [(int(row["step"]), float(row[step_key])) for row in view.steps if _finite(row.get(step_key))]
        if len(views) <= _LABELLED_RUNS:
            points += [{"x": x, "y": y, **run, "kind": "step"} for x, y in thin(steps)]
        most = MAX_POINTS if len(views) <= _LABELLED_RUNS else MAX_POINTS // 4
        points += [{"x": x, "y": y, **run, "kind": "training"} for x, y in thin(running_mean(steps), most)]
        points += [
            {"x": int(row["step"]), "y": float(row[eval_key]), **run, "kind": "validation"}
            for row in view.evals
            if eval_key and _finite(row.get(eval_key))
        ]
    return points


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def running_mean(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the bias-corrected exponential mean over about a thirtieth of the curve."""
    keep = 1 - 1 / max(1.0, len(points) / 30)
    found, total, weight = [], 0.0, 0.0
    for x, y in points:
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        found.append((x, total / weight))
    return found


def thin(points: Sequence[tuple[int, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Average neighbouring points until at most `most` are left."""
    size = math.ceil(len(points) / most) if points else 1
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [(round(_mean(x for x, _ in b), 1), float(f"{_mean(y for _, y in b):.6g}")) for b in bins]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def curve(points: Sequence[Mapping[str, Any]], title: str, unit: str, style: str = ".4f") -> Spec:
    """Draw a figure over steps: faint single steps, their running mean, evaluations as dots."""
    runs = list(dict.fromkeys(point["run"] for point in points))
    many = len(runs) > 1
    x = {"field": "x", "type": "quantitative", "title": "step", "axis": {"tickMinStep": 1, "grid": False}}
    y = {"field": "y", "type": "quantitative", "title": unit, "scale": {"zero": False, "nice": True}}
    legend: Spec | None = {"title": None} if many or any(p["kind"] == "validation" for p in points) else None
    color: Spec = {"field": "run" if many else "kind", "type": "nominal", "legend": legend}
    color["scale"] = {"domain": runs if many else ["training", "validation"]}
    if legend is not None:
        legend |= {"columns": 2 if len(runs) <= _LABELLED_RUNS else 1}
    tooltip = [
        {"field": "x", "title": "step"},
        {"field": "y", "title": unit, "format": style},
        {"field": "kind", "title": "measured on"},
        *([{"field": "line", "title": "run"}] if many else []),
    ]
    base: Spec = {"x": x, "y": y, "color": color, "detail": {"field": "line"}}
    near = {"name": "near", "select": {"type": "point", "on": "pointermove", "nearest": True, "clear": "pointerout"}}
    shown = {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0}
    # A single step belongs to the training curve's colour.
    steps = [*_only("step"), *([] if many else [{"calculate": "'training'", "as": "kind"}])]
    crowded = len({point["line"] for point in points}) > _LABELLED_RUNS
    wide = {"type": "line", "strokeWidth": 1.3 if crowded else 2.2, "opacity": 0.75 if crowded else 1}
    layers: list[Spec] = []
    if any(point["kind"] == "step" for point in points):
        faint = {"type": "line", "strokeWidth": 1, "opacity": 0.28}
        layers.append({"transform": steps, "mark": faint, "encoding": base})
    layers.append({"transform": _only("training"), "mark": wide, "encoding": base})
    if any(point["kind"] == "validation" for point in points):  # Vega warns about a layer without data
        dot = {"size": 22 if crowded else 46, "filled": True}
        mark = {"type": "line", "strokeWidth": 1.1 if crowded else 1.6, "strokeDash": [5, 3], "point": dot}
        layers.append({"transform": _only("validation"), "mark": mark, "encoding": {**base, "tooltip": tooltip}})
    followed: Spec = {"type": "point", "filled": True, "size": 60}
    layers.append(
        {
            "transform": _only("training"),
            "params": [near],
            "mark": followed,
            "encoding": {**base, "opacity": shown, "tooltip": tooltip},
        }
    )
    return _chart(layers, title=title, height=230, data={"values": list(points)})


def _only(kind: str) -> list[Spec]:
    return [{"filter": f"datum.kind == '{kind}'"}]


def forest(board: Board, metric: Metric) -> Spec | None:
    """Draw every system's mean with its interval; None where no system has the metric."""
    values = [
        {
            "system": entrant.label, "kind": entrant.kind,
            **{end: round(float(found[end]), 5) for end in ("mean", "low", "high")},
            "text": f"{found['mean']:.3f}",
        }
        for entrant in board.entrants
        if (found := entrant.summary.get(metric.key)) is not None and _finite(found["mean"])
    ]  # fmt: skip
    if not values:
        return None
    order = [entrant.label for entrant in board.entrants]
    y = {"field": "system", "type": "nominal", "sort": order, "title": None, "axis": {"grid": False, "ticks": False, "domain": False, "labelPadding": 10}}  # fmt: skip
    domain = {"domain": [0, 1]} if metric.share else {"zero": True}
    x = {"field": "mean", "type": "quantitative", "title": None, "scale": domain, "axis": {"tickCount": 5}}
    # Trained systems in the first series' colour, base and controls in the quiet last one.
    color = {"field": "kind", "type": "nominal", "legend": None, "scale": {"domain": ["trained", "a", "b", "c", "d", "e", "f", "base"]}}  # fmt: skip
    tooltip = [
        {"field": "system", "title": "system"}, {"field": "text", "title": metric.label},
        {"field": "low", "title": "95 % from", "format": ".3f"}, {"field": "high", "title": "to", "format": ".3f"},
    ]  # fmt: skip
    shared = {"y": y, "color": color, "tooltip": tooltip}
    quiet = [{"calculate": "datum.kind == 'trained' ? 'trained' : 'base'", "as": "kind"}]
    arrow = "higher is better" if metric.higher_is_better else "lower is better"
    return _chart(
        [
            {"mark": {"type": "rule", "strokeWidth": 3, "opacity": 0.55, "strokeCap": "round"}, "encoding": {**shared, "x": {**x, "field": "low"}, "x2": {"field": "high"}}},
            {"mark": {"type": "point", "filled": True, "size": 110, "opacity": 1}, "encoding": {**shared, "x": x}},
        ],
        title={"text": metric.label, "subtitle": arrow, "subtitleFontSize": 10.5},
        height=26 * len(values), transform=quiet, data={"values": values},
    )  # fmt: skip


def forests(board: Board) -> dict[str, Spec]:
    """Return the chart of each of a board's metrics."""
    found = {metric.key: forest(board, metric) for metric in board.metrics}
    return {key: spec for key, spec in found.items() if spec is not None}


FIRST, SHOWN = "first", "differs"


def settings_chart(sweep: SweepView, figure: Figure) -> Spec | None:
    """Draw a figure of every setting: each seed, their span, their mean; None where no run has it."""
    seeds, means = [], []
    for setting, found in sweep.settings.items():
        if figure.key in found:
            spread = found[figure.key]
            verdict = sweep.verdict(setting, figure.metric)
            judged = {"higher": SHOWN, "lower": SHOWN, TOO_FEW: TOO_FEW}.get(verdict, NOT_SHOWN)
            kind = FIRST if setting == sweep.first else judged
            shown = {"setting": setting, "kind": kind}
            means.append({**shown, **{key: _round(spread[key]) for key in ("mean", "low", "high")}, "sd": _round(spread["sd"]), "verdict": verdict or "–"})  # fmt: skip
            seeds += [{**shown, "seed": seed, "value": _round(value)} for seed, value in sweep.values(setting, figure.key)]  # fmt: skip
    if not means:
        return None
    share = figure.style == ".1%"
    axis = {"tickCount": 5, **({"format": ".0%"} if share else {})}
    x = {"type": "quantitative", "title": None, "scale": {"domain": [0, 1]} if share else {"zero": False, "nice": True}, "axis": axis}  # fmt: skip
    label = {"grid": False, "ticks": False, "domain": False, "labelPadding": 10}
    y = {"field": "setting", "type": "nominal", "sort": [m["setting"] for m in means], "title": None, "axis": label}
    # The theme's colours by place: quiet grey is the last of eight.
    domain = [SHOWN, FIRST, TOO_FEW, *"abcd", NOT_SHOWN]
    kinds = [kind for kind in (FIRST, SHOWN, TOO_FEW, NOT_SHOWN) if any(m["kind"] == kind for m in means)]
    color = {"field": "kind", "type": "nominal", "scale": {"domain": domain}, "legend": {"title": None, "values": kinds, "symbolType": "circle", "columns": 2}}  # fmt: skip
    shared = {"y": y, "color": color}
    of_mean = [
        {"field": "setting"}, {"field": "mean", "title": "mean", "format": figure.style},
        {"field": "sd", "title": "standard deviation", "format": figure.style}, {"field": "verdict", "title": f"against {sweep.first}"},
    ]  # fmt: skip
    of_seed = [{"field": "setting"}, {"field": "seed"}, {"field": "value", "title": figure.label, "format": figure.style}]  # fmt: skip
    from_first = {"filter": f"datum.kind == '{FIRST}'"}
    layers: list[Spec] = [
        {"data": {"values": means}, "transform": [from_first], "mark": {"type": "rule", "strokeDash": [3, 3], "opacity": 0.55}, "encoding": {"x": {**x, "field": "mean"}}},
        {"data": {"values": means}, "mark": {"type": "rule", "strokeWidth": 5, "opacity": 0.22, "strokeCap": "round"}, "encoding": {**shared, "x": {**x, "field": "low"}, "x2": {"field": "high"}}},
        {"data": {"values": seeds}, "mark": {"type": "point", "filled": True, "size": 26, "opacity": 0.6}, "encoding": {**shared, "x": {**x, "field": "value"}, "tooltip": of_seed}},
        {"data": {"values": means}, "mark": {"type": "tick", "thickness": 3, "size": 17}, "encoding": {**shared, "x": {**x, "field": "mean"}, "tooltip": of_mean}},
    ]  # fmt: skip
    arrow = {True: "higher is better", False: "lower is better", None: ""}[figure.higher_is_better]
    title = {"text": figure.label, "subtitle": arrow, "subtitleFontSize": 10.5}
    return _chart(layers, title=title, height=30 * len(means))


def _round(value: Any) -> float | None:
    return float(f"{value:.6g}") if _finite(value) else None


def weight_map(changes: Sequence[Change]) -> Spec:
    """Draw how far each matrix moved, layers by modules."""
    values: list[Tree] = [
        {"layer": c.layer, "module": c.module, "rms": float(f"{c.rms:.4g}"), "norm": float(f"{c.norm:.4g}")}
        for c in changes
    ]
    x = {"field": "layer", "type": "ordinal", "title": "layer", "axis": {"labelAngle": 0, "labelOverlap": True}}
    y = {"field": "module", "type": "nominal", "title": None, "sort": list(dict.fromkeys(c.module for c in changes))}
    legend = {"title": "mean change of an entry (RMS)", "format": ".1e", "orient": "top", "gradientLength": 180}
    color = {"field": "rms", "type": "quantitative", "legend": legend, "scale": {"range": "heatmap"}}
    tooltip = [
        {"field": "layer"}, {"field": "module"}, {"field": "rms", "title": "RMS change", "format": ".3e"},
        {"field": "norm", "title": "Frobenius norm", "format": ".4f"},
    ]  # fmt: skip
    mark = {"type": "rect", "cornerRadius": 2}
    layer = {"mark": mark, "encoding": {"x": x, "y": y, "color": color, "tooltip": tooltip}}
    return _chart([layer], title="weight change", height=24 * len({c.module for c in changes}), data={"values": values})
