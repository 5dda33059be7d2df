"""What the house promises of every file: imports go one way, no pickle, lines that can be read, no stale
results, a README that runs."""
import ast
import dataclasses
import inspect
import os
import re
import runpy
import shutil
import subprocess
import sys

import common
import evalmfv
import heal
import loop
import lora
import pytest
from common import ROOT

CONCEPTS = ("steer", "heal", "lora", "evalmfv")
TOOLS = sorted(p.stem for p in (ROOT / "tools").glob("*.py") if p.stem != "__init__")
FOLDERS = (".", "tools", "tests", "bench", "pocket", "innerpissa")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))


def imported(path):
    """Names of modules that a file imports anywhere: `from tools import x` is tools.x."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "tools":
            names |= {f"tools.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return {name if name.startswith("tools.") else name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", ["loop", *CONCEPTS, *(f"tools/{name}" for name in TOOLS)])
def test_imports_go_one_way(name):
    """Nested imports too: a higher room is not reached late either."""
    rooms = {"loop", *CONCEPTS, *(f"tools.{tool}" for tool in TOOLS)}
    allowed = {"loop": rooms, "evalmfv": {"steer"}}.get(name, set() if name in CONCEPTS else rooms - {"loop"})
    packages = dict(heal={"torch"}, lora={"torch"}, steer={"torch", "transformers"}, evalmfv={"torch"})
    optional = {"tools/export": {"gguf"}}                       # asked for, and refused with a sentence
    found = imported(ROOT / f"{name}.py") - set(sys.stdlib_module_names)
    assert found & rooms <= allowed, found & rooms - allowed
    five = {"torch", "transformers", "safetensors", "numpy"} | optional.get(name, set())
    assert found - rooms - {"tools"} <= packages.get(name, five), found
    text = (ROOT / f"{name}.py").read_text()
    assert "innerpissa" not in text and ("import_module" not in text or name == "loop")


def test_requirements_name_the_five_packages_and_no_others():
    lines = (ROOT / "requirements.txt").read_text().split()
    five = ["numpy", "pytest", "safetensors", "torch", "transformers"]
    assert sorted(line.split(">=")[0] for line in lines) == five


def unsafe(source):
    """What in a file could run code that came with a checkpoint, a run folder or a text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword):
            is_on = getattr(node.value, "value", True)
            always, on = ("weights_only", "allow_pickle"), ("trust_remote_code", "shell")
            if node.arg in always or is_on and node.arg in on:
                found.append(node.arg)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            owner = getattr(getattr(node.func, "value", None), "id", "")
            if name in ("exec", "__import__") or (owner, name) in (
                    ("os", "system"), ("os", "popen"), ("torch", "load"), ("np", "load"), ("numpy", "load")) \
                    or name in ("eval", "compile") and not isinstance(node.func, ast.Attribute):
                found.append(name)                              # not model.eval(), re.compile()
    return found


def test_no_file_loads_pickles_or_remote_code():
    for path in SOURCES:
        if path.name != "test_all.py":                          # which runs heal.py's docstring
            assert unsafe(path.read_text()) == [], path
        assert not imported(path) & {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}, path
        objects = re.search(r"(gather|broadcast|scatter|send|recv)_object", path.read_text())   # pickles too
        assert not objects or path.name in ("ranks.py", "test_ranks.py"), path       # of one run's processes
        assert path.parent.name in ("bench", "tests") or path.name == "test_all.py" or \
            "peft" not in imported(path), path                  # a peer there
    for source in ("eval(x)", "exec('a')", "torch.load(p)", "f(trust_remote_code=True)", "run(c, shell=True)",
                   "run(c, shell=x)", "os.system(c)", "np.load(p)", "np.load(p, allow_pickle=True)",
                   "__import__(m)", "compile(a, b, c)"):
        assert unsafe(source), source                           # the check sees each of them
    assert not unsafe("model.eval(); re.compile(p); run(c, shell=False); stack.load(p)")


def test_the_lines_that_are_copied_between_files_are_identical():
    for name in ("opt", "check_ranges"):
        assert len({inspect.getsource(getattr(room, name)) for room in (heal, lora)}) == 1, name
    assert loop.opt is heal.opt and common.FOUNDATIONS == evalmfv.FOUNDATIONS


def test_files_are_no_longer_and_no_wider_than_what_reads_well():
    for path in SOURCES:
        wide = [n for n, line in enumerate(path.read_text().split("\n"), 1) if len(line) > 110]
        assert not wide, f"{path.name}: lines {wide[:9]} are over 110 columns"
    for name in ("loop", *CONCEPTS):
        assert len((ROOT / f"{name}.py").read_text().splitlines()) <= 500, name


@pytest.mark.parametrize("name, argv, shown", [("heal", [], "lets the loop through"),
                                               ("lora", [], "bit for bit: True"),
                                               ("steer", ["--help"], "usage")])
def test_a_concept_file_runs_alone_in_an_empty_folder(name, argv, shown, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    command = [sys.executable, "-E", f"{name}.py", *argv]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0 and shown in out.stdout, out.stderr


def test_the_probes_demo_prints_a_profile_or_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evalmfv.py", "--vignettes", str(common.few_vignettes(tmp_path))])
    runpy.run_path(evalmfv.__file__, run_name="__main__")
    out = capsys.readouterr().out
    assert all(f"{f} " in out for f in evalmfv.FOUNDATIONS) and "frames: natural" in out
    monkeypatch.setattr(sys, "argv", ["evalmfv.py", "--vignettes", "nowhere.jsonl"])
    with pytest.raises(SystemExit):
        runpy.run_path(evalmfv.__file__, run_name="__main__")
    assert "No such file or directory: 'nowhere.jsonl'" in capsys.readouterr().err.splitlines()[-1]


def test_help_is_quick_shows_ten_options_first_and_does_not_import_transformers(capsys):
    code = ("import sys, loop\ntry: loop.parse(['--help'])\n"
            "except SystemExit: print('transformers' in sys.modules)")
    spent = []
    for _ in range(2):                                          # the better of two: the first fills caches
        before = os.times()
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        after = os.times()                                      # of the processor, not by the clock
        spent.append(sum(after[2:4]) - sum(before[2:4]))
    assert out.stdout.splitlines()[-1] == "False", out.stdout[-200:] + out.stderr
    titles = ["turned first:", "loop: ", "steer: ", "lora: ", "heal: "]
    at = [out.stdout.index(title) for title in titles]
    assert at == sorted(at) and out.stdout[at[0]:at[1]].count("\n  --") == 10 == len(loop.FIRST)
    options = {f.name for cls in loop.GROUPS for f in dataclasses.fields(cls)}
    assert len(options) <= 48 and not re.search(r"--\w+_", out.stdout)
    assert min(spent) < 3, spent
    for word in loop.WORDS:
        with pytest.raises(SystemExit) as stop:
            loop.main([word, "--help"])
        assert stop.value.code == 0 and f"loop.py {word}" in capsys.readouterr().out, word


def test_a_test_file_can_be_run_alone():
    """Fixtures of tests/shared.py are there in a whole run as soon as one file asks for them."""
    def parameters(source):
        return {arg.arg for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)
                for arg in node.args.args}
    shared = set(re.findall(r"^def (\w+)", (ROOT / "tests" / "shared.py").read_text(), re.MULTILINE))
    for path in [ROOT / "test_all.py", *(ROOT / "tests").glob("test_*.py")]:
        text = path.read_text()
        assert not shared & parameters(text) or 'pytest_plugins = ["shared"]' in text, path.name


def test_ci_runs_the_test_command_of_the_readme():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert "pip install -r requirements.txt && pytest" in readme and "pytest -q" in ci
    assert "python loop.py --kl-agg rmse" in readme and "python loop.py --kl-agg rmse --rounds 1" in ci


def test_the_readme_snippet_runs():
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def stale(text, is_ancestor):
    """Commits that a page gives for its results and that are not in the history; none if it says that
    they were not repeated since."""
    commits = re.findall(r"at commit `?([0-9a-f]{7,40})", text)
    return [c for c in commits if not is_ancestor(c) and "not repeated since" not in text]


def test_results_in_the_docs_are_of_commits_of_this_history():
    assert stale("at commit 1234567, at commit abcdef0", lambda c: c == "1234567") == ["abcdef0"]
    assert stale("at commit abcdef0; not repeated since", lambda c: False) == []
    shallow = ["git", "rev-parse", "--is-shallow-repository"]
    if not shutil.which("git") or subprocess.run(shallow, cwd=ROOT, capture_output=True).stdout != b"false\n":
        pytest.skip("no git here, or a shallow clone: the commits that the docs name cannot be checked")

    def is_ancestor(commit):
        ask = ["git", "merge-base", "--is-ancestor", commit, "HEAD"]
        return subprocess.run(ask, cwd=ROOT, capture_output=True).returncode == 0
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert stale(path.read_text(), is_ancestor) == [], path.name
