"""How long the launcher waits for its services, and how often it restarts them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Seconds, unless said otherwise.

    start_timeout_s, stop_timeout_s: for a service to become usable, and to end after SIGTERM.
    poll_s: between two questions whether a service that starts is usable.
    backoff_s, backoff_limit_s: the n-th restart in a row waits backoff_s * 2^(n-1), at most the limit.
    restarts, restart_window_s: so many deaths within the window are made good.
    alive_pause_s, alive_timeout_s, alive_attempts: a service that runs is asked after each pause whether it is alive,
        and is taken to hang when that many attempts in a row, each with the timeout, bring no answer.
    """

    start_timeout_s: float = 120.0
    stop_timeout_s: float = 35.0
    poll_s: float = 0.1
    backoff_s: float = 0.5
    backoff_limit_s: float = 15.0
    restarts: int = 5
    restart_window_s: float = 120.0
    # Adds little to the 24 s below, and is long beside what a question costs.
    alive_pause_s: float = 3.0
    # An answer waits while Python is busy: a speculator drafts, and reads prompts by pieces, on the answering thread.
    alive_timeout_s: float = 8.0
    # 24 s without a sign of life, and with the pause less than 30: the gateway takes 10 to 15 s to see that a verifier
    # hangs, and then waits 30 s for it (resume_timeout_s), so that its streams survive a restart of some 10 s.
    # Counted in answers, not by the clock: when the launcher itself was stopped, or the machine slept, the one attempt
    # under way fails, and the next is answered.
    alive_attempts: int = 3
