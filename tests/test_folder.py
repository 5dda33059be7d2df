"""Tests of tools/folder.py, screen.py and options.py: a run that survives, and says what was wrong."""
import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from typing import Literal

import loop
import pytest
import torch
from common import PowerCut
from tools import folder as files, options, ranks
from tools.files import inert, read_tensors, save_tensors
from tools.folder import Folder, read
from tools.screen import Screen


AROUND = dict(versions=dict(torch="2"), machine={}, git="", code="c")


def begun(tmp_path) -> Folder:
    """A folder that has begun, of a run without a model; the caller enters it."""
    made = Folder(None, Screen())
    made.__enter__()
    made.make(tmp_path, "a model/of mine", argv=[], command="", options={}, weights="w", **AROUND)
    return made


def again(path, **facts) -> Folder:
    """The folder as the next sitting finds it."""
    with Folder(path, Screen()) as folder:
        folder.save(**folder.reopen(dict(weights="w") | facts, AROUND))
    return folder


@pytest.fixture
def folder(tmp_path):
    made = begun(tmp_path)
    yield made
    made._leave()


# ---- text ----------------------------------------------------------------------------------------------

HOSTILE = "a<b onload='x'>&\"\x1b[31m\u202ec\ud800\n\n\n\n\nd [x](http://y) `z` www.w\U000e0041"


def test_text_of_a_model_is_inert_wherever_it_goes():
    for to in ("terminal", "html", "markdown"):
        text = inert(HOSTILE, to)
        assert not set(text) & set("\x1b\u202e\ud800\n\U000e0041"), to
    assert not set(inert(HOSTILE, "html")) & set("<>\"'")
    assert " ↵×5 " in inert(HOSTILE, "html") and "␛[31m" in inert(HOSTILE, "html")
    markdown = inert(HOSTILE, "markdown")
    assert all(x in markdown for x in ("\\[x\\]\\(http\\:", "\\`z\\`", "www\\.")) and "<" not in markdown
    assert inert("abcdef", limit=4) == "abcd… (2 more characters)"
    assert inert("می\u200cخواهم") == "می\u200cخواهم"
    with pytest.raises(ValueError, match="to='csv'"):
        inert("a", "csv")


def test_an_error_is_one_line_and_numbers_that_json_cannot_hold_are_null():
    assert files.one_line(ValueError("a\n  b\x1b[2J")) == "a b [2J"
    assert files.one_line(KeyError()) == "KeyError"
    assert len(files.one_line(ValueError("x" * 5000))) == 1000
    numbers = {1: torch.tensor([1.0, float("nan")]), "b": (float("inf"), "t")}
    assert files.plain(numbers) == {"1": [1.0, None], "b": [None, "t"]}


# ---- files ---------------------------------------------------------------------------------------------


def test_tensors_come_back_bit_for_bit_and_a_damaged_file_is_named(tmp_path):
    path, tensors = tmp_path / "x.safetensors", {"layer.3": torch.randn(5), "b": torch.randn(2, 3).T}
    save_tensors(path, tensors, coeff=repr(0.1 + 0.2))
    found, notes = read_tensors(path)
    assert all(torch.equal(found[k], v) for k, v in tensors.items()) and float(notes["coeff"]) == 0.1 + 0.2
    for content in (b"", path.read_bytes()[:-4], b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.safetensors: not a whole safetensors file"):
            read_tensors(path)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a"
    files.write_whole(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError):
        files.write_whole(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_bytes() == b"old"


# ---- the journal ---------------------------------------------------------------------------------------


def toy(folder: Folder) -> None:
    """A run of two rounds whose stages write files before their events; the second round is refused."""
    folder.once("limits", None, lambda: dict(n=1))
    for rnd in range(2):
        path = folder.path / "rounds" / f"{rnd:02d}"

        def heal():
            path.mkdir(exist_ok=True)
            save_tensors(path / "adapter.safetensors", {"a": torch.full((3,), float(rnd))})
            return dict(nll=0.1 + rnd)

        def gate():
            if rnd and (path / "adapter.safetensors").exists():
                os.replace(path / "adapter.safetensors", path / "rejected.safetensors")
            return dict(accepted=not rnd, reasons=["no"] * rnd)
        folder.once("made", rnd, lambda: dict(completions=[dict(text="x", verdict={})] * 3))
        folder.once("row", rnd, lambda: dict(trait=rnd), kind="steered")
        folder.once("heal", rnd, heal)
        folder.once("row", rnd, lambda: dict(trait=-rnd), kind="healed")
        folder.once("gate", rnd, gate)
    folder.save(status="accepted")


def test_a_run_that_is_cut_off_at_any_write_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    monkeypatch.setattr(Folder, "__exit__", lambda self, *error: self._leave())

    def sitting(path, out):
        with Folder(path, Screen()) as folder:
            if path:
                folder.save(**folder.reopen(dict(weights="w"), AROUND))
            else:
                folder.make(out, "toy", argv=[], command="", weights="w", **AROUND)
            toy(folder)

    def state(out):
        path = next(out.iterdir())
        record = read(path)
        return ([{k: v for k, v in e.items() if k != "t"} for e in record.events], record.run["status"],
                {p.relative_to(path): p.read_bytes() for p in path.rglob("*.safetensors")},
                [p.name for p in path.rglob(".*") if p.name != ".lock"])
    sitting(None, tmp_path / "whole")
    whole, event, replace = state(tmp_path / "whole"), Folder.event, os.replace
    assert read(next((tmp_path / "whole").iterdir())).accepted == [0]
    n_cases = 0
    for kind in ("after", "torn", "rename"):
        for n in range(1, 100):
            count, out = [0], tmp_path / f"{kind}{n}"

            def dying_event(self, stage, rnd=None, **more):
                count[0] += kind != "rename"
                if kind == "torn" and count[0] == n:
                    with open(self.path / "events.jsonl", "a") as file:
                        file.write(json.dumps(dict(t=0, round=rnd, stage=stage))[:-n])
                    raise PowerCut
                made = event(self, stage, rnd, **more)
                if count[0] == n:
                    raise PowerCut
                return made

            def dying_replace(*paths):
                count[0] += kind == "rename"
                if kind == "rename" and count[0] == n:
                    raise PowerCut
                replace(*paths)
            with monkeypatch.context() as patch:
                patch.setattr(Folder, "event", dying_event)
                patch.setattr(os, "replace", dying_replace)
                try:
                    sitting(None, out)
                    break                               # past the last boundary
                except PowerCut:
                    n_cases += 1
            if not list(out.glob("*/run.json")):        # nothing to continue yet
                continue
            sitting(next(out.iterdir()), out)
            assert state(out) == whole, (kind, n)
    assert n_cases >= 25


def test_a_line_that_was_cut_off_and_temporary_files_are_removed_on_resume(folder, capsys):
    folder.event("limits", own=[])
    (folder.path / ".run.json.123").write_text("half")
    with open(folder.path / "events.jsonl", "ab") as file:
        file.write(b'{"t": 1\x00\xff')
    folder._leave()
    assert "cut off" in read(folder.path).notes[0]
    assert [e["stage"] for e in again(folder.path).events] == ["limits"]
    assert not (folder.path / ".run.json.123").exists() and read(folder.path).notes == []
    assert "cut off after 9 bytes" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["[1]", "{", '{"round": 1}', '{"stage": "row", "round": "1"}', "[" * 9999])
def test_a_journal_with_a_line_that_is_no_event_is_named(line, folder):
    with open(folder.path / "events.jsonl", "a") as file:
        file.write('{"stage": "row"}\n' + line + '\n{"stage": "row"}\n')
    with pytest.raises(ValueError, match="events.jsonl, line 2: no event of a run"):
        read(folder.path)


@pytest.mark.parametrize("content, message", [
    ("{", "not JSON"), ("[]", "expected a JSON object"), (None, "not a run folder")])
def test_what_is_no_run_folder_is_said(content, message, tmp_path):
    if content:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_the_reader_gives_accepted_rounds_their_files_and_the_last_day(folder):
    folder.event("row", None, kind="base", trait=0)
    assert folder.record.last_day["kind"] == "base"
    with pytest.raises(ValueError, match="no accepted round"):
        folder.record.adapters()
    toy(folder)
    record = read(folder.path)
    assert record.events == folder.events and record.accepted == [0] and record.last_day["round"] == 0
    assert list(record.adapters()) == [0] and len(record.completions(1)) == 3
    assert [path.stem for path in record.adapters(1).values()] == ["adapter", "rejected"]
    with pytest.raises(ValueError, match="--round 2: the accepted rounds of .* are 0"):
        record.adapters(2)
    record.adapters()[0].unlink()
    with pytest.raises(ValueError, match="is missing"):
        record.adapters()


def test_a_run_of_another_version_is_refused_with_one_sentence(folder, capsys):
    folder.save(format=1)
    folder._leave()
    with pytest.raises(SystemExit) as stop:
        loop.parse(["--resume", str(folder.path)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "another version of this code wrote that run" in err
    with pytest.raises(ValueError, match="its run.json names the commit"):
        read(folder.path)


def test_a_run_made_with_other_weights_is_refused_and_other_surroundings_are_said(folder, capsys):
    folder._leave()
    with pytest.raises(ValueError, match="made with other weights"):
        again(folder.path, weights="x")
    folder.run["versions"] = dict(torch="1")
    files.write_whole(folder.path / "run.json", json.dumps(folder.run).encode())
    again(folder.path)
    assert "torch was 1 and is 2" in capsys.readouterr().out


# ---- the lock, the disk, signals -----------------------------------------------------------------------


def test_a_folder_takes_one_process_at_a_time_and_a_lock_left_behind_is_taken_over(folder, capsys):
    for _ in range(2):                                  # a refusal leaves the lock as it is
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on .*, started 2"):
            again(folder.path)
    folder._leave()
    (folder.path / ".lock").write_text("process 1 on moon")     # its owner died, and with it the lock
    again(folder.path)
    assert "left behind by process 1 on moon, which is gone: taken over" in capsys.readouterr().out
    assert (folder.path / ".lock").read_text() == ""


def test_a_full_disk_leaves_whole_lines_and_one_sentence(folder):
    import resource
    folder.event("layers", steer=[1])
    path, old = folder.path / "events.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    before = path.read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, old[1]))
        with pytest.raises(OSError, match="events.jsonl could not be written: File too large"):
            folder.event("limits", own=["x" * 500])
        with pytest.raises(OSError, match="run.json could not be written"):
            folder.save(more="x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert path.read_bytes() == before and "more" not in json.loads((folder.path / "run.json").read_text())
    assert [p.name for p in folder.path.iterdir() if p.name.startswith(".")] == [".lock"]
    folder.event("limits", own=[])
    assert [e["stage"] for e in read(folder.path).events] == ["layers", "limits"]


@pytest.mark.parametrize("what, message, status", [
    (lambda folder: {}["surprise"], "unexpected: KeyError 'surprise'", "failed"),
    (lambda folder: shutil.rmtree(folder.path), "was removed", None),
    (lambda folder: (_ for _ in ()).throw(OSError(28, "No space left")), "No space left", "failed")])
def test_an_end_that_was_not_planned_is_one_sentence_and_the_way_on(what, message, status, tmp_path, capsys):
    ended = []
    with pytest.raises(files.RunDied, match=message), Folder(None, Screen(), ended.append) as folder:
        folder.make(tmp_path, "x", argv=[], command="", **AROUND)
        what(folder)
        folder.event("layers")
    out, path = capsys.readouterr().out, folder.path
    if status is None:
        assert not path.exists() and "--resume" not in out
        return
    run = read(path).run
    assert run["status"] == status and message in run["reason"]
    assert ended == [path] and f"--resume {path}" in out
    assert (path / "error.txt").exists() == ("KeyError" in message)
    assert "KeyError" not in message or "Traceback" in (path / "error.txt").read_text()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_waits_for_the_write_and_marks_the_run_interrupted(name, tmp_path, monkeypatch, capsys):
    before, fsync, number = signal.getsignal(getattr(signal, name)), os.fsync, getattr(signal, name)
    sent = []
    with pytest.raises(KeyboardInterrupt):
        with Folder(None, Screen()) as folder:
            folder.make(tmp_path, "x", argv=[], command="", **AROUND)
            monkeypatch.setattr(os, "fsync", lambda fd: sent or sent.append(os.kill(os.getpid(), number)))
            folder.event("layers")
    monkeypatch.setattr(os, "fsync", fsync)
    record = read(folder.path)
    assert record.run["status"] == "interrupted" and [e["stage"] for e in record.events] == ["layers"]
    assert f"python loop.py --resume {folder.path}" in capsys.readouterr().out
    assert signal.getsignal(getattr(signal, name)) == before


def test_a_second_signal_ends_the_process_at_once(folder, monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(PowerCut(code)))
    with pytest.raises(KeyboardInterrupt):
        folder._on_signal()
    with pytest.raises(PowerCut, match="130"):
        folder._on_signal()


def test_the_end_of_a_rank_is_not_cut_short_by_the_end_of_another(tmp_path, monkeypatch):
    """torchrun sends SIGTERM to all as soon as one is gone, often while rank 0 writes why."""
    def terminated(path=None):
        os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(ranks, "WORLD", 1)
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(files.RunDied, match="gone"), Folder(None, Screen(), terminated) as folder:
            folder.make(tmp_path, "m", argv=[], command="", options={}, weights="w", **AROUND)
            monkeypatch.setattr(ranks, "WORLD", 2)
            raise ranks.RankLost("gone")
        terminated()                                            # nor is the sentence that follows
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    assert read(folder.path).run["status"] == "failed"


def test_a_lost_rank_is_no_error_of_the_disk(folder):
    with pytest.raises(ranks.RankLost, match="^gone$"), folder.writing(folder.path / "results.tsv"):
        raise ranks.RankLost("gone")
    assert not folder.is_writing


def test_no_line_of_a_run_moves_the_cursor(capsys):
    Screen().say("warning", None, f"torch was {HOSTILE}")       # run.json of a run that goes on
    out = capsys.readouterr().out
    assert "torch was a<b" in out and out.count("\n") == 1 and not set(out) & set("\x1b\u202e\ud800")


def test_the_live_line_is_for_terminals_and_colour_for_those_who_want_it(monkeypatch, capsys):
    def lines(is_live, **environment):
        for name in ("NO_COLOR", "TERM"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: is_live, raising=False)
        screen, now = Screen(), [0.0]
        monkeypatch.setattr(time, "time", lambda: screen.start + now[0])
        with screen.watch("heal", 3, "training, steps", 40) as tick:
            for _ in range(10):
                now[0] += 1.0
                tick()
        screen.say("gate", 3, "accepted", "green")
        monkeypatch.setattr(time, "time", clock)
        return capsys.readouterr().out
    clock = time.time
    live = lines(True)
    assert "\r    10 s  r3     heal       training, steps  10/40  1.0/s  30 s left" in live
    assert "\x1b[32maccepted\x1b[0m" in live
    assert "\x1b" not in lines(True, NO_COLOR="1") and "\r" in lines(True, NO_COLOR="1")
    for plain in (lines(False), lines(True, TERM="dumb")):
        assert plain == "    10 s  r3     gate       accepted\n"


# ---- options -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Toy:
    """toy: a group"""
    n: int = dataclasses.field(default=3, metadata=dict(help="100% of it"))
    band: tuple[float, float] | None = dataclasses.field(default=None, metadata=dict(help="a band"))
    how: Literal["", "a"] = dataclasses.field(default="", metadata=dict(help="which"))
    on: bool = dataclasses.field(default=True, metadata=dict(help="or not"))


def test_options_are_read_shown_and_recorded(capsys):
    parser = options.parser([Toy], first=("n",), prog="toy")
    args = options.tidy(vars(parser.parse_args(["--band", "0.1", "0.5", "--no-on"])))
    assert args == dict(n=3, band=(0.1, 0.5), how="", on=False)
    assert options.recorded(json.loads(json.dumps(args)), [Toy], "run") == args
    shown = parser.format_help().split("turned first")[1]
    assert shown.index("--n N") < shown.index("toy: a group") < shown.index("--band FROM TO")
    assert "100% of it (default: 3)" in shown
    for bad in (dict(n=True), dict(n="3"), dict(band=[1.0]), dict(how="b"), dict(on=None), dict(n=...)):
        with pytest.raises(ValueError, match=f"option {next(iter(bad))} is"):
            options.recorded({k: v for k, v in (args | bad).items() if v is not ...}, [Toy], "run")
    with pytest.raises(ValueError, match="not a value it can have"):
        options.tidy(dict(how="a\0"))
