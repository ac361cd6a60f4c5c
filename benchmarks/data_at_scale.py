"""Does the data keep up? The stores of the cache compared, many files, more data than memory, and waiting in a run.

    python benchmarks/data_at_scale.py stores DATA    # size of the cache and time of a crop
    python benchmarks/data_at_scale.py files          # 10,000 files: start-up, memory over 1000 steps
    python benchmarks/data_at_scale.py memory         # a cache that is larger than the memory which is allowed
    python benchmarks/data_at_scale.py run DATA       # a run with 2 workers: samples per second, share spent waiting

Settings follow as key=value, over those of --preset. What is made lies in a temporary folder (TMPDIR).
"""

import argparse
import dataclasses
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np

import cover.data.cache
from cover import config, log, pretrain
from cover.cli import read_settings
from cover.data import BatchSampler, ImageSet, PretrainDataset, batches_of, open_images
from cover.model import build_model
from cover.presets import preset_config
from cover.views import ViewMaker, fit_to_reach

MIB = 2**20


def stores(data: str, settings: config.Config, work: Path, chunks: list[int]) -> None:
    """Bytes and the time of a crop with its margin, of `.npy` and of Blosc2 with chunks of several sizes."""
    reach = build_model(settings).pyramid.reach
    views = ViewMaker(fit_to_reach(settings.dvf, settings.data.crop, reach), settings.appearance, settings.data.crop)
    sets = {}
    for chunk in (0, *chunks):
        cover.data.cache._CHUNK = chunk
        c = dataclasses.replace(settings.data, store="blosc2" if chunk else "npy", workers=0)
        images = open_images(data, c, cache=work / str(chunk))
        sets[chunk] = images, PretrainDataset(images, c, views.margin, seed=0)
    raw = sets[0][0].report.cache_bytes
    patch = tuple(size + 2 * m for size, m in zip(settings.data.crop, views.margin, strict=True))
    print(f"{len(sets[0][0])} images, the first of {sets[0][0].array(0).shape[1:]}; patches of {patch}")
    times = {chunk: [] for chunk in sets}
    for key in range(-len(sets), 200):  # in turn: other work on the machine falls on all of them alike
        for chunk, (images, dataset) in sets.items():
            begun = time.thread_time()
            dataset[0, key % len(images)]
            if key >= 0:
                times[chunk].append(1e3 * (time.thread_time() - begun))
    print("store                MB   ratio   ms of processor time for a crop: median, 95 %")
    for chunk, (images, _) in sets.items():
        name, size = f"blosc2 {chunk}^3" if chunk else "npy", images.report.cache_bytes
        print(
            f"{name:12} {size / 1e6:10.1f} {raw / size:7.2f} {median(times[chunk]):7.2f} "
            f"{np.quantile(times[chunk], 0.95):7.2f}"
        )


def small_files(folder: Path, count: int, shape: tuple[int, ...]) -> Path:
    """`count` images of smooth noise."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(count):
        np.save(folder / f"{i:05}.npy", generator.normal(size=shape).cumsum(-1).astype(np.float32))
    return folder


def steps_of(images: ImageSet, settings: config.Config) -> Iterator[int]:
    """Loads the batches of a run, and yields how many were loaded."""
    c = settings
    dataset = PretrainDataset(images, c.data, tuple(4 for _ in c.data.crop), c.train.seed)
    sampler = BatchSampler(len(images), c.train.batch, c.train.seed, steps=c.train.steps)
    for step, _ in enumerate(batches_of(dataset, sampler, c.data.workers), 1):
        yield step


def memory_of(pid: int) -> dict[str, float]:
    """MiB of a process: all that is resident, and what it shares with no other and has written."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    values = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    return {"resident": values["Rss"], "its own": values["Private_Dirty"]}


def files(settings: config.Config, work: Path, count: int) -> None:
    """Start-up with many files, and the memory of all processes over the steps."""
    data = small_files(work / "data", count, (16,) * len(settings.data.crop))
    for name in ("first start", "second start"):
        begun = time.perf_counter()
        images = open_images(data, settings.data, cache=work / "cache")
        print(f"{name}: {time.perf_counter() - begun:.1f} s for {len(images)} images", flush=True)
    print("MiB, resident and its own:\n  step   main process        " + "worker              " * settings.data.workers)
    begun = time.perf_counter()
    for step in steps_of(images, settings):
        if step in (1, 10) or step % (settings.train.steps // 10) == 0:
            pids = [os.getpid(), *sorted(process.pid for process in multiprocessing.active_children())]
            cells = [" ".join(f"{v:8.1f}" for v in memory_of(pid).values()) for pid in pids]
            print(f"{step:6}   {'   '.join(cells)}", flush=True)
    print(f"{(time.perf_counter() - begun) / settings.train.steps * 1e3:.2f} ms for a step")


def memory(settings: config.Config, work: Path, count: int) -> None:
    """Go through a cache with the address space limited to less than its size on top of what is taken before."""
    data = small_files(work / "data", count, (192,) * 3)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = taken + 512 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # of the workers too
    images = open_images(data, settings.data, cache=work / "cache")
    cached = sum(file.stat().st_size for file in (work / "cache").glob("*.volume"))
    voxels = len(images) * 2 * 192**3
    print(f"allowed: {taken / MIB:.0f} MiB of address space that is taken already, and 512 MiB more")
    print(f"cached: {voxels / MIB:.0f} MiB of voxels, in files of {cached / MIB:.0f} MiB")
    loaded = sum(1 for _ in steps_of(images, settings))
    print(f"{loaded} batches of {settings.train.batch} loaded, {len(images.report.problems)} problems")


def run(data: str, settings: config.Config, work: Path) -> None:
    """Train, and read from the metrics how fast it was and how long the steps waited for their data."""
    out = pretrain(data, out=work / "run", **config.flatten(settings))
    records = log.read(out, "train")
    records = records[min(10, len(records) // 2) :]  # the first steps are slower
    waits = [record["data_wait"] for record in records]
    print(
        f"{len(records)} steps: {median(record['samples_per_second'] for record in records):.3g} samples/s; share of a "
        f"step spent waiting for data: median {median(waits):.2%}, 95 % {np.quantile(waits, 0.95):.2%}; "
        f"largest memory {records[-1]['peak_memory_mb']:.0f} MiB; load of the machine {os.getloadavg()[0]:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    small = {"crop": (8, 8, 8), "workers": 2, "steps": 1000}

    def command(function, **defaults) -> argparse.ArgumentParser:
        sub = commands.add_parser(function.__name__, help=function.__doc__)
        sub.set_defaults(function=function, defaults=defaults, preset="small-3d")
        return sub

    sub = command(stores)
    sub.add_argument("data")
    sub.add_argument("--preset")
    sub.add_argument("--chunks", type=int, nargs="+", default=[16, 32, 48, 64], help="voxels along each axis")
    command(files, **small).add_argument("--count", type=int, default=10_000)
    command(memory, **small | {"crop": (96, 96, 96), "steps": 200}).add_argument("--count", type=int, default=80)
    sub = command(run, workers=2, steps=60, val_every=0, val_samples=1, log_every=20)
    sub.add_argument("data")
    sub.add_argument("--preset")
    options, rest = parser.parse_known_args()
    settings = config.replace(preset_config(options.preset), **(options.defaults | read_settings(rest)))
    arguments = {name: value for name, value in vars(options).items() if name in ("data", "chunks", "count")}
    with tempfile.TemporaryDirectory(prefix="cover-data-") as folder:
        options.function(settings=settings, work=Path(folder), **arguments)


if __name__ == "__main__":
    main()
