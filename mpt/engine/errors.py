"""Why an engine could not take or finish a request. Imports nothing heavy."""

from mpt.errors import EngineStopped, MPTError


class EngineError(MPTError):
    """Why the engine could not take or finish a request; the HTTP layer maps each to a status."""


class Overloaded(EngineError):
    """The queue is full, or the request waited too long in it."""


class PromptTooLong(EngineError):
    """Prompt plus max_tokens exceed the context or the KV budget."""


def too_long(n_prompt: int, max_tokens: int, limit: int) -> str:
    """How OpenAI says it: clients look for this sentence, to fall back to a model of a longer context."""
    return (
        f"This model's maximum context length is {limit} tokens. However, you requested {n_prompt + max_tokens} tokens "
        f"({n_prompt} in the prompt, {max_tokens} in the answer). Please shorten the prompt or lower max_tokens."
    )


class Unsupported(EngineError):
    """This engine cannot do what a field of the request asks."""


class ShuttingDown(EngineError):
    """The engine is draining: no new requests."""


class RequestTimeout(EngineError):
    """The request's deadline has passed."""


class EngineFailed(EngineError):
    """A bug; this request cannot be finished, others go on."""


class EngineGone(EngineError):
    """The engine has stopped for good, and this request with it; another replica, or this one anew, may answer it."""

    exit_code = EngineStopped.exit_code
