"""Stand-in for any command: logs calls and replays scripted answers.

Environment variables:
  CALLS: file that receives one JSON list per call: name and arguments.
  PLAY: JSON object {piece of a command line: [[stdout, exit code], ...]}. The n-th call
    that contains the piece uses the n-th entry; the last entry repeats. With the exit
    code "signal", the call waits for SIGTERM and exits with 75. With "abort", the call
    ends with SIGABRT.
  VM: home directory of every virtual machine. ssh runs commands in this directory; scp
    copies files to this directory.
"""

import json
import os
import signal
import subprocess
import sys


def play(line: str, earlier_lines: list[str]) -> int:
    """Print the scripted output of a command line; return its exit code."""
    for piece, answers in json.loads(os.environ["PLAY"]).items():
        if piece in line:
            turn = sum(piece in earlier for earlier in earlier_lines)
            out, code = answers[min(turn, len(answers) - 1)]
            if code == "signal":
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
            print(out, flush=True)
            if code == "abort":
                os.abort()
            return signal.pause() if code == "signal" else code
    return 0


def main(name: str, *arguments: str) -> int:
    """Log the call. Run the command of ssh; replay answers to all other calls."""
    with open(os.environ["CALLS"], "a+") as calls:
        calls.seek(0)
        earlier_calls = [json.loads(line) for line in calls]
        calls.write(json.dumps([name, *arguments]) + "\n")
    if "scp" in arguments:
        source, target = arguments[4], arguments[5].partition(":")[2]
        with (
            open(source, "rb") as source_file,
            open(f"{os.environ['VM']}/{target}", "wb") as target_file,
        ):
            target_file.write(source_file.read())
    if "ssh" in arguments:
        (command,) = (a for a in arguments if a.startswith("--command="))
        os.chdir(os.environ["VM"])
        line = command.removeprefix("--command=")
        code = subprocess.run(["bash", "-c", line], check=False).returncode
        return code if code >= 0 else 255  # ssh's code if a signal ended the command
    lines = [" ".join(call) for call in earlier_calls if "ssh" not in call]
    return play(" ".join([name, *arguments]), lines)


if __name__ == "__main__":
    sys.exit(main(os.path.basename(sys.argv[0]), *sys.argv[1:]))
