"""Options: dataclasses as one command line, and their values as a run's record gives them back.

A field is an option: its name, type, default and help. Types are bool, int, float, str, Literal, a pair of
floats, or one of these or None, which no command line can say.
"""
import argparse
import dataclasses
import typing
from typing import Literal


def kinds(groups) -> dict[str, tuple]:
    """{option: the types that its value may have}."""
    found = {}
    for cls in groups:
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            kind = hints[f.name]
            is_union = type(None) in typing.get_args(kind)
            found[f.name] = typing.get_args(kind) if is_union else (kind,)
    return found


def parser(groups, first=(), **how) -> argparse.ArgumentParser:
    """--help shows the options of `first` first, the others by dataclass, whose docstring is the title."""
    made, known = argparse.ArgumentParser(**how), kinds(groups)
    on_top = made.add_argument_group("turned first")
    for cls in groups:
        group = made.add_argument_group(cls.__doc__)
        for f in dataclasses.fields(cls):
            kind, shown = known[f.name][0], "" if f.default in (None, "") else f" (default: {f.default})"
            kw = dict(default=f.default, help=(f.metadata["help"] + shown).replace("%", "%%"))
            if kind is bool:
                kw["action"] = argparse.BooleanOptionalAction
            elif typing.get_origin(kind) is Literal:
                kw["choices"] = typing.get_args(kind)
            elif typing.get_origin(kind) is tuple:
                kw.update(type=float, nargs=2, metavar=("FROM", "TO"))
            else:
                kw["type"] = kind
            (on_top if f.name in first else group).add_argument("--" + f.name.replace("_", "-"), **kw)
    return made


def tidy(args: dict) -> dict:
    """What argparse gave: pairs as tuples, and a ValueError for what no option can mean."""
    args = {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}
    for name, value in args.items():
        if value == () or isinstance(value, str) and "\0" in value:           # argparse makes [] of --name=--
            raise ValueError(f"--{name.replace('_', '-')} {value!r:.60}: not a value it can have")
    return args


def command(groups, first: tuple, free: tuple, argv, *, preset: dict, recorded_of, **how) -> dict:
    """Every option's value, from the command line; with --quick others are left at `preset`, with --resume
    RUN at those of the run, of which only `free` may differ. recorded_of(path) -> that run's options.
    A usage error ends the process with 2; ValueError says what contradicts what."""
    made = parser(groups, first, **how)
    made.add_argument("positional_model", nargs="?", metavar="MODEL", help="the same as --model")
    args, then = vars(made.parse_args(argv)), {}
    path = args["resume"]
    if path:                                            # what is not given now stays as it was
        then = recorded(recorded_of(path), groups, path) | {"resume": ""}
        args = vars(made.parse_args(argv, argparse.Namespace(**then)))
    elif args["quick"]:
        args = vars(made.parse_args(argv, argparse.Namespace(**preset)))
    model = args.pop("positional_model")
    args = tidy(args if model is None else args | dict(model=model))
    if names := [k for k in then if args[k] != then[k] and k not in (*free, "out", "resume")]:
        differ = ", ".join(f"{k} is {then[k]!r} there and {args[k]!r} here" for k in names)
        raise ValueError(f"--resume {path}: that run has another configuration: {differ}; leave these out, "
                         "or start a new run without --resume")
    if less := [k for k in ("rounds", "patience") if then and args[k] < then[k]]:
        name = less[0]
        raise ValueError(f"--{name} {args[name]}: that run has {then[name]}, which may only grow")
    return args


def values(configs) -> dict:
    """The options of dataclasses as one dict; of classes, their defaults."""
    return {f.name: getattr(config, f.name) for config in configs for f in dataclasses.fields(config)}


def configs(groups, values: dict) -> list:
    """One dataclass of each group."""
    return [cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)}) for cls in groups]


def renewed(run: dict, values: dict, free: tuple[str, ...]) -> dict:
    """{options, argv} of a recorded run that goes on with the `free` ones among these values."""
    before, argv = run["options"], list(run["argv"])
    for name in [name for name in free if values[name] != before[name]]:
        value, word = values[name], name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{word}" if value else f"--no-{word}")
        else:
            argv += [f"--{word}", str(value)]
    return dict(options=before | {name: values[name] for name in free}, argv=argv)


def recorded(options, groups, path) -> dict:
    """The options of the run in `path`, checked as if they had been typed; ValueError if one cannot be."""
    def fits(value, kind) -> bool:
        if typing.get_origin(kind) is tuple:
            return isinstance(value, tuple) and [type(x) for x in value] == [float, float]
        return value in typing.get_args(kind) if typing.get_origin(kind) is Literal else type(value) is kind
    if not isinstance(options, dict):
        raise ValueError(f"{path}/run.json: its options are missing; the file is damaged")
    if unknown := sorted(set(options) - set(kinds(groups))):
        raise ValueError(f"{path}/run.json: option {unknown[0]} is none that this program has: another made "
                         "that run, go on with that one")
    found = tidy({name: options.get(name, ...) for name in kinds(groups)})
    for name, allowed in kinds(groups).items():
        if not any(fits(found[name], kind) for kind in allowed):
            raise ValueError(f"{path}/run.json: option {name} is {options.get(name)!r:.60}; it is damaged")
    return found
