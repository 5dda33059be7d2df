"""Screen: the terminal of a run, and how a command ends on it."""
import contextlib
import os
import shutil
import sys
import time
import traceback

from tools import ranks
from tools.files import inert, one_line


class Screen:
    """A line per event: time, round, stage, text. On a terminal also a live line: how far the stage is."""

    def __init__(self):
        self.start = time.time()                        # of the run, in all its sittings
        self.is_live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.has_colour = self.is_live and not os.environ.get("NO_COLOR")

    def line(self, stage: str, rnd: int | None, text: str) -> str:
        where = "setup" if rnd is None else f"r{rnd}"
        return f"{time.time() - self.start:6.0f} s  {where:5s}  {stage:9s}  {text}"

    def say(self, stage: str, rnd: int | None, text: str, colour: str = "") -> None:
        text = inert(text)              # a journal or run.json that is gone on with may be a stranger's
        code = {"green": 32, "red": 31, "yellow": 33}.get(colour) if self.has_colour else None
        print(self.line(stage, rnd, f"\x1b[{code}m{text}\x1b[0m" if code else text), flush=True)

    @contextlib.contextmanager
    def watch(self, stage: str, rnd: int | None, what: str, total: int, model=None):
        """The live line: `what`, how much of `total` (which may be too high) is done, rate, time left.

        Gives a function to call at each step; with a model, its forward passes are the steps.
        """
        begin = shown = time.time()
        done, width = 0, shutil.get_terminal_size().columns - 1

        def tick(*_):
            nonlocal done, shown
            done, now = done + 1, time.time()
            if self.is_live and now - shown > 0.2:
                shown, left = now, max(total - done, 0) * (now - begin) / done
                pace = f"  {done / (now - begin):.1f}/s  {left:.0f} s left" if now - begin + left > 5 else ""
                line = self.line(stage, rnd, f"{what}  {done}/{total}{pace}")
                print("\r" + line[:width].ljust(width), end="", flush=True)
        handle = model.register_forward_hook(tick) if model is not None and self.is_live else None
        try:
            yield tick
        finally:
            if handle:
                handle.remove()
            if shown != begin:
                print("\r" + " " * width + "\r", end="", flush=True)


# ---- the end of a command ----------------------------------------------------------------------------------


class RunDied(RuntimeError):
    """The run ended by an error after its folder was made: not a matter of usage, and it can be continued."""


def ended(command) -> int:
    """The exit code of command(), or of the error that it ends with, which is one sentence on stderr."""
    for stream in (sys.stdout, sys.stderr):             # a model does not care about the terminal's alphabet
        if hasattr(stream, "reconfigure"):              # a notebook's streams have no alphabet to set
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        return command()
    except KeyboardInterrupt:
        ranks.complain("loop.py: interrupted")
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        ranks.complain(f"loop.py: {one_line(error)}")
        return 1 if isinstance(error, (RunDied, ranks.RankLost)) else 2
    except Exception as error:                          # not foreseen, and no run folder yet to keep it
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{at.filename}, line {at.lineno}"
        ranks.complain(f"loop.py: unexpected {type(error).__name__} in {where}: {one_line(error)}")
        return 1
