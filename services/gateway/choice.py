"""From the steps of one choice to the pieces of its text. Knows neither the wire nor HTTP."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.gateway.detokenizer import Detokenizer
from services.gateway.generation import FinishReason, Logprob, Step, VerifierFailed
from services.gateway.stop_strings import StopStrings
from services.gateway.tokenizer import GatewayTokenizer


@dataclass(frozen=True, slots=True)
class TokenReport:
    """A token as OpenAI's `logprobs` object shows it.

    offset: characters before the token, counted from the start of the prompt.
    logprob, top: None for the first token of a prompt, which no distribution precedes.
    """

    token: str
    offset: int
    logprob: float | None
    top: dict[str, float] | None


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of one choice.

    token_ids: tokens that count, which ends with the one that completed a stop string. The piece's text may lag behind
        them: a part of a character, or of what may become a stop string, is held back.
    reports: of the tokens whose text begins in this or an earlier piece; empty when none were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    reports: tuple[TokenReport, ...] = ()
    finish_reason: FinishReason | None = None
    llm_steps: int = 0


class PromptText:
    """What the choices of a prompt share.

    text, offsets: the prompt's text and where each token begins in it; empty unless `whole`.
    detokenizer: stands behind the prompt; for forks.
    """

    def __init__(self, tokenizer: GatewayTokenizer, token_ids: Sequence[int], *, whole: bool) -> None:
        self.tokenizer = tokenizer
        self.token_ids = token_ids
        self.offsets: list[int] = []
        self.text = ""
        if not whole:
            self.detokenizer = Detokenizer.behind(tokenizer, token_ids)
            return
        self.detokenizer = Detokenizer(tokenizer)
        pieces, length = [], 0
        for token_id in token_ids:
            self.offsets.append(length)
            pieces.append(self.detokenizer.push(token_id))
            length += len(pieces[-1])
        self.text = "".join(pieces)


class ChoiceText:
    """Turns steps into deltas: text, stop strings, log-probability reports.

    echo: the prompt's text comes first, with its tokens' reports when there are any.
    report: whether log-probabilities were asked for.
    Both need the whole prompt's text.

    `push` raises VerifierFailed when the reports do not fit the tokens.
    """

    def __init__(
        self, prompt: PromptText, *, stop: Sequence[str] = (), echo: bool = False, report: bool = False
    ) -> None:
        self._tokenizer = prompt.tokenizer
        self._prompt = prompt
        self._detokenizer = prompt.detokenizer.fork()
        self._stop_strings = StopStrings(stop)
        self._pending: deque[TokenReport] = deque()
        self._prompt_to_report = echo and report
        self._echo_text = prompt.text if echo else ""
        # characters given out, and characters made so far (shown + held back), both from the prompt's start
        self._shown = self._made = len(prompt.text)

    def push(self, step: Step) -> Delta:
        """The piece that this step adds; the last one when it has a finish reason, and no step may follow it."""
        if self._prompt_to_report:
            self._prompt_to_report = False
            self._report_prompt(step.prompt_logprobs)
        text = self._take_echo()
        counted = 0
        for counted, token_id in enumerate(step.token_ids, start=1):
            if step.logprobs:
                self._pending.append(self._token_report(token_id, self._made, step.logprobs[counted - 1]))
            piece = self._detokenizer.push(token_id)
            self._made += len(piece)
            text += self._show(piece)
            if self._stop_strings.stopped:
                break
        finish_reason = FinishReason.STOP if self._stop_strings.stopped else step.finish_reason
        if finish_reason is not None and not self._stop_strings.stopped:
            text += self._finish()
            if self._stop_strings.stopped:
                finish_reason = FinishReason.STOP
        return Delta(
            text=text,
            token_ids=step.token_ids[:counted],
            reports=tuple(self._take_reports(finish_reason)),
            finish_reason=finish_reason,
            llm_steps=step.llm_steps,
        )

    def prompt_only(self) -> Delta:
        """The one piece of a choice for which nothing is generated and nothing reported."""
        return Delta(text=self._take_echo() + self._finish(), token_ids=(), finish_reason=FinishReason.LENGTH)

    def _finish(self) -> str:
        """Text of what never became a whole character, then what was held back for a stop string."""
        piece = self._detokenizer.finish()
        self._made += len(piece)
        text = self._show(piece)
        if self._stop_strings.stopped:
            return text
        rest = self._stop_strings.finish()
        self._shown += len(rest)
        return text + rest

    def _show(self, piece: str) -> str:
        shown = self._stop_strings.push(piece)
        self._shown += len(shown)
        return shown

    def _take_echo(self) -> str:
        text, self._echo_text = self._echo_text, ""
        return text

    def _take_reports(self, finish_reason: FinishReason | None) -> Iterable[TokenReport]:
        everything = finish_reason is not None and not self._stop_strings.stopped
        while self._pending and (everything or self._pending[0].offset < self._shown):
            yield self._pending.popleft()

    def _report_prompt(self, logprobs: Sequence[Logprob]) -> None:
        prompt = self._prompt.token_ids
        if len(logprobs) != len(prompt) - 1:
            raise VerifierFailed(
                f"the verifier sent {len(logprobs)} log-probabilities for a prompt of {len(prompt)} tokens"
            )
        start = next((i for i, token_id in enumerate(prompt) if not self._tokenizer.is_special(token_id)), None)
        self._pending.append(TokenReport(self._tokenizer.token_name(prompt[0], start == 0), 0, None, None))
        for i, logprob in enumerate(logprobs, start=1):
            self._pending.append(self._token_report(prompt[i], self._prompt.offsets[i], logprob, i == start))

    def _token_report(self, token_id: int, offset: int, logprob: Logprob, starts_text: bool = False) -> TokenReport:
        name = self._tokenizer.token_name(token_id, starts_text)
        top = {self._tokenizer.token_name(other, starts_text): value for other, value in logprob.top}
        return TokenReport(name, offset, logprob.logprob, top | {name: logprob.logprob})
