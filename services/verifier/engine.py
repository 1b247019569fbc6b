"""The engine loop: one thread that owns the device and every sequence.

A step reads: plan, ask for drafts, settle the last step, collect drafts, forward, verify, commit. What computes
meanwhile hides the settling: speculators elsewhere, or behind forward the device. Requests come in and go out through
thread-safe doors.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from runtime.parallel.liveness import GroupFailed
from services.verifier.budget import Ask
from services.verifier.drafts import DraftCollector
from services.verifier.inbox import Arrival, Inbox
from services.verifier.logprobs import gather_logprobs
from services.verifier.metrics import StepReport, VerifierMetrics
from services.verifier.request import EngineStopped, GenerationRequest, Sink, StepOutput, TokenLogprob
from services.verifier.runner import Runner, StepLogits
from services.verifier.scheduler import Scheduler, SequencePlan
from services.verifier.sequence import Sequence as RunningSequence
from services.verifier.verification import Choosing, verify
from speculation.acceptance import Accepted
from speculation.logits import LogitsPipeline
from speculation.merge import MergedDraft

log = logging.getLogger(__name__)

# What hands tokens out wants the cores that an order for drafts needs to get on its way: the order goes first.
_HEAD_START_S = 0.0005


class StepFailed(RuntimeError):
    """The step that a sequence took part in failed; the sequence is lost, the engine goes on."""


class Engine:
    """Continuous batching of token trees. `on_fatal` is called when the loop itself breaks.

    `submit` and `cancel` may be called from any thread; everything else happens in the engine's own.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        drafts: DraftCollector,
        metrics: VerifierMetrics,
        max_waiting: int,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.drafts = drafts
        self.metrics = metrics
        self._on_fatal = on_fatal
        metrics.waiting.set_function(lambda: len(scheduler.waiting))
        metrics.running.set_function(lambda: len(scheduler.running))
        metrics.kv_free_blocks.set_function(lambda: scheduler.cache.free_blocks)
        self._inbox = Inbox(max_waiting, lambda: len(scheduler.waiting))
        self._aborted = threading.Lock()  # once taken, it is never given back
        self._sequences: dict[int, RunningSequence] = {}
        self._unsettled: list[tuple[Ask, StepReport]] = []
        self._step_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the loop after the step under way; sequences still alive get an error."""
        self._inbox.close()
        # After abort() the step under way may never end.
        self._thread.join(0 if self._aborted.locked() else timeout_s)

    def abort(self, reason: BaseException) -> None:
        """End all requests at once so that another verifier can go on with them; no step follows.

        From any thread: the engine's own may be in a step that waits for a lost rank for ever.
        """
        if not self._aborted.acquire(blocking=False):
            return
        self._inbox.close()
        sinks = [arrival.sink for arrival in self._inbox.take().arrivals]
        sinks += [sequence.sink for sequence in list(self._sequences.values())]
        # Those that have just ended, of which nobody knows yet; who was told meanwhile ignores what comes behind it.
        outputs = [output for _, report in list(self._unsettled) for output in report.outputs]
        sinks += [sink for sink, output in outputs if output.finish_reason is not None]
        for sink in sinks:
            sink(EngineStopped(str(reason)))
        self._on_fatal(reason)

    def submit(self, request: GenerationRequest, sink: Sink) -> int:
        """Queue a request; return its id for `cancel`.

        Raises:
            InvalidRequest: it can never run. QueueFull: too many are waiting. EngineStopped: it is too late.
        """
        config = self.runner.model.config
        request.check(config.vocab_size, config.context_length)
        return self._inbox.put(request, sink, self._retry_after_ms())

    def cancel(self, sequence_id: int) -> None:
        """Free what a sequence holds before the next step; nothing happens when it has ended."""
        self._inbox.cancel(sequence_id)

    def _retry_after_ms(self) -> int:
        return max(100, min(30_000, int(1000 * self._step_seconds * 50)))

    def _run(self) -> None:
        try:
            while self._exchange():
                self._step_or_fail()
            self._settle()
            stopped = EngineStopped("the verifier is stopping")
            for arrival in self._inbox.take().arrivals:
                arrival.sink(stopped)
            self._fail(self._sequences.values(), stopped)
        except BaseException as error:  # outside of a step nothing may fail: the process must not go on
            self.abort(error)
            raise

    def _step_or_fail(self) -> None:
        try:
            self.step()
        except GroupFailed as error:
            self.abort(error)
        except Exception as error:  # whatever a step meets, its sequences get an error and the engine lives
            log.exception("engine step failed")
            if self.runner.device_works():
                self._settle()
                self._fail(self.scheduler.running, StepFailed(f"engine step failed: {error!r}"))
            else:  # whoever fails all that it is given at once looks the least loaded to every gateway
                self.abort(error)

    def step(self) -> None:
        """One step for every planned sequence."""
        started = time.perf_counter()
        plans = self.scheduler.plan(drafts=not self.drafts.resting)
        if not plans:
            return  # all that ran was cancelled
        asked = self.drafts.ask(plans)
        if asked.elsewhere:
            time.sleep(_HEAD_START_S)
        if asked.elsewhere or not self.runner.asynchronous:
            self._settle()
        drafts = self.drafts.collect(asked)
        drafted = time.perf_counter()
        logits = self.runner.forward(plans, drafts)
        self._settle()
        accepted = self._verify(plans, drafts, logits)
        outputs = self._commit(plans, drafts, logits, accepted)
        finished = time.perf_counter()
        self._step_seconds = finished - started
        report = StepReport(
            logits.rows, logits.chunk_rows, drafts, accepted, drafted - started, finished - drafted, outputs
        )
        self._unsettled.append((asked.ask, report))

    def _exchange(self) -> bool:
        """Take arrivals and cancellations in; sleep while there is nothing to do; False when it is time to stop."""
        if self.scheduler.idle:  # the next step may be long in coming
            self._settle()
            self.drafts.flush()
        mail = self._inbox.take(wait=self.scheduler.idle)
        for arrival in mail.arrivals:
            if arrival.id not in mail.cancelled:
                self._admit(arrival)
        for sequence_id in mail.cancelled:
            if (sequence := self._sequences.get(sequence_id)) is not None:
                self._end(sequence, "cancelled")
        if self.scheduler.idle:
            self.scheduler.cache.check_idle()
        return not mail.closed

    def _admit(self, arrival: Arrival) -> None:
        model, request = self.runner.model, arrival.request
        pipeline = LogitsPipeline(request.sampling, request.prompt, model.config.vocab_size, model.device)
        sequence = RunningSequence(arrival.id, request, arrival.sink, pipeline)
        self._sequences[sequence.id] = sequence
        self.scheduler.add(sequence)

    def _verify(
        self, plans: Sequence[SequencePlan], drafts: Mapping[int, MergedDraft], logits: StepLogits
    ) -> dict[int, Accepted]:
        decoding = [plan.sequence for plan in plans if plan.decodes]
        return verify(decoding, drafts, logits, self.drafts.settings.rule, Choosing.of(self.runner.model))

    def _commit(
        self,
        plans: Sequence[SequencePlan],
        drafts: Mapping[int, MergedDraft],
        logits: StepLogits,
        accepted: Mapping[int, Accepted],
    ) -> list[tuple[Sink, StepOutput]]:
        """Keep the KV of the accepted paths, append the tokens, end what has finished; what each sequence gets."""
        for plan in plans:
            if (chunk := logits.chunks.get(plan.sequence.id)) is not None:
                _add_prompt_logprobs(plan, chunk)
        decoding = [plan.sequence for plan in plans if plan.decodes]
        self.runner.keep([(sequence, accepted[sequence.id].nodes) for sequence in decoding])
        outputs = [(sequence.sink, self._advance(sequence, accepted[sequence.id], logits)) for sequence in decoding]
        for sequence in decoding:  # once all outputs are made: what fails before fails every sequence of the step
            if sequence.finish_reason is not None:
                self._end(sequence, sequence.finish_reason.value)
        return outputs

    def _advance(self, sequence: RunningSequence, step: Accepted, logits: StepLogits) -> StepOutput:
        sequence.llm_steps += 1
        kept = sequence.append(step.token_ids)
        logprobs: tuple[TokenLogprob, ...] = ()
        if sequence.request.top_logprobs is not None and kept:
            root = logits.tree_starts[sequence.id]
            visited = [root, *[root + node for node in step.nodes]][: len(kept)]
            logprobs = gather_logprobs(logits.trees[visited], kept, sequence.request.top_logprobs)
        prompt_logprobs = () if sequence.prompt_logprobs_sent else tuple(sequence.prompt_logprobs)
        sequence.prompt_logprobs_sent = True
        return StepOutput(kept, sequence.llm_steps, logprobs, prompt_logprobs, sequence.finish_reason)

    def _settle(self) -> None:
        """Hand out what the last step gave, count it, and learn from it."""
        unsettled, self._unsettled = self._unsettled, []
        for ask, report in unsettled:
            with self.metrics.settle_seconds.time():
                for sink, output in report.outputs:
                    sink(output)
                self.metrics.count_step(report)
                if preemptions := self.scheduler.take_preemptions():
                    self.metrics.preemptions.inc(preemptions)
                self._learn(ask, report)

    def _learn(self, ask: Ask, report: StepReport) -> None:
        try:
            self.drafts.budget.learn(ask, report.accepted, report.draft_seconds, report.step_seconds)
        except Exception:  # the step is over and its tokens are out: what it taught is worth no request
            log.exception("nothing was learned from a step")

    def _end(self, sequence: RunningSequence, outcome: str) -> None:
        del self._sequences[sequence.id]
        self.scheduler.remove(sequence)
        self.drafts.forget(sequence)
        self.metrics.requests.labels(outcome).inc()

    def _fail(self, sequences: Iterable[RunningSequence], error: StepFailed | EngineStopped) -> None:
        for sequence in list(sequences):
            sequence.sink(error)
            self._end(sequence, "failed")


def _add_prompt_logprobs(plan: SequencePlan, chunk: torch.Tensor) -> None:
    """Add the log-probabilities of the prompt tokens behind the chunk's rows; after a preemption they are there."""
    sequence = plan.sequence
    first = plan.chunk_end - len(chunk)  # row i is token first + i, and predicts token first + i + 1
    done = len(sequence.prompt_logprobs)
    tokens = sequence.request.prompt[first + 1 : plan.chunk_end + 1]
    rows = gather_logprobs(chunk[: len(tokens)], tokens, sequence.request.top_logprobs or 0)
    sequence.prompt_logprobs.extend(rows[done - first :])
