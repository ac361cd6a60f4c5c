"""The figure of `cover visualize`: two views, the true and the predicted displacement, its error, and the features."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cover.config import Config
from cover.data import open_images
from cover.data.reading import SUFFIXES
from cover.evaluation import HELD_OUT_SEED, held_out_batches, open_run
from cover.losses import epe
from cover.model import COVER, Prediction, build_model
from cover.rng import Draws
from cover.views import Views
from cover_kernels import warp

_TRUE, _PREDICTED, _OUTSIDE = "#35c9f5", "#ffa62b", "0.75"
_GRID_LINES = 16  # along the longest axis
_WIDTH = 13.0  # inches


def visualize(
    run: str | PathLike,
    image: str | PathLike,
    out: str | PathLike | None = None,
    build: Callable[[Config], COVER] = build_model,
    **settings: Any,
) -> Path:
    """Draw what a run sees in one image (`cover visualize RUN IMAGE`): see `figure`.

    Args:
        run: the folder of a run (its last checkpoint is taken) or a checkpoint.
        image: an image or volume; the views are made of one crop, as in `evaluate`.
        out: the figure, in any format that matplotlib writes; default `figures/<image>.png` in the folder of `run`.
        build: as for `cover.load_model`: makes the model of a run whose backbone is not the U-Net.
        **settings: changes to the settings of the run's data and views, such as `crop` or `volumes`.

    Returns:
        The path of the figure.

    Raises:
        FileNotFoundError: no such run. FileExistsError: `out` exists. ValueError: a setting or the image does not fit.
        ImportError: the extra `plot` is not installed.
    """
    _matplotlib()
    run, image = Path(run), Path(image)
    model, config, maker = open_run(run, build, **settings)
    images = open_images([image], config.data)
    device = next(model.parameters()).device
    batch = {name: x.to(device) for name, x in next(held_out_batches(images, config, maker.margin, 1)).items()}
    views = maker(batch, Draws(HELD_OUT_SEED, batch["epoch"], batch["index"], device))
    known = [config.data.spacing] if config.data.spacing else images.report.spacings
    spacing = known[0] if len(config.data.crop) == 3 and len(known) == 1 else None
    if out is None:
        folder = run if run.is_dir() else run.parent
        suffix = max((s for s in SUFFIXES if image.name.lower().endswith(s)), key=len, default="")
        out = folder / "figures" / f"{image.name[: len(image.name) - len(suffix)]}.png"
    elif Path(out).exists():
        raise FileExistsError(f"visualize: {out} exists already; choose another name for the figure")
    return figure(model, views, out, spacing)


def figure(
    model: COVER, views: Views, path: str | PathLike, spacing: Sequence[float] | None = None, sample: int = 0
) -> Path:
    """Draw one sample of `views`, the model's prediction and its features, and save the figure.

    It shows both views and view a moved by the prediction; the true and the predicted displacement, as a warped grid
    and as magnitude; the error; and for each level the features of both views in the colours of `pca_rgb`. Of a
    volume, three orthogonal planes through its centre.

    Args:
        model: takes the views; put it into eval mode before if it has layers for which that matters.
        views: two views [B, in_channels, *S] and how they correspond, on the device of the model.
        path: where to save, in any format that matplotlib writes; folders are made, an existing file is replaced.
        spacing: voxel size in mm, one per axis; default: distances in voxels.
        sample: which of the B samples.

    Returns:
        `path`.

    Raises:
        ImportError: the extra `plot` is not installed.
    """
    Figure = _matplotlib()
    views = Views(*(x[sample : sample + 1] for x in views))
    with torch.no_grad():
        prediction = model(views.a, views.b)
    planes = _planes(views.a.shape[2:], spacing)
    panels, by_view = _view_panels(views, prediction), _feature_panels(prediction, model.backbone.strides)
    if len(planes) == 1:
        rows = [panels[0::2], panels[1::2], *by_view]
    else:
        # a panel is three planes wide: two in a row, view a beside view b
        rows = [list(pair) for pair in (*zip(panels[0::2], panels[1::2], strict=True), *zip(*by_view, strict=True))]

    aspect = max(plane.height for plane in planes) / sum(plane.width for plane in planes)
    heights = [_WIDTH / len(row) * aspect + 0.2 + 0.2 * len(row[0].title.splitlines()) for row in rows]
    sheet = Figure(figsize=(_WIDTH, sum(heights) + 0.5), layout="constrained")
    sheet.suptitle(_caption(views, prediction, spacing), fontsize=10)
    for strip, row in zip(np.ravel(sheet.subfigures(len(rows), 1, height_ratios=heights)), rows, strict=True):
        for part, panel in zip(np.ravel(strip.subfigures(1, len(row))), row, strict=True):
            _draw(part, panel, planes, "voxels" if spacing is None else "mm")
    path = Path(path)
    path = path if path.suffix else path.with_name(f"{path.name}.png")  # as matplotlib would, but without saying so
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(path, dpi=110)
    return path


def pca_rgb(*maps: np.ndarray) -> tuple[list[np.ndarray], float]:
    """Colours for feature maps: their first three principal components as red, green and blue.

    Args:
        maps: float [C, *S] each, any S. They share one basis, so that equal colours are equal features.

    Returns:
        One [3, *S] per map, from 0 to 1 (the 1st to the 99th percentile of each component; 0.5 where it is constant),
        and the share of the variance, from 0 to 1, that the three components hold.
    """
    points = np.concatenate([x.reshape(len(x), -1).T for x in maps]).astype(np.float64)
    points -= points.mean(0)
    variances, basis = np.linalg.eigh(points.T @ points)
    variances, basis = variances[::-1].clip(min=0), basis[:, ::-1][:, :3]
    components = np.zeros((len(points), 3))
    components[:, : basis.shape[1]] = points @ basis
    low, high = np.percentile(components, [1, 99], axis=0)
    constant = high - low <= 1e-6 * np.abs(components).max()
    colours = np.where(constant, 0.5, (components - low) / np.where(constant, 1, high - low)).clip(0, 1)
    parts = np.split(colours, np.cumsum([x[0].size for x in maps])[:-1])
    share = variances[:3].sum() / variances.sum() if variances.any() else 1.0
    return [part.T.reshape(3, *x.shape[1:]) for part, x in zip(parts, maps, strict=True)], float(share)


class _Panel(NamedTuple):
    """One picture of the figure; of a volume, its three planes."""

    title: str
    image: np.ndarray  # [*S], or [3, *S] from 0 to 1 for colours
    how: Mapping[str, Any] = MappingProxyType({})  # for imshow
    stride: tuple[int, ...] | None = None  # of the image to the input; None: 1
    unit: str | None = None  # of the colour bar; None: no bar
    grid: np.ndarray | None = None  # displacement [d, *S] that is drawn as a grid, voxels
    colour: str | None = None  # of that grid


class _Plane(NamedTuple):
    """A plane through the image."""

    cut: int | None  # the axis that it cuts in the middle; None: the image is 2D
    size: tuple[int, ...]  # of the image, voxels
    spacing: tuple[float, ...]  # size of a voxel, in the unit of the figure

    @property
    def shown(self) -> tuple[int, int]:
        """The axes shown, vertical and horizontal. Volumes are in canonical order: the later axis points upward."""
        return (0, 1) if self.cut is None else tuple(axis for axis in (2, 1, 0) if axis != self.cut)

    @property
    def height(self) -> float:
        return self.size[self.shown[0]] * self.spacing[self.shown[0]]

    @property
    def width(self) -> float:
        return self.size[self.shown[1]] * self.spacing[self.shown[1]]

    @property
    def middle(self) -> int:
        """Where the plane lies on the axis that it cuts, voxels."""
        return self.size[self.cut] // 2

    def of(self, x: np.ndarray, stride: tuple[int, ...]) -> np.ndarray:
        """The plane of x [..., *S_l], as [..., vertical, horizontal]."""
        if self.cut is None:
            return x
        return np.take(x, self.middle // stride[self.cut], axis=x.ndim - 3 + self.cut).swapaxes(-1, -2)

    def place(self, position: np.ndarray, axis: int) -> np.ndarray:
        """A position along an axis, in voxels of the input, as a coordinate of the plot, which starts at 0."""
        return (position + 0.5) * self.spacing[axis]


def _planes(size: Sequence[int], spacing: Sequence[float] | None) -> list[_Plane]:
    spacing = tuple(spacing or [1.0] * len(size))
    return [_Plane(cut, tuple(size), spacing) for cut in ((None,) if len(size) == 2 else (0, 1, 2))]


def _array(x: Tensor) -> np.ndarray:
    """The only sample of x [1, ...], as numpy."""
    return x[0].cpu().numpy()


def _view_panels(views: Views, prediction: Prediction) -> list[_Panel]:
    """All but the features, in pairs that belong together."""
    moved = warp(views.a, prediction.flow, padding="border")
    # colour images are shown by their mean
    a, b, moved = (_array(x).mean(0) for x in (views.a, views.b, moved))
    true, predicted, outside = _array(views.flow), _array(prediction.flow), ~_array(views.mask)[0]
    lengths = [np.ma.array(np.linalg.norm(x, axis=0), mask=outside) for x in (true, predicted, predicted - true)]
    longest, worst = (max([x.max() for x in some if x.count()], default=1.0) for some in (lengths[:2], lengths[2:]))
    grey = {"cmap": "gray", "vmin": min(a.min(), b.min()), "vmax": max(a.max(), b.max())}
    magnitude = {"cmap": "viridis", "vmin": 0, "vmax": longest}
    return [
        _Panel("view a", a, grey),
        _Panel("view b", b, grey),
        _Panel("true: grid of view b, drawn in view a", a, grey, grid=true, colour=_TRUE),
        _Panel("predicted: grid of view b, drawn in view a", a, grey, grid=predicted, colour=_PREDICTED),
        _Panel("true magnitude", lengths[0], magnitude, unit="voxels"),
        _Panel("predicted magnitude", lengths[1], magnitude, unit="voxels"),
        _Panel("view a moved by the prediction", moved, grey),
        _Panel("error |predicted - true|", lengths[2], {"cmap": "magma", "vmin": 0, "vmax": worst}, unit="voxels"),
    ]


def _feature_panels(prediction: Prediction, strides: Sequence[tuple[int, ...]]) -> tuple[list[_Panel], list[_Panel]]:
    """The features of view a and of view b on every level, coarse to fine."""
    panels = ([], [])
    for level, (a, b, stride) in enumerate(zip(prediction.features_a, prediction.features_b, strides, strict=True)):
        colours, share = pca_rgb(_array(a), _array(b))
        by = "x".join(map(str, stride if len(set(stride)) > 1 else stride[:1]))
        for view, image, row in zip("ab", colours, panels, strict=True):
            title = f"features of {view}, level {level}\n{a.shape[1]} channels, stride {by}, {share:.0%} of variance"
            row.append(_Panel(title, image, stride=stride))
    return panels


def _caption(views: Views, prediction: Prediction, spacing: Sequence[float] | None) -> str:
    errors, zero = (epe(flow, views.flow, views.mask) for flow in (prediction.flow, torch.zeros_like(views.flow)))
    size = " x ".join(map(str, views.a.shape[2:])) + " voxels"
    if spacing is not None:
        size += " of " + " x ".join(f"{s:.3g}" for s in spacing) + " mm"
    if not len(errors):
        return f"{size}; no voxel of view b has its match inside view a"
    return (
        f"{size}; endpoint error: mean {errors.mean():.2f}, median {errors.median():.2f} voxels "
        f"(predicting zero: {zero.mean():.2f}); grey: the match lies outside view a"
    )


def _draw(part, panel: _Panel, planes: list[_Plane], unit: str) -> None:
    """Draw a panel into a subfigure."""
    part.suptitle(panel.title, fontsize=9)
    widths = [plane.width for plane in planes]
    for axes, plane in zip(part.subplots(1, len(planes), width_ratios=widths, squeeze=False)[0], planes, strict=True):
        stride = panel.stride or (1,) * len(plane.size)
        image = plane.of(panel.image, stride)
        bottom, right = (n * stride[i] * plane.spacing[i] for n, i in zip(image.shape[-2:], plane.shown, strict=True))
        shown = axes.imshow(
            np.moveaxis(image, 0, -1) if image.ndim == 3 else image,
            extent=(0, right, 0, bottom) if plane.cut is not None else (0, right, bottom, 0),
            origin="upper" if plane.cut is None else "lower",
            interpolation="nearest",
            **panel.how,
        )
        axes.set_facecolor(_OUTSIDE)
        if panel.grid is not None:
            _draw_grid(axes, plane, panel.grid, panel.colour)
        limits = (plane.height, 0) if plane.cut is None else (0, plane.height)
        axes.set(xlim=(0, plane.width), ylim=limits, xticks=[], yticks=[])
        if plane.cut is not None:
            axes.set_xlabel(f"axis {plane.cut} at voxel {plane.middle}", fontsize=6, labelpad=2)
        _draw_scale_bar(axes, plane, unit)
    if panel.unit is not None:
        part.colorbar(shown, ax=part.axes, shrink=0.8, pad=0.02, label=panel.unit)


def _draw_grid(axes, plane: _Plane, flow: np.ndarray, colour: str) -> None:
    """Lines of the regular grid of view b, each point p at p + flow(p); the component across the plane is left out."""
    step = max(1, round(max(plane.size) / _GRID_LINES))
    index = np.indices(flow.shape[1:])
    y, x = (plane.place(plane.of(index[i] + flow[i], (1,) * len(flow)), i) for i in plane.shown)
    start = step // 2
    for lines in ((x[start::step].T, y[start::step].T), (x[:, start::step], y[:, start::step])):
        axes.plot(*lines, color=colour, linewidth=0.7)


def _draw_scale_bar(axes, plane: _Plane, unit: str) -> None:
    """A bar of a round length, about a quarter of the plane, in its lower left corner."""
    exponent = 10.0 ** np.floor(np.log10(plane.width / 4))
    length = exponent * max(m for m in (1, 2, 5) if m * exponent <= plane.width / 4)
    across = 0.05 if plane.cut is not None else 0.95
    y = across * plane.height
    x = 0.05 * plane.width
    for width, colour in ((3.5, "black"), (1.5, "white")):
        axes.plot([x, x + length], [y, y], color=colour, linewidth=width, solid_capstyle="butt")
    axes.annotate(
        f"{length:g} {unit}",
        (x, y),
        (0, 3),
        textcoords="offset points",
        fontsize=6,
        color="white",
        bbox={"facecolor": "black", "alpha": 0.4, "pad": 0.6, "linewidth": 0},
    )


def _matplotlib():
    """matplotlib's Figure class, used without pyplot: no window, no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the figure needs matplotlib: pip install 'cover-vcl[plot]'") from error
    return Figure
