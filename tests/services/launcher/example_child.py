"""A service of the launcher's tests: answers GET /ready and /alive, and writes what happens to it into a journal.

Standard library alone, so that it starts in milliseconds.
"""

import argparse
import http.server
import itertools
import os
import signal
import subprocess
import sys
import threading
import time


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("port", type=int)
    parser.add_argument("journal")
    parser.add_argument("--fail", action="store_true", help="end at the start")
    parser.add_argument("--never-ready", action="store_true")
    parser.add_argument("--stubborn", action="store_true", help="ignore SIGTERM")
    parser.add_argument("--drain-s", type=float, default=0.0)
    parser.add_argument("--slow-s", type=float, nargs="*", default=[], help="how long answers to /alive take, in turn")
    parser.add_argument("--deaf-after", type=int, default=0, help="close the port after so many answers to /alive")
    parser.add_argument("--grandchild", action="store_true", help="start a process of its own")
    options = parser.parse_args()

    def note(event: str, pid: int) -> None:
        with open(options.journal, "a") as journal:
            journal.write(f"{options.name} {event} {pid}\n")

    def stop(number: int, frame: object) -> None:
        note("asked", os.getpid())
        if not options.stubborn:
            time.sleep(options.drain_s)
            note("stopped", os.getpid())
            os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    note("started", os.getpid())
    if options.fail:
        print("first line\nthe model is missing", file=sys.stderr, end="")
        sys.exit(3)
    if options.grandchild:
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
        note("grandchild", subprocess.Popen([sys.executable, "-I", "-S", "-c", code]).pid)

    delays = itertools.cycle(options.slow_s or [0.0])
    answers: list[str] = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/alive":
                note("is-alive", os.getpid())
                time.sleep(next(delays))
                answers.append(self.path)
                if len(answers) == options.deaf_after:
                    threading.Thread(target=server.shutdown).start()
            self.send_response(503 if options.never_ready else 200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    def serve() -> None:
        with server:
            server.serve_forever()

    server = http.server.HTTPServer(("127.0.0.1", options.port), Answer)
    threading.Thread(target=serve, daemon=True).start()
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
