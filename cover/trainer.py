"""Pretraining by vector contrastive learning: the life of a run, one method per stage, to be read top to bottom."""

import contextlib
import hashlib
import itertools
import json
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Generator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cover import checkpoint, config, memory, processes, sharding
from cover.config import Config
from cover.data import BatchSampler, ImageSet, PretrainDataset, batches_of, open_images, splits
from cover.evaluation import Evaluation, device_of, measure
from cover.learner import Learner
from cover.log import NoLog, RunInUse, RunLog, lock
from cover.model import COVER, build_model
from cover.presets import preset_config
from cover.process import Interrupted, StopSignals, keeping_freed_memory, peak_memory
from cover_kernels import __version__
from cover_kernels.backends import choose

# the features have collapsed when, over so many steps, feature_variance (1: all directions, 0: one) is below this and
# the EPE above this share of that of predicting zero. The variance alone does not tell: L_con by itself brings it to
# 0.02 within a hundred steps, but runs that learn go through 0.02 as well
COLLAPSE_STEPS, COLLAPSE_VARIANCE, COLLAPSE_ERROR = 50, 0.05, 0.9

# settings that may differ when a run is resumed: none of them changes the weights or the records
_FREE = {
    *("workers", "device", "compile", "shard", "check_memory", "cache", "store", "tensorboard"),
    *("log_every", "checkpoint_every", "keep", "keep_every"),
}


class WriteError(RuntimeError):
    """The run's folder cannot be written: disk full, quota, permissions; the message names the last good checkpoint."""


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite; the message names the step, the files and the way back."""


def pretrain(
    data: Any,
    preset: str | None = None,
    *,
    out: str | PathLike,
    resume: bool = False,
    val: Any = None,
    build: Callable[[Config], COVER] = build_model,
    **settings: Any,
) -> Path:
    """Pretrain a backbone on unlabelled images (`cover pretrain DATA --preset P --out RUN key=value ...`).

    Args:
        data: a folder, an image, a list of images, or a CSV, JSON or text manifest; see `cover.data.open_images`.
        preset: name of a preset (`cover presets` lists them); None: the defaults.
        out: folder of the run: config.json, metrics.jsonl, log.txt, checkpoints/ and, at the end, backbone.pt.
        resume: continue the run in `out` from its last checkpoint; start it where there is none.
        val: held-out images; None: the "val" rows of a manifest, else a share `val_fraction` of the images.
        build: makes the model from the settings, where its backbone is not to be the U-Net; `cover.load_model`,
            `cover.load_backbone`, `cover.evaluate` and `cover.visualize` then want the same function.
        **settings: single settings by name, over those of the preset; see `cover.config`.

    Returns:
        `out`.

    Raises:
        FileExistsError: `out` holds a run already and `resume` is False. FileNotFoundError: no such data.
        ValueError: a setting or the data cannot be used, the message names it; `memory.DoesNotFit` among them, where a
            step would need more memory than there is. NonFiniteLoss, WriteError: see there.
        Interrupted: Ctrl-C, SIGTERM or SIGUSR1 came; the run is saved and can be resumed.
    """
    wanted = run_config(Path(out), preset, resume or processes.restarted(), settings)
    plenty = wanted.train.check_memory and memory.require(wanted, build)
    with processes.group(wanted.train.device), keeping_freed_memory(plenty and device_of(wanted).type == "cpu"):
        return Trainer(wanted, data, out, val, build).run()


def run_config(out: Path, preset: str | None, resume: bool, settings: dict[str, Any]) -> Config:
    """The settings of a new run, or those of the run in `out`, which only harmless ones may change."""
    started = out / "config.json"
    wanted = config.replace(preset_config(preset or "default"), **settings)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"pretrain: {out} is a file; a run needs a folder")
    if not started.exists():
        # what a run leaves that was killed before it began
        empty_log = {path.name for path in out.glob("log.txt") if path.stat().st_size == 0}
        others = {path.name for path in out.glob("*")} - {"cache", "config.json.tmp"} - empty_log
        if others:
            raise FileExistsError(f"pretrain: {out} holds other files ({sorted(others)[0]}); choose another folder")
        return wanted
    if not resume:
        raise FileExistsError(f"pretrain: {out} holds a run; resume it (--resume) or choose another folder")
    try:
        stored = config.from_dict(json.loads(started.read_text(encoding="utf-8")))
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"pretrain: {started} cannot be read: {error}") from error
    wanted = config.flatten(wanted)
    for name, value in config.flatten(stored).items():
        asked = preset is not None or name in settings
        if asked and name not in _FREE and wanted[name] != value:
            raise ValueError(f"pretrain: the run in {out} has {name}={value!r}, it cannot go on with {wanted[name]!r}")
    return config.replace(stored, **{name: wanted[name] for name in _FREE & set(settings)})


class Trainer(Learner):
    """One run. A variant overrides the method that it does differently.

    Args:
        settings: all settings; see `run_config`.
        data, out, val, build: see `pretrain`.
    """

    def __init__(
        self,
        settings: Config,
        data: Any,
        out: str | PathLike,
        val: Any = None,
        build: Callable[[Config], COVER] = build_model,
    ):
        self.out = Path(out)
        self.found = self.what_is_there()
        self.step = 0  # steps done
        self.seen = 0  # images, in all processes
        self.recent = deque(maxlen=COLLAPSE_STEPS)  # (feature_variance, epe, epe_zero) of the last steps
        self.collapsed = self.empty = False  # whether it has been said
        torch.manual_seed(settings.train.seed)
        super().__init__(settings, build)
        with processes.one_after_the_other():  # they share the cache
            self.images, self.held_out = self.open_data(data, val)
        self.restore()

    # Setting up

    def open_data(self, data: Any, val: Any) -> tuple[ImageSet, ImageSet | None]:
        """The images to train on and the held-out ones, None where there are none."""
        c = self.config.data
        cache = c.cache or self.out / "cache"
        named = splits(data)
        images = open_images(data, c, "train" if named else None, cache)
        if val is not None:
            return images, open_images(val, c, "val" if "val" in splits(val) else None, cache)
        if "val" in named:
            return images, open_images(data, c, "val", cache)
        images, held_out = images.split(c.val_fraction, self.config.train.seed)
        return images, held_out if len(held_out) else None

    # The run

    def run(self) -> Path:
        """Train to the last step; returns the folder of the run."""
        try:
            return self.train()
        except RunInUse:
            raise
        except OSError as error:
            last = (checkpoint.all_of(self.out) or ["none yet"])[-1]
            raise WriteError(f"stopped after step {self.step}: {error}; the last good checkpoint is {last}") from error
        finally:
            # DDP may not be the last to hold the process group: it would wait for gloo's thread, which may wait for
            # Python
            self.network = self.model

    def train(self) -> Path:
        """As `run`, but a folder that cannot be written is an OSError."""
        self.begin()
        with StopSignals() as stop, self.log, contextlib.closing(self.batches()) as batches:
            self.announce()
            begun = time.perf_counter()
            for batch in batches:
                waited = time.perf_counter() - begun
                replaced = [complaint for complaint in batch.pop("replaced") if complaint]
                metrics = self.train_step(batch)
                self.step += 1
                self.seen += self.config.train.batch * processes.count()
                # what any process has met, all must know
                flags = torch.tensor([len(replaced), stop.received is not None], device=self.device)
                metrics["replaced"], stopping = processes.total(flags).tolist()
                for complaint in itertools.chain(*processes.gathered(replaced)) if metrics["replaced"] else ():
                    self.log.message(f"warning: {complaint}")
                self.report(metrics, waited, time.perf_counter() - begun)
                last = self.step == self.config.train.steps
                if last or self.is_due(self.config.train.val_every):
                    self.validate()
                if last or stopping or self.is_due(self.config.train.checkpoint_every):
                    self.save()
                if stopping and not last:
                    self.log.message(f"stopped after step {self.step}; saved, to be resumed")
                    received = stop.received or signal.SIGTERM
                    raise Interrupted(received, f"stopped after step {self.step}; continue with --resume")
                begun = time.perf_counter()
            self.finish()
        return self.out

    def begin(self) -> None:
        """Make the folder of the run what it was at the last checkpoint, or a new one."""
        if processes.rank() > 0:
            self.log = NoLog()
            return
        text = lock(self.out)
        if self.found != self.what_is_there():
            text.close()
            raise RunInUse(f"pretrain: another process has been at work on the run in {self.out} meanwhile")
        with checkpoint.atomic(self.out / "config.json", "w") as file:
            json.dump(config.to_dict(self.config), file, indent=2)
        c = self.config.train
        self.log = RunLog(self.out, text, self.step, c.steps, c.log_every, c.tensorboard)
        for path in self.damaged:  # put aside: it would count among the last ones that are kept
            path.replace(path.with_suffix(".damaged"))

    def what_is_there(self) -> tuple[bool, list[Path]]:
        """Whether a run has begun in the folder, and its checkpoints."""
        return (self.out / "config.json").exists(), checkpoint.all_of(self.out)

    def announce(self) -> None:
        """Say what is trained on what."""
        held_out = f"{len(self.held_out)} held out" if self.held_out else "none held out: no validation"
        parameters = sum(p.numel() for p in self.model.parameters())
        kernels = choose(self.device)[0]
        versions = f"cover {__version__} with {kernels} kernels, torch {torch.__version__}"
        share = f"process 1 of {processes.count()}, with {torch.get_num_threads()} threads"
        self.log.message(f"{versions}, {self.device}, {self.precision}, {share}, run {self.out}")
        self.log.message(str(self.images.report))
        self.log.message(f"{len(self.images)} images, {held_out}; network of {parameters:,} parameters")
        dvf, reach = self.views.dvf.config, tuple(round(r, 1) for r in self.model.pyramid.reach)
        fitted = f"reach of the pyramid {reach} voxels; rotation {dvf.rotation:.3g} degrees, scale {dvf.scale:.3g}"
        self.log.message(
            f"{fitted}, shear {dvf.shear:.3g}, translation {dvf.translation:.3g}, nonrigid {dvf.nonrigid:.3g}"
        )
        for complaint in self.damaged.values():
            self.log.message(f"warning: {complaint}; put aside as .damaged, the checkpoint before it is taken")
        self.log.message(f"resumed after step {self.step}" if self.step else f"{self.config.train.steps} steps")

    def batches(self) -> Generator[dict[str, Any], None, None]:
        """The batches of all steps still to do, each a pure function of the seed and the step."""
        c = self.config
        dataset = PretrainDataset(self.images, c.data, self.views.margin, c.train.seed)
        sampler = BatchSampler(
            len(dataset),
            c.train.batch,
            c.train.seed,
            self.seen,
            steps=c.train.steps - self.step,
            rank=processes.rank(),
            ranks=processes.count(),
        )
        return batches_of(dataset, sampler, c.data.workers, pin_memory=self.device.type == "cuda")

    def train_step(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One step of the optimiser; returns its metrics. NonFiniteLoss leaves the weights as they were."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate(self.step)
        metrics = self.gradients(batch)
        # one transfer from the device for all of them
        metrics = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
        # with its loss scaled, an infinite gradient skips the step and lowers the scale
        finite = [metrics["loss"], *([] if self.scaler.is_enabled() else [metrics["gradient_norm"]])]
        if not all(map(math.isfinite, finite)):
            self.fail(batch, metrics)
        self.update()
        return metrics | {"lr": self.learning_rate(self.step)}

    def report(self, metrics: dict[str, float], waited: float, elapsed: float) -> None:
        """Record the metrics of the step that was just done, which took `elapsed` seconds."""
        metrics = metrics | {
            "samples_per_second": self.config.train.batch * processes.count() / elapsed,
            "data_wait": waited / elapsed,  # share of the time of the step
            "peak_memory_mb": peak_memory(self.device) / 2**20,
        }
        self.log.record("train", self.step, metrics)
        self.log.progress(self.step, {name: metrics[name] for name in ("loss", "epe", "samples_per_second")})
        self.watch_collapse(metrics)
        if not metrics["mask_fraction"] and not self.empty:
            self.log.message(
                "warning: no voxel of view b has its match inside view a, nothing is learned from such a batch. "
                "Is `crop` too small, or are the displacements too large?"
            )
            self.empty = True

    def watch_collapse(self, metrics: dict[str, float]) -> None:
        """Warn, once, when all voxels have come to look alike to the network."""
        self.recent.append([metrics[name] for name in ("feature_variance", "epe", "epe_zero")])
        variance, error, zero = (sum(values) / len(values) for values in zip(*self.recent, strict=True))
        full = len(self.recent) == COLLAPSE_STEPS
        collapsed = full and variance < COLLAPSE_VARIANCE and error > COLLAPSE_ERROR * zero
        if collapsed and not self.collapsed:
            self.log.message(
                f"warning: the features have collapsed: in the {COLLAPSE_STEPS} steps to {self.step} their variance is "
                f"{variance:.3g}, the EPE {error:.3g} voxels (predicting zero {zero:.3g}). "
                "Is `vector_weight` too small, or `lr` too large?"
            )
        self.collapsed = collapsed

    def is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def validate(self) -> Evaluation | None:
        """Evaluate on the held-out images, always under the same transforms."""
        if self.held_out is None:
            return None
        samples = self.config.train.val_samples
        with sharding.whole(self.model):
            result = measure(self.model, self.held_out, self.views, self.config, samples, self.log.message)
        self.log.record("val", self.step, result.as_record())
        self.log.message(f"validation after step {self.step}:\n{result}")
        return result

    def finish(self) -> None:
        """Leave the backbone by itself, for fine-tuning."""
        weights = sharding.gathered(self.model.backbone.state_dict())
        if processes.rank() > 0:
            return
        content = {"config": config.to_dict(self.config), "backbone": weights}
        checkpoint.save(self.out / "backbone.pt", content)
        self.log.message(f"done: {self.out / 'backbone.pt'}, {checkpoint.find(self.out)}")

    def fail(self, batch: dict[str, Tensor], metrics: dict[str, float]) -> None:
        """Stop at a loss that is no number."""
        checkpoints = checkpoint.all_of(self.out)
        figures = ", ".join(
            f"{name} {metrics[name]:g}" for name in ("vector_loss", "consistency_loss", "gradient_norm")
        )
        names = [self.images.name(i) for i in itertools.chain(*processes.gathered(batch["index"].tolist()))]
        raise NonFiniteLoss(
            f"step {self.step + 1}: the loss is {metrics['loss']:g} ({figures}); the batch was "
            f"{'; '.join(names)}; the last good checkpoint is "
            f"{checkpoints[-1] if checkpoints else 'none yet'}"
        )

    # Saving

    def save(self) -> None:
        """Write a checkpoint, from which the run goes on bit for bit."""
        state = sharding.gathered(self.state())
        if processes.rank() > 0:
            return
        self.log.sync()
        checkpoint.save(checkpoint.path_of(self.out, self.step), state)
        checkpoint.prune(self.out, self.config.train.keep, self.config.train.keep_every)

    def state(self) -> dict[str, Any]:
        """All that the run's future depends on. The schedule and the position in the data follow from the step."""
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        return {
            "version": __version__,
            "config": config.to_dict(self.config),
            "step": self.step,
            "seen": self.seen,
            "images": fingerprint(self.images),
            "held_out": fingerprint(self.held_out),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generators": {"cpu": torch.get_rng_state(), "cuda": cuda},
        }

    def restore(self) -> None:
        """Go on from the last checkpoint, where there is one."""
        self.damaged: dict[Path, str] = {}
        if not checkpoint.all_of(self.out):
            return
        state, self.damaged = checkpoint.load_last(self.out)
        if "optimiser" not in state:
            raise ValueError(f"pretrain: {checkpoint.find(self.out)} is no checkpoint of a run, but a backbone")
        stored, wanted = config.flatten(config.from_dict(state["config"])), config.flatten(self.config)
        if other := [name for name in stored if name not in _FREE and stored[name] != wanted[name]]:
            raise ValueError(
                f"pretrain: the last checkpoint in {self.out} has {other[0]}={stored[other[0]]!r}, its config.json "
                f"{wanted[other[0]]!r}"
            )
        for name, images, what in (("images", self.images, "trained"), ("held_out", self.held_out, "evaluated")):
            if state[name] != fingerprint(images):
                raise ValueError(f"pretrain: these are not the images that the run in {self.out} was {what} on")
        self.step, self.seen = state["step"], state["seen"]
        sharding.load(self.model, self.optimiser, state["model"], state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["generators"]["cpu"])
        if self.device.type == "cuda" and state["generators"]["cuda"]:
            torch.cuda.set_rng_state_all(state["generators"]["cuda"])


def fingerprint(images: ImageSet | None) -> str:
    """What the order of the data depends on: the names of the images."""
    names = "\n".join(map(images.name, range(len(images)))) if images else ""
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()  # file names need not be UTF-8
