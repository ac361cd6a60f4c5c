"""python -m cuda_on_cpu.replay FOLDER CALLS OUTPUTS SCHEDULE: run recorded calls in this process (harness.replay)."""

import pickle
import sys
from pathlib import Path

from cuda_on_cpu.build import load

folder, calls, outputs, schedule = sys.argv[1:]
module = load(Path(folder))
module.set_schedule(schedule, 0)
results = []
for name, arguments in pickle.loads(Path(calls).read_bytes()):
    result = getattr(module, name)(*arguments)
    results.append(result if isinstance(result, tuple) else (result,))
Path(outputs).write_bytes(pickle.dumps(results))
