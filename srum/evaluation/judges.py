"""What looks at the images of a benchmark: a server, the exact checker, detectors, nobody."""

from __future__ import annotations

from collections.abc import Sequence

from srum.config import ConfigError
from srum.evaluation.benchmark import Benchmark, Evaluator, Failure, Verdict
from srum.exchange.chat import Ask, Message, NoReply, Reply, Server, ServerError
from srum.plugins import find


class ChatJudge:
    """A judge on a server, asked at temperature 0; a further attempt has another seed, and replies are kept."""

    def __init__(self, server: Server, template_hash: str) -> None:
        self.server, self.concurrency = server, server.concurrency
        self.name = f"{server.model}, template {template_hash}" if template_hash else server.model

    def ask(self, messages: Sequence[Message], max_tokens: int, attempt: int = 0) -> Reply | NoReply:
        """Its reply."""
        return self.server.ask(Ask(messages, max_tokens, 0.0, attempt))

    def require_answers(self, verdicts: Sequence[Verdict]) -> None:
        """Raises ServerError where it has answered nothing so far, of several questions."""
        failed = [verdict for verdict in verdicts if verdict.failure == Failure.NO_REPLY]
        if len(failed) > 1 and len(failed) == len(verdicts) and not self.server.answered:
            raise ServerError(f"{self.server.url} answered none of {len(failed)} questions: {failed[0].raw[-1][:200]}")


class Checker:
    """The exact checker of the embedded world."""

    name, concurrency = "exact checker", 1

    def __init__(self, device: str = "auto") -> None:
        pass  # it needs none


def load_evaluator(kind: str, benchmark: Benchmark, server: Server | None, device: str) -> Evaluator:
    """The evaluator of that kind: ``chat``, which is ``server``, a shipped one, or ``module:Name``.

    Raises ConfigError for one that the benchmark does not know or that lacks a server, and PluginError.
    """
    if kind not in benchmark.evaluators:
        raise ConfigError(
            f"evaluator: {benchmark.name} has no {kind!r}; it has {', '.join(benchmark.evaluators)}, none"
        )
    if kind != "chat":
        evaluator: Evaluator = find("evaluator", kind)(device=device)
        return evaluator
    if server is None:
        raise ConfigError(f"{benchmark.name} is judged by a server: give --judge-url and --judge-model")
    return ChatJudge(server, benchmark.template_hash)
