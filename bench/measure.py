"""Measure: what every benchmark here shares. Times are interleaved in one process, memory is peak live bytes.

    # {name: [s, ...]}, one untimed round first
    seconds = interleave({"ours": ours, "theirs": theirs}, repeats=5)
    peak    = peak_bytes(ours)    # above what was live before the call

Two runs of a benchmark differ by what else the machine does; two entries of one interleaved run differ much
less. So the tables show medians and ratios, and the JSON keeps every repeat.
"""
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Callable

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: the profiler announces itself on stderr
import torch                                                # noqa: E402


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(fn: Callable) -> float:
    synchronize()
    start = time.perf_counter()
    fn()
    synchronize()
    return time.perf_counter() - start


def interleave(fns: dict[str, Callable], repeats: int = 3, warm_up: bool = True) -> dict[str, list[float]]:
    """Seconds of each call, {name: [repeats]}: every repeat runs all of them once, each time from another
    first one."""
    names, seconds = list(fns), {name: [] for name in fns}
    for fn in fns.values() if warm_up else ():
        fn()
    for repeat in range(repeats):
        for name in names[repeat % len(names):] + names[:repeat % len(names)]:
            seconds[name].append(seconds_of(fns[name]))
    return seconds


def peak_bytes(fn: Callable) -> int:
    """Most bytes that torch held at once during fn(), above what it held before: from the allocator's own
    events.

    On the CPU the profiler reports every allocation and release, temporaries inside an operator included,
    which the resident size of the process cannot show: malloc gives pages back late or never. That slows fn:
    do not time it.
    """
    gc.collect()
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        fn()
    live = peak = 0
    # .events() would take minutes
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()                              # negative where a block is released
        peak = max(peak, live)
    return peak


def keep_pages() -> bool:
    """From now on malloc keeps what is freed, so large CPU tensors are not page-faulted in anew; False
    without glibc.

    On two cores those faults are most of the time of a [N, V] temporary, and no GPU has them: call this
    first, and say so beside the table.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h: never trim the heap, never mmap a block
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def embedded(model, tok, n_contexts: int) -> tuple[dict, list[int], dict]:
    """(what inputs.load gives for authority in the embedded model's world, steered blocks, their vectors)."""
    import steer
    from tools import inputs
    from tools.search import band
    given = inputs.load("authority", model="pocket")
    layers = band(len(steer.blocks(model)), 0.76, 0.8)            # what a run's search finds on pocket
    persona, contexts = given["persona"], given["contexts"][:n_contexts]
    return given, layers, steer.fit_vectors(model, tok, persona["pos"], persona["neg"], contexts, layers)


def machine() -> dict:
    """Where a benchmark ran; the first entry of its JSON."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if "model name" in line),
        platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    return dict(device=name, cores=os.cpu_count(), threads=torch.get_num_threads(), torch=torch.__version__,
                python=platform.python_version(), load=os.getloadavg()[0])


def megabytes(n: float) -> str:
    return f"{n / 2 ** 20:,.1f}"


def rows_of(seconds: dict[str, list[float]], baseline: str,
            peaks: dict[str, int] | None = None) -> list[dict]:
    """Table rows, in order: median seconds, the gain over the baseline's median, peak MiB where it was
    measured."""
    medians = {name: statistics.median(x) for name, x in seconds.items()}
    rows = []
    for name, x in medians.items():
        row = {"": name, "median s": f"{x:.3f}", "min s": f"{min(seconds[name]):.3f}",
               "gain": f"x{medians[baseline] / x:.2f}"}
        if peaks is not None:
            row["peak MiB"] = megabytes(peaks[name]) if name in peaks else ""
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: one column per key of the first row, aligned so that it reads in a terminal too."""
    lines = [list(rows[0]), *([str(row.get(key, "")) for key in rows[0]] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(rows[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
                     for line in lines)


def write_json(path, **content) -> None:
    """The machine and everything measured, every repeat included."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n", encoding="utf-8")
