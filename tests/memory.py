"""How much memory a call takes at its peak, torch's tensors and the kernels' own buffers alike."""

import gc


def _status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def peak_above(call):
    """(bytes of resident memory at the peak of `call()` above what there was before, its result). Linux only."""
    call()  # what is set up once is not counted
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the high-water mark
    before = _status("VmRSS")
    result = call()
    return _status("VmHWM") - before, result
