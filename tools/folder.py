"""Folder: a run on the disk and on the terminal: journal, lock, signals, and the one reader of it.

    run.json         options, command, versions, status; rewritten whole
    events.jsonl     the journal: one whole line per event; an artefact is on the disk before its event
    rounds/NN/       vectors.safetensors and adapter.safetensors, or rejected.safetensors if the gate refused

`Folder.once(stage, round, work)` gives a stage's event from the journal, or does the work and writes it down.
What later stages need of a stage is in its event or its file and is taken from there at once, so a run that
was killed at any point and goes on reads the numbers of an unbroken one, and repeats one stage at most.

Everything that a model or a user wrote passes `inert` on its way to a reader. Needs torch and safetensors;
knows nothing of options, models or stages.
"""
import contextlib
import dataclasses
import errno
import html
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import threading
import time
import traceback
import zlib
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from tools import ranks
from tools.screen import Screen

try:
    import fcntl
except ImportError:                                     # Windows: nothing keeps a second process out
    fcntl = None

ROOT = Path(__file__).resolve().parents[1]
FORMAT = 2                                              # of the journal: another one cannot be continued

# control characters, marks that reorder or hide text, tags, lone surrogates; joiners stay: scripts need them
UNSEEN = ("[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
          "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]")


# ---- text ------------------------------------------------------------------------------------------------


def inert(text, to: str = "terminal", limit: int | None = None) -> str:
    """Any text for a reader; to = terminal, html (content or attribute) or markdown.

    Nothing in it is markup, moves the cursor or turns a line. What is over `limit` characters is cut off.
    """
    text = str(text)
    if to == "html":
        text = re.sub(r"\n{4,}", lambda match: f" ↵×{len(match.group())} ", text)
    rest = f"… ({len(text) - limit:,} more characters)" if limit is not None and len(text) > limit else ""
    text = text[:limit]
    if to == "terminal":
        return re.sub(UNSEEN + "+", " ", text) + rest
    if to == "html":                                    # what is unseen is shown
        def show(match):
            code = ord(match.group())
            known = {9: " ", 10: " ↵ "} | {n: chr(0x2400 + n) for n in (*range(9), *range(11, 32))}
            return known.get(code, f"⟨U+{code:04X}⟩")
        return html.escape(re.sub(UNSEEN, show, text), quote=True) + rest
    if to != "markdown":
        raise ValueError(f"to={to!r}: expected terminal, html or markdown")
    text = " ".join(re.sub(UNSEEN, " ", text).split())  # one line
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]()#+!|~:@-])", r"\\\1", text)
    return re.sub(r"(?i)\bwww\.", r"www\\.", text) + rest


def one_line(error) -> str:
    """An error as one sentence for the terminal, whatever it quotes."""
    return inert(" ".join(str(error).split()))[:1000] or type(error).__name__


def plain(x):
    """Tensors as lists, non-finite numbers as null: what JSON can hold."""
    if isinstance(x, torch.Tensor):
        x = x.tolist()
    if isinstance(x, dict):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if dataclasses.is_dataclass(x):
        return plain(dataclasses.asdict(x))
    return None if isinstance(x, float) and not math.isfinite(x) else x


# ---- files -----------------------------------------------------------------------------------------------


def write_whole(path, content: bytes) -> None:
    """Write a temporary file beside `path`, rename it: a reader sees the old file or the new, never half."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if hasattr(os, "O_DIRECTORY"):                  # the new name survives a power cut too
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)               # still there only if something went wrong


def save_tensors(path, tensors: dict[str, torch.Tensor], notes: dict = {}) -> None:
    """One safetensors file, whole or not at all; notes become its metadata, as strings."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, safetensors.torch.save(tensors, {name: str(note) for name, note in notes.items()}))


def read_tensors(path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and notes of a safetensors file; ValueError if it cannot be read or is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({one_line(error)})") from None


# ---- the reader ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """A run as it stands on the disk. notes: sentences on what is not whole."""
    path: Path
    run: dict
    events: list[dict]           # in order, each with a stage (str), a round (int or None) and t (seconds)
    notes: list[str]

    def of(self, stage: str, rnd: int | None = None) -> dict | None:
        """The first event of a stage, of this round if one is given."""
        return next((e for e in self.events if e["stage"] == stage and rnd in (None, e["round"])), None)

    def rows(self, kind: str | None = None) -> list[dict]:
        """The rows of the table: base, prompted, steered or healed, or all of them."""
        return [e for e in self.events if e["stage"] == "row" and kind in (None, e.get("kind"))]

    @property
    def accepted(self) -> list[int]:
        return [e["round"] for e in self.events if e["stage"] == "gate" and e.get("accepted")]

    @property
    def last_day(self) -> dict | None:
        """The row of the last accepted day; before there is one, the base's; before that, None."""
        days = [row for row in self.rows("healed") if row["round"] in self.accepted]
        return next(iter(days[-1:] or self.rows("base")), None)

    def completions(self, rnd: int) -> list[dict]:
        return (self.of("made", rnd) or {}).get("completions", [])

    def trials(self, rnd: int) -> list[dict]:
        return (self.of("dose", rnd) or {}).get("trials", [])

    def adapters(self, last: int | None = None) -> dict[int, Path]:
        """The adapter file of each accepted round up to `last`, which must be one; ValueError if none is."""
        files = {rnd: self.path / "rounds" / f"{rnd:02d}" / "adapter.safetensors" for rnd in self.accepted}
        if not files:
            raise ValueError(f"{self.path} has no accepted round")
        if last is not None and last not in files:
            rounds = ", ".join(map(str, files))
            raise ValueError(f"--round {last}: the accepted rounds of {self.path} are {rounds}")
        files = {rnd: path for rnd, path in files.items() if last is None or rnd <= last}
        if missing := [path for path in files.values() if not path.is_file()]:
            raise ValueError(f"{missing[0]} is missing: the run accepted this round")
        return files


def read(path) -> Record:
    """A run folder, finished or not; ValueError if it is none, or if a line but the last is no event."""
    path = Path(path)
    try:
        run = json.loads((path / "run.json").read_bytes().decode("utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: not a run folder, it has no run.json") from None
    except OSError as error:
        raise ValueError(f"{path}/run.json: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}/run.json: not JSON ({error})") from None
    if not isinstance(run, dict):
        raise ValueError(f"{path}/run.json: expected a JSON object, got {type(run).__name__}")
    events, notes, journal = [], [], path / "events.jsonl"
    lines = journal.read_bytes().decode("utf-8", "replace").split("\n") if journal.is_file() else []
    last = max((n for n, line in enumerate(lines, 1) if line.strip()), default=0)
    for n, line in enumerate(lines[:last], 1):
        try:
            event = {"round": None, "t": 0.0} | json.loads(line)
            if not (isinstance(event.get("stage"), str) and isinstance(event["t"], (int, float))
                    and (event["round"] is None or type(event["round"]) is int)):
                raise ValueError
            events.append(event)
        except (ValueError, TypeError, RecursionError):
            if n != last:
                raise ValueError(f"{journal}, line {n}: no event of a run; the file is damaged") from None
            notes.append(f"The last line of events.jsonl (line {n}) was cut off and is left out.")
    if not events:
        notes.append("The run has no events yet.")
    if run.get("format") != FORMAT:
        notes.append("Another version of this code wrote it: what that named otherwise is not shown.")
    return Record(path, run, events, notes)


def read_for_more(path) -> Record:
    """A run that this code can continue; ValueError if it is none."""
    record = read(path)
    if record.run.get("format") != FORMAT:
        raise ValueError(f"--resume {path}: another version of this code wrote that run and is needed to "
                         "go on with it; its run.json names the commit")
    return record


# ---- the run folder --------------------------------------------------------------------------------------


def check_out(out: Path) -> None:
    """The run folder can be made: asked before hours of work, not after."""
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "read-only" if there.is_dir() else "a file, not a folder"
        raise ValueError(f"--out {out}: {there} is {what}; choose another folder")


def surroundings(model, code: tuple[str, ...]) -> dict:
    """What else a number depends on: versions, threads, device, and the files of this code that are named."""
    from importlib.metadata import version
    read = b"".join((ROOT / f"{name}.py").read_bytes() for name in code)

    def git(*words):
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()
    commit = ""
    with contextlib.suppress(FileNotFoundError):        # + if files differ from the commit; "" outside git
        commit = git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    return dict(versions=dict(python=platform.python_version(), torch=torch.__version__,
                              transformers=version("transformers")),
                machine=dict(system=platform.platform(), device=str(model.device), dtype=str(model.dtype),
                             threads=torch.get_num_threads(), ranks=ranks.WORLD,
                             gpu=torch.cuda.get_device_name(model.device)
                             if model.device.type == "cuda" else ""),
                git=commit, code=f"{zlib.crc32(read):08x}")


class RunDied(RuntimeError):
    """The run ended by an error after its folder was made: not a matter of usage, and it can be continued."""


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
        record, path = read_for_more(self.path), self.path / "events.jsonl"
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
