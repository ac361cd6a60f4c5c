"""Checkpoints: written atomically, complete, and read back without running any code that they may carry."""

import contextlib
import errno
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cover import config as settings
from cover.config import Config
from cover.model import COVER, build_model


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` (tensors, numbers, text, and lists and dicts of these) to `path`, all of it or nothing.

    Whatever kills the process or the machine meanwhile, `path` is afterwards what it was before or all of the new.
    """
    with atomic(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's own writer, of a disk that is full
            raise OSError(errno.EIO, f"cannot be written ({str(error).splitlines()[0]})", str(path)) from error


@contextlib.contextmanager
def atomic(path: Path, mode: str):
    """A file that takes the name `path` when the `with` block ends without an error, and not before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk, half a checkpoint is in everybody's way
        raise
    # the new name is safe only once the folder that holds it is on the disk
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The content of a file that `save` wrote for a run: its settings in "config", weights in "model" or "backbone".

    Raises FileNotFoundError where there is none, and ValueError, naming the file, where it cannot be used.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file fails in any way: OSError, KeyError, IndexError, ...
        raise ValueError(f"checkpoint: {path} is damaged or no checkpoint ({type(error).__name__})") from error
    if not isinstance(content, dict) or not {"model", "backbone"} & content.keys():
        raise ValueError(f"checkpoint: {path} was not written by a run of cover")
    try:
        settings.from_dict(content.get("config"))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint: the settings in {path} cannot be read: {error}") from error
    return content


def path_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in the folder of a run."""
    return Path(run) / "checkpoints" / f"step_{step:08d}.pt"


def step_of(path: Path) -> int:
    """The step of a checkpoint that lies at `path`."""
    return int(path.stem.removeprefix("step_"))


def all_of(run: Path) -> list[Path]:
    """The checkpoints of the run in the folder `run`, oldest first."""
    return sorted((Path(run) / "checkpoints").glob("step_????????.pt"))


def prune(run: Path, keep: int, keep_every: int = 0) -> None:
    """Delete checkpoints of a run, and what a killed process left half written.

    The last `keep` stay, and those of every `keep_every` steps (0: none of these).
    """
    old = [path for path in all_of(run)[:-keep] if not keep_every or step_of(path) % keep_every]
    for path in [*old, *(Path(run) / "checkpoints").glob("*.tmp")]:
        path.unlink()


def find(path: Path) -> Path:
    """`path` itself where it is a file, the last checkpoint where it is a run's folder; else FileNotFoundError."""
    path = Path(path)
    if path.is_file():
        return path
    checkpoints = all_of(path)
    if not checkpoints:
        what = "the folder holds no checkpoint" if path.is_dir() else "there is no such file or folder"
        raise FileNotFoundError(f"checkpoint: {path}: {what}; expected the folder of a run or a checkpoint")
    return checkpoints[-1]


def load_last(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Any], dict[Path, str]]:
    """The content of a file, or of the last checkpoint of a run that is whole; and what is wrong with later ones.

    Raises:
        FileNotFoundError: there is nothing to load. ValueError: nothing there can be used.
    """
    last, damaged = find(path), {}
    for candidate in reversed(all_of(path)) if Path(path).is_dir() else [last]:
        try:
            return load(candidate, device), damaged
        except ValueError as error:
            damaged[candidate] = str(error)
    raise ValueError(damaged[last])


def load_model(
    path: Path, device: torch.device | str = "cpu", build: Callable[[Config], COVER] = build_model
) -> tuple[COVER, Config]:
    """The model of a run, in eval mode, and the run's settings.

    Args:
        path: the folder of a run (its last checkpoint is taken) or a checkpoint.
        device: where the model is put.
        build: makes the model from the settings; for a run with a backbone of one's own, the function that made it.

    Raises:
        FileNotFoundError: no such run. ValueError: the file cannot be used, or its weights do not fit the model.
    """
    content = _load_and_warn(path, device)
    if "model" not in content:
        raise ValueError(f"checkpoint: {path} holds a backbone without the vector pyramid; use load_backbone")
    config = settings.from_dict(content["config"])
    model = build(config).to(device)
    _load_weights(model, content["model"], path)
    return model.eval(), config


def load_backbone(
    path: Path, device: torch.device | str = "cpu", build: Callable[[Config], COVER] = build_model
) -> nn.Module:
    """The pretrained backbone, in eval mode, for fine-tuning.

    Args:
        path: the folder of a run, one of its checkpoints, or its `backbone.pt`.
        device: where the backbone is put.
        build: as for `load_model`.

    Raises:
        As `load_model`.
    """
    content = _load_and_warn(path, device)
    model = build(settings.from_dict(content["config"])).to(device)
    if "backbone" in content:
        _load_weights(model.backbone, content["backbone"], path)
    else:
        _load_weights(model, content["model"], path)
    return model.backbone.eval()


def _load_and_warn(path: Path, device: torch.device | str) -> dict[str, Any]:
    content, damaged = load_last(path, device)
    for complaint in damaged.values():
        warnings.warn(f"{complaint}; the checkpoint before it is taken", stacklevel=3)
    return content


def _load_weights(module: nn.Module, weights: dict[str, Any], path: Path) -> None:
    try:
        module.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"checkpoint: the weights in {path} do not fit the model that its settings describe; a run with a backbone "
            f"of its own needs the `build` that made it. {error}"
        ) from error
