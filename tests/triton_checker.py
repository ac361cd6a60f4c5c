"""Checks every address that a Triton kernel touches in Triton's interpreter, which itself checks none.

Under TRITON_INTERPRET=1 a kernel runs program after program, each operation on whole blocks in NumPy. The checker
stands between the interpreter and memory. The memory of a launch is what its tensor arguments hold; each element has a
shadow: who wrote it, who read it, and whether anyone ever wrote it. Reported, with the kernel, the argument, the
element and the programs, as a `Violation`:

- an access outside of every argument, or not aligned to an element;
- two programs of one launch that touch the same element, one of them writing (programs run in any order, so this is a
  race even where the values came out right); atomics among themselves are no race;
- two lanes of one store that write the same element;
- a read of an element of a tensor made by `torch.empty`, `empty_like` or `new_empty` that nobody wrote;
- a load that masks lanes off without saying what they get, which a GPU leaves undefined;
- at the end, an element of such a tensor that was never written.
"""

import contextlib
import inspect
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

NOBODY, SEVERAL = -1, -2


class Violation(Exception):
    """A kernel that touches memory as it must not."""


class Shadow:
    """What is known of each element of one tensor argument in one launch."""

    def __init__(self, name, tensor, written):
        self.name = name
        self.start, self.size = tensor.data_ptr(), tensor.element_size()
        self.end = self.start + tensor.numel() * self.size
        self.written = written  # bool per element, or None: all
        self.reader, self.writer, self.updater = (np.full(tensor.numel(), NOBODY) for _ in range(3))


class Checker:
    """The state of `checked`: tensors that started empty, and the launch that is running."""

    def __init__(self):
        self.fresh = {}  # data pointer -> (tensor, which is thereby kept; written, bool per element)
        self.accesses = 0

    def track(self, tensor):
        if tensor.numel():
            self.fresh[tensor.data_ptr()] = tensor, np.zeros(tensor.numel(), bool)
        return tensor

    def begin(self, kernel, arguments):
        self.kernel, self.program = kernel, -1
        tensors = {name: t for name, t in arguments.items() if isinstance(t, torch.Tensor) and t.numel()}
        written = {name: self.fresh.get(t.data_ptr(), (None, None))[1] for name, t in tensors.items()}
        self.shadows = sorted((Shadow(n, t, written[n]) for n, t in tensors.items()), key=lambda s: s.start)
        # one tensor may be two arguments
        self.shadows = [s for i, s in enumerate(self.shadows) if i == 0 or s.start != self.shadows[i - 1].start]
        self.starts = np.array([s.start for s in self.shadows], dtype=np.uint64)

    def fail(self, what):
        raise Violation(f"{self.kernel}, program {self.program}: {what}")

    def access(self, kind, pointers, mask):
        """One load, store or atomic of a block of pointers."""
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel()
        self.accesses += addresses.size
        if not addresses.size:
            return
        where = np.searchsorted(self.starts, addresses, side="right") - 1
        if (where < 0).any():
            self.fail(f"{kind} before all arguments")
        for i in np.unique(where):
            shadow = self.shadows[i]
            offset = (addresses[where == i] - np.uint64(shadow.start)).astype(np.int64)
            if (offset % shadow.size).any():
                self.fail(f"misaligned {kind} of {shadow.name}")
            elements = offset // shadow.size
            if elements.max() >= shadow.reader.size:
                self.fail(
                    f"{kind} out of bounds: element {elements.max()} of {shadow.name}, which has {shadow.reader.size}"
                )
            self.check(kind, shadow, elements)

    def check(self, kind, shadow, elements):
        others = {
            "load": ["writer", "updater"],
            "store": ["reader", "writer", "updater"],
            "atomic": ["reader", "writer"],
        }
        for role in others[kind]:
            programs = getattr(shadow, role)[elements]
            clash = (programs != NOBODY) & (programs != self.program)
            if clash.any():
                self.fail(f"race: {kind} of {shadow.name}[{elements[clash][0]}] with {role} {programs[clash][0]}")
        if kind == "store" and np.unique(elements).size != elements.size:
            self.fail(f"race: two lanes store to one element of {shadow.name}")
        if shadow.written is not None:
            if kind != "store" and not shadow.written[elements].all():
                self.fail(f"{kind} of {shadow.name}[{elements[~shadow.written[elements]][0]}], which nobody wrote")
            shadow.written[elements] = True
        mine = getattr(shadow, {"load": "reader", "store": "writer", "atomic": "updater"}[kind])
        alone = (mine[elements] == NOBODY) | (mine[elements] == self.program)
        mine[elements] = np.where(alone, self.program, SEVERAL)

    def end(self):
        for tensor, written in self.fresh.values():
            if not written.all():
                raise Violation(f"{(~written).sum()} of {written.size} elements of {list(tensor.shape)} never written")


@contextlib.contextmanager
def checked():
    """Check all that kernels do inside the block; yields the Checker."""
    checker = Checker()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    grid, launch = builder.set_grid_idx, executor.__call__

    def checked_load(self, pointers, mask, other, *rest):
        if other is None and not np.all(mask.data):
            checker.fail("a masked load without `other`")
        checker.access("load", pointers, mask)
        return load(self, pointers, mask, other, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        checker.access("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def checked_atomic(self, operation, pointers, value, mask, *rest):
        checker.access("atomic", pointers, mask)
        return atomic(self, operation, pointers, value, mask, *rest)

    def next_program(self, x, y, z):
        checker.program += 1
        return grid(self, x, y, z)

    def checked_launch(self, *args, **kwargs):
        named = inspect.signature(self.fn).parameters
        bound = dict(zip(named, args, strict=False)) | {k: v for k, v in kwargs.items() if k in named}
        checker.begin(self.fn.__name__, bound)
        # the interpreter patches the language anew for every call of a function in a kernel, a third of its time
        patched, patch = {}, interpreter._patch_lang

        def patch_once(function):
            module = id(function.__globals__)
            patched[module] = patched.get(module) or patch(function)
            return mock.Mock()

        try:
            with mock.patch.object(interpreter, "_patch_lang", patch_once):
                return launch(self, *args, **kwargs)
        finally:
            for scope in reversed(patched.values()):
                scope.restore()

    def tracked(make):
        return lambda *args, **kwargs: checker.track(make(*args, **kwargs))

    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (builder, "create_masked_load", checked_load),
            (builder, "create_masked_store", checked_store),
            (builder, "create_atomic_rmw", checked_atomic),
            (builder, "set_grid_idx", next_program),
            (executor, "__call__", checked_launch),
            (torch, "empty", tracked(torch.empty)),
            (torch, "empty_like", tracked(torch.empty_like)),
            (torch.Tensor, "new_empty", tracked(torch.Tensor.new_empty)),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield checker
    checker.end()
