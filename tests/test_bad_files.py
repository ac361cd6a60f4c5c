"""The corpus of bad files (bad_files.py): `cover check` names each with its reason, in bounded time and memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import bad_files
import numpy as np
import pytest

from cover.cli import main
from cover.config import DataConfig
from cover.data import check
from cover.data.report import printable

# Address space is bounded as well as memory: it counts what is set aside and never touched
CHECK = """
import resource, sys
from cover.cli import main
from cover_kernels.measure import peak_above
import cv2

def checked():
    code = main(["check", *sys.argv[1:]])
    assert code == 1, code

with open("/proc/self/statm") as file:
    taken = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 512 * 2**20,) * 2)
used, _ = peak_above(checked)
print("peak", used)
"""


@pytest.mark.parametrize(("rows", "crop"), [(bad_files.VOLUMES, "8,8,8"), (bad_files.PICTURES, "8,8")])
def test_every_bad_file_is_named_with_its_reason_and_costs_little(tmp_path, rows, crop):
    pytest.importorskip("cv2")
    manifest = bad_files.make(tmp_path, rows)
    command = [sys.executable, "-c", CHECK, str(manifest), f"crop={crop}", "max_voxels=268435456"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COVER_KERNELS_BACKEND": "reference"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    *lines, peak = done.stdout.decode().splitlines()
    report = lines[-len(rows) - 2 :]
    assert report[0] == f"{len(rows)} files, 0 usable images, {len(rows)} problems"
    width = max(len(printable(name)) for name, *_ in rows)
    wrong = {
        name: row
        for (name, _, what), row in zip(rows, report[2:], strict=True)
        if row[:width].rstrip() != printable(name) or what not in row[width:] or "MemoryError" in row
    }
    assert not wrong, "\n".join(f"{printable(name)}: {row}" for name, row in wrong.items())
    assert int(peak.split()[1]) < 100e6


def test_the_corpus_is_as_large_as_promised():
    assert len({name for name, *_ in bad_files.VOLUMES + bad_files.PICTURES}) >= 60


def test_a_folder_of_bad_files_is_searched_to_its_end(tmp_path):
    found = [row for row in bad_files.VOLUMES if "/" not in row[0] and "\0" not in row[0] and "\ud800" not in row[0]]
    found = [row for row in found if len(row[0]) < 250 and row[1] is not bad_files.nothing]
    bad_files.make(tmp_path, [row for row in found if row[0].endswith(".npy")])
    (tmp_path / "manifest.json").unlink()
    np.save(tmp_path / "good.npy", bad_files.CUBE)
    report = check(tmp_path, DataConfig(crop=(4, 4, 4)))
    assert report.images == 1
    # a folder is searched, and not a file of the data set
    names = {row[0] for row in found if row[0].endswith(".npy")} - {"folder.npy"}
    assert {finding.name for finding in report.problems} == names


def test_a_file_that_may_not_be_read_is_named(tmp_path_factory):
    folder = Path(tmp_path_factory.mktemp("denied"))
    np.save(folder / "x.npy", bad_files.CUBE)
    (folder / "x.npy").chmod(0)
    if os.geteuid() == 0:  # may read everything: go on as nobody, who may not even look into pytest's folder
        os.seteuid(65534)
    try:
        report = check([folder / "x.npy"], DataConfig(crop=(4, 4, 4)))
    finally:
        os.seteuid(os.getuid())
    assert "Permission" in report.problems[0].what and "x.npy" in report.problems[0].name


MANIFESTS = [
    ("pipe.csv", os.mkfifo, "is a pipe"),
    ("device.txt", bad_files.link("/dev/zero"), "or a device"),
    ("empty.csv", bad_files.content(b""), "a column `image`"),
    ("columns.csv", bad_files.content(b"file,split\na.npy,train\n"), r"got the columns \['file', 'split'\]"),
    ("semicolon.csv", bad_files.content(b"image;split\na.npy;train\n"), r"got the columns \['image;split'\]"),
    ("utf16.csv", bad_files.content("image\na.npy\n".encode("utf-16")), "cannot be read: 'utf-8' codec"),
    ("latin1.json", bad_files.content('["größe.npy"]'.encode("latin1")), "cannot be read: 'utf-8' codec"),
    ("nul.csv", bad_files.content(b"im\0age\na.npy\n"), "a column `image`|NUL"),
    ("field.csv", bad_files.content(b"image\n" + b"x" * 200_000), "field larger than field limit"),
    ("split.csv", bad_files.content(b"image,split\na.npy,trian\n"), "entry 1: `split` must be one of .* got 'trian'"),
    ("short.csv", bad_files.content(b"image,split\na.npy,train\nb.npy\n"), "entry 2: `split` must be one of .* None"),
    ("space.csv", bad_files.content(b"image, split\na.npy, test\n"), "must be called `split`, got ' split'"),
    ("capital.json", bad_files.content(b'[{"image": "a.npy", "Split": "test"}]'), "called `split`, got 'Split'"),
    ("cut.json", bad_files.content(b'[{"image": "a.npy"'), "cannot be read"),
    ("object.json", bad_files.content(b'{"image": "a.npy"}'), "expected a JSON list, got dict"),
    ("deep.json", bad_files.content(b"[" * 200_000), "cannot be read: .*recursion"),
    ("number.json", bad_files.content(b"[3]"), "entry 1: expected a path as `image`, got 3"),
    ("list.json", bad_files.content(b'[["a.npy"]]'), "entry 1: expected a path as `image`"),
    ("null.json", bad_files.content(b'[{"image": null}]'), "entry 1: expected a path as `image`, got None"),
    (
        "digits.json",
        bad_files.content(b"[" + b"9" * 10_000 + b"]"),
        "cannot be read: Exceeds|expected a path",
    ),
]


@pytest.mark.parametrize(("name", "make", "what"), MANIFESTS, ids=[row[0] for row in MANIFESTS])
def test_a_bad_manifest_is_named_with_its_reason(tmp_path, capsys, name, make, what):
    make(tmp_path / name)
    assert main(["check", str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cover check: error: manifest {tmp_path / name}")
    assert re.search(what, line)


def test_what_a_manifest_lists_in_vain_is_a_problem_of_that_row(tmp_path):
    np.save(tmp_path / "a.npy", bad_files.CUBE)
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbfimage\na.npy\n/nowhere/b.npy\nx.csv\n.\n/dev/zero\nc\0.npy\n")
    report = check(tmp_path / "x.csv", DataConfig(crop=(4, 4, 4)))
    assert report.images == 1
    what = [finding.what for finding in report.problems]
    expected = ["no such file", "format is not known", "is a folder", "or a device", "null byte"]
    assert len(what) == 5 and all(e in w for e, w in zip(expected, what, strict=True))
