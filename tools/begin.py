"""Begin: what a run's numbers depend on, written down as it begins and held against it when it goes on."""
import contextlib
import json
import platform
import shlex
import subprocess
import zlib
from pathlib import Path
from typing import Callable

import torch

from tools import model as models, options, ranks, template
from tools.files import inert, plain
from tools.folder import Folder

ROOT = Path(__file__).resolve().parents[1]
CODE = ("loop", "steer", "lora", "heal", "evalmfv", "tools/student", "tools/model", "tools/inputs",
        "tools/template", "tools/search", "tools/foresee", "tools/freetext")   # what its numbers come through


def facts_of(model, tok, given: dict, date: str) -> dict:
    """What must be as it was for a run to go on. given: of `inputs.load`; date: the day of the template."""
    texts = json.dumps([given["persona"], given["contexts"], given["vignettes"]]).encode()
    return plain(dict(weights=models.fingerprint(model), template=template.template_id(tok), date=date,
                      texts=f"{zlib.crc32(texts):08x}", persona=given["persona"],
                      items={side: given[side] for side in ("train", "held_out")}))


def surroundings(model, code: tuple[str, ...] = CODE) -> dict:
    """What should be: versions, threads, device, and the files of this code that are named."""
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
                git=commit, commit=models.commit_of(model), code=f"{zlib.crc32(read):08x}")


def begin(folder: Folder, facts: dict, around: dict, argv: list[str], values: dict, *, defaults: dict,
          free: tuple[str, ...], standing: Callable) -> None:
    """Make the run's folder, or go on with it; all ranks know it then.

    facts and around are those of the two functions above. values: the options; a run that goes on may have
    new ones of `free`, with which standing(record) of its events are still true: the others are forgotten.
    """
    ranks.agree("weights, texts, code or versions", plain([facts, around["code"], around["versions"]]))

    def written():
        if not folder.is_resumed:
            name = f"{Path(values['model']).name}-{facts['persona']['name']}"
            folder.make(Path(values["out"]), name, argv=argv, command="python loop.py " + shlex.join(argv),
                        options=values | {"resume": ""}, defaults=defaults, **around, **facts)
        else:
            before = folder.reopen(facts, around)
            before |= options.renewed(before, values, free)
            if (n := standing(folder.record)) < len(folder.events):
                rnd = folder.events[n]["round"]
                folder.screen.say("gate", rnd, "decides otherwise with these options: the run goes on from "
                                  "here")
                folder.cut(n)
            command = "python loop.py " + shlex.join(before["argv"])
            folder.save(**before | dict(status="running", reason="", command=command))
        return folder.path, folder.run, folder.events
    folder.path, folder.run, folder.events = ranks.lead(written)
    print(inert(folder.run["command"]))
