"""Folder: a run folder while a run writes it: journal, lock, signals.

    run.json         options, command, versions, status; rewritten whole
    events.jsonl     the journal: one whole line per event; an artefact is on the disk before its event
    rounds/NN/       vectors.safetensors and adapter.safetensors, or rejected.safetensors if the gate refused

`Folder.once(stage, round, work)` gives a stage's event from the journal, or does the work and writes it down.
What later stages need of a stage is in its event or its file and is taken from there at once, so a run that
was killed at any point and goes on reads the numbers of an unbroken one, and repeats one stage at most.
Knows nothing of options, models or stages.
"""
import contextlib
import errno
import json
import os
import platform
import re
import shlex
import signal
import threading
import time
import traceback
from pathlib import Path

from tools import ranks
from tools.files import inert, one_line, plain, write_whole
from tools.record import FORMAT, Record, read
from tools.screen import RunDied, Screen

try:
    import fcntl
except ImportError:                                     # Windows: nothing keeps a second process out
    fcntl = None


def check_out(out: Path) -> None:
    """The run folder can be made: asked before hours of work, not after."""
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "read-only" if there.is_dir() else "a file, not a folder"
        raise ValueError(f"--out {out}: {there} is {what}; choose another folder")


class Folder:
    """The run folder while a run writes it.

    path: the folder to continue, None to make one. on_end: called with the path when the run stops early.
    Inside its `with`, a first Ctrl-C or SIGTERM waits for the current write, a second one ends the process at
    once, and a run that stops early is marked in run.json.
    """

    def __init__(self, path: Path | None, screen: Screen, on_end=lambda path: None):
        self.path, self.screen, self.on_end = path, screen, on_end
        self.is_resumed, self.run, self.events = path is not None, {}, []
        self.lock, self.old_handlers = None, {}
        self.is_writing = self.is_asked = self.is_pending = False

    # ---- signals, lock, the end

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                if hasattr(signal, name):               # no SIGHUP on Windows
                    self.old_handlers[name] = signal.signal(getattr(signal, name), self._on_signal)
        try:
            if self.path:
                self._lock()
        except BaseException:
            self._leave()
            raise
        return self

    def _on_signal(self, *_):
        if self.is_asked:
            os._exit(130)
        self.is_asked = True
        if self.is_writing:
            self.is_pending = True
        else:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def writing(self, path: Path):
        """A signal waits until this is done; an error of the file system becomes one sentence."""
        self.is_writing = True
        try:
            yield
        except ranks.RankLost:
            raise                                       # an OSError, but none of the disk
        except OSError as error:
            why = {errno.ENOSPC: "the disk is full", errno.EROFS: "the file system is read-only",
                   errno.EACCES: "no permission", errno.ENOENT: "the run folder or this file was removed",
                   }.get(error.errno, error.strerror or str(error))
            raise OSError(f"{path} could not be written: {why}") from error
        finally:
            self.is_writing = False
        if self.is_pending:
            self.is_pending = False
            raise KeyboardInterrupt

    @ranks.leads
    def _lock(self) -> None:
        """Keep other processes out while this one lives; the system lets go of the lock when it dies."""
        with self.writing(self.path / ".lock"):
            lock = open(self.path / ".lock", "a+", encoding="utf-8", errors="replace")
            lock.seek(0)
            owner = inert(lock.read(200))
            try:
                if fcntl:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise ValueError(f"{self.path} is in use by {owner}: wait for it, or end it") from None
            except OSError as error:
                self.screen.say("lock", None, f"not on this file system ({error.strerror}): run one process")
            if owner:
                self.screen.say("lock", None, f"left behind by {owner}, which is gone: taken over")
            self.lock = lock
            lock.truncate(0)
            now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            lock.write(f"process {os.getpid()} on {platform.node()}, started {now}")
            lock.flush()

    def _leave(self) -> None:
        if self.lock:
            with contextlib.suppress(OSError):          # a full disk or a deleted folder is no reason to stay
                self.lock.truncate(0)
            self.lock.close()
            self.lock = None
        for name, handler in self.old_handlers.items():
            signal.signal(getattr(signal, name), handler)

    def __exit__(self, kind, error, trace) -> None:
        """After an error or a signal: run.json says how it ended, error.txt what was not foreseen."""
        try:
            if error is not None and ranks.WORLD > 1:   # torchrun ends all ranks as one ends: first say why
                for name in self.old_handlers:
                    signal.signal(getattr(signal, name), signal.SIG_IGN)
                self.old_handlers = {}
            if error is None or not self.run or ranks.RANK:
                return
            is_signal, why = kind is KeyboardInterrupt, one_line(error)
            with contextlib.suppress(OSError):          # the reason itself may be a full disk
                if not isinstance(error, (ValueError, RuntimeError, OSError, KeyboardInterrupt)):
                    what = "its events.jsonl does not fit this code" if self.is_resumed else "unexpected"
                    why = f"{what}: {kind.__name__} {why}; the traceback is in {self.path}/error.txt"
                    lines = "".join(traceback.format_exception(kind, error, trace))
                    write_whole(self.path / "error.txt", lines.encode(errors="backslashreplace"))
                with ranks.alone():                     # others may be gone, or elsewhere
                    status = "interrupted" if is_signal else "failed"
                    self.save(status=status, reason="" if is_signal else why)
                    self.on_end(self.path)
            if self.path.exists():
                again = f"python loop.py --resume {shlex.quote(str(self.path))}"
                print(f"\nwhat is finished is kept; continue with\n{again}", flush=True)
            if not is_signal:
                raise RunDied(why) from error
        finally:
            self._leave()

    # ---- the beginning

    def make(self, out: Path, slug: str, **record) -> None:
        """A new folder under `out`, named by the time and the slug. record: what run.json says of the run."""
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", slug).strip("-.")[:80]
        stem = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}_{slug}"
        for name in (stem, *(f"{stem}-{n}" for n in range(1, 1000))):
            path = Path(out) / name
            with self.writing(path), contextlib.suppress(FileExistsError):
                path.mkdir(parents=True)
                (path / "rounds").mkdir()
                (path / "events.jsonl").touch()
                self.path = path
                break
        self._lock()
        self.save(format=FORMAT, status="running", started=time.time(), **record)

    def reopen(self, facts: dict, around: dict) -> dict:
        """The folder as the last sitting left it, without a line that was cut off; returns its run.json.

        facts: what must be as it was. around: what should be, {versions, machine, code, ...}. ValueError if
        this code cannot continue the run.
        """
        record, path = read(self.path), self.path / "events.jsonl"
        before, shape = record.run, dict(argv=list, command=str, versions=dict, machine=dict, started=float)
        if bad := [name for name, kind in shape.items() if not isinstance(before.get(name), kind)]:
            raise ValueError(f"{self.path}/run.json: {', '.join(bad)} missing or of another type")
        if differ := [name for name in facts if before.get(name) != facts[name]]:
            raise ValueError(f"--resume {self.path}: that run was made with other {', '.join(differ)}; start "
                             "a new run")
        then, now = ({**x["versions"], **x["machine"], "code": x.get("code")} for x in (before, around))
        for name in [name for name in now if now[name] != then.get(name)]:
            self.screen.say("warning", None, f"{name} was {then.get(name)} and is {now[name]}: numbers may "
                            "differ from an unbroken run's", "yellow")
        self.events = record.events
        if torn := path.read_bytes().rpartition(b"\n")[2]:
            self.screen.say("resume", None, f"the last event was cut off after {len(torn)} bytes: left out")
            self.cut(len(self.events))
        with self.writing(self.path):
            for file in [*self.path.glob(".*"), *self.path.glob("rounds/*/.*")]:
                if re.fullmatch(r"\..+\.\d+", file.name):       # temporary file of write_whole
                    file.unlink()
        self.screen.start = time.time() - max((e["t"] for e in self.events), default=0)
        n_done = sum(e["stage"] == "gate" for e in self.events)
        self.screen.say("resume", None, f"{len(self.events)} events read back, {n_done} rounds finished")
        self.run = before
        return before | dict(resumed=[*before.get("resumed", []), dict(time=time.time(), **around)])

    # ---- the journal

    @ranks.leads
    def save(self, **more) -> None:
        """Write run.json with these fields changed."""
        self.run |= plain(more)
        with self.writing(self.path / "run.json"):
            write_whole(self.path / "run.json", json.dumps(self.run, indent=1).encode())

    def event(self, stage: str, rnd: int | None = None, **more) -> dict:
        """Append an event, all or none of it, and return it as a reader will see it."""
        self.events.append(self._written(stage, rnd, more))
        return self.events[-1]

    @ranks.leads
    def _written(self, stage: str, rnd: int | None, more: dict) -> dict:
        seconds = round(time.time() - self.screen.start, 2)
        line = json.dumps(plain(dict(t=seconds, round=rnd, stage=stage) | more)) + "\n"
        path = self.path / "events.jsonl"
        with self.writing(path), open(path, "r+b", buffering=0) as file:    # r+: no removed file begins anew
            end = file.seek(0, os.SEEK_END)
            try:
                left = memoryview(line.encode())
                while left:
                    left = left[file.write(left):]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
        return json.loads(line)

    def recall(self, stage: str, rnd: int | None = None, **match) -> dict | None:
        """The event of a finished stage, None before it is."""
        match |= dict(stage=stage, round=rnd)
        return next((e for e in self.events if match.items() <= e.items()), None)

    def once(self, stage: str, rnd: int | None, work, **match) -> dict:
        """The event of a finished stage, or what work() gives, written down; work() has written its files."""
        ranks.at(match.get("kind", stage), rnd)
        return self.recall(stage, rnd, **match) or self.event(stage, rnd, **match, **ranks.shared(work))

    def cut(self, n: int) -> None:
        """Forget all events from the n-th on, and the files of rounds that have none left."""
        self.events = self.events[:n]
        rounds = {f"{e['round']:02d}" for e in self.events if e["round"] is not None}
        with self.writing(self.path / "events.jsonl"):
            lines = "".join(json.dumps(e) + "\n" for e in self.events)
            write_whole(self.path / "events.jsonl", lines.encode())
            for file in self.path.glob("rounds/*/*.safetensors"):
                if file.parent.name not in rounds:
                    file.unlink()

    @property
    def record(self) -> Record:
        """The run so far, as `read` would give it."""
        return Record(self.path, self.run, self.events, [])
