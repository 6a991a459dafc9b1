"""Commands on a terminal of so many columns: what it is sent."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

SGR = re.compile(r"\x1b\[[0-9;]*m")
CLEAN = {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}
UNSET = ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "COLUMNS", "LINES", "PYTHONIOENCODING")


def on_terminal(*words, columns=80, stdout=True, stderr=False, env=None):
    """(exit code, what the terminal got, what the pipes got); the streams that are not on it are pipes."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in UNSET} | CLEAN | (env or {})
    code = "import sys; sys.argv[0] = 'requant'\nfrom requant.cli import run; run()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdin=side,
        stdout=side if stdout else subprocess.PIPE,
        stderr=side if stderr else subprocess.PIPE,
        env=environment,
    )
    os.close(side)
    shown = bytearray()
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # how Linux tells that nobody writes any more
            break
        if not part:
            break
        shown += part
    piped = process.communicate(timeout=60)
    os.close(main)
    text = shown.decode(errors="replace").replace("\r\n", "\n")
    return process.returncode, text, b"".join(p for p in piped if p).decode()


def plain(text):
    """The text without colours."""
    return SGR.sub("", text)
