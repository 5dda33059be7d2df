"""Screen: the terminal of a run."""
import contextlib
import os
import shutil
import sys
import time

from tools.files import inert


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
