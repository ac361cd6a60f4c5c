"""The command `cover`: pretrain, evaluate, visualize, plan, check and presets."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cover import config, memory, processes
from cover.data import DataError, check
from cover.evaluation import evaluate
from cover.figures import visualize
from cover.log import RunInUse
from cover.presets import PRESETS, preset_config
from cover.process import Interrupted
from cover.trainer import NonFiniteLoss, Trainer, WriteError, run_config
from cover_kernels import __version__


class UsageError(Exception):
    """What was asked for cannot be done; the message tells the user why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done; 1 the run failed, the check found problems, or what was planned does not fit; 2 what was
        asked for is impossible; 128 + n stopped at signal n; a run that was training is saved, unless it was asked
        twice.
    """
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    try:
        options.settings = read_settings(rest)
        return options.command(options)
    except UsageError as error:
        print(f"cover {options.name}: error: {error}", file=sys.stderr)
        return 2
    except (DataError, NonFiniteLoss, WriteError) as error:
        print(f"cover {options.name}: {error}", file=sys.stderr)
        return 1
    except Interrupted as interruption:
        return 128 + interruption.signal  # as a shell says it
    except BrokenPipeError:  # whoever read the output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain when it ends
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:  # before there was anything to save, or the second one
        print(f"cover {options.name}: stopped", file=sys.stderr)
        return 128 + signal.SIGINT


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cover", description="Vector contrastive pretraining for medical images.")
    parser.add_argument("--version", action="version", version=f"cover {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    def command(function, summary: str, settings: bool = True) -> argparse.ArgumentParser:
        name = function.__name__.removesuffix("_command")
        ending = "Settings follow as key=value, for example lr=1e-3 crop=96,96,96; `cover presets P` lists them."
        sub = commands.add_parser(name, help=summary, description=summary, epilog=ending if settings else None)
        sub.set_defaults(command=function)
        return sub

    sub = command(pretrain_command, "Pretrain a backbone on unlabelled images.")
    sub.add_argument("data", metavar="DATA", help="folder, image, or CSV, JSON or text manifest")
    sub.add_argument("--preset", metavar="P", help=f"one of {', '.join(PRESETS)}")
    sub.add_argument("--out", metavar="RUN", required=True, help="folder of the run")
    sub.add_argument("--resume", action="store_true", help="continue the run in RUN, or start it if there is none")
    sub.add_argument("--nproc", type=count, metavar="N", help="train in N processes on this machine, one per GPU")
    restarts = "with --nproc: how often to go on from the last checkpoint after a process has died (default 0)"
    sub.add_argument("--restarts", type=int, default=0, metavar="R", help=restarts)
    sub.add_argument("--val", metavar="DATA", help="held-out images (default: the manifest's val rows, or a share)")

    sub = command(evaluate_command, "Endpoint error of a run on held-out images, as a table.")
    sub.add_argument("run", metavar="RUN", help="folder of a run, or a checkpoint")
    sub.add_argument("data", metavar="DATA", help="folder, image, or CSV, JSON or text manifest")
    sub.add_argument("--split", choices=("train", "val", "test"), help="rows of a manifest to evaluate on")
    sub.add_argument("--samples", type=int, metavar="N", help="patches (default: val_samples, but one of each image)")

    sub = command(visualize_command, "One figure: both views, true and predicted displacement, error, features.")
    sub.add_argument("run", metavar="RUN", help="folder of a run, or a checkpoint")
    sub.add_argument("image", metavar="IMAGE", help="an image or volume")
    sub.add_argument("--out", metavar="FILE", help="the figure, .png or .pdf (default: <image>.png in RUN/figures)")

    sub = command(plan_command, "Predict the peak memory of training, before any: what takes how much.")
    sub.add_argument("--preset", metavar="P", help=f"one of {', '.join(PRESETS)}")
    sub.add_argument("--memory", metavar="SIZE", help="what there is, such as 24GiB: adds the largest crop that fits")

    sub = command(check_command, "Look at every file of a data set and say what cannot be used.")
    sub.add_argument("data", metavar="DATA", help="folder, image, or CSV, JSON or text manifest")
    sub.add_argument("--preset", metavar="P", help=f"one of {', '.join(PRESETS)}")

    sub = command(presets_command, "List the presets, or every setting of one.")
    sub.add_argument("preset", metavar="P", nargs="?", help=f"one of {', '.join(PRESETS)}")
    return parser


def count(word: str) -> int:
    """A number above 0."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {word!r}")
    return int(word)


def read_settings(words: Sequence[str]) -> dict[str, str]:
    """key=value words as a dict of texts."""
    settings = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"expected settings as key=value, got {word!r}")
        if name in settings:
            raise UsageError(f"the setting {name!r} is given twice")
        settings[name] = value
    return settings


class user_errors:
    """Within the block, what a user can put right (paths, settings, data, extras) becomes a UsageError."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, (ValueError, OSError, ImportError)):
            raise UsageError(str(error)) from error


def pretrain_command(options: argparse.Namespace) -> int:
    out = Path(options.out)
    with user_errors():
        settings = run_config(out, options.preset, options.resume or processes.restarted(), options.settings)
    if options.nproc is not None:
        return launch(options)
    if settings.train.check_memory:
        with user_errors():
            memory.require(settings)
    with processes.group(settings.train.device):
        with user_errors():
            trainer = Trainer(settings, options.data, out, options.val)
        try:
            trainer.run()
        except RunInUse as error:
            raise UsageError(str(error)) from error
    return 0


def launch(options: argparse.Namespace) -> int:
    """The same command in `options.nproc` processes, by torchrun."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    words = ["--standalone", f"--nproc-per-node={options.nproc}", f"--max-restarts={options.restarts}"]
    words += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]  # passed on to the processes, which save
    words += ["-m", "cover", "pretrain", options.data, f"--out={options.out}"]
    words += [f"--{name}={value}" for name in ("preset", "val") if (value := getattr(options, name)) is not None]
    words += ["--resume"] if options.resume else []
    try:
        torchrun.main([*words, *(f"{name}={value}" for name, value in options.settings.items())])
    except ChildFailedError as error:
        print(f"cover pretrain: {error}", file=sys.stderr)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


def evaluate_command(options: argparse.Namespace) -> int:
    with user_errors():
        result = evaluate(options.run, options.data, options.split, options.samples, **options.settings)
    print(result)
    return 0


def visualize_command(options: argparse.Namespace) -> int:
    with user_errors():
        path = visualize(options.run, options.image, options.out, **options.settings)
    print(path)
    return 0


def plan_command(options: argparse.Namespace) -> int:
    with user_errors():
        found = memory.plan(options.preset, options.memory, **options.settings)
    print(found)
    return 0 if found.fits else 1


def check_command(options: argparse.Namespace) -> int:
    with user_errors():
        settings = config.replace(preset_config(options.preset or "default"), **options.settings)
        report = check(options.data, settings.data)
    print(report)
    return 1 if report.problems or not report.images else 0


def presets_command(options: argparse.Namespace) -> int:
    if options.preset is None:
        width = max(map(len, PRESETS))
        print("\n".join(f"{name:<{width}}  {summary}" for name, (summary, _) in PRESETS.items()))
        return 0
    with user_errors():
        settings = config.replace(preset_config(options.preset), **options.settings)
    lines = {name: f"{name}={config.as_text(value)}" for name, value in config.flatten(settings).items()}
    width = max(map(len, lines.values()))
    print("\n".join(f"{line:<{width}}  # {config.meanings()[name]}" for name, line in lines.items()))
    return 0
