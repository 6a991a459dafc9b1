"""Words on the command line that requant does not have, or has twice, with what to write instead."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from requant.cli.foreign_options import ADVICE, COUNTERPARTS, UNRELATED
from requant.errors import UsageError, brief, find_similar

_SIZES = ("--vram", "--ram", "--size", "--reserve", "--max-memory", "--max-shard-size")
_UNIT = re.compile(r"[KMGT]i?B?|B", re.IGNORECASE)
_NUMBER = re.compile(r"\d+([.,]\d+)?")
_LIKENESS = 0.75  # of a misspelt option, without its dashes, to the one that was meant

Options = Mapping[str, click.Option]  # of a command, by each of their names


def check_words(words: Sequence[str], options: Options, command: str) -> None:
    """Raise UsageError for a word of another tool, and for an option given twice with different values.

    options: those of the command called `command`.
    """
    before, given = "", dict[str, str]()
    for i, word in enumerate(words):
        if word == "--":
            return
        if before in _SIZES and _NUMBER.fullmatch(word) and i + 1 < len(words) and _UNIT.fullmatch(words[i + 1]):
            together = f"{word.replace(',', '.')}{words[i + 1]}"
            raise UsageError(f"{before}: write the number and its unit together, {together}")
        if _takes_value(options, before):
            _check_once(before, word, options, given, command)
        elif word.startswith("-") and word != "-":
            flag, joined, value = word.partition("=")
            if joined and _takes_value(options, flag):
                _check_once(flag, value, options, given, command)
            check_option(flag, options, command)
        else:
            _check_argument(word, options, words[0])
        before = "" if _takes_value(options, before) else word


def _takes_value(options: Options, flag: str) -> bool:
    return flag in options and not options[flag].is_flag


def _check_once(flag: str, value: str, options: Options, given: dict[str, str], command: str) -> None:
    """Raise UsageError where an option that may be given once has another value already; keep the value in `given`."""
    option = options[flag]
    if option.multiple:
        return
    first = given.setdefault(str(option.name), value)
    if first != value:
        takes_list = (option.metavar or "").endswith(",..") and (command, flag) != ("convert", "--vram")
        once = f"give a list, {flag} {brief(first)},{brief(value)}" if takes_list else "give it once"
        raise UsageError(f"{flag} is given twice, as {brief(first)} and as {brief(value)}; {once}")


def check_option(flag: str, options: Options, command: str) -> None:
    """Raise UsageError for an option that the command does not have; click reads short options in one word."""
    if flag in options:
        return
    is_foreign = _name(flag) in COUNTERPARTS or _name(flag) in ADVICE or f"--{_name(flag)}" in options
    if flag.startswith("--") or is_foreign or flag[:2] not in options:
        raise UsageError(describe_unknown_option(flag, options, command))


def describe_unknown_option(flag: str, options: Options, command: str) -> str:
    """Return the message for an option that the command does not have, with what was probably meant.

    command: its name, empty for `requant` itself.
    """
    message, hint = f"no option '{brief(flag)}'", _hint(flag, options, command)
    return f"{message}{'; ' if hint else ''}{hint}{'' if hint.endswith('?') else ';'} see {_help(command)}"


def _help(command: str) -> str:
    return " ".join(filter(None, ("requant", command, "--help")))


def _name(flag: str) -> str:
    return flag.lstrip("-").replace("_", "-")


def _hint(flag: str, options: Options, command: str) -> str:
    name = _name(flag)
    meant = COUNTERPARTS.get(name, ())
    if "-o" in meant and command == "convert":
        return "the output is the second argument: requant convert MODEL OUT.gguf"
    for option in (*meant, f"--{name}"):
        if option.split()[0] in options:
            return f"did you mean {option}?"
    if name in ADVICE:
        return _place_advice(ADVICE[name], options)
    for option in (flag, f"--{name}", *(option.split()[0] for option in meant)):
        if having := _commands_with(option):
            which = "it" if option == flag else option
            return f"{' and '.join(having)} {'has' if len(having) == 1 else 'have'} {which}"
    if name in UNRELATED:
        return ""
    known = {option.lstrip("-"): option for option in options}
    near = find_similar(name, known, 1, _LIKENESS)
    return f"did you mean {known[near[0]]}?" if near else ""


def _place_advice(advice: str, options: Options) -> str:
    """Return the advice; where this command lacks the option that it names, with the commands that have it."""
    named = re.search("--[a-z-]+", advice)
    having = [] if named is None or named[0] in options else _commands_with(named[0])
    return f"{advice} ({', '.join(having)})" if having else advice


def _commands_with(flag: str) -> list[str]:
    """Return `requant plan` and its like for each command with an option of this name."""
    from requant.cli.main import COMMANDS, find_command

    return [f"requant {name}" for name in COMMANDS if any(flag in param.opts for param in find_command(name).params)]


def _check_argument(word: str, options: Options, model: str) -> None:
    """Raise UsageError for a type or a mixture that stands where a file does, as in llama-quantize."""
    if Path(word).exists():
        return
    from requant.container.infos import FORK, FORK_TYPES
    from requant.formats import by_name
    from requant.model.mixtures import MIXTURE_ALIASES, mixture_names

    if word.upper() == "COPY" and "--like" in options:
        model = model if not model.startswith("-") else "MODEL"
        raise UsageError(f"'{word}' is no file; to keep every type, give the model itself: --like {brief(model)}")
    if word.upper() in FORK_TYPES:
        raise UsageError(f"'{brief(word)}' is no file; it is {FORK}")
    name = _name_of_file_type(int(word)) if re.fullmatch("[0-9]{1,3}", word) else word.upper()
    mixture = MIXTURE_ALIASES.get(name, name)
    fmt, is_mixture = by_name(name), mixture in mixture_names()
    given = {"--preset": mixture if is_mixture else None, "--type": None if fmt is None else fmt.name}
    ways = [f"{option} {value}" for option, value in given.items() if value is not None and option in options]
    if ways:
        raise UsageError(f"'{brief(word)}' is no file; give the type by an option: {' or '.join(ways)}")


def _name_of_file_type(number: int) -> str:
    """Return the name of a llama_ftype, which llama-quantize takes as a number; an empty one where there is none."""
    from gguf import LlamaFileType

    names = {int(member): name for name, member in LlamaFileType.__members__.items()}
    return names.get(number, "").partition("_")[2]
