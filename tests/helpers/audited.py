"""Commands run one after another in a process that notes what Python does besides; for test_hostile.py.

    python audited.py COMMANDS.json RESULTS.json

COMMANDS: lists of words. RESULTS: {"ran": [[code, stdout, stderr], ..], "events": [[event, what], ..]}.
"""

import io
import json
import os
import sys
from pathlib import Path

# what no file may lead to
ALWAYS = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile", "pty.", "socket.")
ALSO = ("urllib.", "http.", "ftplib.", "smtplib.", "webbrowser.", "shutil.")
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MARK = "EVIL7f3a"
events = []


def note(event, args):
    if event.startswith(ALWAYS + ALSO) or event in CHANGES:
        events.append([event, *map(str, args)])
    elif event == "open" and (args[2] & WRITING or set(str(args[1])) & set("wax+")):
        events.append([event, str(args[0])])
    elif event == "pickle.find_class" and not from_numba():
        events.append([event, *map(str, args)])
    if MARK in str(args):
        events.append(["mark", event, str(args)])


def from_numba():
    """Whether Numba's cache is at work: some caller's file is its module of that name."""
    frame = sys._getframe(2)
    while frame is not None:
        if Path(frame.f_code.co_filename).parts[-3:] == ("numba", "core", "caching.py"):
            return True
        frame = frame.f_back
    return False


def run(words):
    from requant.cli import messages
    from requant.cli.main import main

    messages.prepare()
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", newline="\n") for _ in range(2))
    sys.stdout, sys.stderr = out, err
    try:
        code = messages.exit_code_of(lambda: main.main(words, prog_name="requant", standalone_mode=False))
    except Exception as bug:  # noqa: BLE001, as the interpreter does
        code = 1
        sys.excepthook(type(bug), bug, bug.__traceback__)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    for stream in (out, err):
        stream.flush()
    return [code, *(stream.buffer.getvalue().decode() for stream in (out, err))]


if __name__ == "__main__":
    commands = json.loads(Path(sys.argv[1]).read_text())
    sys.addaudithook(note)
    ran = [run(words) for words in commands]
    noted = list(events)  # what is written from here on is not the commands'
    Path(sys.argv[2]).write_text(json.dumps({"ran": ran, "events": noted}))
