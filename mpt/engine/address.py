"""Addresses of models that another server computes."""

from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

from mpt.errors import UserError


@dataclass(frozen=True)
class Address:
    """Where a model of a Triton server is, and whose tokenizer it has."""

    server: str  # host:port of gRPC
    model: str
    checkpoint: str

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Raises UserError for anything but triton://HOST:PORT/MODEL?checkpoint=NAME."""
        parts = urlsplit(text)
        query = parse_qs(parts.query)
        model, checkpoint = parts.path.strip("/"), query.pop("checkpoint", [""])[0]
        try:
            is_whole = bool(parts.hostname and parts.port and model and checkpoint) and not query
        except ValueError:
            is_whole = False
        if not is_whole:
            raise UserError(
                f"`{text}` is no Triton address; write triton://HOST:GRPC_PORT/MODEL?checkpoint=NAME, the checkpoint "
                "being the folder or name whose tokenizer the model has"
            )
        return cls(parts.netloc, model, checkpoint)
