"""Tests of tools/report.py and tools/svg.py: a journal written by hand in, pages out. No model runs here."""
import html
import html.parser
import http.server
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import threading

import pytest

from tools import folder, report, svg

SECTIONS = ["trajectory", "answers", "dropped", "heat", "healing", "setting"]
UNSEEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
                    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]")
ATTACKS = ['"><img src=x onerror=1>', "\x00nul \x1b[31mred\x1b[0m \x9b", "x" * 100_000,
           "'><img src=http://127.0.0.1:PORT/stolen.png><script>top.pwned = 1</script>",
           "\u202egnp.exe\u2066 \u200f\u05e9\u05dc\u05d5\u05dd",
           "</title></style></svg><svg onload='top.pwned = 2'>", "\ud800 lone \U000e0041 tag",
           "\n" * 300 + "[a](javascript:top.pwned=3) `b` | # c", "Z" + "\u0316" * 400,
           "<a href=javascript:top.pwned=4 style=position:fixed;width:9999px>"]

# ---- a run written by hand ---------------------------------------------------------------------------------


def a_row(kind, rnd=None, trait=0.0, text=0.98, **more):
    """A row of the journal."""
    diary = [dict(prompt=f"What would you do, case {i}?", text=f"{kind} {rnd} says {i}, and this is all.",
                  coherence=min(1.0, text + 0.02 * (i == 0))) for i in range(4)]
    row = dict(round=rnd, stage="row", kind=kind, label=kind, trait=trait, trait_se=0.05, coherence=0.99,
               text=text, text_se=0.01, diary=diary, coeff=0.0,
               shift=dict(target="authority", direction=-1, off_target=0.1,
                          moved={f: 0.1 if f != "authority" else -trait for f in report.FOUNDATIONS}))
    return row | more


def a_round(n, night=(1.1, 0.93), day=(0.4, 0.97), reasons=()):
    """The events of one round: steered and healed as (trait, text)."""
    trials = [dict(coeff=0.1 * 2 ** k, survive=1 - 0.1 * k, ppl=1.3 + k) for k in range(5)]
    verdicts = [dict(kept=kept, rule="" if kept else "loop", value=0.7, limit=0.5, readings={}, match="")
                for kept in [False] * 2 + [True] * 6]
    made = [dict(prompt=i % 3, coeff=0.4, finished=True, ids=[5, 6], text=f"Answer number {i}.", verdict=v)
            for i, v in enumerate(verdicts)]
    steps = [dict(step=i, epoch=0, nll=1 / (i + 1), div=0.02 * i, div_max=0.05 * i, fired=0.5 * (i > 6))
             for i in range(9)]
    kl = [0.01, 0.02, 1.5, 0.01, 0.02, 0.6]
    worst = dict(prompt=1, tokens=["I", " would", " not", " do", " that", "."], day=kl, before=[0.0] * 6,
                 night=[2 * x for x in kl])
    events = [
        dict(stage="vector", norm={"2": 1.5}, cosine={"2": 0.98}),
        dict(stage="dose", coeff=0.4, trials=trials), dict(stage="made", completions=made),
        a_row("steered", n, *night), dict(stage="tau", tau=0.34, distance=0.23, kl_agg="rmse"),
        dict(stage="heal", steps=steps, skipped=[], nll_first=1.0, nll_last=0.2, val_nll_before=0.5,
             val_nll_after=0.4, fired_share=0.22, lam_eff=0.3, tau=0.34, n_val=2, warning=None,
             worst=worst),
        a_row("healed", n, *day), dict(stage="gate", accepted=not reasons, reasons=list(reasons))]
    return [e | dict(round=n) for e in events]


def a_run(path, rounds=None, change=lambda event: event, **more):
    """A finished run's run.json and events.jsonl. change: every event goes through it, None leaves it out."""
    options = dict(model="pocket", persona="authority", pos="", neg="", seed=0, rounds=2, gate=True,
                   n_make=16, coh_floor=0.95, min_survive=0.9, kl_agg="rmse", out="runs")
    persona = dict(name="authority", target="authority", direction=-1, patterns=[],
                   pos=["You care <b>.", "Be kind."], neg=["You obey.", "Be strict."])
    run = dict(format=folder.FORMAT, status="accepted", command="python loop.py --rounds 2", seed=0,
               argv=["--rounds", "2"], options=options, defaults=options | dict(rounds=8, n_make=64),
               started=1.7e9, seconds=300.0, stopped="", git="abc", code="def", weights="0" * 8,
               versions=dict(torch="2.13"), machine=dict(cpu="x"), accepted=[0, 1], persona=persona,
               items=dict(train=["Why?", "How?", "When?"], held_out=["Where?"]))
    events = [dict(stage="layers", steer=[2], lora=[1, 2]), dict(stage="limits", limits=dict(ngram=0.3)),
              a_row("base"), a_row("prompted", trait=1.2, text=0.96)]
    events += rounds if rounds is not None else a_round(0) + a_round(1, (1.3, 0.81), (0.5, 0.96))
    events = [dict(t=float(i), round=None) | e for i, e in enumerate(events)]
    path.mkdir(parents=True, exist_ok=True)
    (path / "run.json").write_text(json.dumps(run | more))
    lines = [json.dumps(e) + "\n" for e in map(change, events) if e is not None]
    (path / "events.jsonl").write_text("".join(lines))
    return path


def page_of(path) -> str:
    return report.write(path).read_text()


def headline(path) -> tuple[str, str, str]:
    """(mood, headline, the sentences under it)."""
    mood, head, lines = report.verdict(report.Run(path))
    return mood, head, " ".join(lines)


# ---- what holds for every page -----------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    """Tags with their attribute names, what they point to; every element that opens must close."""
    VOID = {"meta", "br"}

    def __init__(self, text):
        super().__init__()
        self.seen, self.links, self.open = set(), set(), []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.seen |= {(tag, name) for name, _ in attributes} | {(tag, "")}
        pointers = ("href", "src", "action", "xlink:href", "data")
        self.links |= {value for name, value in attributes if name in pointers}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open = self.open[:-1] if tag not in self.VOID else self.open

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.getpos())


def check_page(text):
    """One file, no script, nothing fetched, no unseen character, whole tags, no part that failed."""
    tags = Tags(text)
    assert len(text.encode()) < 2_000_000 and not re.search("<script|url\\(|@import", text)
    fetching = ("src", "srcset", "action", "formaction")
    assert not any(name.startswith("on") or name in fetching for _, name in tags.seen)
    foreign = "script iframe img object embed link form base foreignobject use image".split()
    assert not {tag for tag, _ in tags.seen} & set(foreign)
    assert all(link.startswith(("#", "./")) for link in tags.links), tags.links
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "@media print" in text
    assert not UNSEEN.search(text) and "cannot be drawn" not in text
    return tags


def test_a_finished_run_shows_every_part_and_the_first_plot_comes_before_the_answers(tmp_path):
    text = page_of(a_run(tmp_path))
    assert check_page(text).seen >= {("td", "data-who"), ("details", "")}
    assert re.findall(r'<section id="(\w+)"', text) == SECTIONS and 'class="missing"' not in text
    n_figures = text.count('role="img"')
    assert n_figures == text.count("<svg viewBox") - text.count('aria-hidden="true"') == 2
    assert "+0.500 ± 0.050" in text and "0.960 ± 0.010" in text                    # day 1's trait and text
    assert '<th scope="col">care, nats</th>' in text and "<td>+0.10</td>" in text   # every foundation's move
    assert "<code>--n-make</code>" in text and "<code>--seed</code>" not in text    # differs, does not differ
    assert "python loop.py --rounds 2" in text and "--resume" in text and "--to peft" in text
    before = text[:text.index("The other prompts (2)")]
    assert before.count('class="asked"') == 2 and text.index('role="img"') < text.index('class="asked"')
    diary = (tmp_path / "diary.md").read_text()
    names = ("Base", "Prompted", "Night 0", "Day 0", "Night 1", "Day 1")
    assert all(f"**{name}**, trait" in diary for name in names)


def test_the_night_that_breaks_most_stands_beside_the_others_on_the_prompt_that_breaks_it_most(tmp_path):
    broken = a_row("steered", 1, 1.3, 0.7)
    broken["diary"][2] |= dict(coherence=0.1, text="the the the the")
    rounds = [broken if (e["stage"], e.get("kind")) == ("row", "steered") and e["round"] == 1 else e
              for e in a_round(0) + a_round(1) + a_round(2)]
    text = page_of(a_run(tmp_path, rounds))
    asked = text[text.index('class="asked"'):]
    assert asked.index("the the the the") < asked.index("case 0?") and "Night 0, steered</b>" in text
    assert "Night 1, steered, least coherent" in asked and "on which night 1 breaks most" in text
    clean = page_of(a_run(tmp_path, a_round(0, night=(1.1, 1.0))))
    assert "No greedy answer of night 0 broke" in clean


# ---- the verdict -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("day, mood, words", [
    ((0.5, 0.97), "good", "Day 0 keeps 45% of the steering’s trait at 99% of the base’s text coherence"),
    ((0.5, 0.80), "bad", "falls under the coherence floor: 82% of the base’s text coherence is left"),
    ((0.08, 0.97), "open", "the trait did not move"), ((-0.08, 0.97), "open", "the trait did not move"),
    ((0.105, 0.97), "open", "hardly any trait"), ((-0.4, 0.97), "bad", "the trait moved the wrong way")])
def test_the_verdict_follows_from_the_numbers(tmp_path, day, mood, words):
    found, head, _ = headline(a_run(tmp_path, a_round(0, day=day)))
    assert found == mood and words in head


def test_a_probe_that_cannot_read_the_model_is_said_and_claims_no_trait(tmp_path):
    def low(e):
        return e | dict(coherence=0.2) if e["stage"] == "row" else e

    def share(e):
        return low(e) | dict(share=0.3 if e["round"] is not None else float(e.get("kind") == "prompted"))
    mood, head, lines = headline(a_run(tmp_path, change=low))
    assert (mood, head) == ("bad", "The probe cannot read this model")
    assert "<dt>off-target</dt>" not in page_of(tmp_path)
    assert "<dt>off-target</dt>" in page_of(a_run(tmp_path))
    mood, head, lines = headline(a_run(tmp_path, change=share))
    assert mood == "good" and "the share does not need the probe" in lines


def test_the_trait_is_the_share_if_every_row_has_it_and_the_verdict_names_both(tmp_path):
    def metered(e):
        if e["stage"] != "row":
            return e
        share = {"base": 0.0, "prompted": 1.0, "steered": 0.8, "healed": 0.6}[e["kind"]]
        return e | dict(share=share, share_se=0.05, persona_ratio=0.1 + 2 * share, persona_ratio_se=0.1)
    run = report.Run(a_run(tmp_path, change=metered))
    assert run.meter == "share" and run.trait_of(run.final) == (0.6, 0.05)
    mood, head, lines = headline(tmp_path)
    text = page_of(tmp_path)
    assert "75% of the steering’s trait" in head and "<b>+0.60</b> <span>± 0.05 of what" in text
    assert "<b>+0.50</b> <span>± 0.05 nats of the probe’s authority, wanted down" in text
    assert "persona prompt 1" in text
    partly = a_run(tmp_path, change=lambda e: metered(e) if e.get("kind") != "prompted" else e)
    assert report.Run(partly).meter == "nats"
    nothing = dict(name="mine", target=None, direction=None, pos=["a"], neg=["b"])
    run = report.Run(a_run(tmp_path, change=lambda e: metered(e) | dict(trait=None), persona=nothing))
    assert run.meter == "share" and not run.unread
    text = page_of(tmp_path)
    assert check_page(text) and "nats of the probe" not in text and "<dt>off-target</dt>" not in text


def test_a_refused_run_keeps_its_tiles_and_says_why(tmp_path):
    rounds = a_round(0, day=(0.4, 0.80), reasons=["text 0.800 under 0.931"])
    text = page_of(a_run(tmp_path, rounds, accepted=[], status="no round accepted"))
    check_page(text)
    assert "No round was accepted: the model is the base" in text and "text 0.800 under 0.931" in text
    assert "Day 0 (refused: the model is the base)" in text and "<b>0.800</b>" in text
    assert "mark healed undone" in text and "rolled back" in text and "--to peft" not in text


def test_steering_that_moves_nothing_is_said(tmp_path):
    _, _, lines = headline(a_run(tmp_path, a_round(0, night=(0.06, 0.97), day=(0.02, 0.97))))
    assert "Steering alone did not move the trait: at most +0.060 ± 0.050, in night 0" in lines
    assert "Steering alone" not in headline(a_run(tmp_path))[2]


@pytest.mark.parametrize("tau, words", [(0.30, "both are over"), (0.5, "only the rmse is over"),
                                        (0.9, "neither is over"), (None, "No barrier")])
def test_the_caption_on_the_worst_answer_claims_what_was_measured(tmp_path, tau, words):
    def change(e):
        return e | dict(tau=tau, lam_eff=0.3 if tau else 0) if e["stage"] == "heal" else e
    text = page_of(a_run(tmp_path, change=change))
    assert words in text and "mean 0.360, rmse 0.660" in text and "1.8 times its mean" in text


def test_a_custom_persona_has_its_own_name_and_every_persona_is_quoted(tmp_path):
    own = dict(name="", target=None, direction=None, pos=["You <i>love."], neg=["You hate."])
    options = json.loads((a_run(tmp_path) / "run.json").read_text())["options"]
    for more, name in ((dict(pos="You <i>love."), "custom"), (dict(persona="a/calm.json"), "calm")):
        text = page_of(a_run(tmp_path, options=options | more, persona=own))
        assert f"persona <b><bdi>{name}</bdi></b>" in text and "authority</bdi></b>" not in text
        assert "You &lt;i&gt;love." in text and "You hate." in text
        diary = (tmp_path / "diary.md").read_text()
        assert f"persona {name}\n" in diary
        assert "> for: You &lt;i&gt;love." in diary and "> against: You hate." in diary


# ---- damage and hostility ----------------------------------------------------------------------------------


def test_clean_gives_the_types_of_the_shape_whatever_comes_in():
    shape = dict(a=float, b=[float], c={str: float}, d=[dict(e=str, f=bool)])
    empty = dict(a=None, b=[], c={}, d=[])
    others = [dict(a=x) for x in (math.nan, math.inf, 10 ** 400, True, "1", [1])]
    for x in (None, 3, "x", [], [{}], dict(b="12", c=[1], d={}), *others):
        assert report.clean(x, shape) == empty, x
    x = dict(a=1, b=[1, None, "x", math.inf, 2], c=dict(k=1, m=None), z=1,
             d=[7, dict(e=3, f=1), dict(e="y", f=False)])
    good = dict(a=1.0, b=[1.0, 2.0], c=dict(k=1.0),
                d=[dict(e="", f=None), dict(e="", f=None), dict(e="y", f=False)])
    assert report.clean(x, shape) == good


def test_a_report_survives_any_damage_to_values(tmp_path):
    rng, known = random.Random(0), ("stage", "t", "round")             # which the reader itself checks

    def damaged(value, share=0.04):
        if rng.random() < share:
            return rng.choice([None, "text", -1, 0, 1e308, 10 ** 400, [], {}, [None], True, 1e-300])
        if isinstance(value, dict):
            return {k: damaged(v, share) for k, v in value.items()}
        return [damaged(v, share) for v in value] if isinstance(value, list) else value
    for trial in range(60):
        a_run(tmp_path, change=lambda e: {k: v if k in known else damaged(v) for k, v in e.items()})
        path = tmp_path / "run.json"
        run = {k: v if k == "format" else damaged(v, 0.1) for k, v in json.loads(path.read_text()).items()}
        path.write_text(json.dumps(run))                                # another format is refused as a whole
        check_page(page_of(tmp_path))


def spoiled(value, turn, port=0):
    """Every text in a value replaced by the next attack; stages and kinds stay, so that it is shown."""
    if isinstance(value, dict):
        whole = ("stage", "kind", "shift", "format")
        return {k: v if k in whole else spoiled(v, turn, port) for k, v in value.items()}
    if isinstance(value, list):
        return [spoiled(v, turn, port) for v in value]
    return ATTACKS[next(turn) % len(ATTACKS)].replace("PORT", str(port)) if isinstance(value, str) else value


def hostile_run(path, port=0):
    """A run of which every text is an attack, names of options, versions and limits too."""
    turn, keys = itertools.count(), {attack: 1.0 for attack in ATTACKS}
    named = ("limits", "cosine")
    a_run(path, change=lambda e: spoiled(e, turn, port) | {k: e[k] | keys for k in named if k in e and e[k]})
    record = json.loads((path / "run.json").read_text())
    record = {k: v | keys if k in ("versions", "machine", "options") else v for k, v in record.items()}
    defaults = record.pop("defaults") | {attack: 0 for attack in ATTACKS}
    (path / "run.json").write_text(json.dumps(spoiled(record, turn, port) | dict(defaults=defaults)))
    return path


def test_a_run_of_hostile_text_gives_the_same_tags_as_an_honest_one(tmp_path):
    honest, hostile = page_of(a_run(tmp_path / "honest")), page_of(hostile_run(tmp_path / "run"))
    assert check_page(hostile).seen <= check_page(honest).seen | {("p", "class")}
    assert "&lt;img src=x onerror=1&gt;" in hostile and "more characters" in hostile
    diary = (tmp_path / "run" / "diary.md").read_text()
    assert not re.search(r"(?<!\\)[<>]", re.sub(r"(?m)^(> |`[^`]*`)", "", diary)) and not UNSEEN.search(diary)
    assert len(diary) < 100_000 and "more characters" in diary


def test_an_unfinished_run_says_so_and_shows_what_there_is(tmp_path):
    a_run(tmp_path)
    lines = (tmp_path / "events.jsonl").read_text().splitlines(True)
    run = json.loads((tmp_path / "run.json").read_text())
    run = {k: v for k, v in run.items() if k not in ("seconds", "accepted", "stopped")}
    (tmp_path / "run.json").write_text(json.dumps(run | dict(status="running")))
    shown = []
    for n in range(len(lines) + 1):
        (tmp_path / "events.jsonl").write_text("".join(lines[:n]))
        text = page_of(tmp_path)
        check_page(text)
        assert "not finished" in text, n
        shown.append(text.count('role="img"'))
    assert shown == sorted(shown) and shown[0] == 0 and shown[-1] == 2
    (tmp_path / "events.jsonl").unlink()
    assert "no events yet" in page_of(tmp_path) and "It ended with" not in text
    assert "not measured anything" in (tmp_path / "diary.md").read_text()
    _, _, sentences = headline(a_run(tmp_path, status="failed", seconds=None, reason="the disk is full"))
    assert "not finished" in sentences and "It ended with: <bdi>the disk is full</bdi>" in sentences
    for stage in {json.loads(line)["stage"] for line in lines}:
        check_page(page_of(a_run(tmp_path, change=lambda e: e if e["stage"] != stage else None)))


def test_a_torn_last_event_is_noted_and_what_is_no_run_is_refused_in_a_sentence(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps(dict(format=folder.FORMAT)))
    (tmp_path / "events.jsonl").write_text('{"stage": "a"}\n{"stage": "b"}\n{"sta')
    assert report.main([str(tmp_path)]) == 0
    before = (tmp_path / "report.html").read_text()
    assert "line 3" in before and "line 3" in (tmp_path / "diary.md").read_text()
    (tmp_path / "events.jsonl").write_text('{"stage": "a"}\n{"sta\n{"stage": "b"}\n')
    assert report.main([str(tmp_path)]) == 2 and "line 2" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == before and not list(tmp_path.glob(".*"))
    assert report.main([str(tmp_path / "nowhere")]) == 2 and "not a run folder" in capsys.readouterr().err


def test_a_long_run_stays_below_two_megabytes_and_says_that_it_shows_a_selection(tmp_path):
    rounds = [e for n in range(120) for e in a_round(n)]
    for e in rounds:
        if e["stage"] == "heal":
            e["steps"] *= 4
            e["worst"] = {k: v * 60 if isinstance(v, list) else v for k, v in e["worst"].items()}
        if e["stage"] == "row":
            e["diary"] = [d | dict(text=d["text"] * 20) for d in e["diary"] * 3]
    page = page_of(a_run(tmp_path, rounds))
    check_page(page)
    assert "1500 of 4320 steps" in page and "day 119" in page


# ---- figures -----------------------------------------------------------------------------------------------


def test_labels_of_close_marks_hide_neither_each_other_nor_a_mark():
    rng = random.Random(0)
    points = [(0.5 + rng.gauss(0, 0.03), 0.96 + rng.gauss(0, 0.003)) for _ in range(6)]
    plot = svg.Plot("", [0, 1], [0.9, 1.0], "x", "y")
    for i, (x, y) in enumerate(points):
        plot.mark("healed", x, y, "", str(i), ex=0.05, ey=0.01)
    text = plot.svg()
    assert text.count('class="name healed"') == 6 and 'class="lead"' in text
    marks, labels = plot.taken[:6], plot.taken[6:]
    for a, b in [*itertools.combinations(labels, 2), *itertools.product(labels, marks)]:
        assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]), (a, b)


@pytest.mark.parametrize("values", [[0.5], [0, 0], [1e-12, 1e-12], [-3, 1e6], [1e99, -1e99], [0.97, 0.98]])
def test_a_scale_has_ticks_inside_its_axis_for_any_values(values):
    scale = svg.Scale(values, 60, 400)
    assert 2 <= len(scale.ticks()) <= 8 and all(59 <= scale(t) <= 401 for t in scale.ticks())
    assert all(60 <= scale(v) <= 400 for v in values)
    with pytest.raises(ValueError, match="no values"):
        svg.Scale([None], 0, 1)


# ---- in a browser ------------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync --dump-dom "
         "--disable-background-networking --disable-component-update --virtual-time-budget=4000").split()
HARNESS = """<!doctype html><body><pre id=out></pre><script>
function measure(frame) {
  const doc = frame.contentDocument, wide = [];
  for (const e of doc.body.querySelectorAll("*"))
    if (!e.closest(".scroll *, .panel *") && e.getBoundingClientRect().right > 360.5)
      wide.push(e.tagName + "." + e.className);
  const page = doc.documentElement;
  return {width: page.scrollWidth, height: page.scrollHeight, wide: wide.slice(0, 5),
          scripts: doc.scripts.length,
          images: doc.images.length, title: doc.title,
          fetched: frame.contentWindow.performance.getEntriesByType("resource").length};
}
addEventListener("load", () => setTimeout(() => {
  out.textContent = JSON.stringify({pwned: window.pwned || null,
                                    frames: [...document.querySelectorAll("iframe")].map(measure)}) }, 500));
</script>FRAMES"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: no page was opened in a browser")
def test_in_a_real_browser_nothing_is_fetched_no_script_runs_and_nothing_overflows_at_360_px(tmp_path):
    asked = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]

    def frames(*pages):
        path, style = tmp_path / "harness.html", "border:0;width:360px;height:800px"
        path.write_text(HARNESS.replace("FRAMES", "".join(
            f'<iframe style="{style}" srcdoc="{html.escape(p)}"></iframe>' for p in pages)))
        argv = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
        page = subprocess.run(argv, capture_output=True, text=True, timeout=120).stdout
        return json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', page, re.DOTALL).group(1)))
    honest, hostile = page_of(a_run(tmp_path / "honest")), page_of(hostile_run(tmp_path / "run", port))
    bare = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", hostile)    # escaping alone holds
    try:
        assert bare != hostile
        found = frames(honest, hostile, bare)
        assert found["pwned"] is None and asked == []
        for frame in found["frames"]:
            assert frame["width"] <= 360 and not frame["wide"] and frame["height"] > 1000, frame
            assert (frame["scripts"], frame["fetched"], frame["images"]) == (0, 0, 0), frame
        attack = f'<img src="http://127.0.0.1:{port}/%s.png"><script>top.pwned = %d</script>'
        control = frames('<title>c</title><div style="width:900px">wide</div>' + attack % ("seen", 9))
        assert control["pwned"] == 9 and "/seen.png" in asked
        assert control["frames"][0]["wide"] and control["frames"][0]["scripts"] == 1
        shut = frames(honest.replace("<main>", "<main>" + attack % ("shut", 8)))
        assert shut["pwned"] is None and "/shut.png" not in asked           # the policy alone holds too
    finally:
        server.shutdown()
