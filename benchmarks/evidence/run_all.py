"""All runs of the evidence, several at a time, the most telling first.

What has a result already is skipped, so that the script may be stopped and started again. Each run is a process with
one thread; runs that depend on a pretraining run wait for it.
"""

import os
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from sets import INITS, TASKS, VARIANTS, parser, result_path

HERE = Path(__file__).parent


class Job(NamedTuple):
    """One run: its command, the file that it leaves, and the files that must be there before it starts."""

    command: list[str]
    result: Path
    needs: tuple[Path, ...] = ()


def all_jobs(data: Path, out: Path, seeds: int) -> list[Job]:
    """Every run on test rows, in order of importance."""

    def pretraining(data_set: str, variant: str, seed: int) -> Job:
        result = result_path(out, "correspondence", "test", data_set, variant, seed)
        return Job(command("correspondence", data_set=data_set, variant=variant, seed=seed), result)

    def use(task: str, labels: int, init: str, seed: int) -> Job:
        result = result_path(out, "downstream", "test", task, labels, init, seed)
        needs = (pretraining(TASKS[task].pretrained_on, INITS[init], seed).result,) if INITS[init] else ()
        return Job(command("downstream", task=task, labels=labels, init=init, seed=seed), result, needs)

    def command(script: str, **options: str | int) -> list[str]:
        path = os.path.relpath(HERE / f"{script}.py")
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        return [sys.executable, path, f"--data={data}", f"--out={out}", *words]

    every, fewest = range(seeds), {name: task.labels[0] for name, task in TASKS.items()}
    ablations = [variant for variant in VARIANTS if variant != "full"]
    jobs = []
    for name, task in TASKS.items():
        jobs += [pretraining(task.pretrained_on, "full", seed) for seed in every]
        jobs += [use(name, fewest[name], init, seed) for seed in every for init in ("cover", "random")]
    for seed in every:
        jobs += [pretraining(data_set, variant, seed) for variant in ablations for data_set in ("cxr", "hippocampus")]
        jobs += [use(name, fewest[name], "con_only", seed) for name in ("lungs", "hippocampus")]
    for seed in every:
        jobs += [pretraining("ixi", "con_only", seed), use("ixi", fewest["ixi"], "con_only", seed)]
        jobs += [use(name, n, init, seed) for name, task in TASKS.items() for n in task.labels[1:] for init in INITS]
    return jobs


class Queue:
    """Hands out the jobs that are still to be done, in order, until `deadline` (of `time.monotonic`)."""

    def __init__(self, jobs: list[Job], deadline: float):
        self.waiting = [job for job in jobs if not job.result.exists()]
        self.deadline = deadline
        self.failed: list[Job] = []
        self.running = 0
        self.changed = threading.Condition()

    def take(self) -> Job | None:
        """The first job whose needs are met, once there is one; None when no job is left to start."""
        with self.changed:
            while self.waiting and time.monotonic() < self.deadline:
                for job in self.waiting:
                    if all(need.exists() for need in job.needs):
                        self.waiting.remove(job)
                        self.running += 1
                        return job
                if not self.running:  # what they need has failed
                    return None
                self.changed.wait(timeout=max(0.0, self.deadline - time.monotonic()))
            return None

    def done(self, job: Job) -> None:
        with self.changed:
            self.running -= 1
            if not job.result.exists():
                self.failed.append(job)
            self.changed.notify_all()


def work(queue: Queue, logs: Path) -> None:
    """Run jobs until none is left."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    while job := queue.take():
        started = time.monotonic()
        with open(logs / f"{job.result.parent.name}-{job.result.stem}.log", "w") as log:
            subprocess.run(job.command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        queue.done(job)
        outcome = f"{time.monotonic() - started:.0f} s" if job.result.exists() else f"FAILED, see {log.name}"
        print(f"{outcome}: {shlex.join(job.command[1:])}; {len(queue.waiting)} waiting", flush=True)


def main(arguments: list[str] | None = None) -> int:
    p = parser(__doc__)
    p.add_argument("--minutes", type=float, default=75, help="no run is started later than this")
    p.add_argument("--workers", type=int, default=2, help="runs at the same time")
    p.add_argument("--seeds", type=int, default=3)
    args = p.parse_args(arguments)

    logs = args.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    jobs = all_jobs(args.data, args.out, args.seeds)
    queue = Queue(jobs, time.monotonic() + 60 * args.minutes)
    print(f"{len(jobs)} runs, {len(queue.waiting)} still to do")
    workers = [threading.Thread(target=work, args=(queue, logs)) for _ in range(args.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(f"{len(queue.failed)} runs failed, {len(queue.waiting)} were not started")
    return 1 if queue.failed else 0


if __name__ == "__main__":
    sys.exit(main())
